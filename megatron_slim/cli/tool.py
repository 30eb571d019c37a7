"""How a command runs: its parser, its results on standard output, and how it ends."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import select
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from types import FrameType

from megatron_slim.aliases import JsonObject
from megatron_slim.cli.terminal import messages_shown, progress_shown
from megatron_slim.command_line import tool_parser
from megatron_slim.errors import EXIT_USER_ERROR, user_error
from megatron_slim.garbage import no_collection_at_exit
from megatron_slim.reporting import use_progress

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def run_command(
    description: str,
    add_arguments: Callable[[argparse.ArgumentParser], None],
    run: Callable[[argparse.Namespace], JsonObject],
    argv: Sequence[str],
    prog: str,
) -> None:
    """Parse a command line and run what it asks for.

    Args:
        description: of the command, as ``--help`` shows it.
        add_arguments: adds its arguments to a parser that has those of every command.
        run: does it, and gives its results, which ``--json`` prints.
        argv: the arguments.
        prog: the name under which it was called.
    """
    parser = tool_parser(description)
    parser.prog = prog
    add_arguments(parser)
    arguments = parser.parse_args(argv)
    rank = os.environ.get("RANK", "0")  # of processes that a launcher has started, the first has the results
    run_tool(lambda: run(arguments), as_json=arguments.json and rank == "0")


def run_tool(main: Callable[[], JsonObject], *, as_json: bool) -> None:
    """Run a tool; print its results as JSON when asked to.

    What a user can fix - a `SlimError`, a full disk, no permission, too little memory - is one line on standard error
    and exit code 2; everything else is a bug of ours, with its traceback and exit code 1. SIGTERM, SIGHUP and Ctrl-C
    end the tool with code 128 + signal, and so does a reader of its output that has left (141); in all cases nothing
    half-written stays behind.
    """
    _quiet_libraries()
    no_collection_at_exit()
    try:
        with messages_shown(), use_progress(progress_shown()), _signals_exit():
            results = main()
            if as_json:
                print(json.dumps(results, allow_nan=False))
            sys.stdout.flush()
    except BrokenPipeError:
        if not _reader_left():
            raise
        # Python flushes both when it ends, and would print an error.
        for stream in (1, 2):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
        raise SystemExit(128 + signal.SIGPIPE) from None
    except Exception as error:
        found = user_error(error)
        if found is None:
            raise
        with contextlib.suppress(OSError):
            print(f"error: {found}", file=sys.stderr, flush=True)
        raise SystemExit(EXIT_USER_ERROR) from None


def _reader_left() -> bool:
    """Whether standard output or standard error is a pipe whose reader has gone."""
    poll = select.poll()
    for stream in (1, 2):
        poll.register(stream, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _leave(signum: int, frame: FrameType | None) -> None:
    """Handler of a signal that ends the tool."""
    for known in _SIGNALS:
        signal.signal(known, signal.SIG_IGN)  # a second one must not interrupt the cleaning
    raise SystemExit(128 + signum)


def _die_of_signals() -> None:
    """Give a forked worker the signals' own meaning: it has nothing to clean up, and its parent waits for its end.

    A handler would not do. Python runs one between two of its instructions, and a signal that arrives right before
    a system call that waits is heeded only when that call ends.
    """
    for known in _SIGNALS:
        if signal.getsignal(known) is _leave:
            signal.signal(known, signal.SIG_DFL)


os.register_at_fork(after_in_child=_die_of_signals)


@contextlib.contextmanager
def _signals_exit() -> Iterator[None]:
    """Turn SIGTERM, SIGINT and SIGHUP into `SystemExit`, so that whoever is writing cleans up."""
    # One that is ignored already is so on purpose: nohup, or a job in the background of a script.
    previous = {known: signal.getsignal(known) for known in _SIGNALS}
    for known, handler in previous.items():
        if handler is not signal.SIG_IGN:
            signal.signal(known, _leave)
    try:
        yield
    finally:
        for known, handler in previous.items():
            signal.signal(known, handler)


def _quiet_libraries() -> None:
    # Megatron and torch announce at import what this machine lacks, which a tool's user can do nothing about;
    # the doctor says it where it matters. `python -W` brings the warnings back.
    if not sys.warnoptions:
        warnings.filterwarnings("ignore", module=r"(megatron|torch|transformers)(\.|$)")
    logging.getLogger("megatron").setLevel(logging.WARNING)
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of every default that a task takes
