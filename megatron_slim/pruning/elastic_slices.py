"""Budgets of an elastic checkpoint as checkpoints of their own: its tensors, selected as they are read."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Unpack

from megatron_slim.aliases import JsonObject, WriteOptions
from megatron_slim.checkpoint.convert import Checkpoint, write_checkpoint
from megatron_slim.checkpoint.records import ELASTIC
from megatron_slim.errors import CheckpointError
from megatron_slim.pruning.apply import PrunedCheckpoint
from megatron_slim.pruning.elastic import MAKE, Elastic, find_elastic
from megatron_slim.pruning.pipeline import write_pruned
from megatron_slim.pruning.plan import Plan
from megatron_slim.pruning.sorting import inverse, reordered, sorting_plan
from megatron_slim.streaming.fingerprint import fingerprint


def elastic_at(checkpoint: Path) -> Elastic:
    """The budgets of a checkpoint directory.

    Raises:
        CheckpointError: it has none.
        PlanError: the document of them is damaged.
    """
    if (found := find_elastic(checkpoint)) is None:
        raise CheckpointError(f"there is no {ELASTIC} here: not an elastic checkpoint", where=str(checkpoint), fix=MAKE)
    return found


def fitted(elastic: Elastic, source: Checkpoint) -> Elastic:
    """The document as one of this checkpoint, which may have lost its MTP block since.

    Raises:
        CheckpointError: it is for a model of other sizes; names them.
    """
    if elastic.shape.mtp_num_layers and not source.shape.mtp_num_layers:
        elastic = elastic.without_mtp()
    ours, theirs = elastic.shape.to_dict(), source.shape.to_dict()
    differing = [key for key in {**ours, **theirs} if ours.get(key) != theirs.get(key)]
    if differing:
        sizes = ", ".join(f"{key} {ours.get(key)}, not {theirs.get(key)}" for key in differing)
        raise CheckpointError(
            f"{ELASTIC} is for a model of other sizes: {sizes}",
            where=str(source.path),
            fix="give the checkpoint that it was made for, or one trained from it",
        )
    return elastic


def sliced(source: Checkpoint, elastic: Elastic, name: str) -> PrunedCheckpoint:
    """A budget as a checkpoint whose tensors are selected when they are read.

    Args:
        source: the elastic checkpoint, as pruned or trained since.
        elastic: its document.
        name: of the budget.

    Raises:
        SlimError: there is no such budget, or the document is for a model of other sizes.
    """
    plan = fitted(elastic, source).named(name).plan
    # Which weights they are is known now, and they are not those of the document where they were trained since.
    return PrunedCheckpoint(dataclasses.replace(plan, source_sha256=fingerprint(source)), source, check_source=False)


def write_slice(
    source: Checkpoint, elastic: Elastic, name: str, target: Path, *, to: str, **options: Unpack[WriteOptions]
) -> JsonObject:
    """Write a budget as a checkpoint, with its plan and, where budgets within it are left, a document of those.

    Args:
        source: the elastic checkpoint.
        elastic: its document.
        name: of the budget.
        target: a new directory.
        to: ``hf`` or ``torch_dist``.
        options: as `checkpoint.convert.write_checkpoint`.
    """
    budgets = fitted(elastic, source).down_from(name)
    pruned = sliced(source, elastic, name)
    return write_pruned(pruned, target, stats=None, to=to, budgets=budgets if len(budgets) > 1 else (), **options)


def write_sorted(
    source: Checkpoint,
    elastic: Elastic,
    target: Path,
    *,
    to: str,
    expert_parallel: int = 1,
    **options: Unpack[WriteOptions],
) -> JsonObject:
    """Write an elastic checkpoint in an order in which the first of every axis are those of its smaller budgets.

    Args:
        source: the elastic checkpoint.
        elastic: its document.
        target: a new directory.
        expert_parallel: as `sorting.sorting_plan`.
        to: ``hf`` or ``torch_dist``.
        options: as `checkpoint.convert.write_checkpoint`.

    Raises:
        SlimError: it is sorted already, or the document is for a model of other sizes.
    """
    elastic = fitted(elastic, source)
    if elastic.order is not None:
        raise CheckpointError("is sorted already", where=str(source.path), fix="undo that first with --undo")
    order = sorting_plan(elastic.budgets, expert_parallel)
    return _write_reordered(source, elastic, order, inverse(order), target, to, options)


def write_unsorted(
    source: Checkpoint, elastic: Elastic, target: Path, *, to: str, **options: Unpack[WriteOptions]
) -> JsonObject:
    """Write a sorted checkpoint in the order that it had before; arguments and errors as `write_sorted`."""
    elastic = fitted(elastic, source)
    if elastic.order is None:
        raise CheckpointError("is not sorted", where=str(source.path), fix="leave --undo out")
    return _write_reordered(source, elastic, elastic.order, None, target, to, options)


def _write_reordered(
    source: Checkpoint, elastic: Elastic, order: Plan, undo: Plan | None, target: Path, to: str, options: WriteOptions
) -> JsonObject:
    moved = PrunedCheckpoint(order, source, check_source=False)

    def records(directory: Path) -> JsonObject:
        sha256 = fingerprint(moved)
        plans = (dataclasses.replace(reordered(each.plan, order), source_sha256=sha256) for each in elastic.budgets)
        budgets = tuple(dataclasses.replace(each, plan=plan) for each, plan in zip(elastic.budgets, plans, strict=True))
        document = Elastic(budgets, undo)
        document.save(directory / ELASTIC)
        return {"elastic_sha256": document.sha256, "sorted": undo is not None}

    return write_checkpoint(moved, target, to=to, records=records, **options)
