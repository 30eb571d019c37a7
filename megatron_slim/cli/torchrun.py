"""torchrun with other exit codes; its arguments are torchrun's.

A rank's exit code 2 becomes its own: such a rank has printed in one line what is wrong, while torchrun would add a
report of its own and exit with 1. And SIGTERM is passed on to the ranks, whose end decides the exit code, while
torchrun would kill after 30 seconds a rank that is saving a checkpoint (``--exit-signal-handler``), and always fail.
"""

from __future__ import annotations

import errno
import logging
import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType

import psutil

from megatron_slim.errors import EXIT_USER_ERROR, SlimError

PORT_IN_USE = SlimError("the port is in use, as by another run on this machine", fix="give another --master-port")


def pass_on(signum: int, frame: FrameType | None) -> None:
    """Send a signal to all ranks; without any yet, die of it."""
    ranks = psutil.Process().children()
    for rank in ranks:
        rank.send_signal(signum)
    if not ranks:
        signal.signal(signum, signal.SIG_DFL)
        os.kill(os.getpid(), signum)


def main(argv: Sequence[str], prog: str) -> None:
    """Start the processes and wait for them."""
    if argv[:1] in (["-h"], ["--help"]):
        print(f"usage: {prog} [arguments of torchrun] SCRIPT [its arguments]\n\n{__doc__}")
        print("`python -m torch.distributed.run --help` lists the arguments of torchrun.")
        return
    signal.signal(signal.SIGTERM, pass_on)
    from torch.distributed import DistNetworkError, run
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    # The one reports in a line what the exception has in full, the other that ranks compute with one thread.
    for name, level in (("elastic.multiprocessing.api", logging.CRITICAL), ("run", logging.ERROR)):
        logging.getLogger(f"torch.distributed.{name}").setLevel(level)
    try:
        parser = run.get_args_parser()
        parser.prog = prog
        run.run(parser.parse_args(["--signals-to-handle", "SIGINT,SIGHUP,SIGQUIT", *argv]))
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        if failure.exitcode != EXIT_USER_ERROR:
            raise
        sys.exit(EXIT_USER_ERROR)
    except DistNetworkError as error:
        if errno.errorcode[errno.EADDRINUSE] not in str(error):
            raise
        logging.getLogger(__name__).error(f"error: {PORT_IN_USE}")
        sys.exit(EXIT_USER_ERROR)
