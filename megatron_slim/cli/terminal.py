"""What a person at a terminal, or the log of a batch job, sees of a command: messages and progress."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from time import monotonic
from typing import TYPE_CHECKING, TypeVar

from megatron_slim.reporting import LogProgress, Progress, amount_of

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as Bar
    from rich.progress import Task

T = TypeVar("T")
PACKAGE = "megatron_slim"
FILE_WIDTH = 120  # columns, where standard output is not a terminal, and at least
FRAME_SECONDS = 0.1  # between two frames of a bar


def say(message: str) -> None:
    """A line for the person who watches: standard error, so that standard output has the results alone."""
    print(message, file=sys.stderr, flush=True)


class StreamHandler(logging.Handler):
    """Messages as they are, one a line, on standard error or standard output as it is at that moment."""

    def __init__(self, stream: str) -> None:
        super().__init__(logging.INFO)
        self.stream = stream

    def emit(self, record: logging.LogRecord) -> None:
        """Write one message."""
        print(record.getMessage(), file=getattr(sys, self.stream), flush=True)


def wide_console() -> Console:
    """Standard output for tables: as wide as the terminal; in a file, as wide as they need."""
    from rich.console import Console

    console = Console()
    console.width = max(console.width, FILE_WIDTH)
    return console


@contextlib.contextmanager
def messages_shown(stream: str = "stderr") -> Iterator[None]:
    """Show the messages of the package on ``stream``, ``stderr`` or ``stdout``, and nowhere else."""
    logger = logging.getLogger(PACKAGE)
    before = logger.handlers, logger.level, logger.propagate
    logger.handlers, logger.propagate = [StreamHandler(stream)], False
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.handlers, logger.propagate = before[0], before[2]
        logger.setLevel(before[1])


def progress_shown() -> Progress:
    """A bar on a terminal; elsewhere lines."""
    return TerminalProgress() if sys.stderr.isatty() else LogProgress()


class TerminalProgress:
    """Progress as a bar on standard error, which disappears when all is done."""

    def items(self, items: Sequence[T], description: str) -> Iterator[T]:
        """Pass ``items`` through, and show how many are done."""
        from rich.console import Console
        from rich.progress import track

        yield from track(items, description, console=Console(stderr=True), transient=True)

    @contextlib.contextmanager
    def amount(
        self, description: str, total: int | None, show: Callable[[float], str]
    ) -> Iterator[Callable[[int], None]]:
        """Show the amount done, its speed, and the time left where ``total`` is known."""
        bar = _bar(total, show)
        drawn = monotonic()

        def advance(done: int) -> None:
            nonlocal drawn
            now = monotonic()
            if due := now - drawn >= FRAME_SECONDS:
                drawn = now
            bar.update(task, advance=done, refresh=due)

        with bar:
            task = bar.add_task(description, total=total)
            bar.refresh()
            yield advance


def _bar(total: int | None, show: Callable[[float], str]) -> Bar:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
    from rich.text import Text

    class Amount(ProgressColumn):
        """How much of how much, and how fast."""

        def render(self, task: Task) -> Text:
            speed = task.finished_speed or task.speed
            return Text(amount_of(task.completed, total, show) + (f", {show(speed)}/s" if speed else ""))

    return Progress(
        *(TextColumn("{task.description}"), BarColumn(), Amount(), TimeRemainingColumn()),
        console=Console(stderr=True),
        transient=True,
        auto_refresh=False,  # no thread: callers fork, and a fork must not find the terminal's lock taken
        get_time=monotonic,
    )
