"""What a configuration takes, before it runs: memory of a rank, operations, time; and which settings fit a cluster.

plan(cfg, ranks=…)     a Plan; cfg as config.compose gives it, so that all of conf/ can be planned
largest_micro_batch    of a plan, in a given memory
search                 memory policy, micro-batch and accumulation: the fastest that fit
Pure: the model is built on the meta device, and nothing is allocated or measured. docs/planner.md says what is counted.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from swinv2_scale import config
from swinv2_scale.models.accounting import block_flops, forward_flops
from swinv2_scale.models.activations import activations, backbone_of
from swinv2_scale.models.detection.cascade import CascadeRCNN
from swinv2_scale.models.detection.views import DIVISOR
from swinv2_scale.models.dry_run import most_objects
from swinv2_scale.models.simmim import SimMIM
from swinv2_scale.models.swin_v2 import stage_grid
from swinv2_scale.models.upernet import UPerNet
from swinv2_scale.parallel import WAITING_GROUP, batch_arithmetic, cast

GIB = 2**30


def state_bytes(
    parameters: int,
    *,
    zero_stage: int,
    precision: str,
    ranks: int,
    ema: bool,
    accumulate: str = "fp32",
    offload: str | None = None,
    sub_group: float = math.inf,
) -> dict[str, float]:
    """Bytes on each rank that last from step to step, and those of the step itself, by what they are for.

    weights     in their training type; ZeRO 3 divides them
    gradients   summed in float32 ("fp32") or in the weights' type, which ZeRO 2 and 3 divide
    optimizer   float32 master weights and AdamW's two moments, and the average of the weights; ZeRO 1 to 3 divide them
    step        under ZeRO 2 and 3 the gradients of a rank's own part once more, in one piece, while the optimiser takes
                its step; under ZeRO 3 of its largest sub-group, of sub_group parameters on all ranks together. With
                offload "disk" also its states, while they are mapped
    host        what is offloaded to the host's memory: float32 gradients, and the optimiser's states unless on a disk
    Parameters that stay float32 at 16 bits (norms, biases of position, scales: 1 % of them) are counted as the others.
    """
    share = 1 / ranks
    low = 4 if precision == "fp32" else 2
    optimizer = parameters * ((12 if zero_stage else 8) + 4 * ema) * (share if zero_stage else 1)
    stepped = min(parameters, sub_group) * share if zero_stage == 3 else parameters * share * (zero_stage == 2)
    return {
        "weights": parameters * low * (share if zero_stage == 3 else 1),
        "gradients": parameters * (4 if accumulate == "fp32" else low) * (share if zero_stage >= 2 else 1),
        "optimizer": 0.0 if offload else optimizer,
        "step": stepped * ({None: 4, "disk": 16 + 4 * ema}.get(offload, 0)),
        "host": parameters * share * 4 * (offload in ("host", "nvme")) + optimizer * (offload == "host"),
    }


@dataclass(frozen=True)
class Plan:
    """What each rank takes. Bytes are those of live tensors, which is what torch.cuda.max_memory_allocated reports.

    activations_bytes   between forward and backward of a micro-batch, of which activations_by_part says where
    workspace_bytes     the most that one operation needs while it runs
    buffers_bytes       of communication: buckets; under ZeRO 3 also weights that are gathered
    image_size          rows and columns; frames before them in a plan of clips
    batch_bytes         images and targets of a micro-batch
    backward_bytes, step_bytes   the two moments that can be the peak: within backward, within the optimiser's step
    host_bytes          offloaded activations and states, in the host's memory, host_states_bytes of them states
    flops_per_step      of all ranks together, with those that the memory policy runs again: recomputed_flops of them
    """

    parameters: int
    ranks: int
    micro_batch: int
    accumulation: int
    global_batch: int
    image_size: tuple[int, ...]
    precision: str
    zero_stage: int
    policy: dict[str, Any]
    weights_bytes: float
    gradients_bytes: float
    optimizer_bytes: float
    activations_bytes: float
    activations_by_part: dict[str, float]
    workspace_bytes: float
    buffers_bytes: float
    batch_bytes: float
    host_bytes: float
    host_states_bytes: float
    backward_bytes: float
    step_bytes: float
    flops_per_step: float
    attention_flops: float
    recomputed_flops: float

    @property
    def peak_bytes(self) -> float:
        """The largest moment of a step."""
        return max(self.backward_bytes, self.step_bytes)

    def summary(self) -> str:
        """Its largest parts in a line, in 10^9 bytes."""
        parts = {"weights": self.weights_bytes, "gradients": self.gradients_bytes, "optimiser": self.optimizer_bytes}
        parts["activations"] = self.activations_bytes
        return ", ".join(f"{name} {size / 1e9:.2f}" for name, size in parts.items())

    def as_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return {**asdict(self), "peak_bytes": self.peak_bytes}


def build(cfg: Any) -> nn.Module:
    """The model of a configuration, on the meta device, in its training types: shapes without numbers."""
    with torch.device("meta"):
        model = config.instantiate(cfg.task).build(cfg.model)
    cast(model, cfg.precision)
    return model


def plan(
    cfg: Any,
    *,
    ranks: int,
    device: str = "cuda",
    micro_batch: int | None = None,
    memory: dict[str, Any] | None = None,
    model: nn.Module | None = None,
) -> Plan:
    """The plan of a composed configuration on `ranks` ranks.

    device       "cuda" or "cpu": whose attention kernel works, and whether offloaded tensors leave it
    micro_batch, memory   instead of cfg's; the global batch stays
    model        what `build` gives, if it is there already
    Raises ValueError for a global batch that micro-batch and ranks do not divide, and for a model of another kind.
    """
    model = build(cfg) if model is None else model
    size = image_size(model)
    policy = config.plain(cfg.memory) if memory is None else memory
    images = cfg.micro_batch if micro_batch is None else micro_batch
    accumulation = batch_arithmetic(cfg.global_batch, images, ranks)
    parameters = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    stage = cfg.parallel.zero_stage
    waits = stage == 1 and ranks * accumulation == 1 and not cfg.parallel.offload  # in its own type: of one, no sum
    states = state_bytes(
        parameters,
        zero_stage=stage,
        precision=cfg.precision,
        ranks=ranks,
        ema=cfg.optim.ema_decay is not None,
        accumulate="own" if waits else cfg.parallel.accumulate,
        offload=cfg.parallel.offload,
        sub_group=_largest_sub_group(model, cfg.parallel.sub_group_size * ranks),
    )
    lasting = 0.0  # of each gradient beyond its own backward
    if stage == 0 and accumulation == 1:  # later micro-batches add to what is there
        lasting = 4.0 if cfg.parallel.accumulate == "fp32" else 2.0
    found = activations(
        model,
        images=images,
        size=size,
        precision=cfg.precision,
        device=device,
        memory=policy,
        lasting_gradient=lasting,
    )
    buckets = _bucket_bytes(cfg, parameters)
    gathered = _gathered_bytes(cfg, parameters) if stage == 3 else 0.0
    batch = images * _sample_bytes(model, size)
    copied = states["weights"] * (stage in (1, 2) and device == "cpu" and ranks > 1)  # by gloo, which gathers them
    static = states["weights"] + states["optimizer"] + batch
    waiting = 0.0 if lasting else states["gradients"]
    if stage == 1 and accumulation == 1 and cfg.parallel.overlap_comm and device != "cpu":
        waiting /= ranks  # those of other ranks go as they are reduced
    flops = _flops(model, size, policy)
    of_heads = found.heads_flops / images
    return Plan(
        parameters=parameters,
        ranks=ranks,
        micro_batch=images,
        accumulation=accumulation,
        global_batch=cfg.global_batch,
        image_size=tuple(size),
        precision=cfg.precision,
        zero_stage=stage,
        policy=policy,
        weights_bytes=states["weights"],
        gradients_bytes=states["gradients"],
        optimizer_bytes=states["optimizer"],
        activations_bytes=found.total,
        activations_by_part=found.kept,
        workspace_bytes=found.workspace,
        buffers_bytes=2 * buckets + gathered,
        batch_bytes=batch,
        host_bytes=found.host + states["host"],
        host_states_bytes=states["host"],
        backward_bytes=static + waiting + found.peak + buckets + gathered,
        step_bytes=static + states["gradients"] + states["step"] + 2 * buckets + copied + waits * 4 * WAITING_GROUP,
        flops_per_step=cfg.global_batch * (3 * flops["all"] + flops["again"] + of_heads),
        attention_flops=cfg.global_batch * (3 * flops["attention"] + flops["attention again"]),
        recomputed_flops=cfg.global_batch * flops["again"],
    )


def _largest_sub_group(model: nn.Module, size: float) -> int:
    """Parameters of the largest of the groups in which ZeRO 3 takes its step: one is full when it has `size` of them,
    and no parameter is divided, so that it may be larger by all but the whole of the largest parameter."""
    largest = filled = 0
    for parameter in model.parameters():
        if parameter.requires_grad:
            filled += parameter.numel()
            largest = max(largest, filled)
            filled *= filled < size
    return largest


def _bucket_bytes(cfg: Any, parameters: int) -> float:
    """A float32 bucket of gradients: it is filled, and while it is reduced there is a second one. ZeRO 1 has none
    unless the sums are of another type, or are reduced during backward."""
    settings = cfg.parallel
    in_place = settings.zero_stage == 1 and not settings.offload and settings.accumulate == "fp32"
    if settings.zero_stage == 0 or (in_place and not settings.overlap_comm):
        return 0.0
    return 4.0 * min(settings.reduce_bucket_size, parameters) * (1 + settings.overlap_comm)


def _gathered_bytes(cfg: Any, parameters: int) -> float:
    """Weights that ZeRO 3 has gathered at a time, at most."""
    most = cfg.parallel.live_parameters + cfg.parallel.prefetch_bucket_size
    return min(parameters, most) * (4.0 if cfg.precision == "fp32" else 2.0)


def image_size(model: nn.Module) -> list[int]:
    """Of the largest samples, as the model is given them: a detector's are padded."""
    size = backbone_of(model).input_size
    return [math.ceil(side / DIVISOR) * DIVISOR for side in size] if isinstance(model, CascadeRCNN) else size


