"""A training step of Swin V2 T in this project, timm, torchvision and transformers: time and memory, in one run.

    python docs/benchmarks/training_step.py                        # 256 pixels at window 8, 1536 pixels at window 48
    python docs/benchmarks/training_step.py --sizes 256/8/8        # image size / window / batch
    python docs/benchmarks/training_step.py --libraries timm       # this project and timm

A step is forward in bfloat16 under autocast, cross-entropy, backward, AdamW in float32. Each library trains in a
process of its own, in turn, round after round; memory is the peak of the process above the model's weights. A process
that passes `--limit` GiB is stopped and shown with that limit: it cannot train there within it.
"""

import argparse
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

PROJECT = ("this project", "this project, memory=block")
LIBRARIES = ("timm", "torchvision", "transformers")
DEPTHS, HEADS, WIDTH, CLASSES = (2, 2, 6, 2), (3, 6, 12, 24), 96, 1000
POLL = 0.02  # seconds between looks at a process's memory


def build(library: str, image: int, window: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """Size T with random weights; images (B, 3, image, image) -> logits (B, 1000)."""
    if library in PROJECT:
        import swinv2_scale
        from swinv2_scale.models import memory

        model: nn.Module = swinv2_scale.create_model("t", image_size=image, window_size=window, num_classes=CLASSES)
        activations = "recompute" if library.endswith("block") else "keep"
        policy = {"stages": None, "every": 1, "attention_stages": None, "mlp_tokens": 0}
        memory.apply(model, activations=activations, attention="auto", **policy)
    elif library == "timm":
        from timm.models.swin_transformer_v2 import SwinTransformerV2

        model = SwinTransformerV2(img_size=image, window_size=window, drop_path_rate=0.2)
    elif library == "torchvision":
        from torchvision.models import swin_transformer as vision

        model = vision.SwinTransformer(
            [4, 4],
            WIDTH,
            list(DEPTHS),
            list(HEADS),
            [window, window],
            stochastic_depth_prob=0.2,
            num_classes=CLASSES,
            block=vision.SwinTransformerBlockV2,
            downsample_layer=vision.PatchMergingV2,
        )
    else:
        import transformers

        config = transformers.Swinv2Config(
            image_size=image, window_size=window, embed_dim=WIDTH, depths=DEPTHS, num_heads=HEADS, num_labels=CLASSES
        )
        model = transformers.Swinv2ForImageClassification(config)
    return model.train()


def serve(library: str, image: int, window: int, batch: int, threads: int) -> None:
    """A step for every line of stdin; prints its seconds and the peak of memory above the weights in GiB."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = build(library, image, window)
    assert isinstance(model, nn.Module)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    images, labels = torch.randn(batch, 3, image, image), torch.randint(CLASSES, (batch,))
    before = memory(os.getpid(), "VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    for _ in sys.stdin:
        begin = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16):
            output = model(images)
            loss = nn.functional.cross_entropy(getattr(output, "logits", output).float(), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds = time.perf_counter() - begin
        assert bool(torch.isfinite(loss)), loss
        print(seconds, (memory(os.getpid(), "VmHWM") - before) / 2**30, flush=True)


def memory(pid: int, name: str) -> int:
    """Bytes: VmRSS, in use now, or VmHWM, the peak."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(name)), 0)


def stop_above(process: subprocess.Popen[str], limit: float) -> None:
    """Kill the process when it passes `limit` GiB; before the machine itself runs out."""
    while process.poll() is None:
        if memory(process.pid, "VmRSS") > limit * 2**30:
            process.kill()
        time.sleep(POLL)


def compare(image: int, window: int, batch: int, arguments: argparse.Namespace) -> None:
    """Print the rows of one size."""
    libraries = (*PROJECT, *arguments.libraries)
    results: dict[str, list[tuple[float, float]]] = {library: [] for library in libraries}
    for rounds in range(arguments.rounds):
        for library in libraries:
            if len(results[library]) < rounds:
                continue  # it was stopped
            command = [sys.executable, __file__, "--serve", library, "--threads", str(arguments.threads)]
            process = subprocess.Popen(
                [*command, "--sizes", f"{image}/{window}/{batch}"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
            watch = threading.Thread(target=stop_above, args=(process, arguments.limit))
            watch.start()
            lines = process.communicate("step\n" * arguments.steps)[0].splitlines()
            watch.join()
            if len(lines) == arguments.steps:  # the first step warms up
                values = [tuple(map(float, line.split())) for line in lines]
                seconds = statistics.median(value[0] for value in values[min(1, len(values) - 1) :])
                results[library].append((seconds, values[-1][1]))
    ours = statistics.median(value[0] for value in results[PROJECT[0]])
    for library, values in results.items():
        if len(values) == arguments.rounds:
            seconds = statistics.median(value[0] for value in values)
            cells = f"{seconds:.2f} | {seconds / ours:.1f}× | {max(value[1] for value in values):.1f} GiB"
        else:
            cells = f"- | - | more than {arguments.limit:g} GiB: stopped"
        print(f"| {image} / {window} / {batch} | {library} | {cells} |", flush=True)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="256/8/8,1536/48/1", help="image size / window / batch, comma-separated")
    parser.add_argument("--libraries", nargs="+", choices=LIBRARIES, default=LIBRARIES)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--limit", type=float, default=20.0, help="GiB that a process may take")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    sizes = [tuple(map(int, size.split("/"))) for size in arguments.sizes.split(",")]
    if arguments.serve:
        image, window, batch = sizes[0]
        serve(arguments.serve, image, window, batch, arguments.threads)
        return
    print(f"PyTorch {torch.__version__}, {arguments.threads} threads, {arguments.rounds} rounds\n")
    print("| image / window / batch | library | s per step | ratio | memory above the weights |\n|---|---|---|---|---|")
    for image, window, batch in sizes:
        compare(image, window, batch, arguments)


if __name__ == "__main__":
    main()
