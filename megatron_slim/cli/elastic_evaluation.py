"""``evaluate --elastic``: every budget of one checkpoint, and sizes between them, in one table."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from megatron_slim.aliases import JsonObject, ReadOptions
from megatron_slim.cli.evaluation_extras import figures_of, print_rows
from megatron_slim.errors import SlimError

if TYPE_CHECKING:
    from megatron_slim.checkpoint.convert import Checkpoint
    from megatron_slim.pruning.elastic import Elastic
    from megatron_slim.pruning.plan import Plan

logger = logging.getLogger(__name__)
Measure = Callable[["Checkpoint"], JsonObject]
_SIZES = {"parameters": "parameters", "active_parameters": "active, without MTP", "bytes": "bytes"}


def add_elastic_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of what is measured of an elastic checkpoint."""
    group = parser.add_argument_group("elastic checkpoints")
    group.add_argument("--elastic", action="store_true", help="evaluate every budget of an elastic checkpoint")
    group.add_argument(
        "--between",
        action="store_true",
        help="with --elastic: also the sizes that neighbouring budgets give together, which no run has trained",
    )


def check_elastic_arguments(args: argparse.Namespace) -> None:
    """Refuse arguments that do nothing together.

    Raises:
        SlimError: which.
    """
    if args.between and not args.elastic:
        raise SlimError("--between without --elastic", fix="give --elastic, or leave --between out")
    for flag, given in (("--record", args.record), ("--every-checkpoint", args.every_checkpoint)):
        if args.elastic and given:
            raise SlimError(f"{flag} and --elastic exclude one another", fix="leave one out")


def evaluate_budgets(
    args: argparse.Namespace, options: ReadOptions, measure: Measure, names: Sequence[str]
) -> JsonObject:
    """Measure every budget as the checkpoint that its slice would be; print them as a table.

    Args:
        args: of the command.
        options: how to read the checkpoint.
        measure: evaluates an opened checkpoint.
        names: tasks, for the table.

    Returns:
        ``load``, and ``budgets``: a list of name, sizes and figures; ``untrained`` marks sizes between budgets.

    Raises:
        SlimError: it is not an elastic checkpoint, or its document is for another model.
    """
    from megatron_slim.checkpoint.convert import log_left_out, open_checkpoint
    from megatron_slim.checkpoint.huggingface_writer import total_bytes
    from megatron_slim.pruning.apply import PrunedCheckpoint
    from megatron_slim.pruning.elastic_slices import elastic_at, fitted
    from megatron_slim.pruning.report import summarise

    document = elastic_at(args.load)
    source = open_checkpoint(args.load, **options)
    log_left_out(source)
    elastic = fitted(document, source)
    found = []
    for name, plan, known in _sizes(elastic, args.between):
        logger.info(f"{args.load}: {name}")
        checkpoint = PrunedCheckpoint(plan, source, check_source=False)
        summary = summarise(checkpoint.shape, total_bytes(checkpoint.shape, checkpoint.dtypes))
        results = {**measure(checkpoint), "load": str(args.load)}
        found.append({"budget": name, **known, "sizes": summary, **results})
    print_rows([_row(each, names, between=args.between) for each in found])
    return {"load": str(args.load), "budgets": found}


def _sizes(elastic: Elastic, with_between: bool) -> Iterator[tuple[str, Plan, JsonObject]]:
    """Name, plan and what is known of it, from the largest."""
    from megatron_slim.pruning.between import between

    for budget in elastic.budgets:
        yield budget.name, budget.plan, {"weight": budget.weight, "untrained": False}
    for size in between(elastic) if with_between else ():
        yield size.name, size.plan, {"weight": None, "untrained": True}


def _row(results: JsonObject, names: Sequence[str], *, between: bool) -> dict[str, str]:
    row = {"budget": results["budget"]}
    if between:
        row["trained"] = "untrained" if results["untrained"] else "a budget"
    row |= {label: f"{results['sizes'][key]:,}" for key, label in _SIZES.items()}
    return row | figures_of(results, names)
