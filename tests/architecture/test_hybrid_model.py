"""docs/megatron.md is true: Megatron's HybridModel computes what our GPTModel does, under other names."""

from __future__ import annotations

import re
from typing import Any

import megatron_slim.mcore

import pytest
import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec_for_backend
from megatron.core.models.hybrid import hybrid_block
from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.transformer.multi_token_prediction import (
    MultiTokenPredictionBlock,
    MultiTokenPredictionBlockSubmodules,
    MultiTokenPredictionLayer,
    MultiTokenPredictionLayerSubmodules,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import (
    MoETransformerLayer,
    TransformerLayer,
    TransformerLayerSubmodules,
)

from megatron_slim.architecture import layer_specs
from megatron_slim.architecture.local_modules import LocalBackend
from megatron_slim.architecture.shape import FULL_ATTENTION, ModelShape
from megatron_slim.compat import runtime
from megatron_slim.testing import tiny_shape

BACKEND = LocalBackend()
SYMBOLS = {FULL_ATTENTION: "*"}  # of Megatron's patterns; Gated DeltaNet is G, a mixture of experts E


def _attention(kind: str, config: Any) -> ModuleSpec:
    submodules = TransformerLayerSubmodules(
        self_attention=layer_specs._ATTENTION[kind](BACKEND, config), self_attn_bda=get_bias_dropout_add
    )
    return ModuleSpec(module=TransformerLayer, submodules=submodules)


def _stack(config: Any) -> ModuleSpec:
    norm = BACKEND.layer_norm(rms_norm=True)
    experts = get_moe_module_spec_for_backend(BACKEND, num_experts=config.num_moe_experts, moe_grouped_gemm=False)
    submodules = TransformerLayerSubmodules(pre_mlp_layernorm=norm, mlp=experts, mlp_bda=get_bias_dropout_add)
    joined = MultiTokenPredictionLayerSubmodules(
        enorm=norm, hnorm=norm, eh_proj=BACKEND.column_parallel_linear(), mtp_model_layer=None, layer_norm=norm
    )
    depth = ModuleSpec(module=MultiTokenPredictionLayer, submodules=joined)
    return ModuleSpec(
        module=HybridStack,
        submodules=HybridStackSubmodules(
            gdn_layer=_attention("linear_attention", config),
            attention_layer=_attention(FULL_ATTENTION, config),
            moe_layer=ModuleSpec(module=MoETransformerLayer, submodules=submodules),
            mtp_block_spec=ModuleSpec(
                module=MultiTokenPredictionBlock, submodules=MultiTokenPredictionBlockSubmodules(layer_specs=[depth])
            ),
        ),
    )


def _hybrid(shape: ModelShape) -> HybridModel:
    trunk = "".join(f"{SYMBOLS.get(kind, 'G')}E" for kind in shape.layer_types)
    config = layer_specs.transformer_config(
        shape,
        num_layers=2 * shape.num_layers,
        linear_attention_freq=[int(symbol == "G") for symbol in trunk],
        moe_aux_loss_coeff=0.0,
    )
    return HybridModel(
        config=config,
        hybrid_stack_spec=_stack(config),
        vocab_size=shape.vocab_size,
        max_sequence_length=shape.max_position_embeddings,
        hybrid_layer_pattern=trunk + "/*E" * shape.mtp_num_layers,
        position_embedding_type="rope",
        rotary_percent=shape.rotary_percent,
        rotary_base=int(shape.rotary_base),
    )


def renamed(name: str) -> str:
    """HybridModel's name of a parameter of ours: a block is two layers there, attention and experts."""
    if found := re.match(r"decoder\.layers\.(\d+)\.(.*)", name):
        half = 0 if found[2].startswith("self_attention") else 1
        return f"decoder.layers.{2 * int(found[1]) + half}.{found[2]}"
    if found := re.match(r"(mtp\.layers\.\d+)\.(?:mtp_model_layer|transformer_layer)\.(.*)", name):
        half = 0 if found[2].startswith("self_attention") else 1
        return f"{found[1]}.mtp_model_layer.layers.{half}.{found[2]}"
    return name.replace("decoder.final_layernorm", "decoder.final_norm")


def _keys(model: Any) -> set[str]:
    state = model.sharded_state_dict()
    return {value.key for value in nested_values(state) if isinstance(value, ShardedTensor)}


@pytest.mark.parametrize("mtp", [0, 1])
def test_it_computes_the_same_under_other_names(mtp: int, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime.init_single_process()
    # Its stack makes its final norm of Transformer Engine's class, whatever the specs say.
    monkeypatch.setattr(hybrid_block, "TENorm", BACKEND.layer_norm(rms_norm=True))
    shape = tiny_shape(mtp_num_layers=mtp)
    ours = layer_specs.build_model(shape, layer_specs.transformer_config(shape, moe_aux_loss_coeff=0.0))
    theirs = _hybrid(shape)
    parameters, found = dict(ours.named_parameters()), dict(theirs.named_parameters())
    assert {renamed(name) for name in parameters} == found.keys()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.normal_(0, 0.05, generator=generator)
            found[renamed(name)].copy_(parameter)
    tokens = torch.randint(0, shape.vocab_size, (2, 24), generator=generator)
    labels = torch.randint(0, shape.vocab_size, (2, 24), generator=generator)
    positions = torch.arange(24).expand(2, -1)
    more = {"loss_mask": torch.ones(2, 24)} if mtp else {}
    losses = [model(tokens, positions, None, labels=labels, **more) for model in (ours, theirs)]
    assert torch.equal(*losses)
    for loss in losses:
        loss.sum().backward()
    for name, parameter in parameters.items():
        other = found[renamed(name)]
        gradients = [getattr(each, "main_grad", None) for each in (parameter, other)]
        gradients = [each.grad if own is None else own for each, own in zip((parameter, other), gradients, strict=True)]
        assert torch.equal(*gradients), name
    # A checkpoint's keys go the same way.
    assert {renamed(key) for key in _keys(ours)} == _keys(theirs)
