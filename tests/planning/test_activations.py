"""Activation memory: against what autograd saves for real layers, byte for byte but for some vectors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import megatron_slim.mcore

import pytest
import torch
from torch import Tensor

from megatron_slim.architecture.family import MOE, MTP_SUBLAYERS
from megatron_slim.architecture.flops import FUSED, TORCH, Recompute
from megatron_slim.architecture.hidden_states import HiddenStatesModel
from megatron_slim.architecture.layer_specs import build_model, transformer_config
from megatron_slim.architecture.shape import FAMILIES, FULL_ATTENTION, LINEAR_ATTENTION
from megatron_slim.compat import runtime
from megatron_slim.planning.activations import Pass, block_bytes, stage_bytes, sublayer_bytes
from megatron_slim.testing import tiny_shape

LENGTH = 256
WIDTHS = {"hidden_size": 128, "vocab_size": 256, "moe_router_topk": 3, "moe_ffn_hidden_size": 80}


def saved(model: HiddenStatesModel, forward: Callable[[], Any]) -> int:
    """Bytes of all storages that a forward pass keeps for backward, weights left out."""
    weights = {each.untyped_storage().data_ptr() for each in (*model.parameters(), *model.buffers())}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if (place := tensor.untyped_storage().data_ptr()) not in weights:
            kept[place] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = forward()
    found = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    del output
    return found


def built(family: str, dtype: torch.dtype, **sizes: bool) -> tuple[Any, HiddenStatesModel]:
    runtime.init_single_process()
    torch.manual_seed(0)
    kinds = (LINEAR_ATTENTION if LINEAR_ATTENTION in FAMILIES[family].attention else FULL_ATTENTION, FULL_ATTENTION)
    shared = {"moe_shared_expert_intermediate_size": 112} if family == "qwen3_next" else {}
    shared |= {"moe_shared_expert_intermediate_size": 160, "ffn_hidden_size": 208} if family == "glm4_moe" else {}
    shape = tiny_shape(family, num_layers=2, layer_types=kinds, **WIDTHS, **shared, **sizes)
    narrow = dtype != torch.float32
    config = transformer_config(shape, params_dtype=dtype, bf16=narrow, pipeline_dtype=dtype)
    model = build_model(shape, config, model_class=HiddenStatesModel)
    assert isinstance(model, HiddenStatesModel)
    return shape, model.to(dtype)


# In fp32 some casts that are counted are none; attention's masks and rotations are then what is left of the error.
@pytest.mark.parametrize(
    ("family", "dtype", "samples", "within"),
    [
        ("qwen3_next", torch.bfloat16, 1, 0.005),
        ("qwen3_next", torch.bfloat16, 2, 0.005),
        ("qwen3_moe", torch.bfloat16, 2, 0.005),
        ("glm4_moe", torch.bfloat16, 2, 0.005),
        ("qwen3_next", torch.float32, 1, 0.04),
    ],
)
def test_formula_is_what_autograd_saves(family: str, dtype: torch.dtype, samples: int, within: float) -> None:
    shape, model = built(family, dtype)
    of = Pass(LENGTH, samples, width=dtype.itemsize, kernels=TORCH)
    rotary = model.rotary_pos_emb(LENGTH)
    for layer, kinds in enumerate(shape.sublayers):
        hidden = torch.randn(LENGTH, samples, shape.hidden_size, dtype=dtype, requires_grad=True)
        block = model.decoder.layers[layer]
        found = saved(model, lambda block=block, hidden=hidden: block(hidden, None, rotary_pos_emb=rotary))  # type: ignore[misc]
        assert block_bytes(shape, kinds, of) == pytest.approx(found, rel=within), kinds
    tokens = torch.randint(0, shape.vocab_size, (samples, LENGTH))
    positions = torch.arange(LENGTH).expand(samples, LENGTH)
    found = saved(model, lambda: model(tokens, positions, None))
    assert stage_bytes(shape, 0, 2, of, is_last=True) == pytest.approx(found, rel=within)


@pytest.mark.parametrize("qk_layernorm", [False, True])
def test_plain_queries_and_keys_keep_less(qk_layernorm: bool) -> None:
    shape, model = built("glm4_moe", torch.bfloat16, qk_layernorm=qk_layernorm)
    rotary, block = model.rotary_pos_emb(LENGTH), model.decoder.layers[0]
    hidden = torch.randn(LENGTH, 2, shape.hidden_size, dtype=torch.bfloat16, requires_grad=True)
    found = saved(model, lambda: block(hidden, None, rotary_pos_emb=rotary))
    expected = block_bytes(shape, shape.sublayers[0], Pass(LENGTH, 2, kernels=TORCH))
    assert expected == pytest.approx(found, rel=0.005)


def test_what_changes_it() -> None:
    """Sequence parallelism divides all of it; recomputation leaves a block's input, or all but the experts."""
    shape = tiny_shape(hidden_size=128)
    one, two = (Pass(LENGTH, tp=tp, kernels=FUSED) for tp in (1, 2))
    for kinds in shape.sublayers:
        whole = block_bytes(shape, kinds, one)
        assert block_bytes(shape, kinds, two) == pytest.approx(whole / 2)
        assert block_bytes(shape, kinds, one, Recompute("full", "uniform", 1)) == LENGTH * 2 * 128
        some = block_bytes(shape, kinds, one, Recompute("selective", modules=("moe",)))
        assert some == pytest.approx(whole - sublayer_bytes(shape, MOE, one))
    # Flash attention keeps no scores: twice the length is twice the memory.
    long = Pass(2 * LENGTH, kernels=FUSED)
    assert block_bytes(shape, MTP_SUBLAYERS, long) == pytest.approx(2 * block_bytes(shape, MTP_SUBLAYERS, one))
