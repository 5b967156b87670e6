"""Packaging. conf/ lies at the top of the checkout, and inside the package once it is installed."""

from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
conf = ["swinv2_scale.conf"] + [f"swinv2_scale.conf.{path.name}" for path in (here / "conf").iterdir() if path.is_dir()]
embed = ["pyarrow>=16"]
export = ["onnx>=1.17", "onnxscript>=0.5", "onnxruntime>=1.20"]

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
