"""The CPU kernel against the reference in float64, with an error budget: twice the error of plain PyTorch in the same
type for values, three times for gradients. Shapes cross every tile boundary, on every instruction set that is here."""

import importlib
import itertools
import logging
import math
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import pytest
import torch
from golden import relative_error
from test_operator import AXES, draw, naive, run
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from swinv2_scale.ops import cosine_window_attention, native, selfcheck
from swinv2_scale.ops.selfcheck import Case

module = importlib.import_module("swinv2_scale.ops.cosine_window_attention")  # the package exports the function
pytestmark = pytest.mark.skipif("cpu" in native.missing, reason=native.missing.get("cpu", ""))

CPU = torch.device("cpu")
LARGE = [*selfcheck.LARGE, ((64, 64), (64, 64), (65, 30))]
LESS_LARGE = [layout for layout in LARGE if math.prod(layout[0]) <= 4096]  # what takes seconds


@pytest.fixture(scope="module")
def sets() -> list[str]:
    return native.instruction_sets()


@pytest.fixture
def single_thread():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def check(cases: Iterable[Case], sets: Sequence[str], monkeypatch) -> None:
    for case, dtype in itertools.product(cases, native.TYPES):
        draws = selfcheck.draws_of(case, dtype, CPU)
        for name in sets:
            monkeypatch.setenv(native.FORCE, name)
            failed = [str(check) for check in selfcheck.compare(case, draws) if not check.passed]
            assert not failed, (name, failed)


@pytest.mark.parametrize("layout", selfcheck.LAYOUTS, ids=lambda x: "x".join(map(str, x[0])))
def test_error_budget(layout, sets, monkeypatch) -> None:
    check(selfcheck.variants(*layout), sets, monkeypatch)


@pytest.mark.parametrize("layout", LESS_LARGE, ids=lambda x: "x".join(map(str, x[0])))
def test_error_budget_of_large_windows(layout, sets, monkeypatch) -> None:
    """The best instruction set; the last is the one that is used by default."""
    check(selfcheck.large_variants(*layout), sets[-1:], monkeypatch)


@pytest.mark.long
@pytest.mark.parametrize("layout", LARGE, ids=lambda x: "x".join(map(str, x[0])))
def test_error_budget_of_large_windows_everywhere(layout, sets, monkeypatch) -> None:
    window, *grids = layout
    for grid, mask_value, scale in itertools.product(grids, (-100.0, -math.inf), (0.0, 4.7)):
        case = Case(window, grid, batch=2, heads=2, mask_value=mask_value, scales=(scale, scale), zeros=0.1)
        check([case], sets, monkeypatch)


def test_head_widths(sets, monkeypatch) -> None:
    check(selfcheck.widths(), sets, monkeypatch)


