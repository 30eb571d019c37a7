"""The order of a sorted checkpoint, as part of the document of its budgets (imports no torch)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

from megatron_slim.aliases import Document, JsonObject
from megatron_slim.architecture.feed_forward import EXPERT_NEURONS
from megatron_slim.architecture.kinds import FEED_FORWARD, KINDS
from megatron_slim.architecture.shape import ModelShape
from megatron_slim.pruning.inner_axes import InnerAxes
from megatron_slim.pruning.nesting import NETWORKS
from megatron_slim.pruning.plan import Plan
from megatron_slim.pruning.sorting import single

_REQUIRED = ("kept_hidden", "experts", "heads")
_KEYS = (*_REQUIRED, "neurons", *NETWORKS)


def order_dict(order: Plan) -> JsonObject:
    """An order as part of a document."""
    found: JsonObject = {
        "kept_hidden": list(order.kept_hidden),
        "experts": {block: [group.base for group in groups] for block, groups in order.experts.items()},
    }
    return found | order.inner.to_dict()


def read_order(value: object, whole: Plan) -> tuple[Plan | None, list[str]]:
    """An order of a document, or what is wrong with it.

    Args:
        value: as `order_dict` gave it.
        whole: the plan that keeps everything of the checkpoint.
    """
    if not isinstance(value, Mapping) or not set(_REQUIRED) <= set(value) <= set(_KEYS):
        return None, [f"order is not an object with {', '.join(_KEYS)}"]
    shape = whole.source_shape
    if found := [f"order: {sentence}" for sentence in _violations(value, shape)]:
        return None, found
    experts = {block: tuple(map(single, bases)) for block, bases in value["experts"].items()}
    inner = InnerAxes.from_dict({"neurons": {}, **value})
    return dataclasses.replace(whole, kept_hidden=tuple(value["kept_hidden"]), experts=experts, inner=inner), []


def _violations(value: Document, shape: ModelShape) -> Iterator[str]:
    if not _is_permutation(value["kept_hidden"], shape.hidden_size):
        yield "kept_hidden are not all, each once"
    for key, sizes in _sizes(shape).items():
        part = value.get(key, {})
        if not isinstance(part, Mapping) or set(part) != set(sizes):
            yield f"{key} are not given for exactly the blocks {', '.join(sizes) or '(none)'}"
            continue
        for block, size in sizes.items():
            if not _is_permutation(part[block], size):
                yield f"{key} of {block} are not all, each once"
            elif key == "heads" and _is_torn(part[block], block, shape):
                yield f"heads of {block} are not group by group"
    yield from _neuron_violations(value.get("neurons", {}), shape)


def _sizes(shape: ModelShape) -> dict[str, dict[str, int]]:
    """How long a list of each key is for each block that has one."""
    blocks = list(shape.blocks)
    found: dict[str, dict[str, int]] = {
        "experts": shape.expert_counts,
        "heads": {block: getattr(shape, KINDS[shape.layer_type(block)].heads.field) for block in blocks},
        **{key: {} for key in NETWORKS},
    }
    for block in blocks:
        network = FEED_FORWARD[shape.ffn_kind(block)].neurons
        if size := getattr(shape, network.field):
            found[network.key][block] = size
    return found


def _neuron_violations(neurons: object, shape: ModelShape) -> Iterator[str]:
    counts, size = shape.expert_counts, getattr(shape, EXPERT_NEURONS.field)
    if not isinstance(neurons, Mapping) or (neurons and set(neurons) != set(counts)):
        yield "neurons are not given for exactly the blocks with experts"
        return
    for block, experts in neurons.items():
        good = isinstance(experts, list) and len(experts) == counts[block]
        if not good or not all(_is_permutation(each, size) for each in experts):
            yield f"neurons of {block} are not all, each once"


def _is_permutation(value: object, size: int) -> bool:
    return isinstance(value, list) and all(type(each) is int for each in value) and sorted(value) == list(range(size))


def _is_torn(heads: Sequence[int], block: str, shape: ModelShape) -> bool:
    """Whether the heads of some group are not next to one another."""
    width = shape.sizes[KINDS[shape.layer_type(block)].heads.axis]
    return any(len({head // width for head in heads[k : k + width]}) > 1 for k in range(0, len(heads), width))
