"""Errors that a user can cause, and how a tool reports them: one line, exit code 2."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

EXIT_USER_ERROR = 2
MAX_MESSAGE = 4000


class SlimError(Exception):
    """Something the user can fix.

    The message is one line: what is wrong, where (file, key, value), and what to do about it.
    Tools print it as ``error: <message>`` and exit with code 2.
    """

    def __init__(self, what: str, *, where: str = "", fix: str = "") -> None:
        self.what, self.where, self.fix = what, where, fix
        message = f"{where}: {_clipped(what)}" if where else _clipped(what)
        super().__init__(one_line(f"{message}; {fix}" if fix else message))


class RecipeError(SlimError):
    """A recipe or a target that cannot be met."""


class ShapeError(SlimError):
    """A model shape that cannot be built; lists every violation at once."""

    def __init__(self, violations: Sequence[str], *, where: str = "", fix: str = "") -> None:
        self.violations = tuple(violations)
        super().__init__("; ".join(violations), where=where, fix=fix)


class CheckpointError(SlimError):
    """A checkpoint that is incomplete, inconsistent or of the wrong kind."""


class DataError(SlimError):
    """Calibration, training or evaluation data of the wrong kind."""


def one_line(text: str) -> str:
    r"""Text on one line that a terminal shows as it is: a name in a file may hold what would move its cursor.

    >>> one_line("two\nlines, \x1b[31mred")
    'two lines, \\x1b[31mred'
    """
    line = " ".join(text.split())
    if line.isprintable():
        return line
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in line)


def _clipped(text: str) -> str:
    """No more of a message than a person reads: it may quote a value of megabytes."""
    more = len(text) - MAX_MESSAGE
    return text if more <= 0 else f"{text[:MAX_MESSAGE]}... and {more} more characters"


def ranges(numbers: Iterable[int]) -> str:
    """Whole numbers in order, neighbours as one range.

    >>> ranges([40, 3, 5, 4, 17])
    '3-5, 17, 40'
    """
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def summarise(found: Sequence[str], limit: int = 4) -> str:
    """The first few of many, and how many more there are.

    >>> summarise(["a", "b", "c"], limit=2)
    'a, b and 1 more'
    """
    shown = ", ".join(found[:limit])
    return f"{shown} and {len(found) - limit} more" if len(found) > limit else shown
