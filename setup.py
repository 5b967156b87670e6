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
export = ["onnx>=1.17", "onnxscript>=0.5", "onnxruntime>=1.20"]

OLDEST_TORCH = (2, 10)  # the first whose stable ABI has what kernels/bindings.cpp uses
AVX512 = ["-mavx2", "-mfma", "-mf16c", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"]
INSTRUCTION_SETS = {"portable": []}  # of which the processor's best is chosen at run time; options of GCC and Clang
if platform.machine() in ("x86_64", "AMD64"):
    INSTRUCTION_SETS |= {"avx2": AVX512[:3], "avx512": AVX512, "avx512_bf16": [*AVX512, "-mavx512bf16"]}
    INSTRUCTION_SETS["amx_bf16"] = [*INSTRUCTION_SETS["avx512_bf16"], "-mamx-tile", "-mamx-bf16"]
GPU_ARCHITECTURES = (75, 80, 90, 100)  # the last as PTX too, for what comes after


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
    cpu = ["kernels/bindings.cpp", "kernels/cosine_window_attention_cpu.cpp"]
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
        cuda += [f"-gencode=arch=compute_{a},code=sm_{a}" for a in GPU_ARCHITECTURES]
        cuda += [f"-gencode=arch=compute_{GPU_ARCHITECTURES[-1]},code=compute_{GPU_ARCHITECTURES[-1]}"]
        steps, links = [], []
        for extension in self.extensions:
            library = Path(self.get_ext_fullpath(extension.name))
            folder = Path(self.build_temp) / extension.name
            library.parent.mkdir(parents=True, exist_ok=True)
            folder.mkdir(parents=True, exist_ok=True)
            objects = []
            for source in map(Path, extension.sources):
                command = cuda if source.suffix == ".cu" else cpp
                variants = INSTRUCTION_SETS if source.stem.endswith("_cpu") else {"": []}
                for name, options in variants.items():
                    target = folder / f"{source.stem}{name}.o"
                    define = [f"-DINSTRUCTION_SET={name}"] if name else []
                    steps.append([*command, *define, *options, "-c", str(source), "-o", str(target)])
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
        "wandb>=0.20",
        "safetensors>=0.5",
        "numpy",
        "pillow",
        "pyyaml",
        "rich",
    ],
    extras_require={
        "demo": ["scikit-image>=0.24", "scikit-learn>=1.4"],
        "embed": embed,
        "export": export,
        "test": [
            "pytest>=8",
            "setuptools>=77",
            "timm>=1.0.20",
            "transformers>=5",
            "ruff==0.17.6",
            "mypy>=1.15",
            "types-PyYAML",
            *embed,
            *export,
        ],
    },
)
