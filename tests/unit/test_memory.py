"""Memory policies change what is kept for backward, and nothing else."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import swinv2_scale
from swinv2_scale.config import compose, plain
from swinv2_scale.models import memory
from swinv2_scale.ops import cosine_window_attention as operator

ROOT = Path(__file__).parents[2]


def apply(model: torch.nn.Module, **changes: Any) -> None:
    """memory.apply with the values of conf/memory/_common.yaml where none are given."""
    common = yaml.safe_load((ROOT / "conf/memory/_common.yaml").read_text())
    memory.apply(model, **{**common, **changes})


def gradients(policy: dict[str, Any] | None) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    model = swinv2_scale.create_model("debug", num_classes=10, drop_path_rate=0.5).train()
    for parameter in model.parameters():  # norms start at zero: every block would be the identity
        torch.nn.init.normal_(parameter, std=0.2)
    if policy is not None:
        apply(model, **policy)
    torch.manual_seed(1)  # drop path draws from here, also when a block runs again
    loss = model(torch.randn(3, 3, 72, 64)).square().mean()
    loss.backward()
    return {"loss": loss.detach(), **{name: parameter.grad for name, parameter in model.named_parameters()}}


@pytest.mark.parametrize("activations", ["keep", "recompute", "offload"])
def test_recomputation_is_bit_identical(activations: str) -> None:
    plain = gradients(None)
    assert all(
        torch.equal(plain[name], value)
        for name, value in gradients({"activations": activations, "attention": "auto"}).items()
    )


def test_sequential_attention_differs_by_rounding_only(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setattr(sys.modules[operator.__module__], "SEQUENTIAL_BYTES", 2**16)  # several chunks
    plain, sequential = gradients(None), gradients({"activations": "recompute", "attention": "sequential"})
    for name, value in plain.items():
        assert (value - sequential[name]).norm() <= 1e-5 * value.norm().clamp(min=1e-6), name


def kept_bytes(policy: dict[str, Any]) -> int:
    """Bytes that autograd keeps between forward and backward."""
    model = swinv2_scale.create_model("debug", num_classes=0).train()
    apply(model, **policy)
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


def test_recomputation_keeps_far_less() -> None:
    keep = kept_bytes({"activations": "keep", "attention": "auto"})
    assert kept_bytes({"activations": "recompute", "attention": "auto"}) < keep / 4


def test_offload_keeps_the_inputs_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU the copy is no copy: what can be seen is that fairscale's wrapper was given each block, and offloads."""
    model = swinv2_scale.create_model("debug", num_classes=0)
    wrapped: list[tuple[object, bool]] = []
    monkeypatch.setattr(
        memory, "checkpoint_wrapper", lambda block, offload_to_cpu: wrapped.append((block, offload_to_cpu))
    )
    apply(model, activations="offload", attention="auto")
    assert wrapped == [(block, True) for blocks in model.blocks() for block in blocks]


def test_unknown_policy_is_refused() -> None:
    with pytest.raises(ValueError, match=r"memory\.attention must be one of .*, got 'fast'"):
        apply(torch.nn.Identity(), attention="fast")
    with pytest.raises(ValueError, match=r"memory\.activations must be one of keep, recompute, .*, got 'swap'"):
        apply(torch.nn.Identity(), activations="swap")
    with pytest.raises(ValueError, match=r"memory\.every=0 must be 1 or more"):
        apply(torch.nn.Identity(), every=0)
    with pytest.raises(ValueError, match=r"memory\.stages=\[1, 4\]: the model has stages 0 to 3"):
        apply(swinv2_scale.create_model("debug"), stages=[1, 4])


POLICIES: list[dict[str, Any]] = [
    {"activations": activations, "every": every, "stages": stages}
    for activations in ("recompute", "recompute_mlp", "offload")
    for every, stages in ((1, None), (2, None), (1, [0, 2]), (2, [1]))
]


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_every_policy_is_bit_identical(policy: dict[str, Any]) -> None:
    plain, found = gradients(None), gradients(policy)
    assert all(torch.equal(plain[name], value) for name, value in found.items())


@pytest.mark.parametrize("activations", ["keep", "recompute", "recompute_mlp"])
def test_an_mlp_in_parts_differs_by_rounding_only(activations: str) -> None:
    plain, found = gradients(None), gradients({"activations": activations, "mlp_tokens": 100})
    for name, value in plain.items():
        assert (value - found[name]).norm() <= 1e-5 * value.norm().clamp(min=1e-6), name


def test_policies_keep_what_they_say() -> None:
    """Blocks of "debug": 1, 1, 2, 1. The more is run again, the less is kept."""
    keep = kept_bytes({})
    sizes = [
        kept_bytes({"activations": "recompute", **which})
        for which in ({"stages": [3]}, {"every": 2}, {"stages": [0, 1]}, {})
    ]
    assert keep > sizes[0] > sizes[1] > sizes[2] > sizes[3]
    assert keep > kept_bytes({"activations": "recompute_mlp"}) > sizes[3]
    assert kept_bytes({"mlp_tokens": 64}) < keep
    windows = swinv2_scale.create_model("debug")
    apply(windows, attention="sequential", attention_stages=[0, 1])
    found = [{block.attn.implementation for block in blocks} for blocks in windows.blocks()]
    assert found == [{"sequential"}, {"sequential"}, {"auto"}, {"auto"}]


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "conf/memory").glob("[a-z]*.yaml")))
def test_every_policy_of_conf_can_be_applied(name: str) -> None:
    cfg = compose("pretrain", ["experiment=demo_simmim", f"memory={name}"])
    memory.apply(swinv2_scale.create_model("debug"), **plain(cfg.memory))
