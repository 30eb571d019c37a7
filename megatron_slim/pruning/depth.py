"""Depth: which layers survive, and what is known of it before anything is measured.

transformers cannot run a model without a full-attention layer. Statistics may favour a choice that leaves none; of the
choices that leave one the best is taken then, so that what `possible_types` allows before calibration is never refused
after it.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from megatron_slim.architecture.shape import FULL_ATTENTION, LINEAR_ATTENTION, ModelShape
from megatron_slim.pruning import statistics
from megatron_slim.pruning.experts import ranking
from megatron_slim.pruning.statistics import Statistics
from megatron_slim.recipe import Recipe


def possible_types(recipe: Recipe, shape: ModelShape, layers: int) -> Iterator[tuple[str, ...]]:
    """Layer types that the method can leave; where it can leave any choice, up to their order, full attention first."""
    dropped, types = shape.num_layers - layers, shape.layer_types
    if recipe.depth.method == "block_influence" and dropped:
        full = types.count(FULL_ATTENTION)
        for count in range(max(0, full - dropped), min(full, layers) + 1):
            yield (FULL_ATTENTION,) * count + (LINEAR_ATTENTION,) * (layers - count)
        return
    starts = [layers] if recipe.depth.method == "last" or not dropped else range(1, layers + 1)
    yield from (types[:start] + types[start + dropped :] for start in starts)


def layers_before_statistics(shape: ModelShape, layers: int) -> tuple[int, ...]:
    """Source layers to count with where statistics choose them: the first ones, one of full attention among them."""
    first = tuple(range(layers))
    if any(shape.layer_types[layer] == FULL_ATTENTION for layer in first):
        return first
    return (*first[:-1], shape.layer_types.index(FULL_ATTENTION))


def kept_layers(recipe: Recipe, stats: Statistics, shape: ModelShape) -> tuple[int, ...]:
    """SlimQwen 3.2 (``last``) and A.4 (``adjacent_cosine``); ShortGPT, arXiv 2403.03853 (``block_influence``).

    A.4 drops the N consecutive layers from argmax c_l, c_l = cos(a_{l-1}, a_l), among the starts that have both a layer
    before them and N layers to drop. ShortGPT drops the N layers of the least influence, ties by index: the later one.
    Both as far as a full-attention layer is left; for ShortGPT the most influential one stays in place of the least
    influential survivor.
    """
    kept = recipe.target.num_layers or shape.num_layers
    if kept == shape.num_layers or recipe.depth.method == "last":
        return tuple(range(kept))
    if recipe.depth.method == "block_influence":
        return _most_influential(stats, shape, kept)
    return _around_the_most_redundant(stats, shape, kept)


def _most_influential(stats: Statistics, shape: ModelShape, kept: int) -> tuple[int, ...]:
    blocks = list(shape.blocks)[: shape.num_layers]
    influence = [float(stats.tensors[statistics.layer_key(block, "block_influence")]) for block in blocks]
    ranked = ranking(np.array(influence)).tolist()
    chosen = ranked[:kept]
    if not any(shape.layer_types[layer] == FULL_ATTENTION for layer in chosen):
        chosen[-1] = next(layer for layer in ranked if shape.layer_types[layer] == FULL_ATTENTION)
    return tuple(sorted(chosen))


def _around_the_most_redundant(stats: Statistics, shape: ModelShape, kept: int) -> tuple[int, ...]:
    dropped, blocks = shape.num_layers - kept, list(shape.blocks)
    choices = [
        tuple(layer for layer in range(shape.num_layers) if not start <= layer < start + dropped)
        for start in range(1, kept + 1)
    ]
    cosines = [float(stats.tensors[statistics.layer_key(block, "cosine")]) for block in blocks[1 : kept + 1]]
    possible = [
        number
        for number, layers in enumerate(choices)
        if any(shape.layer_types[layer] == FULL_ATTENTION for layer in layers)
    ]
    return choices[max(possible or range(kept), key=lambda number: cosines[number])]
