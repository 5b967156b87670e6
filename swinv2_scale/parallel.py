"""What DeepSpeed is told, as one pure function of the configuration; and the types that parameters train in."""

import re
from typing import Any

import torch
from torch import nn

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Parameters that stay float32 whatever the precision: scales, the position bias network, norms.
FLOAT32 = re.compile(r"(^|\.)(logit_scale|cpb_mlp\.\d+\.\w+|\w*norm\d?\.\w+)$")
OFFLOADS = (None, "host", "nvme", "disk")
# Elements of a group of weights whose gradients wait in 16 bits: the optimiser reads a group's in float32, 48 MiB then.
WAITING_GROUP = 3 * 2**22
# Of offload=nvme; blocks in bytes.
AIO = {"block_size": 2**20, "queue_depth": 8, "thread_count": 1, "single_submit": False, "overlap_events": True}


def cast(model: nn.Module, precision: str) -> None:
    """Give each parameter its training type, in place."""
    if precision != "fp32":
        for name, parameter in model.named_parameters():
            if not FLOAT32.search(name):
                parameter.data = parameter.data.to(PRECISIONS[precision])


def batch_arithmetic(global_batch: int, micro_batch: int, world_size: int) -> int:
    """Accumulation steps so that micro_batch · accumulation · world_size = global_batch.

    Raises ValueError that proposes values when there is no such number.
    """
    if min(global_batch, micro_batch) < 1:
        raise ValueError(f"global_batch={global_batch} and micro_batch={micro_batch} must be positive")
    accumulation, rest = divmod(global_batch, micro_batch * world_size)
    if rest == 0 and accumulation > 0:
        return accumulation
    lower = global_batch // (micro_batch * world_size) * micro_batch * world_size
    proposals = [f"global_batch={lower}"] if lower else []
    proposals.append(f"global_batch={lower + micro_batch * world_size}")
    if global_batch % world_size == 0:
        per_rank = global_batch // world_size
        fitting = max(size for size in range(1, min(micro_batch, per_rank) + 1) if per_rank % size == 0)
        proposals.append(f"micro_batch={fitting}")
    raise ValueError(
        f"global_batch={global_batch} is not micro_batch={micro_batch} x world size {world_size} x a whole number of "
        f"accumulation steps. Try {' or '.join(proposals)}"
    )


def deepspeed_config(
    *,
    global_batch: int,
    micro_batch: int,
    world_size: int,
    precision: str,
    gradient_clip: float,
    zero_stage: int,
    reduce_bucket_size: int,
    allgather_bucket_size: int,
    overlap_comm: bool,
    accumulate: str,
    prefetch_bucket_size: int,
    live_parameters: int,
    sub_group_size: int,
    offload: str | None,
    offload_path: str | None,
) -> dict[str, Any]:
    """The whole DeepSpeed configuration. Pure; nothing that matters is left to defaults, which have moved before.

    Batches in images, gradient_clip is the largest global norm (0: no clipping), the rest is that of conf/parallel.
    Raises ValueError for impossible batch arithmetic, and for stages, precisions and offloads that are unknown or do
    not go together.
    """
    if zero_stage not in (0, 1, 2, 3):
        raise ValueError(f"parallel.zero_stage must be 0, 1, 2 or 3, got {zero_stage}")
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    if precision != "fp32" and zero_stage == 0:
        raise ValueError(
            f"precision={precision} needs the float32 master weights that ZeRO keeps: use parallel=zero1, which on one "
            "rank takes the same memory, or precision=fp32"
        )
    if accumulate not in ("fp32", precision):
        raise ValueError(f"parallel.accumulate={accumulate} must be fp32 or that of the weights, precision={precision}")
    _check_offload(offload, offload_path, zero_stage)
    zero: dict[str, Any] = {
        "stage": zero_stage,
        # On CPU one of these two must be on, or ranks are not averaged (DeepSpeed issue 8382).
        "contiguous_gradients": True,
        "reduce_scatter": True,
        "reduce_bucket_size": reduce_bucket_size,
        "allgather_bucket_size": allgather_bucket_size,
        "overlap_comm": overlap_comm,
    }
    if zero_stage == 3:
        zero |= {
            "stage3_prefetch_bucket_size": prefetch_bucket_size,
            "stage3_max_live_parameters": live_parameters,
            "stage3_max_reuse_distance": live_parameters,
            "stage3_param_persistence_threshold": 0,  # which would keep small ones whole, in one buffer of one type
            "sub_group_size": sub_group_size,
        }
    if offload in ("host", "nvme"):
        zero["offload_optimizer"] = {
            "device": "cpu" if offload == "host" else "nvme",
            "nvme_path": offload_path,
            "buffer_count": 4,
            "pin_memory": torch.cuda.is_available(),
            "pipeline_read": False,
            "pipeline_write": False,
        }
    return {
        "train_batch_size": global_batch,
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": batch_arithmetic(global_batch, micro_batch, world_size),
        "gradient_clipping": gradient_clip,
        "bf16": {"enabled": False},  # see the head of engine.py
        "fp16": {"enabled": False, "loss_scale": 1.0},
        "data_types": {"grad_accum_dtype": accumulate},
        "communication_data_type": "fp32",
        "prescale_gradients": False,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # which optimiser, says optim.implementation
        "zero_optimization": zero,
        "aio": AIO,
        "steps_per_print": 2**31,  # our telemetry reports
        "wall_clock_breakdown": False,
    }


def _check_offload(offload: str | None, path: str | None, stage: int) -> None:
    """Raise ValueError for what cannot be."""
    if offload not in OFFLOADS:
        raise ValueError(f"parallel.offload must be null, host, nvme or disk, got {offload!r}")
    if offload is not None and stage == 0:
        raise ValueError(f"parallel.offload={offload} is of the states that ZeRO keeps: use parallel=zero1 or zero3")
    if offload in ("nvme", "disk") and (stage != 3 or not path):
        raise ValueError(
            f"parallel.offload={offload} needs parallel.zero_stage=3 (it is {stage}) and parallel.offload_path (it is "
            f"{path}), a directory on a fast local disk: use parallel=zero3_{offload}"
        )
