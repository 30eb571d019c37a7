"""Calibration against fp64 statistics of the hidden states of transformers' own model."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import megatron_slim.mcore

import numpy as np
import pytest
import torch

from megatron_slim.architecture.shape import FAMILIES, ModelShape
from megatron_slim.checkpoint.convert import hf_to_torch_dist, open_checkpoint
from megatron_slim.checkpoint.huggingface import HFCheckpoint
from megatron_slim.errors import CheckpointError, DataError
from megatron_slim.pruning import statistics
from megatron_slim.pruning.calibrate import calibrate
from megatron_slim.streaming.fingerprint import fingerprint
from megatron_slim.testing import tiny_shape, write_tiny_checkpoint

SHAPES = {
    "hybrid": tiny_shape(num_layers=5),
    "grouped heads, gates not renormalised, no MTP": tiny_shape(
        layer_types=("full_attention", "linear_attention"),
        num_attention_heads=6,
        num_query_groups=2,
        linear_num_key_heads=1,
        linear_num_value_heads=3,
        num_moe_experts=6,
        moe_router_topk=3,
        hidden_size=48,
        norm_topk_prob=False,
        mtp_num_layers=0,
    ),
    "experts never routed": tiny_shape(num_layers=4, num_moe_experts=16, moe_router_topk=2),
    **{family: tiny_shape(family, num_moe_experts=6) for family in FAMILIES},
    "Qwen3-MoE": tiny_shape("qwen3_moe", num_layers=3, num_query_groups=1, num_moe_experts=6),
}


def calibrated(path: Path, shape: ModelShape, samples: np.ndarray, **kwargs: Any) -> tuple[HFCheckpoint, Any]:
    source = HFCheckpoint.open(write_tiny_checkpoint(path, shape, dtype=torch.float32))
    return source, calibrate(source, samples, **kwargs)


@pytest.mark.parametrize("name", SHAPES)
def test_statistics_equal_fp64_reference(
    name: str, tmp_path: Path, fp64_statistics: Callable[..., dict[str, np.ndarray]], assert_close: Callable[..., None]
) -> None:
    shape = SHAPES[name]
    size = (1, 5) if "never" in name else (5, 24)
    samples = np.random.default_rng(1).integers(0, shape.vocab_size, size)
    source, stats = calibrated(tmp_path / "hf", shape, samples, micro_batch_size=2)
    stats.check(shape, fingerprint(source))
    expected = fp64_statistics(source, samples)
    if "never" in name:
        assert all((expected[statistics.importance_key(b, "reap")] == 0).any() for b in shape.blocks)
    assert_close(stats.tensors, expected)


def test_batch_size_changes_nothing_but_rounding(tmp_path: Path) -> None:
    shape = tiny_shape()
    samples = np.random.default_rng(2).integers(0, shape.vocab_size, (5, 12))
    source, one = calibrated(tmp_path / "hf", shape, samples, micro_batch_size=1)
    again, many = calibrate(source, samples, micro_batch_size=1), calibrate(source, samples, micro_batch_size=4)
    assert one.sha256 == again.sha256, "same inputs, same bytes"
    for key, values in one.tensors.items():
        np.testing.assert_allclose(many.tensors[key], values, rtol=1e-5, atol=1e-6, err_msg=key)


def test_the_format_of_the_checkpoint_does_not_matter(tmp_path: Path) -> None:
    samples = np.arange(24).reshape(3, 8)
    source, stats = calibrated(tmp_path / "hf", tiny_shape(), samples)
    hf_to_torch_dist(source.path, tmp_path / "torch_dist")
    converted = open_checkpoint(tmp_path / "torch_dist")
    assert calibrate(converted, samples).sha256 == stats.sha256


def test_experts_that_no_token_visits_are_reported_by_block(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    shape = tiny_shape(num_moe_experts=16, mtp_num_layers=0)
    _, stats = calibrated(tmp_path / "hf", shape, np.zeros((1, 2), dtype=np.int64))
    (line,) = [line for line in caplog.messages if line.startswith("experts without a token")]
    for block in shape.blocks:
        count = int((stats.tensors[statistics.importance_key(block, "reap")] == 0).sum())
        assert count >= 12 and f"{count} of {block}" in line


def test_samples_longer_than_the_model_reads_are_refused(tmp_path: Path) -> None:
    shape = tiny_shape(max_position_embeddings=16)
    with pytest.raises(DataError, match=r"samples of 17 tokens, the model's max_position_embeddings is 16"):
        calibrated(tmp_path / "hf", shape, np.zeros((2, 17), dtype=np.int64))


@pytest.mark.parametrize("token", [-100, 128])
def test_ids_of_no_vocabulary_are_refused(tmp_path: Path, token: int) -> None:
    with pytest.raises(DataError, match=f"calibration data: token id {token} is "):
        calibrated(tmp_path / "hf", tiny_shape(), np.full((2, 8), token, dtype=np.int64))


def test_a_sample_of_one_token_is_refused_where_there_is_an_mtp_block(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="too short for the MTP block"):
        calibrated(tmp_path / "hf", tiny_shape(), np.zeros((2, 1), dtype=np.int64))


@pytest.mark.parametrize(
    ("broken", "named"),
    [
        ("model.layers.2.mlp.experts.0.down_proj.weight", "model.layers.2"),
        ("model.layers.1.input_layernorm.weight", "model.layers.1"),
        ("model.embed_tokens.weight", "model.embed_tokens"),
        ("model.norm.weight", "model.norm"),
        ("mtp.fc.weight", "mtp.fc"),
        ("mtp.layers.0.self_attn.o_proj.weight", "mtp.layers.0"),
    ],
)
def test_activations_that_are_not_finite_are_named(broken: str, named: str, tmp_path: Path) -> None:
    source = HFCheckpoint.open(write_tiny_checkpoint(tmp_path / "hf", tiny_shape(moe_router_topk=8)))
    read = source.read
    source.read = lambda name: read(name) * (float("nan") if name == broken else 1)  # type: ignore[method-assign]
    with pytest.raises(CheckpointError, match=f"output of {named} is not finite"):
        calibrate(source, np.arange(12).reshape(2, 6))
