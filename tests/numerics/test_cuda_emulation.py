"""The CUDA kernels without a GPU: the same source runs on the host, thread by thread, through kernels/emulation.

The budget: error against float64 at most twice that of the reference in the same type, three times for gradients.
"""

import ctypes
import math
import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch
from test_operator import AXES, draw, half, naive, run
from torch import Tensor

from swinv2_scale.ops import cosine_window_attention

KERNELS = Path(__file__).parents[2] / "kernels"
SOURCE = KERNELS / "cosine_window_attention_cuda.cu"
TYPES = [torch.float32, torch.bfloat16, torch.float16]  # in the order of the kernels' enumeration
NAMES = ("out", "qkv", "logit_scale", "bias_table")
FACTORS = (2.0, 3.0, 3.0, 3.0)
FLOAT32 = torch.finfo(torch.float32).eps
TURING, AMPERE = 64 * 1024, 99 * 1024  # bytes of shared memory of one block: the smallest ones
COMPILER = shutil.which(os.environ.get("CXX", "g++"))

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler (g++) found")


@dataclass
class Emulation:
    library: ctypes.CDLL
    seed: int = 0
    shared_memory: int = AMPERE

    def __call__(
        self, qkv: Tensor, logit_scale: Tensor, bias_table: Tensor, grad_out: Tensor, **arguments
    ) -> list[Tensor]:
        """The output and the gradients, from tensors that are NaN wherever the kernels write nothing."""
        batch, *grid, _, heads, width = qkv.shape
        window, shift, mask_value = (arguments.get(k, -100.0) for k in ("window", "shift", "mask_value"))
        fill = 3 - len(grid)  # a plane is a volume of depth 1
        lifted = [*[1] * fill, *grid, *[1] * fill, *window, *[0] * fill, *shift]
        sizes = (ctypes.c_int64 * 12)(batch, *lifted, heads, width)
        common = sizes, ctypes.c_float(mask_value), TYPES.index(qkv.dtype)
        out = torch.full((batch, *grid, heads * width), math.nan, dtype=qkv.dtype)
        lse = torch.full((batch, *grid, heads), math.nan)
        grads = [torch.full_like(x, math.nan) for x in (qkv, logit_scale, bias_table)]
        library = self.library
        library.emulation_scratch.restype = ctypes.c_int64
        scratch = torch.full((library.emulation_scratch(sizes),), math.nan)
        library.emulation_configure(ctypes.c_uint64(self.seed), 1, self.shared_memory, 1)
        self._call(library.emulation_forward, *common, qkv, logit_scale, bias_table, out, lse)
        inputs = grad_out, qkv, logit_scale, bias_table, out, lse
        self._call(library.emulation_backward, *common, *inputs, *grads, scratch)
        return [out, *grads]

    def _call(self, function, *arguments) -> None:
        assert all(x.is_contiguous() for x in arguments if isinstance(x, Tensor))
        if function(*(ctypes.c_void_p(x.data_ptr()) if isinstance(x, Tensor) else x for x in arguments)):
            self.library.emulation_error.restype = ctypes.c_char_p
            raise RuntimeError(self.library.emulation_error().decode())


def compile_library(folder: Path, source: Path = SOURCE, *options: str) -> Emulation:
    library = folder / "libemulation.so"
    command = [COMPILER, "-std=c++17", "-O2", "-shared", "-fPIC", "-Wno-unknown-pragmas", f"-I{KERNELS}", *options]
    command += ["-DCOSINE_WINDOW_ATTENTION_EMULATE", f'-DKERNELS="{source}"', str(KERNELS / "emulation/emulation.cpp")]
    subprocess.run([*command, "-o", str(library), "-lpthread"], check=True)
    return Emulation(ctypes.CDLL(str(library)))


@pytest.fixture(scope="session")
def emulation(tmp_path_factory: pytest.TempPathFactory) -> Emulation:
    return compile_library(tmp_path_factory.mktemp("emulation"))