@pytest.mark.parametrize("dtype", native.TYPES, ids=str)
@pytest.mark.parametrize(("side", "windows"), [(8, 1100), (16, 550)])
def test_many_windows_are_as_few(side: int, windows: int, dtype: torch.dtype, sets, monkeypatch) -> None:
    """A task takes as many windows at a time as fit its scratch memory; only large batches have so many for it."""
    torch.manual_seed(0)
    qkv = torch.randn(windows, side, side, 3, 1, 32, dtype=dtype)
    scale, table = torch.zeros(1), torch.randn(1, 2 * side - 1, 2 * side - 1)

    def both(x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.clone().requires_grad_()
        out = cosine_window_attention(x, scale, table, window=(side, side), shift=(0, 0), implementation="kernel")
        return out.detach(), *torch.autograd.grad(out, x, out.detach())

    for name in {*sets[:1], *sets[-1:]}:
        monkeypatch.setenv(native.FORCE, name)
        parts = [both(part) for part in qkv.split(50)]
        for whole, of_parts in zip(both(qkv), zip(*parts, strict=True), strict=True):
            assert torch.equal(whole, torch.cat(of_parts)), name


@pytest.mark.parametrize("dtype", [*native.TYPES, torch.float64], ids=str)
def test_all_zero_tokens(dtype, sets, monkeypatch) -> None:
    qkv, *rest = draw((5, 6), (3, 4), batch=2, dtype=dtype)
    for name in sets:
        monkeypatch.setenv(native.FORCE, name)
        results = [
            run(
                cosine_window_attention,
                [torch.zeros_like(qkv), *rest],
                window=(3, 4),
                shift=(1, 2),
                implementation=which,
            )
            for which in ("cpu", "reference")
        ]
        for ours, theirs in zip(*results, strict=True):
            assert ours.isfinite().all()
            assert (ours - theirs).norm() <= 1e-2 * theirs.norm() + 1e-5


def test_float64_is_exact(sets, monkeypatch) -> None:
    inputs = draw((9, 10), (5, 7), batch=2)
    arguments = {"window": (5, 7), "shift": (2, 3)}
    expected = run(cosine_window_attention, inputs, **arguments, implementation="reference")
    for name in sets:
        monkeypatch.setenv(native.FORCE, name)
        for ours, theirs in zip(
            run(cosine_window_attention, inputs, **arguments, implementation="cpu"), expected, strict=True
        ):
            assert (ours - theirs).norm() <= 1e-12 * theirs.norm()


@pytest.mark.parametrize("mask_value", [-100.0, -math.inf])
@pytest.mark.parametrize("shift", AXES, ids=str)
def test_axes_of_a_clip_are_shifted_apart(shift, mask_value, sets, monkeypatch) -> None:
    inputs = draw((4, 5, 7), (3, 2, 4), batch=2)
    arguments = {"window": (3, 2, 4), "shift": shift, "mask_value": mask_value}
    expected = run(naive, inputs, **arguments)
    for name, dtype in itertools.product(sets, [torch.float64, *native.TYPES]):
        monkeypatch.setenv(native.FORCE, name)
        qkv, *rest = (x.detach().to(dtype) if number == 0 else x.detach() for number, x in enumerate(inputs))
        rest = [x.to(torch.promote_types(dtype, torch.float32)) for x in rest]
        plain, ours = (
            run(cosine_window_attention, [qkv, *rest], **arguments, implementation=which)
            for which in ("reference", "cpu")
        )
        allowed = [relative_error(one.double(), exact) for one, exact in zip(plain, expected, strict=True)]
        allowed[2] = max(allowed[1:])  # a scale's gradient is one sum that cancels: its own error is luck
        floor = 1e-12 if dtype == torch.float64 else 4 * torch.finfo(dtype).eps + selfcheck.FLOOR
        for other, exact, error in zip(ours, expected, allowed, strict=True):
            assert relative_error(other.double(), exact) < 3 * error + floor, (name, dtype)


@pytest.mark.parametrize(("grid", "window", "shift"), [((3, 4), (2, 3), (1, 1)), ((1, 2, 3), (1, 2, 2), (0, 1, 1))])
def test_gradcheck(grid, window, shift) -> None:
    inputs = draw(grid, window, heads=2)
    arguments = {"window": window, "shift": shift, "implementation": "cpu"}
    assert torch.autograd.gradcheck(lambda *x: cosine_window_attention(*x, **arguments), inputs, fast_mode=True)


@pytest.mark.parametrize("dtype", native.TYPES, ids=str)
def test_opcheck(dtype) -> None:
    inputs = draw((9, 7), (4, 4), batch=2, dtype=dtype)
    forward = torch.ops.swinv2_scale.cosine_window_attention_forward
    geometry = ([4, 4], [2, 2], -100.0)
    torch.library.opcheck(forward, (*inputs, *geometry))
    with torch.no_grad():
        out, lse = forward(*inputs, *geometry)
        backward = torch.ops.swinv2_scale.cosine_window_attention_backward
        torch.library.opcheck(backward, (torch.ones_like(out), *inputs, out, lse, *geometry))


def test_log_sum_exp() -> None:
    qkv, logit_scale, table = (x.detach() for x in draw((4, 3), (4, 3), dtype=torch.float32))
    _, lse = torch.ops.swinv2_scale.cosine_window_attention_forward(qkv, logit_scale, table, [4, 3], [0, 0], -100.0)
    q, k, _ = torch.nn.functional.normalize(qkv.double(), dim=-1).reshape(12, 3, 3, 8).permute(1, 2, 0, 3)
    index = importlib.import_module("swinv2_scale.ops.windows").relative_index((4, 3), qkv.device)
    logits = q @ k.mT * logit_scale.double().clamp(max=module.MAX_LOGIT_SCALE).exp()[:, None, None]
    expected = (logits + table.flatten(1)[:, index]).logsumexp(-1).T.reshape(1, 4, 3, 3)
    assert (lse - expected).abs().max() < 2e-5


@pytest.mark.parametrize("dtype", native.TYPES, ids=str)
def test_runs_are_equal_whatever_the_threads(dtype, sets, monkeypatch, single_thread) -> None:
    inputs = draw((19, 17), (5, 7), batch=3, dtype=dtype)
    for name in sets:
        monkeypatch.setenv(native.FORCE, name)
        runs = []
        for threads in (1, 1, 2, 3):
            torch.set_num_threads(threads)
            runs.append(run(cosine_window_attention, inputs, window=(5, 7), shift=(2, 3), implementation="cpu"))
        for other in runs[1:]:
            assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


def test_checkpointing_changes_nothing() -> None:
    def attention(*inputs: Tensor) -> Tensor:
        return cosine_window_attention(*inputs, window=(4, 4), shift=(2, 2), implementation="cpu")

    inputs = draw((9, 11), (4, 4), dtype=torch.bfloat16)
    again = run(lambda *x: checkpoint(attention, *x, use_reentrant=False), inputs)
    assert all(torch.equal(a, b) for a, b in zip(run(attention, inputs), again, strict=True))


def test_strided_inputs() -> None:
    inputs = draw((6, 6), (3, 3), batch=2, dtype=torch.float32)
    arguments = {"window": (3, 3), "shift": (1, 1), "implementation": "cpu"}
    strided = inputs[0].detach().transpose(0, 1).contiguous().transpose(0, 1)
    table = inputs[2].detach().transpose(1, 2).contiguous().transpose(1, 2)
    expected = run(cosine_window_attention, inputs, **arguments)
    actual = run(cosine_window_attention, [strided, inputs[1], table], **arguments)
    assert all(torch.equal(a, b) for a, b in zip(expected, actual, strict=True))


def test_empty_batch() -> None:
    inputs = draw((6, 6), (3, 3), batch=0, dtype=torch.float32)
    out, *gradients = run(cosine_window_attention, inputs, window=(3, 3), shift=(1, 1), implementation="cpu")
    assert out.shape == (0, 6, 6, 24) and all((x == 0).all() for x in gradients)


def test_a_scale_that_is_not_a_number_passes_through(sets, monkeypatch) -> None:
    qkv, logit_scale, table = (x.detach().clone() for x in draw((6, 6), (3, 3), dtype=torch.float32))
    logit_scale[1] = math.nan
    for name in sets:
        monkeypatch.setenv(native.FORCE, name)
        out = cosine_window_attention(qkv, logit_scale, table, window=(3, 3), shift=(1, 1), implementation="cpu")
        head = out.unflatten(-1, (3, 8))
        assert head[..., 1, :].isnan().all() and head[..., [0, 2], :].isfinite().all()


def test_autocast_takes_qkv_only() -> None:
    inputs = draw((6, 6), (3, 3), dtype=torch.float32)
    low = [inputs[0].detach().bfloat16(), *inputs[1:]]
    arguments = {"window": (3, 3), "shift": (1, 1), "implementation": "cpu"}
    expected = run(cosine_window_attention, low, **arguments)
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    with torch.autocast("cpu", torch.bfloat16):
        out = cosine_window_attention(*leaves, **arguments)
    assert torch.equal(out, expected[0])
    out.sum().backward()
    assert [x.grad.dtype for x in leaves] == [torch.float32] * 3


def test_compiles_whole_and_once_for_all_sizes() -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def attention(*inputs: Tensor) -> Tensor:
        return cosine_window_attention(*inputs, window=(4, 4), shift=(2, 2))

    compiled = torch.compile(attention, fullgraph=True, backend=counter)
    for grid in ((8, 8), (13, 12), (16, 20)):
        inputs = draw(grid, (4, 4), dtype=torch.float32)
        assert all(torch.equal(a, b) for a, b in zip(run(compiled, inputs), run(attention, inputs), strict=True))
    assert counter.frame_count <= 2


MEMORY = """
import sys, torch
from pathlib import Path
from swinv2_scale.ops import cosine_window_attention
side, window = int(sys.argv[1]), (48, 48)
def kilobytes(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name))
def work(side):
    qkv = torch.randn(1, side, side, 3, 3, 32).bfloat16().requires_grad_()
    scale, table = torch.ones(3, requires_grad=True), torch.rand(3, 95, 95, requires_grad=True)
    before = kilobytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts here
    out = cosine_window_attention(qkv, scale, table, window=window, shift=(24, 24), implementation="cpu")
    out.backward(out.detach())
    return (kilobytes("VmHWM") - before) * 1024 / qkv.nbytes
work(48)
print(work(side))
"""


def added_memory(side: int) -> float:
    """Peak of forward and backward beyond the inputs, in sizes of qkv."""
    environment = {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "2"}
    command = [sys.executable, "-c", MEMORY, str(side)]
    return float(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)


def test_memory_is_of_the_order_of_the_tokens() -> None:
    assert added_memory(240) < 4  # one matrix of logits alone would be 10 per head and map


@pytest.mark.long
def test_memory_of_a_large_map() -> None:
    assert added_memory(384) < 4


# -- what is chosen ----------------------------------------------------------------------------------------------------


def chosen(caplog, monkeypatch, inputs, **changes) -> str:
    monkeypatch.setattr(module, "_said", set())
    with caplog.at_level(logging.INFO):
        caplog.clear()
        for _ in range(2):
            cosine_window_attention(*inputs, **{"window": (3, 3), "shift": (1, 1), **changes})
    (message,) = caplog.messages
    return message


def test_auto_says_once_what_it_chose(caplog, monkeypatch) -> None:
    shape = (6, 6), (3, 3)
    assert "cpu kernel" in chosen(caplog, monkeypatch, draw(*shape, dtype=torch.float32))
    assert "float64" in chosen(caplog, monkeypatch, draw(*shape))
    assert "head width 12" in chosen(caplog, monkeypatch, draw(*shape, dtype=torch.float32, width=12))
    wide = draw((2, 65), (1, 65), dtype=torch.float32)
    assert "window (1, 65)" in chosen(caplog, monkeypatch, wide, window=(1, 65), shift=(0, 0))
    monkeypatch.setitem(native.missing, "cpu", "it is not built")
    assert "reference on cpu: it is not built" in chosen(caplog, monkeypatch, draw(*shape, dtype=torch.float32))


def test_a_kernel_by_name_that_does_not_apply_is_an_error(monkeypatch) -> None:
    def call(inputs, implementation: str) -> None:
        cosine_window_attention(*inputs, window=(3, 3), shift=(1, 1), implementation=implementation)

    inputs = draw((6, 6), (3, 3), dtype=torch.float32)
    with pytest.raises(ValueError, match="'cuda' does not apply: qkv lies on cpu"):
        call(inputs, "cuda")
    with pytest.raises(ValueError, match="head width 12 is not a multiple of 8"):
        call(draw((6, 6), (3, 3), dtype=torch.float32, width=12), "cpu")
    with pytest.raises(ValueError, match=r"must be torch\.float32"):
        call([inputs[0], inputs[1].double(), inputs[2].double()], "cpu")
    monkeypatch.setitem(native.missing, "cpu", "the cpu kernel is not built (run pip install again)")
    with pytest.raises(ValueError, match="run pip install again"):
        call(inputs, "cpu")


def test_the_operators_refuse_what_they_would_misread() -> None:
    """Called by themselves, without the checks of the function."""
    forward = torch.ops.swinv2_scale.cosine_window_attention_forward
    qkv, scale, table = torch.zeros(1, 4, 4, 3, 2, 8), torch.zeros(2), torch.zeros(2, 3, 3)
    assert forward(qkv, scale, table, [2, 2], [1, 0], -100.0)[0].shape == (1, 4, 4, 16)
    for message, arguments in {
        "qkv must be \\(B": (qkv[0], scale, table, [2, 2], [1, 0]),
        "qkv must be contiguous": (qkv.transpose(1, 2), scale, table, [2, 2], [1, 0]),
        "head width": (qkv[..., :4].contiguous(), scale, table, [2, 2], [1, 0]),
        "window must be 1": (qkv, scale, table, [0, 2], [0, 0]),
        "window and shift must have": (qkv, scale, table, [2], [1, 0]),
        "shift must be": (qkv, scale, table, [2, 2], [2, 0]),
        "logit_scale has the wrong type": (qkv, scale.double(), table, [2, 2], [1, 0]),
        "logit_scale has the wrong shape": (qkv, scale[:1], table, [2, 2], [1, 0]),
        "bias_table has the wrong shape": (qkv, scale, table[:, :2].contiguous(), [2, 2], [1, 0]),
    }.items():
        with pytest.raises(RuntimeError, match=message):
            forward(*arguments, -100.0)
