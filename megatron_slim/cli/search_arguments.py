"""Measuring the first candidates of a budget, for the commands that plan (no torch until it is done)."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_slim.command_line import positive
from megatron_slim.errors import SlimError

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    from megatron_slim.checkpoint.convert import Checkpoint
    from megatron_slim.cli.pruning_run import Measuring
    from megatron_slim.pruning.plan import Plan

DEFAULT_TOP = 3


def add_search_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of measuring, the same in every tool that plans."""
    group = parser.add_argument_group("search under a recipe's budget")
    group.add_argument(
        "--search-data",
        type=Path,
        metavar="DATA",
        help="evaluate the best candidates, without training, on this .bin/.idx prefix or .npy matrix, and take the "
        "one with the lowest loss",
    )
    group.add_argument("--search-samples", type=positive, metavar="N", help="samples, drawn at random (default: all)")
    group.add_argument("--search-seq-length", type=positive, metavar="L", help="tokens per sample; needed with .bin")
    group.add_argument(
        "--search-top", type=positive, metavar="K", help=f"how many candidates to evaluate (default: {DEFAULT_TOP})"
    )


def measuring(args: argparse.Namespace) -> Measuring | None:
    """What `add_search_arguments` gave, None where nothing is to be measured.

    Raises:
        SlimError: details without data.
    """
    details = (args.search_samples, args.search_seq_length, args.search_top)
    if args.search_data is None:
        if any(value is not None for value in details):
            raise SlimError(
                "--search-samples, --search-seq-length or --search-top without data", fix="give --search-data"
            )
        return None
    from megatron_slim.cli.pruning_run import Measuring

    def losses(source: Checkpoint) -> Callable[[Plan], float]:
        return losses_of(source, args.search_data, args.search_samples, args.search_seq_length)

    return Measuring(losses, args.search_top or DEFAULT_TOP)


def losses_of(
    source: Checkpoint, data: Path, num_samples: int | None, seq_length: int | None
) -> Callable[[Plan], float]:
    """Reads the data; gives what evaluates the result of a plan: nats per token of the main head.

    Raises:
        DataError: the data do not fit the model.
    """
    from megatron_slim.evaluation.perplexity import read_evaluation_data

    samples = read_evaluation_data(data, source.shape, seq_length=seq_length, num_samples=num_samples)

    def loss(plan: Plan) -> float:
        from megatron_slim.evaluation.perplexity import evaluate
        from megatron_slim.pruning.apply import PrunedCheckpoint

        found = evaluate(PrunedCheckpoint(plan, source, check_source=False), samples).loss
        assert plan.search is not None, "only candidates are measured"
        sizes = plan.search.candidates[plan.search.chosen].sizes
        logger.info(f"candidate {', '.join(f'{axis} {size}' for axis, size in sizes.items())}: loss {found:.4f}")
        return found

    return loss
