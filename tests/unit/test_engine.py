"""The engine in this process, as the only rank: types, states by name, gradients that are not finite."""

import math

import pytest
import torch

import swinv2_scale
from swinv2_scale.engine import Engine, build_engine, deepspeed_config
from swinv2_scale.optim import parameter_groups

pytestmark = pytest.mark.usefixtures("one_rank")
DEPTHS = [1, 1, 2, 1]


def engine(stage: int, precision: str, accumulation: int = 2) -> Engine:
    torch.manual_seed(0)
    model = swinv2_scale.create_model(
        "debug", embed_dim=16, depths=DEPTHS, num_heads=[1, 2, 2, 4], image_size=64, window_size=4, num_classes=5
    )
    ds_config = deepspeed_config(
        global_batch=2 * accumulation,
        micro_batch=2,
        world_size=1,
        zero_stage=stage,
        precision=precision,
        gradient_clip=1.0,
        reduce_bucket_size=10**6,
        allgather_bucket_size=10**6,
        overlap_comm=False,
    )
    groups = parameter_groups(model, DEPTHS, weight_decay=0.05, layer_decay=0.9)
    return build_engine(model, groups, betas=(0.9, 0.999), eps=1e-8, precision=precision, ds_config=ds_config)


def batches(step: int, accumulation: int = 2) -> list[dict]:
    generator = torch.Generator().manual_seed(step)
    return [
        {
            "image": torch.randn(2, 3, 64, 64, generator=generator),
            "label": torch.randint(0, 5, (2,), generator=generator),
        }
        for _ in range(accumulation)
    ]


def loss(model, batch: dict) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(model(batch["image"]).float(), batch["label"])


def test_master_weights_keep_what_bf16_would_round() -> None:
    torch.manual_seed(0)
    built = engine(1, "bf16")
    head = dict(built.parameters())["head.weight"]
    assert head.dtype == torch.float32
    assert not torch.equal(head, head.bfloat16().float())
    assert torch.equal(head.bfloat16(), built.model.head.weight)


def test_zero_stages_agree_in_bf16_also_where_parameters_are_float32() -> None:
    """The optimiser's first moment is the accumulated gradient: one rounded to bf16 would differ by 0.1 % and more."""
    states = []
    for stage in (1, 2):
        built = engine(stage, "bf16")
        built.step(batches(0), loss, 1e-3)
        states.append(dict(built.optimizer_state()))
    for name, value in states[0].items():
        assert (states[1][name] - value).norm() <= 1e-5 * value.norm(), name


def test_states_by_name_restore_a_run_bit_for_bit() -> None:
    first = engine(1, "bf16")
    for step in range(2):
        first.step(batches(step), loss, 1e-3)
    weights, states = dict(first.parameters()), dict(first.optimizer_state())
    expected = first.step(batches(2), loss, 1e-3).loss
    second = engine(2, "bf16")
    second.load(weights.__getitem__, states.__getitem__, step=2)
    assert torch.equal(second.step(batches(2), loss, 1e-3).loss, expected)


STAGES = [(0, "fp32"), (1, "fp32"), (1, "bf16"), (2, "fp32"), (2, "bf16")]


@pytest.mark.parametrize("factor", [math.nan, math.inf])
@pytest.mark.parametrize(("stage", "precision"), STAGES)
def test_gradients_that_are_not_finite_change_nothing(stage: int, precision: str, factor: float) -> None:
    """Weights, moments and Adam's count of steps are those of a run that never met them."""
    built, undisturbed = engine(stage, precision), engine(stage, precision)
    assert built.gradient_norm() is None
    assert built.step(batches(0), loss, 1e-3).applied
    norm = built.gradient_norm()
    assert not built.step(batches(1), lambda model, batch: loss(model, batch) * factor, 1e-3).applied
    assert built.gradient_norm() == norm
    undisturbed.step(batches(0), loss, 1e-3)
    assert torch.equal(built.step(batches(2), loss, 1e-3).loss, undisturbed.step(batches(2), loss, 1e-3).loss)
    assert built.updates == undisturbed.updates == 2
    expected = {**dict(undisturbed.parameters()), **dict(undisturbed.optimizer_state())}
    found = {**dict(built.parameters()), **dict(built.optimizer_state())}
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


@pytest.mark.parametrize(("stage", "precision"), STAGES)
def test_gradients_of_nothing_but_zeros_are_a_step(stage: int, precision: str) -> None:
    built = engine(stage, precision)
    built.step(batches(0), loss, 1e-3)
    assert built.step(batches(1), lambda model, batch: loss(model, batch) * 0.0, 1e-3).applied
    assert built.gradient_norm() == 0.0
    assert built.updates == 2
    assert math.isfinite(float(built.step(batches(2), loss, 1e-3).loss))


@pytest.mark.parametrize("stage", [0, 1])
def test_gradients_are_clipped_to_the_largest_norm(stage: int) -> None:
    """Adam's first moment after one step is a tenth of the gradient, whose norm is that of clipping."""
    built = engine(stage, "fp32")
    built.step(batches(0), lambda model, batch: loss(model, batch) * 100, 1e-3)
    assert (built.gradient_norm() or 0.0) > 100
    moments = torch.cat([value.flatten() for name, value in built.optimizer_state() if name.startswith("exp_avg.")])
    assert float(moments.norm()) == pytest.approx(0.1, rel=1e-3)


def test_a_stream_that_ends_within_a_step_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="takes 2 micro-batches, the stream gave 1"):
        engine(1, "fp32").step(batches(0)[:1], loss, 1e-3)
