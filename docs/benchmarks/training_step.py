"""A step of Swin V2 in this project, timm, torchvision and transformers: time and memory, side by side in one run.

    make bench                                                     # every case; hours on two cores
    python docs/benchmarks/training_step.py --cases t/256/8/8,b/192/12/4 --types bf16
    python docs/benchmarks/training_step.py --cases t/256/8/8 --compile --libraries timm
    python docs/benchmarks/training_step.py --modes inference simmim

A case is model/image size/window/batch. Modes: training (forward, cross-entropy, backward, AdamW), inference, and
simmim (a SimMIM step; torchvision and timm have none). In bf16 this project trains through its engine, as its users do:
weights and maps of 16 bits, float32 where it matters, float32 master weights; the others under autocast, as theirs do.
"products" is the time of the model's matrix products alone: linear layers, and attention as PyTorch multiplies it. All
train with drop path, as the recipes do; products are those of all images, dropped or not.

Every program is a process of its own, and they take steps in turn, round after round; the first two warm up. A cell is
the median of the rest. With `--alone` one program ends before the next begins, where memory does not hold all of them.
Memory is the peak of the process above what it had before there was a model. A process that passes `--limit` GiB is
stopped and shown with that limit: it cannot train there within it.
"""

import argparse
import importlib.metadata
import math
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MODES = ("training", "inference", "simmim")
PROJECT = "this project"
POLICIES = {PROJECT: "none", f"{PROJECT}, memory=block": "block", f"{PROJECT}, compiled": "none"}
LIBRARIES = ("timm", "torchvision", "transformers")
CASES = "t/256/8/8,s/256/8/8,b/192/12/4,b/256/16/2,b/384/24/1"
CLASSES = 1000
DROP_PATH = 0.2  # the rate of the last block, as in the recipes of T and B; every program's
POLL = 0.02  # seconds between looks at a process's memory


class Case(NamedTuple):
    model: str
    image: int
    window: int
    batch: int

    @classmethod
    def parse(cls, text: str) -> "Case":
        model, *numbers = text.split("/")
        return cls(model, *map(int, numbers))


def shape(model: str) -> dict[str, Any]:
    """embed_dim, depths and num_heads of a size."""
    from swinv2_scale import config

    cfg = config.plain(config.compose_model(model))
    return {key: cfg[key] for key in ("embed_dim", "depths", "num_heads")}


# ------------------------------------------------------------------------------------------ a step of each program


def engine_of(cfg: Any, batch: int, compiled: bool = False) -> tuple[Any, Any]:
    """The engine of a configuration on one rank under ZeRO 1, and its task."""
    from swinv2_scale import config
    from swinv2_scale.engine import build_engine, optimizer
    from swinv2_scale.models import memory as policies
    from swinv2_scale.optim import parameter_groups
    from swinv2_scale.parallel import deepspeed_config

    task = config.instantiate(cfg.task)
    model = task.build(cfg.model).train()
    policies.apply(model, **cfg.memory)
    if compiled:
        model.compile()
    arithmetic = {"global_batch": batch, "micro_batch": batch, "world_size": 1}
    adamw = {"zero_stage": 1, "offload": None, "betas": (0.9, 0.999), "eps": 1e-8}
    engine = build_engine(
        model,
        parameter_groups(model, cfg.model.depths, weight_decay=0.05, layer_decay=None),
        optimizer=optimizer("adamw", implementation=cfg.optim.implementation, **adamw),
        precision=cfg.precision,
        ds_config=deepspeed_config(**arithmetic, precision=cfg.precision, gradient_clip=5.0, **cfg.parallel),
    )
    return engine, task


