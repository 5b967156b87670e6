"""What the compiled CUDA kernels allow on paper: registers, occupancy, and the least time that each resource needs.

    python kernels/roofline.py [swinv2_scale/ops/_kernels_cuda.so]

Computed from the machine code and from data sheets, measured nowhere. Each figure is a lower bound on time: the largest
of what device memory, tensor cores, exponentials, shared memory and instruction issue need if nothing ever waits.
"""

import argparse
import math
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

LIBRARY = Path(__file__).parents[1] / "swinv2_scale/ops/_kernels_cuda.so"
KERNELS = ("forward", "backward_queries", "backward_keys")
WARP = 32
BLOCK_KERNELS = (
    "norm_forward",
    "norm_backward",
    "add_images",
    "gelu_forward",
    "sum",
)  # of block_cuda.cu; and total, which has no type
NAME = re.compile(
    rf"\d({'|'.join([*KERNELS, 'reduce', *BLOCK_KERNELS, 'total'])})_kernel"
    r"(?:I(f|.*?(?:bfloat16|float16)E)(?:L[ib](\d+)E)?)?"
)
BLOCK_THREADS, NORM_CHUNKS, SUM_CHUNKS = 256, 1024, 2**18  # block_cuda.cu and block_cuda.h


@dataclass(frozen=True)
class Kernel:
    """One kernel in the machine code of one architecture; `instructions` are addresses and texts. `width` is of a head;
    of a norm the chunks of 16 bytes that a lane has; of a sum whether it is GELU's backward."""

    architecture: int
    name: str
    dtype: str
    width: int
    registers: int
    stack_bytes: int
    local_bytes: int
    instructions: tuple[tuple[int, str], ...] = ()


@dataclass(frozen=True)
class Gpu:
    """Data sheet. Rates are per second of the whole device, dense products of 16-bit types accumulated in float32."""

    name: str
    architecture: int
    multiprocessors: int
    hertz: float
    memory_bytes: float
    tensor_operations: float
    shared_bytes: int  # of one multiprocessor; every block takes 1 KB more than it asks for

    def cycles(self, per_cycle: float) -> float:
        """Events per second of the device, of which a multiprocessor does `per_cycle` in a cycle."""
        return per_cycle * self.multiprocessors * self.hertz


# NVIDIA's data sheets of A100 and H100 SXM. `mma.sync` reaches about 62 % of Hopper's asynchronous warpgroup products.
GPUS = [
    Gpu("A100", 80, 108, 1.41e9, 2.04e12, 312e12, 164 * 1024),
    Gpu("H100", 90, 132, 1.83e9, 3.35e12, 0.62 * 989e12, 228 * 1024),
]
SHAPES = [  # what, images, map side, window side, heads; head width 32
    ("T 256/8, first stage", 128, 64, 8, 3),
    ("T 256/8, third stage", 128, 16, 8, 12),
    ("B 256/16, first stage", 64, 64, 16, 4),
    ("L 384/24, first stage", 16, 96, 24, 6),
    ("G 1536/48, first stage", 1, 384, 48, 16),
]


class Tiles:
    """Sizes of `Tiles` in cosine_window_attention_cuda.cu, of which a test compares the sums."""

    def __init__(self, size: int, width: int) -> None:
        row_bytes = width * size
        self.warps = 2 if row_bytes > 256 else 4
        self.threads, self.rows = WARP * self.warps, 16 * self.warps
        self.forward_columns = 64 if row_bytes <= 128 else 8192 // row_bytes
        self.backward_columns = self.forward_columns // 2
        self.size, self.stride = size, width + 16 // size

    def columns(self, kernel: str) -> int:
        return self.forward_columns if kernel == "forward" else self.backward_columns

    def shared_bytes(self, kernel: str) -> int:
        """Dynamic shared memory of a block, in bytes, without the tables of bias and its gradient."""
        rows, columns = self.rows, self.columns(kernel)
        tiles = ((1 if kernel == "forward" else 2) * rows + 4 * columns) * self.stride * self.size
        row = lambda count: (4 * count + 15) // 16 * 16  # noqa: E731
        if kernel == "forward":
            return tiles + 2 * row(rows) + 4 * row(columns)
        if kernel == "backward_keys":
            return tiles + 3 * row(rows) + 8 * row(columns)
        return tiles + 5 * row(rows) + 4 * row(columns) + row(rows * (columns + 1)) + row(self.threads)


