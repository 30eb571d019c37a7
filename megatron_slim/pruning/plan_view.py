"""A plan as numbers: what stays, what goes, and what was lost by it (no torch).

`summary` is the JSON of megatron-slim show-plan, `ranking_lines` its ranking of experts; `plan_tables` and
`plan_plots` show them. Everything that is ranked is an `Axis`; a further one is an entry in `ranked_axes`, a row and a
curve.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from megatron_slim.aliases import JsonObject
from megatron_slim.architecture import feed_forward, prunable
from megatron_slim.architecture.kinds import FEED_FORWARD, KINDS
from megatron_slim.architecture.shape import ModelShape
from megatron_slim.architecture.table import BF16_BYTES, count_parameters
from megatron_slim.errors import PlanError
from megatron_slim.pruning import report
from megatron_slim.pruning.experts import ExpertGroup, Vector, ranking
from megatron_slim.pruning.statistics import (
    LAYER_KINDS,
    Statistics,
    axis_key,
    hidden_key,
    importance_key,
    layer_key,
)

if TYPE_CHECKING:
    from megatron_slim.pruning.plan import Plan

HIDDEN, EXPERTS = prunable.HIDDEN.noun, feed_forward.EXPERTS.noun
STREAM = "residual stream"


@dataclass(frozen=True)
class Axis:
    """What one ranking kept, in one place of the model.

    Attributes:
        name: of the axis.
        place: where it was ranked: a block of the source, or `STREAM`.
        size: how many there were.
        kept: indices of the survivors, ascending.
        importance: [size], what ranked them; None without statistics.
    """

    name: str
    place: str
    size: int
    kept: tuple[int, ...]
    importance: Vector | None

    @property
    def order(self) -> list[int]:
        """Indices from the most important to the least; ascending without statistics."""
        return list(range(self.size)) if self.importance is None else ranking(self.importance).tolist()

    @property
    def least_kept(self) -> int | None:
        """The least important survivor, None without statistics."""
        kept = set(self.kept)
        return None if self.importance is None else next((i for i in reversed(self.order) if i in kept), None)

    @property
    def most_dropped(self) -> int | None:
        """The most important of those that went, None without statistics or where nothing went."""
        kept = set(self.kept)
        return None if self.importance is None else next((i for i in self.order if i not in kept), None)

    @property
    def importance_share(self) -> float | None:
        """Share of the importance of all that the survivors had."""
        return share(self.importance, self.kept)


def share(values: Vector | None, kept: Sequence[int]) -> float | None:
    """Sum over the kept ones of the sum over all; None where that is not a number.

    >>> share(np.array([1.0, 2.0, 5.0]), [1, 2])
    0.875
    """
    total = 0.0 if values is None else float(values.sum())
    return None if values is None or total <= 0 else float(values[list(kept)].sum()) / total


@dataclass(frozen=True)
class BlockExperts:
    """What became of the experts of one block.

    Attributes:
        axis: the ranking.
        groups: the survivors and what is merged into them.
        routing_share: share of all routed (token, expert) pairs that went to experts that survive.
    """

    axis: Axis
    groups: tuple[ExpertGroup, ...]
    routing_share: float | None

    @property
    def unchanged(self) -> int:
        """Survivors that are copies of what they were."""
        return sum(len(group.members) == 1 for group in self.groups)

    @property
    def absorbed(self) -> int:
        """Experts merged into a survivor."""
        return sum(len(group.members) - 1 for group in self.groups)

    @property
    def dropped(self) -> int:
        """Experts of which nothing is left."""
        return self.axis.size - len(self.groups) - self.absorbed

    @property
    def largest_group(self) -> int:
        """Most experts that one survivor is made of."""
        return max(len(group.members) for group in self.groups)


def check_statistics(plan: Plan, stats: Statistics, *, where: str) -> None:
    """Refuse statistics that a plan does not follow from.

    Raises:
        PlanError: they are others.
        CheckpointError: they are not complete for the plan's source.
    """
    if stats.sha256 != plan.stats_sha256:
        raise PlanError(
            f"the plan follows from other statistics (sha256 {plan.stats_sha256}, these have {stats.sha256})",
            where=where,
            fix="give those that it was made from",
        )
    stats.check(plan.source_shape, plan.source_sha256, where=where)


def _vector(stats: Statistics | None, key: str) -> Vector | None:
    """None without statistics, and of statistics that have no such thing."""
    values = None if stats is None else stats.tensors.get(key)
    return None if values is None else values.astype(np.float64)


def _scalar(stats: Statistics | None, key: str) -> float | None:
    return None if stats is None else float(stats.tensors[key])


def ranked_axes(plan: Plan, stats: Statistics | None) -> list[Axis]:
    """Every ranking of a plan, those of one axis one after the other."""
    hidden = _vector(stats, hidden_key(plan.recipe.width.importance))
    stream = Axis(HIDDEN, STREAM, plan.source_shape.hidden_size, plan.kept_hidden, hidden)
    return [stream, *(block.axis for block in block_experts(plan, stats)), *_inner_axes(plan, stats)]


def _inner_axes(plan: Plan, stats: Statistics | None) -> Iterator[Axis]:
    """FFN neurons and heads, where some go; neurons of all surviving experts of a block are one place."""
    shape, of_experts = plan.source_shape, feed_forward.EXPERT_NEURONS
    for block, experts in plan.inner.neurons.items():
        width, bases = getattr(shape, of_experts.field), [group.base for group in plan.experts[block]]
        kept = tuple(number * width + neuron for number, neurons in enumerate(experts) for neuron in neurons)
        measured = _vector(stats, axis_key(block, of_experts))
        importance = None if measured is None else measured[bases].reshape(-1)
        yield Axis(of_experts.noun, block, len(bases) * width, kept, importance)
    for axis in (kind.neurons for kind in FEED_FORWARD.values()):
        for block, neurons in getattr(plan.inner, axis.key).items():
            measured = _vector(stats, axis_key(block, axis))
            yield Axis(axis.noun, block, getattr(shape, axis.field), neurons, measured)
    for name, of_heads in ((kind.name, kind.heads) for kind in KINDS.values()):
        for block, heads in plan.inner.heads.items():
            if shape.layer_type(block) == name:
                size = getattr(shape, of_heads.field)
                yield Axis(of_heads.noun, block, size, heads, _vector(stats, axis_key(block, of_heads)))


def block_experts(plan: Plan, stats: Statistics | None) -> list[BlockExperts]:
    """What became of the experts, of every surviving block that has some in the source's order, the MTP block last."""
    found = []
    for block, groups in plan.experts.items():
        kept = tuple(group.base for group in groups)
        importance = _vector(stats, importance_key(block, plan.recipe.experts.importance))
        axis = Axis(EXPERTS, block, plan.source_shape.in_block(block).num_moe_experts, kept, importance)
        found.append(BlockExperts(axis, groups, share(_vector(stats, importance_key(block, "frequency")), kept)))
    return found


