"""Which experts survive, and which of the others are merged into them (SlimQwen 3.2, algorithm 1)."""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal

import numpy as np
import numpy.typing as npt

from megatron_slim.recipe import Experts

Vector = npt.NDArray[np.float64]


@dataclass(frozen=True)
class ExpertGroup:
    """One surviving expert and what it is made of.

    Attributes:
        base: index in the source of the expert whose place and router row survive.
        members: the source experts averaged into it, ascending, ``base`` among them.
        weights: their weights, summing to 1; a group of one is copied bit for bit.
    """

    base: int
    members: tuple[int, ...]
    weights: tuple[float, ...]


def ranking(importance: Vector) -> npt.NDArray[np.int64]:
    """Indices from the most important to the least; ties by index.

    >>> ranking(np.array([1.0, 3.0, 1.0, 2.0])).tolist()
    [1, 3, 0, 2]
    """
    return np.argsort(-importance, kind="stable")


def num_preserved(preserve: float, num_survivors: int) -> int:
    """floor(preserve * num_survivors), of the decimal that the recipe says.

    >>> num_preserved(0.29, 100)  # in binary floating point the product is 28.999999999999996
    29
    """
    return int(Decimal(repr(preserve)) * num_survivors)


def expert_groups(
    importance: Vector, similarity: Vector | None, num_survivors: int, recipe: Experts
) -> tuple[ExpertGroup, ...]:
    """Decide the surviving experts of one MoE block, ascending by base.

    Args:
        importance: [expert], not negative.
        similarity: [expert, expert] cosines; needed unless the method is ``prune``.
        num_survivors: N~, experts of the target.
        recipe: method and share of survivors left untouched.
    """
    order = ranking(importance)
    survivors, discarded = order[:num_survivors], np.sort(order[num_survivors:])
    members = {int(base): [int(base)] for base in survivors}
    if recipe.method != "prune" and len(discarded):
        assert similarity is not None
        untouched = num_preserved(recipe.preserve, num_survivors) if recipe.method == "partial_preservation" else 0
        bases = np.sort(survivors[untouched:])
        nearest = bases[np.argmax(similarity[np.ix_(discarded, bases)], axis=1)]
        for expert, base in zip(discarded.tolist(), nearest.tolist(), strict=True):
            members[base].append(expert)
    return tuple(_group(base, sorted(members[base]), importance) for base in sorted(members))


def _group(base: int, members: list[int], importance: Vector) -> ExpertGroup:
    weights = np.asarray(importance[members], dtype=np.float64)
    total = float(weights.sum())
    shares = weights / total if total > 0 else np.full(len(members), 1 / len(members))
    return ExpertGroup(base, tuple(members), tuple(shares.tolist()))
