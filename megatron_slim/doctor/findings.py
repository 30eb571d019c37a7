"""What was looked at, and what to do about it."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_slim.errors import SlimError, one_line

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
        return f"{SYMBOLS[self.state]} {self.name:24}{self.found}" + (f"  ->  {self.fix}" if self.fix else "")


def good_or(state: str, name: str, good: bool, found: str, fix: str) -> Finding:
    """`OK`, or ``state`` with its fix."""
    return Finding(name, OK, found) if good else Finding(name, state, found, fix)


def refused(name: str, error: SlimError) -> Finding:
    """What a run would end with."""
    where = f"{error.where}: " if error.where else ""
    return Finding(name, PROBLEM, one_line(where + error.what), error.fix or "make it again, or name another")
