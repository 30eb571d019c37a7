"""On the path of vLLM's processes: torchvision built for CUDA, which PyPI has, next to torch without it.

Its operators do not load then, and it does not even import unless these two have a name. No model here uses any.
"""

from importlib.metadata import PackageNotFoundError, version


def fits() -> bool:
    """Whether both are built for a CPU, or both are not; or one is missing."""
    try:
        return ("+cpu" in version("torch")) == ("+cpu" in version("torchvision"))
    except PackageNotFoundError:
        return True


if not fits():
    import torch

    for name in ("nms", "qnms"):
        torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
