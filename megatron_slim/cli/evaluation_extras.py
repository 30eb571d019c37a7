"""What `evaluate` measures besides losses: the distance from a teacher, tasks, and all checkpoints of a run."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_slim.cli.terminal import wide_console
from megatron_slim.command_line import load_options, not_negative, positive
from megatron_slim.errors import SlimError

if TYPE_CHECKING:
    import torch

    from megatron_slim.evaluation.tasks import Tasks
    from megatron_slim.evaluation.teacher import Teacher

logger = logging.getLogger(__name__)

DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
EPILOG = (
    "; with --teacher also teacher_loss, kl (nats per token), top1_agreement (a share), mtp_kl and mtp_top1_agreement "
    "(lists); with --acceptance also acceptance, and teacher_acceptance: acc (a list, share of drafts whose first 1, "
    "2, ... tokens were all accepted), mean_accepted_length, drafts, rounds, tokens, and per_position, the same over "
    "all positions; with --tasks also tasks and tasks_left_out; with --every-checkpoint a list of all this, by "
    "iteration."
)


def add_extra_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of what is measured besides losses."""
    teacher = parser.add_argument_group("comparison with a teacher")
    teacher.add_argument(
        "--teacher",
        type=Path,
        metavar="DIR",
        help="a checkpoint of either format and of the same vocabulary: report how far the model is from it",
    )
    teacher.add_argument(
        "--teacher-hf-config", type=Path, metavar="DIR", help="as --hf-config, for the teacher; without it, its hf/"
    )
    tasks = parser.add_argument_group("tasks of lm-evaluation-harness, offline (extra 'eval')")
    tasks.add_argument(
        "--tasks",
        type=_names,
        metavar="NAME,...",
        help="score the model on these tasks, or on those of the paper whose data are there: slimqwen",
    )
    tasks.add_argument("--tasks-dir", type=Path, metavar="DIR", help="YAML files of further tasks")
    tasks.add_argument("--num-fewshot", type=not_negative, metavar="N", help="examples in a prompt (default: a task's)")
    tasks.add_argument("--limit", type=positive, metavar="N", help="documents of each task (default: all)")
    parser.add_argument(
        "--every-checkpoint", action="store_true", help="evaluate every complete iteration that a run has saved"
    )


def _names(text: str) -> list[str]:
    """An argparse type: names with commas between them."""
    if not all(names := text.split(",")):
        raise argparse.ArgumentTypeError(f"{text!r} has an empty name")
    return names


def check_arguments(args: argparse.Namespace) -> None:
    """Refuse arguments that do nothing together.

    Raises:
        SlimError: which.
    """
    if args.data is None and args.tasks is None and args.acceptance is None:
        raise SlimError("nothing to evaluate on", fix="give --data, --acceptance or --tasks")
    compared = args.data if args.data is not None else args.acceptance
    needs = {
        "--data or --acceptance": (compared, {"--teacher": args.teacher}),
        "--data": (args.data, {"--record": args.record or None}),
        "--teacher": (args.teacher, {"--teacher-hf-config": args.teacher_hf_config}),
        "--tasks": (
            args.tasks,
            {"--tasks-dir": args.tasks_dir, "--num-fewshot": args.num_fewshot, "--limit": args.limit},
        ),
    }
    for needed, (value, dependent) in needs.items():
        for flag, given in dependent.items():
            if value is None and given is not None:
                raise SlimError(f"{flag} without {needed}", fix=f"give {needed}, or leave {flag} out")
    if args.every_checkpoint and args.record:
        raise SlimError("--record is for one checkpoint", fix="leave it or --every-checkpoint out")


@dataclass(frozen=True)
class Extras:
    """What is measured besides losses, opened and found to be there."""

    teacher: Teacher | None
    tasks: Tasks | None


