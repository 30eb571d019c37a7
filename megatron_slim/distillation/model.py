"""Teacher and student in one pipeline.

The model that Megatron's schedules see is the student. It carries its teacher as a plain attribute, not as a submodule:
DDP, the optimizer, precision wrappers and checkpoints see the student's parameters alone. Between pipeline stages the
hidden states of both travel side by side on the last axis, so the schedules must think that the hidden size is the sum;
they read it from ``model.config``, which is therefore a copy of the student's config with that one field changed. A
teacher of another dtype sends the bytes of its hidden states as numbers of the student's: nothing is rounded.

A teacher may also have computed ahead (`training.teacher_ahead`): in training mode the student then has the pipeline to
itself, and is given the teacher's last hidden states; in evaluation mode the teacher runs co-located with it as before.
Or its hidden states were recorded (`recorded`): then the student has the pipeline to itself always.

Shapes: S sequence, s that of this rank (under sequence and context parallelism), b batch, h hidden size, D MTP depths.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext

import megatron_slim.mcore

import torch
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.multi_token_prediction import roll_tensor
from torch import Tensor

from megatron_slim.architecture.context_parallel import local_positions, local_slice
from megatron_slim.architecture.hidden_states import HiddenStatesModel
from megatron_slim.architecture.mtp_masks import shift
from megatron_slim.distillation.counted import counted_rows, losses_of_rows
from megatron_slim.distillation.fused import DistillationInputs, Target, default_chunk, fused_losses
from megatron_slim.distillation.hidden import HiddenDistillation, HiddenInputs, layers_of
from megatron_slim.distillation.losses import TokenLosses
from megatron_slim.distillation.offload import OffloadedWeights
from megatron_slim.distillation.options import TEACHER_MAIN, TEACHER_MTP, DistillationOptions
from megatron_slim.distillation.output_layer import OutputLayer
from megatron_slim.distillation.recorded import RecordedTeacher
from megatron_slim.distillation.terms import CROSS_ENTROPY, DIVERGENCE, TEACHER_CROSS_ENTROPY, LossTerm, terms_of
from megatron_slim.distillation.vocabulary import VocabShard
from megatron_slim.weight_gradient import ready_weight


def _between_stages(config: TransformerConfig) -> torch.dtype:
    """What a model's hidden states are in where its stages meet: fp32 for a residual stream in fp32."""
    return torch.float32 if config.fp32_residual_connection else config.params_dtype


