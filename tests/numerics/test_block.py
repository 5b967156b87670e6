"""The parts of a block that are ours against compositions of PyTorch's functions: values, gradients, what is kept."""

import math
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from swinv2_scale.ops import block, native

SHAPE = (3, 5, 7)  # images, rows, columns
TYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
KEEP = torch.tensor([0.0, 1.25, 1.25])
ORDER, KEPT = torch.tensor([2, 0, 1]), torch.tensor([1.25, 0.5])  # the third image and the first have a branch


def composed_norm(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor, keep: Tensor | None) -> Tensor:
    branch = F.layer_norm(y.to(weight.dtype), weight.shape, weight, bias)
    return x + (branch if keep is None else branch * keep.view(-1, 1, 1, 1)).to(x.dtype)


def norm_of_some(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return block.residual_post_norm(x, y, weight, bias, KEPT, ORDER)


def composed_norm_of_some(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    branch = F.layer_norm(y.to(weight.dtype), weight.shape, weight, bias)
    first, second = (branch[i] * KEPT[i] for i in range(2))
    return torch.stack([x[0] + second.to(x.dtype), x[1], x[2] + first.to(x.dtype)])


def first_images(x: Tensor) -> Tensor:
    x, some = block.first_images(x, ORDER, 2)
    return torch.cat([3 * x, some])


def composed_first_images(x: Tensor) -> Tensor:
    return torch.cat([3 * x, x[2:], x[:1]])


def composed_norm_alone(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x.to(weight.dtype), weight.shape, weight, bias).to(x.dtype)


def composed_mlp(x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor) -> Tensor:
    return F.linear(F.gelu(F.linear(x, weight1, bias1)), weight2, bias2)


def arguments(name: str, channels: int, dtype: torch.dtype) -> list[Any]:
    torch.manual_seed(0)
    exact = torch.promote_types(dtype, torch.float32)
    x = torch.randn(*SHAPE, channels, dtype=dtype)
    if name in ("norm", "norm of some"):
        y = torch.randn_like(x) * 2 + torch.randn_like(x[..., :1])
        tensors = [x, y, torch.randn(channels, dtype=exact), torch.randn(channels, dtype=exact)]
        return [*tensors, KEEP] if name == "norm" else [x, y[:2], *tensors[2:]]
    if name == "first images":
        return [x]
    if name == "norm alone":
        return [2 * x + 1, torch.randn(channels, dtype=exact), torch.randn(channels, dtype=exact)]
    hidden = 2 * channels
    if name == "linear":
        return [x, torch.randn(hidden, channels, dtype=dtype) / 5, torch.randn(hidden, dtype=dtype)]
    first, second = torch.randn(hidden, channels, dtype=dtype) / 5, torch.randn(channels, hidden, dtype=dtype) / 5
    return [2 * x, first, torch.randn(hidden, dtype=dtype), second, torch.randn(channels, dtype=dtype)]


FUNCTIONS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "norm": (block.residual_post_norm, composed_norm),
    "norm of some": (norm_of_some, composed_norm_of_some),
    "first images": (first_images, composed_first_images),
    "norm alone": (block.layer_norm, composed_norm_alone),
    "linear": (block.linear, F.linear),
    "mlp": (block.mlp, composed_mlp),
}


def results(function: Callable[..., Tensor], tensors: Sequence[Tensor]) -> list[Tensor]:
    """Output, then gradients of all but the factors of drop path."""
    leaves = [t.clone().requires_grad_() if t is not KEEP else t for t in tensors]
    out = function(*leaves)
    torch.manual_seed(1)
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    grad = torch.randn(out.shape).bfloat16().to(out.dtype)  # the same numbers in every type
    return [out.detach(), *torch.autograd.grad(out, wanted, grad)]


def error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


@pytest.fixture(params=["native", "PyTorch"])
def parts(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With the native parts, and as on a device that has none."""
    if request.param == "native" and "cpu" in native.missing:
        pytest.skip(native.missing["cpu"])
    if request.param == "PyTorch":
        monkeypatch.setitem(native.missing, "cpu", "not today")
    return request.param


@pytest.mark.parametrize("channels", [48, 40])  # not a multiple of 16: never native
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_errors_are_those_of_the_composition(parts: str, name: str, dtype: torch.dtype, channels: int) -> None:
    """Against float64 with the same inputs: not beyond 1.5 times those of PyTorch's functions in the same type."""
    ours, composed = FUNCTIONS[name]
    tensors = arguments(name, channels, dtype)
    exact = results(composed, [t if t is KEEP else t.double() for t in tensors])
    for found, usual, true in zip(results(ours, tensors), results(composed, tensors), exact, strict=True):
        assert found.dtype == usual.dtype and found.shape == usual.shape
        rounding = 6e-8 if name == "norm of some" and dtype != torch.float64 else 1e-15  # of sums of few tokens
        assert error(found, true) <= 1.5 * error(usual, true) + rounding


@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradients_are_those_of_finite_differences(parts: str, name: str) -> None:
    tensors = [
        t if t is KEEP else t[..., :16].contiguous() if i == 0 else t
        for i, t in enumerate(arguments(name, 16, torch.float64))
    ]
    leaves = [t.requires_grad_() if t is not KEEP else t for t in tensors]
    torch.autograd.gradcheck(FUNCTIONS[name][0], leaves, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_large_hidden_map_is_in_memory_twice(parts: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """And nothing changes but the order in which the first bias's gradient is summed."""
    tensors = arguments("mlp", 48, dtype)
    whole = results(block.mlp, tensors)
    monkeypatch.setattr(block, "LARGE", 0)
    monkeypatch.setattr(block, "PART", 32)
    shapes: list[tuple[int, ...]] = []
    gelu_backward = block._gelu_backward
    monkeypatch.setattr(block, "_gelu_backward", lambda *maps: shapes.append(maps[0].shape) or gelu_backward(*maps))
    found = results(block.mlp, tensors)
    assert shapes == [(32, 96)] * 3 + [(9, 96)]
    assert all(torch.equal(a, b) for i, (a, b) in enumerate(zip(found, whole, strict=True)) if i != 3)
    assert error(found[3], whole[3].double()) <= 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize("name", FUNCTIONS)
def test_frozen_weights_get_no_gradient(parts: str, name: str) -> None:
    x, *others = arguments(name, 32, torch.float32)
    x.requires_grad_()
    FUNCTIONS[name][0](x, *others).sum().backward()
    assert x.grad is not None


def test_gelu_reaches_from_tail_to_tail() -> None:
    """Relative to x: to the last bits of float32, and nothing from the tail's other side."""
    if "cpu" in native.missing:
        pytest.skip(native.missing["cpu"])
    x = torch.linspace(-14, 14, 16 * 4000).view(-1, 16)
    found = torch.ops.swinv2_scale.gelu_forward(x)
    exact = F.gelu(x.double())
    assert (found - exact).abs().max() <= 5e-7
    assert ((found - exact) / x.double())[x != 0].abs().max() <= 2.5e-7
    special = torch.tensor([[float("nan"), float("inf"), -40.0, 40.0, 0.0] + [0.0] * 11])
    nan, inf, *rest = torch.ops.swinv2_scale.gelu_forward(special)[0, :5].tolist()
    assert math.isnan(nan) and inf == float("inf") and rest == [0.0, 40.0, 0.0]


def test_gelu_in_bfloat16_is_good_to_its_last_bit() -> None:
    """Of its value relatively, in the tails less and less; of its slope, which has a zero, absolutely."""
    if "cpu" in native.missing:
        pytest.skip(native.missing["cpu"])
    x = torch.linspace(-9.9, 9.9, 16 * 4000).bfloat16().view(-1, 16)  # an odd vector, and pairs of vectors
    for channels in (16, 64):
        x = x.view(-1, channels)
        exact = x.double()
        below = torch.special.erfc(-exact / math.sqrt(2)) / 2  # F.gelu has no digits left in the tail
        value, true = exact * below, below + exact * (-exact.square() / 2).exp() / math.sqrt(2 * math.pi)
        allowed = 2**-8 + 5e-4 * (exact.abs() - 3).clamp_min(0).exp()
        found = torch.ops.swinv2_scale.gelu_forward(x)
        assert ((found - value).abs() <= allowed * value.abs()).all()
        slope = torch.ones_like(x)
        again, total = torch.ops.swinv2_scale.gelu_backward(slope, x)
        assert torch.equal(found, again)
        assert ((slope - true).abs() <= 2**-8 * true.abs() + 5e-4).all()
        assert ((total - true.sum(0)).abs() <= 5e-4 * len(x)).all()
    far = torch.ops.swinv2_scale.gelu_forward(torch.tensor([[-40.0, -12.0, 40.0, float("inf")] * 8]).bfloat16())
    assert (far[0, :2].abs() <= 1e-20).all() and far[0, 2:4].tolist() == [40.0, float("inf")]


def test_what_is_kept() -> None:
    """Of an MLP its input and hidden map; of a norm its branch, and two numbers per token."""
    kept: list[tuple[int, ...]] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        for name, expected in (
            ("mlp", [(*SHAPE, 48), (*SHAPE, 96), (96, 48), (48, 96)]),
            ("linear", [(*SHAPE, 48), (96, 48)]),
        ):
            kept.clear()
            FUNCTIONS[name][0](*(t.requires_grad_() for t in arguments(name, 48, torch.bfloat16)))
            assert kept == expected
        kept.clear()
        block.residual_post_norm(*(t.requires_grad_(t is not KEEP) for t in arguments("norm", 48, torch.bfloat16)))
        assert kept[0] == (*SHAPE, 48) and sum(len(shape) == 4 and shape[-1] > 1 for shape in kept) == 1


def test_autocast_computes_in_its_type(parts: str) -> None:
    for name in ("linear", "mlp"):
        tensors = [t.requires_grad_() for t in arguments(name, 48, torch.float32)]
        with torch.autocast("cpu", torch.bfloat16):
            out = FUNCTIONS[name][0](*tensors)
        low = FUNCTIONS[name][0](*(t.detach().bfloat16() for t in tensors))
        assert out.dtype == torch.bfloat16 and torch.equal(out, low)
        out.sum().backward()
        assert all(t.grad is not None and t.grad.dtype == torch.float32 for t in tensors)


def test_a_compiler_and_an_exporter_see_pytorch() -> None:
    with torch.device("meta"):
        tensors = arguments("mlp", 32, torch.float32)

    class Module(torch.nn.Module):
        def forward(self, *tensors: Tensor) -> Tensor:
            return block.residual_post_norm(tensors[0], block.mlp(*tensors), tensors[4], tensors[4], None)

    graph = torch.export.export(Module(), tuple(tensors)).graph
    assert {node.target.namespace for node in graph.nodes if node.op == "call_function"} == {"aten"}


@pytest.mark.skipif("cpu" in native.missing, reason=native.missing.get("cpu", ""))
@pytest.mark.parametrize("instructions", native.instruction_sets() if "cpu" not in native.missing else [])
def test_every_instruction_set(instructions: str) -> None:
    """In a process of its own, since the choice is the process's."""
    script = "import test_block as t; [t.compare(n, d) for n in t.FUNCTIONS for d in t.TYPES]"
    environment = {**os.environ, native.FORCE: instructions, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", script], env=environment, check=True)


def compare(name: str, dtype: torch.dtype) -> None:
    test_errors_are_those_of_the_composition("native", name, dtype, 48)


@pytest.mark.skipif("cpu" in native.missing, reason=native.missing.get("cpu", ""))
def test_sums_do_not_depend_on_the_number_of_threads() -> None:
    before = torch.get_num_threads()
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        types = {
            name: torch.bfloat16 if name == "norm alone" else torch.float32 for name in FUNCTIONS
        }  # what is native
        found.append([results(FUNCTIONS[name][0], arguments(name, 48, dtype)) for name, dtype in types.items()])
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for one, two in zip(*found, strict=True) for a, b in zip(one, two, strict=True))


@pytest.mark.skipif("cpu" in native.missing, reason=native.missing.get("cpu", ""))
def test_what_does_not_fit_is_refused() -> None:
    operators = torch.ops.swinv2_scale
    with pytest.raises(RuntimeError, match="multiple of 16"):
        operators.sum_rows(torch.randn(4, 24))
    with pytest.raises(RuntimeError, match="weight has 32 elements, not 16"):
        operators.residual_norm_forward(*[torch.randn(4, 16)] * 2, *[torch.randn(32)] * 2, None, None, 1e-5)
    with pytest.raises(RuntimeError, match="keep has 3 elements, not 4"):
        operators.residual_norm_forward(*[torch.randn(4, 16)] * 2, *[torch.randn(16)] * 2, torch.ones(3), None, 1e-5)
    x, y = torch.randn(3, 2, 16), torch.randn(2, 2, 16)
    with pytest.raises(RuntimeError, match="x has 96 elements, not 64"):
        operators.residual_norm_forward(x, y, *[torch.randn(16)] * 2, None, None, 1e-5)
    with pytest.raises(RuntimeError, match="images has 2 elements, not 3"):
        operators.residual_norm_forward(x, y, *[torch.randn(16)] * 2, None, ORDER[:2], 1e-5)
    for wrong in ([0, 1, 3], [0, -1, 2], [2, 0, 2]):
        with pytest.raises(
            RuntimeError, match=f"images must have each of 0 to 2 once, got {wrong[-1] if wrong[1] > -1 else -1}"
        ):
            operators.add_images(x, y, torch.tensor(wrong))
    with pytest.raises(RuntimeError, match="y must have some of the images of x"):
        operators.add_images(x, y[:, :1].contiguous(), ORDER)
    with pytest.raises(RuntimeError, match="y must have some of the images of grad_out"):
        operators.residual_norm_backward(x, torch.randn(4, 2, 16), torch.randn(16), None, ORDER, torch.randn(8, 2))
    assert operators.sum_rows(torch.randn(0, 16)).tolist() == [0.0] * 16


def test_norms_whose_weights_are_of_16_bits_take_drop_path() -> None:
    """Outside of the engine, which keeps them in float32."""
    x, y = (torch.randn(2, 3, 16, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    weight, bias = (torch.ones(16, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    keep = torch.tensor([0.0, 1.25])
    block.residual_post_norm(x, y, weight, bias, keep).float().sum().backward()
    assert y.grad is not None and y.grad[0].abs().max() == 0 and bias.grad is not None
    assert bias.grad[0] == 3 * 1.25
