"""The machine code of the CUDA kernels: all architectures are there, nothing spills, tensor cores are used."""

import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

KERNELS = Path(__file__).parents[2] / "kernels"
SIZES = {"float32": 4, "bfloat16": 2, "float16": 2}

specification = importlib.util.spec_from_file_location("roofline", KERNELS / "roofline.py")
roofline = importlib.util.module_from_spec(specification)
specification.loader.exec_module(roofline)


@pytest.fixture(scope="module")
def kernels() -> list:
    if not roofline.LIBRARY.exists():
        pytest.skip("the CUDA kernels are not built (nvcc and a PyTorch with CUDA build them)")
    if roofline.tool("cuobjdump") is None or roofline.tool("nvdisasm") is None:
        pytest.skip("cuobjdump and nvdisasm, of the CUDA toolkit or of Triton, are missing")
    return roofline.read_kernels()


def opcodes(kernel) -> set[str]:
    return {text.split()[0].rstrip(";") for _, text in kernel.instructions}


def test_architectures(kernels) -> None:
    """All that the sources are meant for, unless the build was asked for others or saw a GPU."""
    if "TORCH_CUDA_ARCH_LIST" in os.environ or shutil.which("nvidia-smi"):
        pytest.skip("built for chosen architectures")
    found = {(k.architecture, k.dtype) for k in kernels if k.dtype}
    expected = {(a, t) for a in (75, 80, 90, 100) for t in SIZES} - {(75, "bfloat16")}
    assert found == expected
    # Three kernels of three widths, and the reduction; two norms of two widths, GELU, two sums, and their total.
    assert len(kernels) == len(expected) * (10 + 9)


def test_nothing_spills(kernels) -> None:
    for kernel in kernels:
        used = (kernel.registers <= 255, kernel.stack_bytes, kernel.local_bytes)
        assert used == (True, 0, 0), kernel
        assert not [code for code in opcodes(kernel) if re.match(r"(LDL|STL)", code)], kernel


def test_tensor_cores_and_asynchronous_copies(kernels) -> None:
    for kernel in kernels:
        codes = {code.split(".")[0] for code in opcodes(kernel)}
        assert kernel.instructions, kernel
        if kernel.name not in roofline.KERNELS:
            continue
        on_tensor_cores = kernel.dtype != "float32"
        assert ("HMMA" in codes) == on_tensor_cores, kernel
        assert ("LDSM" in codes) == on_tensor_cores, kernel
        assert ("LDGSTS" in codes) == (kernel.architecture >= 80), kernel
        if kernel.dtype == "bfloat16":
            assert any("HMMA" in code and "BF16" in code for code in opcodes(kernel)), kernel


def test_maps_of_a_block_are_read_and_written_16_bytes_at_a_time(kernels) -> None:
    for kernel in kernels:
        if kernel.name not in roofline.BLOCK_KERNELS:
            continue
        wide = [code for code in opcodes(kernel) if code.startswith("LDG") and "128" in code]
        assert wide, kernel
        if kernel.name != "sum" or kernel.width:
            assert [code for code in opcodes(kernel) if code.startswith("STG") and "128" in code], kernel


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler (g++) found")
def test_the_roofline_knows_the_shared_memory(tmp_path) -> None:
    lines = ['#include "cosine_window_attention_cuda.cu"', "namespace cosine_window_attention::cuda {"]
    for dtype, size in SIZES.items():
        for width in (32, 64, 128):
            for name in roofline.KERNELS:
                bytes_needed = roofline.Tiles(size, width).shared_bytes(name)
                lines.append(f"static_assert({name}_bytes<gpu::{dtype}, {width}>() == {bytes_needed});")
    source = tmp_path / "sizes.cpp"
    source.write_text("\n".join([*lines, "}"]))
    command = [
        "g++",
        "-std=c++17",
        "-fsyntax-only",
        "-w",
        "-DCOSINE_WINDOW_ATTENTION_EMULATE",
        f"-I{KERNELS}",
        str(source),
    ]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[:2000]
