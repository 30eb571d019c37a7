"""A Qwen3-MoE as transformers writes it, through conversion and evaluation, and back to transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from megatron_slim.architecture.table import count_parameters
from megatron_slim.checkpoint.convert import hf_to_torch_dist, same_bytes, torch_dist_to_hf
from megatron_slim.checkpoint.huggingface import HFCheckpoint
from megatron_slim.testing import tiny_hf_config, tiny_shape

SHAPE = tiny_shape("qwen3_moe", num_layers=2, num_query_groups=1, norm_topk_prob=False)


@pytest.fixture(scope="module")
def model() -> Qwen3MoeForCausalLM:
    torch.manual_seed(0)
    found = Qwen3MoeForCausalLM(Qwen3MoeConfig(**tiny_hf_config(SHAPE), attn_implementation="eager"))
    for name, parameter in found.named_parameters():
        # transformers starts norms at exactly 1, which would hide a wrong one.
        torch.nn.init.normal_(parameter, 1.0 if "norm" in name else 0.0, 0.1)
    return found.eval()


@pytest.fixture(scope="module")
def converted(model: Qwen3MoeForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where transformers' own directory ``hf`` is, its torch_dist, and what came ``back``."""
    root = tmp_path_factory.mktemp("qwen3-moe")
    model.save_pretrained(root / "hf", max_shard_size="200KB")
    hf_to_torch_dist(root / "hf", root / "torch_dist")
    torch_dist_to_hf(root / "torch_dist", root / "back")
    return root


def test_what_transformers_writes_comes_back_byte_by_byte(model: Qwen3MoeForCausalLM, converted: Path) -> None:
    source, back = HFCheckpoint.open(converted / "hf"), HFCheckpoint.open(converted / "back")
    assert source.shape == back.shape == SHAPE
    assert all(same_bytes(source.read(name), back.read(name)) for name in source.names)
    assert count_parameters(SHAPE).total == model.num_parameters()


def test_transformers_reads_what_came_back(model: Qwen3MoeForCausalLM, converted: Path) -> None:
    again, info = AutoModelForCausalLM.from_pretrained(
        converted / "back", output_loading_info=True, attn_implementation="eager"
    )
    assert isinstance(again, Qwen3MoeForCausalLM)
    assert not any(info.values()), info
    ids = torch.arange(24).reshape(2, 12)
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)


def test_evaluation_of_either_format(
    model: Qwen3MoeForCausalLM, converted: Path, tool: Callable[..., Any], tmp_path: Path
) -> None:
    samples = np.random.default_rng(3).integers(0, SHAPE.vocab_size, (3, 20))
    np.save(tmp_path / "tokens.npy", samples)
    ids = torch.from_numpy(samples)
    with torch.no_grad():
        expected = float(model(ids, labels=ids).loss)
    for name in ("hf", "torch_dist"):
        run = tool("tools/evaluate.py", "--load", converted / name, "--data", tmp_path / "tokens.npy", "--json")
        assert run.code == 0, run.stderr
        assert run.json["loss"] == pytest.approx(expected, rel=1e-6) and run.json["mtp_loss"] == []
