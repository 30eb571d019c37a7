"""Hidden-state distillation in runs."""

from __future__ import annotations

import pytest

MBS = ("--micro-batch-size", "2")
FLAGS = ("--hidden-kd-layers", "0:1,3:2")


@pytest.fixture(scope="module")
def alone(workplace) -> dict[str, list[float]]:  # type: ignore[no-untyped-def]
    return workplace.train("hidden-one", 1, *MBS, *FLAGS)


def test_try(workplace, alone) -> None:  # type: ignore[no-untyped-def]
    for k, v in alone.items():
        print(k, v)
    assert 0
