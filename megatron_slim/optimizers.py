"""Optimizers and what one costs: one dictionary that everybody reads (imports no torch)."""

from __future__ import annotations

from dataclasses import dataclass

MAIN_COPY = 4  # bytes of a parameter: the fp32 copy of a 16-bit weight, whatever the optimizer


@dataclass(frozen=True)
class Optimizer:
    """One optimizer.

    Attributes:
        states: its tensors of the size of a parameter, by the names that checkpoints have for them; all are fp32.
        traffic: bytes of a parameter that a step reads and writes: gradient, main copy, states, and the weight.
    """

    states: tuple[str, ...]
    traffic: int

    @property
    def state_bytes(self) -> int:
        """Bytes of a parameter, main copy left out."""
        return 4 * len(self.states)

    def checkpoint_bytes(self, width: int) -> int:
        """Bytes of a parameter in a checkpoint of training whose weights have ``width``: weight, main copy, states.

        In a checkpoint Megatron has a main copy of fp32 weights too.
        """
        return width + MAIN_COPY + self.state_bytes


ADAM = "adam"
OPTIMIZERS = {
    # Reads a gradient, reads and writes main copy and moments, writes the weight.
    ADAM: Optimizer(states=("exp_avg", "exp_avg_sq"), traffic=4 + 2 * 4 + 2 * 8 + 2),
}
