"""The axes inside a block: FFN neurons of its experts, and attention heads.

A plan has survivors of an axis only where the target is smaller than the source. Neurons have no place in common
between experts, nor heads between the groups that share a key: every expert and every group keeps its own best.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from megatron_slim.aliases import Document, JsonObject
from megatron_slim.architecture.feed_forward import DENSE_NEURONS, EXPERT_NEURONS
from megatron_slim.architecture.kinds import FEED_FORWARD, KINDS
from megatron_slim.architecture.prunable import Heads
from megatron_slim.architecture.shape import ModelShape
from megatron_slim.pruning import statistics
from megatron_slim.pruning.experts import ExpertGroup, Vector, ranking
from megatron_slim.pruning.statistics import Statistics

_BY_BLOCK = (*(kind.neurons.key for kind in FEED_FORWARD.values()), "heads")
OPTIONAL = (DENSE_NEURONS.key,)  # parts of a plan document that are there only where they say something


@dataclass(frozen=True)
class InnerAxes:
    """What survives inside the blocks, by their names in the source; indices ascending.

    Attributes:
        neurons: of each surviving expert, in order, the FFN neurons of its base; members that are merged into it give
            theirs at the same places, or those that match them (`align`). Empty: all survive, as in the others.
        shared_neurons: those of the shared expert.
        dense_neurons: those of a dense block.
        heads: query heads of full attention, value heads of linear attention; of every group equally many, or none of
            a group that goes with its key.
    """

    neurons: Mapping[str, tuple[tuple[int, ...], ...]] = field(default_factory=dict)
    shared_neurons: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    dense_neurons: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    heads: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def to_dict(self) -> JsonObject:
        """As parts of a plan document."""
        found: JsonObject = {"neurons": {block: list(map(list, experts)) for block, experts in self.neurons.items()}}
        for name in _BY_BLOCK:
            found[name] = {block: list(indices) for block, indices in getattr(self, name).items()}
        return {name: part for name, part in found.items() if part or name not in OPTIONAL}

    @classmethod
    def from_dict(cls, document: Document) -> InnerAxes:
        """From parts of a plan document that have no `violations`."""
        parts = {
            name: {block: tuple(indices) for block, indices in document.get(name, {}).items()} for name in _BY_BLOCK
        }
        return cls({block: tuple(map(tuple, experts)) for block, experts in document["neurons"].items()}, **parts)

    def kept(self, block: str, source: ModelShape, expert: int | None) -> dict[str, npt.NDArray[np.int64]]:
        """Survivors by axis, for `axes.kept_positions`; ``expert`` counts the surviving ones, None outside them."""
        found = {}
        if expert is not None and block in self.neurons:
            found[EXPERT_NEURONS.axis] = np.array(self.neurons[block][expert], dtype=np.int64)
        for neurons in (kind.neurons for kind in FEED_FORWARD.values()):
            if block in (kept := getattr(self, neurons.key)):
                found[neurons.axis] = np.array(kept[block], dtype=np.int64)
        if block in self.heads:
            axis = KINDS[source.layer_type(block)].heads
            groups, width = source.sizes[axis.group_axis], source.sizes[axis.axis]
            heads = np.array(self.heads[block], dtype=np.int64)
            kept = np.array(list(dict.fromkeys((heads // width).tolist())), dtype=np.int64)  # in order
            within = np.zeros((groups, len(heads) // len(kept)), dtype=np.int64)  # of groups that go, never read
            within[kept] = heads.reshape(len(kept), -1) % width
            found[axis.axis] = within
            if not np.array_equal(kept, np.arange(groups)):
                found[axis.group_axis] = kept
        return found


def choose(
    stats: Statistics,
    blocks: Iterable[str],
    experts: Mapping[str, tuple[ExpertGroup, ...]],
    source: ModelShape,
    target: ModelShape,
) -> InnerAxes:
    """Keep the most important neurons and heads.

    Args:
        stats: statistics of the source.
        blocks: those that survive.
        experts: surviving experts of those with experts.
        source: sizes of the source.
        target: sizes of the target.
    """

    def importance(key: str) -> Vector:
        return stats.tensors[key].astype(np.float64)

    neurons: dict[str, tuple[tuple[int, ...], ...]] = {}
    found: dict[str, dict[str, tuple[int, ...]]] = {name: {} for name in _BY_BLOCK}
    for block in blocks:
        if block in experts and pruned(EXPERT_NEURONS.field, source, target):
            of_expert, count = (
                importance(statistics.axis_key(block, EXPERT_NEURONS)),
                getattr(target, EXPERT_NEURONS.field),
            )
            neurons[block] = tuple(best(of_expert[each.base], count) for each in experts[block])
        kind = FEED_FORWARD[source.ffn_kind(block)]
        if pruned(kind.neurons.field, source, target):
            of_all = importance(statistics.axis_key(block, kind.neurons))
            found[kind.neurons.key][block] = best(of_all, getattr(target, kind.neurons.field))
        axis = KINDS[source.layer_type(block)].heads
        if has_fewer_heads(axis, source, target):
            of_heads = importance(statistics.axis_key(block, axis))
            found["heads"][block] = best_of_groups(
                of_heads, getattr(target, axis.field), source.sizes[axis.group_axis], getattr(target, axis.groups_field)
            )
    return InnerAxes(neurons, **found)


def pruned(size: str, source: ModelShape, target: ModelShape) -> bool:
    """Whether the target is smaller in a size."""
    return bool(getattr(target, size) < getattr(source, size))


def has_fewer_heads(axis: Heads, source: ModelShape, target: ModelShape) -> bool:
    """Whether the target has fewer heads of a kind, or fewer groups of them."""
    return pruned(axis.field, source, target) or pruned(axis.groups_field, source, target)


def best(importance: Vector, count: int) -> tuple[int, ...]:
    """The ``count`` most important indices, ascending; ties by index.

    >>> best(np.array([1.0, 3.0, 1.0, 2.0]), 3)
    (0, 1, 3)
    """
    return tuple(np.sort(ranking(importance)[:count]).tolist())


def best_of_groups(importance: Vector, count: int, groups: int, kept: int) -> tuple[int, ...]:
    """The same, equally many of each of the ``kept`` most important of some equal and contiguous groups.

    A group is as important as its members together.

    >>> best_of_groups(np.array([5.0, 4.0, 3.0, 0.0, 1.0, 2.0]), 4, groups=2, kept=2)
    (0, 1, 4, 5)
    >>> best_of_groups(np.array([0.0, 1.0, 2.0, 5.0, 4.0, 3.0]), 2, groups=2, kept=1)
    (3, 4)
    """
    each = importance.reshape(groups, -1)
    width = each.shape[1]
    survivors = best(each.sum(1), kept)
    return tuple(group * width + index for group in survivors for index in best(each[group], count // kept))


def violations(document: Document, blocks: Sequence[str], source: ModelShape, target: ModelShape) -> list[str]:
    """What is wrong with the parts of a plan document that `InnerAxes` holds, for these surviving blocks."""
    routed = set(source.routed_blocks)
    expected_of = {
        "neurons": [block for block in blocks if block in routed and pruned(EXPERT_NEURONS.field, source, target)],
        "heads": [b for b in blocks if has_fewer_heads(KINDS[source.layer_type(b)].heads, source, target)],
    }
    for kind, neurons in ((kind.name, kind.neurons) for kind in FEED_FORWARD.values()):
        here = [block for block in blocks if source.ffn_kind(block) == kind]
        expected_of[neurons.key] = here if pruned(neurons.field, source, target) else []
    found = []
    for name, expected in expected_of.items():
        part = document.get(name, {})
        if not isinstance(part, Mapping) or sorted(part) != sorted(expected):
            found.append(f"{name} are not given for exactly the blocks {', '.join(expected) or '(none)'}")
            continue
        for block in expected:
            experts = len(document["experts"][block]["kept"]) if block in routed else 0
            found += _block_violations(name, block, part[block], source, target, experts)
    return found


def _block_violations(
    name: str, block: str, value: object, source: ModelShape, target: ModelShape, experts: int
) -> Iterator[str]:
    if name == "neurons":
        if not isinstance(value, list) or len(value) != experts:
            yield f"neurons of {block} are not a list for each of {experts} experts"
            return
        for number, indices in enumerate(value):
            label = f"neurons of {block}, expert {number}"
            count, limit = getattr(target, EXPERT_NEURONS.field), getattr(source, EXPERT_NEURONS.field)
            yield from index_violations(label, indices, count, limit)
        return
    fields = {kind.neurons.key: kind.neurons.field for kind in FEED_FORWARD.values()}
    size = fields.get(name) or KINDS[source.layer_type(block)].heads.field
    label, count, limit = f"{name} of {block}", getattr(target, size), getattr(source, size)
    wrong = index_violations(label, value, count, limit)
    yield from wrong
    if name == "heads" and not wrong:
        axis = KINDS[source.layer_type(block)].heads
        groups, kept = source.sizes[axis.group_axis], getattr(target, axis.groups_field)
        _, per_group = np.unique(np.array(value) // (limit // groups), return_counts=True)
        if len(per_group) != kept or per_group.min() != per_group.max():
            yield f"{label} are not equally many in each of {kept} groups"


def index_violations(key: str, value: object, count: int, limit: int) -> list[str]:
    """What is wrong with a list of kept indices, which must be ascending, ``count`` long and below ``limit``."""
    if not isinstance(value, list) or any(type(index) is not int for index in value):
        return [f"{key} is not a list of integers"]
    found = [] if len(value) == count else [f"{key} has {len(value)} entries, not {count}"]
    if any(not 0 <= index < limit for index in value):
        found.append(f"{key} has entries outside 0..{limit - 1}")
    if any(a >= b for a, b in itertools.pairwise(value)):
        found.append(f"{key} is not strictly ascending")
    return found
