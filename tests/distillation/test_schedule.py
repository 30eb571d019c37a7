"""lambda and beta over a run."""

from __future__ import annotations

import doctest
import math

import pytest

from megatron_slim.distillation import schedule
from megatron_slim.distillation.schedule import Schedule


def test_worked_examples() -> None:
    assert doctest.testmod(schedule).failed == 0


@pytest.mark.parametrize("shape", ["linear", "cosine"])
def test_a_run_starts_and_ends_exactly_where_it_should(shape: str) -> None:
    values = [Schedule(shape, 0.3, 0.1).at(iteration, 101) for iteration in range(101)]
    assert values[0] == 0.3
    assert values[-1] == pytest.approx(0.1, abs=1e-16)
    assert values[50] == pytest.approx(0.2)
    assert values == sorted(values, reverse=True)
    assert Schedule(shape, 0.3, 0.1).at(500, 101) == values[-1]  # past the end it stays


def test_cosine_is_flat_at_both_ends() -> None:
    beta = Schedule("cosine", 0.3, 0.1)
    assert beta.at(25, 101) == pytest.approx(0.1 + 0.2 * 0.5 * (1 + math.cos(math.pi / 4)))
    assert 0.3 - beta.at(1, 101) < 1e-4


def test_constant_and_a_run_of_one_step() -> None:
    assert Schedule("constant", 0.5, 0.1).at(70, 100) == 0.5
    assert Schedule("linear", 1.0, 0.75).at(0, 1) == 1.0
