"""Show which optimizer updates what of a model: parameters of Megatron, the matrices in them, and why."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from megatron_slim.aliases import JsonObject
from megatron_slim.cli.terminal import wide_console
from megatron_slim.cli.tool import run_command
from megatron_slim.errors import SlimError
from megatron_slim.optimizers import AURORA, OPTIMIZERS
from megatron_slim.training.optimizer_flags import ALL, HIDDEN
from megatron_slim.training.optimizer_table import Line, entries, optimizer_lines
from megatron_slim.training.train_only import TRAIN_ONLY, chosen, train_only


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    parser.add_argument(
        "--load",
        type=Path,
        required=True,
        metavar="DIR",
        help="checkpoint of the model, Hugging Face or torch_dist, or a directory with its config.json",
    )
    parser.add_argument("--optimizer", choices=tuple(OPTIMIZERS), default=AURORA, help="as in training")
    parser.add_argument(
        "--optimizer-matrices", choices=(HIDDEN, ALL), default=HIDDEN, help="which matrices it updates, as in training"
    )
    parser.add_argument(
        TRAIN_ONLY, type=train_only, metavar="PART,...", help="parts that are trained, as in training (default: all)"
    )
    parser.add_argument("--without-mtp", action="store_true", help="leave the MTP block out, as in training")


def show(args: argparse.Namespace) -> JsonObject:
    """Print the table.

    Returns:
        Its rows, and how many elements each optimizer updates.

    Raises:
        SlimError: there is no config.json, or it describes no model that is known, or one without a part that is asked
            for.
    """
    from megatron_slim.checkpoint.described import read_shape
    from megatron_slim.checkpoint.torch_dist_names import HF_DIR

    directory = args.load / HF_DIR if (args.load / HF_DIR).is_dir() else args.load
    model = read_shape(directory, without_mtp=args.without_mtp)
    if (only := chosen(args)) is not None and (found := only.violations(model)):
        raise SlimError("; ".join(f"{TRAIN_ONLY} {sentence}" for sentence in found))
    lines = optimizer_lines(model, args.optimizer, all_matrices=args.optimizer_matrices == ALL, only=only)
    elements: dict[str, int] = {}
    for line in lines:
        elements[line.optimizer] = elements.get(line.optimizer, 0) + line.elements
    if not args.json:
        _print(lines, elements)
    return {"load": str(args.load), "rows": entries(lines), "elements": elements}


def _print(lines: list[Line], elements: dict[str, int]) -> None:
    from rich.table import Table

    table = Table()
    for title in ("parameter", "part", "shape", "number", "optimizer", "why"):
        table.add_column(title, justify="right" if title in ("shape", "number") else "left", overflow="fold")
    for line in lines:
        shape = " x ".join(map(str, line.shape))
        table.add_row(line.parameter, line.part, shape, f"{line.count:,}", line.optimizer, line.why)
    console = wide_console()
    console.print(table)
    whole = sum(elements.values())
    for name, count in elements.items():
        console.print(f"{name}: {count:,} elements, {count / whole:.1%}")


def main(argv: Sequence[str], prog: str) -> None:
    """Run the command."""
    run_command(__doc__ or "", add_arguments, show, argv, prog)
