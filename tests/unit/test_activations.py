"""What is planned of a training pass against what PyTorch holds: kept tensors, and the peak of backward."""

from typing import Any

import pytest
import torch

import swinv2_scale
from swinv2_scale import config
from swinv2_scale.models import memory
from swinv2_scale.models.activations import _kernel_scratch, activations
from swinv2_scale.models.dry_run import Live
from swinv2_scale.models.simmim import SimMIM
from swinv2_scale.ops import block, native
from swinv2_scale.parallel import cast

pytestmark = pytest.mark.skipif("cpu" in native.missing, reason="plans are of the kernel")


@pytest.fixture(autouse=True)
def products_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans are of an MLP's parts; where it is one operator, it takes less."""
    decide = block._takes_product
    monkeypatch.setattr(block, "_takes_product", lambda *maps: len(maps) == 2 and decide(*maps))
    monkeypatch.setattr(block, "_takes_mlp_gradient", lambda *maps: False)


KEEP: dict[str, Any] = config.memory_policies()["none"]


def compare(
    policy: dict[str, Any],
    *,
    precision: str = "bf16",
    simmim: bool = False,
    drop_path: float = 0.0,
    size: int = 128,
    window: int = 8,
    extra_norm: int = 0,
    frames: int | None = None,
) -> tuple[float, float]:
    """Planned over found, of what is kept and of the peak."""
    torch.manual_seed(0)
    changes = {"drop_path_rate": drop_path, "image_size": size, "window_size": window, "extra_norm_period": extra_norm}
    changes |= {} if frames is None else {"frames": frames, "window_size": [2, window, window]}
    whole = [*([] if frames is None else [frames]), size, size]
    model: torch.nn.Module = swinv2_scale.create_model(
        "debug", num_heads=[2, 4, 8, 16], num_classes=0 if simmim else 10, **changes
    )
    model = SimMIM(model, norm_target_window=0) if simmim else model  # type: ignore[arg-type]
    cast(model.train(), precision)
    memory.apply(model, **policy)
    images, mask = torch.randn(4, 3, *whole), (torch.rand(4, size // 4, size // 4) > 0.5).float()
    target = torch.randn(4, 10).softmax(dim=1)
    with Live() as live:
        for tensor in (images, mask, target, *model.parameters()):
            tensor.detach()  # so that they count as there before
        before = live.live
        loss = model(images, mask) if simmim else torch.nn.functional.cross_entropy(model(images).float(), target)
        kept = live.live - before
        live.peak = live.live
        loss.backward()
    found = activations(
        model,
        images=4,
        size=whole,
        precision=precision,
        device="cpu",
        memory=policy,
        lasting_gradient=4.0 if precision == "fp32" else 2.0,
    )
    return found.total / kept, found.peak / (live.peak - before)


@pytest.mark.parametrize("name", sorted(config.memory_policies()))
def test_every_policy_of_conf(name: str) -> None:
    kept, peak = compare(config.memory_policies()[name])
    assert kept == pytest.approx(1.0, abs=2e-3)
    assert peak == pytest.approx(1.0, abs=0.06 if name == "sequential" else 0.025)


@pytest.mark.parametrize(
    ("policy", "changes"),
    [
        ({}, {"precision": "fp32"}),
        ({}, {"extra_norm": 2}),
        ({}, {"frames": 4, "size": 64}),
        ({"attention": "sequential", "activations": "recompute"}, {"frames": 4, "size": 64}),
        ({"attention": "reference"}, {"frames": 3, "size": 64}),
        ({}, {"simmim": True}),
        ({"activations": "recompute"}, {"simmim": True}),
        ({"activations": "recompute", "stages": [1, 2]}, {}),
        ({"activations": "recompute_mlp", "every": 2}, {}),
        ({"activations": "offload", "stages": [0], "mlp_tokens": 512}, {}),
        ({"mlp_tokens": 512}, {}),
        ({"attention": "sequential", "attention_stages": [0, 1]}, {"size": 192, "window": 12}),
        ({"attention": "reference"}, {}),
        ({"attention": "reference", "activations": "recompute"}, {"size": 192, "window": 12}),
    ],
    ids=str,
)
def test_combinations(policy: dict[str, Any], changes: dict[str, Any]) -> None:
    kept, peak = compare({**KEEP, **policy}, **changes)
    assert kept == pytest.approx(1.0, abs=5e-3)
    assert peak == pytest.approx(1.0, abs=0.06)


@pytest.mark.parametrize("rate", [0.05, 0.2, 0.9])
@pytest.mark.parametrize("activations", ["keep", "recompute"])
def test_with_drop_path_a_step_takes_no_more(activations: str, rate: float) -> None:
    kept, peak = compare({**KEEP, "activations": activations}, simmim=True, drop_path=rate)
    assert kept >= 0.995 and peak >= 0.975
    assert kept > 1.02 or rate < 0.5 or activations == "recompute"  # which keeps a block's input in any case


def test_offloaded_inputs_lie_on_the_host_of_an_accelerator() -> None:
    model, policy = swinv2_scale.create_model("debug"), config.memory_policies()["offload"]
    shape = {"images": 4, "size": (128, 128), "precision": "fp32", "memory": policy, "lasting_gradient": 4.0}
    cpu, cuda = (activations(model, device=device, **shape) for device in ("cpu", "cuda"))  # type: ignore[arg-type]
    assert cpu.host == 0.0
    assert cuda.host > 0.0
    assert cuda.host + cuda.total == cpu.total


@pytest.mark.parametrize(("images", "heads"), [(1, 4), (4, 4), (4, 32)], ids=["few windows", "few heads", "many heads"])
def test_scratch_of_the_cpu_kernel_is_what_it_allocates(images: int, heads: int) -> None:
    """The gradients of the bias table, one per task, are among the memory that the kernel asks for."""
    window, side, channels = [4, 4], 16, 8
    qkv, scale = torch.randn(images, side, side, 3, heads, channels), torch.zeros(heads)
    table = torch.randn(heads, 7, 7)
    arguments = (window, [0, 0], -100.0)
    out, lse = torch.ops.swinv2_scale.cosine_window_attention_forward(qkv, scale, table, *arguments)
    with torch.profiler.profile(profile_memory=True) as profile:
        torch.ops.swinv2_scale.cosine_window_attention_backward(out, qkv, scale, table, out, lse, *arguments)
    asked = [event.nbytes() for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    assert _kernel_scratch("cpu", images * side**2, images * side**2, heads, window) in asked
