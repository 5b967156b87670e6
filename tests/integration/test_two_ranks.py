"""Two ranks of the engine, without a launcher: ZeRO stages and precisions against each other, faults on one rank."""

import math
import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from real_runs import free_port
from torch import multiprocessing

import swinv2_scale
from swinv2_scale import config, distributed
from swinv2_scale import engine as engine_module
from swinv2_scale.engine import Engine, build_engine, optimizer
from swinv2_scale.models import memory
from swinv2_scale.optim import parameter_groups
from swinv2_scale.parallel import deepspeed_config

DEPTHS = [1, 1, 2, 1]
PARALLEL = yaml.safe_load((config.CONF / "parallel/_common.yaml").read_text())
COMBINATIONS = [(0, "fp32"), *((stage, precision) for stage in (1, 2, 3) for precision in ("fp32", "bf16", "fp16"))]
# Of ZeRO 1 in bf16. Pieces of 1000 weights divide most parameters.
VARIANTS: dict[str, dict[str, Any]] = {
    "flat": {},
    "pieces during backward": {"reduce_bucket_size": 1000, "overlap_comm": True},
    "sums in bf16": {"accumulate": "bf16", "reduce_bucket_size": 1000},
    "scattered, as on a GPU": {},
    "DeepSpeed's own": {},
}
FAULTS = {"nan": math.nan, "inf": math.inf, "zero": 0.0}


def create(device: str = "cpu") -> torch.nn.Module:
    torch.manual_seed(0)
    with torch.device(device):
        return swinv2_scale.create_model(
            "debug", embed_dim=16, depths=DEPTHS, num_heads=[1, 2, 2, 4], image_size=64, window_size=4, num_classes=5
        )


def build(stage: int, precision: str, unused: bool = False, initial: Any = None, **changes: Any) -> Engine:
    model = create("meta" if initial else "cpu")
    if unused:
        model.norm9 = torch.nn.LayerNorm(9)
    policy = {"stages": None, "every": 1, "attention": "auto", "attention_stages": None, "mlp_tokens": 0}
    memory.apply(model, activations="recompute", **policy)
    ds_config = deepspeed_config(
        global_batch=8,
        micro_batch=2,
        world_size=2,
        precision=precision,
        gradient_clip=1.0,
        **PARALLEL | {"zero_stage": stage, "reduce_bucket_size": 10**6, "allgather_bucket_size": 10**6} | changes,
    )
    make = optimizer("adamw", implementation="auto", zero_stage=stage, offload=None, betas=(0.9, 0.999), eps=1e-8)
    groups = parameter_groups(model, DEPTHS, weight_decay=0.05, layer_decay=0.9)
    settings = {"precision": precision, "ds_config": ds_config, "ema_decay": 0.9, "initial": initial}
    return build_engine(model, groups, optimizer=make, **settings)


def batches(step: int) -> list[dict]:
    """This rank's two micro-batches; the other rank has others."""
    generator = torch.Generator().manual_seed(2 * step + distributed.rank())
    return [
        {
            "image": torch.randn(2, 3, 64, 64, generator=generator),
            "label": torch.randint(0, 5, (2,), generator=generator),
        }
        for _ in range(2)
    ]


def loss(model: Any, batch: dict) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(model(batch["image"]).float(), batch["label"])


def states(engine: Engine) -> dict[str, torch.Tensor]:
    averages = {f"ema.{name}": value for name, value in engine.averages()}
    return {**dict(engine.parameters()), **dict(engine.optimizer_state()), **averages}


def examine(stage: int, precision: str) -> dict[str, Any]:
    """Steps with faults on rank 1, and a second engine that is given what the first one has."""
    engine = build(stage, precision)
    found: dict[str, Any] = {}
    losses = [engine.step(batches(step), loss, 1e-3).loss for step in range(3)]
    found["losses"] = [float(distributed.sum_tensor(value)) / 2 for value in losses]
    found["states"] = states(engine)
    for name, factor in FAULTS.items():
        before, updates = states(engine), engine.updates

        def failing(model: Any, batch: dict, factor: float = factor) -> torch.Tensor:
            return loss(model, batch) * (factor if distributed.rank() == 1 else 1.0)

        applied = engine.step(batches(7), failing, 1e-3).applied
        after = states(engine)
        same = all(torch.equal(after[key], before[key]) for key in after)
        found[name] = (applied, engine.updates - updates, same, all(bool(v.isfinite().all()) for v in after.values()))
    other, expected = build(stage, precision), states(engine)
    other.load(expected.__getitem__, expected.__getitem__, step=engine.updates)
    other.loss_scale.value = engine.loss_scale.value
    given = states(other)
    found["given"] = [key for key in expected if not torch.equal(given[key], expected[key])]
    with engine.whole_model(), torch.inference_mode():
        engine.model.eval()
        if distributed.rank() == 0:
            engine.model(batches(0)[0]["image"])
    found["continued"] = [float(one.step(batches(8), loss, 1e-3).loss) for one in (engine, other)]
    return found


