"""Elastic checkpoints in the Python API: a budget as a checkpoint, in memory and on disk."""

from __future__ import annotations

from pathlib import Path

from megatron_slim.aliases import JsonObject
from megatron_slim.api_inputs import Format, StrPath, opened, shown
from megatron_slim.checkpoint.convert import Checkpoint
from megatron_slim.files import refuse_existing
from megatron_slim.pruning.elastic_slices import elastic_at, sliced, write_slice
from megatron_slim.reporting import Progress


def open_budget(checkpoint: Checkpoint | StrPath, budget: str) -> Checkpoint:
    """A budget of an elastic checkpoint, as a checkpoint whose tensors are selected when they are read.

    Args:
        checkpoint: the elastic checkpoint, opened or as its path.
        budget: its name.

    Raises:
        SlimError: it has no budgets, or none of this name.
    """
    source = opened(checkpoint)
    return sliced(source, elastic_at(source.path), budget)


def slice_budget(
    checkpoint: Checkpoint | StrPath,
    budget: str,
    save: StrPath,
    *,
    to: Format = "hf",
    verify: bool = True,
    processes: int | None = None,
    progress: Progress | None = None,
) -> JsonObject:
    """Write a budget of an elastic checkpoint to a new directory, every weight bit for bit.

    Args:
        checkpoint: the elastic checkpoint, opened or as its path.
        budget: its name.
        save: the new directory.
        to: format of the result.
        verify: read the result back and compare.
        processes: how many write; None: chosen by size and cores.
        progress: where progress is shown.

    Returns:
        What was written, as ``megatron-slim slice --json``.

    Raises:
        SlimError: it has no budgets, or none of this name.
    """
    refuse_existing(Path(save))
    source = opened(checkpoint)
    with shown(progress):
        return write_slice(
            source, elastic_at(source.path), budget, Path(save), to=to, verify=verify, processes=processes
        )
