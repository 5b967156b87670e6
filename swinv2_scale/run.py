"""A run: configuration -> model, stream, engine -> loop -> checkpoints and records."""

import contextlib
import fcntl
import json
import math
import platform
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any, NoReturn, TypeVar

import torch
from torch import Tensor, nn

from swinv2_scale import checkpoint, config, distributed, planner, report, signals
from swinv2_scale.data.manifest import Manifest, open_manifest
from swinv2_scale.data.mixture import Mixture, open_mixture
from swinv2_scale.data.order import Order
from swinv2_scale.data.sources import Reader
from swinv2_scale.data.stream import Batch, Stream, evaluation_stream, training_stream
from swinv2_scale.engine import Engine, build_engine, optimizer
from swinv2_scale.guard import Guard
from swinv2_scale.heartbeat import Heartbeat
from swinv2_scale.mapped import MappedFile
from swinv2_scale.models import accounting, memory
from swinv2_scale.models.convert import fitted
from swinv2_scale.models.initial import initial_values
from swinv2_scale.models.probe import BlockProbe
from swinv2_scale.ops import native, selfcheck, selfcheck_block
from swinv2_scale.optim import Schedule, parameter_groups
from swinv2_scale.parallel import PRECISIONS, deepspeed_config
from swinv2_scale.profile import Profiler
from swinv2_scale.telemetry import RECORD, Picture, Telemetry, peak_memory
from swinv2_scale.train import Task, evaluate, train

T = TypeVar("T")
LOCKS: list[IO[str]] = []
JUDGED = 32  # held-out samples, among which the worst are looked for to be shown


def main(config_name: str, argv: Sequence[str], action: Callable[[Any], None]) -> NoReturn:
    """Compose conf/{config_name}.yaml with argv, join the other ranks, act, and end the process.

    A ValueError is the user's to solve: it becomes one paragraph and exit code 2, and its traceback goes to
    run_dir/error.txt. A run that saved because a signal asked for it ends with signals.EXIT_CODE, 75. Anything else
    shows its traceback and ends with 1.
    """
    signals.listen()
    if {"-h", "--help"} & set(argv):
        print_on_rank_0(config.help_text(config_name))
        distributed.end_process(0)
    cfg = None
    try:
        cfg = config.compose(config_name, argv)
        with distributed.process_group(cfg.timeout_minutes):
            action(cfg)
        code = 0
    except ValueError as error:
        print(f"error (rank {distributed.rank()}): {error}", file=sys.stderr)
        if cfg is not None and distributed.rank() == 0 and Path(cfg.run_dir).is_dir():
            with contextlib.suppress(OSError):  # which may be what the error is about
                (Path(cfg.run_dir) / "error.txt").write_text(traceback.format_exc())
        code = 2
    except signals.Stopped as stopped:
        print_on_rank_0(str(stopped))
        code = signals.EXIT_CODE
    except KeyboardInterrupt:
        print_on_rank_0("interrupted: repeat the command to continue from the last checkpoint")
        code = 130
    except Exception:
        traceback.print_exc()
        code = 1
    distributed.end_process(code)


