"""Freezing the parts of a student that are not trained.

What is frozen has no gradient, no buffer for one and no state of an optimizer: Megatron's DDP and optimizers take what
``requires_grad`` is true of, and so do linear layers, ours and Megatron's. Transformer Engine's were not run here.
"""

from __future__ import annotations

import copy

import megatron_slim.mcore

import torch
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor, nn

from megatron_slim.aliases import Keywords
from megatron_slim.architecture.parts import TrainOnly, rows_by_place
from megatron_slim.architecture.shape import ModelShape
from megatron_slim.checkpoint.layout import split_keys
from megatron_slim.checkpoint.loading import shards_of
from megatron_slim.distillation.model import DistillationModel


def freeze(student: DistillationModel, shape: ModelShape, only: TrainOnly) -> None:
    """Freeze what is not trained of a pipeline stage, before it is wrapped.

    The model's own `sharded_state_dict` says which row of the table a parameter is, so every layout is right by
    construction. What has no row, as a projection that losses of hidden states train, stays as it is.

    Args:
        student: the stage.
        shape: of the whole student.
        only: what is trained.
    """
    trained, rows = only.trained_keys(shape), (row for row, _ in rows_by_place(shape))
    table = {key: row.key for row in rows for key, _ in split_keys(row, shape)}
    keys = {_storage(shard.data): table[shard.key] for shard in shards_of(student) if shard.key in table}
    for parameter in student.parameters():
        key = keys.get(_storage(parameter))
        parameter.requires_grad_(key is None or key in trained)
    for router in (module for module in student.modules() if isinstance(module, TopKRouter)):
        if not router.weight.requires_grad:
            _leave(router)
    if student.config.recompute_granularity is not None:
        _begin_graphs(student)


def _storage(tensor: Tensor) -> int:
    """What memory a tensor is in, also on the meta device, where addresses are all zero."""
    return int(tensor.untyped_storage()._cdata)


def _leave(router: TopKRouter) -> None:
    """Have nothing balance the load of a frozen router: no loss, which would act on layers before it, and no bias."""
    router.frozen_expert_bias = True
    router.config = copy.copy(router.config)
    several = isinstance(router.config.moe_aux_loss_coeff, list)
    router.config.moe_aux_loss_coeff = [0.0] * len(router.config.moe_aux_loss_coeff) if several else 0.0
    router.config.moe_z_loss_coeff = None


def _begin_graphs(student: DistillationModel) -> None:
    """Give recomputed layers an input with a gradient, without which torch's checkpoints compute none of weights."""

    def begin(_module: nn.Module, args: tuple[object, ...], kwargs: Keywords) -> tuple[tuple[object, ...], Keywords]:
        hidden = kwargs["hidden_states"]
        if torch.is_grad_enabled() and hidden is not None and not hidden.requires_grad:
            kwargs = {**kwargs, "hidden_states": hidden.detach().requires_grad_()}
        return args, kwargs

    for module in (student.decoder, getattr(student, "mtp", None)):
        if module is not None and student.pre_process and any(each.requires_grad for each in module.parameters()):
            module.register_forward_pre_hook(begin, with_kwargs=True)
