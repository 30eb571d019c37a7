"""Depth: which layers survive, and what is known of it before anything is measured.

transformers cannot run a model without a full-attention layer, and one without experts is none of ours. Statistics may
favour a choice that leaves none; of the choices that leave one the best is taken then, so that what `possible_depths`
allows before calibration is never refused after it.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from megatron_slim.aliases import Keywords
from megatron_slim.architecture.family import DENSE, FULL_ATTENTION, MOE
from megatron_slim.architecture.shape import ModelShape
from megatron_slim.pruning import statistics
from megatron_slim.pruning.experts import ranking
from megatron_slim.pruning.statistics import Statistics
from megatron_slim.recipe import Recipe
from megatron_slim.recipe_sections import Depth as DepthSection

Depth = tuple[tuple[str, str], ...]  # `ModelShape.sublayers` of the layers that are left


def is_whole(depth: Iterable[tuple[str, str]]) -> bool:
    """Whether some layer is of full attention, and some layer has experts."""
    kinds = {kind for sublayers in depth for kind in sublayers}
    return {FULL_ATTENTION, MOE} <= kinds


def layer_fields(depth: Depth) -> Keywords:
    """The fields of a shape that say which layers it has."""
    dense = sum(feed_forward == DENSE for _, feed_forward in depth)
    return {"num_layers": len(depth), "layer_types": tuple(kind for kind, _ in depth), "num_dense_layers": dense}


def depth_of(shape: ModelShape, layers: Iterable[int]) -> Depth:
    """What some layers of a model are."""
    return tuple(shape.sublayers[layer] for layer in layers)


def nests(depth: DepthSection) -> bool:
    """Whether the layers that are left of a smaller number are always among those of a larger one."""
    return depth.method == "last" or (depth.method == "block_influence" and depth.pattern == "any")


def possible_depths(recipe: Recipe, shape: ModelShape, layers: int) -> Iterator[Depth]:
    """What the method can leave; where it can leave any choice, in one order: dense layers, then full attention."""
    dropped, depth = shape.num_layers - layers, shape.sublayers
    if recipe.depth.pattern == "source":
        yield depth[:layers]
        return
    if recipe.depth.method == "block_influence" and dropped:
        counts = Counter(depth)
        kinds = sorted(counts, key=lambda each: (each[1] != DENSE, each[0] != FULL_ATTENTION))
        for kept in itertools.product(*(range(min(counts[kind], layers) + 1) for kind in kinds)):
            if sum(kept) == layers:
                yield tuple(kind for kind, count in zip(kinds, kept, strict=True) for _ in range(count))
        return
    starts = [layers] if recipe.depth.method == "last" or not dropped else range(1, layers + 1)
    yield from (depth[:start] + depth[start + dropped :] for start in starts)


def layers_before_statistics(shape: ModelShape, layers: int) -> tuple[int, ...]:
    """Source layers to count with where statistics choose them: the first ones, as far as `is_whole` holds of them."""
    return _whole(shape, list(range(shape.num_layers)), layers)


def kept_layers(
    recipe: Recipe, stats: Statistics, shape: ModelShape, within: Sequence[int] | None = None
) -> tuple[int, ...]:
    """SlimQwen 3.2 (``last``) and A.4 (``adjacent_cosine``); ShortGPT, arXiv 2403.03853 (``block_influence``).

    A.4 drops the N consecutive layers from argmax c_l, c_l = cos(a_{l-1}, a_l), among the starts that have both a layer
    before them and N layers to drop. ShortGPT drops the N layers of the least influence, ties by index: the later one.
    Both as far as `is_whole` holds of what is left; for ShortGPT the most influential layer that it lacks stays in
    place of the least influential survivor.

    With ``pattern: source`` the kinds of what is left are those of the first layers. A.4 then has fewer starts, and
    ShortGPT's layers are those of the largest sum of influence.

    Args:
        recipe: its target says how many survive.
        stats: complete statistics of the source; not read for ``last``.
        shape: sizes of the source.
        within: the layers that there are to choose from, as if they were the model: A.4 drops consecutive ones of them.
            None: all. Where they leave no choice, all are, and the caller finds that the result is not within them.
    """
    kept = recipe.target.num_layers or shape.num_layers
    everything = tuple(range(shape.num_layers))
    if kept == shape.num_layers:
        return everything
    choose = _first
    if recipe.depth.method != "last":
        choose = _most_influential if recipe.depth.method == "block_influence" else _around_the_most_redundant
    wanted = shape.sublayers[:kept] if recipe.depth.pattern == "source" else None
    given = everything if within is None or len(within) < kept else tuple(within)
    return choose(stats, shape, given, kept, wanted) or choose(stats, shape, everything, kept, wanted)


def _whole(shape: ModelShape, ranked: Sequence[int], kept: int) -> tuple[int, ...]:
    """The first of some layers; another in the last one's place where `is_whole` does not hold of them."""
    first = list(ranked[:kept])
    if not is_whole(depth_of(shape, first)):
        others = (layer for layer in ranked[kept:] if is_whole(depth_of(shape, [*first[:-1], layer])))
        first[-1] = next(others, first[-1])
    return tuple(first)


