"""Loss and perplexity against transformers' own model, from either format of checkpoint."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import megatron_slim.mcore

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from megatron_slim.architecture.rope import Yarn
from megatron_slim.architecture.shape import FULL_ATTENTION, LINEAR_ATTENTION, ModelShape
from megatron_slim.checkpoint.convert import hf_to_torch_dist, open_checkpoint
from megatron_slim.checkpoint.records import REFERENCE
from megatron_slim.data import Tokens
from megatron_slim.errors import CheckpointError, DataError
from megatron_slim.evaluation.means import SampleMeans
from megatron_slim.evaluation.perplexity import evaluate, evaluate_checkpoint
from megatron_slim.evaluation.samples import read_evaluation_data
from megatron_slim.testing import random_tensors, tiny_hf_config, tiny_shape, write_tiny_checkpoint
from tests.mtp_oracle import load_mtp, mtp_hidden

SHAPES = {
    "default": tiny_shape(vocab_size=131, max_position_embeddings=64),
    "without MTP": tiny_shape(mtp_num_layers=0),
    "odd": tiny_shape(
        num_layers=3,
        layer_types=(LINEAR_ATTENTION, FULL_ATTENTION, LINEAR_ATTENTION),
        num_query_groups=1,
        moe_router_topk=3,
        norm_topk_prob=False,
    ),
    "YaRN": tiny_shape(rotary_percent=0.5, rope_scaling=Yarn(4.0, 8, 1.3)),
}

SHOWN = {"loss": 4, "perplexity": 3}  # digits in the line of a command


def samples_for(shape: ModelShape, count: int = 5, length: int = 21) -> Tokens:
    return np.random.default_rng(0).integers(0, shape.vocab_size, (count, length))


def load(path: Path) -> Any:
    from transformers import Qwen3NextForCausalLM

    return Qwen3NextForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()


@torch.no_grad()
def reference(path: Path, shape: ModelShape, samples: Tokens) -> list[Tokens]:
    """Losses of every token from transformers' logits in fp64: of the main head, then of MTP, [samples, tokens]."""
    model, ids = load(path), torch.from_numpy(samples)
    hidden = model.model(ids).last_hidden_state

    def losses(states: torch.Tensor, ahead: int) -> Any:
        targets = ids[:, ahead:]
        logits = model.lm_head(states)[:, : targets.shape[1]].double()
        return F.cross_entropy(logits.mT, targets, reduction="none").numpy()

    main = losses(hidden, 1)
    assert main.mean() == pytest.approx(float(model(ids, labels=ids).loss), rel=1e-5)
    return [main, losses(mtp_hidden(load_mtp(model), hidden, ids), 2)] if shape.mtp_num_layers else [main]


def standard_error(losses: Tokens) -> float:
    """Of the mean of losses [samples, tokens]: samples are independent, tokens of one are not."""
    return statistics.stdev(losses.mean(axis=1).tolist()) / math.sqrt(len(losses))


