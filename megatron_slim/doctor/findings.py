"""What was looked at, and what to do about it."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_slim.errors import SlimError, one_line

GIB = 2**30
OK, NOTE, PROBLEM = "ok", "note", "problem"
SYMBOLS = {OK: "  ok     ", NOTE: "  note   ", PROBLEM: "  PROBLEM"}


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        name: what.
        state: `OK`, `NOTE` (works, but know it) or `PROBLEM` (stands in the way).
        found: version, size or condition.
        fix: what to do, "" where nothing is needed.
    """

    name: str
    state: str
    found: str
    fix: str = ""

    def line(self) -> str:
        """For a person."""
        return f"{SYMBOLS[self.state]} {self.name:22}  {self.found}" + (f"  ->  {self.fix}" if self.fix else "")


def good_or(state: str, name: str, good: bool, found: str, fix: str) -> Finding:
    """`OK`, or ``state`` with its fix."""
    return Finding(name, OK, found) if good else Finding(name, state, found, fix)


def size(number: float) -> str:
    """Bytes as a person says them.

    >>> size(3 * 2**30), size(2**20)
    ('3.0 GiB', '1.0 MiB')
    """
    return f"{number / GIB:.1f} GiB" if number >= 0.1 * GIB else f"{number / 2**20:.1f} MiB"


def parameters(number: int) -> str:
    """A number of weights as a person says it.

    >>> parameters(23_200_000_000), parameters(2_907_784)
    ('23.20B', '2.91M')
    """
    return f"{number / 1e9:.2f}B" if number >= 1e8 else f"{number / 1e6:.2f}M"


def refused(name: str, error: SlimError) -> Finding:
    """What a run would end with."""
    where = f"{error.where}: " if error.where else ""
    return Finding(name, PROBLEM, one_line(where + error.what), error.fix or "make it again, or name another")