def dropped_layers(plan: Plan) -> list[int]:
    """Source layers that go, ascending."""
    return sorted(set(range(plan.source_shape.num_layers)) - set(plan.kept_layers))


def depth_reason(plan: Plan, stats: Statistics | None) -> str:
    """Why these layers go, in a sentence."""
    dropped, method = dropped_layers(plan), plan.recipe.depth.method
    if not dropped:
        return "all layers stay"
    count = f"{len(dropped)} of {plan.source_shape.num_layers} layers are removed"
    if method == "last":
        return f"{count}: the last ones"
    if method == "adjacent_cosine":
        rest = "the source's pattern" if plan.recipe.depth.pattern == "source" else "a full-attention layer"
        return f"{count}: {_reason_of_a_run(dropped[0], len(plan.kept_layers), stats, rest)}"
    pattern = " in sum that leave the source's pattern" if plan.recipe.depth.pattern == "source" else ""
    if stats is None:
        return f"{count}: those of the least block influence{pattern}"
    influence = [
        float(stats.tensors[layer_key(f"model.layers.{i}", method)]) for i in range(plan.source_shape.num_layers)
    ]
    if pattern:
        sums = f"{sum(influence[i] for i in dropped):.4g} of {sum(influence):.4g}"
        return f"{count}: those of the least block influence{pattern} ({sums})"
    most, least = max(influence[i] for i in dropped), min(influence[i] for i in plan.kept_layers)
    if most > least:
        kept = f"layer {influence.index(least)} ({least:.4g}), which is left for its full attention"
        return f"{count}: those of the least block influence (at most {most:.4g}) but {kept}"
    return f"{count}: those of the least block influence (at most {most:.4g}; the others have at least {least:.4g})"


