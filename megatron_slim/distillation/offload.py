"""A frozen model's weights in host memory while nothing computes with them."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn


def on_host(tensor: Tensor) -> Tensor:
    """A copy in host memory, page-locked on CUDA: on its way there when this returns, in the order of the stream."""
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=tensor.is_cuda)
    return copy.copy_(tensor.detach(), non_blocking=True)


class OffloadedWeights:
    """Parameters that are on the device only between `load` and `drop`; they must not change meanwhile."""

    def __init__(self, model: nn.Module, *, but: Iterable[nn.Module] = ()) -> None:
        """Copy the parameters of ``model``, except those of the modules ``but``, and take them off the device."""
        stay = {id(parameter) for module in but for parameter in module.parameters()}
        away = [parameter for parameter in model.parameters() if id(parameter) not in stay]
        self._device = away[0].device if away else torch.device("cpu")
        self._pairs = [(parameter, on_host(parameter)) for parameter in away]
        self._loaded = True
        self.drop()

    @property
    def nbytes(self) -> int:
        """Bytes that are away."""
        return sum(host.nbytes for _, host in self._pairs)

    def load(self) -> None:
        """Put them on the device; on CUDA in the order of the current stream."""
        if not self._loaded:
            for parameter, host in self._pairs:
                parameter.data = torch.empty_like(host, device=self._device).copy_(host, non_blocking=True)
        self._loaded = True

    def drop(self) -> None:
        """Free what they take on the device."""
        if self._loaded:
            for parameter, host in self._pairs:
                parameter.data = host
        self._loaded = False
