"""What stands in for libraries that are not installed: flash-linear-attention, and a fused Adam."""

from __future__ import annotations

import logging
import os

from megatron_slim.compat import linear_attention
from megatron_slim.compat.adam import FusedAdam
from megatron_slim.compat.patch import LIBRARY, NOT_REPORTED, Patch, instead

logger = logging.getLogger(__name__)

DELTA_RULE = Patch(
    name="gated delta rule",
    kind=LIBRARY,
    why="Without flash-linear-attention, whose kernels are Triton, Megatron builds no Gated DeltaNet.",
    upstream="https://github.com/NVIDIA/Megatron-LM/pull/1989",
    targets=(
        "megatron.core.ssm.gated_delta_net.common:HAVE_FLA",
        "megatron.core.ssm.gated_delta_net.common:l2norm",
        "megatron.core.ssm.gated_delta_net.gdn:causal_conv1d",
        "megatron.core.ssm.gated_delta_net.gdn:chunk_gated_delta_rule",
        # Chosen in the deterministic mode; ours is deterministic, and unlike Megatron's takes packed documents.
        "megatron.core.ssm.gated_delta_net.gdn:torch_chunk_gated_delta_rule",
    ),
    changes=(
        instead(True),
        instead(linear_attention.l2norm),
        instead(linear_attention.causal_conv1d),
        instead(linear_attention.chunk_gated_delta_rule),
        instead(linear_attention.chunk_gated_delta_rule),
    ),
)
ADAM = Patch(
    name="fused Adam",
    kind=LIBRARY,
    why="With torch's Adam, Megatron's choice without Transformer Engine and Apex, the distributed optimizer cannot "
    "resume: the step is in the state of every parameter, not in its group.",
    upstream=NOT_REPORTED,
    targets=(
        "megatron.core.optimizer:Adam",
        "megatron.core.optimizer:USING_PYTORCH_OPTIMIZER",
        "megatron.core.optimizer.distrib_optimizer:Adam",
        "megatron.core.optimizer.distrib_optimizer:HAVE_APEX_OR_TE",
        "megatron.core.optimizer.distrib_optimizer:USING_APEX_OPTIMIZER",
        "megatron.core.optimizer.distrib_optimizer:USING_TE_OPTIMIZER",
    ),
    changes=(
        instead(FusedAdam),
        instead(False),
        instead(FusedAdam),
        instead(True),
        instead(True),
        instead(False),
    ),
)
PATCHES = (DELTA_RULE, ADAM)


def fill_in() -> None:
    """On a GPU: Megatron stops without the one, and cannot resume without the other. Rank 0 says what is slow."""
    import megatron.core.optimizer as optimizer
    from megatron.core.ssm.gated_delta_net import common

    if optimizer.USING_PYTORCH_OPTIMIZER:
        ADAM.apply()
    if not common.HAVE_FLA:
        DELTA_RULE.apply()
        if os.environ.get("RANK", "0") == "0":
            slow = "Gated DeltaNet runs in PyTorch, many times slower"
            logger.warning(f"flash-linear-attention is not installed: {slow} (megatron-slim doctor)")
