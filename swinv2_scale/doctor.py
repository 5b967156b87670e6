"""`swinv2-scale doctor`: what is installed, which kernels run here, whether they are right, and how fast they are."""

import contextlib
import importlib
import importlib.util
import json
import math
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from itertools import chain
from pathlib import Path

import torch
from packaging.requirements import Requirement
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

from swinv2_scale import distributed
from swinv2_scale.ops import comparison, native, selfcheck, selfcheck_block
from swinv2_scale.ops.cosine_window_attention import why_reference
from swinv2_scale.ops.selfcheck import Check

# Distribution -> the module that shows whether it works; DeepSpeed's is ours, which tells it of a missing GPU.
PACKAGES = {
    "torch": "torch",
    "torchvision": "torchvision",
    "deepspeed": "swinv2_scale.engine",
    "fairscale": "fairscale",
    "webdataset": "webdataset",
    "wandb": "wandb",
    "hydra-core": "hydra",
}
SHAPES = {"cpu": ("bfloat16", 2, 64, 16, 3), "cuda": ("bfloat16", 32, 64, 16, 3)}  # see comparison.Shape
ROUNDS = 5


@dataclass
class Report:
    """Facts by section, and what is wrong, each in a sentence that says what to do."""

    versions: dict[str, str] = field(default_factory=dict)
    kernels: dict[str, str] = field(default_factory=dict)
    device: str = "cpu"
    checks: list[Check] = field(default_factory=list)  # of the attention
    block: list[Check] = field(default_factory=list)  # of a block's other kernels
    speed: dict[str, tuple[float, float]] = field(default_factory=dict)  # milliseconds: forward, forward and backward
    problems: list[str] = field(default_factory=list)


def doctor(device: str | None, *, quick: bool, as_json: bool) -> int:
    """Examine and print. device is "cpu", "cuda", or None for that of training; quick is a short self-check and no
    timing. Returns 0, or 1 if something that is installed does not work."""
    with contextlib.redirect_stdout(sys.stderr):  # what libraries print on import is not part of the report
        report = examine(device or distributed.device().type, quick=quick)
    if as_json:
        print(to_json(report))
    else:
        show(report, Console(width=None if sys.stdout.isatty() else 120))
    return 1 if report.problems else 0


def examine(device: str, *, quick: bool) -> Report:
    """The report on this machine; self-check and timing where the device has its kernel."""
    report = Report(device=device)
    for section in (packages, apex, gpu, compilers):
        facts, problems = section()
        report.versions |= facts
        report.problems += problems
    report.kernels = kernels()
    if device == "cuda" and not torch.cuda.is_available():
        reason = "this PyTorch is without CUDA" if torch.version.cuda is None else "PyTorch sees no GPU"
        report.problems.append(
            f"--device cuda: {reason}. Install NVIDIA's driver and a PyTorch with CUDA, or use --device cpu"
        )
    elif device not in native.missing:
        cases = selfcheck.short() if quick else selfcheck.matrix()
        shown = track(cases, "self-check", console=Console(stderr=True), transient=True)
        report.checks = [check for case in shown for check in selfcheck.checks(case, torch.device(device))]
        report.block = selfcheck_block.checks(torch.device(device))
        report.problems += broken(report.checks, f"{device} attention kernel fails", selfcheck.REMEDY)
        report.problems += broken(report.block, f"{device} kernels of a block fail", selfcheck_block.REMEDY)
        if not quick and not report.problems:
            report.speed = speed(device)
    return report


def packages() -> tuple[dict[str, str], list[str]]:
    """Versions of what training needs, and what is missing, too old, or fails on import."""
    facts, problems = {"python": platform.python_version()}, []
    wanted = requirements()
    for name, module in PACKAGES.items():
        try:
            facts[name] = metadata.version(name)
            importlib.import_module(module)
        except metadata.PackageNotFoundError:
            facts[name] = "none"
            problems.append(f"{name} is not installed: pip install '{wanted.get(name, name)}'")
        except Exception as error:  # of any kind: a library against another one's binary, an operating system's
            problems.append(f"{name} {facts[name]} fails on import ({error}): pip install --force-reinstall {name}")
        else:
            if name in wanted and not wanted[name].specifier.contains(facts[name], prereleases=True):
                problems.append(f"{name} {facts[name]} does not fit: pip install '{wanted[name]}'")
    return facts | {"CUDA of torch": torch.version.cuda or "none"}, problems


