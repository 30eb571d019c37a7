"""How Megatron gets an optimizer of matrices: an entry in its registry, and what the parameters of this rank are."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import megatron_slim.mcore

import torch
from megatron.core.optimizer import OptimizerConfig, emerging_optimizers
from megatron.core.optimizer.layer_wise_optimizer import is_managed_by_layer_wise_optimizer
from megatron.core.optimizer.optimizer_config import ParamKey, ParamPredicate
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import MegatronModule
from megatron.core.utils import unwrap_model
from megatron.training import get_args
from torch import Tensor

from megatron_slim.aliases import Keywords
from megatron_slim.architecture.shape import ModelShape
from megatron_slim.architecture.table import weights
from megatron_slim.checkpoint.layout import split_keys
from megatron_slim.checkpoint.loading import shards_of
from megatron_slim.compat import hooks
from megatron_slim.errors import SlimError, summarise
from megatron_slim.optimizers import ADAM, AURORA, MUON, OPTIMIZERS
from megatron_slim.training.finite import FIX
from megatron_slim.training.matrix_stacks import WHOLE, Place, Ranks, Row, places_of
from megatron_slim.training.optimizer_flags import ALL, STEP, adamw_rate


@dataclass(frozen=True)
class MatrixRun:
    """What the optimizers of a run share, those of experts and of the rest.

    Attributes:
        args: Megatron's, validated, and ours.
        model: sizes of the student.
        updates: what they have seen in a step (`matrix_optimizer.Updates`).
    """

    args: Namespace
    model: ModelShape
    updates: Any

    def arguments(
        self, config: OptimizerConfig, chunks: Sequence[MegatronModule], groups: ProcessGroupCollection
    ) -> Keywords:
        """What `MatrixOptimizer` is made with: Megatron's ``config_to_kwargs``."""
        from megatron_slim.training import matrix_optimizer as ours

        args = self.args
        if args.optimizer == AURORA:
            update = ours.aurora(args.aurora_iterations, args.aurora_beta, args.optimizer_precision)
            momentum, nesterov = args.aurora_momentum, not args.aurora_no_nesterov
        else:
            kind, steps = args.muon_coefficient_type, args.muon_num_ns_steps
            mode, extra = args.muon_scale_mode, args.muon_extra_scale_factor
            update = ours.muon_update(steps, kind, mode, extra, args.optimizer_precision)
            momentum, nesterov = args.muon_momentum, args.muon_nesterov
        share = adamw_rate(args, self.model.hidden_size) / args.lr if args.lr else 1.0
        return {
            "lr": config.lr,
            "momentum": momentum,
            "weight_decay": config.weight_decay,
            "nesterov": nesterov,
            "update": update,
            "places_of": partial(self.places_of, rows_of_parameters(chunks, self.model), groups),
            "adamw": ours.AdamW(share, (config.adam_beta1, config.adam_beta2), config.adam_eps),
            "steps_idle": args.optimizer_idle == STEP,
            "updates": self.updates,
        }

    def places_of(
        self, rows: Callable[[], dict[int, Row]], groups: ProcessGroupCollection, parameter: Tensor, group: int
    ) -> list[Place]:
        """The matrices of a parameter of the optimizer, which may be a main copy."""
        row = rows()[id(parameter)]
        experts = row.weight is not None and row.weight.stacked
        ranks = groups.expt_tp if experts else groups.tp
        count = ranks.size()
        at = Ranks(ranks, count) if count > 1 else WHOLE
        return places_of(parameter, group, row, self.model, at, every=self.args.optimizer_matrices == ALL)

    def overrides(self) -> dict[ParamKey, Keywords]:
        """Megatron's rule for what the optimizer does not get: Adam has it, with a learning rate of its own."""
        rate, args = adamw_rate(self.args, self.model.hidden_size), self.args
        least = args.min_lr * rate / args.lr if args.lr else 0.0
        rule = ParamPredicate(name="not_a_matrix", fn=lambda each: not is_managed_by_layer_wise_optimizer(each))
        return {ParamKey(predicate=rule): {"optimizer": ADAM, "max_lr": rate, "min_lr": least}}

    def check(self) -> None:
        """Look at the updates of a step; every rank must call it.

        Raises:
            SlimError: on all ranks, where one of them has an update that is not finite.
        """
        bad = self.updates.any_not_finite(torch.cuda.current_device()).reshape(1)
        torch.distributed.all_reduce(bad, op=torch.distributed.ReduceOp.MAX)
        if bad.item():
            found: list[list[str]] = [[] for _ in range(torch.distributed.get_world_size())]
            torch.distributed.all_gather_object(found, self.updates.not_finite())
            names = sorted({name for names in found for name in names})
            where = f"iteration {getattr(get_args(), 'curr_iteration', 0) + 1}"
            raise SlimError(f"the optimizer's update is not finite, of {summarise(names)}", where=where, fix=FIX)
        self.updates.clear()


def rows_of_parameters(chunks: Sequence[MegatronModule], model: ModelShape) -> Callable[[], dict[int, Row]]:
    """What the parameters of this rank are, by the id of the parameter or of its main copy, once that is there.

    The model's own `sharded_state_dict` says it, so every layout is right by construction.
    """
    table = {key: weight for weight in weights(model) for key, _ in split_keys(weight, model)}
    found: list[tuple[Tensor, Row]] = []
    for chunk in unwrap_model(list(chunks)):
        by_place: dict[int, Row] = {}
        for shard in shards_of(chunk):
            weight = table.get(shard.key)
            expert = shard.global_offset[0] if weight is not None and weight.stacked else None
            by_place.setdefault(shard.data.data_ptr(), Row(weight, expert))
        found += [(each, by_place[each.data_ptr()]) for each in chunk.parameters() if each.requires_grad]
    known: dict[int, Row] = {}

    def rows() -> dict[int, Row]:
        if not known:
            for each, row in found:
                copy = getattr(each, "main_param", None)
                known[id(each if copy is None else copy)] = row
        return known

    return rows


def register(args: Namespace, model: ModelShape) -> None:
    """Have Megatron build the optimizer that a run asks for, where it is one of matrices, and look at its updates.

    Args:
        args: Megatron's, validated, and ours.
        model: sizes of the student.
    """
    if not OPTIMIZERS[args.optimizer].has_matrices:
        return
    from megatron_slim.training.matrix_optimizer import MatrixOptimizer, Updates

    run = MatrixRun(args, model, Updates())
    entry = emerging_optimizers.EmergingOptimizerEntry(
        optimizer_cls=MatrixOptimizer, config_to_kwargs=run.arguments, default_param_overrides=run.overrides()
    )
    hooks.use_optimizers(dict.fromkeys((MUON, AURORA), entry), run.check)
