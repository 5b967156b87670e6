"""Memory of the ranks against the formula, at 1, 2 and 4 of them."""

import re
import subprocess
import sys

import pytest
from real_runs import ROOT


@pytest.mark.long
def test_the_peak_of_a_rank_is_what_the_formula_says() -> None:
    command = [sys.executable, "docs/benchmarks/engine.py", "memory"]
    output = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    found = re.findall(r"measured ([\d.]+), planned ([\d.]+)", output)
    assert len(found) == 3, output
    for measured, planned in found:
        assert float(measured) == pytest.approx(float(planned), rel=0.1), output
    assert float(found[2][0]) < 0.65 * float(found[0][0])
