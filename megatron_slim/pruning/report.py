"""The before/after table of a pruning: for the terminal, for a file, for ``--json``."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

from megatron_slim.architecture.family import DENSE
from megatron_slim.architecture.hf_config import OWN_COUNTS
from megatron_slim.architecture.kinds import BLOCK_AXES, FEED_FORWARD, KINDS
from megatron_slim.architecture.prunable import HIDDEN, LAYERS
from megatron_slim.architecture.shape import ModelShape
from megatron_slim.architecture.table import count_parameters
from megatron_slim.errors import ranges

if TYPE_CHECKING:
    from megatron_slim.pruning.plan import Plan

Summary: TypeAlias = dict[str, int]
LABELS = {
    **LAYERS.labels,
    **{f"{name}_layers": kind.noun for name, kind in KINDS.items()},
    "num_dense_layers": "dense layers",
    "mtp_num_layers": "MTP blocks",
    **{field: label for axis in (HIDDEN, *BLOCK_AXES.values()) for field, label in axis.labels.items()},
    "parameters": "parameters",
    "parameters_without_mtp": "without MTP",
    "active_parameters": "active, without MTP",
    "bytes": "bytes",
}
_DENSE = ("num_dense_layers", FEED_FORWARD[DENSE].neurons.field)


def summarise(shape: ModelShape, total_bytes: int) -> Summary:
    """Sizes of a model, by the keys of `LABELS`; active parameters are those that one token visits, MTP left out."""
    trunk = count_parameters(shape, include_mtp=False)
    counted = {
        **{f"{name}_layers": shape.layer_types.count(name) for name in KINDS},
        "parameters": count_parameters(shape).total,
        "parameters_without_mtp": trunk.total,
        "active_parameters": trunk.active,
        "bytes": total_bytes,
    }
    return {key: counted[key] if key in counted else getattr(shape, key) for key in LABELS}


def rows(before: Summary, after: Summary) -> list[tuple[str, str, str, str]]:
    """Label, before, after and the share that is left, of every size; a dense network's where there is one."""
    shown = shown_sizes(before)
    return [(LABELS[key], f"{before[key]:,}", f"{after[key]:,}", _share(before[key], after[key])) for key in shown]


def shown_sizes(of: Summary) -> list[str]:
    """Keys of the rows of a table; those of a dense network where there is one."""
    return [key for key in LABELS if key not in _DENSE or of[key]]


def _share(before: int, after: int) -> str:
    return f"{100 * after / before:.1f}%" if before else ""


def markdown(plan: Plan, before: Summary, after: Summary) -> str:
    """The table as Markdown, with what decided it."""
    depth, experts = plan.recipe.depth, plan.recipe.experts
    lines = ["# Pruning report", "", "| | before | after | left |", "|---|---:|---:|---:|"]
    lines += [f"| {' | '.join(row)} |" for row in rows(before, after)]
    merged = sum(len(group.members) > 1 for groups in plan.experts.values() for group in groups)
    total = sum(map(len, plan.experts.values()))
    lines += [
        "",
        *_stage(plan),
        *_no_period(plan),
        *_search(plan),
        *_allocation(plan),
        f"- depth: {depth.method}, pattern {depth.pattern}; layers dropped: {_dropped_layers(plan)}",
        f"- width: {plan.recipe.width.importance}",
        f"- experts: {experts.method} by {experts.importance}, similarity by {experts.similarity}, "
        f"preserve {experts.preserve}, weighting {experts.weighting}, num_groups {experts.num_groups}, "
        f"align {experts.align}; {total - merged} of {total} survivors are unchanged, {merged} merged",
        f"- source {plan.source_sha256}",
        f"- statistics {plan.stats_sha256}",
        f"- plan {plan.sha256}",
    ]
    return "\n".join(lines) + "\n"


def _stage(plan: Plan) -> list[str]:
    phase = plan.recipe.phase
    if phase is None:
        return []
    name, tokens = phase.name and f" ({phase.name})", f"; then {phase.tokens:,} tokens" if phase.tokens else ""
    return [f"- phase {phase.number} of {phase.count}{name}{tokens}"]


def _search(plan: Plan) -> list[str]:
    found = plan.search
    if found is None:
        return []
    chosen = found.candidates[found.chosen]
    if plan.target_shape == plan.source_shape:
        return ["- budget: the source meets every bound already, everything is kept"]
    sizes = ", ".join(f"{axis} {size}" for axis, size in chosen.sizes.items()) or "the sizes given"
    loss = "" if chosen.loss is None else f", loss {chosen.loss:.4f}, the least of those measured"
    return [f"- budget: {sizes}; number {found.chosen + 1} of {found.count} by score ({chosen.score:.4f}){loss}"]


def _allocation(plan: Plan) -> list[str]:
    """What different numbers of experts mean, and how far apart they are."""
    if not plan.target_shape.experts_per_layer:
        return []
    counts = [count for count in plan.target_shape.experts_per_layer if count]
    return [
        f"- experts of a layer: from {min(counts)} to {max(counts)}, {sum(counts)} in all, by what each layer loses "
        f"without them; {OWN_COUNTS}"
    ]


def _no_period(plan: Plan) -> list[str]:
    """What a target without a period means: its config.json has no ``full_attention_interval``."""
    warning = (
        "- attention: the layers that are left have no period, so SGLang, mlx-lm and mcore-bridge, which read only "
        "full_attention_interval, build other layers; transformers, vLLM and llama.cpp's converter read layer_types"
    )
    if plan.target_shape.full_attention_interval:
        return []
    avoidable = plan.source_shape.full_attention_interval and plan.recipe.depth.pattern != "source"
    return [warning + ("; depth.pattern source keeps the source's period" if avoidable else "")]


def _dropped_layers(plan: Plan) -> str:
    return ranges(set(range(plan.source_shape.num_layers)) - set(plan.kept_layers)) or "none"
