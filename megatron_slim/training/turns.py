"""Budgets of an elastic student in Megatron's schedules: which pass is of which, and what is done around a step.

In a step of several budgets each micro-batch goes through the pipeline once for each of them, one after the other: the
schedule has as many micro-batches more. The first of them brings the data and the teacher's pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import megatron_slim.mcore

import torch
from megatron.core.distributed.finalize_model_grads import reset_model_temporary_tensors
from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker
from megatron.core.transformer.moe.moe_utils import get_updated_expert_bias
from megatron.core.transformer.moe.router import TopKRouter
from megatron.training import get_args
from torch import Tensor

from megatron_slim.aliases import Function
from megatron_slim.distillation.elastic import ElasticModel
from megatron_slim.distillation.model import DistillationModel
from megatron_slim.distillation.selected import SelectedParameters
from megatron_slim.distillation.terms import LOSS_TERMS
from megatron_slim.training.batches import Batch
from megatron_slim.training.elastic import ElasticRun, Numbers

Logged = dict[str, Tensor]


@dataclass(frozen=True)
class Turn:
    """One pass of one micro-batch through a stage.

    Attributes:
        budget: which it is of; 0 where there is one.
        name: of the budget, with a slash behind it; "" where there is one.
        first: no budget had this micro-batch before.
        weight: of its losses.
        others: names of the other budgets of the step.
    """

    budget: int = 0
    name: str = ""
    first: bool = True
    weight: float = 1.0
    others: tuple[str, ...] = ()

    def logged(self, losses: Mapping[str, Tensor]) -> Logged:
        """What Megatron's log is given: losses under the budget's name, and nothing of the others, which it adds up."""
        terms = {term.name for term in LOSS_TERMS.values()}
        found = {f"{self.name}{name}" if name in terms else name: value for name, value in losses.items()}
        for other in self.others:
            found |= {f"{other}{name}": torch.zeros_like(losses[name]) for name in losses if name in terms}
        return found


ALONE = Turn()


@dataclass
class Turns:
    """Budgets of the schedule that runs.

    Attributes:
        run: of which budgets.
        chunks: this rank's virtual pipeline stages.
        flops: operations per token of each budget.
    """

    run: ElasticRun
    chunks: Sequence[DistillationModel]
    flops: Sequence[float]
    current: tuple[int, ...] = (0,)
    _begun: bool = False
    _passes: dict[int, int] = field(default_factory=dict)
    _batches: dict[int, Batch] = field(default_factory=dict)

    def around(self, schedule: Function, *, forward_only: bool, num_microbatches: int, **more: object) -> object:
        """Run a schedule with the budgets of this iteration, in validation with all; all ranks call it."""
        budgets = range(len(self.run.budgets))
        self.current = tuple(budgets) if forward_only else self.run.of_iteration(get_args().curr_iteration)
        self._passes.clear()
        if not self._begun:  # what their models were built with
            for chunk in self._stages():
                for each in chunk.selected:
                    each.release()
            self._begun = True
        get_moe_metrics_tracker().metrics.clear()  # what is left has the form that Megatron logs
        for selected in self._selected():
            selected.fill()
            if not forward_only:
                selected.begin(lend=len(self.current) == 1)
        try:
            count = num_microbatches * len(self.current)
            return schedule(forward_only=forward_only, num_microbatches=count, **more)
        finally:
            for selected in self._selected():
                selected.release()

    def _stages(self) -> Iterator[ElasticModel]:
        for chunk in self.chunks:
            assert isinstance(chunk, ElasticModel)
            yield chunk

    def _selected(self) -> Iterator[SelectedParameters]:
        """Of the step's budgets but the largest, stage by stage."""
        for chunk in self._stages():
            yield from (chunk.selected[budget - 1] for budget in self.current if budget)

    def take(self, vp_stage: int | None, read: Callable[[], Batch]) -> tuple[Turn, Batch]:
        """The next pass of a stage, and its micro-batch, which ``read`` reads where no budget had it before."""
        stage = vp_stage or 0
        number = self._passes.get(stage, 0)
        self._passes[stage] = number + 1
        place = number % len(self.current)
        budget = self.current[place]
        if place == 0:
            self._batches[stage] = read()
        names = [f"{name}/" for name in self.run.names]
        others = tuple(names[each] for each in self.current if each != budget)
        turn = Turn(budget, names[budget], place == 0, self.run.budgets[budget].weight, others)
        return turn, self._batches[stage]

    def work(self) -> float:
        """Operations of the step's budgets, relative to those of the largest alone."""
        return sum(self.flops[budget] for budget in self.current) / self.flops[0]

    def collect(self) -> None:
        """Before gradients are reduced over ranks: bring those of the smaller budgets to the largest."""
        for selected in self._selected():
            selected.collect()
        for chunk in self._stages():
            others = [chunk.students[budget] for budget in self.current if budget]
            for other in others:
                move_router_biases(other)
            reset_model_temporary_tensors(chunk.config, others)
        for selected in self._selected():
            selected.collect_buffers()
        for metric in get_moe_metrics_tracker().metrics.values():
            metric.values = Numbers(self.run).folded(metric.values, self.current)


@torch.no_grad()
def move_router_biases(model: DistillationModel) -> None:
    """What Megatron does at the end of a step with the biases of routers, for a model that it does not know of."""
    for router in model.modules():
        if isinstance(router, TopKRouter) and router.enable_expert_bias:
            counts, rate = router.local_tokens_per_expert.clone(), router.config.moe_router_bias_update_rate
            router.expert_bias.copy_(get_updated_expert_bias(counts, router.expert_bias, rate))
