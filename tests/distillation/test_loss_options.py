"""Every loss that can be named has its formula, and flags have the defaults of the one place."""

from __future__ import annotations

import argparse
import dataclasses

from megatron_slim.distillation.divergences import DIVERGENCES, KDLoss
from megatron_slim.distillation.loss_options import DEFAULTS, KD_LOSSES
from megatron_slim.distillation.schedule import Schedule
from megatron_slim.planning.layouts import Settings
from megatron_slim.training.slim_arguments import add_slim_arguments


def test_every_named_loss_has_its_formula() -> None:
    assert DIVERGENCES.keys() == KD_LOSSES.keys()
    assert all(callable(KDLoss(kind).divergence) for kind in KD_LOSSES)


def test_flags_have_these_defaults() -> None:
    args = vars(add_slim_arguments(argparse.ArgumentParser()).parse_args([])) | {"kd_top_k": KDLoss().top_k}
    for field in dataclasses.fields(DEFAULTS):
        default = getattr(DEFAULTS, field.name)
        if isinstance(default, Schedule):
            parts = (args[f"{field.name}_{part}"] for part in ("schedule", "start", "end"))
            assert Schedule(*parts) == default, field.name
        else:
            assert args[field.name] == default, field.name
    assert Settings().kd_loss == DEFAULTS.kd_loss
