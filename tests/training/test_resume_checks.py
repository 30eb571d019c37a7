"""What cannot be restored of a checkpoint is one line."""

from __future__ import annotations

from pathlib import Path

import megatron_slim.mcore

import pytest
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_slim.checkpoint.common_state import read_common_state
from megatron_slim.errors import CheckpointError
from megatron_slim.training.resume_checks import why_not_restored


def test_a_common_state_that_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"its common state cannot be read: .*; resume from another iteration"
    ) as caught:
        read_common_state(tmp_path)
    assert str(caught.value).startswith(str(tmp_path)) and "\n" not in str(caught.value)


def test_what_megatron_refuses_while_it_restores_is_one_line() -> None:
    scheduler = OptimizerParamScheduler.__new__(OptimizerParamScheduler)
    scheduler.override_opt_param_scheduler = scheduler.use_checkpoint_opt_param_scheduler = False
    with pytest.raises(AssertionError) as caught:
        scheduler._check_and_set(1.0, 2.0, "learning rate")
    found = why_not_restored(caught.value)
    assert "Megatron cannot restore the optimizer: AssertionError: OptimizerParamScheduler: class input" in str(found)
    with pytest.raises(KeyError) as other:
        {}["of ours"]
    assert why_not_restored(other.value) is None
