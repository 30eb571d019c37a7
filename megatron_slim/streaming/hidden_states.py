"""The hidden states of all samples between two modules: in memory, or in files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from megatron_slim.streaming.work_dir import WorkDir


class HiddenStates(Protocol):
    """Micro-batches [samples, positions, hidden], which a module's output replaces one after the other."""

    def load(self, batch: int) -> Tensor:
        """A micro-batch; of what came before the next module until `turn`."""

    def store(self, output: Tensor) -> None:
        """What became of the next micro-batch."""

    def turn(self) -> None:
        """Everything has gone through a module."""

    def commit(self, measured: Mapping[str, Tensor]) -> None:
        """The module is done with; ``measured`` is what a run that resumes from here must know."""


class InMemory:
    """Hidden states that take memory once: an output takes the place of its input."""

    def __init__(self, nbytes: int, device: torch.device) -> None:
        """Keep them on a GPU where they take less than half of what is free there, else in the host's memory."""
        fits = device.type == "cuda" and 2 * nbytes < torch.cuda.mem_get_info(device)[0]
        self._device = device if fits else torch.device("cpu")
        self._batches: list[Tensor] = []
        self._next = 0

    def load(self, batch: int) -> Tensor:
        """A micro-batch."""
        return self._batches[batch]

    def store(self, output: Tensor) -> None:
        """Replace the next micro-batch, in its own memory if it has the same shape."""
        if self._next == len(self._batches):
            self._batches.append(torch.empty(0))
        if self._batches[self._next].shape == output.shape:
            self._batches[self._next].copy_(output)
        else:
            self._batches[self._next] = output.to(self._device).contiguous()
        self._next += 1

    def turn(self) -> None:
        """Start from the first micro-batch."""
        self._next = 0

    def commit(self, measured: Mapping[str, Tensor]) -> None:
        """Nothing outlives this process."""


class InFiles:
    """Hidden states in a work directory; one micro-batch of them is in memory."""

    def __init__(self, work: WorkDir, hidden_size: int, micro_batch: int, samples: int, dtype: torch.dtype) -> None:
        self._work, self._dtype = work, dtype
        self._hidden_size, self._micro_batch, self._samples = hidden_size, micro_batch, samples

    def load(self, batch: int) -> Tensor:
        """A micro-batch, read from its file."""
        samples = min(self._micro_batch, self._samples - batch * self._micro_batch)
        return self._work.read(batch, self._dtype).view(samples, -1, self._hidden_size)

    def store(self, output: Tensor) -> None:
        """Append to the file of the module's outputs."""
        self._work.write(output.cpu())

    def turn(self) -> None:
        """The outputs are what is read from now on."""
        self._work.turn()

    def commit(self, measured: Mapping[str, Tensor]) -> None:
        """Make this the state to resume from."""
        self._work.commit(measured)
