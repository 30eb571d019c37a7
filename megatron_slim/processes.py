"""How processes end: with their parent, at once, or as one rank of many."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from time import sleep
from typing import NoReturn

from megatron_slim.errors import EXIT_USER_ERROR, SlimError

_SECONDS_BEHIND_RANK_0 = 10.0  # in which the launcher ends the ranks whose error rank 0 has printed


def die_with_parent() -> None:
    """Have the kernel kill this process as soon as its parent has died (Linux; elsewhere nothing).

    A rank must not train on, nor a process write on, next to the job that is started again when its parent was killed.
    """
    if sys.platform == "linux":
        import ctypes

        pr_set_pdeathsig = 1
        ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, int(signal.SIGKILL))


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
