"""The recorder's two ways to see experts: one module each, and one for all, as Transformer Engine groups them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import megatron_slim.mcore

import pytest
import torch
from torch import Tensor, nn

from megatron_slim.checkpoint.huggingface import HFCheckpoint
from megatron_slim.compat import runtime
from megatron_slim.pruning.recorder import BlockRecorder
from megatron_slim.streaming.block import block_config, build_block, rotary_embedding
from megatron_slim.testing import tiny_shape, write_tiny_checkpoint


class GroupedProjection(nn.Module):
    """The last projection of all experts, of pairs sorted by expert."""

    def __init__(self, experts: nn.ModuleList) -> None:
        super().__init__()
        self.weights = [expert.linear_fc2.weight for expert in experts]

    def forward(self, inner: Tensor, by_expert: list[int]) -> tuple[Tensor, None]:
        parts = zip(inner.split(by_expert), self.weights, strict=True)
        return torch.cat([part @ weight.T for part, weight in parts]), None


class GroupedExperts(nn.Module):
    """The interface of Megatron's `TEGroupedMLP`, in plain torch."""

    def __init__(self, experts: nn.ModuleList) -> None:
        super().__init__()
        self.linear_fc2 = GroupedProjection(experts)
        self.weights = [expert.linear_fc1.weight for expert in experts]

    def forward(self, hidden: Tensor, tokens_per_expert: Tensor, probs: Tensor) -> Any:
        by_expert = tokens_per_expert.tolist()
        pairs = zip(hidden.split(by_expert), self.weights, strict=True)
        gate, up = torch.cat([part @ weight.T for part, weight in pairs]).chunk(2, dim=-1)
        return self.linear_fc2(nn.functional.silu(gate) * up * probs[:, None], by_expert)


@pytest.mark.parametrize("masked", [False, True])
@torch.no_grad()
def test_grouped_experts_give_the_sums_of_separate_ones(masked: bool, tmp_path: Path) -> None:
    """And where some tokens do not count, they give those of the others alone."""
    shape = tiny_shape()
    source = HFCheckpoint.open(write_tiny_checkpoint(tmp_path / "hf", shape, dtype=torch.float32))
    runtime.init_single_process()
    block, hidden = "model.layers.3", torch.randn(6, 4, 64, generator=torch.Generator().manual_seed(0))
    counted = torch.tensor([True, False, True, True]).expand(6, -1) if masked else None

    def sums(*, grouped: bool, batch: Tensor, counted: Tensor | None) -> dict[str, Tensor]:
        layer = build_block(source, block, block_config(shape, torch.float32))
        if grouped:
            layer.mlp.experts = GroupedExperts(layer.mlp.experts.local_experts)
        recorder = BlockRecorder(block, shape, layer)
        recorder.count_only(counted)
        layer(batch, attention_mask=None, rotary_pos_emb=rotary_embedding(shape, 6))
        return recorder.sums

    expected = sums(grouped=False, batch=hidden[:, [0, 2, 3]] if masked else hidden, counted=None)
    for grouped in (False, True):
        found = sums(grouped=grouped, batch=hidden, counted=counted)
        assert found.keys() == expected.keys()
        for name, values in expected.items():
            # fp32 products of other sizes round differently: relative to the largest of each.
            atol = 1e-6 * float(values.abs().max())
            torch.testing.assert_close(found[name], values, rtol=1e-5, atol=atol, msg=lambda m, n=name: f"{n}: {m}")
