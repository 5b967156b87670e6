"""The engine in this process, as the only rank: types, states by name, gradients that are not finite."""

import math
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

import swinv2_scale
from swinv2_scale import config
from swinv2_scale import engine as engine_module
from swinv2_scale.engine import Engine, build_engine, optimizer
from swinv2_scale.mapped import MappedFile
from swinv2_scale.models.initial import initial_values
from swinv2_scale.ops import native
from swinv2_scale.optim import Lamb, LossScale, parameter_groups
from swinv2_scale.parallel import deepspeed_config

pytestmark = pytest.mark.usefixtures("one_rank")
DEPTHS = [1, 1, 2, 1]
PARALLEL = yaml.safe_load((config.CONF / "parallel/_common.yaml").read_text())
ADAM: dict[str, Any] = {"betas": (0.9, 0.999), "eps": 1e-8}


def engine(
    stage: int,
    precision: str,
    accumulation: int = 2,
    *,
    name: str = "adamw",
    implementation: str = "auto",
    ema_decay: float | None = None,
    device: str = "cpu",
    initial: Callable[[str], torch.Tensor] | None = None,
    disk: MappedFile | None = None,
    embed_dim: int = 16,
    **parallel: Any,
) -> Engine:
    torch.manual_seed(0)
    with torch.device(device):
        model = swinv2_scale.create_model(
            "debug",
            embed_dim=embed_dim,
            depths=DEPTHS,
            num_heads=[1, 2, 2, 4],
            image_size=64,
            window_size=4,
            num_classes=5,
        )
    ds_config = deepspeed_config(
        global_batch=2 * accumulation,
        micro_batch=2,
        world_size=1,
        precision=precision,
        gradient_clip=1.0,
        **PARALLEL | {"zero_stage": stage, "reduce_bucket_size": 10**6, "allgather_bucket_size": 10**6} | parallel,
    )
    groups = parameter_groups(model, DEPTHS, weight_decay=0.05, layer_decay=0.9)
    make = optimizer(name, implementation=implementation, zero_stage=stage, offload=parallel.get("offload"), **ADAM)
    more: dict[str, Any] = {"ema_decay": ema_decay, "initial": initial, "disk": disk}
    return build_engine(model, groups, optimizer=make, precision=precision, ds_config=ds_config, **more)


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


