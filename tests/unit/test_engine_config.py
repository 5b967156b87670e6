"""The DeepSpeed configuration as a pure function, and the types that parameters train in."""

import pytest
import torch

import swinv2_scale
from swinv2_scale.parallel import batch_arithmetic, cast, deepspeed_config

VALUES = {
    "global_batch": 64,
    "micro_batch": 4,
    "world_size": 2,
    "zero_stage": 1,
    "precision": "bf16",
    "gradient_clip": 5.0,
    "reduce_bucket_size": 10,
    "allgather_bucket_size": 10,
    "overlap_comm": False,
    "accumulate": "fp32",
    "prefetch_bucket_size": 10,
    "live_parameters": 10,
    "sub_group_size": 10,
    "offload": None,
    "offload_path": None,
}


def test_batch_arithmetic_reaches_deepspeed() -> None:
    ds_config = deepspeed_config(**VALUES)
    assert ds_config["gradient_accumulation_steps"] == 8
    assert ds_config["train_batch_size"] == 64
    assert ds_config["gradient_clipping"] == 5.0
    assert ds_config["data_types"] == {"grad_accum_dtype": "fp32"}


def test_ranks_are_averaged_on_cpu() -> None:
    """With both of these off, DeepSpeed does not average over ranks on CPU."""
    zero = deepspeed_config(**VALUES)["zero_optimization"]
    assert zero["contiguous_gradients"] or zero["reduce_scatter"]


@pytest.mark.parametrize(
    ("global_batch", "micro_batch", "world_size", "proposals"),
    [
        (100, 16, 4, ["global_batch=64", "global_batch=128", "micro_batch=5"]),
        (4, 8, 1, ["global_batch=8", "micro_batch=4"]),
        (7, 2, 2, ["global_batch=4", "global_batch=8"]),
    ],
)
def test_impossible_batches_propose_values(
    global_batch: int, micro_batch: int, world_size: int, proposals: list
) -> None:
    with pytest.raises(ValueError, match=f"global_batch={global_batch} is not") as caught:
        batch_arithmetic(global_batch, micro_batch, world_size)
    for proposal in proposals:
        assert proposal in str(caught.value)
        key, value = proposal.split("=")
        batch_arithmetic(
            **{"global_batch": global_batch, "micro_batch": micro_batch, key: int(value)}, world_size=world_size
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"zero_stage": 7}, "zero_stage must be 0, 1, 2 or 3, got 7"),
        ({"precision": "int8"}, "precision must be one of fp32, bf16, fp16, got 'int8'"),
        ({"zero_stage": 0}, "use parallel=zero1"),
        ({"micro_batch": 0}, "must be positive"),
        ({"accumulate": "fp16"}, "parallel.accumulate=fp16 must be fp32 or that of the weights, precision=bf16"),
        ({"offload": "cloud"}, "offload must be null, host, nvme or disk, got 'cloud'"),
        ({"offload": "host", "zero_stage": 0, "precision": "fp32"}, "of the states that ZeRO keeps"),
        ({"offload": "nvme", "offload_path": "/nvme"}, r"needs parallel.zero_stage=3 \(it is 1\)"),
        ({"offload": "disk", "zero_stage": 3}, r"parallel.offload_path \(it is None\)"),
    ],
)
def test_impossible_configurations_are_refused(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        deepspeed_config(**{**VALUES, **change})


def test_what_must_be_exact_stays_float32_in_bf16() -> None:
    model = swinv2_scale.create_model("debug", extra_norm_period=2, num_classes=10)
    cast(model, "bf16")
    for name, parameter in model.named_parameters():
        exact = "norm" in name or "logit_scale" in name or "cpb_mlp" in name
        assert parameter.dtype == (torch.float32 if exact else torch.bfloat16), name
    logits = model(torch.randn(2, 3, 64, 64))
    assert logits.dtype == torch.bfloat16
    logits.float().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