def project(name: str, case: Case, mode: str, kind: str) -> Callable[[], Tensor]:
    """A step of this project; in training through the engine, on one rank under ZeRO 1."""
    import swinv2_scale
    from swinv2_scale import config
    from swinv2_scale.parallel import PRECISIONS, cast

    images = torch.randn(case.batch, 3, case.image, case.image)
    if mode == "inference":
        model = swinv2_scale.create_model(case.model, image_size=case.image, window_size=case.window)
        cast(model.eval(), kind)
        run = torch.compile(model) if "compiled" in name else model
        return lambda: run(images.to(PRECISIONS[kind]))
    task = "simmim" if mode == "simmim" else "classification"
    settings = [f"model={case.model}", f"model.image_size={case.image}", f"model.window_size={case.window}"]
    settings += [f"global_batch={case.batch}", f"micro_batch={case.batch}", f"precision={kind}", f"task={task}"]
    settings += [f"model.drop_path_rate={DROP_PATH}"]
    cfg = config.compose("pretrain", ["name=bench", "epochs=1", "data.train=none", *settings])
    cfg.memory = config.memory_policies()[POLICIES[name]]
    engine, the_task = engine_of(cfg, case.batch, compiled="compiled" in name)
    batch = {"image": images, "target": torch.randn(case.batch, CLASSES).softmax(1)}
    if mode == "simmim":
        batch["mask"] = (torch.rand(case.batch, *[case.image // 4] * 2) > 0.6).float()
    return lambda: torch.as_tensor(engine.step([batch], the_task.loss, 1e-4).loss)


def peer(name: str, case: Case, mode: str, kind: str) -> Callable[[], Tensor]:
    """A step of another library's model, as its users write it."""
    library, size = name.partition(",")[0], shape(case.model)
    if library == "timm":
        from timm.models.swin_transformer_v2 import SwinTransformerV2

        shape_of = {"img_size": case.image, "window_size": case.window, **size}
        model: nn.Module = SwinTransformerV2(drop_path_rate=DROP_PATH, **shape_of)
    elif library == "torchvision":
        from torchvision.models import swin_transformer as vision

        model = vision.SwinTransformer(
            [4, 4],
            size["embed_dim"],
            size["depths"],
            size["num_heads"],
            [case.window, case.window],
            stochastic_depth_prob=DROP_PATH,
            num_classes=CLASSES,
            block=vision.SwinTransformerBlockV2,
            downsample_layer=vision.PatchMergingV2,
        )
    else:
        import transformers

        config = transformers.Swinv2Config(
            image_size=case.image,
            window_size=case.window,
            drop_path_rate=DROP_PATH,
            num_labels=CLASSES,
            encoder_stride=32,
            **size,
        )
        kinds = transformers.Swinv2ForMaskedImageModeling, transformers.Swinv2ForImageClassification
        model = kinds[mode != "simmim"](config)
    images, labels = torch.randn(case.batch, 3, case.image, case.image), torch.randint(CLASSES, (case.batch,))
    run = torch.compile(model) if "compiled" in name else model
    autocast = torch.autocast("cpu", torch.bfloat16) if kind == "bf16" else nullcontext()
    if mode == "inference":
        model.eval()

        def forward() -> Tensor:
            with autocast:
                output = run(images)
            return getattr(output, "logits", output)

        return forward
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-4, fused=True)
    mask = torch.rand(case.batch, (case.image // 4) ** 2) > 0.6

    def step() -> Tensor:
        with autocast:
            if mode == "simmim":
                loss = run(images, bool_masked_pos=mask).loss
            else:
                output = run(images)
                loss = F.cross_entropy(getattr(output, "logits", output).float(), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return step


def products(case: Case, mode: str, kind: str) -> Callable[[], Tensor]:
    """The matrix products of a step: of every linear layer, and of attention, window by window and head by head."""
    size, dtype = shape(case.model), torch.bfloat16 if kind == "bf16" else torch.float32
    grid, width = math.ceil(case.image / 4), size["embed_dim"]
    tokens = case.batch * grid**2
    linear: list[tuple[int, int, int, int]] = [(1, tokens, 48, width)]  # times, rows, in, out
    attention: list[tuple[int, int, int, int]] = []  # times, batch, tokens of a window, width of a head
    for stage, (depth, heads) in enumerate(zip(size["depths"], size["num_heads"], strict=True)):
        linear += [(depth, tokens, width, out * width) for out in (3, 1, 4)] + [(depth, tokens, 4 * width, width)]
        window = min(case.window, grid)
        attention.append((depth, case.batch * math.ceil(grid / window) ** 2 * heads, window**2, width // heads))
        if stage < len(size["depths"]) - 1:
            grid, tokens = math.ceil(grid / 2), case.batch * math.ceil(grid / 2) ** 2
            linear.append((1, tokens, 4 * width, 2 * width))
            width *= 2
    linear.append((1, case.batch, width, CLASSES))
    maps = [(n, torch.randn(r, i, dtype=dtype), torch.randn(o, i, dtype=dtype)) for n, r, i, o in linear]
    maps_out = [torch.randn(r, o, dtype=dtype) for _, r, _, o in linear]
    heads_in = [(n, torch.randn(b, t, d, dtype=dtype), torch.randn(b, t, t, dtype=dtype)) for n, b, t, d in attention]

    def run() -> Tensor:
        for (times, x, weight), grad in zip(maps, maps_out, strict=True):
            for _ in range(times):
                out = x @ weight.t()
                if mode != "inference":
                    grad @ weight, grad.t() @ x
        for times, q, p in heads_in:
            for _ in range(times):
                q @ q.transpose(1, 2), p @ q
                if mode != "inference":
                    q @ q.transpose(1, 2), p.transpose(1, 2) @ q, p @ q, p.transpose(1, 2) @ q
        return out[0, 0].float()

    return run


def serve(name: str, case: Case, mode: str, kind: str, threads: int) -> None:
    """A step for every line of stdin; prints its seconds and the peak of memory in GiB."""
    from swinv2_scale import distributed

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    with distributed.process_group(10.0):
        before = memory(os.getpid(), "VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        if name == "products":
            step = products(case, mode, kind)
        else:
            step = (project if name in POLICIES else peer)(name, case, mode, kind)
        with torch.inference_mode(mode == "inference"):
            for _ in sys.stdin:
                begin = time.perf_counter()
                result = step()
                seconds = time.perf_counter() - begin
                assert bool(torch.isfinite(result).all()), result
                print(seconds, (memory(os.getpid(), "VmHWM") - before) / 2**30, flush=True)
    distributed.end_process(0)


# --------------------------------------------------------------------------------------------------- side by side


def memory(pid: int, name: str) -> int:
    """Bytes: VmRSS, in use now, or VmHWM, the peak."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(name)), 0)


class Program:
    """A process that takes a step when it is told to: `results` are seconds and GiB; `ended` says why no more come."""

    def __init__(self, name: str, case: Case, mode: str, kind: str, arguments: argparse.Namespace) -> None:
        command = [sys.executable, __file__, "--serve", name, "--threads", str(arguments.threads)]
        command += ["--cases", "/".join(map(str, case)), "--modes", mode, "--types", kind]
        environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "DS_ACCELERATOR": "cpu"}
        self.errors = Path(f"/tmp/{os.getpid()}_{time.monotonic_ns()}")
        self.name, self.results, self.ended = name, [], ""
        self.limit, self.stopped = arguments.limit, False
        with self.errors.open("w") as errors:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment
            )
        threading.Thread(target=self._stop_above_limit, daemon=True).start()

    def _stop_above_limit(self) -> None:
        """Kill the process when it passes the limit; before the machine itself runs out."""
        with suppress(FileNotFoundError):  # it has ended
            while self.process.poll() is None:
                if memory(self.process.pid, "VmRSS") > self.limit * 2**30:
                    self.stopped = True
                    self.process.kill()
                time.sleep(POLL)

    def step(self) -> None:
        if self.ended:
            return
        assert self.process.stdin and self.process.stdout
        try:
            self.process.stdin.write("step\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass
        answer = self.process.stdout.readline().split()
        while answer and len(answer) != 2:  # what libraries print
            answer = self.process.stdout.readline().split()
        if answer:
            self.results.append((float(answer[0]), float(answer[1])))
        elif self.process.wait() == -9:
            system = "killed by the system: memory does not hold all programs, use --alone"
            self.ended = f"more than {self.limit:g} GiB: stopped" if self.stopped else system
        else:
            self.ended = (self.errors.read_text().strip().splitlines() or ["ended"])[-1][:100]

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.errors.unlink()


def compare(case: Case, mode: str, kind: str, arguments: argparse.Namespace) -> None:
    """Print the rows of one case."""
    names = ["products", PROJECT, *[name for name in POLICIES if "block" in name and mode == "training"]]
    peers = [library for library in arguments.libraries if mode != "simmim" or library == "transformers"]
    names += peers + [f"{name}, compiled" for name in (PROJECT, *peers) if arguments.compile]
    programs: list[Program] = []
    for together in [[name] for name in names] if arguments.alone else [names]:
        started = [Program(name, case, mode, kind, arguments) for name in together]
        try:
            for _ in range(2 + arguments.rounds):
                for program in started:
                    program.step()
        finally:
            for program in started:
                program.close()
        programs += started
    medians = {p.name: statistics.median(s for s, _ in p.results[2:]) for p in programs if not p.ended}
    for program in programs:
        cells = f"- | - | - | {program.ended}"
        if program.name in medians:
            seconds = medians[program.name]
            ours, bound = medians.get(PROJECT, math.nan), medians.get("products", math.nan)
            cells = f"{seconds:.3f} | {seconds / ours:.2f}× | {bound / seconds:.0%} | {program.results[-1][1]:.2f} GiB"
        print(f"| {'/'.join(map(str, case))} | {mode} | {kind} | {program.name} | {cells} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default=CASES, help="model/image size/window/batch, comma-separated")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=["training", "inference"])
    parser.add_argument("--types", nargs="+", choices=["bf16", "fp32"], default=["bf16", "fp32"])
    parser.add_argument("--libraries", nargs="*", choices=LIBRARIES, default=LIBRARIES)
    parser.add_argument("--compile", action="store_true", help="also what torch.compile makes of them")
    parser.add_argument("--alone", action="store_true", help="one program after the other, not in turn")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--limit", type=float, default=20.0, help="GiB that a process may take")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    cases = [Case.parse(text) for text in arguments.cases.split(",")]
    if arguments.serve:
        serve(arguments.serve, cases[0], arguments.modes[0], arguments.types[0], arguments.threads)
        return
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", *arguments.libraries))
    processor = Path("/proc/cpuinfo").read_text().partition("model name")[2].partition("\n")[0].strip("\t: ")
    print(f"{processor or 'CPU'}, {arguments.threads} threads")
    print(f"{versions}, {arguments.rounds} rounds\n")
    print("| model/image/window/batch | mode | type | program | s a step | ratio | products' share | memory |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    for case in cases:
        for mode in arguments.modes:
            for kind in arguments.types:
                compare(case, mode, kind, arguments)


if __name__ == "__main__":
    main()
