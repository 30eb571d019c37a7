"""The simulator against what is known of 1F1B in closed form, and the numbers that the benchmark makes of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from benchmarks.pipeline_schedules import stage_costs
from benchmarks.pipeline_simulator import Pipeline, simulate
from megatron_slim.planning.schedule import FORWARD, one_forward_one_backward

Tool = Callable[..., Any]
SCRIPT = "benchmarks/pipeline_schedules.py"


def even(p: int, m: int, v: int = 1, teacher: float = 0.0, **more: Any) -> Pipeline:
    """A pipeline of equal stages; a rank's forward pass takes 1, its backward pass 2."""
    costs = {"forward": 1.0, "backward": 2.0, "teacher": teacher}
    return Pipeline(p, m, **{key: [value / v] * (p * v) for key, value in costs.items()}, virtual=v, **more)


@pytest.mark.parametrize(
    ("p", "m", "v"), [(1, 4, 1), (4, 8, 1), (8, 32, 1), (4, 2, 1), (4, 8, 2), (8, 32, 2), (8, 32, 4), (2, 4, 3)]
)
def test_bubbles_in_closed_form(p: int, m: int, v: int) -> None:
    """(p-1)/v micro-batches of bubble (arXiv 2104.04473, section 2.2); a teacher inline makes forward passes longer."""
    outcome = simulate(even(p, m, v), 2)
    assert outcome.seconds == pytest.approx(3 * (m + (p - 1) / v))
    assert outcome.idle == pytest.approx((p - 1) / v / (m + (p - 1) / v), abs=1e-9)
    assert simulate(even(p, m, v, 1.5), 2).seconds == pytest.approx(4.5 * (m + (p - 1) / v))
    assert simulate(even(p, m, v, optimizer=5.0), 2).seconds == pytest.approx(outcome.seconds + 5)


@pytest.mark.parametrize(("p", "m", "v"), [(3, 5, 1), (4, 8, 2), (2, 2, 3)])
def test_every_rank_runs_its_stages_once(p: int, m: int, v: int) -> None:
    for rank in range(p):
        order = list(one_forward_one_backward(p, m, v, rank))
        forward, backward = ([t for t in order if (t.kind == FORWARD) == wanted] for wanted in (True, False))
        every = {(batch, rank + p * chunk) for batch in range(m) for chunk in range(v)}
        for tasks in (forward, backward):
            assert len(tasks) == m * v and {(task.batch, task.stage) for task in tasks} == every


def test_the_slowest_stage_sets_the_pace() -> None:
    """With many micro-batches a step takes m times the slowest stage, and the last one's filling and emptying."""
    slow = Pipeline(2, 50, [1.0, 3.0], [2.0, 6.0], [0.0, 0.0])
    assert simulate(slow, 2).seconds == pytest.approx(50 * 9 + 1 + 2)


@pytest.mark.parametrize("teacher", [0.5, 1.0, 2.0])
def test_a_teacher_ahead_is_between_its_bounds(teacher: float) -> None:
    inline = even(4, 8, teacher=teacher)
    base = simulate(inline)
    least = max(8 * (3 + teacher), 3 * (8 + 3))  # what a rank has to do; the student by itself
    for ahead, lead, parts in [(8, 0, 1), (8, 0, 4), (4, 1, 1), (8, 4, 2)]:
        outcome = simulate(replace(inline, ahead=ahead, lead=lead, parts=parts))
        assert least <= outcome.seconds + 1e-9
        assert outcome.held <= ahead
    # Cut finely, it leaves little of the bubble, which is 3 of 11 micro-batches.
    fine = min(
        (simulate(replace(inline, ahead=8, lead=lead, parts=16)) for lead in (0, 1)), key=lambda each: each.seconds
    )
    assert fine.seconds < least * 1.07 < base.seconds


def test_a_teacher_ahead_of_a_single_rank_gains_nothing() -> None:
    alone = even(1, 4, teacher=1.5)
    assert simulate(replace(alone, ahead=4)).seconds == pytest.approx(simulate(alone).seconds) == 4 * 4.5


@pytest.mark.parametrize(("p", "m", "k", "teacher"), [(4, 8, 1, 1.0), (8, 32, 4, 1.5), (2, 3, 5, 3.0)])
def test_a_block_in_closed_form(p: int, m: int, k: int, teacher: float) -> None:
    """(p-1) t to fill the pipeline once, k m t, and k steps of the student, the first of which finds it filled."""
    step = 3 * (m + p - 1)
    outcome = simulate(even(p, m, teacher=teacher, ahead=k * m, block=k), 2 * k)
    assert outcome.seconds == pytest.approx(((p - 1 + k * m) * teacher + k * step - (p - 1)) / k)
    assert outcome.held == k * m


def test_costs_are_those_of_the_published_models() -> None:
    """8.5 GFLOPs of the teacher for a token and 4.8 of the student, heads and MTP blocks included."""
    forward, backward, teacher = stage_costs(8, 1, None, even=True)
    assert forward == pytest.approx([1.0] * 8) and backward == pytest.approx([2.0] * 8)
    assert sum(teacher) / 8 == pytest.approx(1.77, abs=0.01)
    uneven, _, _ = stage_costs(8, 1, None, even=False)
    assert sum(uneven) == pytest.approx(8) and uneven[-1] > 2 * uneven[0]
    assert sum(stage_costs(4, 2, 3.0, even=False)[2]) == pytest.approx(3 * 4)


def test_pipeline_schedules(tool: Tool) -> None:
    options = "--pipeline-size 2 --micro-batches 4 --virtual-stages 1 2 --teacher-over-student 3 --steps 2 --json"
    outcome = tool(SCRIPT, *options.split())
    assert outcome.code == 0, outcome.stderr
    results = outcome.json
    assert [(row["p"], row["m"], row["v"]) for row in results["cases"]] == [(2, 4, 1), (2, 4, 1), (2, 4, 2), (2, 4, 1)]
    for row in results["cases"]:
        assert row["bound_over_inline"] <= row["ahead_in_parts_over_inline"] + 1e-9
        assert row["bound_over_inline"] <= row["block_over_inline"] + 1e-9 <= 1.1
        assert row["held_gb"] <= 4 * 4096 * 2048 * 2 / 1e9 + 1e-9
    refused = tool(SCRIPT, "--pipeline-size", 4, "--micro-batches", 6, "--virtual-stages", 2)
    assert "6 micro-batches with virtual stages over 4 ranks" in refused.error
