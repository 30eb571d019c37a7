"""Weights in fp32 among others of 16 bits: which stay so in a model of 16 bits, and what they compute there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Qwen3NextForCausalLM

from megatron_slim.checkpoint.convert import hf_to_torch_dist, open_checkpoint, same_bytes
from megatron_slim.checkpoint.huggingface import HFCheckpoint
from megatron_slim.checkpoint.loading import load_hf_weights
from megatron_slim.checkpoint.precision import float32_weights, keep_types
from megatron_slim.checkpoint.remarks import remarks
from megatron_slim.compat import runtime
from megatron_slim.testing import tiny_shape, write_tiny_checkpoint

GDN, NORM, ROUTER = ("A_log", "dt_bias", "linear_attn.norm.weight"), "model.norm.weight", "mlp.gate.weight"
SHAPE = tiny_shape(num_layers=2, layer_types=("linear_attention", "full_attention"))
BLOCK = "model.layers.0"


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In bf16, but for Gated DeltaNet's scalars and norm."""
    return write_tiny_checkpoint(tmp_path_factory.mktemp("mixed"), SHAPE, seed=5, float32=GDN)


def test_what_stays_and_what_is_rounded(tmp_path: Path) -> None:
    """By what the checkpoint has, not by name: the second layer's norm is in fp32, the first one's is not."""
    kept = ("layers.0.linear_attn.A_log", "layers.1.linear_attn.norm.weight")
    shape = tiny_shape(num_layers=3, layer_types=("linear_attention",) * 2 + ("full_attention",), mtp_num_layers=0)
    write_tiny_checkpoint(tmp_path / "hf", shape, float32=(*kept, NORM, "layers.2." + ROUTER))
    hf_to_torch_dist(tmp_path / "hf", tmp_path / "torch_dist")
    for form in ("hf", "torch_dist"):
        checkpoint = open_checkpoint(tmp_path / form)
        for dtype in (torch.bfloat16, torch.float16):
            stay = [weight.key for weight in float32_weights(checkpoint, dtype)]
            layers = "decoder.layers"
            assert stay == [f"{layers}.0.self_attention.A_log", f"{layers}.1.self_attention.out_norm.weight"]
        (sentence,) = remarks(checkpoint, torch.bfloat16, "student")
        assert sentence.startswith("student: rounds to bfloat16 2 of ")
        assert f" from float32 (model.layers.2.{ROUTER}, {NORM}), of {checkpoint.path}" in sentence
        (sentence,) = remarks(checkpoint, torch.float16, "student")
        assert "tensors from bfloat16 (" in sentence and " and 2 of " in sentence
        assert not float32_weights(checkpoint, torch.float32) and not [*remarks(checkpoint, torch.float32, "x")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_checkpoint_of_one_type_says_nothing_of_single_weights(tmp_path: Path, dtype: torch.dtype) -> None:
    checkpoint = HFCheckpoint.open(write_tiny_checkpoint(tmp_path, SHAPE, dtype=dtype))
    assert not float32_weights(checkpoint, torch.bfloat16) and not [*remarks(checkpoint, dtype, "x")]
    total, name = len(checkpoint.names), str(dtype).removeprefix("torch.")
    sentence = f"teacher: rounds to bfloat16 {total} of {total} tensors from {name}, of {tmp_path}"
    assert [*remarks(checkpoint, torch.bfloat16, "teacher")] == [sentence]


@pytest.mark.parametrize("cast", ["bfloat16", "half"])
def test_a_cast_model_has_the_bits_of_the_source(mixed: Path, cast: str) -> None:
    """`Float16Module` casts the model, before weights come through Megatron, or after they came through us."""
    runtime.init_single_process()
    from megatron.core.transformer.module import Float16Module

    from megatron_slim.architecture.hidden_states import HiddenStatesModel
    from megatron_slim.architecture.layer_specs import build_model, transformer_config

    dtype = torch.bfloat16 if cast == "bfloat16" else torch.float16
    config = transformer_config(SHAPE, params_dtype=dtype, bf16=cast == "bfloat16", fp16=cast == "half")
    model: Any = build_model(SHAPE, config, model_class=HiddenStatesModel)
    checkpoint = HFCheckpoint.open(mixed)
    keep_types([model], checkpoint)
    load_hf_weights(model, checkpoint)
    wrapped = Float16Module(config, model)
    state = {name.removeprefix("module."): parameter for name, parameter in wrapped.named_parameters()}
    found = {name for name, parameter in state.items() if parameter.dtype == torch.float32}
    block = "decoder.layers.0.self_attention"
    assert found == {f"{block}.{name}" for name in ("A_log", "dt_bias", "out_norm.weight")}
    assert {parameter.dtype for parameter in state.values()} == {torch.float32, dtype}
    for own, name in (("A_log", "A_log"), ("dt_bias", "dt_bias"), ("out_norm.weight", "norm.weight")):
        source = checkpoint.read(f"{BLOCK}.linear_attn.{name}")
        assert same_bytes(state[f"{block}.{own}"].data, source), name
        assert not torch.equal(source.to(dtype).float(), source), name


def transformers_block(directory: Path, dtype: torch.dtype) -> Any:
    """transformers' Gated DeltaNet, which it loads in one type, with what the checkpoint has in fp32 in fp32."""
    attention: Any = Qwen3NextForCausalLM.from_pretrained(directory, dtype=dtype).model.layers[0].linear_attn
    checkpoint = HFCheckpoint.open(directory)
    for name in ("A_log", "dt_bias", "norm.weight"):
        attention.get_parameter(name).data = checkpoint.read(f"{BLOCK}.linear_attn.{name}")
    return attention


@torch.no_grad()
def test_a_block_in_bf16_computes_what_transformers_does(mixed: Path) -> None:
    """What calibration and evaluation run. Both are compared with fp32, of which bf16 rounds every product."""
    runtime.init_single_process()
    from megatron_slim.streaming.block import block_config, build_block

    layer = build_block(HFCheckpoint.open(mixed), BLOCK, block_config(SHAPE, torch.bfloat16))
    ours: Any = layer.self_attention
    hidden = torch.randn(2, 50, SHAPE.hidden_size, generator=torch.Generator().manual_seed(0)).bfloat16()
    norm = open_checkpoint(mixed).read(f"{BLOCK}.input_layernorm.weight")

    def normed(x: Tensor) -> Tensor:
        wide = x.float()
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6) * (1 + norm.float())).to(x.dtype)

    expected = transformers_block(mixed, torch.float32)(normed(hidden.float()))
    theirs = transformers_block(mixed, torch.bfloat16)(normed(hidden))
    found = ours(hidden.transpose(0, 1).contiguous(), None)[0].transpose(0, 1)
    error, own = ((each.float() - expected).norm() / expected.norm() for each in (theirs, found))
    assert 1e-3 < error < 2e-2 and own < 1.5 * error  # seen: 1.2

    # The decay alone, of which transformers computes every factor in fp32: the same bits.
    alpha = torch.randn(2, 50, 4, generator=torch.Generator().manual_seed(1)).bfloat16()
    decay, _ = ours._compute_g_and_beta(ours.A_log, ours.dt_bias, alpha, alpha)
    theirs = transformers_block(mixed, torch.bfloat16)
    assert torch.equal(decay, -theirs.A_log.float().exp() * F.softplus(alpha.float() + theirs.dt_bias))
