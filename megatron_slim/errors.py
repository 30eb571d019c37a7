"""Errors that a user can cause, and how a tool reports them: one line, exit code 2."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Sequence

EXIT_USER_ERROR = 2
MAX_MESSAGE = 4000
_SPACE, _ACCESS, _NAME = "make space", "check its permissions", "choose another name"
_STORAGE = "check the storage it is on and run again"
# What the operating system refuses and a user can fix: what to do about it.
_FIXES = {
    errno.ENOSPC: _SPACE,
    errno.EDQUOT: f"{_SPACE} or ask for a larger quota",
    errno.EFBIG: "raise the limit of file sizes (ulimit -f)",
    errno.EIO: _STORAGE,
    errno.ESTALE: _STORAGE,
    errno.EROFS: "choose a place that can be written",
    errno.EACCES: _ACCESS,
    errno.EPERM: _ACCESS,
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENFILE: "close other programs: the machine has too many files open",
    errno.ENOMEM: "free memory or take a machine with more",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ENOTEMPTY: _NAME,
    errno.EISDIR: _NAME,
    errno.ENOTDIR: _NAME,
    errno.ELOOP: _NAME,
}


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


class PlanError(SlimError):
    """A plan that is incomplete, inconsistent or for another source."""


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


PREFIX = "error: "  # of the one line that a command ends with


def last_error(text: str) -> str | None:
    r"""What a command's standard error ends with, if it found an error that a user can fix.

    >>> last_error("note\nerror: x: no such file\n"), last_error("Traceback ...")
    ('x: no such file', None)
    """
    found = [line.removeprefix(PREFIX) for line in text.splitlines() if line.startswith(PREFIX)]
    return found[-1] if found else None


def user_error(error: Exception) -> SlimError | None:
    """The error as one that a user can fix, if it is one."""
    if isinstance(error, SlimError):
        return error
    if isinstance(error, OSError) and error.errno in _FIXES:
        where = "" if error.filename is None else str(error.filename)
        return SlimError(os.strerror(error.errno).lower(), where=where, fix=_FIXES[error.errno])
    # torch's allocator raises a RuntimeError on a CPU.
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error)):
        details = f" ({str(error)[:200]})" if str(error) else ""
        return SlimError(f"not enough memory{details}", fix=_FIXES[errno.ENOMEM])
    return None
