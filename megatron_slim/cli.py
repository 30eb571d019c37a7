"""What all tools share: the argument parser, results on standard output, progress on standard error."""

from __future__ import annotations

import argparse
import contextlib
import errno
import json
import logging
import os
import select
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from time import monotonic, sleep
from types import FrameType
from typing import Any, NoReturn, TypeVar

from megatron_slim import __version__
from megatron_slim.errors import EXIT_USER_ERROR, SlimError

T = TypeVar("T")
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_ROOM, _ACCESS, _NAME = "make room", "check its permissions", "choose another name"
_STORAGE = "check the storage it is on and run again"
# What the operating system refuses and a user can mend: what to do about it.
_MENDABLE = {
    errno.ENOSPC: _ROOM,
    errno.EDQUOT: f"{_ROOM} or ask for a larger quota",
    errno.EFBIG: "raise the limit of file sizes (ulimit -f)",
    errno.EIO: _STORAGE,
    errno.ESTALE: _STORAGE,
    errno.EROFS: "choose a place that can be written",
    errno.EACCES: _ACCESS,
    errno.EPERM: _ACCESS,
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENFILE: "close other programs: the machine has too many files open",
    errno.ENOMEM: "free memory or take a machine with more",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ENOTEMPTY: _NAME,
    errno.EISDIR: _NAME,
    errno.ENOTDIR: _NAME,
    errno.ELOOP: _NAME,
}
_LINE_SECONDS = 30.0  # between two lines of progress in a log
_SECONDS_BEHIND_RANK_0 = 10.0  # in which the launcher ends the ranks whose fault rank 0 has said
_FRAME_SECONDS = 0.1  # between two frames of a bar on a terminal


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
    """``--load`` and how to read it, the same in every tool that reads a checkpoint; ``purpose`` is a verb."""
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
    parser.add_argument(
        "--dequantize-fp8", action="store_true", help="take a Hugging Face checkpoint in block-scaled FP8 as bfloat16"
    )
    parser.add_argument(
        "--verify-integrity", action="store_true", help="hash the files of a torch_dist checkpoint first and compare"
    )
    parser.add_argument(
        "--without-mtp", action="store_true", help="leave its MTP block out, or the word of one that is not there"
    )


def load_options(args: argparse.Namespace) -> dict[str, Any]:
    """The options of `checkpoint.convert.open_checkpoint` that these arguments gave."""
    return {
        "hf_config": args.hf_config,
        "dequantize_fp8": args.dequantize_fp8,
        "without_mtp": args.without_mtp,
        "verify_integrity": args.verify_integrity,
        "allow_nonfinite": getattr(args, "allow_nonfinite", False),  # of the tools that write checkpoints
    }


# What a tool says of a checkpoint that it has written, by whether it was verified.
VERIFICATION = {True: "read back and verified", False: "NOT verified (--no-verify)"}


def add_write_arguments(parser: argparse.ArgumentParser) -> None:
    """What the tools that write checkpoints share: what they accept of the source, and how they write."""
    group = parser.add_argument_group("reading and writing")
    group.add_argument("--allow-nonfinite", action="store_true", help="take NaN and infinite weights as they are")
    group.add_argument("--no-verify", action="store_true", help="do not read the result back and compare it")
    group.add_argument(
        "--expert-storage",
        choices=("fused", "separate"),
        help="experts in Hugging Face files: one tensor for all of a layer, or one each (as the source has them if not "
        "given); a torch_dist checkpoint remembers it",
    )
    group.add_argument(
        "--processes", type=positive, metavar="N", help="write with N processes (chosen by size and cores if not given)"
    )


def write_options(args: argparse.Namespace) -> dict[str, Any]:
    """The options of `checkpoint.convert.write_checkpoint` that `add_write_arguments` gave."""
    return {
        "verify": not args.no_verify,
        "processes": args.processes,
        "expert_storage": args.expert_storage,
        "arguments": vars(args),
    }


def run_tool(main: Callable[[], dict[str, Any]], *, as_json: bool) -> None:
    """Run a tool; print its results as JSON when asked to.

    What a user can mend - a `SlimError`, a full disk, no permission, too little memory - is one line on standard error
    and exit code 2; everything else is a fault of ours, with its traceback and exit code 1. SIGTERM, SIGHUP and Ctrl-C
    end the tool with code 128 + signal, and so does a reader of its output that has left (141); in all cases nothing
    half-written stays behind.
    """
    _quiet_libraries()
    try:
        with _signals_exit():
            results = main()
            if as_json:
                print(json.dumps(results, allow_nan=False))
            sys.stdout.flush()
    except BrokenPipeError:
        if not _reader_left():
            raise
        # Python flushes both at its end, and would complain.
        for stream in (1, 2):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
        raise SystemExit(128 + signal.SIGPIPE) from None
    except Exception as error:
        fault = user_error(error)
        if fault is None:
            raise
        with contextlib.suppress(OSError):
            print(f"error: {fault}", file=sys.stderr, flush=True)
        raise SystemExit(EXIT_USER_ERROR) from None


