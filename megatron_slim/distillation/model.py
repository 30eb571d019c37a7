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
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from megatron_slim.architecture.hidden_states import HiddenStatesModel
from megatron_slim.distillation.divergences import KDLoss
from megatron_slim.distillation.fused import Lesson, OutputLayer, Target, default_chunk, fused_losses
from megatron_slim.distillation.losses import TokenLosses, shift
from megatron_slim.distillation.vocabulary import VocabShard

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
    kd_loss: KDLoss = KDLoss()
    loss_chunk: int | None = None  # rows whose logits are in memory at once; None: what suits the device
    timed_losses: Callable[[], AbstractContextManager[None]] = nullcontext  # around output layers and losses

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
        states = self.states_between_stages(received)
        super().set_input_tensor(states["student"])
        self.teacher.set_input_tensor(states["teacher"])

    def states_between_stages(self, joined: Tensor) -> dict[str, Tensor]:
        """Hidden states [s, b, h] of each model, from what one stage sends to the next; the teacher's without graph."""
        if self.teacher is None:
            return {"student": joined}
        teacher_bytes = joined[..., self.student_hidden_size :].detach().contiguous()
        teacher = teacher_bytes.view(_between_stages(self.teacher.config))
        return {"student": joined[..., : self.student_hidden_size], "teacher": teacher}

    def forward(
        self,
        input_ids: Tensor | None,
        position_ids: Tensor | None,
        attention_mask: Tensor | None,
        labels: Tensor | None = None,
        expected: TokenLosses | None = None,
    ) -> Tensor:
        """Run this stage of both models.

        Args:
            input_ids: [b, s], on the first stage and where the MTP block is.
            position_ids: [b, s], as input_ids.
            attention_mask: as for GPTModel.
            labels: [b, s], on the last stage.
            expected: gradients that backward will bring each of the returned terms, where they are known already:
                logits are then computed once instead of twice (`fused_losses`).

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
            return self._token_losses(hidden, teacher_hidden, labels, expected).stack()
        return hidden if teacher_hidden is None else torch.cat([hidden, teacher_hidden.view(hidden.dtype)], dim=-1)

    def _token_losses(
        self, hidden: Tensor, teacher_hidden: Tensor | None, labels: Tensor, expected: TokenLosses | None
    ) -> TokenLosses:
        heads = [_rows(self._whole_input(head)) for head in self.heads(hidden)]
        depths = range(len(heads))
        shifted = torch.stack([_rows(shift(labels, depth).transpose(0, 1)) for depth in depths])
        targets, teacher = self._targets(teacher_hidden, batch=labels.shape[0])
        chunk = self.loss_chunk or default_chunk(hidden.device)
        upstream = None if expected is None else _upstream(expected)
        lesson = Lesson(shifted, targets, teacher, self.kd_loss, chunk)
        with self.timed_losses():
            terms = fused_losses(self._output_weights(self), heads, lesson, upstream)
        lm, kd, teacher_lm = (term.unflatten(-1, (-1, labels.shape[0])).transpose(-1, -2) for term in terms)
        if teacher is None:
            return TokenLosses(lm[0], mtp_lm=tuple(lm[1:]))
        return TokenLosses(lm[0], kd[0], teacher_lm, tuple(lm[1:]), tuple(kd[1:]))

    def _output_weights(self, model: HiddenStatesModel) -> OutputLayer:
        """A model's output layer, its parameters ready to be read."""
        layer = model.output_layer
        # The layer's own forward, before which DDP waits for parameters that are still gathered, is not called.
        for wait in layer._forward_pre_hooks.values():
            wait(layer, ())
        weight = model.shared_embedding_or_output_weight() if layer.weight is None else layer.weight
        return OutputLayer(weight, VocabShard.of(self.pg_collection.tp, len(weight), self.unpadded_vocab_size))

    def _whole_input(self, hidden: Tensor) -> Tensor:
        """Hidden states [s, b, h] of the whole sequence, whose gradient is then summed over tensor-parallel ranks."""
        if self.output_layer.sequence_parallel:
            whole: Tensor = gather_from_sequence_parallel_region(hidden, group=self.pg_collection.tp)
            return whole
        copied: Tensor = copy_to_tensor_model_parallel_region(hidden, group=self.pg_collection.tp)
        return copied

    @torch.no_grad()
    def _targets(self, teacher_hidden: Tensor | None, batch: int) -> tuple[tuple[Target, ...], OutputLayer | None]:
        """What each head learns from.

        Depth k at position i predicts token i + 1 + k: that is the teacher's own MTP head at position i, or its main
        head at position i + k, k times the batch size rows further on, whose logits then serve all heads.
        """
        numbers = range(1 + self.mtp_depths)
        if self.teacher is None or teacher_hidden is None:
            return (Target(None, tuple((number, 0) for number in numbers)),), None
        heads = [_rows(self._whole_input(head)) for head in self.teacher.heads(teacher_hidden)]
        layer = self._output_weights(self.teacher)
        if self.mtp_kd_target == TEACHER_MAIN:
            return (Target(heads[0], tuple((number, number * batch) for number in numbers)),), layer
        return tuple(Target(heads[number], ((number, 0),)) for number in numbers), layer


def _rows(values: Tensor) -> Tensor:
    """Sequence and batch in one dimension: [s, b, ...] -> [s b, ...]."""
    return values.flatten(0, 1)


def _upstream(expected: TokenLosses) -> tuple[Tensor, Tensor]:
    """Gradients [heads, s b] of lm and of kd."""
    lm = torch.stack([expected.lm, *expected.mtp_lm])
    kd = torch.zeros_like(lm) if expected.kd is None else torch.stack([expected.kd, *expected.mtp_kd])
    return lm.transpose(1, 2).flatten(1), kd.transpose(1, 2).flatten(1)
