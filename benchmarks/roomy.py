#!/usr/bin/env python3
"""Run a tool as if its disk were large enough: the benchmark digs holes where it writes zeros.

    python benchmarks/roomy.py tools/convert_checkpoint.py --load ... --save ...

Only `os.statvfs` is changed, by which the tools ask how much space is free.
"""

from __future__ import annotations

import os
import runpy
import sys

FREE = 1 << 50  # bytes


def pretend() -> None:
    """Let every file system have a petabyte free."""
    real = os.statvfs

    def statvfs(path: int | str | bytes | os.PathLike[str] | os.PathLike[bytes]) -> os.statvfs_result:
        found = real(path)
        blocks = FREE // found.f_frsize
        return os.statvfs_result((*found[:2], blocks, blocks, blocks, *found[5:]))

    os.statvfs = statvfs


if __name__ == "__main__":
    pretend()
    del sys.argv[0]
    runpy.run_path(sys.argv[0], run_name="__main__")
