"""docs/one_gpu.md has the planner's own figures."""

from __future__ import annotations

import doctest
from pathlib import Path

import pytest

from benchmarks import one_gpu

PAGE = (Path(__file__).resolve().parents[2] / "docs/one_gpu.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("recipe", one_gpu.RECIPES)
def test_the_page_has_what_the_planner_says(recipe: str) -> None:
    lines = one_gpu.tables(recipe)
    assert len(lines) == len(one_gpu.STEPS) + 6
    assert not [line for line in lines if line not in PAGE.splitlines()]


def test_rounding() -> None:
    assert doctest.testmod(one_gpu).failed == 0
