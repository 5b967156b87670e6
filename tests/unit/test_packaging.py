"""A wheel holds everything that a checkout's package reads: conf/ and the report's template."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_wheel_is_complete_without_a_compiler(tmp_path: Path) -> None:
    source = tmp_path / "source"
    for name in ("conf", "swinv2_scale"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, source)
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", tmp_path, source],
        check=True,
        timeout=120,
        env={"PATH": str(tmp_path), "CUDA_HOME": str(tmp_path)},  # no compiler: kernels/ is not asked for
    )
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {f"swinv2_scale/{path.relative_to(ROOT)}" for path in (ROOT / "conf").rglob("*.yaml")}
    package = ROOT / "swinv2_scale"
    expected |= {str(p.relative_to(ROOT)) for p in package.rglob("*") if p.suffix in (".py", ".template")}
    assert expected <= names, sorted(expected - names)[:5]
    assert not [name for name in names if name.startswith(("tests/", "launch/"))]