def training(cfg: Any) -> None:
    """Train what the configuration describes, from where its run directory stands."""
    # 1  the task, its data, and how long
    intervals = {name: cfg[name] for name in ("log_every", "evaluate_every", "checkpoint_every")}
    if not cfg.steps and not cfg.epochs:
        raise ValueError(f"steps={cfg.steps} and epochs={cfg.epochs}: give one of them, or there is nothing to train")
    task: Task = config.instantiate(cfg.task)
    data = open_data(cfg)
    order = data.order(seed=cfg.seed, global_batch=cfg.global_batch)
    steps = cfg.steps or max(1, round(cfg.epochs * order.steps_per_epoch))
    schedule = build_schedule(cfg.optim, cfg.global_batch, steps, order.steps_per_epoch)
    # 2  the run directory and its records
    run_dir = open_run_dir(cfg)
    telemetry = open_telemetry(cfg, steps, order.steps_per_epoch)
    # 3  model and engine, with the state of the newest checkpoint if there is one
    check_kernel(cfg.memory.attention, cfg.precision)
    telemetry.planned_gigabytes = say_plan(cfg, telemetry)
    identity = {"seed": cfg.seed, "global_batch": cfg.global_batch, **data.identity}
    identity |= {"optim.name": cfg.optim.name, "optim.ema_decay": cfg.optim.ema_decay}
    identity |= {f"model.{key}": value for key, value in config.plain(cfg.model).items()}
    guard = Guard(**cfg.guard, tell=telemetry.skipped)
    model, engine, probe, start = open_model(cfg, task, run_dir, identity, guard, telemetry)
    # 4  the streams of samples
    stream = open_stream(cfg, task, data, order, start, steps)
    held_out = open_held_out(cfg, task)
    for manifest in [*data.manifests, held_out[1]] if held_out else data.manifests:
        task.check_classes(data.classes, manifest.classes, highest_label=manifest.highest_label)
    limits = {"stall_minutes": cfg.stall_minutes, "timeout_minutes": cfg.timeout_minutes}
    heartbeat = Heartbeat(run_dir, distributed.rank(), **limits)
    saver = checkpoint.Saver(run_dir, keep=cfg.keep_checkpoints, keep_every=cfg.keep_every)
    run = Run(cfg, run_dir, task, model, engine, saver, guard, heartbeat, telemetry, identity, data.classes, held_out)
    # 5  the loop
    rate = accounting.matmul_rate(distributed.device(), PRECISIONS[cfg.precision])
    backbone = task.backbone(model)
    telemetry.start(
        start,
        flops_per_image=3 * sum(accounting.forward_flops(backbone, *backbone.input_size, training=True).values()),
        flops_of_matmul=distributed.sum_over_ranks({"rate": rate})["rate"],
        world_size=distributed.world_size(),
        device=distributed.device().type,
        precision=cfg.precision,
        parameters=sum(math.prod(shape) for _, shape in engine.shapes()),
        optimizer=engine.optimizer,
        versions=versions(),
        data={"train": {"samples": len(data), **data.identity}},
    )
    try:
        if start == 0 and cfg.evaluate_first:
            run.look(0)
            telemetry.resume_clock()
        watch: dict[str, Any] = {"guard": guard, "heartbeat": heartbeat, "probe": probe, "profiler": None}
        if cfg.profile and distributed.rank() == 0:
            images = cfg.global_batch // distributed.world_size()
            tell = partial(telemetry.profiled, start)
            watch["profiler"] = Profiler(run_dir, task.backbone(model), images=images, matmul_rate=rate, tell=tell)
        hooks: dict[str, Any] = {"look": run.look, "save": run.save, "saved": run.saved, "roll_back": run.roll_back}
        train(engine, task, stream, schedule, telemetry, start=start, stop=steps, **watch, **hooks, **intervals)
    except BaseException as error:  # Ctrl-C too
        run.saver.wait()
        run.saved()
        heartbeat.end(f"{type(error).__name__}: {error}")
        telemetry.end(f"{type(error).__name__}: {error}")
        raise
    heartbeat.end("finished")
    telemetry.end("finished")
    if distributed.rank() == 0:
        report.write_report(run_dir)
        telemetry.say(report.headline(run_dir))


