"""Losses that no flag selects, as other entries of the terms; made in a process that trains once."""

from __future__ import annotations

import dataclasses

from megatron_slim.distillation.schedule import Schedule
from megatron_slim.distillation.terms import LOSS_TERMS, LossWeight

MTP_LM = LossWeight("mtp lm weight", Schedule("constant", 1.0, 1.0), "the weight of MTP-LM, where it is alone")


def mtp_lm_alone() -> None:
    """The MTP block is trained on the text alone, as heavily as on text and teacher together; MTP-KD is logged."""
    LOSS_TERMS["mtp_lm"] = dataclasses.replace(LOSS_TERMS["mtp_lm"], weight=MTP_LM, rest=False)
    LOSS_TERMS["mtp_kd"] = dataclasses.replace(LOSS_TERMS["mtp_kd"], weight=None)
