"""Shards of real images, and runs in a temporary directory."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from real_runs import Run, run

from swinv2_scale.data.pack import pack


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory with photographs and digits, training and validation."""
    root = tmp_path_factory.mktemp("shards")
    for name in ("photographs/train", "photographs/validation", "digits/train", "digits/validation"):
        pack(name, root / name, format="demo", shard_size=100, seed=0)
    return root


@pytest.fixture
def launch(tmp_path: Path, shards: Path) -> Callable[..., Run]:
    """launch(name, *overrides, …) is real_runs.run in tmp_path/name."""

    def start(name: str, *overrides: str, **options: Any) -> Run:
        return run(tmp_path / name, *overrides, **options)

    return start
