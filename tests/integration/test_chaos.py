"""A round of chaos, another one each time; `python tests/integration/chaos.py --rounds 50` plays more."""

import random
import subprocess
import sys
from pathlib import Path

import pytest
from chaos import TASKS


@pytest.mark.long
@pytest.mark.parametrize("task", TASKS)
def test_a_round_of_chaos(task: str) -> None:
    seed = random.randrange(10**6)
    command = [sys.executable, Path(__file__).with_name("chaos.py"), "--rounds", "1", "--seed", str(seed)]
    command += ["--task", task]
    played = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert played.returncode == 0, played.stdout + played.stderr
    assert (
        f"1 of 1 rounds held, {played.stdout.count(' at ') + played.stdout.count(' in step_')} blows" in played.stdout
    )
