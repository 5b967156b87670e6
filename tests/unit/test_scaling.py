"""The computed part of docs/scaling.md is what its script says, and the formula is right where that is known."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def scaling() -> ModuleType:
    spec = importlib.util.spec_from_file_location("scaling", ROOT / "docs/benchmarks/scaling.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["scaling"] = module  # which dataclasses look up
    spec.loader.exec_module(module)
    return module


def test_the_document_shows_the_tables_of_the_script(scaling: ModuleType) -> None:
    text = (ROOT / "docs/scaling.md").read_text()
    for table in (scaling.by_gpus(), scaling.by_reached(), scaling.by_images()):
        assert table in text, f"docs/scaling.md should show\n{table}"


def test_collectives(scaling: ModuleType) -> None:
    """One GPU sends nothing; in a node a ring moves (n - 1)/n of the bytes; an all-reduce is two passes."""
    machine = scaling.Machine("m", bf16_peak=1.0, memory=1.0, inside=100.0 / scaling.LINK, between=10.0 / scaling.LINK)

    def seconds(gpus: int, passes: int = 1) -> float:
        latency = scaling.LATENCY * (gpus.bit_length() - 1)
        return scaling.collective_seconds(800.0, gpus, machine, passes=passes) - latency

    assert seconds(1) == 0
    assert seconds(4) == pytest.approx(800 * 3 / 4 / 100)
    assert seconds(16) == pytest.approx(800 * 7 / 8 / 100 + 100 * 1 / 2 / 10)
    assert seconds(16, passes=2) == pytest.approx(2 * seconds(16))
    assert seconds(1024) < 800 * 7 / 8 / 100 + 100 / 10, "bounded, however many"


def test_overlap_hides_no_more_than_backward_and_never_the_last_bucket(scaling: ModuleType) -> None:
    job = scaling.Job("x", parameters=100_000_000, flops_per_image=1e10, images=64, recompute=False, groups=4)
    plain, hidden = (scaling.step_seconds(job, 64, scaling.A100, overlap=overlap) for overlap in (False, True))
    assert hidden["compute"] == plain["compute"] and hidden["communication"] < plain["communication"]
    one_bucket = [scaling.step_seconds(job, 64, scaling.A100, overlap=o, bucket=10**9)["step"] for o in (False, True)]
    assert one_bucket[0] == one_bucket[1]
    quick = scaling.Job("x", parameters=100_000_000, flops_per_image=1.0, images=1, recompute=False, groups=4)
    exposed = [scaling.step_seconds(quick, 64, scaling.A100, overlap=o)["communication"] for o in (False, True)]
    assert exposed[0] == pytest.approx(exposed[1]), "there is next to no backward to hide behind"
