"""Megatron without one of its changes, a router, and optimizers of a few parameters."""

from __future__ import annotations

from collections.abc import Callable

import megatron_slim.mcore

import pytest
import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.optimizer import ChainedOptimizer
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_slim.compat import runtime
from megatron_slim.compat.patch import MADE, Patch

Without = Callable[[Patch], None]
NUMBERS = 100  # of a parameter


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> Without:
    """Puts Megatron's own back for the time of a test."""

    def put_back(patch: Patch) -> None:
        for target in patch.targets:
            owner, name = patch.place(target)
            theirs, _ = MADE[target]
            if theirs is None and patch.optional:
                monkeypatch.delattr(owner, name)
            else:
                monkeypatch.setattr(owner, name, theirs)

    return put_back


def router_in_bf16() -> TopKRouter:
    """A router that counts micro-batches and tokens for the global load balancing loss."""
    runtime.init_single_process()
    config = TransformerConfig(
        num_layers=1,
        hidden_size=8,
        num_attention_heads=1,
        num_moe_experts=4,
        moe_router_topk=2,
        moe_router_load_balancing_type="global_aux_loss",
        moe_aux_loss_coeff=0.01,
        bf16=True,
        params_dtype=torch.bfloat16,
    )
    router = TopKRouter(config, pg_collection=ProcessGroupCollection.use_mpu_process_groups()).bfloat16()
    router.set_layer_number(1)
    return router


class Parameters(torch.nn.Module):
    """Parameter n of a model is n + 1 throughout; those that are marked are of experts."""

    def __init__(self, dtypes: tuple[torch.dtype, ...], experts: tuple[int, ...]) -> None:
        super().__init__()
        for number, dtype in enumerate(dtypes):
            parameter = torch.nn.Parameter(torch.full((NUMBERS,), number + 1.0, dtype=dtype))
            if number in experts:
                parameter.allreduce = False  # type: ignore[attr-defined]
            self.register_parameter(f"p{number}", parameter)


def trained(
    *dtypes: torch.dtype,
    distributed: bool = True,
    bucket_size: int | None = None,
    lr: float = 1e-3,
    experts: tuple[int, ...] = (),
) -> tuple[Parameters, ChainedOptimizer]:
    """A model in bf16 with such parameters, and its optimizer after one step."""
    runtime.init_single_process()
    config = TransformerConfig(
        num_layers=1, hidden_size=8, num_attention_heads=1, bf16=True, params_dtype=torch.bfloat16
    )
    buckets = DistributedDataParallelConfig(
        use_distributed_optimizer=distributed, bucket_size=bucket_size, overlap_grad_reduce=bucket_size is not None
    )
    model = Parameters(dtypes, experts)
    ddp = DistributedDataParallel(config, buckets, model)
    settings = OptimizerConfig(
        bf16=True,
        params_dtype=torch.bfloat16,
        use_distributed_optimizer=distributed,
        lr=lr,
        min_lr=lr / 10,
        clip_grad=0.0,
        weight_decay=0.0,
    )
    optimizer = get_megatron_optimizer(settings, [ddp])
    for parameter in model.parameters():
        parameter.main_grad.copy_(parameter.detach())
    optimizer.step()
    return model, optimizer