def _reason_of_a_run(first: int, starts: int, stats: Statistics | None, left: str) -> str:
    """Why a run of layers goes that begins with ``first``, of 1 to ``starts``; ``left`` says what has to be left."""
    if stats is None:
        return f"in a row from layer {first}, whose input and output are most alike"
    cosines = [float(stats.tensors[layer_key(f"model.layers.{i}", "cosine")]) for i in range(1, starts + 1)]
    own = cosines[first - 1]
    rest = f" of the runs that leave {left}" if max(cosines) > own else ""
    return f"in a row from layer {first}, whose input and output are most alike (cosine {own:.4f}){rest}"


def ranking_lines(plan: Plan, stats: Statistics) -> Iterator[str]:
    """The ranking of the experts, a line of JSON for every expert of every surviving block; see docs/plans.md."""
    for block in block_experts(plan, stats):
        importance = block.axis.importance
        assert importance is not None
        kept = set(block.axis.kept)
        merged = {member: group.base for group in block.groups for member in group.members if member != group.base}
        for rank, expert in enumerate(block.axis.order, start=1):
            line = {
                "block": block.axis.place,
                "expert": expert,
                "rank": rank,
                "importance": float(importance[expert]),
                "kept": expert in kept,
                "merged_into": merged.get(expert),
            }
            yield json.dumps(line, allow_nan=False) + "\n"


def _axis_numbers(axis: Axis) -> JsonObject:
    """An axis as numbers: how many survive, what share of the importance, and those next to the cut."""
    numbers = {"size": axis.size, "kept": len(axis.kept), "importance_share": axis.importance_share}
    return {**numbers, "least_kept": _at(axis, axis.least_kept), "most_dropped": _at(axis, axis.most_dropped)}


def _at(axis: Axis, index: int | None) -> JsonObject | None:
    if axis.importance is None or index is None:
        return None
    return {"index": index, "importance": float(axis.importance[index])}


def _sizes(shape: ModelShape) -> report.Summary:
    return report.summarise(shape, count_parameters(shape).total * BF16_BYTES)


def summary(plan: Plan, stats: Statistics | None) -> JsonObject:
    """All numbers of the tables, for ``--json``; what only statistics show is null without them."""
    return {
        "plan_sha256": plan.sha256,
        "source_sha256": plan.source_sha256,
        "stats_sha256": plan.stats_sha256,
        "recipe": plan.recipe.to_dict(),
        "before": _sizes(plan.source_shape),
        "after": _sizes(plan.target_shape),
        "depth_reason": depth_reason(plan, stats),
        "dropped_layers": [
            {"layer": layer, "type": plan.source_shape.layer_types[layer]}
            | {kind: _scalar(stats, layer_key(f"model.layers.{layer}", kind)) for kind in LAYER_KINDS}
            for layer in dropped_layers(plan)
        ],
        "axes": [
            {"axis": axis.name, "place": axis.place, **_axis_numbers(axis)}
            for axis in ranked_axes(plan, stats)
            if axis.name != EXPERTS
        ],
        "experts": [
            {
                "block": block.axis.place,
                **_axis_numbers(block.axis),
                "unchanged": block.unchanged,
                "absorbed": block.absorbed,
                "dropped": block.dropped,
                "largest_group": block.largest_group,
                "routing_share": block.routing_share,
            }
            for block in block_experts(plan, stats)
        ],
    }
