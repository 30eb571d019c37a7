"""List the recipes that come with the package, by the names that --recipe takes."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Sequence
from itertools import takewhile

from megatron_slim.aliases import JsonObject
from megatron_slim.cli.tool import run_command
from megatron_slim.packaged import directory, recipe_names


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command has no arguments of its own."""


def recipes(args: argparse.Namespace) -> JsonObject:
    """Print every recipe with the comment at its head."""
    found = {}
    for name in recipe_names():
        path = directory() / "recipes" / f"{name}.yaml"
        lines = takewhile(lambda line: line.strip("# "), path.read_text(encoding="utf-8").splitlines())
        about = " ".join(line.removeprefix("#").strip() for line in lines if line.startswith("#"))
        found[name] = {"path": str(path), "about": about}
        print(f"{name}\n{textwrap.indent(textwrap.fill(about, 100), '  ')}")
    return {"recipes": found}


def main(argv: Sequence[str], prog: str) -> None:
    """Run the command."""
    run_command(__doc__ or "", add_arguments, recipes, argv, prog)
