#!/usr/bin/env python3
"""torchrun, except that a rank's exit code becomes its own; arguments are torchrun's.

A rank that has said in one line what is wrong exits with code 2; torchrun would add a report of its own and exit
with 1.
"""

from __future__ import annotations

import logging
import sys

if __name__ == "__main__":
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    # The one says in a line what the exception says in full, the other that ranks compute with one thread.
    for name, level in (("elastic.multiprocessing.api", logging.CRITICAL), ("run", logging.ERROR)):
        logging.getLogger(f"torch.distributed.{name}").setLevel(level)
    try:
        run.main()
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        if failure.exitcode != 2:
            raise
        sys.exit(2)
