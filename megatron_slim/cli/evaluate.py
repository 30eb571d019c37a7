"""Loss of a Hugging Face or torch_dist checkpoint; distance from a teacher; accepted MTP drafts; tasks."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_slim.cli.acceptance_run import add_acceptance_arguments, prompts_of, run_acceptance
from megatron_slim.cli.elastic_evaluation import add_elastic_arguments, check_elastic_arguments, evaluate_budgets
from megatron_slim.cli.evaluation_extras import (
    DTYPES,
    EPILOG,
    Extras,
    add_extra_arguments,
    check_arguments,
    describe_losses,
    dtype_of,
    evaluate_every,
    open_extras,
    run_tasks,
)
from megatron_slim.cli.tool import run_command
from megatron_slim.command_line import add_load_arguments, not_negative, positive

if TYPE_CHECKING:
    from megatron_slim.checkpoint.convert import Checkpoint

logger = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    parser.epilog = (
        "With --json: loss (nats per token), perplexity, tokens (predicted by the main head), mtp_loss (a list, one "
        "number per MTP depth, depth 1 first; empty without MTP), samples, seq_length, dtype" + EPILOG
    )
    add_load_arguments(parser, "evaluate")
    parser.add_argument(
        "--data",
        type=Path,
        help="prefix of a Megatron .bin/.idx pair; a .npy integer matrix [samples, sequence], used as it is; a sample "
        "set or a teacher's cache, with their masks; needed but for --tasks and --acceptance alone",
    )
    parser.add_argument("--seq-length", type=positive, metavar="N", help="tokens per sample; needed with .bin/.idx")
    parser.add_argument("--num-samples", type=positive, metavar="N", help="samples, drawn at random (default: all)")
    parser.add_argument("--seed", type=not_negative, default=0, metavar="N", help="seed of the random choice")
    parser.add_argument(
        "--micro-batch-size", type=positive, default=1, metavar="N", help="samples, or prompts, in one forward pass"
    )
    parser.add_argument("--dtype", choices=DTYPES, help="type to compute in (default: bf16 on a GPU, fp32 on a CPU)")
    parser.add_argument(
        "--record",
        action="store_true",
        help="keep the losses of the first tokens in slim_reference.json next to the checkpoint: training compares its "
        "teacher with them before the first step",
    )
    add_extra_arguments(parser)
    add_acceptance_arguments(parser)
    add_elastic_arguments(parser)


def evaluate(args: argparse.Namespace) -> dict[str, Any]:
    """Evaluate, say the result."""
    check_arguments(args)
    check_elastic_arguments(args)
    extras = open_extras(args)
    names = () if extras.tasks is None else extras.tasks.names
    if args.every_checkpoint:
        return evaluate_every(args, lambda load: _measure(args, load, extras), names)
    if args.elastic:
        options = extras.load_options(args, args.load)
        return evaluate_budgets(args, options, lambda each: _measure_opened(args, each, args.load, extras), names)
    return _measure(args, args.load, extras)


def _measure(args: argparse.Namespace, load: Path, extras: Extras) -> dict[str, Any]:
    """Evaluate one checkpoint on everything that was asked for."""
    from megatron_slim.checkpoint.convert import log_left_out, open_checkpoint

    checkpoint = open_checkpoint(load, **extras.load_options(args, load))
    log_left_out(checkpoint)
    return _measure_opened(args, checkpoint, load, extras)


def _measure_opened(args: argparse.Namespace, checkpoint: Checkpoint, load: Path, extras: Extras) -> dict[str, Any]:
    if extras.tasks is not None:
        from megatron_slim.evaluation.tasks import check_tokenizer

        check_tokenizer(checkpoint)  # now, not after the losses
    prompts = prompts_of(args, checkpoint, extras.teacher) if args.acceptance is not None else None
    results = _measure_losses(args, checkpoint, load, extras) if args.data is not None else {"load": str(load)}
    if prompts is not None:
        results |= run_acceptance(args, checkpoint, extras.teacher, prompts)
    if extras.tasks is not None:
        results |= run_tasks(args, checkpoint, extras.tasks)
    return results


def _measure_losses(args: argparse.Namespace, checkpoint: Checkpoint, load: Path, extras: Extras) -> dict[str, Any]:
    from megatron_slim.checkpoint.records import REFERENCE
    from megatron_slim.evaluation.perplexity import evaluate_checkpoint

    results = evaluate_checkpoint(
        checkpoint,
        load,
        args.data,
        seq_length=args.seq_length,
        num_samples=args.num_samples,
        micro_batch_size=args.micro_batch_size,
        dtype=dtype_of(args),
        seed=args.seed,
        record=args.record,
        teacher=extras.teacher,
    )
    logger.info(describe_losses(results))
    if args.record:
        logger.info(f"losses of the first tokens written to {load / REFERENCE}")
    return results


def main(argv: Sequence[str], prog: str) -> None:
    """Run the command."""
    run_command(__doc__ or "", add_arguments, evaluate, argv, prog)