def inputs_of(grid, window, dtype, *, batch=1, heads=1, width=8, scale=None, seed=0) -> tuple[list[Tensor], Tensor]:
    """qkv, scale and table, and a gradient of the output."""
    generator = torch.Generator().manual_seed(seed)
    tensors = [x.detach() for x in draw(grid, window, batch, dtype, heads=heads, width=width)]
    if seed:
        tensors[0] = torch.randn(tensors[0].shape, generator=generator, dtype=torch.float64).to(dtype)
    if scale is not None:
        tensors[1] = torch.full_like(tensors[1], scale)
    weight = torch.randn((batch, *grid, heads * width), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return tensors, weight.to(dtype)  # the weighting of test_operator.run


def reference(tensors: list[Tensor], **arguments) -> list[Tensor]:
    return run(cosine_window_attention, tensors, **arguments, implementation="reference")


def excess(
    emulation: Callable, tensors: list[Tensor], weight: Tensor, *, truth: Callable = naive, **arguments
) -> dict[str, float]:
    """Error of each result against `truth` in float64, in units of what the budget allows; above 1 fails."""
    exact = run(truth, [x.double() for x in tensors], **arguments)
    plain = reference(tensors, **arguments)
    ours = emulation(*tensors, weight, **arguments)
    unit, scale = torch.finfo(tensors[0].dtype).eps, float(tensors[1].clamp(max=4.6).exp().max())
    ratios = {}
    for name, factor, a, b, c in zip(NAMES, FACTORS, ours, plain, exact, strict=True):
        assert a.shape == c.shape, name
        # What is almost zero has rounding errors of its terms: a window of one token has no gradients but that of v.
        floor = {
            "out": 0.02 * scale * c.numel() ** 0.5,
            "qkv": 0.08 * scale * c.numel() ** 0.5,
            "logit_scale": (scale * weight.numel()) ** 0.5,  # few numbers, and plain PyTorch's may be right by chance
            "bias_table": weight.numel() ** 0.5,
        }[name]
        # The log-sum-exp is kept in float32: half a unit in its last place is an error of a row's probabilities.
        kept = 0.0 if name == "out" else 0.25 * (16 + scale) * FLOAT32 * float(c.norm())
        error = float((a.double() - c).norm())
        allowed = factor * max(float((b.double() - c).norm()), unit * floor, kept)
        ratios[name] = error / allowed if math.isfinite(error) else math.inf
    return ratios


def assert_within_budget(emulation: Callable, tensors: list[Tensor], weight: Tensor, **arguments) -> None:
    ratios = excess(emulation, tensors, weight, **arguments)
    assert max(ratios.values()) <= 1, ratios


CASES = [  # grid, window, shifted, batch, heads, head width, mask value
    ((3, 5), (1, 1), False, 3, 2, 8, -100.0),
    ((6, 7), (2, 2), True, 3, 2, 8, -100.0),
    ((9, 7), (3, 3), True, 1, 3, 16, -math.inf),
    ((10, 8), (5, 5), True, 1, 2, 24, -100.0),
    ((14, 14), (7, 7), True, 1, 3, 32, -100.0),
    ((14, 14), (7, 7), False, 1, 1, 32, -100.0),
    ((16, 11), (8, 8), True, 3, 2, 32, -math.inf),
    ((13, 25), (12, 12), True, 1, 2, 40, -100.0),
    ((16, 16), (16, 16), False, 1, 2, 32, -100.0),
    ((17, 16), (16, 16), True, 1, 1, 64, -100.0),
    ((12, 20), (7, 9), True, 1, 2, 128, -math.inf),
    ((3, 17), (1, 8), True, 3, 2, 32, -100.0),
    ((3, 4), (8, 8), False, 1, 2, 16, -100.0),
    ((3, 9, 8), (2, 7, 7), True, 1, 2, 32, -100.0),
    ((24, 24), (24, 24), True, 1, 1, 32, -100.0),
]
LARGE = [
    ((33, 32), (32, 32), True, 1, 1, 32, -100.0),
    ((48, 48), (48, 48), True, 1, 1, 32, -100.0),
    ((64, 64), (64, 64), False, 1, 1, 32, -100.0),
    ((8, 16, 16), (8, 16, 16), True, 1, 1, 32, -100.0),
    ((9, 17, 16), (8, 16, 16), True, 1, 1, 32, -math.inf),
    ((8, 24, 24), (8, 24, 24), True, 1, 1, 32, -100.0),
]
SHIFTS = [  # grid, window, shift; the last ones cross the borders of tiles
    *(((4, 5, 7), (3, 2, 4), shift) for shift in AXES),
    *(((4, 7, 8), (3, 5, 6), shift) for shift in [(0, 2, 3), (1, 0, 0)]),
]


def check_case(emulation, dtype, grid, window, shifted, batch, heads, width, mask_value) -> None:
    arguments = {"window": window, "shift": half(window, shifted), "mask_value": mask_value}
    assert_within_budget(emulation, *inputs_of(grid, window, dtype, batch=batch, heads=heads, width=width), **arguments)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_error_budget(emulation, case, dtype) -> None:
    check_case(emulation, dtype, *case)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize(("grid", "window", "shift"), SHIFTS, ids=str)
def test_axes_of_a_clip_are_shifted_apart(emulation, grid, window, shift, dtype) -> None:
    tensors, weight = inputs_of(grid, window, dtype, heads=2)
    for mask_value in (-100.0, -math.inf):
        assert_within_budget(emulation, tensors, weight, window=window, shift=shift, mask_value=mask_value)


@pytest.mark.long
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("case", LARGE, ids=str)
def test_error_budget_of_large_windows(emulation, case, dtype) -> None:
    check_case(emulation, dtype, *case)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("scale", [0.0, 4.6, 6.0], ids=["one", "hundred", "clamped"])
def test_scales(emulation, scale, dtype) -> None:
    grid, window = (8, 15), (7, 7)
    tensors, weight = inputs_of(grid, window, dtype, heads=2, width=32, scale=scale)
    assert_within_budget(emulation, tensors, weight, window=window, shift=(3, 3))
    if scale > 5:
        assert not emulation(*tensors, weight, window=window, shift=(3, 3))[2].any()


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("share", [0.3, 1.0])
def test_zero_tokens(emulation, share, dtype) -> None:
    grid, window = (9, 10), (7, 9)
    tensors, weight = inputs_of(grid, window, dtype, batch=2, heads=2, width=16)
    zero = torch.rand(tensors[0].shape[:3], generator=torch.Generator().manual_seed(0)) < share
    tensors[0] = tensors[0].masked_fill(zero[..., None, None, None], 0.0)
    convention = partial(cosine_window_attention, implementation="reference")  # of a direction of nothing
    assert_within_budget(emulation, tensors, weight, truth=convention, window=window, shift=(3, 4))


def test_nan_scale_gives_nan(emulation) -> None:
    tensors, weight = inputs_of((7, 7), (7, 7), torch.bfloat16, heads=2)
    tensors[1][0] = math.nan
    out = emulation(*tensors, weight, window=(7, 7), shift=(0, 0))[0]
    assert out[..., :8].isnan().all()
    assert out[..., 8:].isfinite().all()


@pytest.mark.parametrize("dtype", TYPES[:2], ids=str)
@pytest.mark.parametrize(("grid", "window"), [((13, 12), (12, 12)), ((3, 9, 8), (2, 7, 7))], ids=str)
def test_any_order_of_threads_gives_the_same_bits(emulation, grid, window, dtype) -> None:
    tensors, weight = inputs_of(grid, window, dtype, heads=2, width=32)
    arguments = {"window": window, "shift": half(window, True)}
    expected = emulation(*tensors, weight, **arguments)
    for seed in (1, 2, 3):
        actual = Emulation(emulation.library, seed)(*tensors, weight, **arguments)
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_tables_in_global_memory_give_the_same_bits(emulation) -> None:
    """A window of 2x60x8: tiles and two tables fit into 99 KB, not into 64 KB."""
    grid, window = (2, 60, 8), (2, 60, 8)
    tensors, weight = inputs_of(grid, window, torch.bfloat16, width=64)
    arguments = {"window": window, "shift": half(window, True)}
    expected = emulation(*tensors, weight, **arguments)
    actual = Emulation(emulation.library, 0, TURING)(*tensors, weight, **arguments)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    assert all(x.isfinite().all() for x in actual)


def test_many_windows_share_one_partial_table(emulation) -> None:
    """More parts of the map than blocks, so that a block takes several: 2116 windows for 2048 blocks."""
    tensors, weight = inputs_of((46, 92), (1, 2), torch.float32, heads=1, width=8)
    assert_within_budget(emulation, tensors, weight, window=(1, 2), shift=(0, 1))


def check_program(folder: Path, *options: str, source: str = "check.cpp") -> Path | None:
    """A program in which each tensor and each shared array is one allocation. None if the compiler lacks an option."""
    program = folder / "check"
    command = [COMPILER, "-std=c++17", "-O1", "-g", "-Wno-unknown-pragmas", "-DCOSINE_WINDOW_ATTENTION_EMULATE"]
    command += [str(KERNELS / "emulation" / source), "-o", str(program), "-lpthread"]
    if subprocess.run([*command, *options], capture_output=True, check=False).returncode:
        plain = subprocess.run(command, capture_output=True, text=True, check=False)
        assert plain.returncode == 0, plain.stderr
        return None
    return program


@pytest.mark.long
def test_memory_bounds(tmp_path) -> None:
    program = check_program(tmp_path, "-fsanitize=address")
    if program is None:
        pytest.skip("the compiler has no AddressSanitizer")
    result = subprocess.run([program], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr[:4000]


@pytest.mark.long  # a minute of valgrind
@pytest.mark.skipif(shutil.which("valgrind") is None, reason="valgrind is not installed")
def test_no_result_depends_on_memory_that_was_not_written(tmp_path) -> None:
    program = check_program(tmp_path)
    command = ["valgrind", "-q", "--error-exitcode=9", str(program)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr[:4000]


# -- tests of the tests: each change must be noticed -------------------------------------------------------------------

MUTATIONS = {  # name: (what is there, what replaces it, in how many places); a comment in [] marks the line
    "queries landed": ("__syncthreads();  // [barrier: queries landed]\n", "\n", 1),
    "query tile landed": ("__syncthreads();  // [barrier: queries landed] and", "//", 1),
    "keys landed": ("__syncthreads();  // [barrier: keys landed]", "//", 2),
    "keys normalised": ("__syncthreads();  // [barrier: keys normalised]", "", 2),
    "queries normalised": ("__syncthreads();  // [barrier: queries normalised]", "", 1),
    "rows landed": ("__syncthreads();  // [barrier: rows landed]", "", 2),
    "gradient tile": ("__syncthreads();  // [barrier: gradient tile]", "", 1),
    "next part": ("__syncthreads();  // [barrier: next part]", "//", 1),
    "sums": ("__syncthreads();  // [barrier: sums]", "", 1),
    "reduce": ("__syncthreads();  // [barrier: reduce]", "", 1),
    "copies": ("gpu::wait_for_copies();  // [wait]", "", 1),
    "row count": ("rest < tile_rows ? rest : tile_rows};  // [row count]", "tile_rows};", 1),
    "absent keys": ("if (key_region == ABSENT) return -INFINITE;  // [absent]", "", 1),
    "matrix rows": (
        "lane / 16 * 8 + lane % 8) * stride + lane / 8 % 2 * 8;",
        "lane % 16) * stride + lane / 16 * 8;",
        1,
    ),
    "fragment": ("(p[k + 1][0], p[k + 1][1])", "(p[k + 1][2], p[k + 1][3])", 1),
    "correction": ("sum[n][2 * half] *= correction;  // [correction]", "", 1),
    "offset sign": ("bias[query_code - key_code]", "bias[key_code - query_code]", 1),
    "neighbour's entry": ("table[offset] += sum;", "table[offset + (offset < last)] += sum;", 1),
}


@pytest.fixture
def narrow_source(tmp_path) -> str:
    """The kernels for width 32 of float32 and bfloat16 only, which compile in a fraction of the time.

    Two blocks per head add to the gradient of the table, so that a small map has several parts for each.
    """
    source = SOURCE.read_text()
    for line, replacement in {
        "  if (width <= 32) return": "  if constexpr (std::is_same_v<T, gpu::float16>) return {};\n  else return",
        "  if (width <= 64) return {&Launcher<T, 64>::forward, &Launcher<T, 64>::backward};\n": "",
        "  return {&Launcher<T, 128>::forward, &Launcher<T, 128>::backward};\n": "",
    }.items():
        assert source.count(line) == 1, line
        source = source.replace(line, replacement)
    header = SOURCE.with_suffix(".h")
    blocks = "(2048 + p.heads - 1) / p.heads"
    assert header.read_text().count(blocks) == 1
    (tmp_path / header.name).write_text(header.read_text().replace(blocks, "2"))
    return source


def noticed(emulation: Emulation) -> bool:
    """Whether any check fails: an error of the emulation, bits that depend on the order of threads, or the budget."""
    cases = [  # a mask that leaves a trace; several parts for each block
        (torch.bfloat16, (13, 12), (12, 12), -1.0),
        (torch.bfloat16, (18, 18), (9, 9), -100.0),
    ]
    for dtype, grid, window, mask_value in cases:
        tensors, weight = inputs_of(grid, window, dtype, width=32)
        arguments = {"window": window, "shift": half(window, True), "mask_value": mask_value}
        try:
            if max(excess(emulation, tensors, weight, **arguments).values()) > 1:
                return True
            first, second = (Emulation(emulation.library, seed)(*tensors, weight, **arguments) for seed in (1, 2))
        except RuntimeError:
            return True
        if not all(torch.equal(a, b) for a, b in zip(first, second, strict=True)):
            return True
    return False


@pytest.mark.parametrize("name", [None, *MUTATIONS])
def test_a_mistake_is_noticed(name, narrow_source, tmp_path) -> None:
    source = narrow_source
    if name is not None:
        old, new, places = MUTATIONS[name]
        assert source.count(old) == places
        source = source.replace(old, new)
    copy = tmp_path / "mutant.cu"
    copy.write_text(source)
    assert noticed(compile_library(tmp_path, copy, "-O1")) == (name is not None)
