"""How the parts ended, as text for a terminal and as the generated part of docs/gpu.md (no torch)."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.gpu.parts import FAILED, PARTS, PASSED, Outcome
from megatron_slim.errors import SlimError, one_line
from megatron_slim.files import write_atomic

BEGIN, END = "<!-- results: written by benchmarks/gpu/run_all.py -->", "<!-- end of results -->"


def summary(outcomes: Mapping[str, Outcome]) -> str:
    """A line per part."""
    return "\n".join(
        f"  {outcome.state:8}{name:13}{outcome.seconds:6.0f} s  {outcome.why or PARTS[name].title}"
        for name, outcome in outcomes.items()
    )


def markdown(outcomes: Mapping[str, Outcome], *, quick: bool) -> str:
    """The tables."""
    machine = outcomes["machine"].details if "machine" in outcomes else {}
    lines = [
        f"{time.strftime('%Y-%m-%d')}" + (", **tiny sizes: only that it runs is shown**" if quick else "") + ".",
        "",
    ]
    if machine:
        lines += _table(("machine", ""), ((key, str(value)) for key, value in machine.items()))
    lines += _table(
        ("part", "", "seconds", ""),
        (
            (f"`{name}`", _bold(each.state), f"{each.seconds:.0f}", each.why or PARTS[name].title)
            for name, each in outcomes.items()
        ),
    )
    for name, outcome in outcomes.items():
        if outcome.checks:
            lines += [f"### {PARTS[name].title}, `{name}`", ""]
            rows = ((c["name"], _number(c["value"]), c["limit"], _verdict(c["ok"])) for c in outcome.checks)
            lines += _table(("", "measured", "limit", ""), rows)
    return "\n".join(lines)


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> list[str]:
    cells = ["| " + " | ".join(one_line(cell).replace("|", "/") for cell in row) + " |" for row in (head, *rows)]
    return [cells[0], "|" + "---|" * len(head), *cells[1:], ""]


def _bold(state: str) -> str:
    return state if state == PASSED else f"**{state}**"


def _verdict(ok: bool | None) -> str:
    return "" if ok is None else "ok" if ok else f"**{FAILED}**"


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) and math.isfinite(value) else str(value)


def write_tables(file: Path, text: str) -> None:
    """Put the tables between the marks of a file; a file that does not exist gets nothing else.

    Raises:
        SlimError: the file has no marks.
    """
    before, after = "", ""
    if file.exists():
        before, begin, rest = file.read_text(encoding="utf-8").partition(BEGIN)
        _, end, after = rest.partition(END)
        if not begin or not end:
            raise SlimError(f"has no lines {BEGIN!r} and {END!r}", where=str(file), fix="give --out another file")
    write_atomic(file, f"{before}{BEGIN}\n\n{text.strip()}\n\n{END}{after or chr(10)}")
