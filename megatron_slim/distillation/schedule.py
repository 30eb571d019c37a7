"""How the weights of the loss terms move over a run (SlimQwen, section 3.3): pure functions of progress."""

from __future__ import annotations

import math
from dataclasses import dataclass


def linear(start: float, end: float, progress: float) -> float:
    """Straight line from ``start`` at progress 0 to ``end`` at progress 1.

    >>> linear(1.0, 0.75, 0.5)
    0.875
    """
    return start + (end - start) * progress


def cosine(start: float, end: float, progress: float) -> float:
    """Half a cosine from ``start`` at progress 0 to ``end`` at progress 1.

    >>> round(cosine(0.3, 0.1, 0.5), 10)
    0.2
    """
    return end + (start - end) * 0.5 * (1.0 + math.cos(math.pi * progress))


SHAPES = {"linear": linear, "cosine": cosine, "constant": lambda start, end, progress: start}


@dataclass(frozen=True)
class Schedule:
    """One coefficient over a run: ``shape`` is a key of `SHAPES`."""

    shape: str
    start: float
    end: float

    def at(self, iteration: int, train_iters: int) -> float:
        """Value at a 0-based iteration; the last iteration of the run has exactly ``end``.

        Depends on nothing else, so a resumed run continues with the same values.

        >>> [Schedule("linear", 1.0, 0.75).at(i, 3) for i in range(3)]
        [1.0, 0.875, 0.75]
        """
        progress = min(1.0, iteration / (train_iters - 1)) if train_iters > 1 else 0.0
        return SHAPES[self.shape](self.start, self.end, progress)
