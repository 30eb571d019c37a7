from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil
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


def _start_a_child(path: str) -> None:
    with open(path, "w") as stream:
        stream.write(str(subprocess.Popen(["sleep", "600"]).pid))


def _start_a_child_and_hang(path: str) -> None:
    _start_a_child(path)
    time.sleep(600)


def _is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.parametrize("function", [_start_a_child, _start_a_child_and_hang])
def test_a_rank_leaves_no_process_behind(tmp_path: Path, function: Callable[[str], None]) -> None:
    """Megatron's checkpoint writer keeps a worker of some 300 MB, which would outlive its rank."""
    path = tmp_path / "pid"
    if function is _start_a_child:
        run_distributed(1, function, str(path), initialise=False)
    else:
        run_distributed(1, os.getpid, initialise=False)  # by now the server has imported what takes seconds
        for timeout in (1.0, 60.0):
            with pytest.raises(TimeoutError):
                run_distributed(1, function, str(path), initialise=False, timeout=timeout)
            if path.exists() and path.read_text():  # on a busy machine it may not have come that far in the first time
                break
    assert not _is_running(int(path.read_text()))
