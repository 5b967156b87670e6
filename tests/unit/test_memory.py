"""Memory policies change what is kept for backward, and nothing else."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

import swinv2_scale
from swinv2_scale.config import compose, plain
from swinv2_scale.models import memory, swin_v2
from swinv2_scale.models.simmim import SimMIM
from swinv2_scale.models.swin_v2 import SwinTransformerV2
from swinv2_scale.ops import cosine_window_attention as operator
from swinv2_scale.ops.block import mlp
from swinv2_scale.parallel import cast

ROOT = Path(__file__).parents[2]
COMMON = yaml.safe_load((ROOT / "conf/memory/_common.yaml").read_text())
NAMES = sorted(path.stem for path in (ROOT / "conf/memory").glob("[a-z]*.yaml"))
TOKENS = 50  # of an MLP at a time: eight parts in the first stage of the model below, the last of 10
RECOMPUTED = ("recompute", "recompute_mlp", "offload")
# With other orders of summation: of the gradients of the position bias and the scale over chunks of windows, and of
# those of an MLP's weights over parts of its tokens. Relative, in the 2-norm of each gradient; seen: below 1e-6.
ROUNDING = 1e-5


def apply(model: nn.Module, **changes: Any) -> None:
    """memory.apply with the values of conf/memory/_common.yaml where none are given."""
    memory.apply(model, **{**COMMON, **changes})


def policy(name: str) -> dict[str, Any]:
    """A policy of conf/memory as a run would have it."""
    return plain(compose("pretrain", ["experiment=demo_simmim", f"memory={name}"]).memory)


def tiny(**changes: Any) -> SwinTransformerV2:
    """Blocks 3, 1, 2, 1, windows of 4 x 4 tokens; blocks do something, and half of their branches are dropped."""
    arguments = {"embed_dim": 16, "depths": [3, 1, 2, 1], "num_heads": [1, 1, 2, 2], "window_size": 4}
    torch.manual_seed(0)
    model = swinv2_scale.create_model("debug", **{**arguments, "num_classes": 10, "drop_path_rate": 0.5, **changes})
    for parameter in model.parameters():  # norms start at zero: every block would be the identity
        nn.init.normal_(parameter, std=0.2)
    return model.train()


@pytest.fixture(scope="module")
def model() -> SwinTransformerV2:
    """One for all tests: a policy takes the place of the one before."""
    return tiny()


@pytest.fixture(autouse=True)
def several_chunks() -> Iterator[None]:
    """Of sequential attention, in a model this small."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules[operator.__module__], "SEQUENTIAL_BYTES", 2**13)
        yield


def step(model: nn.Module, autocast: bool = False, **changes: Any) -> dict[str, torch.Tensor]:
    """Loss and gradients under a policy, and what is drawn next: the same numbers must be left for the next step."""
    apply(model, **changes)
    model.zero_grad()
    torch.manual_seed(1)  # drop path draws from here, also when a block runs again
    images = torch.randn(3, 3, 48, 40)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = model(images).float().square().mean()
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {"loss": loss.detach(), "next": torch.rand(1), **gradients}  # type: ignore[dict-item]


def unequal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> list[str]:
    """Names of what differs in a single bit."""
    assert a.keys() == b.keys()
    return [name for name in a if not torch.equal(a[name], b[name])]


