"""Memory of the ranks against the formula, at 1, 2 and 4 of them."""

import re
import subprocess
import sys

import pytest
from real_runs import ROOT

from swinv2_scale.planner import state_bytes


@pytest.mark.long
def test_the_peak_of_a_rank_is_what_the_formula_says() -> None:
    command = [sys.executable, "docs/benchmarks/engine.py", "memory"]
    output = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    found = re.findall(r"measured ([\d.]+), planned ([\d.]+)", output)
    assert len(found) == 3, output
    for measured, planned in found:
        assert float(measured) == pytest.approx(float(planned), rel=0.1), output
    assert float(found[2][0]) < 0.6 * float(found[0][0])


@pytest.mark.parametrize(
    ("zero_stage", "precision", "total"),
    [(0, "fp32", 16), (1, "bf16", 2 + 6 + 4), (2, "bf16", 2 + 3 + 4), (3, "bf16", 7.5)],
)
def test_bytes_per_parameter(zero_stage: int, precision: str, total: float) -> None:
    """Of four ranks; without sharding 4 weights + 4 gradients + 8 moments."""
    assert sum(state_bytes(10, zero_stage=zero_stage, precision=precision, ranks=4, ema=False).values()) == 10 * total