@pytest.mark.parametrize("accumulation", [1, 2])
def test_zero_stages_agree_in_bf16_also_where_parameters_are_float32(
    accumulation: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The optimiser's first moment is the accumulated gradient: one rounded to bf16 would differ by 0.1 % and more. A
    sum of one gradient keeps its type until the optimiser reads it, a part of the weights at a time."""
    monkeypatch.setattr(engine_module, "WAITING_GROUP", 5000)
    states = []
    for stage in (1, 2, 3):
        built = engine(stage, "bf16", accumulation)
        built.step(batches(0, accumulation), loss, 1e-3)
        states.append(dict(built.optimizer_state()))
        if stage == 1:
            zero = built._deepspeed.optimizer
            types = {sums.dtype for sums in zero._own.values()}
            assert types == ({torch.bfloat16, torch.float32} if accumulation == 1 else {torch.float32})
            largest = max(parameter.numel() for parameter in built.model.parameters())
            sizes = [sum(p.numel() for p in group) for group in zero.bit16_groups]
            assert (max(sizes) <= max(5000, largest)) == (accumulation == 1)
    for name, value in states[0].items():
        for other in states[1:]:
            assert (other[name] - value).norm() <= 1e-5 * value.norm(), name


@pytest.mark.parametrize("later", [2, 3])
def test_states_by_name_restore_a_run_bit_for_bit(later: int) -> None:
    first = engine(1, "bf16")
    for step in range(2):
        first.step(batches(step), loss, 1e-3)
    weights, states = dict(first.parameters()), dict(first.optimizer_state())
    expected = first.step(batches(2), loss, 1e-3).loss
    second = engine(later, "bf16")
    second.load(weights.__getitem__, states.__getitem__, step=2)
    assert torch.equal(second.step(batches(2), loss, 1e-3).loss, expected)


STAGES = [(0, "fp32"), *((stage, precision) for stage in (1, 2, 3) for precision in ("fp32", "bf16", "fp16"))]


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
    undisturbed.loss_scale.value = built.loss_scale.value  # which fp16 has halved
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
    other = engine({0: 0, 1: 2, 2: 3, 3: 1}[stage], precision, ema_decay=0.5)
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


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "adam"}, r"optim.name=adam is not one of adamw, sgd, lamb"),
        ({"name": "lamb"}, "lamb needs whole parameters, which ZeRO divides: add parallel=zero0"),
        ({"implementation": "fused"}, "optim.implementation=fused is not one of auto, torch, apex, deepspeed"),
        ({"implementation": "apex"}, "optim.implementation=apex: the package apex is not here, not NVIDIA's"),
        ({"implementation": "apex", "zero_stage": 0}, r"apex is one of AdamW under ZeRO, not of adamw with .*stage=0"),
        ({"implementation": "deepspeed", "name": "sgd"}, "deepspeed is one of AdamW under ZeRO, not of sgd"),
        ({"offload": "host", "name": "sgd"}, "offload=host is not for optim.name=sgd"),
        ({"offload": "nvme", "implementation": "torch"}, "offload=nvme is not for .* optim.implementation=torch"),
    ],
)
def test_optimisers_that_cannot_be(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        optimizer(**{"name": "adamw", "implementation": "auto", "zero_stage": 1, "offload": None, **ADAM, **settings})


class FusedAdam(torch.optim.AdamW):
    """Takes NVIDIA's arguments and counts as it does, once for a whole group."""

    def __init__(self, params: Any, lr: float, betas: tuple[float, float], eps: float, adam_w_mode: bool) -> None:
        assert adam_w_mode
        super().__init__(params, lr=lr, betas=betas, eps=eps)

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter in self.state:
                    self.state[parameter]["step"] = torch.tensor(float(group.get("step", 0)))
            group["step"] = group.get("step", 0) + 1
        return super().step(closure)


def test_nvidias_apex_is_known_by_what_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """And PyPI's package of that name is not taken for it."""
    monkeypatch.setitem(sys.modules, "apex", SimpleNamespace(__path__=[]))
    with pytest.raises(ValueError, match="not NVIDIA's"):
        engine(1, "fp32", implementation="apex")
    monkeypatch.setitem(sys.modules, "apex.optimizers", SimpleNamespace(FusedAdam=FusedAdam))
    with pytest.raises(ValueError, match="without its CUDA extensions"):
        engine(1, "fp32", implementation="apex")
    monkeypatch.setitem(sys.modules, "amp_C", SimpleNamespace())
    nvidias, torchs = engine(1, "fp32", implementation="apex"), engine(1, "fp32", implementation="torch")
    assert nvidias.optimizer.endswith("FusedAdam") and torchs.optimizer == "torch.optim.adamw.AdamW, fused"
    assert_same_steps(nvidias, torchs)
    resumed = engine(1, "fp32", implementation="apex")
    states = dict(torchs.optimizer_state())
    resumed.load(dict(torchs.parameters()).__getitem__, states.__getitem__, step=torchs.updates)
    assert_same_steps(resumed, torchs)


@pytest.mark.skipif("cpu" in native.missing, reason="no native kernels")
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_the_native_step_is_that_of_zero(precision: str, accumulation: int) -> None:
    """The loss scale of fp16 and the clipping of gradients included; a run goes on with the other."""
    natives = engine(1, precision, accumulation)
    torchs = engine(1, precision, accumulation, implementation="torch")
    assert natives.optimizer == "swinv2_scale.optim.FlatAdamW, fused" != torchs.optimizer
    for step in range(2):
        for built in (natives, torchs):
            built.loss_scale.value = min(built.loss_scale.value, 256.0)  # or the steep loss is too much for fp16
            assert built.step(batches(step, accumulation), lambda *given: 100 * loss(*given), 1e-3).applied
        assert natives.gradient_norm() == pytest.approx(torchs.gradient_norm(), rel=1e-5)
        assert natives.gradient_norm() > 1  # so that they are clipped
        weights, states = dict(natives.parameters()), dict(natives.optimizer_state())
        for name, value in torchs.parameters():
            torch.testing.assert_close(weights[name], value, rtol=0, atol=2e-6)
        for name, value in torchs.optimizer_state():
            assert (states[name] - value).norm() <= 1e-5 * value.norm(), name
        torchs.load(weights.__getitem__, states.__getitem__, step=natives.updates)
        trained = dict(natives.model.named_parameters())
        assert all(torch.equal(trained[name], value) for name, value in torchs.model.named_parameters())


@pytest.mark.long  # compiles for one to two minutes
def test_deepspeeds_cpu_adam_is_torchs_adamw() -> None:
    deepspeeds, torchs = engine(1, "fp32", implementation="deepspeed"), engine(1, "fp32")
    assert "CPUAdam" in deepspeeds.optimizer
    assert_same_steps(deepspeeds, torchs)
    resumed = engine(1, "fp32", implementation="deepspeed")
    states = dict(torchs.optimizer_state())
    resumed.load(dict(torchs.parameters()).__getitem__, states.__getitem__, step=torchs.updates)
    assert_same_steps(resumed, torchs)


def assert_same_steps(first: Engine, second: Engine, within: float = 1e-5) -> None:
    for step in range(4):
        assert float(first.step(batches(step), loss, 1e-3).loss) == pytest.approx(
            float(second.step(batches(step), loss, 1e-3).loss), rel=within
        )
    expected = dict(second.parameters())
    assert max(float((value - expected[name]).abs().max()) for name, value in first.parameters()) < 2 * within


@pytest.mark.parametrize("stage", [1, 3])
def test_fp16_halves_its_loss_scale_until_gradients_are_finite(stage: int) -> None:
    built = engine(stage, "fp16")
    assert built.model.head.weight.dtype == torch.float16 and built.loss_scale.value == 2.0**16
    before = dict(built.parameters())

    def steep(model, batch: dict) -> torch.Tensor:
        return loss(model, batch) * 3000

    results = [built.step(batches(0), steep, 1e-3) for _ in range(14)]
    skipped = [result for result in results if not result.applied]
    assert 0 < len(skipped) < 14 and all(result.rescaled and math.isfinite(result.loss) for result in skipped)
    assert results[: len(skipped)] == skipped and built.updates == 14 - len(skipped)
    assert built.loss_scale.value == 2.0 ** (16 - len(skipped))
    assert any(not torch.equal(value, before[name]) for name, value in built.parameters())


def test_fp16_trains_as_fp32_does() -> None:
    """The gradients that the optimiser sees are free of the loss scale, and clipped as without one."""
    half, single = engine(1, "fp16"), engine(1, "fp32")
    for built in (half, single):
        built.step(batches(0), loss, 1e-3)
    assert half.gradient_norm() == pytest.approx(single.gradient_norm(), rel=0.01)
    expected = dict(single.optimizer_state())
    for name, value in half.optimizer_state():
        if name.startswith("exp_avg.") and expected[name].norm() > 1e-6:
            assert (value - expected[name]).norm() < 0.05 * expected[name].norm(), name


def test_the_loss_scale_grows_again_and_is_restored() -> None:
    scale = LossScale(2.0**16, grows=True)
    assert [scale.after(step == 5) for step in range(5)] == [True] * 5
    assert not any(scale.after(True) for _ in range(1999))
    other = LossScale(2.0**16, grows=True)
    other.state = scale.state
    assert other.value == 2.0**11
    other.after(True)
    assert other.value == 2.0**12
    plain = LossScale(1.0, grows=False)
    plain.state = scale.state
    assert not plain.after(False) and plain.value == 1.0 and plain.state == {}


@pytest.mark.parametrize("stage", [1, 3])
def test_one_rank_may_run_the_whole_model_and_training_goes_on(stage: int) -> None:
    built, undisturbed = engine(stage, "bf16"), engine(stage, "bf16")
    for step in range(3):
        if step:
            built.model.eval()
            with built.whole_model(), torch.inference_mode():
                outputs = [built.model(batches(9)[0]["image"]) for _ in range(2)]
            assert torch.equal(*outputs)
        assert torch.equal(built.step(batches(step), loss, 1e-3).loss, undisturbed.step(batches(step), loss, 1e-3).loss)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_model_without_memory_is_given_it_and_its_values(stage: int) -> None:
    precision = "fp32" if stage == 0 else "bf16"
    usual = engine(stage, precision)
    values = dict(usual.parameters())
    built = engine(stage, precision, device="meta", initial=values.__getitem__)
    assert_equal_runs(usual, built)
    unfilled = engine(stage, precision, device="meta")
    assert all(value.isnan().all() for _, value in unfilled.parameters())


def test_a_parameter_starts_alike_wherever_it_is_made() -> None:
    """And as `init_weights` makes it, but for the seed: statistics of each kind, zero and one where they must be."""
    built = engine(0, "fp32")
    first, second, other = (
        initial_values(built.model, depths=DEPTHS, scheme="released", seed=seed) for seed in (3, 3, 4)
    )
    for name, value in built.model.named_parameters():
        fresh = first(name)
        assert torch.equal(fresh, second(name)) and fresh.dtype == torch.float32
        deviation = float(value.detach().std()) if value.numel() > 1 else 0.0
        random = deviation > 0
        assert torch.equal(fresh, other(name)) != random
        if random:
            assert float(fresh.std()) == pytest.approx(deviation, rel=0.5)
        else:
            assert torch.equal(fresh, value)


@pytest.mark.parametrize("sub_group_size", [10**9, pytest.param(10_000, marks=pytest.mark.long)])
def test_states_on_a_disk_change_nothing(tmp_path: Path, sub_group_size: int) -> None:
    usual = engine(3, "bf16", sub_group_size=sub_group_size, ema_decay=0.9)
    disk = MappedFile(tmp_path)
    offloaded = engine(3, "bf16", sub_group_size=sub_group_size, ema_decay=0.9, disk=disk)
    assert_equal_runs(usual, offloaded)
    states = dict(offloaded.optimizer_state()) | {f"ema.{name}": value for name, value in offloaded.averages()}
    resumed = engine(3, "bf16", device="meta", sub_group_size=sub_group_size, ema_decay=0.9, disk=MappedFile(tmp_path))
    resumed.load(dict(offloaded.parameters()).__getitem__, states.__getitem__, step=offloaded.updates)
    assert_equal_runs(offloaded, resumed)
    size = sum(value.numel() for name, value in resumed.parameters() if value.dim() > 1)
    assert disk._bytes > 4 * 4 * size and not list(tmp_path.iterdir())  # the files have no names


def test_a_disk_without_room_is_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"parallel.offload_path=.* has no room: .* AdamW takes 12 bytes a parameter"):
        MappedFile(tmp_path).take(2**50)
    with pytest.raises(ValueError, match=r"parallel.offload_path=/proc/nowhere cannot be written"):
        MappedFile(Path("/proc/nowhere"))


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_states_in_host_memory_change_nothing(stage: int) -> None:
    usual, offloaded = engine(stage, "bf16"), engine(stage, "bf16", offload="host")
    # The squares of gradients are summed in another order for clipping, which turns single roundings of bfloat16: up to
    # 3e-4 of a few weights, of which four steps have moved each by up to 4e-3.
    assert_same_steps(offloaded, usual, within=5e-5 if stage == 2 else 5e-4)
    resumed = engine(stage, "bf16", offload="host")
    states = dict(offloaded.optimizer_state())
    resumed.load(dict(offloaded.parameters()).__getitem__, states.__getitem__, step=offloaded.updates)
    assert_same_steps(resumed, offloaded)


