# syntax=docker/dockerfile:1.7
#   docker build -t megatron-slim .                                GPU, on NVIDIA's PyTorch image
#   docker build -t megatron-slim:cpu --target cpu .               CPU only
#   docker run --rm -it megatron-slim:cpu make demo VENV=
# Versions and hashes are those of requirements/ (make lock). For the same base image for ever, give its digest too:
# --build-arg NGC_TAG=26.06-py3@sha256:...
ARG NGC_TAG=26.06-py3
ARG PYTHON_TAG=3.12-slim

# PyTorch from PyPI, CUDA build and all: the CPU-only wheels come without triton, which megatron-core imports.
FROM python:${PYTHON_TAG} AS cpu
ARG REVISION=unknown
LABEL org.opencontainers.image.title="megatron_slim" \
      org.opencontainers.image.description="Compression of Mixture-of-Experts language models on Megatron-Core, CPU" \
      org.opencontainers.image.version="0.1.0" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.revision="${REVISION}"
# Whoever runs it, root or not, known to the image or not: caches go where everybody may write, and a name is given for
# torch, which asks for one.
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONDONTWRITEBYTECODE=1 LOGNAME=slim \
    XDG_CACHE_HOME=/tmp/cache MPLCONFIGDIR=/tmp/matplotlib TRITON_CACHE_DIR=/tmp/triton
RUN --mount=type=cache,target=/var/cache/apt,sharing=locked --mount=type=cache,target=/var/lib/apt,sharing=locked \
    rm -f /etc/apt/apt.conf.d/docker-clean && apt-get update && apt-get install -y --no-install-recommends "make=4.*"
WORKDIR /workspace/megatron_slim
RUN --mount=type=cache,target=/root/.cache/pip --mount=type=bind,source=requirements,target=/tmp/requirements \
    PIP_CACHE_DIR=/root/.cache/pip pip install --require-hashes --no-deps -r /tmp/requirements/image.txt \
        -r /tmp/requirements/base.txt -r /tmp/requirements/dev.txt
COPY . .
RUN pip install --no-cache-dir --no-deps --no-build-isolation -e . && pip check \
    && chmod -R a+rX . && install -d -m 1777 runs
USER 1000:1000
CMD ["python", "tools/doctor.py"]

FROM nvcr.io/nvidia/pytorch:${NGC_TAG} AS gpu
ARG REVISION=unknown
LABEL org.opencontainers.image.title="megatron_slim" \
      org.opencontainers.image.description="Compression of Mixture-of-Experts language models on Megatron-Core, GPU" \
      org.opencontainers.image.version="0.1.0" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.revision="${REVISION}"
# The image pins what it was built with, and megatron-core and transformers are newer: its constraints are lifted.
ENV PIP_CONSTRAINT="" PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONDONTWRITEBYTECODE=1 LOGNAME=slim \
    XDG_CACHE_HOME=/tmp/cache MPLCONFIGDIR=/tmp/matplotlib TRITON_CACHE_DIR=/tmp/triton
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
WORKDIR /workspace/megatron_slim
# Nothing of its torch, Transformer Engine, apex and numpy, which belong together, is replaced: dependencies are those
# listed and no others, and the build fails if one of these packages is not what it was.
RUN --mount=type=cache,target=/root/.cache/pip --mount=type=bind,source=requirements,target=/tmp/requirements \
    own() { pip list --format=freeze | sort \
        | grep -iE '^(torch|triton|pytorch[_-]triton|numpy|apex|transformer[_-]engine|flash[_-]attn|nvidia)[^=]*=='; } \
    && own > /tmp/own.txt && grep -qi '^torch==' /tmp/own.txt \
    && PIP_CACHE_DIR=/root/.cache/pip pip install --require-hashes --no-deps \
        -r /tmp/requirements/base.txt -r /tmp/requirements/gpu.txt \
    && own | diff /tmp/own.txt - && rm /tmp/own.txt
COPY . .
RUN pip install --no-cache-dir --no-deps --no-build-isolation -e . \
    && chmod -R a+rX . && install -d -m 1777 runs
USER 1000:1000
CMD ["python", "tools/doctor.py"]