def requirements() -> dict[str, Requirement]:
    """What this package asks for, by name; empty if it runs without being installed."""
    try:
        lines = metadata.requires("swinv2-scale") or []
    except metadata.PackageNotFoundError:
        return {}
    found = map(Requirement, lines)
    return {one.name: one for one in found if one.marker is None or one.marker.evaluate({"extra": ""})}


def apex() -> tuple[dict[str, str], list[str]]:
    """Whose package named apex is here: NVIDIA's, which DeepSpeed can use, or one that only has its name."""
    spec = importlib.util.find_spec("apex")
    if spec is None or spec.origin is None:  # a folder of that name is no package
        return {"apex": "none (not needed)"}, []
    folder = Path(spec.origin).parent
    if (folder / "optimizers").is_dir() or (folder / "normalization").is_dir():
        return {"apex": f"NVIDIA's, in {folder}"}, []
    what = "PyPI's toolkit for the web framework Pyramid" if (folder / "lib/libapex.py").exists() else "unknown"
    return {"apex": f"not NVIDIA's: {what}, in {folder}"}, [
        f"apex in {folder} is not NVIDIA's, which is not on PyPI, but another package of that name: pip uninstall apex"
    ]


def gpu() -> tuple[dict[str, str], list[str]]:
    """GPUs as PyTorch sees them, and the driver."""
    drivers = []
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        answer = subprocess.run(query, capture_output=True, text=True, check=False)
        drivers = answer.stdout.split() if answer.returncode == 0 else []
    facts = {"driver": drivers[0] if drivers else "none", "GPU": "none"}
    if torch.cuda.is_available():
        devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        names = [f"{one.name} (sm_{one.major}{one.minor}, {one.total_memory / 2**30:.0f} GiB)" for one in devices]
        facts["GPU"] = ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))
    elif drivers and "CUDA_VISIBLE_DEVICES" not in os.environ:
        built = f"PyTorch with CUDA {torch.version.cuda}" if torch.version.cuda else "PyTorch without CUDA"
        return facts, [
            f"nvidia-smi lists {len(drivers)} GPU(s), driver {drivers[0]}, that this {built} does not see: "
            "update the driver, or install a PyTorch for its CUDA version (https://pytorch.org/get-started)"
        ]
    return facts, []


def compilers() -> tuple[dict[str, str], list[str]]:
    """What kernels are built with; missing ones are no problem, since the reference needs none."""
    cpp = shutil.which(os.environ.get("CXX", "")) or shutil.which("g++") or shutil.which("clang++")
    home = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))
    nvcc = shutil.which("nvcc") or shutil.which(home / "bin" / "nvcc")
    return {
        "C++ compiler": cpp or "none; install g++ or clang++ to build the kernels",
        "nvcc": nvcc or f"none; install the CUDA toolkit {torch.version.cuda or ''} to build the CUDA kernel",
    }, []


def kernels() -> dict[str, str]:
    """What "auto" takes on each device and for each type, and why."""
    facts: dict[str, str] = {}
    for device in ("cpu", "cuda"):
        if device == "cuda" and not torch.cuda.is_available():
            facts[device] = f"no GPU here; {native.missing.get('cuda', 'the cuda kernel is built')}"
            continue
        chosen: dict[str, list[str]] = {}
        for dtype in (*native.TYPES, torch.float64):
            qkv = torch.empty(1, 2, 2, 3, 1, 32, dtype=dtype, device=device)
            exact = torch.empty(10, dtype=torch.promote_types(dtype, torch.float32), device=device)
            reason = why_reference(qkv, exact[:1], exact[1:].view(1, 3, 3), (2, 2))
            chosen.setdefault("kernel" if reason is None else f"reference, {reason}", []).append(str(dtype)[6:])
        facts[device] = "; ".join(f"{', '.join(dtypes)}: {name}" for name, dtypes in chosen.items())
    if "cpu" not in native.missing:
        here = native.instruction_sets()
        absent = [name for name in native.INSTRUCTION_SETS if name not in here]
        forced = os.environ.get(native.FORCE)
        facts["instruction set"] = (
            f"{forced} ({native.FORCE})" if forced else f"{here[-1]}, the best of {', '.join(here)}"
        )
        if absent and platform.machine() in ("x86_64", "AMD64"):
            facts["instruction set"] += f"; this processor lacks {', '.join(absent)}"
    return facts


