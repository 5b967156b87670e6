"""The engine in this process, as the only rank: types, states by name, gradients that are not finite."""

import math

import pytest
import torch

import swinv2_scale
from swinv2_scale.engine import Engine, build_engine, deepspeed_config
from swinv2_scale.optim import Lamb, optimizer, parameter_groups

pytestmark = pytest.mark.usefixtures("one_rank")
DEPTHS = [1, 1, 2, 1]


def engine(
    stage: int, precision: str, accumulation: int = 2, *, name: str = "adamw", ema_decay: float | None = None
) -> Engine:
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
    make = optimizer(name, stage, betas=(0.9, 0.999), eps=1e-8)
    return build_engine(model, groups, optimizer=make, precision=precision, ds_config=ds_config, ema_decay=ema_decay)


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


@pytest.mark.parametrize(("stage", "precision"), STAGES)
def test_averages_follow_the_master_weights_and_are_restored(stage: int, precision: str) -> None:
    built = engine(stage, precision, ema_decay=0.5)
    expected = {key: value.double() for key, value in built.parameters()}
    assert all(torch.equal(value.double(), expected[key]) for key, value in built.averages())
    for step in range(4):
        factor = math.nan if step == 2 else 1.0  # a step that is skipped moves nothing

        def failing(model, batch: dict, factor: float = factor) -> torch.Tensor:
            return loss(model, batch) * factor

        applied = built.step(batches(step), failing, 1e-2).applied
        decay = min(0.5, (1 + built.updates) / (10 + built.updates))
        if applied:
            for key, value in built.parameters():
                expected[key] = decay * expected[key] + (1 - decay) * value.double()
    found = dict(built.averages())
    assert max(float((found[key] - expected[key]).abs().max()) for key in expected) < 1e-6
    assert not any(name.startswith("ema.") for name, _ in built.optimizer_state())
    states = {**dict(built.optimizer_state()), **{f"ema.{key}": value for key, value in found.items()}}
    other = engine(2 if stage == 1 else stage, precision, ema_decay=0.5)
    other.load({k: v.clone() for k, v in built.parameters()}.__getitem__, states.__getitem__, step=built.updates)
    assert all(torch.equal(value, found[key]) for key, value in other.averages())


@pytest.mark.parametrize("name", ["sgd", "lamb"])
def test_other_optimisers_learn_skip_and_are_restored(name: str) -> None:
    first = engine(0, "fp32", name=name)
    begin = float(first.step(batches(0), loss, 1e-2).loss)
    weights, states = ({k: v.clone() for k, v in part} for part in (first.parameters(), first.optimizer_state()))
    assert not first.step(batches(0), lambda model, batch: loss(model, batch) * math.nan, 1e-2).applied
    expected = [first.step(batches(0), loss, 1e-2).loss for _ in range(5)]
    assert float(expected[-1]) < begin
    second = engine(0, "fp32", name=name)
    second.load(weights.__getitem__, states.__getitem__, step=1)
    assert [second.step(batches(0), loss, 1e-2).loss for _ in range(5)] == expected


def test_sgd_is_that_of_zero() -> None:
    losses = []
    for stage in (0, 1, 2):
        built = engine(stage, "fp32", name="sgd")
        losses.append([float(built.step(batches(step), loss, 1e-2).loss) for step in range(4)])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5) and losses[2] == pytest.approx(losses[0], rel=1e-5)


def test_lamb_takes_steps_of_the_weights_own_length() -> None:
    """Against the formulas of the paper in float64; without weight decay it is Adam."""
    torch.manual_seed(0)
    weight, bias = (torch.nn.Parameter(torch.randn(shape)) for shape in ((5, 3), (4,)))
    groups = [{"params": [weight], "weight_decay": 0.1}, {"params": [bias], "weight_decay": 0.0}]
    lamb = Lamb(groups, lr=0.01, betas=(0.9, 0.99), eps=1e-6)
    twin = torch.nn.Parameter(bias.detach().clone())
    adam = torch.optim.Adam([twin], lr=0.01, betas=(0.9, 0.99), eps=1e-6)
    x, m, v = weight.detach().double(), torch.zeros(5, 3).double(), torch.zeros(5, 3).double()
    for step in range(1, 6):
        weight.grad, bias.grad = torch.randn(5, 3), torch.randn(4)
        twin.grad = bias.grad.clone()
        g = weight.grad.double()
        m, v = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g**2
        r = (m / (1 - 0.9**step)) / ((v / (1 - 0.99**step)).sqrt() + 1e-6) + 0.1 * x
        x = x - 0.01 * (x.norm() / r.norm()) * r
        lamb.step()
        adam.step()
    assert torch.allclose(weight.double(), x, atol=1e-6)
    assert torch.allclose(bias, twin, atol=1e-6)


def test_optimisers_that_cannot_be() -> None:
    with pytest.raises(ValueError, match=r"optim.name=adam is not one of adamw, sgd, lamb"):
        optimizer("adam", 1, betas=(0.9, 0.999), eps=1e-8)
    with pytest.raises(ValueError, match="lamb needs whole parameters, which ZeRO divides: add parallel=zero0"):
        optimizer("lamb", 1, betas=(0.9, 0.999), eps=1e-8)
