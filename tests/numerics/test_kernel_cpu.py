"""The CPU kernel against the reference in float64, with an error budget: twice the error of plain PyTorch in the same
type for values, three times for gradients. Shapes cross every tile boundary, on every instruction set that is here."""

import importlib
import itertools
import logging
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_operator import draw, half, run
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from swinv2_scale.ops import cosine_window_attention, native

module = importlib.import_module("swinv2_scale.ops.cosine_window_attention")  # the package exports the function
pytestmark = pytest.mark.skipif("cpu" in native.missing, reason=native.missing.get("cpu", ""))

FORCE = "SWINV2_SCALE_INSTRUCTION_SET"
TYPES = (torch.float32, torch.bfloat16, torch.float16)
VALUES, GRADIENTS = 2.0, 3.0  # times the error of plain PyTorch
# What rounding of float32 leaves where plain PyTorch is exact: per element, and relative to the largest scale, 100.
FLOOR = 2e-6

LAYOUTS = [  # window, a grid that it divides, a grid that it does not
    ((1, 1), (4, 5), (3, 1)),
    ((2, 2), (6, 8), (5, 7)),
    ((3, 3), (6, 9), (7, 8)),
    ((5, 5), (10, 5), (11, 8)),
    ((7, 7), (14, 14), (9, 15)),
    ((8, 8), (16, 8), (13, 9)),
    ((12, 12), (12, 24), (13, 20)),
    ((16, 16), (16, 32), (19, 17)),
    ((24, 24), (24, 24), (25, 20)),
    ((7, 9), (14, 9), (10, 11)),
    ((1, 8), (3, 16), (3, 13)),
    ((2, 7, 7), (2, 14, 7), (3, 9, 8)),
]
LARGE = [
    ((32, 32), (32, 32), (33, 40)),
    ((48, 48), (48, 48), (50, 40)),
    ((8, 16, 16), (8, 16, 16), (9, 16, 13)),
    ((64, 64), (64, 64), (65, 30)),
]


def instruction_sets() -> list[str]:
    """All that this processor has, as the kernel's own message lists them."""
    code = (
        "import torch; from swinv2_scale.ops import cosine_window_attention as f\n"
        "f(torch.ones(1, 1, 1, 3, 1, 8), torch.ones(1), torch.ones(1, 1, 1), window=(1, 1), shift=(0, 0),"
        " implementation='cpu')"
    )
    environment = {"PYTHONPATH": str(Path(__file__).parents[2]), FORCE: "none"}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert "but this processor has" in result.stderr, result.stderr
    return result.stderr.split("but this processor has")[1].split("\n")[0].split()


@pytest.fixture(scope="module")
def sets() -> list[str]:
    return instruction_sets()


@pytest.fixture
def single_thread():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def within_budget(draws: list[list[list[Tensor]]], label: object) -> None:
    """Errors of ours and of plain PyTorch against exact results, root mean square over draws."""
    ours, plain, size, count = ([0.0] * 4 for _ in range(4))
    for triple in draws:
        for i, (a, b, c) in enumerate(zip(*triple, strict=True)):
            assert a.dtype == b.dtype and a.shape == c.shape and a.isfinite().all(), label
            ours[i] += (a.double() - c).square().sum().item()
            plain[i] += (b.double() - c).square().sum().item()
            size[i] += c.square().sum().item()
            count[i] += c.numel()
    # A handful of scales, each a sum that cancels, cannot tell accuracy from luck: the table's error counts too.
    plain[2] = max(plain[2], plain[3] * size[2] / max(size[3], 1e-30))
    for i, name in enumerate(("out", "qkv", "logit_scale", "bias_table")):
        floor = FLOOR * (size[i] ** 0.5 + count[i] ** 0.5 * (1 if i == 0 else 100))
        errors = ours[i] ** 0.5, plain[i] ** 0.5
        assert errors[0] <= (GRADIENTS if i else VALUES) * errors[1] + floor, (name, errors, size[i] ** 0.5, label)