def broken(checks: Iterable[Check], what_fails: str, remedy: str) -> list[str]:
    """A sentence on the checks that failed, if any."""
    failed = [check for check in checks if not check.passed]
    if not failed:
        return []
    return [f"the {what_fails} {len(failed)} checks, the first: {failed[0]}. {remedy}"]


def speed(device: str) -> dict[str, tuple[float, float]]:
    """Milliseconds of the kernel, SDPA and plain PyTorch, side by side on one shape of Swin V2."""
    shape = SHAPES[device]
    ways = {
        "kernel": comparison.plain(shape, device),
        "SDPA": comparison.sdpa(shape, device),
        "plain PyTorch": comparison.plain(shape),
    }
    return comparison.measure(shape, device, ways, ROUNDS)


def to_json(report: Report) -> str:
    """One object of the same facts; numbers that are not finite are null."""
    facts = asdict(report)
    for part in ("checks", "block"):
        for check, result in zip(facts[part], getattr(report, part), strict=True):
            check |= {"error": _finite(result.error), "passed": result.passed}
    facts["speed"] = {
        name: dict(zip(("forward_ms", "forward_backward_ms"), map(_finite, times), strict=True))
        for name, times in report.speed.items()
    }
    return json.dumps(facts, indent=1, ensure_ascii=False, allow_nan=False)


def show(report: Report, console: Console) -> None:
    """The report as tables, problems last."""
    console.print(_table("Versions", ("", ""), report.versions.items()))
    console.print(_table("Kernels", ("device", "what attention=auto takes"), report.kernels.items()))
    if report.checks:
        columns = (*selfcheck.TENSORS, selfcheck.REPEATED)
        title = f"Self-check on {report.device}: error as a share of its budget, the worst of all types"
        console.print(_table(title, ("case", *columns, ""), map(_verdict, _by_case(report.checks))))
        title = f"The same of a block's other kernels, the worst of all types of {len(selfcheck_block.cases())} cases"
        names = (selfcheck_block.TENSORS, selfcheck_block.PRODUCTS, selfcheck_block.STEP, selfcheck_block.TABLE)
        tensors = (*chain.from_iterable(names), selfcheck.REPEATED)
        of_tensors = [[check for check in report.block if check.tensor == tensor] for tensor in tensors]
        console.print(_table(title, ("tensor", "share", ""), (_worst(checks) for checks in of_tensors if checks)))
    if report.speed:
        kind, batch, side, window, heads = SHAPES[report.device]
        title = f"Speed on {report.device}: {kind}, {batch} x {side} x {side}, window {window}, {heads} heads"
        ours = report.speed["kernel"]
        rows = (
            (name, *(f"{time:.2f} ms ({time / best:.1f} x)" for time, best in zip(times, ours, strict=True)))
            for name, times in report.speed.items()
        )
        console.print(_table(title, ("", "forward", "forward and backward"), rows))
    for problem in report.problems:
        console.print(f"problem: {problem}", style="bold red", markup=False, highlight=False, soft_wrap=True)
    if not report.problems:
        console.print("Everything that is installed works.", style="bold green")


def _table(title: str, columns: Sequence[str], rows: Iterable[Iterable[str]]) -> Table:
    table = Table(*columns, title=title, title_justify="left", box=box.SIMPLE, show_header=any(columns))
    for row in rows:
        table.add_row(*row)
    return table


def _by_case(checks: Iterable[Check]) -> Iterable[list[Check]]:
    cases: dict[str, list[Check]] = {}
    for check in checks:
        cases.setdefault(check.case, []).append(check)
    return cases.values()


def _verdict(checks: list[Check]) -> list[str]:
    cells = []
    for tensor in (*selfcheck.TENSORS, selfcheck.REPEATED):
        shares = [check.share for check in checks if check.tensor == tensor]
        cells.append(f"{max(shares):.2f}" if shares else "")
    return [checks[0].case, *cells, "ok" if all(check.passed for check in checks) else "FAILED"]


def _worst(checks: list[Check]) -> list[str]:
    share = max(check.share for check in checks)
    return [checks[0].tensor, f"{share:.2f}", "ok" if all(check.passed for check in checks) else "FAILED"]


def _finite(x: float) -> float | None:
    return x if math.isfinite(x) else None
