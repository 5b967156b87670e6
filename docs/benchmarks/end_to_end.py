"""`launch/pretrain.py` against the bare step, and the time from the command to the first step. On one CPU rank.

    make pack && python docs/benchmarks/end_to_end.py speed       images/s of the launcher's run and of the bare step
    make pack && python docs/benchmarks/end_to_end.py start       seconds to the first step, by launcher

The bare step is the same engine's, on a batch that lies in memory. Runs of both are taken in turn. The run reads
shards of real photographs, decodes and crops them with two workers, guards, records and shows its progress as always.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
STEPS, WARM = 24, 4
SETTINGS = ["name=speed", "data.train=data/photographs/train", f"steps={STEPS}", "epochs=null", "checkpoint_every=0"]
SETTINGS += ["optim.warmup_steps=1", "optim.warmup_epochs=null", "evaluate_every=0"]


def launched(settings: list[str], launcher: list[str]) -> tuple[float, list[dict[str, Any]]]:
    """A run of launch/pretrain.py: seconds from the command to the record of the first step, and the records."""
    with tempfile.TemporaryDirectory() as folder:
        metrics = Path(folder, "metrics.jsonl")
        command = [*launcher, "launch/pretrain.py", *SETTINGS, *settings, f"run_dir={folder}", "log_every=1"]
        environment = {**os.environ, "DS_ACCELERATOR": "cpu", "GLOO_SOCKET_IFNAME": "lo"}
        begin, first = time.monotonic(), 0.0
        with (Path(folder) / "output").open("w+") as output:
            process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT)
            while process.poll() is None:
                if not first and metrics.exists() and '"event": "train"' in metrics.read_text():
                    first = time.monotonic() - begin
                time.sleep(0.02)
            output.seek(0)
            assert process.returncode == 0, output.read()[-3000:]
        lines = [json.loads(line) for line in metrics.read_text().splitlines()]
        return first, [line for line in lines if line["event"] == "train"]


def bare(settings: list[str]) -> None:
    """Print the seconds of a step of the same configuration on a batch in memory."""
    from training_step import engine_of

    from swinv2_scale import config, distributed

    cfg = config.compose("pretrain", [*SETTINGS, *settings])
    with distributed.process_group(10.0):
        engine, task = engine_of(cfg, cfg.micro_batch)
        grid = [cfg.model.image_size // 4] * 2
        batch = {"image": torch.randn(cfg.micro_batch, 3, *[cfg.model.image_size] * 2)}
        batch["mask"] = (torch.rand(cfg.micro_batch, *grid) > 0.6).float()
        times = []
        for _ in range(STEPS):
            begin = time.perf_counter()
            float(engine.step([batch] * engine.accumulation, task.loss, 1e-4).loss)
            times.append(time.perf_counter() - begin)
        print(statistics.median(times[WARM:]), flush=True)
    distributed.end_process(0)


def speed(settings: list[str], rounds: int) -> None:
    """Print medians of both, and their ratio."""
    seconds: dict[str, list[float]] = {"launched": [], "bare": []}
    for _ in range(rounds):
        lines = launched(settings, [sys.executable])[1][WARM:]
        seconds["launched"].append(statistics.median(line["step_seconds"] for line in lines))
        command = [sys.executable, __file__, "bare", *settings]
        environment = {**os.environ, "DS_ACCELERATOR": "cpu", "GLOO_SOCKET_IFNAME": "lo"}
        answer = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT)
        seconds["bare"].append(float(answer.stdout.split()[-1]))
        print({name: round(values[-1], 3) for name, values in seconds.items()}, flush=True)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    print(f"images/s of the run: {medians['bare'] / medians['launched']:.1%} of the bare step's")


def start(settings: list[str]) -> None:
    """Print seconds to the first step."""
    for name, launcher in {
        "python": [sys.executable],
        "deepspeed": [str(Path(sys.executable).parent / "deepspeed"), "--num_accelerators", "1"],
    }.items():
        times = [launched([*settings, "steps=2"], launcher)[0] for _ in range(3)]
        print(f"{name}: {', '.join(f'{one:.1f}' for one in times)} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("speed", "start", "bare"))
    parser.add_argument("--rounds", type=int, default=3)
    arguments, overrides = parser.parse_known_args()
    if arguments.what == "start":
        start(overrides or ["model=debug", "global_batch=16", "micro_batch=16"])
        return
    settings = overrides or [
        "model=t",
        "model.image_size=192",
        "model.window_size=12",
        "global_batch=8",
        "micro_batch=8",
    ]
    if arguments.what == "bare":
        bare(settings)
    else:
        speed(settings, arguments.rounds)


if __name__ == "__main__":
    main()
