"""Teacher and student in one pipeline.

The model that Megatron's schedules see is the student. It carries its teacher as a plain attribute, not as a submodule:
DDP, the optimizer, precision wrappers and checkpoints see the student's parameters alone. Between pipeline stages the
hidden states of both travel side by side on the last axis, so the schedules must think that the hidden size is the sum;
they read it from ``model.config``, which is therefore a copy of the student's config with that one field changed. A
teacher of another dtype sends the bytes of its hidden states as numbers of the student's: nothing is rounded.

Shapes: s sequence (of this rank, under sequence parallelism), b batch, h hidden size, D MTP depths.
"""

from __future__ import annotations

import copy

import torch
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from megatron_slim.architecture.hidden_states import HiddenStatesModel
from megatron_slim.distillation.losses import TokenLosses, lm_and_kd_loss, shift

TEACHER_MTP, TEACHER_MAIN = "teacher-mtp", "teacher-main"


def _between_stages(config: TransformerConfig) -> torch.dtype:
    """What a model's hidden states are in where its stages meet: fp32 for a residual stream in fp32."""
    return torch.float32 if config.fp32_residual_connection else config.params_dtype


class DistillationModel(HiddenStatesModel):
    """The student, with or without a teacher; ends with the loss terms of every token."""

    config: TransformerConfig
    teacher: HiddenStatesModel | None = None
    mtp_kd_target: str = TEACHER_MTP
    unpadded_vocab_size: int = 0

    def attach_teacher(self, teacher: HiddenStatesModel, mtp_kd_target: str) -> None:
        """Put a frozen teacher of the same pipeline stage beside the student.

        Args:
            teacher: built for the same parallel layout; any layers, widths and experts.
            mtp_kd_target: what an MTP head learns from, `TEACHER_MTP` or `TEACHER_MAIN`.
        """
        teacher.requires_grad_(False).eval()
        teacher.runs_mtp = mtp_kd_target == TEACHER_MTP and self.mtp_depths > 0
        # Past nn.Module's own __setattr__, which would register it as a submodule.
        object.__setattr__(self, "teacher", teacher)
        self.mtp_kd_target = mtp_kd_target
        self.student_hidden_size = self.config.hidden_size
        self.config = copy.copy(self.config)
        teacher_bytes = teacher.config.hidden_size * _between_stages(teacher.config).itemsize
        self.config.hidden_size += teacher_bytes // _between_stages(self.config).itemsize

    def set_input_tensor(self, input_tensor: Tensor | list[Tensor | None] | None) -> None:
        """Take what the previous stage sent: [s, b, student h + teacher h in numbers of the student's dtype]."""
        received = input_tensor[0] if isinstance(input_tensor, list) else input_tensor
        if self.teacher is None or received is None:
            super().set_input_tensor(received)
            return
        super().set_input_tensor(received[..., : self.student_hidden_size])
        teacher_bytes = received[..., self.student_hidden_size :].detach().contiguous()
        self.teacher.set_input_tensor(teacher_bytes.view(_between_stages(self.teacher.config)))

    def forward(
        self,
        input_ids: Tensor | None,
        position_ids: Tensor | None,
        attention_mask: Tensor | None,
        labels: Tensor | None = None,
    ) -> Tensor:
        """Run this stage of both models.

        Args:
            input_ids: [b, s], on the first stage and where the MTP block is.
            position_ids: [b, s], as input_ids.
            attention_mask: as for GPTModel.
            labels: [b, s], on the last stage.

        Returns:
            [s, b, student h + teacher h in numbers of the student's dtype]; on the last stage `TokenLosses.stack`,
            [terms, b, s].
        """
        hidden = super().forward(input_ids, position_ids, attention_mask)
        teacher_hidden = None
        if self.teacher is not None:
            with torch.no_grad():
                teacher_hidden = self.teacher(input_ids, position_ids, attention_mask)
        if self.post_process:
            assert labels is not None
            return self._token_losses(hidden, teacher_hidden, labels).stack()
        return hidden if teacher_hidden is None else torch.cat([hidden, teacher_hidden.view(hidden.dtype)], dim=-1)

    def _token_losses(self, hidden: Tensor, teacher_hidden: Tensor | None, labels: Tensor) -> TokenLosses:
        main, *mtp = self.heads(hidden)
        targets = self._teacher_logits(teacher_hidden)
        lm, kd, teacher_lm = self._head_loss(main, targets[0], labels)
        by_depth = [
            self._head_loss(head, targets[depth], shift(labels, depth))[:2] for depth, head in enumerate(mtp, start=1)
        ]
        mtp_lm, mtp_kd = tuple(terms[0] for terms in by_depth), tuple(terms[1] for terms in by_depth)
        if teacher_hidden is None:
            return TokenLosses(lm, mtp_lm=mtp_lm)
        return TokenLosses(lm, kd, teacher_lm, mtp_lm, mtp_kd)

    def _head_loss(self, head: Tensor, target: Tensor | None, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Loss terms [b, s] of one head of the student; labels [b, s], target logits [s, b, P]."""
        terms = lm_and_kd_loss(
            self.logits(head), target, labels.transpose(0, 1), self.unpadded_vocab_size, self.pg_collection.tp
        )
        lm, kd, teacher_lm = (term.transpose(0, 1).contiguous() for term in terms)
        return lm, kd, teacher_lm

    @torch.no_grad()
    def _teacher_logits(self, teacher_hidden: Tensor | None) -> list[Tensor | None]:
        """Target logits [s, b, P] of the main head and of each of the student's MTP depths.

        Depth k at position i predicts token i + 1 + k: that is the teacher's own MTP head at position i, or its main
        head at position i + k. The last k positions, which have no target, are masked out of the loss.
        """
        if self.teacher is None or teacher_hidden is None:
            return [None] * (1 + self.mtp_depths)
        heads = self.teacher.heads(teacher_hidden)
        main = self.teacher.logits(heads[0])
        if self.mtp_kd_target == TEACHER_MTP:
            return [main, *(self.teacher.logits(head) for head in heads[1 : 1 + self.mtp_depths])]
        return [main, *(torch.roll(main, -depth, dims=0) for depth in range(1, 1 + self.mtp_depths))]
