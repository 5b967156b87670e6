"""Packaging. conf/ lies at the top of the checkout, and inside the package once it is installed.

The kernels are plain shared libraries, compiled here: the CPU part where there is a C++ compiler and an installed
PyTorch (its headers and libraries are needed, not its Python), the CUDA part where there is nvcc too and PyTorch has
CUDA. What is missing is left out, said on stderr, and said again by the package when it runs without. What is
attempted and fails stops the installation.
"""

import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

here = Path(__file__).parent
conf = ["swinv2_scale.conf"] + [f"swinv2_scale.conf.{path.name}" for path in (here / "conf").iterdir() if path.is_dir()]
embed = ["pyarrow>=16"]
s3 = ["s3fs>=2024.2"]
detection = ["pycocotools>=2.0.8"]
video = ["av>=14.2"]
export = ["onnx>=1.17", "onnxscript>=0.5", "onnxruntime>=1.20"]

OLDEST_TORCH = (2, 10)  # the first whose stable ABI has what kernels/bindings.cpp uses
AVX512 = ["-mavx2", "-mfma", "-mf16c", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"]
INSTRUCTION_SETS = {"portable": []}  # of which the processor's best is chosen at run time; options of GCC and Clang
if platform.machine() in ("x86_64", "AMD64"):
    INSTRUCTION_SETS |= {"avx2": AVX512[:3], "avx512": AVX512, "avx512_bf16": [*AVX512, "-mavx512bf16"]}
    INSTRUCTION_SETS["amx_bf16"] = [*INSTRUCTION_SETS["avx512_bf16"], "-mamx-tile", "-mamx-bf16", "-mprfchw"]
GPU_ARCHITECTURES = ["75", "80", "90", "100"]  # where no GPU says what it is
GPU_TYPES = ["float32", "bfloat16", "float16"]


def torch_folder() -> Path | None:
    """PyTorch in the environment that is installed into. pip builds in an isolated one, which hides it from import."""
    places = [*sys.path, sysconfig.get_path("platlib"), sysconfig.get_path("purelib")]
    folders = [Path(place) / "torch" for place in places if place]
    return next((folder for folder in folders if (folder / "include/torch/csrc/stable/ops.h").exists()), None)


def torch_has_cuda(torch: Path) -> bool:
    return re.search(r"^cuda\b.*= *'", (torch / "version.py").read_text(), re.MULTILINE) is not None


def compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "")) or shutil.which("g++") or shutil.which("clang++")


def nvcc() -> str | None:
    home = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))
    return shutil.which("nvcc") or shutil.which(home / "bin" / "nvcc")


