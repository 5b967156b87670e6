"""Table 1 of the paper in small: models trained at window 4, tested without fine-tuning at 4, 6, 8 and 12.

    python docs/benchmarks/window_transfer.py                # three seeds; prints a table
    python docs/benchmarks/window_transfer.py --seeds 0      # one

Both spacings of the position bias train with the same seed, so with the same weights at the start, the same order of
images and the same crops. Images grow with the window, as in the paper. Every run is one of launch/ as a process of its
own; a repeated command continues where it stood.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SPACINGS = ("log", "linear")
WINDOWS = (4, 6, 8, 12)
EXPERIMENT = "demo_window_transfer"
PIXELS = 8  # of image side per token of window; the experiment has image_size 32 at window 4


def main() -> None:
    """Train, evaluate, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--directory", type=Path, default=ROOT / "runs" / "window_transfer")
    parser.add_argument("overrides", nargs="*", help="settings for training and evaluation, as model.embed_dim=48")
    arguments = parser.parse_args()
    directory = arguments.directory.resolve()
    data = {split: pack(directory, split) for split in ("train", "validation")}
    results: dict[tuple[str, int], list[dict[str, float]]] = {}
    for seed in arguments.seeds:
        for spacing in SPACINGS:
            run = directory / f"{spacing}_seed{seed}"
            settings = [f"data.validation={data['validation']}", f"model.position_bias={spacing}", *arguments.overrides]
            launch("finetune", f"run_dir={run}", f"data.train={data['train']}", f"seed={seed}", *settings)
            for window in WINDOWS:
                at = run / f"window_{window}"
                sizes = [f"model.window_size={window}", f"model.image_size={PIXELS * window}"]
                launch("evaluate", f"run_dir={at}", f"checkpoint={run}", *settings, *sizes)
                result = json.loads((at / "evaluation.json").read_text())
                results.setdefault((spacing, window), []).append(result)
                print(
                    f"{spacing:6} seed {seed} window {window:2}  {result['top1']:.2%}  {result['loss']:.3f}", flush=True
                )
    print(f"\n{table(results, arguments.seeds)}")


def pack(directory: Path, split: str) -> Path:
    """The shards of the demonstration's digits, packed once."""
    shards = directory / "data" / split
    if not (shards / "manifest.json").exists():
        process("-m", "swinv2_scale.cli", "data", "pack", f"digits/{split}", str(shards), "--format", "demo")
    return shards


def launch(script: str, *settings: str) -> None:
    """Run a command of launch/ to its end."""
    process(f"launch/{script}.py", f"experiment={EXPERIMENT}", *settings)


def process(*arguments: str) -> None:
    """Run Python on the CPU; its output is shown only if it fails."""
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(f"{' '.join(arguments)} ended with {done.returncode}\n{done.stdout}{done.stderr}")


def table(results: dict[tuple[str, int], list[dict[str, float]]], seeds: list[int]) -> str:
    """Markdown: per spacing and window, mean and range of the held-out accuracy, and the mean loss."""
    lines = [
        f"| seeds {', '.join(map(str, seeds))} | " + " | ".join(f"{PIXELS * w} px, window {w}" for w in WINDOWS) + " |",
        "|---|" + "---|" * len(WINDOWS),
    ]
    for spacing in SPACINGS:
        shown = []
        for window in WINDOWS:
            top1 = [100 * result["top1"] for result in results[spacing, window]]
            shown.append(f"{statistics.mean(top1):.1f} ({min(top1):.1f} – {max(top1):.1f})")
        lines.append(f"| {spacing}: top-1 % | " + " | ".join(shown) + " |")
    gains = []
    for window in WINDOWS:
        pairs = zip(*(results[spacing, window] for spacing in SPACINGS), strict=True)
        difference = [100 * (log["top1"] - linear["top1"]) for log, linear in pairs]
        gains.append(f"{statistics.mean(difference):+.1f} ({min(difference):+.1f} – {max(difference):+.1f})")
    lines.append("| log − linear, same seed | " + " | ".join(gains) + " |")
    for spacing in SPACINGS:
        losses = [statistics.mean(result["loss"] for result in results[spacing, window]) for window in WINDOWS]
        lines.append(f"| {spacing}: loss | " + " | ".join(f"{loss:.3f}" for loss in losses) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