@dataclass
class Run:
    """What happens now and then in a training, at a number of finished steps."""

    cfg: Any
    run_dir: Path
    task: Task
    model: nn.Module
    engine: Engine
    saver: checkpoint.Saver
    guard: Guard
    heartbeat: Heartbeat
    telemetry: Telemetry
    identity: dict[str, Any]
    classes: Sequence[str]
    held_out: tuple[Stream, Manifest] | None

    def look(self, step: int) -> None:
        """Evaluate; with pictures at the beginning and the end."""
        if self.held_out is not None:
            pictures = step in (0, self.telemetry.total_steps)
            beat = partial(self.heartbeat.over, phase="evaluating", step=step)
            with self.engine.whole_model():
                look_at(self.model, self.task, *self.held_out, self.telemetry, step, pictures=pictures, beat=beat)

    def save(self, step: int, leaving: bool) -> None:
        """Begin to write a checkpoint, or write it to the end when the run leaves off here. Collective.

        One that fails is told and the run goes on; OSError if it was to be the last.
        """
        windows = self.task.backbone(self.model).pretrained_windows
        state = {"identity": self.identity, "pretrained_windows": windows, "guard": self.guard.state}
        state["versions"] = versions()
        metadata = {"model": config.plain(self.cfg.model), "pretrained_windows": windows, "classes": self.classes}
        self.saver.save(self.engine, step=step, state=state, metadata=metadata)
        if leaving:
            self.saver.wait()
            if problem := distributed.from_rank_0(self.saved()):
                raise OSError(problem)

    def saved(self) -> str | None:
        """Record the checkpoints that were finished meanwhile; why the newest of them could not be written, if so."""
        failed = None
        for step, path, problem, *seconds in self.saver.finished():
            stall, write = (round(value, 3) for value in seconds)
            if problem is None:
                failed = None
                self.telemetry.event("checkpoint", step, path=str(path), stall_seconds=stall, write_seconds=write)
            else:
                failed = f"checkpoint {path} could not be written: {problem}"
                self.telemetry.event("checkpoint_failed", step, error=failed)
                self.telemetry.say(failed)
        return failed

    def roll_back(self, step: int) -> None:
        """Give the engine the weights and states of the last checkpoint. Raises FloatingPointError without one."""
        self.saver.wait()
        self.saved()
        path = checkpoint.latest(self.run_dir, self.telemetry.say)
        cause = self.guard.cause
        if path is None:
            raise FloatingPointError(f"{cause} before step {step}, and there is no checkpoint yet to roll back to")
        checkpoint.restore(path, self.engine, self.identity)
        self.telemetry.event("rollback", step, cause=cause, checkpoint=str(path))
        self.telemetry.say(f"step {step}: {cause}; back to {path.name}, on with the batches after step {step}")


def open_model(
    cfg: Any, task: Task, run_dir: Path, identity: dict[str, Any], guard: Guard, telemetry: Telemetry
) -> tuple[nn.Module, Engine, BlockProbe, int]:
    """The model, the engine that trains it, what looks into it, and the steps that it has been trained for."""
    # 1  the optimiser, and what DeepSpeed is told; impossible batches end here
    make = optimizer(
        cfg.optim.name,
        implementation=cfg.optim.implementation,
        zero_stage=cfg.parallel.zero_stage,
        offload=cfg.parallel.offload,
        betas=tuple(cfg.optim.betas),
        eps=cfg.optim.eps,
    )
    ds_config = deepspeed_config(
        global_batch=cfg.global_batch,
        micro_batch=cfg.micro_batch,
        world_size=distributed.world_size(),
        precision=cfg.precision,
        gradient_clip=cfg.optim.gradient_clip,
        **cfg.parallel,
    )
    # 2  the model, without memory, and what it starts from: fresh weights, or those of another run
    with torch.device("meta"):
        model = task.build(cfg.model)
    resumable = checkpoint.latest(run_dir, telemetry.say)
    initial = None if resumable is not None else starting_weights(cfg, model)
    # 3  memory policy, parameter groups, engine
    memory.apply(model, **cfg.memory)
    optim = cfg.optim
    decay = {name: optim[name] for name in ("weight_decay", "layer_decay", "encoder_scale")}
    groups = parameter_groups(model, cfg.model.depths, **decay)
    engine = build_engine(
        model,
        groups,
        optimizer=make,
        precision=cfg.precision,
        ds_config=ds_config,
        ema_decay=optim.ema_decay,
        initial=initial,
        disk=states_file(cfg.parallel),
    )
    probe = BlockProbe(task.backbone(model))
    telemetry.say(f"optimiser: {engine.optimizer}")
    # 4  the state of this run
    start = 0
    if resumable is not None:
        state = checkpoint.restore(resumable, engine, identity)
        task.backbone(model).pretrained_windows = state["pretrained_windows"]
        guard.state = state["guard"]
        start = state["step"]
        telemetry.say(f"continuing {resumable} at step {start}")
    # 5  what it was trained with; not before, so that a refused start does not touch it
    if distributed.rank() == 0:
        for change in config.changes(cfg, run_dir / "config.yaml"):
            telemetry.say(f"changed since the last attempt: {change}")
        (run_dir / "error.txt").unlink(missing_ok=True)
        config.write_copy(cfg, run_dir)
        (run_dir / "deepspeed.json").write_text(json.dumps(ds_config, indent=1) + "\n")
    return model, engine, probe, start


