"""A block's CUDA kernels: under emulation on the host, as in test_cuda_emulation.py, and on a GPU where there is one.

The budget is that of the self-check: error against float64 at most twice that of PyTorch's functions in the same type,
three times for gradients.
"""

import ctypes
import math
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from test_cuda_emulation import COMPILER, KERNELS, TYPES, check_program
from torch import Tensor

from swinv2_scale.ops import block, native, selfcheck_block
from swinv2_scale.ops.selfcheck_block import TENSORS, Case

CPU = torch.device("cpu")
GUARD = 1 << 15  # numbers before and behind every tensor
SOURCE = KERNELS / "block_cuda.cu"
emulated = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler (g++) found")


@dataclass
class Emulation:
    """The operators on tensors of the CPU, in the order of `selfcheck_block.native_parts`."""

    library: ctypes.CDLL
    seed: int = 0

    def __call__(
        self,
        x: Tensor,
        y: Tensor,
        weight: Tensor,
        bias: Tensor,
        keep: Tensor | None,
        images: Tensor | None,
        grad: Tensor,
    ) -> list[Tensor]:
        """What `native_parts` returns, from tensors that are NaN wherever the kernels write nothing."""
        channels = y.shape[-1]
        rows, all_rows = y.numel() // channels, x.numel() // channels
        library = self.library
        library.emulation_configure(ctypes.c_uint64(self.seed), 1, 48 * 1024, 1)
        sizes = (ctypes.c_int64 * 4)(rows, channels, all_rows // len(x) if len(x) else 1, all_rows)
        common = sizes, TYPES.index(y.dtype)
        order = None if images is None else (ctypes.c_int64 * len(images))(*images)
        for name in ("emulation_norm_chunks", "emulation_map_chunks"):
            getattr(library, name).restype = ctypes.c_int64
            getattr(library, name).argtypes = [ctypes.c_int64] * (1 if "norm" in name else 2)
        out, grad_y, activated, again = (torch.full_like(like, math.nan) for like in (x, y, y, y))
        added = torch.full_like(x, math.nan)
        statistics, affine = empty(rows, 2), empty(2, channels)
        maps = x, y, weight, bias, keep, order
        self._call("norm_forward", *common, *maps, ctypes.c_float(block.EPS), out, statistics)
        parts = empty(library.emulation_norm_chunks(rows), 2, channels)
        self._call("norm_backward", *common, grad, y, weight, keep, order, statistics, grad_y, parts, affine)
        self._call("add_images", *common, x, y, order, added)
        self._call("gelu_forward", *common, y, activated)
        slope, of_slope, of_y = grad[: len(y)].clone(), empty(channels), empty(channels)
        chunks = library.emulation_map_chunks(rows, channels)
        self._call("gelu_backward", *common, slope, y, again, empty(chunks, channels), of_slope)
        self._call("sum_rows", *common, y, empty(chunks, channels), of_y)
        return [out, grad_y, *affine, added, activated, again, slope, of_slope, of_y]

    def _call(self, name: str, *arguments) -> None:
        """On copies of tensors between guards: who reads those gets NaN, who writes them is found."""
        tensors = [x for x in arguments if isinstance(x, Tensor)]
        buffers = [x.new_full((x.numel() + 2 * GUARD,), math.nan) for x in tensors]
        inner = [
            buffer[GUARD : GUARD + x.numel()].view_as(x).copy_(x) for buffer, x in zip(buffers, tensors, strict=True)
        ]
        pointers = iter(inner)
        given = [ctypes.c_void_p(next(pointers).data_ptr()) if isinstance(x, Tensor) else x for x in arguments]
        if getattr(self.library, f"emulation_{name}")(*given):
            self.library.emulation_error.restype = ctypes.c_char_p
            raise RuntimeError(self.library.emulation_error().decode())
        for tensor, found, buffer in zip(tensors, inner, buffers, strict=True):
            tensor.copy_(found)
            if not (buffer[:GUARD].isnan().all() and buffer[GUARD + tensor.numel() :].isnan().all()):
                raise RuntimeError(f"{name} writes out of bounds")


def empty(*shape: int) -> Tensor:
    return torch.full(shape, math.nan)


def compile_library(folder: Path, source: Path = SOURCE, *options: str) -> Emulation:
    library = folder / "libblock.so"
    command = [COMPILER, "-std=c++17", "-O1", "-shared", "-fPIC", "-Wno-unknown-pragmas", f"-I{KERNELS}", *options]
    command += ["-DCOSINE_WINDOW_ATTENTION_EMULATE", f'-DKERNELS="{source}"']
    subprocess.run(
        [*command, str(KERNELS / "emulation/emulation_block.cpp"), "-o", str(library), "-lpthread"], check=True
    )
    return Emulation(ctypes.CDLL(str(library)))


@pytest.fixture(scope="session")
def emulation(tmp_path_factory: pytest.TempPathFactory) -> Emulation:
    return compile_library(tmp_path_factory.mktemp("block"))


CASES = [  # rows of less than a lane has, of parts of a warp; odd multiples of 16
    *(Case(channels, dropped=channels % 32 == 0) for channels in (16, 96, 112, 352)),
    Case(96, images=1, dropped=False, size=1000.0),
    Case(720, images=1, dropped=False, size=0.0),  # rows that are all equal: zeros
]
MORE = [  # rows of several warps, and of a whole block
    *(Case(channels, images=1, dropped=False) for channels in (48, 128, 192, 384, 1024, 1408, 2048, 2816, 3072, 4096)),
    Case(352, images=40),  # several rows for each thread, and several thread blocks
]


def check_case(emulation: Emulation, case: Case, dtype: torch.dtype) -> None:
    failed = [str(check) for check in selfcheck_block.compare(case, dtype, CPU, emulation) if not check.passed]
    assert not failed


@emulated
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_error_budget(emulation: Emulation, case: Case, dtype: torch.dtype) -> None:
    check_case(emulation, case, dtype)


@emulated
@pytest.mark.long
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("case", MORE, ids=str)
def test_error_budget_of_more(emulation: Emulation, case: Case, dtype: torch.dtype) -> None:
    check_case(emulation, case, dtype)


@emulated
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_the_cpu_kernels_agree(emulation: Emulation, dtype: torch.dtype) -> None:
    if "cpu" in native.missing:
        pytest.skip(native.missing["cpu"])
    tensors = selfcheck_block.draw(Case(352), dtype, CPU)
    for name, ours, other in zip(TENSORS, emulation(*tensors), selfcheck_block.native_parts(*tensors), strict=True):
        off = (ours.double() - other.double()).norm() / other.double().norm()
        rounding = 2**-12 if dtype == torch.bfloat16 else 0.0  # of the CPU's polynomials in GELU, before it sums
        assert off <= 2 * torch.finfo(ours.dtype).eps + rounding, name


@emulated
@pytest.mark.parametrize("dtype", TYPES[:2], ids=str)
@pytest.mark.parametrize("channels", [96, 2816])
def test_any_order_of_threads_gives_the_same_bits(emulation: Emulation, channels: int, dtype: torch.dtype) -> None:
    tensors = selfcheck_block.draw(Case(channels, images=2 if channels == 96 else 1, dropped=False), dtype, CPU)
    expected = emulation(*tensors)
    for seed in (1, 2, 3):
        assert all(map(torch.equal, Emulation(emulation.library, seed)(*tensors), expected))


@emulated
def test_no_rows(emulation: Emulation) -> None:
    tensors = [
        t[:0] if t is not None and t.dim() == 4 else t
        for t in selfcheck_block.draw(Case(48, dropped=False), TYPES[0], CPU)
    ]
    found = emulation(*tensors)
    assert [x.numel() for x in found] == [0, 0, 48, 48, 0, 0, 0, 0, 48, 48]
    assert not any(x.any() for x in found)
    x, _, weight, bias, *_ = selfcheck_block.draw(Case(48, images=2, dropped=False), TYPES[0], CPU)
    assert x is not None and weight is not None and bias is not None
    found = emulation(x, x[:0], weight, bias, weight[:0], torch.arange(2), x)  # the branch of no image
    assert torch.equal(found.pop(4), x) and torch.equal(found.pop(0), x) and not any(other.any() for other in found)


@emulated
def test_gelu_reaches_from_tail_to_tail(emulation: Emulation) -> None:
    """As on the CPU: relative to x, and nothing from the tail's other side."""
    x = torch.linspace(-14, 14, 16 * 4000).view(-1, 16)
    out = empty(*x.shape)
    emulation._call("gelu_forward", (ctypes.c_int64 * 3)(*x.shape, 1), 0, x, out)
    exact = torch.nn.functional.gelu(x.double())
    assert ((out - exact) / x.double()).abs().max() <= 2.5e-7
    x[0, :4] = torch.tensor([math.nan, math.inf, -40.0, 40.0])
    emulation._call("gelu_forward", (ctypes.c_int64 * 3)(*x.shape, 1), 0, x, out)
    assert math.isnan(out[0, 0]) and out[0, 1:4].tolist() == [math.inf, 0.0, 40.0]


@emulated
def test_what_does_not_fit_is_refused(emulation: Emulation) -> None:
    with pytest.raises(RuntimeError, match="at most 4096 channels"):
        emulation(*selfcheck_block.draw(Case(4112, images=1), TYPES[0], CPU))
    emulation.library.emulation_configure(ctypes.c_uint64(0), 1, 48 * 1024, 0)
    x = torch.ones(2, 16, dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match="bfloat16 needs compute capability 8"):
        emulation._call("gelu_forward", (ctypes.c_int64 * 3)(2, 16, 1), 1, x, x)


@emulated
@pytest.mark.long
def test_memory_bounds(tmp_path: Path) -> None:
    program = check_program(tmp_path, "-fsanitize=address", source="check_block.cpp")
    if program is None:
        pytest.skip("the compiler has no AddressSanitizer")
    result = subprocess.run([program], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr[:4000]


@emulated
@pytest.mark.skipif(shutil.which("valgrind") is None, reason="valgrind is not installed")
@pytest.mark.long
def test_no_result_depends_on_memory_that_was_not_written(tmp_path: Path) -> None:
    program = check_program(tmp_path, source="check_block.cpp")
    command = ["valgrind", "-q", "--error-exitcode=9", str(program)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr[:4000]


# -- tests of the tests: each change must be noticed -------------------------------------------------------------------

MUTATIONS = {  # name: (what is there, what replaces it, in how many places); a comment in [] marks the line
    "row sum": ("__syncthreads();  // [barrier: row sum]", "", 1),
    "by turns": ("place_ = WARPS - place_;  // [by turns]", "", 1),
    "rows read": ("__syncthreads();  // [barrier: rows read]", "", 1),
    "rows written": ("__syncthreads();  // [barrier: rows written]", "", 1),
    "total": ("__syncthreads();  // [barrier: total]", "", 1),
    "columns": ("if (column < channels) {  // [columns]", "if (column < channels + 16) {", 1),
    "squares": ("if ((i * lanes + lane) * CHUNK<T> >= channels) continue;  // [squares]", "", 1),
    "rows": ("exists ? call.channels : 0;  // [rows]", "call.channels;", 1),
    "place": ("call.images[row / each] * each", "int64_t(row / each) * each", 1),
    "no branch": ("has_y ? keep_of(call, row) : 0.0f", "keep_of(call, row)", 1),
    "added": ("if (row < call.rows) load_chunk", "load_chunk", 1),
    "statistics": ("if (lane == 0 && has_y) {", "if (lane == 0) {", 1),
    "column group": ("if (column < call.channels) {  // [column group]", "{", 1),
    "keep": ("[row / int(call.rows_per_image)]", "[0]", 1),
    "along": ("- y[i][j] * along_mean", "", 1),
    "sum of what": ("sums[j] += slope[j];", "sums[j] += x[j];", 1),
}


@emulated
@pytest.mark.long  # a compilation each
@pytest.mark.parametrize("name", [None, *MUTATIONS])
def test_a_mistake_is_noticed(name: str | None, tmp_path: Path) -> None:
    source = SOURCE.read_text()
    line = "  using L = Launcher<T>;\n"
    assert source.count(line) == 1
    only = "  if constexpr (!std::is_same_v<T, gpu::bfloat16>) return {};\n  else "  # compiles in a part of the time
    source = source.replace(line, line + only)
    if name is not None:
        old, new, places = MUTATIONS[name]
        assert source.count(old) == places
        source = source.replace(old, new)
    copy = tmp_path / "mutant.cu"
    copy.write_text(source)
    assert noticed(compile_library(tmp_path, copy)) == (name is not None)


def noticed(emulation: Emulation) -> bool:
    """Whether any check fails: an error of the emulation, guards that change, order of threads, or the budget."""
    for case in (Case(112), Case(1408, images=2)):
        try:
            if not all(check.passed for check in selfcheck_block.compare(case, torch.bfloat16, CPU, emulation)):
                return True
            tensors = selfcheck_block.draw(case, torch.bfloat16, CPU)
            first, second = (Emulation(emulation.library, seed)(*tensors) for seed in (1, 2))
        except RuntimeError:
            return True
        if not all(map(torch.equal, first, second)):
            return True
    return False


# -- on a GPU ----------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.skipif("cuda" in native.missing, reason=native.missing.get("cuda", ""))
def test_on_a_gpu() -> None:
    selfcheck_block.check_block(torch.device("cuda"))
    weight = torch.randn(1 + 96, device="cuda")[1:]  # not aligned, as in a flat buffer
    x = torch.randn(2, 3, 3, 96, device="cuda")
    found = block.residual_post_norm(x, x, weight, weight, None)
    assert torch.equal(found, block.residual_post_norm(x, x, weight.clone(), weight.clone(), None))
