"""What a plan is measured on: the first candidates of a budget, or single layers (no torch until it is done)."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_slim.command_line import positive
from megatron_slim.errors import SlimError

if TYPE_CHECKING:
    from megatron_slim.pruning.candidates import Measuring

DEFAULT_TOP = 3


def add_search_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of measuring, the same in every tool that plans."""
    group = parser.add_argument_group("search under a recipe's budget, and experts allocated by loss")
    group.add_argument(
        "--search-data",
        type=Path,
        metavar="DATA",
        help="evaluate the best candidates, without training, on this .bin/.idx prefix or .npy matrix, and take the "
        "one with the lowest loss; with experts.allocation loss, what layers are measured on (default: the first "
        "samples of calibration)",
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
    from megatron_slim.pruning.candidates import Measuring

    top = args.search_top or DEFAULT_TOP
    return Measuring(args.search_data, args.search_samples, args.search_seq_length, top)