def states_file(parallel: Any) -> MappedFile | None:
    """Where this rank's part of the optimiser's states lives, if not in memory."""
    if parallel.offload != "disk":
        return None
    if distributed.device().type != "cpu":
        raise ValueError("parallel.offload=disk is for CPU ranks: on a GPU use parallel=zero1_host or zero3_nvme")
    return MappedFile(Path(parallel.offload_path))


def starting_weights(cfg: Any, model: nn.Module) -> Callable[[str], Tensor]:
    """The float32 value that each parameter starts from, by name: of `checkpoint=`, else a fresh one."""
    fresh = initial_values(model, depths=cfg.model.depths, scheme=cfg.model.weight_init, seed=cfg.seed)
    if not cfg.checkpoint:
        return fresh
    tensors, _ = fitted(model, start_weights(cfg.checkpoint))
    return lambda name: tensors[name].float() if name in tensors else fresh(name)


def say_plan(cfg: Any, telemetry: Telemetry) -> float | None:
    """Say what a rank's memory should be at its peak, in 10^9 bytes as telemetry measures it; None if there is no plan.

    Before there is a model: on a CPU, what the process has by then counts too.
    """
    device = distributed.device().type
    try:
        plan = planner.plan(cfg, ranks=distributed.world_size(), device=device)
    except ValueError as error:
        telemetry.say(f"no plan of the memory: {error}")
        return None
    before = peak_memory() if device == "cpu" else 0.0
    already = f" beside the {before:.1f} GB that the process has" if before else ""
    telemetry.say(f"planned: {plan.peak_bytes / 1e9:.2f} GB of memory a rank at the peak{already}, {plan.summary()}")
    return before + plan.peak_bytes / 1e9


def check_kernel(attention: str, precision: str) -> None:
    """Refuse to train, on all ranks, where the kernel that memory.attention chooses, or one of those that blocks always
    take, fails on any. Collective."""
    device, problem = distributed.device(), ""
    if device.type not in native.missing:
        try:
            selfcheck_block.check_block(device, PRECISIONS[precision])
            if attention in ("auto", "kernel", device.type):
                selfcheck.check_kernel(device, PRECISIONS[precision])
        except ValueError as error:
            problem = str(error)
    for rank, found in enumerate(distributed.gathered(problem)):
        if found:
            raise ValueError(f"rank {rank}: {found}")


def open_data(cfg: Any) -> Mixture:
    """What data.train names, one source or several."""
    data = config.plain(cfg.data)
    reader = Reader(**config.reading(cfg.data))
    return open_mixture(data["train"], reader, weights=data["weights"], open_shards=data["open_shards"])


def open_stream(cfg: Any, task: Task, data: Mixture, order: Order, start: int, stop: int) -> Stream:
    """This rank's training samples of the steps start … stop - 1."""
    return training_stream(
        data,
        order,
        task.train_transform,
        task.train_collate,
        micro_batch=cfg.micro_batch,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
        workers=cfg.workers,
        start_step=start,
        stop_step=stop,
        max_corrupt_share=cfg.max_corrupt_share,
        open_sample=task.open_sample,
    )


def look_at(
    model: nn.Module,
    task: Task,
    stream: Stream,
    manifest: Manifest,
    telemetry: Telemetry,
    step: int,
    *,
    pictures: bool,
    beat: Callable[[Iterable[Batch]], Iterable[Batch]],
) -> None:
    """Evaluate on held-out data, record the metrics and, if asked for, the worst of the first pictures."""
    known = len(stream.corrupt.names)
    outcome = evaluate(model, task, beat(stream), len(manifest))
    telemetry.evaluation(step, outcome.means | {"samples": outcome.samples})
    telemetry.replaced(step, stream.corrupt.names[known:])
    if pictures and distributed.rank() == 0:
        telemetry.pictures(step, *worst(model, task, stream, manifest.classes))


