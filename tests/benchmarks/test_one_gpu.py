"""docs/one_gpu.md has the planner's own figures."""

from __future__ import annotations

import doctest
from pathlib import Path

import pytest

from benchmarks import one_gpu
from megatron_slim.teacher_cache.stored_states import row_bytes

PAGE = (Path(__file__).resolve().parents[2] / "docs/one_gpu.md").read_text(encoding="utf-8")


@pytest.mark.one_case
@pytest.mark.parametrize("recipe", one_gpu.RECIPES)
def test_the_page_has_what_the_planner_says(recipe: str) -> None:
    lines = one_gpu.tables(recipe)
    assert len(lines) == len(one_gpu.STEPS) + 6
    assert not [line for line in lines if line not in PAGE.splitlines()]


@pytest.mark.parametrize("recipe", one_gpu.RECIPES)
def test_states_of_all_heads_are_on_the_disk(recipe: str) -> None:
    for kind, step in (("bf16", "record, bf16"), ("fp8", "record, FP8")):
        row = next(each for each in one_gpu.steps(recipe) if each["step"] == step)
        assert 1e9 * row["disk"] == pytest.approx(one_gpu.TOKENS * 2 * row_bytes(kind, 2048))  # main and MTP


def test_rounding() -> None:
    assert doctest.testmod(one_gpu).failed == 0