def _sample_bytes(model: nn.Module, size: Sequence[int]) -> float:
    """Of an image in float32, and of its target."""
    backbone, pixels = backbone_of(model), math.prod(size)
    found = pixels * backbone.patch_embed.proj.in_channels * 4.0
    if isinstance(model, CascadeRCNN):
        masks = most_objects(model) if model.decoder.mask_heads else 0
        found += pixels * (masks + 8 * (model.decoder.semantic_head is not None))
    elif isinstance(model, UPerNet):
        found += pixels
    elif not isinstance(model, SimMIM) and isinstance(backbone.head, nn.Linear):
        found += backbone.head.out_features * 4.0
    return found


def _flops(model: nn.Module, size: Sequence[int], policy: dict[str, Any]) -> dict[str, float]:
    """Of one image, without heads that are run: all of a forward pass, its attention, and what backward runs again."""
    backbone = backbone_of(model)
    parts = forward_flops(backbone, *size)
    found = {"all": sum(parts.values()), "attention": parts["attention"], "again": 0.0, "attention again": 0.0}
    if isinstance(model, CascadeRCNN) and model.decoder.attention is not None:
        grid = [side // DIVISOR for side in size]
        own = block_flops(model.decoder.attention, grid)
        found["all"] += sum(own.values())
        found["attention"] += own["attention"]
    recomputed = range(len(backbone.layers)) if policy["stages"] is None else policy["stages"]
    sequential = range(len(backbone.layers)) if policy["attention_stages"] is None else policy["attention_stages"]
    for stage, blocks in enumerate(backbone.blocks()):
        for number, block in enumerate(blocks):
            own = block_flops(block, stage_grid(backbone.absolute_grid, stage))
            chosen = stage in recomputed and number % policy["every"] == 0
            whole = chosen and policy["activations"] in ("recompute", "offload")
            chunks = policy["attention"] == "sequential" and stage in sequential
            mlp = (policy["mlp_tokens"] > 0) + (chosen and policy["activations"] == "recompute_mlp")
            found["attention again"] += own["attention"] * (whole + chunks)
            found["again"] += sum(own.values()) * whole + own["attention"] * chunks + own["mlp"] * mlp
    return found


# ------------------------------------------------------------------------------------------------- the cluster


@dataclass(frozen=True)
class Gpu:
    """bytes that CUDA reports, and operations per second of dense 16-bit products, from the data sheet."""

    bytes: float
    flops: float


GPUS = {
    "A100-40": Gpu(39.4 * GIB, 312e12),
    "A100-80": Gpu(79.1 * GIB, 312e12),
    "H100-80": Gpu(79.1 * GIB, 989e12),
    "H200": Gpu(139.7 * GIB, 989e12),
}
UNITS = {"TB": 1e12, "GB": 1e9, "MB": 1e6, "TiB": 2**40, "GiB": 2**30, "MiB": 2**20, "": 1.0}


def gpu(cluster: Any) -> Gpu:
    """The GPU of conf/plan.yaml. Raises ValueError for a name that is none and no size."""
    name, default = str(cluster.gpu), GPUS["A100-80"].flops
    found = GPUS[name] if name in GPUS else Gpu(size_in_bytes("gpu", name, ", ".join(GPUS)), default)
    return Gpu(found.bytes, cluster.teraflops * 1e12) if cluster.teraflops else found


def size_in_bytes(key: str, text: Any, choices: str = "") -> float:
    """24GB, 22.5GiB or a number of bytes. Raises ValueError for anything else."""
    unit = next(unit for unit in UNITS if str(text).endswith(unit))
    try:
        return float(str(text).removesuffix(unit)) * UNITS[unit]
    except ValueError:
        known = f"one of {choices}, or " if choices else ""
        raise ValueError(f"{key}={text} is not known: give {known}a size such as 24GB") from None


def capacity(cluster: Any) -> float:
    """Bytes that tensors of one rank may take at their peak."""
    return (gpu(cluster).bytes - size_in_bytes("reserved", cluster.reserved)) / (1 + cluster.margin)


def step_seconds(found: Plan, cluster: Any) -> dict[str, float]:
    """Seconds of a step, by what takes them, from the efficiencies that `cluster` states: an estimate.

    Gradients are reduced and weights gathered once a step (ZeRO 3 gathers weights twice a micro-batch), in series with
    the computation. Offloaded activations are copied out and back; of offloaded states, which the host's own optimiser
    uses, float32 gradients are copied out with each micro-batch and weights back once.
    """
    rate = gpu(cluster).flops * found.ranks / (1 if found.precision != "fp32" else 2)  # TF32
    link = cluster.gigabytes_per_second * 1e9
    low = 4 if found.precision == "fp32" else 2
    others = (found.ranks - 1) / found.ranks
    exchanged = 4 * others + low * others * (2 * found.accumulation if found.zero_stage == 3 else 1)
    exchanged += 4 * others * (found.zero_stage == 0)
    copied = 2 * (found.host_bytes - found.host_states_bytes) * found.accumulation
    if found.host_states_bytes:
        copied += found.parameters / found.ranks * (4 * found.accumulation + low)
    return {
        "products": (found.flops_per_step - found.attention_flops) / (rate * cluster.efficiency),
        "attention": found.attention_flops / (rate * cluster.attention_efficiency),
        "communication": found.parameters * exchanged / link,
        "offload": copied / link,
    }


def largest_micro_batch(cfg: Any, *, ranks: int, bytes: float, device: str = "cuda", **changes: Any) -> int:
    """The largest micro-batch whose peak fits, of those that divide the global batch; 0 if none does.

    changes: `memory` and `model` as plan takes them.
    """
    model = changes.pop("model", None) or build(cfg)
    best = 0
    for size in _micro_batches(cfg.global_batch, ranks):
        if plan(cfg, ranks=ranks, device=device, micro_batch=size, model=model, **changes).peak_bytes > bytes:
            break
        best = size
    return best


def _micro_batches(global_batch: int, ranks: int) -> Iterator[int]:
    per_rank = global_batch // ranks
    return (size for size in range(1, per_rank + 1) if per_rank % size == 0 and global_batch % ranks == 0)


def search(cfg: Any, cluster: Any, *, ranks: int, model: nn.Module | None = None) -> list[tuple[str, Plan, float]]:
    """Of each policy of conf/memory that fits, its name, plan and seconds of a step, the fastest first.

    A policy comes with the largest micro-batch that fits; of equally fast ones the larger micro-batch is better. Raises
    ValueError if none fits.
    """
    model = build(cfg) if model is None else model
    found = []
    for name, policy in config.memory_policies().items():
        size = largest_micro_batch(cfg, ranks=ranks, bytes=capacity(cluster), memory=policy, model=model)
        if size:
            one = plan(cfg, ranks=ranks, micro_batch=size, memory=policy, model=model)
            found.append((name, one, sum(step_seconds(one, cluster).values())))
    if not found:
        least = min(
            plan(cfg, ranks=ranks, micro_batch=1, memory=policy, model=model).peak_bytes
            for policy in config.memory_policies().values()
        )
        raise ValueError(
            f"no policy fits {capacity(cluster) / GIB:.1f} GiB with global_batch={cfg.global_batch} on {ranks} ranks: "
            f"the least takes {least / GIB:.1f} GiB. Add nodes, or parallel=zero2 or zero3"
        )
    return sorted(found, key=lambda one: (one[2], -one[1].micro_batch))
