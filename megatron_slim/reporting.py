"""How the library reports while it works: messages through `logging`, progress through a protocol.

A library does not print. Messages go to the logger of their module, under ``megatron_slim``; whoever wants to see them
sets its level to INFO. Progress goes to the reporter of `use_progress`; without one it is logged too, as lines. The
commands show both on standard error (`cli.terminal`).
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from contextvars import ContextVar
from time import monotonic
from typing import Protocol, TypeVar

T = TypeVar("T")
LINE_SECONDS = 30.0  # between two lines of progress in a log
logger = logging.getLogger(__name__)


class Progress(Protocol):
    """Where progress is shown."""

    def items(self, items: Sequence[T], description: str) -> Iterator[T]:
        """Pass ``items`` through, and show how many are done."""
        ...

    def amount(
        self, description: str, total: int | None, show: Callable[[float], str]
    ) -> AbstractContextManager[Callable[[int], None]]:
        """Show how much of ``total`` is done.

        Args:
            description: what is done.
            total: how much there is to do; None where it is not known.
            show: an amount, or an amount per second, in words.

        Returns:
            A context manager that gives the function to call with the amount done since the last call.
        """
        ...


class LogProgress:
    """Progress as lines of a log, at most every half minute."""

    def items(self, items: Sequence[T], description: str) -> Iterator[T]:
        """Pass ``items`` through, with a line after an item when it is time for one."""
        started = last = monotonic()
        for number, item in enumerate(items):
            now = monotonic()
            if number and now - last >= LINE_SECONDS:
                last, left = now, (len(items) - number) * (now - started) / number
                logger.info("%s: %d of %d, %s left", description, number, len(items), duration(left))
            yield item

    @contextlib.contextmanager
    def amount(
        self, description: str, total: int | None, show: Callable[[float], str]
    ) -> Iterator[Callable[[int], None]]:
        """Log the amount done, its speed, and the time left where ``total`` is known."""
        started = last = monotonic()
        finished = 0

        def advance(done: int) -> None:
            nonlocal last, finished
            finished += done
            now = monotonic()
            if finished and now - last >= LINE_SECONDS:
                last, speed = now, finished / (now - started)
                line = f"{description}: {amount_of(finished, total, show)}, {show(speed)}/s"
                if total is not None:
                    line += f", {duration((total - finished) / speed)} left"
                logger.info("%s", line)

        yield advance


def amount_of(finished: float, total: int | None, show: Callable[[float], str]) -> str:
    """``18.3 of 163.0 GB``, or ``18.3 GB`` where the total is not known."""
    if total is None:
        return show(finished)
    return f"{show(finished).split()[0]} of {show(total)}"


_LOG = LogProgress()
_current: ContextVar[Progress] = ContextVar("progress")


@contextlib.contextmanager
def use_progress(progress: Progress) -> Iterator[None]:
    """Show the progress of everything that is called inside with ``progress``."""
    token = _current.set(progress)
    try:
        yield
    finally:
        _current.reset(token)


def progress(items: Sequence[T], description: str) -> Iterator[T]:
    """Pass ``items`` through, and report how many are done."""
    return _current.get(_LOG).items(items, description)


def byte_progress(description: str, total_bytes: int) -> AbstractContextManager[Callable[[int], None]]:
    """Report how much of ``total_bytes`` is done, how fast it goes and how long it will take.

    Returns:
        A context manager that gives the function to call with the number of bytes done since the last call.
    """
    return _current.get(_LOG).amount(description, total_bytes, gigabytes)


def count_progress(description: str, unit: str) -> AbstractContextManager[Callable[[int], None]]:
    """Report how many of an unknown number of things are done, and how fast it goes; see `byte_progress`."""
    return _current.get(_LOG).amount(description, None, lambda number: f"{number:,.0f} {unit}")


def gigabytes(number: float) -> str:
    """Bytes in GB; speeds below 1 GB/s need two decimals.

    >>> gigabytes(18.3e9), gigabytes(0.614e9)
    ('18.3 GB', '0.61 GB')
    """
    return f"{number / 1e9:.1f} GB" if number >= 1e9 else f"{number / 1e9:.2f} GB"


def duration(seconds: float) -> str:
    """A time as a person says it: 50 s, 4 min, 2.5 h."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 3600 else f"{seconds / 3600:.1f} h"
