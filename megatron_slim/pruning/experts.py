"""Which experts survive, and which of the others are merged into them (SlimQwen 3.2, algorithm 1)."""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal

import numpy as np
import numpy.typing as npt

from megatron_slim.recipe_sections import Experts

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

    With ``recipe.num_groups`` N, the experts are N runs of equal length by index, as expert-parallel ranks hold them.
    Each keeps an N-th of the survivors, the most important of its own, and merges only within itself: no expert, and
    no weight of one, leaves its run. The share that is preserved is taken of a run's survivors.

    Args:
        importance: [expert], not negative.
        similarity: [expert, expert] cosines; needed unless the method is ``prune``.
        num_survivors: N~, experts of the target; like their number in the source, a multiple of ``num_groups``.
        recipe: method, share of survivors left untouched, weighting, number of runs.
    """
    runs = recipe.num_groups
    assert not len(importance) % runs and not num_survivors % runs, "check_recipe refuses that"
    length, found = len(importance) // runs, []
    for first in range(0, len(importance), length):
        run = slice(first, first + length)
        near = None if similarity is None else similarity[run, run]
        members = _members(importance[run], near, num_survivors // runs, recipe)
        for base in sorted(members):
            experts = [first + expert for expert in sorted(members[base])]
            found.append(_group(first + base, experts, importance, recipe.weighting))
    return tuple(found)


def _members(
    importance: Vector, similarity: Vector | None, num_survivors: int, recipe: Experts
) -> dict[int, list[int]]:
    """The survivors, and what each is made of: itself first."""
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
    return members


def _group(base: int, members: list[int], importance: Vector, weighting: str) -> ExpertGroup:
    here = np.asarray(importance[members], dtype=np.float64)
    if not here.any():
        weights = np.full(len(members), 1 / len(members))
    elif weighting == "pairwise":
        weights = pairwise_weights(here, members.index(base))
    else:
        weights = here / float(here.sum())
    return ExpertGroup(base, tuple(members), tuple(weights.tolist()))


def pairwise_weights(importance: Vector, base: int) -> Vector:
    """Weights of a group's members when they are merged into its base one after the other (SlimQwen eq. 9).

    The equation merges one expert i into a base m: E_m <- I_m/(I_m+I_i) E_m + I_i/(I_m+I_i) E_i. For a larger group it
    is applied to each in turn, ascending by index, and I_m stays the base's own importance: were it the sum of what
    has been merged so far, the steps would give the importance-weighted mean, which is the form ``group``. So the last
    to come keeps all of I_i/(I_m+I_i), and what came before shrinks by I_m/(I_m+I_i). Two members weigh as in
    ``group``, bit for bit.

    Args:
        importance: [member], of the members by ascending index; the base's is positive.
        base: position of the base among them.

    >>> pairwise_weights(np.array([2.0, 6.0, 2.0]), base=1)  # [1/4, 3/4, 0], then 3/4 of that and 1/4 for the last
    array([0.1875, 0.5625, 0.25  ])
    """
    weights = np.zeros(len(importance))
    weights[base] = 1.0
    for member, own in enumerate(importance):
        if member != base:
            total = importance[base] + own
            weights *= importance[base] / total
            weights[member] = own / total
    return weights
