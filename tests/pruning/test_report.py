"""The report of a pruning, for plans whose numbers the other tests do not reach."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest

from megatron_slim.pruning.plan import Plan
from megatron_slim.pruning.report import _dropped_layers


@pytest.mark.parametrize(
    ("kept", "dropped"),
    [((0, 2, 5, 6, 7), "1, 3-4"), ((0, 1, 2, 3, 4), "5-7"), ((1, 3, 5), "0, 2, 4, 6-7"), (tuple(range(8)), "none")],
)
def test_dropped_layers_are_named_and_no_others(
    plan_for: Callable[..., Plan], kept: tuple[int, ...], dropped: str
) -> None:
    plan = plan_for({"num_layers": 5}, depth="block_influence")
    assert _dropped_layers(dataclasses.replace(plan, kept_layers=kept)) == dropped
