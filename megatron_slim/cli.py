"""What all tools share: the argument parser, results on standard output, progress on standard error."""

from __future__ import annotations

import argparse
import json
import logging
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from megatron_slim import __version__
from megatron_slim.errors import EXIT_USER_ERROR, SlimError

T = TypeVar("T")


def tool_parser(description: str) -> argparse.ArgumentParser:
    """An argument parser with the options that every tool has."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--json", action="store_true", help="make the last line of standard output one JSON object")
    parser.add_argument("--version", action="version", version=f"megatron_slim {__version__}")
    return parser


def run_tool(main: Callable[[], dict[str, Any]], *, as_json: bool) -> None:
    """Run a tool; print its results as JSON when asked to; a `SlimError` is one line on stderr and exit code 2."""
    _quiet_libraries()
    try:
        results = main()
    except SlimError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(EXIT_USER_ERROR) from None
    if as_json:
        print(json.dumps(results, allow_nan=False), flush=True)


def _quiet_libraries() -> None:
    # Megatron and torch announce at import what this machine lacks, which a tool's user can do nothing about;
    # tools/doctor.py says it where it matters. `python -W` brings the warnings back.
    if not sys.warnoptions:
        warnings.filterwarnings("ignore", module=r"(megatron|torch|transformers)(\.|$)")
    logging.getLogger("megatron").setLevel(logging.WARNING)
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)


def say(message: str) -> None:
    """A line for the person who watches: standard error, so that standard output stays the results'."""
    print(message, file=sys.stderr, flush=True)


def progress(items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """Pass ``items`` through with a progress bar on standard error; silent when that is no terminal."""
    if not sys.stderr.isatty():
        yield from items
        return
    from rich.console import Console
    from rich.progress import track

    yield from track(items, description, total=total, console=Console(stderr=True), transient=True)