def check_layout(window, grid, *, shift, batch, mask_value, scale, zeros, heads, width, sets, monkeypatch) -> None:
    arguments = {"window": window, "shift": shift, "mask_value": mask_value}
    _, scales, table = (x.detach().float() for x in draw(grid, window, heads=heads, width=width))
    if scale is not None:
        scales = torch.full_like(scales, scale)
    shape = (batch, *grid, 3, heads, width)
    for dtype in TYPES:
        draws: dict[str, list[list[list[Tensor]]]] = {name: [] for name in sets}
        for seed in range(4 if math.prod(window) <= 64 else 1):
            generator = torch.Generator().manual_seed(seed)
            zero = torch.rand(*shape[:-3], 1, 1, 1, generator=generator) < zeros
            rounded = [torch.randn(shape, generator=generator).masked_fill(zero, 0.0).to(dtype), scales, table]
            exact = run(cosine_window_attention, [x.double() for x in rounded], **arguments, implementation="reference")
            plain = run(cosine_window_attention, rounded, **arguments, implementation="reference")
            for name in sets:
                monkeypatch.setenv(FORCE, name)
                ours = run(cosine_window_attention, rounded, **arguments, implementation="cpu")
                draws[name].append([ours, plain, exact])
        for name in sets:
            within_budget(draws[name], (name, dtype, grid, arguments))


@pytest.mark.parametrize(("window", "divided", "ragged"), LAYOUTS, ids=lambda x: "x".join(map(str, x)))
def test_error_budget(window, divided, ragged, sets, monkeypatch) -> None:
    both = {"heads": 3, "sets": sets, "monkeypatch": monkeypatch}
    # Heads from about 1 to beyond the clamp, a width that is not a whole vector, flat windows.
    check_layout(
        window, divided, shift=half(window, False), batch=3, mask_value=-100.0, scale=None, zeros=0, width=24, **both
    )
    check_layout(
        window, ragged, shift=half(window, True), batch=1, mask_value=-100.0, scale=0.0, zeros=0.3, width=32, **both
    )
    check_layout(
        window, ragged, shift=half(window, True), batch=2, mask_value=-math.inf, scale=4.7, zeros=0, width=8, **both
    )


@pytest.mark.parametrize(("window", "divided", "ragged"), LARGE, ids=lambda x: "x".join(map(str, x)))
def test_error_budget_of_large_windows(window, divided, ragged, sets, monkeypatch) -> None:
    """One head, the best instruction set; the last of each is the one that is used by default."""
    both = {"heads": 1, "batch": 1, "zeros": 0, "sets": sets[-1:], "monkeypatch": monkeypatch, "width": 32}
    if math.prod(window) <= 1024:
        check_layout(window, ragged, shift=half(window, True), mask_value=-math.inf, scale=2.3, **both)
    check_layout(window, divided, shift=half(window, True), mask_value=-100.0, scale=2.3, **both)


@pytest.mark.long
@pytest.mark.parametrize(("window", "divided", "ragged"), LARGE, ids=lambda x: "x".join(map(str, x)))
def test_error_budget_of_large_windows_everywhere(window, divided, ragged, sets, monkeypatch) -> None:
    for grid, mask_value, scale in itertools.product((divided, ragged), (-100.0, -math.inf), (0.0, 4.7)):
        check_layout(
            window, grid, shift=half(window, True), batch=2, mask_value=mask_value, scale=scale, zeros=0.1, heads=2,
            width=32, sets=sets, monkeypatch=monkeypatch,
        )  # fmt: skip


@pytest.mark.parametrize("width", [16, 40, 64, 96, 128])
def test_head_widths(width, sets, monkeypatch) -> None:
    check_layout(
        (5, 7), (9, 10), shift=(2, 3), batch=1, mask_value=-100.0, scale=2.3, zeros=0, heads=2, width=width, sets=sets,
        monkeypatch=monkeypatch,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [*TYPES, torch.float64], ids=str)
def test_all_zero_tokens(dtype, sets, monkeypatch) -> None:
    qkv, *rest = draw((5, 6), (3, 4), batch=2, dtype=dtype)
    for name in sets:
        monkeypatch.setenv(FORCE, name)
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
        monkeypatch.setenv(FORCE, name)
        for ours, theirs in zip(
            run(cosine_window_attention, inputs, **arguments, implementation="cpu"), expected, strict=True
        ):
            assert (ours - theirs).norm() <= 1e-12 * theirs.norm()


@pytest.mark.parametrize(("grid", "window", "shift"), [((3, 4), (2, 3), (1, 1)), ((1, 2, 3), (1, 2, 2), (0, 1, 1))])
def test_gradcheck(grid, window, shift) -> None:
    inputs = draw(grid, window, heads=2)
    arguments = {"window": window, "shift": shift, "implementation": "cpu"}
    assert torch.autograd.gradcheck(lambda *x: cosine_window_attention(*x, **arguments), inputs, fast_mode=True)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
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


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_runs_are_equal_whatever_the_threads(dtype, sets, monkeypatch, single_thread) -> None:
    inputs = draw((19, 17), (5, 7), batch=3, dtype=dtype)
    for name in sets:
        monkeypatch.setenv(FORCE, name)
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
        monkeypatch.setenv(FORCE, name)
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
