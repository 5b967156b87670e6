"""Memory policies change what is kept for backward, and nothing else."""

import pytest
import torch

import swinv2_scale
from swinv2_scale.models import memory
from swinv2_scale.ops import cosine_window_attention as operator


def gradients(policy: dict[str, str] | None) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    model = swinv2_scale.create_model("debug", num_classes=10, drop_path_rate=0.5).train()
    for parameter in model.parameters():  # norms start at zero: every block would be the identity
        torch.nn.init.normal_(parameter, std=0.2)
    if policy is not None:
        memory.apply(model, **policy)
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


def kept_bytes(policy: dict[str, str]) -> int:
    """Bytes that autograd keeps between forward and backward."""
    model = swinv2_scale.create_model("debug", num_classes=0).train()
    memory.apply(model, **policy)
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
    memory.apply(model, activations="offload", attention="auto")
    assert wrapped == [(block, True) for blocks in model.blocks() for block in blocks]


def test_unknown_policy_is_refused() -> None:
    with pytest.raises(ValueError, match=r"memory\.attention must be one of .*, got 'fast'"):
        memory.apply(torch.nn.Identity(), activations="keep", attention="fast")
    with pytest.raises(ValueError, match=r"memory\.activations must be keep, recompute or offload, got 'swap'"):
        memory.apply(torch.nn.Identity(), activations="swap", attention="auto")
