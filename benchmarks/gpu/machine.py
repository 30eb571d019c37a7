"""What the machine has: found in a process of its own, so that no other process holds memory of the GPU."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from typing import Any

from benchmarks.gpu.parts import Found, Missing, Setting

# Module, the distribution that has its version, how to get it.
OPTIONAL = {
    "Transformer Engine": (
        "transformer_engine",
        "transformer-engine",
        "it comes with NVIDIA's image nvcr.io/nvidia/pytorch, or pip install --no-build-isolation "
        "'transformer-engine[pytorch]>=2.20,<3', which compiles",
    ),
    "flash-linear-attention": (
        "fla",
        "flash-linear-attention",
        "pip install flash-linear-attention==0.6.0 fla-core==0.6.0 einops",
    ),
    "apex": ("apex", "apex", "it comes with NVIDIA's image nvcr.io/nvidia/pytorch"),
    "Liger": ("liger_kernel", "liger-kernel", "pip install --no-deps liger-kernel==0.8.5"),
}
VERSIONS = ("torch", "triton", "megatron-core", "transformers")


def need(library: str) -> None:
    """See that an optional library is installed.

    Raises:
        Missing: it is not.
    """
    module, _, how = OPTIONAL[library]
    if importlib.util.find_spec(module) is None:
        raise Missing(f"{library} is not installed", how)


def machine(setting: Setting) -> Found:
    """Devices and versions; nothing is judged."""
    import torch

    cuda = setting.device == "cuda" and torch.cuda.is_available()
    details: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if cuda else "CPU",
        "gpus": torch.cuda.device_count() if cuda else 0,
        **{name: _version(name) for name in VERSIONS},
        **{name: _version(distribution, module) for name, (module, distribution, _) in OPTIONAL.items()},
    }
    if cuda:
        properties = torch.cuda.get_device_properties(0)
        details["memory_gib"] = round(properties.total_memory / 2**30, 1)
        details["compute_capability"] = f"{properties.major}.{properties.minor}"
        details["CUDA"] = torch.version.cuda
        details["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
    return Found(details=details)


def _version(distribution: str, module: str | None = None) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        present = module is not None and importlib.util.find_spec(module) is not None
        return "installed" if present else "not installed"
