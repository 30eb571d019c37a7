"""Optimizers that Megatron does not have: their names, and why its own Muon is not offered."""

from __future__ import annotations

import argparse
import sys
from typing import Any

import megatron_slim.mcore

import pytest
import torch
from megatron.core.optimizer.emerging_optimizers import TensorParallelMuon
from megatron.training import ft_integration

from megatron_slim.compat.chained_groups import GROUPS, save_groups_in_one_list
from megatron_slim.compat.hooks import OPTIMIZER_NAMES, OPTIMIZERS, take_optimizers
from megatron_slim.compat.patch import MADE

NAME = ["--optimizer", "aurora"]


def parsed(add: Any) -> str:
    return str(add(argparse.ArgumentParser(exit_on_error=False)).parse_args(NAME).optimizer)


def test_without_it_a_name_is_not_taken() -> None:
    (target,) = OPTIMIZER_NAMES.targets
    take_optimizers(["aurora"])
    theirs, ours = MADE[target]
    with pytest.raises(argparse.ArgumentError, match="invalid choice: 'aurora'"):
        parsed(theirs)
    assert parsed(ours) == "aurora"


def test_megatron_parses_the_command_line_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """As it starts, for its tolerance of faults, whatever was parsed before."""
    take_optimizers(["aurora"])
    monkeypatch.setattr(sys, "argv", ["pretrain", *NAME, "--not-megatrons", "1"])
    ft_integration.setup()  # ends the process where a name is not known


def test_without_it_gate_and_up_are_one_matrix() -> None:
    """Megatron's Muon has them orthogonal to one another, which each is not asked to be in Hugging Face's format."""
    assert OPTIMIZERS.kind == "hook"
    gradient = torch.randn(16, 32, generator=torch.Generator().manual_seed(1))
    parameter = torch.nn.Parameter(torch.zeros_like(gradient))
    muon = TensorParallelMuon([parameter], fp32_matmul_prec="highest", scale_mode="shape_scaling")
    whole = muon.orthogonalize(parameter, gradient)
    halves = torch.cat([muon.orthogonalize(parameter, half) for half in gradient.chunk(2)])
    assert (whole - halves).norm() > 0.1 * halves.norm()


class _Saved:
    """As an optimizer of Megatron's: its state has a list of groups."""

    def __init__(self, *groups: dict[str, Any]) -> None:
        self.groups = [{"params": [number], **group} for number, group in enumerate(groups)]
        self.optimizer = self
        self.loaded: Any = None

    def state_dict(self) -> dict[str, Any]:
        return {"param_groups": [dict(group) for group in self.groups]}


class _Chain:
    def __init__(self, *optimizers: _Saved) -> None:
        self.chained_optimizers = optimizers

    def sharded_state_dict(self, model: Any, is_loading: bool = False) -> dict[int, Any]:
        return {number: each.state_dict() for number, each in enumerate(self.chained_optimizers)}

    def load_state_dict(self, state: dict[int, Any]) -> None:
        for number, each in enumerate(self.chained_optimizers):
            each.loaded = state[number]


def test_groups_find_the_optimizer_that_has_them_now() -> None:
    """Two optimizers saved, three load: one of experts more."""
    adam = {"optimizer": "adam", "is_expert_parallel": False, "step": 5, "lr": 0.1}
    matrices = {"is_expert_parallel": False, "step": 5, "lr": 0.2}
    saved, new = _Chain(_Saved(matrices), _Saved(adam)), {"step": 0, "lr": 1.0}
    loading = _Chain(
        _Saved({**matrices, **new}), _Saved({**matrices, **new, "is_expert_parallel": True}), _Saved({**adam, **new})
    )
    for chain in (saved, loading):
        save_groups_in_one_list(chain)
    state = saved.sharded_state_dict(None)
    assert [sorted(part) for part in (state[0], state[1])] == [[], []] and len(state[GROUPS]) == 2
    assert GROUPS not in loading.sharded_state_dict(None, is_loading=True)
    loading.load_state_dict(state)
    found = [each.loaded["param_groups"][0] for each in loading.chained_optimizers]
    assert [(group["step"], group["lr"], group["is_expert_parallel"]) for group in found] == [
        (5, 0.2, False),
        (5, 0.2, True),
        (5, 0.1, False),
    ]
