"""Hosts that are sound, and hosts that are not: real ranks, with a real fault on one of them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from real_runs import ROOT, free_port

from swinv2_scale.preflight import Health, judge


def doctor(*arguments: str, fault: str = "") -> tuple[list[int], str]:
    """Exit codes and rank 0's output of two ranks on hosts n0 and n1; `fault` is a shell command before rank 1's."""
    common = {
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "GLOO_SOCKET_IFNAME": "lo",
    }
    ranks = []
    for rank in (0, 1):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "SLURMD_NODENAME": f"n{rank}"}
        command = [sys.executable, "-m", "swinv2_scale.cli", "doctor", "--distributed", *arguments]
        if fault and rank == 1:
            command = ["sh", "-c", f'{fault}; exec "$@"', "sh", *command]
        ranks.append(
            subprocess.Popen(
                command,
                cwd=ROOT,
                env={**os.environ, **common, **own},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    outputs = [process.communicate(timeout=120)[0] for process in ranks]
    return [process.returncode for process in ranks], outputs[0]


def test_sound_hosts(tmp_path: Path, shards: Path) -> None:
    data = ["--data", str(shards / "digits/train"), "--run-dir", str(tmp_path)]
    codes, output = doctor(*data, "--suspects", str(tmp_path / "suspects"))
    assert codes == [0, 0], output
    assert "rank 1 on n1, cpu:" in output and output.endswith("2 ranks are sound\n")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.long
def test_a_host_that_cannot_write_is_named(tmp_path: Path) -> None:
    """A limit on the size of files, on one rank only."""
    suspects = tmp_path / "suspects"
    suspects.write_text("n7\n")
    more = ["--run-dir", str(tmp_path / "run"), "--suspects", str(suspects)]
    codes, output = doctor(*more, fault="trap '' XFSZ; ulimit -f 100")
    assert codes == [1, 1], output
    assert "writing in" in output and "File too large" in output and output.endswith("suspect hosts: n1\n")
    assert suspects.read_text() == "n1\nn7\n"


def test_data_out_of_reach_and_json(tmp_path: Path) -> None:
    codes, output = doctor("--data", str(tmp_path / "nowhere"), "--json")
    assert codes == [1, 1]
    report = json.loads(output)
    assert report["suspects"] == ["n0", "n1"] and "nowhere" in report["ranks"][1]["problems"][0]


def test_slow_is_what_takes_far_longer_than_on_most_ranks() -> None:
    reports = [Health(rank, f"n{rank // 2}", "cpu", multiply_seconds=0.2, data_seconds=0.01) for rank in range(6)]
    reports[3].multiply_seconds, reports[0].data_seconds = 0.9, 0.05
    judge(reports, factor=3.0)
    assert [bool(report.problems) for report in reports] == [False, False, False, True, False, False]
    assert reports[3].problems == ["multiplying matrices takes 0.90 s, 0.20 s on most ranks"]


def test_a_wrong_product_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from swinv2_scale import preflight

    right = torch.Tensor.__matmul__

    def faulty(self: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        product = right(self, other)
        if product.dim() == 2:
            product[5, 7] += 1
        return product

    monkeypatch.setattr(torch.Tensor, "__matmul__", faulty)
    with pytest.raises(ArithmeticError, match="1 of 1024 row sums are wrong"):
        preflight._multiply()
