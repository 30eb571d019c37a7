"""Limits within which input of any kind must be refused."""

from __future__ import annotations

import contextlib
import resource
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

SECONDS, MEMORY = 60, 1 << 30


@contextlib.contextmanager
def limited() -> Iterator[None]:
    """What runs for a minute, or takes a gigabyte more than there is now, fails."""

    def expire(signum: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"still running after {SECONDS} s")

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    previous = signal.signal(signal.SIGALRM, expire)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, before[1]))
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)
        resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.fixture(scope="session")
def limits() -> Callable[[], contextlib.AbstractContextManager[Any]]:
    """``with limits(): ...`` bounds time and memory."""
    return limited
