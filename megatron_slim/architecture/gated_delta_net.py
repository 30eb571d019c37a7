"""Gated DeltaNet on machines without flash-linear-attention: Megatron's module with kernels in plain PyTorch."""

from __future__ import annotations

import copy
from typing import Any

from megatron.core.ssm.gated_delta_net import GatedDeltaNet
from megatron.core.transformer.transformer_config import TransformerConfig


class TorchGatedDeltaNet(GatedDeltaNet):
    """Megatron's Gated DeltaNet on its deterministic path, which needs no Triton."""

    def __init__(self, config: TransformerConfig, *args: Any, **kwargs: Any) -> None:
        config = copy.copy(config)
        config.deterministic_mode = True
        super().__init__(config, *args, **kwargs)
