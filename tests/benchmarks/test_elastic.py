"""What several budgets together cost: the ratios, and every kind of run of the benchmark."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import elastic
from benchmarks.elastic import flags_of, operations, parse_args, ratios_of


def test_ratios_are_of_runs_of_the_same_budget() -> None:
    seconds = {"large": 4.0, "middle": 2.0, "small": 2.0, "together": 6.0}
    seconds |= {"elastic large": 4.0, "elastic middle": 2.5, "elastic small": 2.2}
    peaks = {"large": 100, "middle": 80, "small": 70, "together": 120} | dict.fromkeys(
        ("elastic large", "elastic middle", "elastic small"), 105
    )
    found = ratios_of(seconds, peaks)
    assert found["joint_over_separate"] == 0.75 and found["step_over_own"] == 1.25
    assert found["memory_over_largest"] == 1.05 and found["memory_over_largest_together"] == 1.2


def test_a_run_of_one_budget_has_no_iteration_of_another() -> None:
    assert flags_of("middle") == [] and flags_of("together") == ["--elastic", "together"]
    assert flags_of("elastic small") == ["--elastic", "in-turn", "--elastic-shares", "0,0,1"]


def test_operations_say_what_can_be_saved() -> None:
    """Two of three passes of the teacher."""
    assert 0.5 < operations() < 0.9


@pytest.mark.slow
def test_every_kind_is_run(tmp_path: Path) -> None:
    options = ["--seq-length", "64", "--micro-batch-size", "1", "--iterations", "1", "--repeats", "1", "--json"]
    args = parse_args([*options, "--slice-gb", "0.2", "--dir", str(tmp_path / "disk")])
    found = elastic.measure(args)
    for name in ("joint_over_separate", "step_over_own", "memory_over_largest", "slice_over_raw_io"):
        assert 0.1 < found[name] < 100
    assert 1.0 <= found["file_over_largest"] < 1.01 and not list((tmp_path / "disk").iterdir())