@pytest.mark.long  # compiles for one to two minutes
def test_states_on_nvme_change_nothing(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"embed_dim": 32, "sub_group_size": 300_000}  # DeepSpeed swaps pieces of a megabyte
    nvme = settings | {"offload": "nvme", "offload_path": str(tmp_path)}
    usual = engine(3, "bf16", implementation="deepspeed", **settings, offload="host")
    offloaded = engine(3, "bf16", **nvme)
    assert "CPUAdam" in offloaded.optimizer
    assert_equal_runs(usual, offloaded)
    assert any(path.is_file() for path in tmp_path.rglob("*"))
    resumed = engine(3, "bf16", **nvme)
    states = dict(offloaded.optimizer_state())
    resumed.load(dict(offloaded.parameters()).__getitem__, states.__getitem__, step=offloaded.updates)
    assert_equal_runs(resumed, offloaded)
    with pytest.raises(ValueError, match=r"optim.ema_decay is not kept with parallel.offload=nvme"):
        engine(3, "bf16", **nvme, ema_decay=0.9)


def assert_equal_runs(first: Engine, second: Engine) -> None:
    """To the last bit."""
    for step in range(3):
        assert torch.equal(first.step(batches(step), loss, 1e-3).loss, second.step(batches(step), loss, 1e-3).loss)
    expected = dict(second.parameters()) | dict(second.optimizer_state())
    for name, value in [*first.parameters(), *first.optimizer_state()]:
        assert torch.equal(value, expected[name]), name


def test_muon_is_not_compiled_when_it_is_imported() -> None:
    """torch.compile would load inductor at every start."""
    muon = pytest.importorskip("deepspeed.runtime.zero.muon.original_muon")
    assert not hasattr(muon.zeropower_via_newtonschulz5, "_torchdynamo_orig_callable")