def variant(name: str) -> dict[str, torch.Tensor]:
    """States after three steps; a parameter takes no part in them."""
    usual = engine_module.flat_gradients
    if name == "DeepSpeed's own":
        engine_module.flat_gradients = lambda used: nullcontext()  # type: ignore[assignment]
    engine = build(1, "bf16", unused=True, **VARIANTS[name])
    engine_module.flat_gradients = usual
    if name == "scattered, as on a GPU":
        zero = engine._deepspeed.optimizer
        zero._on_cpu = False
        zero._divide()
    for step in range(3):
        engine.step(batches(step), loss, 1e-3)
    return states(engine)


def work(rank: int, port: int, file: Path) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1"}
    os.environ |= {"MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo", "TORCHDYNAMO_DISABLE": "1"}
    torch.set_num_threads(1)
    with distributed.process_group(2.0):
        values = dict(create().named_parameters())  # before DeepSpeed has seen the ranks
        first = dict(build(3, "bf16", initial=values.__getitem__).parameters())
        same = [name for name, value in values.items() if torch.equal(first[name], value)]
        found: dict[Any, Any] = {combination: examine(*combination) for combination in COMBINATIONS}
        found["variants"] = {name: variant(name) for name in VARIANTS}
        found["from meta"] = len(values) - len(same)
        if rank == 0:
            torch.save(found, file)
    distributed.end_process(0)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, str], dict[str, Any]]:
    file = tmp_path_factory.mktemp("two_ranks") / "found.pt"
    multiprocessing.spawn(work, (free_port(), file), nprocs=2)
    return torch.load(file)


@pytest.mark.parametrize("combination", COMBINATIONS)
def test_a_fault_on_one_rank_is_the_same_for_all(combination: tuple[int, str], found: dict) -> None:
    """Not a number and infinity change nothing anywhere; with zeros the step is that of the other rank."""
    one = found[combination]
    assert one["nan"] == one["inf"] == (False, 0, True, True)
    assert one["zero"] == (True, 1, False, True)


@pytest.mark.parametrize("combination", COMBINATIONS)
def test_what_is_read_can_be_given_to_another_engine(combination: tuple[int, str], found: dict) -> None:
    assert found[combination]["given"] == []
    assert found[combination]["continued"][0] == found[combination]["continued"][1]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_stages_agree(precision: str, found: dict) -> None:
    """First moments of the same gradients, summed in another order."""
    bound = {"fp32": 1e-4, "bf16": 0.03, "fp16": 0.03}[precision]
    reference, *others = (found[one] for one in COMBINATIONS if one[1] == precision)
    for other in others:
        assert other["losses"] == pytest.approx(reference["losses"], rel=bound / 10)
        for name, value in reference["states"].items():
            if name.startswith("exp_avg.") and value.norm() > 1e-5:
                assert (other["states"][name] - value).norm() < bound * value.norm(), name


@pytest.mark.parametrize(
    ("name", "bound"),
    [
        ("pieces during backward", 0.0),
        ("scattered, as on a GPU", 0.0),
        ("DeepSpeed's own", 0.01),
        ("sums in bf16", 0.03),
    ],
)
def test_flat_gradients_are_those_of_zero_1(name: str, bound: float, found: dict) -> None:
    """First moments of them. DeepSpeed adds the norm, by which gradients are clipped, in another order."""
    reference, other = found["variants"]["flat"], found["variants"][name]
    moments = {key: value for key, value in reference.items() if key.startswith("exp_avg.") and value.norm() > 1e-5}
    assert len(moments) > 80
    for key, value in moments.items():
        assert (other[key] - value).norm() <= bound * value.norm(), key


def test_zero_3_gives_memory_to_a_model_without(found: dict) -> None:
    assert found["from meta"] == 0
