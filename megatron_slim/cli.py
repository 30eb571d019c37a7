"""What all tools share: the argument parser, results on standard output, progress on standard error."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, TypeVar

from megatron_slim import __version__
from megatron_slim.errors import EXIT_USER_ERROR, SlimError

T = TypeVar("T")


class ToolParser(argparse.ArgumentParser):
    """An argument parser whose complaint is one line, as every other error of a tool is."""

    def error(self, message: str) -> NoReturn:
        """End the tool."""
        self.exit(EXIT_USER_ERROR, f"error: {message}; see {self.prog} --help\n")


def positive(text: str) -> int:
    """An argparse type: an integer above zero."""
    return _integer(text, 1, "a positive integer")


def not_negative(text: str) -> int:
    """An argparse type: an integer that is not below zero."""
    return _integer(text, 0, "an integer that is zero or more")


def _integer(text: str, least: int, wanted: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if value < least:
        raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")
    return value


def tool_parser(description: str) -> argparse.ArgumentParser:
    """An argument parser with the options that every tool has."""
    parser = ToolParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--json", action="store_true", help="make the last line of standard output one JSON object")
    parser.add_argument("--version", action="version", version=f"megatron_slim {__version__}")
    return parser


def add_load_arguments(parser: argparse.ArgumentParser, purpose: str) -> None:
    """``--load`` and ``--hf-config``, the same in every tool that reads a checkpoint; ``purpose`` is a verb."""
    parser.add_argument(
        "--load",
        type=Path,
        required=True,
        metavar="DIR",
        help=f"checkpoint to {purpose}, Hugging Face or torch_dist: the format is detected",
    )
    parser.add_argument(
        "--hf-config",
        type=Path,
        metavar="DIR",
        help="directory with config.json and tokenizer of a torch_dist checkpoint, where they are not in its hf/",
    )


def run_tool(main: Callable[[], dict[str, Any]], *, as_json: bool) -> None:
    """Run a tool; print its results as JSON when asked to.

    A `SlimError` is one line on standard error and exit code 2; SIGTERM ends the tool with code 143 and, as Ctrl-C
    does, leaves nothing half-written behind.
    """
    _quiet_libraries()
    try:
        with _sigterm_exits():
            results = main()
    except SlimError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(EXIT_USER_ERROR) from None
    if as_json:
        print(json.dumps(results, allow_nan=False), flush=True)


@contextlib.contextmanager
def _sigterm_exits() -> Iterator[None]:
    """Turn SIGTERM into `SystemExit`, so that whoever is writing cleans up."""
    owner = os.getpid()

    def leave(signum: int, frame: FrameType | None) -> None:
        if os.getpid() != owner:  # a forked worker has nothing to clean up, and its parent waits for it to die
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)
            return
        signal.signal(signum, signal.SIG_IGN)  # a second one must not interrupt the cleaning
        raise SystemExit(128 + signum)

    previous = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


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


def exit_at_once(code: int) -> NoReturn:
    """End this process without teardown, which would wait for a peer that has left; take its children along.

    Megatron's checkpoint writer keeps a worker process, which would otherwise outlive us with all that it has imported.
    """
    import psutil

    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
