"""Parts of a student that fit where not all can be trained, as a table and as JSON (no torch)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from megatron_slim.aliases import JsonObject
from megatron_slim.architecture.table import count_parameters
from megatron_slim.planning import flags
from megatron_slim.planning.report import candidate_entry, days
from megatron_slim.planning.search import Found, Job
from megatron_slim.planning.subsets import SPARE, Subset

if TYPE_CHECKING:
    from rich.console import Console


def entry(subset: Subset, tokens: int) -> JsonObject:
    """One choice, for JSON."""
    job, whole = subset.job, count_parameters(subset.job.student).total
    return {
        "train_only": job.settings.train_only,
        "optimizer_states": job.settings.states,
        "trained": subset.trained,
        "share": subset.trained / whole,
        "bytes": subset.candidate.needed,
        "bytes_left": job.gpu.memory - subset.candidate.needed,
        "host_bytes": subset.host,
        **candidate_entry(subset.candidate, job, tokens, built=False),
    }


def show(console: Console, parts: Sequence[Subset], found: Found, job: Job, tokens: int, notes: Sequence[str]) -> None:
    """A table, most parameters first, and the command of its first row."""
    from rich import box
    from rich.table import Table

    assert found.nearest is not None
    missing = (found.nearest.needed - job.gpu.memory) / 1e9
    where = f"{job.gpus} x {job.gpu.name} of {job.gpu.memory / 1e9:.0f} GB"
    console.print(f"Not all of the student can be trained on {where}: {missing:.1f} GB are missing.")
    for note in notes:
        console.print(f"  {note}")
    table = Table(box=box.SIMPLE, padding=(0, 1), pad_edge=False)
    table.add_column("", justify="right")
    for name in ("trained", "states", "GB", "host GB", "MBS", "recompute", "days"):
        table.add_column(name, justify="right", no_wrap=True)
    for number, each in enumerate(parts, 1):
        layout = each.candidate.layout
        table.add_row(
            str(number),
            f"{each.trained / 1e9:.2f}B",
            each.job.settings.states,
            f"{each.candidate.needed / 1e9:.1f}",
            f"{each.host / 1e9:.0f}" if each.host else "",
            str(layout.micro_batch),
            layout.recompute,
            f"{days(each.candidate.step, each.job, tokens):,.2f}",
        )
    console.print(table)
    for number, each in enumerate(parts, 1):  # lines of their own: some are wider than a terminal
        console.out(
            f"{number:>2}  --train-only {each.name}" if each.job.settings.train_only else f"{number:>2}  all",
            highlight=False,
        )
    console.print(f"GB: of {job.gpu.memory / 1e9:.0f}, {SPARE:.0%} of which are left free. states: --optimizer-states;")
    console.print("those in bf16 and on the host need Transformer Engine, and are counted, not measured, as is speed.")
    best = parts[0]
    has_teacher = job.teacher is not None
    console.print("\nto paste for the first, with your own paths (for others, plan with their options):\n")
    command = flags.command(best.candidate.layout, best.job.settings, tokens, job.gpu.per_node, has_teacher=has_teacher)
    console.out(command, highlight=False)
