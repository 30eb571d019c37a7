"""The benchmark of optimizers runs, on the smaller student; how long that takes says nothing here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from benchmarks.optimizers import Contest


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """The benchmark sets how many there are, in this process."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_steps(tool: Callable[..., Any]) -> None:
    gradients = ("noise", "few-tokens")
    done = tool("benchmarks/optimizers.py", "--student", "demo", "--repeats", 1, "--gradients", *gradients, "--json")
    assert done.code == 0, done.stderr
    found = done.json
    assert found["by_gradients"].keys() == set(gradients)
    assert found["step_over_megatron_muon"] > 0 and found["aurora_over_muon"] > 0
    assert all(
        each["seconds"].keys() == {"megatron", "muon", "aurora", "adam"} for each in found["by_gradients"].values()
    )


def test_both_sides_do_the_same_work() -> None:
    """Of a matrix that is not fused, Megatron's Muon and ours, at its scale, move as far."""
    contest = Contest("demo", "noise")
    alone = next(each for each in contest.parameters if "linear_fc2" in str(contest.rows[id(each)].weight))
    moved = []
    for kind in ("megatron", "muon"):
        before = alone.detach().clone()
        contest.time(kind)
        moved.append(float((alone.detach() - before).norm()))
    rows, columns = alone.shape
    wanted = max(1, rows / columns) ** 0.5 / max(rows, columns) ** 0.5
    assert moved[1] / moved[0] == pytest.approx(wanted, rel=0.05)
