"""Budgets in a recipe: upper bounds that sizes are searched under, and what is searched."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import TypeGuard

from megatron_slim.aliases import Document, JsonObject, YamlMapping
from megatron_slim.architecture.feed_forward import EXPERTS
from megatron_slim.architecture.kinds import AXES
from megatron_slim.architecture.prunable import HIDDEN, LAYERS

SEARCHABLE = tuple(field for field, axis in AXES.items() if axis.is_searched)
BOUNDS = ("params", "active_params", "memory_gb")
_NUMBER = re.compile(r"(\d{1,30}(?:\.\d{1,30})?(?:[eE]\+?\d{1,2})?)([KMBT]?)")
_SCALE = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


@dataclass(frozen=True)
class Budget:
    """Upper bounds of the target; None bounds nothing.

    Attributes:
        params: parameters, MTP left out.
        active_params: those that one token visits, MTP left out.
        memory_gb: 2 bytes for each of all weights, MTP's too, in 1e9 bytes.
    """

    params: int | None = None
    active_params: int | None = None
    memory_gb: float | None = None


@dataclass(frozen=True)
class Search:
    """What a budget lets the planner choose.

    Attributes:
        axes: sizes that are searched; those that the target gives are not among them.
        grid: the sizes that an axis may have, ascending, in place of the usual ones (`search_grid.usual_sizes`).
    """

    axes: tuple[str, ...] = (LAYERS.field, HIDDEN.field, EXPERTS.field)
    grid: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def to_dict(self) -> JsonObject:
        """As a section of a recipe."""
        axes = {"axes": list(self.axes)} if self.axes else {}  # none where the target gives all of them
        return {**axes, "grid": {axis: list(sizes) for axis, sizes in self.grid.items()}}


def whole_number(value: object) -> int | None:
    """A number as people write it, None where it is not a positive integer.

    >>> whole_number("40B"), whole_number("2.5e9"), whole_number("1.5K"), whole_number("0.1")
    (40000000000, 2500000000, 1500, None)
    """
    match = _NUMBER.fullmatch(str(value)) if type(value) in (int, float, str) else None
    if match is None:
        return None
    number = Decimal(match[1]) * _SCALE[match[2]]
    return int(number) if number > 0 and number == number.to_integral_value() else None


def unknown_keys(mapping: YamlMapping, known: Sequence[str], prefix: str) -> list[str]:
    """A sentence for each key that is none of the known ones."""
    return [f"unknown key {prefix}{key} ({_hint(key, known)})" for key in mapping if key not in known]


def _hint(name: object, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(str(name), known, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"


def is_number(value: object) -> TypeGuard[float]:
    """Whether a value is a finite number, which True and False are not."""
    return (type(value) is int or type(value) is float) and math.isfinite(value)


def bound_violation(key: str, value: object) -> str | None:
    """What is wrong with one bound, or None; its name is the last part of ``key``."""
    if key.endswith("memory_gb"):
        holds = is_number(value) and value > 0
        return None if holds else f"{key} {value!r} is not a number of gigabytes above zero"
    return None if whole_number(value) else f"{key} {value!r} is not a number of parameters (such as 23e9, 23B or 900M)"


def parse_budget(target: Document) -> Budget | None:
    """The bounds in a target, None where it has none."""
    given = {key: target[key] for key in BOUNDS if target.get(key) is not None}
    numbers = {key: float(value) if key == "memory_gb" else whole_number(value) for key, value in given.items()}
    return Budget(**numbers) if numbers else None  # type: ignore[arg-type]


def search_violations(search: object, target: object) -> list[str]:
    """What is wrong with the section ``search``, with this target."""
    if not isinstance(search, Mapping):
        return [f"search {search!r} is not a mapping"]
    found = unknown_keys(search, ["axes", "grid"], "search.")
    axes, grid = search.get("axes", list(Search.axes)), search.get("grid", {})
    if not isinstance(axes, list) or not axes:
        return [*found, f"search.axes {axes!r} is not a list of sizes to search"]
    found += [f"search.axes {axis!r} is unknown ({_hint(axis, SEARCHABLE)})" for axis in axes if axis not in SEARCHABLE]
    if not found and len(set(axes)) < len(axes):
        found.append(f"search.axes {axes!r} names a size twice")
    if not isinstance(grid, Mapping):
        return [*found, f"search.grid {grid!r} is not a mapping"]
    named, given = [*(axes if "axes" in search else ()), *grid], target if isinstance(target, Mapping) else {}
    found += [f"search names {axis}, which target gives" for axis in SEARCHABLE if axis in named and axis in given]
    found += [f"search.grid.{axis} is not in search.axes" for axis in grid if axis not in axes]
    found += [
        f"search.grid.{axis} {sizes!r} is not a list of positive integers"
        for axis, sizes in grid.items()
        if not isinstance(sizes, list) or not sizes or any(type(size) is not int or size <= 0 for size in sizes)
    ]
    return found


def parse_search(search: Document, target: Document) -> Search:
    """A section without violations; axes in the order of `SEARCHABLE`, sizes ascending."""
    axes, grid = search.get("axes", Search.axes), search.get("grid", {})
    return Search(
        tuple(axis for axis in SEARCHABLE if axis in axes and axis not in target),
        {axis: tuple(sorted(set(grid[axis]))) for axis in SEARCHABLE if axis in grid},
    )