class DistillationModel(HiddenStatesModel):
    """The student, with or without a teacher; ends with the loss terms of every token."""

    config: TransformerConfig
    teacher: HiddenStatesModel | None
    recorded: RecordedTeacher | None

    def __init__(
        self,
        *args: object,
        options: DistillationOptions,
        teacher: HiddenStatesModel | None = None,
        recorded: RecordedTeacher | None = None,
        timed_losses: Callable[[], AbstractContextManager[None]] = nullcontext,
        **kwargs: object,
    ) -> None:
        """Build the student, a frozen teacher of the same pipeline stage co-located with it.

        Args:
            args: as for GPTModel.
            options: by what it is trained.
            teacher: built for the same parallel layout; any layers, widths and experts.
            recorded: in its place on the last stage, where the hidden states were recorded.
            timed_losses: is entered around output layers and losses.
            kwargs: as for GPTModel.
        """
        super().__init__(*args, **kwargs)
        self.options, self.timed_losses = options, timed_losses
        self.student_hidden_size = self.config.hidden_size
        self.teacher_weights: OffloadedWeights | None = None
        self.hidden_kd: HiddenDistillation | None = None  # a submodule where there is one: its projections are trained
        # Past nn.Module's own __setattr__, which would register it as a submodule.
        object.__setattr__(self, "teacher", teacher)
        object.__setattr__(self, "recorded", recorded)
        if teacher is None:
            return
        teacher.requires_grad_(False).eval()
        teacher.runs_mtp = options.mtp_kd_target == TEACHER_MTP and self.mtp_depths > 0
        self.config = copy.copy(self.config)
        self.train(self.training)
        if here := [pair for pair in options.hidden_pairs if pair[0] in layers_of(self)]:
            share = 1.0 / len(options.hidden_pairs)
            self.hidden_kd = HiddenDistillation(
                self, teacher, here, kind=options.hidden_loss, seed=options.seed, share=share
            )

    def offload_teacher(self) -> None:
        """Keep the teacher's weights, which are loaded, in host memory unless it runs.

        Not those of its output layer, which the losses need.
        """
        assert self.teacher is not None and self.options.teacher_ahead
        losses = [self.teacher.output_layer] if self.post_process else []
        self.teacher_weights = OffloadedWeights(self.teacher, but=losses)
        self.train(self.training)

    @property
    def colocated_teacher(self) -> HiddenStatesModel | None:
        """The teacher if it runs in the student's forward pass."""
        return None if self.options.teacher_ahead and self.training else self.teacher

    def train(self, mode: bool = True) -> DistillationModel:
        """Set training or evaluation mode; a teacher that computes ahead is co-located in evaluation alone."""
        super().train(mode)
        if self.teacher is not None:
            self.config.hidden_size = self.student_hidden_size
            if self.colocated_teacher is not None:
                teacher_bytes = self.teacher.config.hidden_size * _between_stages(self.teacher.config).itemsize
                self.config.hidden_size += teacher_bytes // _between_stages(self.config).itemsize
        if self.teacher_weights is not None:
            self.teacher_weights.drop() if self.colocated_teacher is None else self.teacher_weights.load()
        return self

    def set_input_tensor(self, input_tensor: Tensor | list[Tensor | None] | None) -> None:
        """Take what the previous stage sent: [s, b, student h + teacher h in numbers of the student's dtype]."""
        received = input_tensor[0] if isinstance(input_tensor, list) else input_tensor
        if self.colocated_teacher is None or received is None:
            super().set_input_tensor(received)
            return
        states = self.states_between_stages(received)
        super().set_input_tensor(states["student"])
        self.colocated_teacher.set_input_tensor(states["teacher"])

    def states_between_stages(self, joined: Tensor) -> dict[str, Tensor]:
        """Hidden states [s, b, h] of each model, from what one stage sends to the next; the teacher's without graph."""
        if self.colocated_teacher is None:
            return {"student": joined}
        teacher_bytes = joined[..., self.student_hidden_size :].detach().contiguous()
        teacher = teacher_bytes.view(_between_stages(self.colocated_teacher.config))
        return {"student": joined[..., : self.student_hidden_size], "teacher": teacher}

    def forward(
        self,
        input_ids: Tensor | None,
        position_ids: Tensor | None,
        attention_mask: Tensor | None,
        labels: Tensor | None = None,
        expected: TokenLosses | None = None,
        hidden_inputs: HiddenInputs | None = None,
        teacher_hidden: Tensor | None = None,
        counts: Tensor | None = None,
    ) -> Tensor:
        """Run this stage of both models.

        Args:
            input_ids: [b, S], on the first stage and where the MTP block is.
            position_ids: [b, S], as input_ids.
            attention_mask: as for GPTModel.
            labels: [b, S], on the last stage.
            expected: gradients that backward will bring each of the returned terms, where they are known already:
                logits are then computed once instead of twice (`fused_losses`).
            hidden_inputs: in a training step, for the layers that the teacher's supervise; None: none are.
            teacher_hidden: on the last stage, where the teacher computed ahead or was recorded: what it ends with, or
                what is stored of that.
            counts: [b, S], on the last stage: where a prediction may count; the others are left out of the losses, and
                are zero. None: nothing is left out.

        Returns:
            [s, b, student h + teacher h in numbers of the student's dtype]; on the last stage `TokenLosses.stack`,
            [terms, b, s].
        """
        with nullcontext() if self.hidden_kd is None else self.hidden_kd.distilling(hidden_inputs):
            # The teacher first: its layers may supervise layers of the student.
            if self.colocated_teacher is not None:
                teacher_hidden = self.run_teacher(input_ids, position_ids, attention_mask)
            hidden = super().forward(input_ids, position_ids, attention_mask)
        if self.post_process:
            assert labels is not None and (teacher_hidden is None) == (self.teacher is None and self.recorded is None)
            return self.token_losses(hidden, teacher_hidden, labels, expected, counts).stack()
        return joined(hidden, teacher_hidden)

    @torch.no_grad()
    def run_teacher(
        self, input_ids: Tensor | None, position_ids: Tensor | None, attention_mask: Tensor | None
    ) -> Tensor:
        """This stage of the teacher, co-located; arguments as for `forward`."""
        assert self.teacher is not None
        hidden: Tensor = self.teacher(input_ids, position_ids, attention_mask)
        return hidden

    def token_losses(
        self,
        hidden: Tensor,
        teacher_hidden: Tensor | None,
        labels: Tensor,
        expected: TokenLosses | None,
        counts: Tensor | None = None,
    ) -> TokenLosses:
        """The loss terms of what the last stages of both models end with; other arguments as for `forward`."""
        heads = [_rows(self._whole_input(head)) for head in self.heads(hidden)]
        depths, positions = range(len(heads)), self._positions(labels)
        own = (local_slice(shift(labels, depth), positions) for depth in depths)
        shifted = torch.stack([_rows(each.transpose(0, 1)) for each in own])
        targets, teacher = self._targets(teacher_hidden, batch=labels.shape[0])
        chunk = self.options.loss_chunk or default_chunk(hidden.device)
        terms = terms_of(has_teacher=teacher is not None, has_mtp=len(heads) > 1)
        functions = {key: term for key, term in terms.items() if term.function is not None}
        upstream = None if expected is None else _upstream(expected, terms, len(heads))
        inputs = DistillationInputs(shifted, targets, teacher, self.options.kd_loss, chunk, tuple(functions.values()))
        with self.timed_losses():
            if counts is None:
                found = fused_losses(self._output_weights(self), heads, inputs, upstream)
            else:
                rows = counted_rows(local_slice(counts, positions))
                found = losses_of_rows(self._output_weights(self), heads, inputs, upstream, rows)
        lm, kd, teacher_lm, *others = (each.unflatten(-1, (-1, labels.shape[0])).transpose(-1, -2) for each in found)
        closed = {CROSS_ENTROPY: lm, DIVERGENCE: kd, TEACHER_CROSS_ENTROPY: teacher_lm[None]}
        of_heads = {key: closed[term.of] for key, term in terms.items() if isinstance(term.of, str)}
        of_heads |= dict(zip(functions, others, strict=True))
        return TokenLosses(
            {key: tuple(of_heads[key][1:] if term.mtp else of_heads[key][:1]) for key, term in terms.items()}
        )

    def _positions(self, whole: Tensor) -> Tensor | None:
        """Positions of this rank's part of a sequence [..., S] under context parallelism; None for all."""
        return local_positions(self.pg_collection.cp, whole.shape[-1])

    def _output_weights(self, model: HiddenStatesModel | RecordedTeacher) -> OutputLayer:
        """A model's output layer, its parameters ready to be read."""
        weight = ready_weight(model.output_layer)
        if weight is None:
            assert isinstance(model, HiddenStatesModel)
            weight = model.shared_embedding_or_output_weight()
        shard = VocabShard.of(self.pg_collection.tp, len(weight), self.options.vocab_size)
        return OutputLayer(
            weight, shard, self.recorded is not None and model is self.recorded and self.recorded.on_host
        )

    def _whole_input(self, hidden: Tensor) -> Tensor:
        """Hidden states [s, b, h] of the whole sequence, whose gradient is then summed over tensor-parallel ranks."""
        if self.output_layer.sequence_parallel:
            whole: Tensor = gather_from_sequence_parallel_region(hidden, group=self.pg_collection.tp)
            return whole
        copied: Tensor = copy_to_tensor_model_parallel_region(hidden, group=self.pg_collection.tp)
        return copied

    def _teacher_heads(self, teacher_hidden: Tensor) -> tuple[list[Tensor], OutputLayer]:
        """Hidden states [s, b, h] of the teacher's heads, whole under sequence parallelism, and its output layer."""
        if self.recorded is not None:
            length = teacher_hidden.shape[2]
            heads = self.recorded.heads(teacher_hidden, local_positions(self.pg_collection.cp, length))
            return list(heads), self._output_weights(self.recorded)
        assert self.teacher is not None
        heads_of_rank = self.teacher.heads(teacher_hidden)
        return [self._whole_input(head) for head in heads_of_rank], self._output_weights(self.teacher)

    @torch.no_grad()
    def _targets(self, teacher_hidden: Tensor | None, batch: int) -> tuple[tuple[Target, ...], OutputLayer | None]:
        """What supervises each head.

        Depth k at position i predicts token i + 1 + k: that is the teacher's own MTP head at position i, or its main
        head at position i + k, k times the batch size rows further on, whose logits then serve all heads.
        """
        numbers = range(1 + self.mtp_depths)
        if teacher_hidden is None:
            return (Target(None, tuple((number, 0) for number in numbers)),), None
        heads, layer = self._teacher_heads(teacher_hidden)
        if self.options.mtp_kd_target == TEACHER_MAIN:
            if self.config.context_parallel_size == 1:
                return (Target(_rows(heads[0]), tuple((number, number * batch) for number in numbers)),), layer
            for number in numbers[1:]:  # what is further on is on another rank: it comes, and logits are made again
                heads[number:] = [roll_tensor(heads[number - 1], dims=0, cp_group=self.pg_collection.cp)[0]]
        return tuple(Target(_rows(heads[number]), ((number, 0),)) for number in numbers), layer


def joined(hidden: Tensor, teacher_hidden: Tensor | None) -> Tensor:
    """Hidden states of student and teacher side by side, those of the teacher as numbers of the student's dtype."""
    return hidden if teacher_hidden is None else torch.cat([hidden, teacher_hidden.view(hidden.dtype)], dim=-1)


def _rows(values: Tensor) -> Tensor:
    """Sequence and batch in one dimension: [s, b, ...] -> [s b, ...]."""
    return values.flatten(0, 1)


def _upstream(expected: TokenLosses, terms: Mapping[str, LossTerm], heads: int) -> tuple[Tensor, ...]:
    """Gradients [heads, s b] of lm, of kd and of the functions."""
    none = torch.zeros_like(expected["lm"][0])
    found = {what: heads * [none] for what in (CROSS_ENTROPY, DIVERGENCE)}
    for key, term in terms.items():
        of_heads = found.setdefault(term.of if isinstance(term.of, str) else key, heads * [none])
        for head, gradient in enumerate(expected[key], start=int(term.mtp)):
            of_heads[head] = of_heads[head] + gradient
    found.pop(TEACHER_CROSS_ENTROPY, None)
    return tuple(torch.stack(of_heads).transpose(1, 2).flatten(1) for of_heads in found.values())
