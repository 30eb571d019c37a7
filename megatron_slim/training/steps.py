"""A training step: batches, the forward pass of both models, and the losses that are made of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial

import megatron_slim.mcore

import torch
from megatron.core import parallel_state
from megatron.core.transformer import MegatronModule
from megatron.core.utils import get_attr_wrapped_model
from megatron.training import get_args, get_timers
from torch import Tensor

from megatron_slim.aliases import Function, Keywords, Sample
from megatron_slim.architecture.context_parallel import local_positions
from megatron_slim.distillation.losses import LossWeights, TokenLosses, combine, gradients_of_total
from megatron_slim.distillation.model import DistillationModel
from megatron_slim.distillation.terms import LOSS_TERMS, weights_of
from megatron_slim.training.batches import STATES, Batch, Entry, next_batch
from megatron_slim.training.finite import FiniteWatch
from megatron_slim.training.hidden_kd import HiddenLog, hidden_inputs
from megatron_slim.training.run_log import RunLog
from megatron_slim.training.slim_arguments import now
from megatron_slim.training.spec import RunSpec
from megatron_slim.training.teacher_ahead import TeacherAhead
from megatron_slim.training.turns import ALONE, Turn, Turns


@dataclass(frozen=True)
class Batches:
    """This rank's part of the data.

    Attributes:
        spec: of the run.
        chunks: this rank's virtual pipeline stages.
        watch: hears of batches with ids outside the vocabulary.
        for_last: further entries of samples, by key, that the last stage needs.
    """

    spec: RunSpec
    chunks: list[DistillationModel]
    watch: FiniteWatch
    for_last: Mapping[str, Entry] = field(default_factory=dict)

    def take(self, iterator: Iterator[Sample], vp_stage: int | None) -> Batch:
        """What this stage needs of the next micro-batch: MTP blocks need tokens, hidden-state losses the loss mask."""
        student, teacher = self.spec.student, self.spec.teacher
        has_mtp = bool(student.mtp_num_layers or (teacher and teacher.mtp_num_layers))
        chunk = self.chunks[vp_stage or 0]
        whole = (chunk.post_process and has_mtp) or chunk.hidden_kd is not None
        args = get_args()
        return next_batch(
            iterator,
            student.vocab_size,
            vp_stage,
            micro_batch_size=args.micro_batch_size if chunk.training else args.eval_micro_batch_size,
            whole=whole,
            refuse=self.watch.refuse,
            documents=self.spec.documents_apart,
            for_last=self.for_last,
        )


@dataclass(frozen=True)
class Steps:
    """What Megatron's loop calls in a step.

    Attributes:
        spec: of the run.
        chunks: this rank's virtual pipeline stages, teachers attached.
        batches: this rank's part of the data.
        watch: looks for what is not finite.
        log: measures.
        hidden_log: losses of hidden states.
        ahead: a teacher that computes ahead.
        turns: budgets of an elastic student.
    """

    spec: RunSpec
    chunks: list[DistillationModel]
    batches: Batches
    watch: FiniteWatch
    log: RunLog
    hidden_log: HiddenLog
    ahead: TeacherAhead | None
    turns: Turns | None = None

    def finalize_grads(self, model: list[MegatronModule], *args: object, **kwargs: object) -> None:
        """Megatron's ``finalize_model_grads_func``: the end of an iteration but for the optimizer's step."""
        if self.turns is not None:
            self.turns.collect()
        self.hidden_log.finish(self.chunks, self.watch)
        self.watch.finalize_grads(model, *args, **kwargs)
        self.log.end_iteration()

    def forward_step(self, iterator: Iterator[Sample], model: MegatronModule) -> tuple[Tensor, Function]:
        """One micro-batch through one stage, and the function that reduces its losses on the last one."""
        timers = get_timers()
        timers("batch-generator", log_level=2).start()
        vp_stage = get_attr_wrapped_model(model, "vp_stage")
        turn, batch = self._take(iterator, vp_stage)
        timers("batch-generator").stop()
        loss_mask, position_ids = batch["loss_mask"], batch["position_ids"]
        last = get_attr_wrapped_model(model, "post_process")
        weights, expected = loss_weights(), None
        if last and torch.is_grad_enabled():
            expected = self.expected_gradients(loss_mask, weights, position_ids, turn)
        targets: Keywords = {
            "expected": expected,
            "hidden_inputs": hidden_inputs(self.chunks[vp_stage or 0], loss_mask, weights),
        }
        if last and model.training and self.ahead is not None:
            assert batch["labels"] is not None
            targets["teacher_hidden"] = self.ahead.take(batch["labels"])
        elif batch.get(STATES) is not None:
            targets["teacher_hidden"] = batch[STATES]
        if last and self.spec.has_masks:
            targets["counts"] = loss_mask
        if self.turns is not None:
            targets |= {"budget": turn.budget, "teacher_runs": turn.first}
        with self.log.clock.forward(vp_stage):
            output = model(batch["tokens"], position_ids, None, batch["labels"], **targets)
        self.log.clock.watch_backward(output, vp_stage)
        label = "" if model.training else "validation "
        if not last:
            for name, states in get_attr_wrapped_model(model, "states_between_stages")(output).items():
                self.watch.add_states(f"{label}{turn.name}{name}", vp_stage, states)
        return output, partial(self.reduce_losses, loss_mask, weights, position_ids, vp_stage, label, turn)

    def _take(self, iterator: Iterator[Sample], vp_stage: int | None) -> tuple[Turn, Batch]:
        """The next pass of a stage and its micro-batch."""
        read = partial(self.batches.take, iterator, vp_stage)
        return (ALONE, read()) if self.turns is None else self.turns.take(vp_stage, read)

    def reduce_losses(
        self,
        loss_mask: Tensor | None,
        weights: LossWeights,
        position_ids: Tensor | None,
        vp_stage: int | None,
        label: str,
        turn: Turn,
        output: Tensor,
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """The sum of the terms with this iteration's weights, in the form that Megatron's loop expects."""
        assert loss_mask is not None
        losses = TokenLosses.unstack(output, has_teacher=self.spec.has_teacher)
        total, tokens, report = combine(losses, loss_mask, weights, position_ids, _local_positions(loss_mask))
        for name, (value, _) in report.items():
            self.watch.add("loss", f"{label}{turn.name}{name}", vp_stage, value)
        logged = {name: torch.stack(pair) for name, pair in report.items()}
        if label:  # after which Megatron reports a perplexity of everything
            logged = {term.name: logged[term.name] for term in LOSS_TERMS.values() if term.name in logged}
        else:
            self.log.losses.add(logged, turn.weight)
        if self.hidden_log.pairs and not label:
            logged |= self.hidden_log.report(tokens, weights)
        # A micro-batch's tokens count once, whatever goes through it.
        tokens = tokens.to(torch.int) if turn.first else torch.zeros_like(tokens, dtype=torch.int)
        return total * turn.weight, tokens, turn.logged(logged)

    def expected_gradients(
        self, loss_mask: Tensor | None, weights: LossWeights, position_ids: Tensor | None, turn: Turn
    ) -> TokenLosses:
        """What Megatron's schedules will bring each term that `reduce_losses` is given.

        That of its sum times the loss scale: with ``--calculate-per-token-loss``, which is always on, they divide by
        the number of tokens when all micro-batches are done.
        """
        assert loss_mask is not None
        depths, has_teacher = self.spec.student.mtp_num_layers, self.spec.has_teacher
        positions = _local_positions(loss_mask)
        gradients = (
            gradients_of_total(loss_mask, weights, depths, position_ids, positions, has_teacher=has_teacher).stack()
            * turn.weight
        )
        # The schedules read the first chunk's config, and Megatron's loop writes there.
        if (scale := self.chunks[0].config.grad_scale_func) is not None:
            gradients = scale(gradients)
        return TokenLosses.unstack(gradients, has_teacher=has_teacher)


def _local_positions(whole: Tensor) -> Tensor | None:
    """Positions of this rank's part of a sequence [..., S] under context parallelism; None for all."""
    return local_positions(parallel_state.get_context_parallel_group(), whole.shape[-1])


def loss_weights() -> LossWeights:
    """Lambda, beta and those of further terms in this iteration."""
    args = get_args()
    return {weight.key: now(weight, args) for weight in weights_of(LOSS_TERMS.values())}
