"""A rank that saves writes in its own process, and needs no other one."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import psutil
import pytest
import torch

from megatron_slim.testing import run_distributed


def saved(directory: str, change: bool, asynchronously: bool) -> tuple[int, list[float]]:
    """Body of one rank: the processes that it has started once a checkpoint is saved, and what is read from it."""
    import megatron_slim.mcore

    from megatron.core import dist_checkpointing
    from megatron.training import global_vars

    from megatron_slim.compat.saving import RESULTS_OF_WRITING

    if change:
        RESULTS_OF_WRITING.apply()
    global_vars.set_args(Namespace(async_save=asynchronously))

    def state(tensor: torch.Tensor) -> dict[str, object]:
        return {"weight": dist_checkpointing.ShardedTensor.from_rank_offsets("weight", tensor)}

    before = {each.pid for each in psutil.Process().children()}
    options = {"async_sharded_save": asynchronously, "async_strategy": "mcore"}
    request = dist_checkpointing.save(state(torch.arange(4.0)), directory, **options)
    if request is not None:
        request.execute_sync()
    started = [each for each in psutil.Process().children() if each.pid not in before]
    for each in started:
        each.kill()
    return len(started), dist_checkpointing.load(state(torch.zeros(4)), directory)["weight"].tolist()


@pytest.mark.parametrize(
    ("change", "asynchronously", "processes"), [(True, False, 0), (False, False, 1), (True, True, 1)]
)
def test_without_it_a_saving_starts_a_process(
    tmp_path: Path, change: bool, asynchronously: bool, processes: int
) -> None:
    """Which `RESULTS_OF_WRITING` leaves to savings that have one to write."""
    from megatron_slim.compat.saving import RESULTS_OF_WRITING  # which this test is about

    assert RESULTS_OF_WRITING.kind == "bug"
    found = run_distributed(1, saved, str(tmp_path), change, asynchronously)
    assert found == [(processes, [0.0, 1.0, 2.0, 3.0])]
