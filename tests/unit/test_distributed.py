"""Who a process is, from what launchers leave in its environment."""

import pytest

from swinv2_scale import distributed

LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
BATCH = {"SLURM_PROCID": "0", "SLURM_NTASKS": "16", "SLURM_LOCALID": "0"}
STEP = {"SLURM_PROCID": "11", "SLURM_NTASKS": "16", "SLURM_STEP_NUM_TASKS": "16", "SLURM_LOCALID": "3"}
TORCHRUN = {"RANK": "2", "WORLD_SIZE": "4", "LOCAL_RANK": "0"}


@pytest.mark.parametrize(
    ("environment", "place"),
    [({}, (0, 1, 0)), (BATCH, (0, 1, 0)), (STEP, (11, 16, 3)), (STEP | TORCHRUN, (2, 4, 0))],
    ids=["python", "a batch script without srun", "srun", "torchrun in a step"],
)
def test_the_place_of_a_process(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], place: tuple[int, int, int]
) -> None:
    for name in LAUNCHERS:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert (distributed.rank(), distributed.world_size(), distributed.local_rank()) == place


@pytest.mark.parametrize(("name", "ranks"), [("LOCAL_WORLD_SIZE", 2), ("LOCAL_SIZE", 2), ("OTHER", 4)])
def test_ranks_of_a_host(monkeypatch: pytest.MonkeyPatch, name: str, ranks: int) -> None:
    """torchrun's name, DeepSpeed's, and neither."""
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.delenv("LOCAL_SIZE", raising=False)
    for key, value in {**TORCHRUN, name: "2"}.items():
        monkeypatch.setenv(key, value)
    assert distributed.ranks_here() == ranks


@pytest.mark.parametrize(
    ("hosts", "first"),
    [
        ("n1", "n1"),
        ("n[1-2]", "n1"),
        ("gpu[003-007,9]-ib,login", "gpu003-ib"),
        ("a,b[1-2]", "a"),
        ("r[1,3]n[04-09]", "r1n04"),
    ],
)
def test_the_first_host_of_a_list(hosts: str, first: str) -> None:
    assert distributed.first_host(hosts) == first