def assert_close(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    """Equal but for the order of summation."""
    assert a.keys() == b.keys() and torch.equal(a["next"], b["next"])
    for name, value in a.items():
        assert (value - b[name]).norm() <= ROUNDING * value.norm().clamp(min=1e-6), name


def test_drop_path_drops(model: SwinTransformerV2) -> None:
    """Otherwise the tests below would say nothing about its random numbers."""
    dropping = step(model)
    rates = [(block, block.drop_path.rate) for blocks in model.blocks() for block in blocks]
    for block, _ in rates:
        block.drop_path.rate = 0.0
    whole = step(model)
    for block, rate in rates:
        block.drop_path.rate = rate
    assert not torch.equal(dropping["loss"], whole["loss"])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", NAMES)
def test_a_batch_may_lose_every_branch(name: str, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under every policy; weights that nothing came through have gradients of zero, as for a mask."""
    model = tiny()
    cast(model, precision)
    memory.apply(model, **policy(name))
    monkeypatch.setattr(torch, "rand", lambda count, **_: torch.zeros(count))
    model(torch.randn(1, 3, 60, 64)).float().square().sum().backward()
    blocks = [block for blocks in model.blocks() for block in blocks]
    for block in blocks[1:]:  # the first one's rate is zero
        assert not any(parameter.grad.any() for parameter in block.parameters())  # type: ignore[union-attr]
    assert all(parameter.grad.any() for parameter in blocks[0].parameters())  # type: ignore[union-attr]


@pytest.mark.parametrize("mlp_tokens", [0, TOKENS])
@pytest.mark.parametrize("attention", ["auto", "reference", "sequential"])
def test_recomputation_is_bit_identical(model: SwinTransformerV2, attention: str, mlp_tokens: int) -> None:
    """Each way of recomputation with each form of attention and of the MLP."""
    form = {"attention": attention, "mlp_tokens": mlp_tokens}
    kept = step(model, **form)
    for activations in RECOMPUTED:
        for which in ({}, {"stages": [0, 2], "every": 2}):
            found = step(model, activations=activations, **which, **form)
            assert unequal(kept, found) == [], (activations, which)


@pytest.mark.parametrize("activations", RECOMPUTED)
def test_the_choice_of_blocks_does_not_matter(model: SwinTransformerV2, activations: str) -> None:
    kept = step(model)
    for which in ({"every": 2}, {"every": 3}, {"stages": [0, 2]}, {"stages": [3]}, {"stages": []}):
        assert unequal(kept, step(model, activations=activations, **which)) == [], which


def test_sequential_attention_differs_by_rounding_only(model: SwinTransformerV2) -> None:
    reference = step(model, attention="reference")
    assert_close(reference, step(model, attention="sequential"))


def test_an_mlp_in_parts_differs_by_rounding_only(model: SwinTransformerV2) -> None:
    assert_close(step(model), step(model, mlp_tokens=TOKENS))
    assert_close(step(model), step(model, mlp_tokens=10**6))  # one part, of another form: MKL may sum it differently


@pytest.mark.parametrize("name", NAMES)
def test_every_policy_of_conf_changes_nothing_but_memory(model: SwinTransformerV2, name: str) -> None:
    chosen = policy(name)
    if chosen["mlp_tokens"]:
        chosen["mlp_tokens"] = TOKENS
    if chosen["attention"] == "sequential":  # in the stages where it is; the others have the kernel
        same = {"attention": "reference", "attention_stages": chosen["attention_stages"]}
        assert_close(step(model, **same), step(model, **chosen))
    elif chosen["mlp_tokens"]:
        assert_close(step(model), step(model, **chosen))
    else:
        assert unequal(step(model), step(model, **chosen)) == []


@pytest.mark.parametrize("activations", RECOMPUTED)
def test_recomputation_is_bit_identical_in_bfloat16(activations: str) -> None:
    """With weights as the engine has them: large ones in bfloat16, the others in float32."""
    model = tiny()
    cast(model, "bf16")
    form = {"attention": "sequential", "mlp_tokens": TOKENS}
    assert unequal(step(model, **form), step(model, activations=activations, **form)) == []


@pytest.mark.parametrize("activations", ["recompute", "recompute_mlp"])
def test_recomputation_is_bit_identical_under_autocast(model: SwinTransformerV2, activations: str) -> None:
    form = {"attention": "sequential", "mlp_tokens": TOKENS, "autocast": True}
    assert unequal(step(model, **form), step(model, activations=activations, **form)) == []


def test_offload_under_autocast_is_refused(model: SwinTransformerV2) -> None:
    """fairscale's wrapper would run the block again in another type."""
    with pytest.raises(
        ValueError, match=r"memory\.activations='offload' does not work under autocast: use 'recompute'"
    ):
        step(model, activations="offload", autocast=True)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):  # nothing runs again
        assert model(torch.zeros(1, 3, 64, 64)).isfinite().all()


@pytest.mark.parametrize("activations", RECOMPUTED)
def test_recomputation_is_bit_identical_in_pretraining(activations: str) -> None:
    """Also where the first block's input depends on a parameter, and where most of the model is not trained."""
    torch.manual_seed(0)
    model = SimMIM(tiny(num_classes=0), norm_target_window=0)
    images, mask = torch.randn(2, 3, 64, 64), (torch.rand(2, 16, 16) < 0.6).float()

    def gradients(**changes: Any) -> dict[str, torch.Tensor]:
        apply(model, **changes)
        model.zero_grad()
        torch.manual_seed(1)
        model(images, mask).backward()
        return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}

    assert unequal(gradients(), gradients(activations=activations)) == []
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("layers.3" in name or "decoder" in name)
    trained = gradients(activations=activations)
    assert len(trained) > 5 and unequal(gradients(), trained) == []


