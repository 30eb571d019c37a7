"""From a plan to a checkpoint on disk: written, read back, compared, and only then put in its place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_slim.checkpoint.convert import Checkpoint, config_for, open_checkpoint, same_bytes
from megatron_slim.checkpoint.distributed import write_torch_dist
from megatron_slim.checkpoint.huggingface_writer import specs_of, total_bytes, write_hf_checkpoint
from megatron_slim.cli import progress
from megatron_slim.errors import CheckpointError
from megatron_slim.files import new_directory, write_atomic
from megatron_slim.pruning.apply import PrunedCheckpoint
from megatron_slim.pruning.plan import Plan
from megatron_slim.pruning.report import markdown, rows, summarise
from megatron_slim.pruning.statistics import Statistics

STATS, PLAN, REPORT = "stats.safetensors", "plan.json", "pruning_report.md"


def comparison(pruned: PrunedCheckpoint) -> dict[str, Any]:
    """Sizes before and after, for a tool's ``--json``."""
    source = pruned.source
    return {
        "before": summarise(source.shape, total_bytes(source.shape, source.dtypes)),
        "after": summarise(pruned.shape, total_bytes(pruned.shape, pruned.dtypes)),
    }


def print_comparison(pruned: PrunedCheckpoint) -> None:
    """The before/after table on standard output."""
    from rich.console import Console
    from rich.table import Table

    table = Table("", "before", "after", "left")
    for column in table.columns[1:]:
        column.justify = "right"
    for row in rows(**comparison(pruned)):
        table.add_row(*row)
    Console().print(table)


def write_pruned(
    pruned: PrunedCheckpoint, target: Path, *, to: str, stats: Statistics | None, copy_files_from: Path
) -> None:
    """Write the target of a plan; ``target`` appears only when everything in it has been read back and compared.

    Beside the weights it gets the plan, the statistics and the before/after table.

    Args:
        pruned: the target.
        target: a new directory.
        to: ``hf`` or ``torch_dist``.
        stats: the statistics that the plan follows from, where they are at hand.
        copy_files_from: directory whose tokenizer files are carried over.

    Raises:
        CheckpointError: what was read back differs from what was to be written.
    """
    config = config_for(pruned.config, pruned.dtypes.values())
    with new_directory(target) as partial:
        if to == "torch_dist":
            write_torch_dist(partial, pruned.shape, pruned.read, config, copy_files_from=copy_files_from)
        else:
            tensors = progress(pruned.tensors(), "writing", len(pruned.names))
            specs = specs_of(pruned.shape, pruned.dtypes)
            write_hf_checkpoint(partial, config, specs, tensors, copy_files_from=copy_files_from)
        _write_records(pruned.plan, stats, comparison(pruned), partial)
        _verify(pruned, partial, target)


def _write_records(plan: Plan, stats: Statistics | None, sizes: dict[str, Any], directory: Path) -> None:
    plan.save(directory / PLAN)
    write_atomic(directory / REPORT, markdown(plan, **sizes))
    if stats is not None:
        stats.save(directory / STATS)


def _verify(pruned: PrunedCheckpoint, directory: Path, target: Path) -> None:
    written = open_checkpoint(directory)
    different: list[str] = []
    if written.shape != pruned.shape:
        different.append("config.json")
    for name, expected in progress(pruned.tensors(), "verifying", len(pruned.names)):
        if not _equal(written, name, expected):
            different.append(name)
    if different:
        raise CheckpointError(
            f"{different[0]} differs from the plan after writing ({len(different)} differ)",
            where=str(target),
            fix="check disk and memory",
        )


def _equal(written: Checkpoint, name: str, expected: Tensor) -> bool:
    return written.dtypes[name] == expected.dtype and same_bytes(written.read(name), expected)
