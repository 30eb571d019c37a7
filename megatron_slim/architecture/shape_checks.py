"""What makes sizes of a model impossible to build; they are numbers of the right kind already."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from megatron_slim.architecture.family import FULL_ATTENTION, MOE
from megatron_slim.architecture.kinds import AXES

if TYPE_CHECKING:
    from megatron_slim.architecture.shape import ModelShape


def violations(shape: ModelShape) -> list[str]:
    """Everything that makes this shape impossible to build, one sentence each."""
    checks = {
        f"moe_router_topk {shape.moe_router_topk} is larger than num_moe_experts "
        f"{shape.num_moe_experts}": shape.moe_router_topk <= shape.num_moe_experts,
        f"layer_types has {len(shape.layer_types)} entries for num_layers {shape.num_layers}": len(shape.layer_types)
        == shape.num_layers,
        f"rotary_base {shape.rotary_base} is not above zero": shape.rotary_base > 0,
        f"rotary_base {shape.rotary_base} is not above 1, as YaRN needs": shape.rope_scaling is None
        or shape.rotary_base > 1,
        "no full_attention layer is left (transformers cannot run such a model)": FULL_ATTENTION in shape.layer_types,
        f"rotary_percent {shape.rotary_percent} of kv_channels {shape.kv_channels} is not an even number "
        "of dimensions": shape.rotary_percent <= 1 and shape.rotary_dim > 0 and shape.rotary_dim % 2 == 0,
        f"mtp_num_layers {shape.mtp_num_layers} is not 0 or 1 (the Hugging Face format has one MTP "
        "block)": shape.mtp_num_layers in (0, 1),
        f"mtp_num_layers {shape.mtp_num_layers}, but {shape.model_type} has no MTP block": shape.mtp_num_layers == 0
        or bool(shape.family.mtp_rows),
    }
    found = [sentence for axis in AXES.values() for sentence in axis.violations(shape)]
    found += [sentence for sentence, holds in checks.items() if not holds]
    found += [*_routing(shape), *_experts(shape)]
    known = shape.family.attention
    unknown = sorted(set(shape.layer_types) - set(known))
    found += [f"unknown layer type {kind!r} ({shape.model_type} has {', '.join(known)})" for kind in unknown]
    return found


def _routing(shape: ModelShape) -> Iterator[str]:
    """What rules out dense layers, groups of experts and a size that is given as a multiple."""
    if shape.num_dense_layers >= shape.num_layers:
        yield f"num_dense_layers {shape.num_dense_layers} of num_layers {shape.num_layers} leave none with experts"
    groups, chosen, topk = shape.moe_router_num_groups, shape.moe_router_group_topk, shape.moe_router_topk
    if groups > 1:
        each = shape.num_moe_experts // groups
        if shape.num_moe_experts % groups or each < 2:
            yield f"num_moe_experts {shape.num_moe_experts} are not groups of two or more, {groups} in number"
        elif chosen > groups or topk > chosen * each:
            yield f"moe_router_topk {topk} do not fit into {chosen} of {groups} groups of {each} experts"
        elif topk // chosen != 2:
            # transformers ranks groups by their best two, Megatron by as many as a group gives on average.
            yield f"moe_router_topk {topk} is not twice moe_router_group_topk {chosen}, as Megatron's groups need"
    elif chosen != 1:
        yield f"moe_router_group_topk {chosen} of one group"
    for name, (key, unit) in shape.family.multiples.items():
        if getattr(shape, name) % getattr(shape, unit):
            yield (
                f"{name} {getattr(shape, name)} is not a multiple of {unit} {getattr(shape, unit)}, "
                f"in which {key} of config.json counts it"
            )


def _experts(shape: ModelShape) -> Iterator[str]:
    """What is wrong with the numbers of experts of single layers."""
    counts, topk = shape.experts_per_layer, shape.moe_router_topk
    if not counts:
        return
    if len(counts) != shape.num_layers:
        yield f"experts_per_layer has {len(counts)} entries for num_layers {shape.num_layers}"
        return
    for layer, (count, kinds) in enumerate(zip(counts, shape.sublayers, strict=False)):
        if (count > 0) != (MOE in kinds):
            yield f"experts_per_layer: layer {layer} has {count}, and is {'' if MOE in kinds else 'not '}routed"
        elif 0 < count < topk:
            yield f"experts_per_layer: layer {layer} has {count} experts, fewer than moe_router_topk {topk}"
    if shape.moe_router_num_groups > 1:
        yield "experts_per_layer with a router that chooses groups of experts first"