def user_error(error: Exception) -> SlimError | None:
    """The error as one that a user can mend, if it is one."""
    if isinstance(error, SlimError):
        return error
    if isinstance(error, OSError) and error.errno in _MENDABLE:
        where = "" if error.filename is None else str(error.filename)
        return SlimError(os.strerror(error.errno).lower(), where=where, fix=_MENDABLE[error.errno])
    # torch's allocator raises a RuntimeError on a CPU.
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error)):
        details = f" ({str(error)[:200]})" if str(error) else ""
        return SlimError(f"not enough memory{details}", fix=_MENDABLE[errno.ENOMEM])
    return None


def _reader_left() -> bool:
    """Whether standard output or standard error is a pipe that nobody reads any more."""
    poll = select.poll()
    for stream in (1, 2):
        poll.register(stream, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


@contextlib.contextmanager
def _signals_exit() -> Iterator[None]:
    """Turn SIGTERM, SIGINT and SIGHUP into `SystemExit`, so that whoever is writing cleans up."""
    owner = os.getpid()

    def leave(signum: int, frame: FrameType | None) -> None:
        if os.getpid() != owner:  # a forked worker has nothing to clean up, and its parent waits for it to die
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)
            return
        for known in _SIGNALS:
            signal.signal(known, signal.SIG_IGN)  # a second one must not interrupt the cleaning
        raise SystemExit(128 + signum)

    # One that is ignored already is so on purpose: nohup, or a job in the background of a script.
    previous = {known: signal.getsignal(known) for known in _SIGNALS}
    for known, handler in previous.items():
        if handler is not signal.SIG_IGN:
            signal.signal(known, leave)
    try:
        yield
    finally:
        for known, handler in previous.items():
            signal.signal(known, handler)


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


def progress(items: Sequence[T], description: str) -> Iterator[T]:
    """Pass ``items`` through, and tell how far it is on standard error.

    A bar on a terminal; elsewhere, as in the log of a batch job, a line after an item, at most every half minute.
    """
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import track

        yield from track(items, description, console=Console(stderr=True), transient=True)
        return
    started = said = monotonic()
    for number, item in enumerate(items):
        now = monotonic()
        if number and now - said >= _LINE_SECONDS:
            said, left = now, (len(items) - number) * (now - started) / number
            say(f"{description}: {number} of {len(items)}, {duration(left)} left")
        yield item


@contextlib.contextmanager
def byte_progress(description: str, total_bytes: int) -> Iterator[Callable[[int], None]]:
    """Show how much of ``total_bytes`` is done, how fast it goes and how long it will take, on standard error.

    A bar on a terminal; elsewhere, as in the log of a batch job, a line every half minute.

    Yields:
        The function to call with the number of bytes that have been done since the last call.
    """
    with _bar(description, total_bytes) if sys.stderr.isatty() else _lines(description, total_bytes) as advance:
        yield advance


@contextlib.contextmanager
def _bar(description: str, total: int) -> Iterator[Callable[[int], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    bar = Progress(
        *(TextColumn("{task.description}"), BarColumn()),
        *(DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()),
        console=Console(stderr=True),
        transient=True,
        auto_refresh=False,  # no thread: callers fork, and a fork must not find the terminal's lock taken
        get_time=monotonic,
    )
    drawn = monotonic()

    def advance(done: int) -> None:
        nonlocal drawn
        now = monotonic()
        if due := now - drawn >= _FRAME_SECONDS:
            drawn = now
        bar.update(task, advance=done, refresh=due)

    with bar:
        task = bar.add_task(description, total=total)
        bar.refresh()
        yield advance


@contextlib.contextmanager
def _lines(description: str, total: int) -> Iterator[Callable[[int], None]]:
    started = said = monotonic()
    finished = 0

    def advance(done: int) -> None:
        nonlocal said, finished
        finished += done
        now = monotonic()
        if finished and now - said >= _LINE_SECONDS:
            said, speed = now, finished / (now - started)
            left = duration((total - finished) / speed)
            say(f"{description}: {finished / 1e9:.1f} of {total / 1e9:.1f} GB, {speed / 1e9:.2f} GB/s, {left} left")

    yield advance


def duration(seconds: float) -> str:
    """A time as a person says it: 50 s, 4 min, 2.5 h."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 3600 else f"{seconds / 3600:.1f} h"


def die_with_parent() -> None:
    """Have the kernel kill this process as soon as its parent has died (Linux; elsewhere nothing).

    A rank must not train on, nor a process write on, beside the job that is started again when its parent was killed.
    """
    if sys.platform == "linux":
        import ctypes

        pr_set_pdeathsig = 1
        ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, int(signal.SIGKILL))


def leave_ranks(fault: SlimError) -> NoReturn:
    """End one rank of many: ``fault`` as one line on standard error, and exit code 2.

    Mostly all ranks find the same fault. Rank 0 says it, and the launcher ends the others; one that is still there
    some seconds later has found a fault of its own, or is on another node, and says it. Of a node's ranks the first
    comes before the others.
    """
    if os.environ.get("RANK", "0") != "0":
        sleep(_SECONDS_BEHIND_RANK_0 * (1 if os.environ.get("LOCAL_RANK") == "0" else 1.5))
    say(f"error: {fault}")
    exit_at_once(EXIT_USER_ERROR)


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