# What a method keeps of the layers given; empty where they leave no choice. Where kinds are wanted, it has those.


def _first(
    stats: Statistics, shape: ModelShape, given: Sequence[int], kept: int, wanted: Depth | None
) -> tuple[int, ...]:
    if wanted is None:
        first = tuple(given[:kept])
        return first if first == tuple(range(kept)) else tuple(sorted(_whole(shape, given, kept)))
    return _in_pattern([0.0] * shape.num_layers, shape.sublayers, wanted, given)


def _most_influential(
    stats: Statistics, shape: ModelShape, given: Sequence[int], kept: int, wanted: Depth | None
) -> tuple[int, ...]:
    blocks = list(shape.blocks)[: shape.num_layers]
    influence = [float(stats.tensors[statistics.layer_key(block, "block_influence")]) for block in blocks]
    if wanted is not None:
        return _in_pattern(influence, shape.sublayers, wanted, given)
    ranked = [layer for layer in ranking(np.array(influence)).tolist() if layer in given]
    return tuple(sorted(_whole(shape, ranked, kept)))


def _in_pattern(influence: Sequence[float], kinds: Depth, wanted: Depth, given: Sequence[int]) -> tuple[int, ...]:
    """Of the layers given, those of the largest sum of influence whose kinds are the wanted ones in their order.

    Ties: the earlier; empty: there is no such choice. For every number of wanted layers, the best choice among the
    layers that were looked at so far.
    """
    choices: list[tuple[float, tuple[int, ...]]] = [(0.0, ()), *[(-math.inf, ())] * len(wanted)]
    for layer in given:
        for place in range(len(wanted), 0, -1):
            total, layers = choices[place - 1]
            if kinds[layer] == wanted[place - 1] and total + influence[layer] > choices[place][0]:
                choices[place] = (total + influence[layer], (*layers, layer))
    return choices[-1][1]


def _around_the_most_redundant(
    stats: Statistics, shape: ModelShape, given: Sequence[int], kept: int, wanted: Depth | None
) -> tuple[int, ...]:
    dropped, blocks = len(given) - kept, list(shape.blocks)
    if not dropped:
        return tuple(given) if wanted in (None, depth_of(shape, given)) else ()
    choices = {
        given[start]: (*given[:start], *given[start + dropped :])
        for start in range(1, kept + 1)
        if is_whole(depth := depth_of(shape, (*given[:start], *given[start + dropped :]))) and wanted in (None, depth)
    }
    cosines = {first: float(stats.tensors[statistics.layer_key(blocks[first], "cosine")]) for first in choices}
    return choices[max(cosines, key=cosines.__getitem__)] if choices else ()
