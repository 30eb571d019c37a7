"""A bug of Megatron with routers that have a bias, in layers with different numbers of experts."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from torch import nn

from megatron_slim.compat.patch import BUG, NOT_REPORTED, Patch

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_config import TransformerConfig
    from torch.distributed import ProcessGroup


def _one_number_at_a_time(update: Callable[..., None]) -> Callable[..., None]:
    """Megatron's own function, for the routers of each number of experts; in one order, as ranks add up together."""

    @functools.wraps(update)
    def run(model: Sequence[nn.Module], config: TransformerConfig, tp_dp_cp_group: ProcessGroup | None = None) -> None:
        routers: dict[int, list[nn.Module]] = {}
        for module in (module for chunk in model for module in chunk.modules()):
            if (bias := getattr(module, "expert_bias", None)) is not None:
                routers.setdefault(len(bias), []).append(module)
        for experts in sorted(routers):
            update([nn.ModuleList(routers[experts])], config, tp_dp_cp_group=tp_dp_cp_group)

    return run


ROUTER_BIASES = Patch(
    name="biases of routers",
    kind=BUG,
    why="The biases of all routers are moved in one tensor, which those of layers with different numbers of experts "
    "do not fit into.",
    upstream=NOT_REPORTED,
    targets=("megatron.core.distributed.finalize_model_grads:_update_router_expert_bias",),
    changes=(_one_number_at_a_time,),
)