@torch.inference_mode()
def worst(model: nn.Module, task: Task, stream: Iterable[Batch], classes: Sequence[str]) -> tuple[str, list[Picture]]:
    """Pictures of what the model makes of held-out samples: of the first JUDGED or more of this rank the worst."""
    name, pictures, judged = "", list[Picture](), 0
    for batch in stream:
        name, more = task.pictures(model, distributed.to_device(batch), classes)
        pictures += more
        judged += len(batch["key"])
        if judged >= JUDGED:
            break
    return name, sorted(pictures, key=lambda picture: -picture.wrong)[: task.shown]


def start_weights(path: str) -> Path:
    """The file that `checkpoint=` means, the same on all ranks even while the run that it names still saves."""
    return agreed(lambda: checkpoint.weights_file(path))


def open_held_out(cfg: Any, task: Task) -> tuple[Stream, Manifest] | None:
    """The stream of held-out samples and its manifest, or None when data.validation is null."""
    if cfg.data.validation is None:
        return None
    manifest = open_manifest(cfg.data.validation, Reader(**config.reading(cfg.data)))
    stream = evaluation_stream(
        manifest,
        task.evaluation_transform,
        task.evaluation_collate,
        seed=cfg.seed,
        batch=cfg.evaluation_batch,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
        workers=cfg.workers,
        max_corrupt_share=cfg.max_corrupt_share,
        open_sample=task.open_sample,
    )
    return stream, manifest


def open_run_dir(cfg: Any) -> Path:
    """Create the run directory, and hold it against a second run of the same name. Collective."""

    def claim() -> Path:
        run_dir = Path(cfg.run_dir)
        if (run_dir / RECORD).exists() and not cfg.resume:
            raise ValueError(f"run_dir={run_dir} holds a run, and resume=false: choose another name=… or remove it")
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            lock = (run_dir / ".lock").open("w")
        except OSError as error:
            raise ValueError(f"run_dir={run_dir} cannot be written: {error}") from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ValueError(f"run_dir={run_dir} is in use by another run: choose another name=…") from error
        LOCKS.append(lock)  # held until the process ends, however it ends
        return run_dir

    return agreed(claim)


def agreed(action: Callable[[], T]) -> T:
    """What an action on rank 0 returns, on all ranks; a ValueError that it raises, it raises on all. Collective."""
    outcome: tuple[Any, str] = (None, "")
    if distributed.rank() == 0:
        try:
            outcome = (action(), "")
        except ValueError as error:
            outcome = (None, str(error))
    result, problem = distributed.from_rank_0(outcome)
    if problem:
        raise ValueError(problem)
    return result


def open_telemetry(cfg: Any, steps: int, steps_per_epoch: int) -> Telemetry:
    """The run's records, in its directory."""
    return Telemetry(
        Path(cfg.run_dir),
        name=cfg.name,
        total_steps=steps,
        steps_per_epoch=steps_per_epoch,
        images_per_step=cfg.global_batch,
        config=config.plain(cfg),
        **cfg.telemetry,
    )


def build_schedule(optim: Any, global_batch: int, steps: int, steps_per_epoch: int) -> Schedule:
    """conf/optim in steps; its rates are scaled by global_batch / lr_batch when lr_batch is given."""
    scale = global_batch / optim.lr_batch if optim.lr_batch else 1.0
    warmup = optim.warmup_steps if optim.warmup_steps is not None else round(optim.warmup_epochs * steps_per_epoch)
    return Schedule(
        kind=optim.schedule,
        lr=optim.lr * scale,
        minimum_lr=optim.minimum_lr * scale,
        warmup_lr=optim.warmup_lr * scale,
        steps=steps,
        warmup_steps=warmup,
        warmup_prefix=optim.warmup_prefix,
        milestones=tuple(round(epoch * steps_per_epoch) for epoch in optim.milestone_epochs),
        factor=optim.milestone_factor,
    )


def versions() -> dict[str, str]:
    """Versions that a result may depend on."""
    from importlib.metadata import version

    return {"python": platform.python_version()} | {
        name: version(name) for name in ("torch", "torchvision", "deepspeed", "swinv2-scale")
    }


def print_on_rank_0(text: str) -> None:
    """Print once, not once per rank."""
    if distributed.rank() == 0:
        print(text, flush=True)
