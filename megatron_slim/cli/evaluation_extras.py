"""What `evaluate` measures besides losses: the distance from a teacher, tasks, and all checkpoints of a run."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_slim.aliases import ReadOptions
from megatron_slim.cli.terminal import wide_console
from megatron_slim.command_line import load_options, not_negative, positive
from megatron_slim.errors import SlimError

if TYPE_CHECKING:
    import torch

    from megatron_slim.checkpoint.convert import Checkpoint
    from megatron_slim.evaluation.tasks import Tasks
    from megatron_slim.evaluation.teacher import Teacher

logger = logging.getLogger(__name__)

DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
EPILOG = (
    "; with --teacher also teacher_loss, loss_difference (loss less teacher_loss), kl (nats per token), top1_agreement "
    "(a share), mtp_kl and mtp_top1_agreement (lists); of all these losses, KLs and shares the standard error over "
    "samples, such as loss_stderr (null of one sample); with --acceptance also acceptance, and teacher_acceptance: acc "
    "(a list, share of drafts whose first 1, 2, ... tokens were all accepted), mean_accepted_length, drafts, rounds, "
    "tokens, and per_position, the same over all positions; with --tasks also tasks and tasks_left_out; with "
    "--every-checkpoint a list of all this, by iteration; with --elastic a list of it, by budget, with sizes."
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
        "--data": (
            args.data,
            {"--record": args.record or None, "--seq-length": args.seq_length, "--num-samples": args.num_samples},
        ),
        "--acceptance": (
            args.acceptance,
            {
                "--num-prompts": args.num_prompts,
                "--prompt-tokens": args.prompt_tokens,
                "--draft-tokens": args.draft_tokens,
                "--max-new-tokens": args.max_new_tokens,
                "--stop-at-eos": args.stop_at_eos or None,
            },
        ),
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
    teacher_in_fp8: bool = False

    def load_options(self, args: argparse.Namespace, load: Path) -> ReadOptions:
        """How to read the checkpoint: ``--dequantize-fp8`` is for each of the two that is in FP8."""
        options = load_options(args)
        if self.teacher_in_fp8 and not is_in_fp8(load):
            options["dequantize_fp8"] = False
        return options


def is_in_fp8(path: Path) -> bool:
    """Whether it is a Hugging Face checkpoint in block-scaled FP8."""
    from megatron_slim.checkpoint.huggingface_files import is_fp8
    from megatron_slim.checkpoint.iterations import is_torch_dist

    return not is_torch_dist(path) and is_fp8(path)


def open_extras(args: argparse.Namespace) -> Extras:
    """The teacher and the tasks, before work starts."""
    from megatron_slim.checkpoint.convert import log_left_out, open_checkpoint
    from megatron_slim.evaluation.tasks import Tasks
    from megatron_slim.evaluation.teacher import Teacher

    tasks = teacher = None
    in_fp8 = False
    if args.tasks is not None:
        tasks = Tasks(args.tasks, tasks_dir=args.tasks_dir, num_fewshot=args.num_fewshot, limit=args.limit)
    if args.teacher is not None:
        in_fp8 = args.dequantize_fp8 and is_in_fp8(args.teacher)
        checkpoint = open_checkpoint(args.teacher, args.teacher_hf_config, dequantize_fp8=in_fp8)
        log_left_out(checkpoint)
        teacher = Teacher(checkpoint)
    return Extras(teacher, tasks, in_fp8)


def shown(results: Mapping[str, Any], key: str, digits: int = 4) -> str:
    """A figure with its standard error, where it has one.

    >>> shown({"kl": 0.25, "kl_stderr": 0.01}, "kl"), shown({"kl": 0.25, "kl_stderr": None}, "kl")
    ('0.2500 +- 0.0100', '0.2500')
    """
    return _with_error(results[key], results.get(f"{key}_stderr"), digits)


def _with_error(value: float, error: float | None, digits: int = 4) -> str:
    return f"{value:.{digits}f}" + ("" if error is None else f" +- {error:.{digits}f}")


def _by_depth(results: Mapping[str, Any], key: str) -> dict[str, str]:
    """Figures of every MTP depth with their errors: ``mtp 1``."""
    values = results.get(key, [])
    errors = results.get(f"{key}_stderr") or [None] * len(values)
    pairs = enumerate(zip(values, errors, strict=True), start=1)
    return {f"mtp {depth}": _with_error(*pair) for depth, pair in pairs}


def _listed(figures: Mapping[str, str]) -> str:
    return "".join(f", {name} {figure}" for name, figure in figures.items())


def describe_losses(results: Mapping[str, Any]) -> str:
    """Losses, and what a teacher adds to them, in one line."""
    line = f"loss {shown(results, 'loss')}, perplexity {shown(results, 'perplexity', 3)}"
    line += f"{_listed(_by_depth(results, 'mtp_loss'))} over {results['tokens']} tokens"
    if results["loss_stderr"] is None:
        line += " (one sample, so no standard errors)"
    if "kl" not in results:
        return line
    agreement, error = results["top1_agreement"], results["top1_agreement_stderr"]
    return (
        f"{line}; KL from the teacher {shown(results, 'kl')}{_listed(_by_depth(results, 'mtp_kl'))}, same most "
        f"probable token at {agreement:.1%}{'' if error is None else f' +- {error:.1%}'}, teacher's loss "
        f"{shown(results, 'teacher_loss')}, difference {shown(results, 'loss_difference')}"
    )


def dtype_of(args: argparse.Namespace) -> torch.dtype | None:
    """What ``--dtype`` names."""
    import torch

    return getattr(torch, DTYPES[args.dtype]) if args.dtype else None


def run_tasks(args: argparse.Namespace, checkpoint: Checkpoint, tasks: Tasks) -> dict[str, Any]:
    """Score a checkpoint on tasks; a line for every metric of those that were asked for."""
    found = tasks.run(checkpoint, micro_batch_size=args.micro_batch_size, dtype=dtype_of(args))
    for name in tasks.names:
        for metric, value in _metrics(found, name):
            logger.info(f"{name}: {metric} {_with_error(value['value'], value['stderr'])}")
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
    print_rows([{"iteration": str(each["iteration"]), **figures_of(each, names)} for each in checkpoints])


def print_rows(rows: Sequence[Mapping[str, str]]) -> None:
    """A table of rows that have the columns of the first, a cell by column."""
    from rich.table import Table

    table = Table()
    for column in rows[0]:
        table.add_column(column, justify="right", overflow="fold")
    for row in rows:
        table.add_row(*(row.get(column, "") for column in rows[0]))
    wide_console().print(table)


def figures_of(results: Mapping[str, Any], names: Sequence[str]) -> dict[str, str]:
    """What was measured of a checkpoint, on tasks of these names too, as cells of a table by their columns."""
    row = {key: shown(results, key) for key in ("loss", "perplexity") if key in results}
    row |= _by_depth(results, "mtp_loss")
    row |= {key: shown(results, key) for key in ("kl", "top1_agreement") if key in results}
    if (acceptance := results.get("acceptance")) is not None:
        row["accepted length"] = f"{acceptance['mean_accepted_length']:.3f}"
    for name in names:
        row |= {
            f"{name} {m}": _with_error(found["value"], found["stderr"]) for m, found in _metrics(results["tasks"], name)
        }
    return row
