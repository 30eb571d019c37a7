"""Every loss that can be named has its formula, and flags have the defaults of the one place."""

from __future__ import annotations

import argparse
import dataclasses

from megatron_slim.distillation.divergences import DIVERGENCES, KDLoss
from megatron_slim.distillation.loss_options import DEFAULTS, KD_LOSSES
from megatron_slim.distillation.terms import HIDDEN_KD_WEIGHT, KD_LAMBDA, MTP_BETA
from megatron_slim.planning.layouts import Settings
from megatron_slim.training.slim_arguments import add_slim_arguments, schedule_of


def test_every_named_loss_has_its_formula() -> None:
    assert DIVERGENCES.keys() == KD_LOSSES.keys()
    assert all(callable(KDLoss(kind).divergence) for kind in KD_LOSSES)


def test_flags_have_these_defaults() -> None:
    args = vars(add_slim_arguments(argparse.ArgumentParser()).parse_args([])) | {"kd_top_k": KDLoss().top_k}
    for field in dataclasses.fields(DEFAULTS):
        assert args[field.name] == getattr(DEFAULTS, field.name), field.name
    for weight in (KD_LAMBDA, MTP_BETA, HIDDEN_KD_WEIGHT):
        assert schedule_of(weight, argparse.Namespace(**args)) == weight.default, weight.name
    assert Settings().kd_loss == DEFAULTS.kd_loss
