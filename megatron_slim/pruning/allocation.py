"""How many experts each layer keeps under an exact total, by what pruning it costs (imports no torch).

Layers differ in how much they need their experts: at half of them, numbers chosen by loss keep what a uniform one loses
(RCO, arXiv 2605.00649, which optimises a mask). Here the loss is measured once per layer: `sensitivity` prunes the
experts of one layer alone, to the uniform number. How it falls with every expert more follows from what they are worth,

    loss_l(n) = loss_l(uniform) * dropped_l(n) / dropped_l(uniform)

where dropped_l(n) is the share of importance outside the n most important experts. Each curve is convex, so that giving
one expert after the other to the layer that gains most is the best allocation there is for the sum over layers. Single
measurements are noisy: no layer keeps less than `LEAST_SHARE` of the uniform number.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence

import numpy as np

from megatron_slim.pruning.experts import Vector

LEAST_SHARE = 0.5  # the published models of RCO at half of the experts keep at least 0.7


def least_experts(uniform: int, topk: int) -> int:
    """How many experts every layer keeps."""
    return max(topk, math.ceil(LEAST_SHARE * uniform))


def allocate(
    losses: Mapping[str, float],
    importance: Mapping[str, Vector],
    uniform: int,
    *,
    least: int,
    multiple: int = 1,
    most: Mapping[str, int] | None = None,
) -> dict[str, int]:
    """Numbers of experts by block, ``uniform`` on average and none below ``least``.

    Args:
        losses: what pruning the experts of one block alone to the uniform number adds to the loss, in nats per token;
            less than nothing counts as nothing.
        importance: of every expert of each of these blocks [experts].
        uniform: experts of a block on average, a multiple of ``multiple``.
        least: experts that each block keeps.
        multiple: all numbers are multiples of it.
        most: experts that a block may keep, where these are fewer than it has.

    Raises:
        ValueError: a loss is not a number, or there is no such allocation.

    >>> importance = {"a": np.ones(4), "b": np.ones(4)}
    >>> allocate({"a": 0.3, "b": 0.1}, importance, 2, least=1)
    {'a': 3, 'b': 1}
    """
    if not all(map(math.isfinite, losses.values())):
        raise ValueError(f"losses are not all numbers: {dict(losses)}")
    curves = {block: _curve(importance[block], max(0.0, loss), uniform) for block, loss in losses.items()}
    limits = {block: min(len(values), (most or {}).get(block, len(values))) for block, values in importance.items()}
    limits = {block: limit // multiple * multiple for block, limit in limits.items()}
    counts = dict.fromkeys(losses, -(-least // multiple) * multiple)
    left = uniform * len(losses) - sum(counts.values())
    gains = [(-_gain(curves[block], counts[block], multiple), order, block) for order, block in enumerate(losses)]
    heapq.heapify(gains)
    short = any(counts[block] > limit for block, limit in limits.items())
    if short or left < 0 or left % multiple or uniform * len(losses) > sum(limits.values()):
        raise ValueError(f"no numbers from {least} on, multiples of {multiple}, are {uniform} on average")
    while left > 0:
        _, order, block = heapq.heappop(gains)
        if counts[block] + multiple > limits[block]:
            continue
        counts[block] += multiple
        left -= multiple
        heapq.heappush(gains, (-_gain(curves[block], counts[block], multiple), order, block))
    return counts


def _curve(importance: Vector, loss: float, uniform: int) -> Vector:
    """The loss that n experts leave, for n from 0 on."""
    ordered = -np.sort(-importance)
    outside = ordered.sum() - np.concatenate(([0.0], np.cumsum(ordered)))
    outside = np.maximum(outside, 0.0)
    if uniform >= len(outside) or outside[uniform] <= 0:  # nothing of importance goes
        return np.zeros(len(outside))
    curve: Vector = loss * outside / outside[uniform]
    return curve


def _gain(curve: Vector, count: int, multiple: int) -> float:
    """What so many experts more are worth, each."""
    return float(curve[count] - curve[min(count + multiple, len(curve) - 1)]) / multiple


def violations(counts: Sequence[int], uniform: int, multiple: int) -> list[str]:
    """What is wrong with numbers of experts of the blocks that survive."""
    found = [f"{count} experts are not a multiple of {multiple}" for count in counts if count % multiple]
    if sum(counts) != uniform * len(counts):
        found.append(f"{sum(counts)} experts in {len(counts)} layers, not {uniform} on average")
    return found
