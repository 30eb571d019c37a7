from __future__ import annotations

import os
import time

import pytest
import torch

from megatron_slim.testing import run_distributed


def _sum_of_ranks(factor: int) -> int:
    total = torch.tensor([torch.distributed.get_rank() * factor])
    torch.distributed.all_reduce(total)
    return int(total)


def _fail_on_one() -> None:
    if torch.distributed.get_rank() == 1:
        raise ValueError("rank one is unwell")
    torch.distributed.barrier()


def _die() -> None:
    os._exit(9)


def _hang() -> None:
    time.sleep(600)


@pytest.mark.slow
def test_run_distributed() -> None:
    assert run_distributed(2, _sum_of_ranks, 10) == [10, 10]
    with pytest.raises(RuntimeError, match="rank one is unwell"):
        run_distributed(2, _fail_on_one)
    with pytest.raises(RuntimeError, match="exit code 9"):
        run_distributed(1, _die)
    with pytest.raises(TimeoutError, match=r"ranks \[0\]"):
        run_distributed(1, _hang, timeout=2)
