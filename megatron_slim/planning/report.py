"""A plan of layouts as a person reads it, and as JSON (no torch)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from megatron_slim.aliases import JsonObject
from megatron_slim.architecture.shape import ModelShape
from megatron_slim.architecture.table import count_parameters
from megatron_slim.planning import flags
from megatron_slim.planning.memory import Memory
from megatron_slim.planning.preparation import calibration, conversion
from megatron_slim.planning.search import TOO_LARGE, Candidate, Found, Job
from megatron_slim.planning.speed import Step

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

WIDE = 108  # columns from which memory is shown in parts
SHOWN_REASONS = 6
TIGHT = 0.95  # share of a GPU's memory from which a layout is named as one with little left
DAY = 86400


def shares(step: Step) -> dict[str, float]:
    """What the mean rank does with a step, as shares of it; the largest first."""
    busy = step.busy
    seconds = {
        "matrix products": busy.compute,
        "memory traffic": busy.traffic,
        "tensor-parallel collectives": busy.tensor,
        "all-to-all of experts": busy.all_to_all,
        "launching kernels": busy.host,
        "waiting in the pipeline": step.bubble * step.seconds,
        "gradients and weights of data parallelism": step.data_parallel,
        "optimizer": step.optimizer,
    }
    ordered = sorted(seconds.items(), key=lambda pair: -pair[1])
    return {name: value / step.seconds for name, value in ordered}


def why(step: Step, limit: int = 4) -> str:
    """The largest shares in words."""
    return ", ".join(f"{name} {share:.0%}" for name, share in list(shares(step).items())[:limit])


def days(step: Step, job: Job, tokens: int) -> float:
    """How long so many tokens take."""
    return flags.iterations(job.settings, tokens) * step.seconds / DAY


def memory_entry(memory: Memory) -> dict[str, float]:
    """In bytes."""
    return {**dataclasses.asdict(memory), "static": memory.static, "total": memory.total}


def asked_entry(job: Job, tokens: int) -> JsonObject:
    """Hardware, models and tokens of a plan, for JSON."""
    return {
        "gpus": job.gpus,
        "gpu": dataclasses.asdict(job.gpu),
        "student": model_entry(job.student),
        "teacher": model_entry(job.teacher),
        "tokens": tokens,
    }


def candidate_entry(candidate: Candidate, job: Job, tokens: int, *, built: bool) -> JsonObject:
    """A layout that fits, for JSON."""
    layout, step = candidate.layout, candidate.step
    return {
        "layout": dataclasses.asdict(layout) | {"dp": layout.dp, "expert_dp": layout.expert_dp},
        "name": layout.name,
        "micro_batches": layout.micro_batches(job.settings),
        "student_layers": list(candidate.stages.student_layers),
        "teacher_layers": list(candidate.stages.teacher_layers),
        "worst_rank": candidate.worst,
        "memory": [memory_entry(each) for each in candidate.memory],
        "built": built,
        "step": {**dataclasses.asdict(step), "shares": shares(step)},
        "days": days(step, job, tokens),
        "why": why(step),
        "variables": flags.variables(layout, job.settings, tokens, job.gpu.per_node),
        "arguments": flags.arguments(layout, job.settings),
        "command": _command(candidate, job, tokens),
    }


def _command(candidate: Candidate, job: Job, tokens: int) -> str:
    has_teacher = job.teacher is not None
    return flags.command(candidate.layout, job.settings, tokens, job.gpu.per_node, has_teacher=has_teacher)


def rejected_entry(found: Found) -> JsonObject:
    """Layouts that are out, and why, for JSON."""
    nearest = found.nearest
    return {
        "count": len(found.rejected),
        "reasons": dict(found.reasons()),
        "nearest": None if nearest is None else {"name": nearest.layout.name, "why": nearest.why},
        "layouts": [{"name": each.layout.name, "kind": each.kind, "why": each.why} for each in found.rejected],
        "need_less_recomputation": found.spared,
    }


def model_entry(shape: ModelShape | None) -> dict[str, int] | None:
    """Sizes of a model, for JSON; MTP left out, as models are named."""
    if shape is None:
        return None
    count = count_parameters(shape, include_mtp=False)
    sizes = {"params": count.total, "active_params": count.active, "num_layers": shape.num_layers}
    return sizes | {"hidden_size": shape.hidden_size, "num_moe_experts": shape.num_moe_experts}


def preparation_entry(source: ModelShape, job: Job) -> JsonObject:
    """Calibration and conversion of what the student is pruned from."""
    pass_ = calibration(source, job.gpu)
    entry = dataclasses.asdict(pass_)
    entry |= {"minutes": pass_.minutes, "host_gib_with_work_dir": pass_.host_with_work_dir}
    return {"calibration": entry, "conversion": conversion(source)}


def show_plan(
    console: Console,
    found: Found,
    job: Job,
    tokens: int,
    top: int,
    built: Mapping[str, float],
    notes: Sequence[str],
    source: ModelShape | None,
) -> None:
    """Tables and flags on ``console``, as wide as it is."""
    models = [("student", job.student), ("teacher", job.teacher)]
    named = " with ".join(f"{_size(shape)} {name}" for name, shape in models if shape is not None)
    settings = job.settings
    console.print(
        f"{named}, {tokens / 1e9:,.3g}B tokens in steps of {settings.global_batch} x {settings.seq_length}, "
        f"{settings.precision}, on {job.gpus} x {job.gpu.name}"
    )
    for note in notes:
        console.print(f"  {note}")
    console.print(_table(found.ranked[:top], job, tokens, wide=console.width >= WIDE))
    console.print("GB: of the fullest rank. waits: bubbles and uneven stages. Speed is estimated, not measured.")
    if tight := [str(row) for row, each in enumerate(found.ranked[:top], 1) if each.needed > TIGHT * job.gpu.memory]:
        named = ", ".join(tight)
        console.print(f"Less than {1 - TIGHT:.0%} of memory is left in layout {named}: uneven routing may need it.")
    _show_reasons(console, found, top)
    best = found.ranked[0]
    worst = best.memory[best.worst]
    console.print(f"\n[bold]1: {best.layout.name}[/bold]")
    console.print(f"  time    {why(best.step)}")
    parts = {
        name: value
        for name, value in dataclasses.asdict(worst).items()
        if value >= 5e7  # what rounds to 0.0 says nothing
    }
    console.print(f"  memory  {', '.join(f'{name} {value / 1e9:.1f}' for name, value in parts.items())} GB")
    if best.layout.name in built:
        console.print(
            f"  weights, gradients, optimizer: from the modules of every rank ({built[best.layout.name]:.1f} s)"
        )
    if source is not None:
        console.print(f"  before  {_preparation(source, job)}")
    submits = "; submits a Slurm job" if best.layout.gpus > job.gpu.per_node else ""
    console.print(f"\nto paste, with your own TEACHER, STUDENT, SAVE and DATA{submits}:\n")
    console.out(_command(best, job, tokens), highlight=False)  # as it is, without breaking lines


def _size(shape: ModelShape) -> str:
    count = count_parameters(shape, include_mtp=False)
    return f"{_billions(count.total)}-A{_billions(count.active)}"


def _billions(count: int) -> str:
    return f"{count / 1e9:.1f}B" if count >= 1e8 else f"{count / 1e6:.1f}M"


def _table(ranked: Sequence[Candidate], job: Job, tokens: int, *, wide: bool) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE, padding=(0, 1), pad_edge=False)
    table.add_column("", justify="right")
    table.add_column("layout")
    memory = ["GB", "static", "activ.", "loss", "other"] if wide else ["GB"]
    for name in [*memory, "step s", "waits", "tok/s/GPU", "MFU", "days"]:
        table.add_column(name, justify="right", no_wrap=True)
    for number, each in enumerate(ranked, 1):
        worst, step = each.memory[each.worst], each.step
        parts = [worst.total]
        if wide:
            parts += [worst.static, worst.activations, worst.loss, worst.working + worst.overhead]
        table.add_row(
            str(number),
            each.layout.name,
            *(f"{part / 1e9:.1f}" for part in parts),
            f"{step.seconds:.3g}",
            f"{step.bubble:.0%}",
            f"{step.tokens_per_gpu:,.0f}",
            f"{step.mfu:.1%}",
            _days(days(step, job, tokens)),
        )
    return table


def _days(value: float) -> str:
    return f"{value:,.1f}" if value >= 1 else f"{value:.2f}"


def _show_reasons(console: Console, found: Found, top: int) -> None:
    more = max(0, len(found.ranked) - top)
    console.print(
        f"\n{more} more fit, {len(found.rejected)} are out ({found.spared} were not needed: less is recomputed):"
    )
    reasons = found.reasons()
    for reason, count in reasons[:SHOWN_REASONS]:
        why = f"as {reason}"
        if reason == TOO_LARGE and found.nearest is not None:
            why = f"{TOO_LARGE}; nearest {found.nearest.layout.name}: {found.nearest.why}"
        console.print(f"  {count:>5}  {why}")
    if rest := sum(count for _, count in reasons[SHOWN_REASONS:]):
        console.print(f"  {rest:>5}  other reasons (--json has them all)")


def _preparation(source: ModelShape, job: Job) -> str:
    pass_ = calibration(source, job.gpu)
    ways = conversion(source)["prune to torch_dist"]
    host = f"{pass_.host:.0f} GiB of host memory ({pass_.host_with_work_dir:.0f} with --work-dir)"
    pruning = f"pruning {_minutes(ways['minutes'])} on 2 cores, {ways['host_gb']:.1f} GB"
    return f"calibration {_minutes(pass_.minutes)} on one {job.gpu.name}, {host}; {pruning}"


def _minutes(minutes: float) -> str:
    return f"{minutes:.1f} min" if minutes >= 0.1 else "some seconds"
