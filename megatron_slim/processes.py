"""How processes run to their end, and how they end: with their parent, at once, or as one rank of many."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from time import sleep
from types import FrameType
from typing import Any, NoReturn

from megatron_slim.errors import EXIT_USER_ERROR, SlimError, user_error

_FORWARDED = (signal.SIGUSR1, signal.SIGUSR2)  # what Slurm sends before a time limit; a training run saves
_SECONDS_BEHIND_RANK_0 = 10.0  # in which the launcher ends the ranks whose error rank 0 has printed


def die_with_parent() -> None:
    """Have the kernel kill this process as soon as its parent has died (Linux; elsewhere nothing).

    A rank must not train on, nor a process write on, next to the job that is started again when its parent was killed.
    """
    if sys.platform == "linux":
        import ctypes

        pr_set_pdeathsig = 1
        ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, int(signal.SIGKILL))


def run_to_end(command: Sequence[str], **options: Any) -> int:
    """Run a command and wait for it; it ends where this process is about to, and gets what a training run saves at.

    Args:
        command: its words.
        options: of `subprocess.Popen`.

    Returns:
        Its exit code.
    """
    process = subprocess.Popen(list(command), preexec_fn=die_with_parent, **options)
    with _ended(process), _forwarded(process):
        return process.wait()


@contextlib.contextmanager
def _ended(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """End the process where this one is about to end."""
    try:
        yield
    except BaseException:
        process.terminate()
        process.wait()
        raise


@contextlib.contextmanager
def _forwarded(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Pass on what a training run saves at."""

    def forward(signum: int, frame: FrameType | None) -> None:
        os.kill(process.pid, signum)

    previous = {known: signal.signal(known, forward) for known in _FORWARDED}
    try:
        yield
    finally:
        for known, handler in previous.items():
            signal.signal(known, handler)


def leave_ranks(error: SlimError) -> NoReturn:
    """End one rank of many: ``error`` as one line on standard error, and exit code 2.

    Mostly all ranks find the same error. Rank 0 prints it, and the launcher ends the others; one that is still there
    some seconds later has found an error of its own, or is on another node, and prints it. Of a node's ranks the first
    comes before the others.
    """
    if os.environ.get("RANK", "0") != "0":
        sleep(_SECONDS_BEHIND_RANK_0 * (1 if os.environ.get("LOCAL_RANK") == "0" else 1.5))
    print(f"error: {error}", file=sys.stderr, flush=True)
    exit_at_once(EXIT_USER_ERROR)


@contextlib.contextmanager
def leaving_together() -> Iterator[None]:
    """On one rank of many: an error that a user can fix ends all of them, by `leave_ranks`."""
    try:
        yield
    except Exception as error:
        if (mistake := user_error(error)) is None:
            raise
        leave_ranks(mistake)


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
