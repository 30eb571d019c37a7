"""Optimizers and what one costs: one dictionary that everybody reads (imports no torch)."""

from __future__ import annotations

from dataclasses import dataclass

MAIN_COPY = 4  # bytes of a parameter: the fp32 copy of a 16-bit weight, whatever the optimizer
_AROUND = 4 + 2 * 4 + 2  # bytes that every step moves: of gradient, main copy, and weight


@dataclass(frozen=True)
class Optimizer:
    """One optimizer.

    Attributes:
        states: its tensors of the size of a parameter, by the names that checkpoints have for them; all are fp32. Of an
            optimizer of matrices they are those of a matrix; the rest has Adam's.
        traffic: bytes of a parameter that a step reads and writes: gradient, main copy, states, and the weight.
        polar_steps: steps of a polar iteration for every matrix, each a few products; 0 without matrices.
    """

    states: tuple[str, ...]
    traffic: int
    polar_steps: int = 0

    @property
    def state_bytes(self) -> int:
        """Bytes of a parameter, main copy left out."""
        return 4 * len(self.states)

    @property
    def has_matrices(self) -> bool:
        """Whether it updates whole matrices, and what is none with AdamW."""
        return self.polar_steps > 0

    @property
    def is_scale_invariant(self) -> bool:
        """Whether its update has full size however small a gradient is, and whatever weighs the loss."""
        return self.has_matrices

    def checkpoint_bytes(self, width: int) -> int:
        """Bytes of a parameter in a checkpoint of training whose weights have ``width``: weight, main copy, states.

        In a checkpoint Megatron has a main copy of fp32 weights too.
        """
        return width + MAIN_COPY + self.state_bytes


ADAM, MUON, AURORA = "adam", "muon", "aurora"
MOMENTUM = "momentum_buffer"  # the state of a matrix
SECOND_MOMENT = "exp_avg_sq"  # next to it, where some of a parameter is not updated as a matrix
OPTIMIZERS = {
    ADAM: Optimizer(states=("exp_avg", SECOND_MOMENT), traffic=_AROUND + 2 * 8),
    MUON: Optimizer(states=(MOMENTUM,), traffic=_AROUND + 8, polar_steps=5),
    # Two polar factors of twelve steps, where none converges before.
    AURORA: Optimizer(states=(MOMENTUM,), traffic=_AROUND + 8, polar_steps=24),
}


def is_scale_invariant(name: str) -> bool:
    """Whether the optimizer of this name moves weights as far however small their gradients are.

    >>> is_scale_invariant("adam"), is_scale_invariant("aurora")
    (False, True)
    """
    return OPTIMIZERS[name].is_scale_invariant