def runs(model: SwinTransformerV2, module: str, **changes: Any) -> list[list[int]]:
    """How often the attention or the MLP of each block runs in a step."""
    counts = [[0] * len(blocks) for blocks in model.blocks()]

    def count(stage: int, number: int) -> None:
        counts[stage][number] += 1

    hooks = [
        getattr(block, module).register_forward_pre_hook(lambda *_, at=(stage, number): count(*at))
        for stage, blocks in enumerate(model.blocks())
        for number, block in enumerate(blocks)
    ]
    step(model, **changes)
    for hook in hooks:
        hook.remove()
    return counts


@pytest.mark.parametrize(
    ("name", "twice"),
    [
        ("none", [[1, 1, 1], [1], [1, 1], [1]]),
        ("fused", [[1, 1, 1], [1], [1, 1], [1]]),
        ("block", [[2, 2, 2], [2], [2, 2], [2]]),
        ("offload", [[2, 2, 2], [2], [2, 2], [2]]),
        ("sequential", [[2, 2, 2], [2], [2, 2], [2]]),
        ("sequential_early", [[2, 2, 2], [2], [2, 2], [2]]),
        ("chunked_mlp", [[2, 2, 2], [2], [2, 2], [2]]),
        ("alternate", [[2, 1, 2], [2], [2, 1], [2]]),
        ("early_stages", [[2, 2, 2], [2], [1, 1], [1]]),
        ("mlp", [[1, 1, 1], [1], [1, 1], [1]]),
    ],
)
def test_a_policy_runs_again_what_it_says(model: SwinTransformerV2, name: str, twice: list[list[int]]) -> None:
    assert runs(model, "attn", **policy(name)) == twice


def test_the_table_above_has_every_policy() -> None:
    (table,) = [mark for mark in test_a_policy_runs_again_what_it_says.pytestmark if mark.name == "parametrize"]
    assert sorted(name for name, _ in table.args[1]) == NAMES