def open_extras(args: argparse.Namespace) -> Extras:
    """The teacher and the tasks, before work starts."""
    from megatron_slim.checkpoint.convert import log_left_out, open_checkpoint
    from megatron_slim.evaluation.tasks import Tasks
    from megatron_slim.evaluation.teacher import Teacher

    tasks = teacher = None
    if args.tasks is not None:
        tasks = Tasks(args.tasks, tasks_dir=args.tasks_dir, num_fewshot=args.num_fewshot, limit=args.limit)
    if args.teacher is not None and args.data is not None:
        checkpoint = open_checkpoint(args.teacher, args.teacher_hf_config)
        log_left_out(checkpoint)
        teacher = Teacher(checkpoint)
    return Extras(teacher, tasks)


def describe_comparison(results: Mapping[str, Any]) -> str:
    """What a teacher adds to the line of the losses."""
    if "kl" not in results:
        return ""
    mtp = "".join(f", mtp {depth} {kl:.4f}" for depth, kl in enumerate(results["mtp_kl"], start=1))
    return (
        f"; KL from the teacher {results['kl']:.4f}{mtp}, same most probable token at "
        f"{results['top1_agreement']:.1%}, teacher's loss {results['teacher_loss']:.4f}"
    )


def dtype_of(args: argparse.Namespace) -> torch.dtype | None:
    """What ``--dtype`` names."""
    import torch

    return getattr(torch, DTYPES[args.dtype]) if args.dtype else None


def check_tasks(args: argparse.Namespace, load: Path) -> None:
    """See that tasks can be asked of a checkpoint."""
    from megatron_slim.checkpoint.convert import open_checkpoint
    from megatron_slim.evaluation.tasks import check_tokenizer

    check_tokenizer(open_checkpoint(load, **load_options(args)))


def run_tasks(args: argparse.Namespace, load: Path, tasks: Tasks) -> dict[str, Any]:
    """Score a checkpoint on tasks; a line for every metric of those that were asked for."""
    from megatron_slim.checkpoint.convert import open_checkpoint

    checkpoint = open_checkpoint(load, **load_options(args))
    found = tasks.run(checkpoint, micro_batch_size=args.micro_batch_size, dtype=dtype_of(args))
    for name in tasks.names:
        for metric, value in _metrics(found, name):
            error = "" if value["stderr"] is None else f" +- {value['stderr']:.4f}"
            logger.info(f"{name}: {metric} {value['value']:.4f}{error}")
    return {"tasks": found, "tasks_left_out": tasks.left_out}


def _metrics(tasks: Mapping[str, Any], name: str) -> Iterator[tuple[str, Mapping[str, float]]]:
    """The metrics of a task that have a value; a group may have none of its own."""
    for metric, found in tasks.get(name, {"metrics": {}})["metrics"].items():
        if found["value"] is not None:
            yield metric, found


def evaluate_every(
    args: argparse.Namespace, measure: Callable[[Path], dict[str, Any]], names: Sequence[str]
) -> dict[str, Any]:
    """Measure every complete iteration of a run; print them as a table."""
    from megatron_slim.checkpoint.tracker import complete_iterations

    found = [{"iteration": iteration, **measure(directory)} for iteration, directory in complete_iterations(args.load)]
    print_curve(found, names)
    return {"load": str(args.load), "checkpoints": found}


def print_curve(checkpoints: Sequence[Mapping[str, Any]], names: Sequence[str]) -> None:
    """One row for every checkpoint."""
    from rich.table import Table

    table = Table()
    rows = [_row(each, names) for each in checkpoints]
    for column in rows[0]:
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(*row.values())
    wide_console().print(table)


def _row(results: Mapping[str, Any], names: Sequence[str]) -> dict[str, str]:
    row = {"iteration": str(results["iteration"])}
    row |= {key: f"{results[key]:.4f}" for key in ("loss", "perplexity") if key in results}
    row |= {f"mtp {depth}": f"{loss:.4f}" for depth, loss in enumerate(results.get("mtp_loss", ()), start=1)}
    row |= {key: f"{results[key]:.4f}" for key in ("kl", "top1_agreement") if key in results}
    for name in names:
        row |= {f"{name} {metric}": f"{found['value']:.4f}" for metric, found in _metrics(results["tasks"], name)}
    return row