@pytest.mark.parametrize("name", SHAPES)
def test_equals_transformers(tmp_path: Path, name: str) -> None:
    shape = SHAPES[name]
    path = write_tiny_checkpoint(tmp_path / "hf", shape, dtype=torch.float32)
    samples = samples_for(shape)
    main, *mtp = reference(path, shape, samples)
    for micro_batch_size in (1, 3):
        result = evaluate(open_checkpoint(path), samples, micro_batch_size=micro_batch_size, dtype=torch.float32)
        assert result.loss == pytest.approx(main.mean(), rel=1e-5)
        assert result.perplexity == pytest.approx(math.exp(main.mean()), rel=1e-4)
        # Seen: 1e-8 to 3e-8. A mean over 95 tokens of losses whose fp32 logits differ by a few ulps.
        assert list(result.mtp_loss) == pytest.approx([losses.mean() for losses in mtp], rel=1e-7)
        # Seen: up to 1e-6. An error is 50 to 100 times smaller than its loss, which has the same rounding.
        expected = {"loss": standard_error(main), "mtp_loss": tuple(map(standard_error, mtp))}
        assert result.stderr["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert result.stderr["mtp_loss"] == pytest.approx(expected["mtp_loss"], rel=1e-5)
        assert result.perplexity_stderr == pytest.approx(math.exp(main.mean()) * expected["loss"], rel=1e-4)
        assert result.tokens == 5 * 20


def test_one_sample_has_no_standard_error(tmp_path: Path, tool: Callable[..., Any]) -> None:
    shape = SHAPES["default"]
    path = write_tiny_checkpoint(tmp_path / "hf", shape, dtype=torch.float32)
    np.save(tmp_path / "x.npy", samples_for(shape, count=1))
    arguments = ("--load", path, "--data", tmp_path / "x.npy", "--teacher", path, "--json")
    outcome = tool("tools/evaluate.py", *arguments)
    assert outcome.code == 0 and "(one sample, so no standard errors)" in outcome.stderr and "+-" not in outcome.stderr
    errors = {key: value for key, value in outcome.json.items() if key.endswith("_stderr")}
    assert len(errors) == 9 and all(value in (None, [None]) for value in errors.values())


def test_errors_of_samples_that_stream_by() -> None:
    """In any batches, of losses near 12 that differ by 1e-6: a difference of sums of squares would have no digits."""
    losses = 12 + 1e-6 * np.random.default_rng(0).standard_normal((2, 40, 7))
    for size in (1, 7, 40):
        means = SampleMeans()
        for begin in range(0, 40, size):
            part = torch.from_numpy(losses[:, begin : begin + size])
            means.add(part.flatten(1), [part.shape[2]] * part.shape[1])
        for found, figure in zip(means.result(), losses, strict=True):
            assert found.value == pytest.approx(figure.mean(), rel=1e-14)
            # 12 has an ulp of 2e-15, a billionth of what the losses differ by.
            assert found.stderr == pytest.approx(standard_error(figure), rel=1e-7)


def test_both_formats_give_the_same_number(tmp_path: Path) -> None:
    shape = SHAPES["default"]
    path = write_tiny_checkpoint(tmp_path / "hf", shape)
    hf_to_torch_dist(path, tmp_path / "dist")
    hf, dist = open_checkpoint(path), open_checkpoint(tmp_path / "dist")
    for tensor in random_tensors(shape):
        assert torch.equal(hf.read(tensor), dist.read(tensor)), tensor
    rows = np.array([3, 1])
    name = "model.layers.0.linear_attn.in_proj_qkvz.weight"
    assert torch.equal(dist.read_rows(name, rows, rows), hf.read_rows(name, rows, rows))
    results = [evaluate(source, samples_for(shape), dtype=torch.float32) for source in (hf, dist)]
    assert results[0] == results[1]


def test_bf16_is_near_fp32(tmp_path: Path) -> None:
    shape = SHAPES["default"]
    path = write_tiny_checkpoint(tmp_path / "hf", shape)
    fp32, bf16 = (
        evaluate(open_checkpoint(path), samples_for(shape), dtype=dtype) for dtype in (torch.float32, torch.bfloat16)
    )
    assert bf16.loss == pytest.approx(fp32.loss, rel=5e-3)
    assert bf16.loss != fp32.loss


def test_broken_weights_are_named(tmp_path: Path) -> None:
    shape = SHAPES["without MTP"]
    tensors = random_tensors(shape, dtype=torch.float32)
    tensors["model.norm.weight"][3] = math.nan
    (tmp_path / "config.json").write_text(json.dumps(tiny_hf_config(shape)))
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="not finite"):
        evaluate(open_checkpoint(tmp_path, allow_nonfinite=True), samples_for(shape))


@pytest.mark.parametrize(
    ("length", "expected"), [(2, "leave nothing to predict"), (65, "max_position_embeddings is 64")]
)
def test_refuses_lengths(tmp_path: Path, length: int, expected: str) -> None:
    np.save(tmp_path / "x.npy", samples_for(SHAPES["default"], 2, length))
    with pytest.raises(DataError, match=expected):
        read_evaluation_data(tmp_path / "x.npy", SHAPES["default"], seq_length=None, num_samples=None)


def test_tool(tool: Callable[..., Any], tmp_path: Path) -> None:
    shape = SHAPES["default"]
    path = write_tiny_checkpoint(tmp_path / "hf", shape)
    np.save(tmp_path / "x.npy", samples_for(shape))
    arguments = ("--load", path, "--data", tmp_path / "x.npy", "--json", "--micro-batch-size", 2)
    outcome = tool("tools/evaluate.py", *arguments)
    assert outcome.code == 0, outcome.stderr
    result = outcome.json
    assert result == evaluate_checkpoint(open_checkpoint(path), path, tmp_path / "x.npy", micro_batch_size=2)
    assert result["tokens"] == 100 and len(result["mtp_loss"]) == 1
    assert result["perplexity"] == math.exp(result["loss"])
    loss, perplexity = (f"{key} {result[key]:.{n}f} +- {result[f'{key}_stderr']:.{n}f}" for key, n in SHOWN.items())
    assert f"{loss}, {perplexity}, mtp 1 {result['mtp_loss'][0]:.4f} +- " in outcome.stderr
    assert "written to" not in outcome.stderr and not (path / REFERENCE).exists()
    assert f"written to {path / REFERENCE}" in tool("tools/evaluate.py", *arguments, "--record").stderr
    np.save(tmp_path / "big.npy", samples_for(shape) + 100)
    assert "beyond the vocabulary" in tool("tools/evaluate.py", "--load", path, "--data", tmp_path / "big.npy").error
    assert "no such" in tool("tools/evaluate.py", "--load", tmp_path / "none", "--data", tmp_path / "x.npy").error
    assert "--micro-batch-size" in tool("tools/evaluate.py", *arguments[:4], "--micro-batch-size", 0).error
