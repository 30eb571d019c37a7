# syntax=docker/dockerfile:1
#   docker build -t megatron-slim .                                GPU, on NVIDIA's PyTorch image
#   docker build -t megatron-slim:cpu --target cpu .               CPU only
#   docker run --rm -it megatron-slim:cpu make demo VENV=

ARG NGC_TAG=26.06-py3

# PyTorch from PyPI, CUDA build and all: the CPU-only wheels come without triton, which megatron-core imports.
FROM python:3.12-slim AS cpu
RUN apt-get update && apt-get install -y --no-install-recommends git make && rm -rf /var/lib/apt/lists/*
WORKDIR /workspace/megatron_slim
COPY setup.py pyproject.toml README.md ./
COPY megatron_slim/__init__.py megatron_slim/
RUN pip install --no-cache-dir -e ".[dev]"
COPY . .
CMD ["python", "tools/doctor.py"]

FROM nvcr.io/nvidia/pytorch:${NGC_TAG} AS gpu
# The image pins what it was built with; megatron-core and transformers are newer. Its torch, Transformer Engine, apex
# and numpy belong together and stay: they are pinned here at what they are, and packages that would pull in torch
# come without their dependencies.
ENV PIP_CONSTRAINT="" PIP_NO_CACHE_DIR=1
WORKDIR /workspace/megatron_slim
RUN pip list --format=freeze | grep -iE '^(torch|triton|pytorch-triton|numpy|apex)==' > /tmp/image.txt \
    && pip install -c /tmp/image.txt \
        "transformers>=5.23,<6" \
        "tokenizers>=0.23,<0.24" \
        "safetensors>=0.8,<0.9" \
        "sentencepiece>=0.2.1,<0.3" \
        "nltk>=3.9.1,<4" \
        "tensorboard>=2.20,<3" \
        "xxhash>=3.5,<5" \
        "PyYAML>=6,<7" \
        "rich>=14,<16" \
        "psutil>=7,<8" \
        "scipy>=1.14,<2" \
        "matplotlib>=3.10,<4" \
    && pip install --no-deps megatron-core==0.19.2 \
    && pip install --no-deps flash-linear-attention==0.6.0 fla-core==0.6.0
COPY . .
RUN pip install --no-deps --no-build-isolation -e .
CMD ["python", "tools/doctor.py"]