def tool(name: str) -> str | None:
    """Path of one of NVIDIA's binary utilities: of the CUDA toolkit, or those that come with PyTorch's Triton."""
    bundled: list[str] = []
    try:
        import triton
    except ImportError:
        pass
    else:
        bundled = [str(Path(triton.__file__).parent / "backends/nvidia/bin")]
    return shutil.which(name) or shutil.which(name, path=os.pathsep.join([*bundled, "/usr/local/cuda/bin"]))


def read_kernels(library: Path = LIBRARY) -> list[Kernel]:
    """All kernels of a library, for each architecture. FileNotFoundError if the library or cuobjdump is missing."""
    cuobjdump, nvdisasm = tool("cuobjdump"), tool("nvdisasm")
    if not library.exists() or cuobjdump is None or nvdisasm is None:
        what = (
            library if not library.exists() else "cuobjdump and nvdisasm (in the CUDA toolkit and in Triton's package)"
        )
        raise FileNotFoundError(f"{what} not found; build with nvcc: pip install --no-build-isolation -e .")
    environment = {**os.environ, "PATH": f"{Path(nvdisasm).parent}{os.pathsep}{os.environ['PATH']}"}

    def dump(*options: str) -> str:
        command = [cuobjdump, *options, str(library)]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout

    usage: dict[tuple[int, str], dict[str, int]] = {}
    architecture, function = 0, ""
    for line in dump("--dump-resource-usage").splitlines():
        if found := re.search(r"arch = sm_(\d+)", line):
            architecture = int(found[1])
        elif found := re.search(r"Function (\S+):", line):
            function = found[1]
        elif "REG:" in line:
            usage[architecture, function] = {k: int(v) for k, v in re.findall(r"(\w+):(\d+)", line)}
    code: dict[tuple[int, str], list[tuple[int, str]]] = {key: [] for key in usage}
    for line in dump("-sass").splitlines():
        if found := re.search(r"arch = sm_(\d+)", line):
            architecture = int(found[1])
        elif found := re.search(r"Function : (\S+)", line):
            function = found[1]
        elif found := re.search(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+ )?([A-Z].*?);", line):
            code[architecture, function].append((int(found[1], 16), found[2].strip()))
    kernels = []
    for (architecture, function), numbers in usage.items():
        found = NAME.search(function)
        if found is None:
            raise ValueError(f"{library}: unexpected kernel {function}")
        dtype = "" if found[2] is None else "float32" if found[2] == "f" else "b" * ("bf" in found[2]) + "float16"
        sizes = numbers["REG"], numbers["STACK"], numbers["LOCAL"]
        instructions = tuple(code[architecture, function])
        kernels.append(Kernel(architecture, found[1], dtype, int(found[3] or 0), *sizes, instructions))
    return kernels