def test_an_mlp_runs_again_where_it_should(model: SwinTransformerV2, monkeypatch: pytest.MonkeyPatch) -> None:
    for block in (block for blocks in model.blocks() for block in blocks):
        monkeypatch.setattr(block.drop_path, "rate", 0.0)  # of all tokens
    every_second = {"activations": "recompute_mlp", "every": 2}
    assert runs(model, "attn", **every_second) == [[1, 1, 1], [1], [1, 1], [1]]
    hidden = [[block.mlp.fc1.weight for block in blocks] for blocks in model.blocks()]
    calls: dict[torch.Tensor, int] = {}

    def counted(x: torch.Tensor, weight: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        calls[weight] = calls.get(weight, 0) + 1
        return mlp(x, weight, *others)

    monkeypatch.setattr(swin_v2, "mlp", counted)
    step(model, **every_second)
    assert [[calls[layer] for layer in layers] for layers in hidden] == [[2, 1, 2], [2], [2, 1], [2]]
    calls.clear()
    step(model, mlp_tokens=TOKENS)  # of 360, 90, 27 and 12
    assert [[calls[layer] for layer in layers] for layers in hidden] == [[16, 16, 16], [4], [2, 2], [2]]


def kept_bytes(**changes: Any) -> int:
    """Bytes that autograd keeps between forward and backward."""
    model = swinv2_scale.create_model("debug", num_classes=0).train()
    apply(model, **changes)
    sizes: dict[int, int] = {}
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = model(torch.randn(2, 3, 128, 128))
    assert out.requires_grad
    return sum(sizes.values())


def test_policies_keep_what_they_say() -> None:
    """The more is run again, the less is kept."""
    keep = kept_bytes()
    sizes = [
        kept_bytes(activations="recompute", **which)
        for which in ({"stages": [3]}, {"every": 2}, {"stages": [0, 1]}, {})
    ]
    assert keep > sizes[0] > sizes[1] > sizes[2] > sizes[3]
    assert sizes[3] < keep / 4
    assert keep > kept_bytes(activations="recompute_mlp") > sizes[3]
    assert kept_bytes(mlp_tokens=64) < keep
    assert kept_bytes(attention="sequential") < kept_bytes(attention="reference")


def test_attention_by_stage(model: SwinTransformerV2) -> None:
    apply(model, **policy("sequential_early"))
    found = [{block.attn.implementation for block in blocks} for blocks in model.blocks()]
    assert found == [{"sequential"}, {"sequential"}, {"auto"}, {"auto"}]


def test_a_policy_takes_the_place_of_the_one_before(model: SwinTransformerV2) -> None:
    names = list(model.state_dict())
    for changes in (
        {"activations": "offload"},
        {"activations": "recompute", "mlp_tokens": 8, "attention": "sequential"},
    ):
        apply(model, **changes)
        assert list(model.state_dict()) == names
    assert runs(model, "attn") == [[1, 1, 1], [1], [1, 1], [1]]
    assert {block.attn.implementation for blocks in model.blocks() for block in blocks} == {"auto"}
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_offload_keeps_the_inputs_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU the copy is no copy: what can be seen is that fairscale's wrapper was given each block, and offloads."""
    model = swinv2_scale.create_model("debug", num_classes=0)
    wrapped: list[tuple[object, bool]] = []
    monkeypatch.setattr(
        memory, "checkpoint_wrapper", lambda block, offload_to_cpu: wrapped.append((block, offload_to_cpu))
    )
    apply(model, activations="offload", attention="auto")
    assert wrapped == [(block, True) for blocks in model.blocks() for block in blocks]


def test_the_kernel_or_an_error() -> None:
    """memory=fused does not fall back to the reference."""
    model = tiny().double()
    with pytest.raises(ValueError, match=r"implementation 'kernel' does not apply: qkv is float64; 'auto'"):
        apply(model, **policy("fused"))
        model(torch.zeros(1, 3, 64, 64, dtype=torch.float64))


def test_unknown_policy_is_refused() -> None:
    with pytest.raises(ValueError, match=r"memory\.attention must be one of .*, got 'fast'"):
        apply(nn.Identity(), attention="fast")
    with pytest.raises(ValueError, match=r"memory\.activations must be one of keep, recompute, .*, got 'swap'"):
        apply(nn.Identity(), activations="swap")
    with pytest.raises(ValueError, match=r"memory\.every=0 must be 1 or more"):
        apply(nn.Identity(), every=0)
    with pytest.raises(ValueError, match=r"memory\.stages=\[1, 4\]: the model has stages 0 to 3"):
        apply(swinv2_scale.create_model("debug"), stages=[1, 4])
