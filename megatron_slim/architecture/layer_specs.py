"""A model as a Megatron-Core `GPTModel`: its config, its module specs and the model.

One set of specs serves both backends: Transformer Engine on a GPU, Megatron's own layers with the modules of
`local_modules` elsewhere. Their parameters have the same names, those of the architecture table.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import megatron_slim.mcore

import torch
import torch.nn.functional as F
from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.backends import BackendSpecProvider, get_backend
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_mtp_block_spec_for_backend
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec_for_backend
from megatron.core.ssm.gated_delta_net import GatedDeltaNet, GatedDeltaNetSubmodules
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType, LayerType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)
from torch import nn

from megatron_slim.aliases import Keywords
from megatron_slim.architecture.family import DENSE, FULL_ATTENTION, LINEAR_ATTENTION, MOE, MTP_SUBLAYERS
from megatron_slim.architecture.kinds import SUBLAYERS
from megatron_slim.architecture.local_modules import LocalBackend
from megatron_slim.architecture.rotary import scale_attention, scale_rotary_frequencies
from megatron_slim.architecture.shape import ModelShape
from megatron_slim.errors import ShapeError


def shape_config_fields(shape: ModelShape) -> Keywords:
    """The fields of Megatron's `TransformerConfig` that follow from a model's shape alone.

    Raises:
        ShapeError: top-1 routing with ``norm_topk_prob``, whose gate is constant and which Megatron refuses.
    """
    if shape.norm_topk_prob and shape.moe_router_topk == 1:
        raise ShapeError(["moe_router_topk 1 with norm_topk_prob leaves the router without a gradient"])
    return {
        "num_layers": shape.num_layers,
        "hidden_size": shape.hidden_size,
        "normalization": "RMSNorm",
        "layernorm_epsilon": shape.layernorm_epsilon,
        "layernorm_zero_centered_gamma": shape.family.zero_centered_norms,
        "add_bias_linear": False,
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        **{name: value for kind in SUBLAYERS.values() for name, value in kind.config(shape).items()},
        "mtp_num_layers": shape.mtp_num_layers or None,
        # A checkpoint names every layer's weights apart, which Megatron by itself does only where layers differ.
        "hetereogenous_dist_checkpoint": True,
    }


def transformer_config(shape: ModelShape, **overrides: object) -> TransformerConfig:
    """Megatron's configuration of a model of this shape, with ``overrides`` (parallel sizes, dtypes) applied.

    Load balancing is over the global batch, as in Qwen3, and the router computes in fp32.
    """
    engine = HAVE_TE and torch.cuda.is_available()
    fields: Keywords = {
        "transformer_impl": "transformer_engine" if engine else "local",
        "moe_grouped_gemm": engine,
        "moe_token_dispatcher_type": "alltoall",
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "global_aux_loss",
    }
    return TransformerConfig(**(fields | shape_config_fields(shape) | overrides))


def backend_for(config: TransformerConfig) -> BackendSpecProvider:
    """The modules that ``config.transformer_impl`` stands for."""
    return LocalBackend() if config.transformer_impl == "local" else get_backend(config.transformer_impl)


class _PlainNorm:
    """Builds the backend's norm with the weight applied as it is, not as 1 + weight.

    The gated norm of Gated DeltaNet is the one norm that Hugging Face does not centre on zero; built like that
    here too, its weight converts as a copy.
    """

    backend: BackendSpecProvider

    def __new__(cls, config: TransformerConfig, hidden_size: int, eps: float) -> nn.Module:  # type: ignore[misc]
        config = copy.copy(config)
        config.layernorm_zero_centered_gamma = False
        norm: nn.Module = cls.backend.layer_norm(rms_norm=True)(config=config, hidden_size=hidden_size, eps=eps)
        return norm


def _full_attention(backend: BackendSpecProvider, config: TransformerConfig) -> ModuleSpec:
    norm = backend.layer_norm(rms_norm=True, for_qk=True) if config.qk_layernorm else None
    return ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=backend.column_parallel_layer_norm_linear(),
            core_attention=backend.core_attention(),
            linear_proj=backend.row_parallel_linear(),
            q_layernorm=norm,
            k_layernorm=norm,
        ),
    )


def _linear_attention(backend: BackendSpecProvider, config: TransformerConfig) -> ModuleSpec:
    return ModuleSpec(
        module=GatedDeltaNet,
        submodules=GatedDeltaNetSubmodules(
            in_proj=backend.column_parallel_layer_norm_linear(),
            out_norm=type("PlainNorm", (_PlainNorm,), {"backend": backend}),
            out_proj=backend.row_parallel_linear(),
        ),
    )


def _moe(backend: BackendSpecProvider, config: TransformerConfig, experts: int) -> Callable[..., nn.Module]:
    """An MoE layer of so many experts, which may be another number than that of the model's config."""
    build: Callable[..., nn.Module] = get_moe_module_spec_for_backend(
        backend, num_experts=experts, moe_grouped_gemm=config.moe_grouped_gemm
    )

    def build_own(config: TransformerConfig, **kwargs: object) -> nn.Module:
        own = copy.copy(config)
        own.num_moe_experts = experts
        return build(config=own, **kwargs)

    return build if experts == config.num_moe_experts else build_own


