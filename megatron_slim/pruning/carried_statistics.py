"""Statistics of a model, carried through a plan to the model that it gave, instead of a new calibration (no torch).

What survives keeps the numbers that were measured before the pruning, bit for bit. A merged expert has those of its
base. The numbers are those of a calibration where what went had no effect; elsewhere they are those of the model before
it was pruned and trained.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from megatron_slim.architecture.feed_forward import EXPERT_NEURONS
from megatron_slim.architecture.kinds import FEED_FORWARD, KINDS
from megatron_slim.checkpoint.iterations import roots
from megatron_slim.checkpoint.records import PLAN, PROVENANCE
from megatron_slim.errors import CheckpointError
from megatron_slim.expert_metrics import EXPERT_IMPORTANCES, EXPERT_SIMILARITIES
from megatron_slim.files import read_json
from megatron_slim.pruning import statistics
from megatron_slim.pruning.elastic import find_elastic
from megatron_slim.pruning.plan import Plan
from megatron_slim.pruning.plan_reader import load_plan
from megatron_slim.pruning.plan_view import check_statistics
from megatron_slim.pruning.statistics import LAYER_KINDS, Array, Statistics
from megatron_slim.recipe_sections import CHOICES

if TYPE_CHECKING:
    from megatron_slim.checkpoint.convert import Checkpoint

CARRIED = "carried_from"  # in the metadata: the checkpoint that was measured


def carried_statistics(stats: Statistics, plan: Plan, source_sha256: str, *, with_mtp: bool = True) -> Statistics:
    """Statistics of what a plan gives.

    Args:
        stats: of the plan's source.
        plan: what survives of it.
        source_sha256: fingerprint of the model that they are for: the plan's target, trained or not.
        with_mtp: false leaves out the MTP block, as a model that was trained without it has none.
    """
    tensors = {}
    trunk = {f"model.layers.{layer}" for layer in plan.kept_layers}
    for kind in CHOICES["width.importance"]:
        key = statistics.hidden_key(kind)
        tensors[key] = stats.tensors[key][list(plan.kept_hidden)]
    for new, old in plan.source_blocks.items():
        if not with_mtp and old not in trunk:
            continue
        tensors |= dict(_of_block(stats, plan, new, old))
    measured = stats.metadata.get(CARRIED, stats.metadata["source_sha256"])
    return Statistics(tensors, {**stats.metadata, "source_sha256": source_sha256, CARRIED: measured})


def _of_block(stats: Statistics, plan: Plan, new: str, old: str) -> Iterator[tuple[str, Array]]:
    """Names and values of one block: ``new`` in the plan's target, ``old`` in its source."""
    for kind in LAYER_KINDS:
        yield statistics.layer_key(new, kind), stats.tensors[statistics.layer_key(old, kind)]
    attention, network = plan.source_shape.sublayers_of(old)
    heads, neurons = KINDS[attention].heads, FEED_FORWARD[network].neurons
    for axis, kept in ((heads, plan.inner.heads), (neurons, getattr(plan.inner, neurons.key))):
        if (values := stats.tensors.get(statistics.axis_key(old, axis))) is not None:
            yield statistics.axis_key(new, axis), values[list(kept[old])] if old in kept else values
    if old in plan.experts:
        yield from _of_experts(stats, plan, new, old)


def _of_experts(stats: Statistics, plan: Plan, new: str, old: str) -> Iterator[tuple[str, Array]]:
    bases = [group.base for group in plan.experts[old]]
    for kind in EXPERT_IMPORTANCES:
        if (importance := stats.tensors.get(statistics.importance_key(old, kind))) is not None:
            yield statistics.importance_key(new, kind), importance[bases]
    for kind in EXPERT_SIMILARITIES:
        if (similarity := stats.tensors.get(statistics.similarity_key(old, kind))) is not None:
            yield statistics.similarity_key(new, kind), similarity[np.ix_(bases, bases)]
    neurons = stats.tensors[statistics.axis_key(old, EXPERT_NEURONS)][bases]
    if old in plan.inner.neurons:
        neurons = np.take_along_axis(neurons, np.array(plan.inner.neurons[old]), axis=1)
    yield statistics.axis_key(new, EXPERT_NEURONS), neurons


def read_carried_statistics(pruned: Path, source: Checkpoint) -> Statistics:
    """Carry the statistics that a pruned checkpoint keeps, through the plan that it keeps.

    Args:
        pruned: the checkpoint that the model was trained from.
        source: the model that the statistics are for.

    Raises:
        SlimError: there is no plan or there are no statistics, they do not belong together, or the plan is not the one
            that gave this model, as far as its files say, or gave one of other sizes.
    """
    if not pruned.is_dir():
        raise CheckpointError("is not a directory", where=str(pruned), fix="give a pruned checkpoint, which has a plan")
    plan, stats = load_plan(pruned), Statistics.load(pruned)
    check_statistics(plan, stats, where=str(pruned))
    _check_origin(pruned, plan, source)
    shape, target = source.shape.simplest(), plan.target_shape
    if not shape.mtp_num_layers:  # it may have been left out since
        target = target.replace(mtp_num_layers=0)
    target = target.simplest()
    if target != shape:
        ours, theirs = shape.to_dict(), target.to_dict()
        differing = [key for key in {**ours, **theirs} if ours.get(key) != theirs.get(key)]
        found = [f"{key} {ours.get(key)}, not {theirs.get(key)}" for key in differing]
        raise CheckpointError(
            f"its plan did not give the model that is to be pruned, which has {', '.join(found)}",
            where=str(pruned),
            fix="give the pruned checkpoint that this model was trained from",
        )
    from megatron_slim.streaming.fingerprint import fingerprint  # which brings torch

    return carried_statistics(stats, plan, fingerprint(source), with_mtp=bool(shape.mtp_num_layers))


def _check_origin(pruned: Path, plan: Plan, source: Checkpoint) -> None:
    """Refuse a plan that was changed since, one that is not the plan next to a model, and a model in another order."""
    elastic = find_elastic(source.path)
    if elastic is not None and elastic.order is not None:
        raise CheckpointError(
            "was sorted, and the statistics are in the order of before",
            where=str(source.path),
            fix="undo it with megatron-slim sort --undo, or calibrate anew with --calibration-data",
        )
    file = pruned / PROVENANCE
    made_by = read_json(file).get("plan_sha256") if file.is_file() else None
    if made_by not in (None, plan.sha256):
        raise CheckpointError(
            f"its plan is not the one that it was made by (sha256 {made_by})",
            where=str(pruned),
            fix="calibrate anew with --calibration-data",
        )
    for directory in (source.config_path, *roots(source.path)):
        if (directory / PLAN).is_file() and load_plan(directory).sha256 != plan.sha256:
            raise CheckpointError(
                f"another plan gave the model that is to be pruned ({directory / PLAN})",
                where=str(pruned),
                fix="give the pruned checkpoint that this model was trained from",
            )