def blocks_per_multiprocessor(gpu: Gpu, kernel: Kernel, threads: int, shared_bytes: int) -> int:
    registers = -(-kernel.registers // 8) * 8 * threads
    return min(65536 // registers, gpu.shared_bytes // (shared_bytes + 1024), 2048 // threads, 32)


def loop_instructions(kernel: Kernel) -> int:
    """Length of the innermost loop that contains all matrix products: one tile of columns, for one warp."""
    products = [at for at, text in kernel.instructions if text.startswith("HMMA")]
    loops = []
    for at, text in kernel.instructions:
        target = re.match(r"BRA(?:\.\S+)? .*?0x([0-9a-f]+)", text)
        if target and int(target[1], 16) <= products[0] and products[-1] <= at:
            loops.append(sum(int(target[1], 16) <= place <= at for place, _ in kernel.instructions))
    return min(loops, default=len(kernel.instructions))


def limits(gpu: Gpu, kernel: Kernel, images: int, side: int, window: int, heads: int) -> tuple[int, dict[str, float]]:
    """Blocks that a multiprocessor holds, and the seconds that each resource needs."""
    tiles, tokens, tables = Tiles(2, 32), window * window, 1 if kernel.name != "backward_queries" else 2
    shared = tiles.shared_bytes(kernel.name)
    staged = tables * 4 * (2 * window - 1) ** 2
    shared += staged if shared + staged <= 96 * 1024 else 0
    blocks = blocks_per_multiprocessor(gpu, kernel, tiles.threads, shared)
    pairs = images * (side // window) ** 2 * heads * tokens**2
    map_numbers = images * side * side * heads * 32
    products = {"forward": 2, "backward_queries": 3, "backward_keys": 4}[kernel.name]
    # Tensors that pass through device memory: qkv, out | qkv, out, grad_out, grad_q | qkv, grad_out, grad_k, grad_v
    tensors = {"forward": 4, "backward_queries": 6, "backward_keys": 6}[kernel.name]
    warp_tiles = math.ceil(tokens / tiles.columns(kernel.name)) * math.ceil(tokens / 16) * pairs / tokens**2
    shared_traffic = products * tiles.columns(kernel.name) * 32 * 2 * warp_tiles
    return blocks, {
        "memory": (2 * tensors * map_numbers + 8 * map_numbers / 32) / gpu.memory_bytes,
        "products": 2 * products * pairs * 32 / gpu.tensor_operations,
        "exponentials": pairs / gpu.cycles(16),
        "shared memory": shared_traffic / gpu.cycles(128),
        "issue": loop_instructions(kernel) * warp_tiles / gpu.cycles(4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library", nargs="?", type=Path, default=LIBRARY)
    kernels = read_kernels(parser.parse_args().library)
    print(
        "| kernel | type | width | "
        + " | ".join(f"registers sm_{g.architecture}" for g in GPUS)
        + " | KB | blocks A100, H100 |"
    )
    print("|---|---|---|---|---|---|---|")
    for dtype, size in (("bfloat16", 2), ("float32", 4)):
        for width in (32, 64, 128):
            for name in KERNELS:
                own = [find(kernels, gpu.architecture, name, dtype, width) for gpu in GPUS]
                tiles = Tiles(size, width)
                shared = tiles.shared_bytes(name)
                blocks = [
                    blocks_per_multiprocessor(g, k, tiles.threads, shared) for g, k in zip(GPUS, own, strict=True)
                ]
                registers = " | ".join(str(k.registers) for k in own)
                print(f"| {name} | {dtype} | {width} | {registers} | {shared / 1024:.1f} | {blocks[0]}, {blocks[1]} |")
    for gpu in GPUS:
        print(
            f"\n{gpu.name}, bfloat16\n\n| shape | kernel | blocks | " + " | ".join(HEADINGS) + " | least, µs | limit |"
        )
        print("|" + "---|" * (5 + len(HEADINGS)))
        for what, *shape in SHAPES:
            for name in KERNELS:
                blocks, needed = limits(gpu, find(kernels, gpu.architecture, name, "bfloat16", 32), *shape)
                worst = max(needed, key=needed.__getitem__)
                columns = " | ".join(f"{needed[h] * 1e6:.0f}" for h in HEADINGS)
                print(f"| {what} | {name} | {blocks} | {columns} | {needed[worst] * 1e6:.0f} | {worst} |")
    print_block(kernels)


# What, tokens of all images, channels: as in SHAPES.
BLOCK_SHAPES = [
    ("T 256/8, first stage", 128 * 64**2, 96),
    ("T 256/8, last stage", 128 * 8**2, 768),
    ("L 384/24, third stage", 16 * 24**2, 768),
    ("G 1536/48, first stage", 384**2, 512),
    ("G 1536/48, last stage", 48**2, 4096),
]
# Maps that pass through memory: here, and by PyTorch's functions in their place where each reads and writes once
# (float32 counts as two). Forward: to float32, norm, · keep, to bfloat16, x + . Backward: both maps to float32, · keep,
# norm for its input, norm for its weights, to bfloat16. Images: a copy of x, and then the sum. GELU: its gradient,
# itself, the sum.
MAPS = {"norm_forward": (3, 17), "norm_backward": (3, 23), "add_images": (3, 5), "gelu_forward": (2, 2)}
MAPS |= {"sum of GELU": (4, 6), "sum": (1, 1)}


def norm_lanes(channels: int, size: int) -> tuple[int, int]:
    """Lanes of a row, and chunks of each: `choose_lanes` of block_cuda.cu."""
    chunks, most = channels * size // 16, size
    shapes = [(1 << max(0, -(-chunks // each) - 1).bit_length(), each) for each in (most, most - 1)]
    return min(shapes, key=lambda shape: shape[0] * shape[1])


def pass_instructions(kernel: Kernel) -> int:
    """Length of the longest loop, which takes a lane's next numbers; what it loops over itself counts once."""
    loops = [0]
    for at, text in kernel.instructions:
        target = re.match(r"BRA(?:\.\S+)? .*?0x([0-9a-f]+)", text)
        if target and int(target[1], 16) < at:
            loops.append(sum(int(target[1], 16) <= place <= at for place, _ in kernel.instructions))
    return max(loops)


def block_limits(
    gpu: Gpu, kernels: list[Kernel], name: str, rows: int, channels: int
) -> tuple[float, dict[str, float]]:
    """Bytes moved as a multiple of the least, and the seconds that each resource needs, in bfloat16."""
    lanes, each = norm_lanes(channels, 2) if name.startswith("norm") else (0, 1)
    width = {"add_images": 0, "gelu_forward": 0, "sum": 0, "sum of GELU": 1}.get(name, each)
    kernel = find(kernels, gpu.architecture, name.partition(" ")[0], "bfloat16", width)
    lanes_over = -(-channels // 8) if not lanes else lanes * each  # chunks of a row, idle ones included
    parts = {"norm_backward": 2 * max(1, min(rows // 32, NORM_CHUNKS))}.get(
        name, max(1, min(rows // 64, SUM_CHUNKS // channels)) if name.startswith("sum") else 0
    )
    least = MAPS[name][0] * rows * channels * 2
    moved = least + (8 * rows if lanes else 0) + 2 * parts * channels * 4
    issued = pass_instructions(kernel) / each * rows * lanes_over / WARP
    return moved / least, {"memory": moved / gpu.memory_bytes, "issue": issued / gpu.cycles(4)}


def print_block(kernels: list[Kernel]) -> None:
    print(
        "\n| kernel | type | " + " | ".join(f"registers sm_{g.architecture}" for g in GPUS) + " | blocks A100, H100 |"
    )
    print("|---|---|---|---|---|")
    for dtype in ("bfloat16", "float32"):
        for name in BLOCK_KERNELS:
            for width in sorted({k.width for k in kernels if (k.name, k.dtype) == (name, dtype)}):
                own = [find(kernels, gpu.architecture, name, dtype, width) for gpu in GPUS]
                shared = {"norm_forward": 64, "add_images": 0, "gelu_forward": 0}.get(name, 64 + 256 * 32)
                blocks = [
                    blocks_per_multiprocessor(g, k, BLOCK_THREADS, shared) for g, k in zip(GPUS, own, strict=True)
                ]
                what = f"{name}, {width} chunks" if "norm" in name else "sum of GELU" if width else name
                print(f"| {what} | {dtype} | {' | '.join(str(k.registers) for k in own)} | {blocks[0]}, {blocks[1]} |")
    print(
        "\n| shape | kernel | of the least bytes | by PyTorch | "
        + " | ".join(f"{g.name} memory, issue" for g in GPUS)
        + " |"
    )
    print("|---|---|---|---|---|---|")
    for what, rows, channels in BLOCK_SHAPES:
        for name, (ours, plain) in MAPS.items():
            wide = channels * 4 if "gelu" in name.lower() else channels
            found = [block_limits(gpu, kernels, name, rows, wide) for gpu in GPUS]
            times = " | ".join(f"{seconds['memory'] * 1e6:.1f}, {seconds['issue'] * 1e6:.1f}" for _, seconds in found)
            print(f"| {what} | {name} | {found[0][0]:.2f} | {plain / ours:.1f} | {times} |")


HEADINGS = ("memory", "products", "exponentials", "shared memory", "issue")


def find(kernels: list[Kernel], architecture: int, name: str, dtype: str, width: int) -> Kernel:
    found = [k for k in kernels if (k.architecture, k.name, k.dtype, k.width) == (architecture, name, dtype, width)]
    if not found:
        raise LookupError(f"no {name} of {dtype}, width {width}, sm_{architecture}: built with TORCH_CUDA_ARCH_LIST?")
    return found[0]


if __name__ == "__main__":
    main()