def gpu_code() -> list[str]:
    """What nvcc shall generate, sm_* and compute_*: by TORCH_CUDA_ARCH_LIST, else for visible GPUs, else for all.

    The newest architecture is compiled as PTX too, for what comes after; TORCH_CUDA_ARCH_LIST says where it wants PTX.
    """
    wanted = re.split(r"[;\s]+", os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip())
    if wanted != [""]:
        found = [re.fullmatch(r"(\d+)\.(\d+[af]?)(\+PTX)?", name) for name in wanted]
        if not all(found):
            raise ValueError(f"TORCH_CUDA_ARCH_LIST is {' '.join(wanted)}; write numbers, such as 8.0;9.0+PTX")
        names = [(major + minor, ptx) for major, minor, ptx in (match.groups() for match in found)]
        return [f"sm_{name}" for name, _ in names] + [f"compute_{name}" for name, ptx in names if ptx]
    query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    answer = subprocess.run(query, capture_output=True, text=True, check=False).stdout if shutil.which(query[0]) else ""
    known = subprocess.run([nvcc(), "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout
    names = sorted({name.replace(".", "") for name in re.findall(r"^\d+\.\d+", answer, re.MULTILINE)}, key=int)
    names = names or [name for name in GPU_ARCHITECTURES if f"compute_{name}\n" in known]
    return [*(f"sm_{name}" for name in names), f"compute_{names[-1]}"]


def gencode(code: list[str], gpu_type: str) -> list[str]:
    """Options of nvcc. Turing has no bfloat16: the kernel is left out, and asking for it is an error that says so."""
    if gpu_type == "bfloat16":
        code = [name for name in code if not name.endswith("_75")] or ["compute_80"]
    return [f"-gencode=arch=compute_{name.partition('_')[2]},code={name}" for name in code]


def kernels() -> list[Extension]:
    """The libraries that can be built here."""
    torch = torch_folder()
    if torch is None or (version := torch_version(torch)) < OLDEST_TORCH:
        found = "no PyTorch" if torch is None else f"PyTorch {version[0]}.{version[1]}"
        print(f"swinv2-scale: without native kernels, {found} found; install torch>=2.10, then again", file=sys.stderr)
        return []
    if compiler() is None:
        print("swinv2-scale: without native kernels, no C++ compiler found (g++ or clang++)", file=sys.stderr)
        return []
    headers = sorted(str(path.relative_to(here)) for path in here.glob("kernels/*.h"))
    cpu = sorted(str(path.relative_to(here)) for path in here.glob("kernels/*.cpp"))
    cuda = sorted(str(path.relative_to(here)) for path in here.glob("kernels/*_cuda.cu"))
    built = [Extension("swinv2_scale.ops._kernels_cpu", cpu, depends=headers)]
    if nvcc() is None or not torch_has_cuda(torch):
        print("swinv2-scale: without CUDA kernels, which need nvcc and a PyTorch with CUDA", file=sys.stderr)
    elif cuda:
        built.append(Extension("swinv2_scale.ops._kernels_cuda", cuda, depends=headers))
    return built


def torch_version(torch: Path) -> tuple[int, int]:
    major, minor = re.search(r"__version__ = '(\d+)\.(\d+)", (torch / "version.py").read_text()).groups()
    return int(major), int(minor)


class BuildKernels(build_ext):
    """Compiles every file of every library at once, then links. The libraries are no Python modules."""

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", "/") + ".so"

    def build_extensions(self) -> None:
        torch = torch_folder()
        shared = ["-std=c++20", "-O3", "-Ikernels", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
        shared += [f"-I{torch}/include", f"-I{torch}/include/torch/csrc/api/include"]
        cpp = [compiler(), *shared, "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-Wno-psabi"]
        cuda = [nvcc(), *shared, "-DUSE_CUDA", "-Xcompiler", "-fPIC,-fvisibility=hidden", "--threads", "0"]
        code = gpu_code() if nvcc() else []
        steps, links = [], []
        for extension in self.extensions:
            library = Path(self.get_ext_fullpath(extension.name))
            folder = Path(self.build_temp) / extension.name
            library.parent.mkdir(parents=True, exist_ok=True)
            folder.mkdir(parents=True, exist_ok=True)
            objects = []
            for source in map(Path, extension.sources):
                command = cuda if source.suffix == ".cu" else cpp
                variants: dict[str, list[str]] = {"": []}
                if source.stem.endswith("_cpu"):
                    variants = {name: [f"-DINSTRUCTION_SET={name}", *own] for name, own in INSTRUCTION_SETS.items()}
                elif not source.stem.startswith("bindings"):
                    variants = {name: [f"-DELEMENT={name}", *gencode(code, name)] for name in GPU_TYPES}
                for name, options in variants.items():
                    target = folder / f"{source.stem}{name}.o"
                    steps.append([*command, *options, "-c", str(source), "-o", str(target)])
                    objects.append(str(target))
            libraries = [f"-L{torch}/lib", "-ltorch_cpu"]
            linker = [compiler(), "-shared"]
            if extension.name.endswith("_cuda"):
                linker, libraries = [nvcc(), "-shared"], [*libraries, "-ltorch_cuda"]
            # Linked beside its place and moved: a process that starts now sees the old library or the new one.
            links.append(([*linker, *objects, "-o", f"{library}.new", *libraries], library))
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(run, steps))
        for command, library in links:
            run(command)
            Path(f"{library}.new").replace(library)


def run(command: list[str]) -> None:
    result = subprocess.run(command, cwd=here, capture_output=True, text=True, check=False)
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{result.stderr}")


setup(
    name="swinv2-scale",
    version="0.1.0",
    description="Train Swin Transformer V2, from 28 million parameters on a laptop to 3 billion on a cluster",
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    python_requires=">=3.10",
    packages=[*find_packages(include=["swinv2_scale", "swinv2_scale.*"]), *conf],
    package_dir={"swinv2_scale.conf": "conf"},
    package_data={
        "swinv2_scale": ["*.template"],
        "swinv2_scale.models": ["*.txt"],
        **{name: ["*.yaml"] for name in conf},
    },
    ext_modules=kernels(),
    cmdclass={"build_ext": BuildKernels},
    entry_points={"console_scripts": ["swinv2-scale = swinv2_scale.cli:main"]},
    install_requires=[
        "torch>=2.10",
        "torchvision>=0.25",
        "deepspeed>=0.19.5",
        "fairscale>=0.4.13",
        "hydra-core>=1.3.2,<2",
        "webdataset>=1.0",
        "fsspec>=2024.2",
        "requests>=2.31",
        "wandb>=0.20",
        "safetensors>=0.5",
        "numpy",
        "packaging",
        "pillow>=10.1",
        "pyyaml",
        "rich",
    ],
    extras_require={
        "demo": ["scikit-image>=0.24", "scikit-learn>=1.4"],
        "detection": detection,
        "embed": embed,
        "export": export,
        "s3": s3,
        "video": video,
        "dashboard": ["wandb-workspaces>=0.4"],
        "tensorboard": ["tensorboard>=2.16"],
        "test": [
            "wandb-workspaces>=0.4",
            "tensorboard>=2.16",
            "pytest>=8",
            "pytest-xdist>=3.6",
            "hypothesis>=6.100",
            "moto[server]>=5",
            "setuptools>=77",
            "timm>=1.0.20",
            "transformers>=5",
            "ruff==0.17.6",
            "mypy>=1.15",
            "types-PyYAML",
            "types-requests",
            *detection,
            *embed,
            *export,
            *s3,
            *video,
        ],
    },
)
