"""Without CUDA: torch compiles nothing, and "cuda" means the CPU wherever a tensor is made or moved."""

from __future__ import annotations

import functools
import os
import sys

import torch
from torch.utils._device import _device_constructors

from megatron_slim.aliases import Function

_CPU = torch.device("cpu")
_FACTORIES = (
    "arange as_tensor asarray empty empty_like empty_strided eye full full_like linspace logspace ones ones_like rand "
    "rand_like randint randint_like randn randn_like randperm scalar_tensor tensor tril_indices triu_indices zeros "
    "zeros_like"
).split()
_METHODS = "new_empty new_empty_strided new_full new_ones new_tensor new_zeros to".split()


def disable_compilation() -> None:
    """TorchDynamo would spend 25 s at the first step on Megatron's fused element-wise functions.

    Megatron asks for that as it is imported, and to import TorchDynamo only to find it disabled takes half a second.
    """
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    if "torch._dynamo" in sys.modules:
        sys.modules["torch._dynamo"].config.disable = True
    torch.compile = _as_it_is


def _as_it_is(model: Function | None = None, **_: object) -> Function:
    """`torch.compile` that compiles nothing; it is a decorator with and without options."""
    return model if model is not None else lambda function: function


def _is_cuda(device: object) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, str) and device.split(":")[0] == "cuda"


def _on_cpu(function: Function) -> Function:
    """Replace a CUDA ``device=`` by the CPU. Device ordinals, which are integers, mean CUDA too."""

    @functools.wraps(function)
    def wrapper(*args: object, **kwargs: object) -> object:
        kwargs.pop("pin_memory", None)  # which is for copies to a GPU
        device = kwargs.get("device")
        if device is not None and (_is_cuda(device) or type(device) is int):
            kwargs["device"] = _CPU
        return function(*args, **kwargs)

    return wrapper


def redirect() -> None:
    """Tensor factories, ``.cuda()``, ``.to()`` and the like, for the whole process."""
    # A TorchFunctionMode would be shorter, but it is inactive in autograd's threads, where recomputation runs.
    # `with torch.device(...)` compares the factories by identity: let it remember the real ones (it caches them), or it
    # has no effect any more, and transformers, which builds on "meta", then leaves its rotary buffers uninitialised.
    _device_constructors()
    with torch.device("cpu"):
        torch.empty(0)
    for name in _FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    for name in _METHODS:
        setattr(torch.Tensor, name, _on_cpu(getattr(torch.Tensor, name)))
    convert: Function = torch.Tensor.to
    type_name: Function = torch.Tensor.type

    def to(self: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        if args and (_is_cuda(args[0]) or type(args[0]) is int):
            args = (_CPU, *args[1:])
        return convert(self, *args, **kwargs)

    def cuda(self: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        return self

    def tensor_type(self: torch.Tensor, *args: object, **kwargs: object) -> object:
        answer = type_name(self, *args, **kwargs)
        # Megatron's optimizers distinguish precisions by this string.
        return answer.replace("torch.", "torch.cuda.", 1) if isinstance(answer, str) else answer

    torch.Tensor.to, torch.Tensor.cuda, torch.Tensor.type = to, cuda, tensor_type  # type: ignore[method-assign, assignment]
    torch.nn.Module.cuda = lambda self, device=None: self  # type: ignore[method-assign]
