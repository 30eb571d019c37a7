"""What a student is trained by, decided before its model is built."""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron_slim.distillation.divergences import KDLoss
from megatron_slim.distillation.layer_pairs import LayerPair
from megatron_slim.distillation.loss_options import DEFAULTS

TEACHER_MTP, TEACHER_MAIN = "teacher-mtp", "teacher-main"


@dataclass(frozen=True)
class DistillationOptions:
    """What a student is trained by.

    Attributes:
        vocab_size: tokens that count; the rest of the output layer's rows are padding.
        kd_loss: of main and MTP heads.
        loss_chunk: rows whose logits are in memory at once; None, what suits the device.
        mtp_kd_target: what supervises an MTP head, `TEACHER_MTP` or `TEACHER_MAIN`.
        teacher_ahead: in training mode `DistillationModel.forward` does not run the teacher, and is given its hidden
            states.
        hidden_pairs: layers, of the whole model, that the teacher's supervise; both of a pair are in one stage.
        hidden_loss: of their hidden states, as `hidden.token_losses`.
        seed: of their projections.
    """

    vocab_size: int
    kd_loss: KDLoss = field(default_factory=KDLoss)
    loss_chunk: int | None = None
    mtp_kd_target: str = TEACHER_MTP
    teacher_ahead: bool = False
    hidden_pairs: tuple[LayerPair, ...] = ()
    hidden_loss: str = DEFAULTS.hidden_kd_loss
    seed: int = 0
