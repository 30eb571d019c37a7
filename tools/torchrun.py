#!/usr/bin/env python3
"""torchrun, except for two things about its end; arguments are torchrun's.

A rank's exit code 2 becomes its own: such a rank has said in one line what is wrong, while torchrun would add a report
of its own and exit with 1. And SIGTERM is passed on to the ranks, whose end decides the exit code, while torchrun would
kill after 30 seconds a rank that is saving a checkpoint (``--exit-signal-handler``), and fail in any case.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from types import FrameType

import psutil


def pass_on(signum: int, frame: FrameType | None) -> None:
    """Send a signal to all ranks; without any yet, die of it."""
    ranks = psutil.Process().children()
    for rank in ranks:
        rank.send_signal(signum)
    if not ranks:
        signal.signal(signum, signal.SIG_DFL)
        os.kill(os.getpid(), signum)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, pass_on)
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    # The one says in a line what the exception says in full, the other that ranks compute with one thread.
    for name, level in (("elastic.multiprocessing.api", logging.CRITICAL), ("run", logging.ERROR)):
        logging.getLogger(f"torch.distributed.{name}").setLevel(level)
    try:
        run.main(["--signals-to-handle", "SIGINT,SIGHUP,SIGQUIT", *sys.argv[1:]])
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        if failure.exitcode != 2:
            raise
        sys.exit(2)
