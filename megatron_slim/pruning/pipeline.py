"""From a plan to a checkpoint on disk, with its records."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

from megatron_slim.aliases import JsonObject, WriteOptions
from megatron_slim.checkpoint.convert import write_checkpoint
from megatron_slim.checkpoint.huggingface_writer import total_bytes
from megatron_slim.checkpoint.optimizer_state import OptimizerState
from megatron_slim.checkpoint.records import ELASTIC, PLAN, REPORT, STATS
from megatron_slim.files import write_atomic
from megatron_slim.pruning.apply import PrunedCheckpoint
from megatron_slim.pruning.elastic import ElasticBudget, elastic_of
from megatron_slim.pruning.report import markdown, rows, summarise
from megatron_slim.pruning.statistics import Statistics
from megatron_slim.streaming.fingerprint import fingerprint

if TYPE_CHECKING:
    from rich.table import Table


def comparison(pruned: PrunedCheckpoint) -> JsonObject:
    """Sizes before and after, for a tool's ``--json``."""
    source = pruned.source
    return {
        "before": summarise(source.shape, total_bytes(source.shape, source.dtypes)),
        "after": summarise(pruned.shape, total_bytes(pruned.shape, pruned.dtypes)),
    }


def comparison_table(pruned: PrunedCheckpoint) -> Table:
    """The before/after table."""
    from rich.table import Table

    table = Table("", "before", "after", "left")
    for column in table.columns[1:]:
        column.justify = "right"
    for row in rows(**comparison(pruned)):
        table.add_row(*row)
    return table


def write_pruned(
    pruned: PrunedCheckpoint,
    target: Path,
    *,
    stats: Statistics | None,
    to: str,
    budgets: Sequence[ElasticBudget] = (),
    optimizer: OptimizerState | None = None,
    **options: Unpack[WriteOptions],
) -> JsonObject:
    """Write the target of a plan; next to the weights it gets the plan, the statistics and the before/after table.

    Args:
        pruned: the target.
        target: a new directory.
        stats: the statistics that the plan follows from, where they are at hand.
        to: ``hf`` or ``torch_dist``.
        budgets: nested plans of the source, this one first, of an elastic checkpoint, which gets a document of them.
        optimizer: state to write next to the weights, of a torch_dist checkpoint.
        options: as `checkpoint.convert.write_checkpoint`.

    Raises:
        CheckpointError: what was read back differs from what was to be written.
    """

    def records(directory: Path) -> JsonObject:
        plan = pruned.plan
        plan.save(directory / PLAN)
        write_atomic(directory / REPORT, markdown(plan, **comparison(pruned)))
        if stats is not None:
            stats.save(directory / STATS)
        hashes = {"plan_sha256": plan.sha256, "source_sha256": plan.source_sha256, "stats_sha256": plan.stats_sha256}
        if budgets:
            elastic = elastic_of(budgets, source_sha256=fingerprint(pruned))
            elastic.save(directory / ELASTIC)
            hashes["elastic_sha256"] = elastic.sha256
        return hashes

    return write_checkpoint(pruned, target, to=to, records=records, optimizer=optimizer, **options)
