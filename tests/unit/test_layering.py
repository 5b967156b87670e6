"""The house rules, read from the imports: who may import whom, and which library lives in which file."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted([*ROOT.glob("swinv2_scale/**/*.py"), *ROOT.glob("launch/*.py")])
LONGEST = 500
LONGEST_LAUNCHER = 80

# A module may import modules of its own layer and of those below. The longest prefix of a module's name counts.
LAYERS = {
    "swinv2_scale.config": 0,
    "swinv2_scale.limits": 0,
    "swinv2_scale.distributed": 0,
    "swinv2_scale.signals": 0,
    "swinv2_scale.ops": 1,
    "swinv2_scale.models": 2,
    "swinv2_scale.data": 2,
    "swinv2_scale.parallel": 2,
    "swinv2_scale.mapped": 2,
    "swinv2_scale.engine": 2,
    "swinv2_scale.zero": 2,
    "swinv2_scale.optim": 2,
    "swinv2_scale.guard": 3,
    "swinv2_scale.profile": 3,
    "swinv2_scale.heartbeat": 3,
    "swinv2_scale.telemetry": 3,
    "swinv2_scale.checkpoint": 3,
    "swinv2_scale.report": 3,
    "swinv2_scale.charts": 3,
    "swinv2_scale.drawing": 3,
    "swinv2_scale.dashboard": 3,
    "swinv2_scale.compare": 3,
    "swinv2_scale.export": 3,
    "swinv2_scale.embed": 3,
    "swinv2_scale.doctor": 3,
    "swinv2_scale.planner": 3,
    "swinv2_scale.plan_report": 3,
    "swinv2_scale.preflight": 3,
    "swinv2_scale.train": 4,
    "swinv2_scale.tasks": 5,
    "swinv2_scale.run": 5,
    "swinv2_scale.evaluation": 5,
    "swinv2_scale.predict": 5,
    "swinv2_scale.submit": 5,
    "swinv2_scale.cli": 6,
    "swinv2_scale.cli_data": 6,
    "swinv2_scale": 6,
    "launch": 7,
}
# The only files that may import a library.
HOMES = {
    "hydra": "swinv2_scale/config.py",
    "omegaconf": "swinv2_scale/config.py",
    "torch.distributed": "swinv2_scale/distributed.py",
    "deepspeed": "swinv2_scale/engine.py swinv2_scale/zero.py",
    "wandb": "swinv2_scale/telemetry.py",
    "wandb_workspaces": "swinv2_scale/dashboard.py",
    "torch.utils.tensorboard": "swinv2_scale/telemetry.py",
    "fairscale": "swinv2_scale/models/memory.py",
    "requests": "swinv2_scale/data/sources.py",
    "fsspec": "swinv2_scale/data/sources.py",
    "skimage": "swinv2_scale/data/demo.py",
    "sklearn": "swinv2_scale/data/demo.py",
    "onnxruntime": "swinv2_scale/export.py",
    "pycocotools": "swinv2_scale/data/coco.py",
    "pyarrow": "swinv2_scale/embed.py",
    "av": "swinv2_scale/data/videos.py",
}
NEVER = {"timm", "apex", "mmcv", "matplotlib"}


def imports(path: Path) -> set[str]:
    """Full names of everything that a file imports, at its head or inside functions."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def layer(module: str) -> int:
    prefixes = [p for p in LAYERS if module == p or (p != "swinv2_scale" and module.startswith(p + "."))]
    assert prefixes, f"{module} has no layer: say in LAYERS where it belongs"
    return LAYERS[max(prefixes, key=len)]


def inside(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_imports_go_down(path: Path) -> None:
    for name in imports(path):
        if inside(name, "swinv2_scale"):
            assert layer(name) <= layer(module_of(path)), f"{module_of(path)} imports {name}, which lies above it"


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_libraries_stay_in_their_file(path: Path) -> None:
    for name in imports(path):
        assert not any(inside(name, library) for library in NEVER), f"{path} imports {name}"
        for library, home in HOMES.items():
            assert not inside(name, library) or str(path.relative_to(ROOT)) in home.split(), (
                f"{path} imports {name}: see {home}"
            )


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_files_stay_short(path: Path) -> None:
    limit = LONGEST_LAUNCHER if path.parent.name == "launch" else LONGEST
    assert len(path.read_text().splitlines()) <= limit


def test_window_partition_exists_once() -> None:
    """Six-dimensional reshaping of windows belongs to ops/windows.py."""
    for path in FILES:
        if path.name != "windows.py":
            assert "def partition" not in path.read_text() and "window_partition" not in path.read_text(), path


def test_data_knows_nothing_of_models_and_engines() -> None:
    for path in ROOT.glob("swinv2_scale/data/*.py"):
        for name in imports(path):
            assert not any(inside(name, f"swinv2_scale.{room}") for room in ("models", "engine", "optim", "ops")), path


def test_the_files_that_the_readme_names_exist() -> None:
    named = set(
        re.findall(
            r"`((?:swinv2_scale|conf|launch|kernels|tests)/[\w/]*(?:\.py|\.md)?)`", (ROOT / "README.md").read_text()
        )
    )
    assert len(named) >= 8
    assert [name for name in named if not (ROOT / name).exists()] == []
