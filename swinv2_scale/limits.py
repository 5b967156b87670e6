"""What a setting may be, whatever uses it: checked when a configuration is composed, before anything is built.

check({"micro_batch": None})   ValueError: micro_batch=None must be a whole number of at least 1
"""

from collections.abc import Mapping
from typing import Any

INDEX = "%a"  # in settings of an array of jobs: the number in it, which a job is given when it starts
CHOICES = {"precision": ("bf16", "fp16", "fp32")}
# The smallest value.
WHOLE = {
    "seed": 0,
    "steps": 1,
    "global_batch": 1,
    "micro_batch": 1,
    "evaluation_batch": 1,
    "log_every": 0,
    "evaluate_every": 0,
    "checkpoint_every": 0,
    "keep_checkpoints": 0,
    "keep_every": 0,
    "workers": 0,
    "guard.patience": 1,
    "guard.rollbacks": 0,
    "data.open_shards": 1,
    "data.retries": 0,
    "memory.every": 1,
    "memory.mlp_tokens": 0,
    "optim.warmup_steps": 0,
    "parallel.reduce_bucket_size": 1,
    "parallel.allgather_bucket_size": 1,
    "parallel.prefetch_bucket_size": 1,
    "parallel.live_parameters": 1,
    "parallel.sub_group_size": 1,
    "nodes": 1,
    "cluster.accelerators": 1,
    "gpus": 1,
    "restarts": 0,
    "kills": 0,
}
# Numbers that must be larger than 0, and those that may be 0.
POSITIVE = {
    "epochs",
    "timeout_minutes",
    "stall_minutes",
    "data.cache_gigabytes",
    "data.connect_timeout",
    "data.read_timeout",
    "optim.lr_batch",
    "optim.eps",
    "efficiency",
    "attention_efficiency",
    "gigabytes_per_second",
}
NOT_NEGATIVE = {
    "max_corrupt_share",
    "optim.lr",
    "optim.minimum_lr",
    "optim.warmup_lr",
    "optim.warmup_epochs",
    "optim.weight_decay",
    "optim.gradient_clip",
    "margin",
}
LISTS = {
    "memory.stages",
    "memory.attention_stages",
    "optim.milestone_epochs",
    *(f"cluster.{name}" for name in ("exclude", "options", "modules", "setup", "environment", "srun")),
}
MAY_BE_NULL = {
    "steps",
    "epochs",
    "global_batch",
    "optim.lr_batch",
    "optim.warmup_steps",
    "optim.warmup_epochs",
    "memory.stages",
    "memory.attention_stages",
}


def check(settings: Mapping[str, Any]) -> dict[str, int]:
    """Whole numbers that are written as others, such as steps=1e5, as what they are. settings: by their dotted names.

    Raises ValueError that names the first value which is not what its setting may be.
    """
    whole = {}
    for key, value in settings.items():
        if (value is None and key in MAY_BE_NULL) or (isinstance(value, str) and INDEX in value):
            continue
        if (expected := _expected(key, value)) is not None:
            null = ", or null" if key in MAY_BE_NULL else ""
            raise ValueError(f"{key}={value} must be {expected}{null}")
        if key in WHOLE and isinstance(value, float):
            whole[key] = int(value)
    if settings.get("optim.warmup_epochs", 0) is None and settings.get("optim.warmup_steps") is None:
        raise ValueError("optim.warmup_epochs and optim.warmup_steps are both null: write 0 for no warm-up")
    return whole


def _expected(key: str, value: Any) -> str | None:
    """What a setting must be, if its value is not that."""
    number = value if isinstance(value, int | float) and not isinstance(value, bool) else None
    if key in CHOICES and value not in CHOICES[key]:
        return f"one of {', '.join(CHOICES[key])}"
    if key in WHOLE and (number is None or number != number // 1 or number < WHOLE[key]):
        return f"a whole number of at least {WHOLE[key]}"
    if key in POSITIVE and (number is None or not number > 0):
        return "a number above 0"
    if key in NOT_NEGATIVE and (number is None or not number >= 0):
        return "a number of at least 0"
    if key in LISTS and not isinstance(value, list):
        return "a list" if value is None else f"a list: [{value}]"
    return None
