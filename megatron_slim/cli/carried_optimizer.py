"""The arguments with which a pruning carries the optimizer's state of a run over to the next phase."""

from __future__ import annotations

import argparse

from megatron_slim.recipe_run import DEFAULT_MOMENT_RULE, MOMENT_RULES


def add_optimizer_arguments(parser: argparse.ArgumentParser) -> None:
    """``--carry-optimizer`` and the rule for merged experts."""
    parser.add_argument(
        "--carry-optimizer",
        action="store_true",
        help="prune the optimizer's moments and main weights as the weights; --load is the torch_dist checkpoint of a "
        "run that saved with --dist-ckpt-optim-fully-reshardable",
    )
    parser.add_argument(
        "--moments-of-merged",
        choices=MOMENT_RULES,
        help="with --carry-optimizer: moments of a merged expert, the sum of its members' or its base's own "
        f"({DEFAULT_MOMENT_RULE})",
    )
