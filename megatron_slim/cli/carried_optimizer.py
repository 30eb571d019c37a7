"""The arguments with which a pruning carries the optimizer's state of a run over to the next phase."""

from __future__ import annotations

import argparse

from megatron_slim.errors import SlimError
from megatron_slim.recipe_run import MOMENT_RULES

FLAG, RULE = "--carry-optimizer", "--moments-of-merged"
RULES, DEFAULT_RULE = MOMENT_RULES, "base"  # the better one, as measured (docs/benchmarks.md)


def add_optimizer_arguments(parser: argparse.ArgumentParser) -> None:
    """``--carry-optimizer`` and the rule for merged experts."""
    parser.add_argument(
        FLAG,
        action="store_true",
        help="prune the optimizer's moments and main weights as the weights; --load is the torch_dist checkpoint of a "
        "run that saved with --dist-ckpt-optim-fully-reshardable",
    )
    parser.add_argument(
        RULE,
        choices=RULES,
        help=f"with {FLAG}: moments of a merged expert, the sum of its members' or its base's own ({DEFAULT_RULE})",
    )


def moments_of_merged(args: argparse.Namespace) -> str | None:
    """The rule for merged experts; None if the optimizer is not carried.

    Raises:
        SlimError: the arguments contradict one another.
    """
    if not args.carry_optimizer:
        if args.moments_of_merged is not None:
            raise SlimError(f"{RULE} without {FLAG}", fix=f"add {FLAG}, or leave {RULE} out")
        return None
    if args.to != "torch_dist":
        raise SlimError(f"{FLAG} with --to {args.to}, which holds no optimizer state", fix="give --to torch_dist")
    return str(args.moments_of_merged or DEFAULT_RULE)