def _dense(backend: BackendSpecProvider, config: TransformerConfig, experts: int) -> Callable[..., MLP]:
    # Its norm stays a module of its own, as before experts.
    linear = {"linear_fc1": backend.column_parallel_linear(), "linear_fc2": backend.row_parallel_linear()}
    return partial(MLP.as_mlp_submodule, submodules=MLPSubmodules(**linear))


_ATTENTION = {FULL_ATTENTION: _full_attention, LINEAR_ATTENTION: _linear_attention}
_FEED_FORWARD = {MOE: _moe, DENSE: _dense}


def layer_spec(kinds: tuple[str, str], config: TransformerConfig, experts: int | None = None) -> ModuleSpec:
    """Spec of one transformer layer.

    Args:
        kinds: of its attention and its feed-forward network.
        config: the model's.
        experts: routed experts of the layer; None: as the config says.
    """
    backend = backend_for(config)
    attention = _ATTENTION[kinds[0]](backend, config)
    feed_forward = _FEED_FORWARD[kinds[1]](backend, config, config.num_moe_experts if experts is None else experts)
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            self_attention=attention,
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=backend.layer_norm(rms_norm=True),
            mlp=feed_forward,
            mlp_bda=get_bias_dropout_add,
        ),
    )


def local_layers(config: TransformerConfig, vp_stage: int | None = None) -> range | list[int]:
    """Indices, from 0 and over the whole model, of the decoder layers on this pipeline stage."""
    if config.pipeline_model_parallel_layout is not None:
        layers: list[int] = config.pipeline_model_parallel_layout.get_layer_id_list(
            layer_type=LayerType.decoder, vp_stage=vp_stage
        )
        return layers
    offset = get_transformer_layer_offset(config, vp_stage=vp_stage)
    return range(offset, offset + get_num_layers_to_build(config, vp_stage=vp_stage))


def build_model(
    shape: ModelShape,
    config: TransformerConfig,
    *,
    pre_process: bool = True,
    post_process: bool = True,
    vp_stage: int | None = None,
    padded_vocab_size: int | None = None,
    max_sequence_length: int | None = None,
    model_class: type[GPTModel] = GPTModel,
    **kwargs: object,
) -> GPTModel:
    """Build the part of a model that belongs to this rank and virtual pipeline stage.

    Args:
        shape: sizes of the whole model.
        config: from `transformer_config`, or Megatron's own with the fields of `shape_config_fields`.
        pre_process: this stage holds the embedding.
        post_process: this stage holds the output layer.
        vp_stage: virtual pipeline stage, None without interleaving.
        padded_vocab_size: rows of embedding and output layer; default, the vocabulary padded to a multiple of TP.
        max_sequence_length: longest sequence; default, the shape's ``max_position_embeddings``.
        model_class: `GPTModel` or a subclass.
        kwargs: passed to ``model_class``.
    """
    own = [(shape.sublayers_of(block), shape.in_block(block).num_moe_experts) for block in shape.blocks]
    specs = {each: layer_spec(each[0], config, each[1]) for each in set(own)}
    backend = backend_for(config)
    block = TransformerBlockSubmodules(
        layer_specs=[specs[own[layer]] for layer in local_layers(config, vp_stage)],
        layer_norm=backend.layer_norm(rms_norm=True),
    )
    mtp_block = None
    if shape.mtp_num_layers:
        mtp_block = get_gpt_mtp_block_spec_for_backend(
            config, layer_spec(MTP_SUBLAYERS, config), backend, vp_stage=vp_stage
        )
    if padded_vocab_size is None:
        ranks = config.tensor_model_parallel_size
        padded_vocab_size = -(-shape.vocab_size // ranks) * ranks
    model = model_class(
        config=config,
        transformer_layer_spec=block,
        vocab_size=padded_vocab_size,
        max_sequence_length=max_sequence_length or shape.max_position_embeddings,
        pre_process=pre_process,
        post_process=post_process,
        share_embeddings_and_output_weights=False,
        position_embedding_type="rope",
        rotary_percent=shape.rotary_percent,
        rotary_base=shape.rotary_base,
        mtp_block_spec=mtp_block,
        vp_stage=vp_stage,
        **kwargs,
    )
    scale_attention(model, shape)
    scale_rotary_frequencies(model.rotary_pos_emb, shape)
    return model
