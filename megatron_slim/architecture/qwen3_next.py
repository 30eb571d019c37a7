"""The architecture table: every tensor of Qwen3-Next, once, with both its names, its axes and its layout.

Conversion, pruning, parameter counts and memory plans all read this table. A row is one Megatron parameter and the
Hugging Face tensors that it is made of; labels in the dimension trees say which rows of the one are which rows of the
other (see `axes`). Names are templates: ``{layer}`` and ``{expert}`` are filled in by `weights`.

Megatron names are those of a torch_dist checkpoint, where experts are stacked on a leading ``expert`` dimension and a
parameter marked ``split`` is stored as one tensor per label (``in_proj.weight.query``, ...), because its rows are
grouped by label inside every tensor-parallel rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_slim.architecture.axes import Dim, Product, concat, label, product, size
from megatron_slim.architecture.shape import FULL_ATTENTION, ModelShape


@dataclass(frozen=True)
class HFTensor:
    """A tensor of the Hugging Face checkpoint: its name and its dimensions."""

    name: str
    dims: tuple[Dim, ...]

    def shape(self, model: ModelShape) -> tuple[int, ...]:
        """Its shape in a model of these sizes."""
        return tuple(size(dim, model.sizes) for dim in self.dims)


@dataclass(frozen=True)
class Weight:
    """One Megatron parameter and the Hugging Face tensors that it holds.

    Attributes:
        key: name in a torch_dist checkpoint, without the label suffix of a ``split`` parameter.
        dims: dimensions of the parameter at tensor parallel size 1; for experts, of one expert.
        sources: the Hugging Face tensors; for experts, names with ``{expert}`` left open.
        tp_dim: the dimension that tensor parallelism shards, None when every rank holds all of it.
        split: stored in a torch_dist checkpoint as one tensor per label.
        stacked: one per expert, stacked on a leading ``expert`` dimension.
        block: Hugging Face prefix of the transformer block it belongs to, "" outside the blocks.
    """

    key: str
    dims: tuple[Dim, ...]
    sources: tuple[HFTensor, ...]
    tp_dim: int | None = None
    split: bool = False
    stacked: bool = False
    block: str = ""

    def shape(self, model: ModelShape) -> tuple[int, ...]:
        """Shape of the whole parameter, experts included."""
        shape = tuple(size(dim, model.sizes) for dim in self.dims)
        return (model.num_moe_experts, *shape) if self.stacked else shape

    def numel(self, model: ModelShape) -> int:
        """Number of elements, experts included."""
        total = 1
        for extent in self.shape(model):
            total *= extent
        return total

    def hf_tensors(self, model: ModelShape) -> Iterator[tuple[HFTensor, int | None]]:
        """Its Hugging Face tensors with their names complete, and the expert that each belongs to."""
        for expert in range(model.num_moe_experts) if self.stacked else [None]:
            for source in self.sources:
                name = source.name if expert is None else source.name.format(expert=expert)
                yield HFTensor(name, source.dims), expert


_QUERY_HEADS = product("kv_group", "query_per_group", "head_dim")
_KEY_HEADS = product("gdn_key_head", "gdn_key_dim")
_VALUE_HEADS = product("gdn_key_head", "gdn_value_per_key", "gdn_value_dim")
_HEAD_SCALARS = product("gdn_key_head", "gdn_value_per_key")
_GDN_QKV = (label("query", _KEY_HEADS), label("key", _KEY_HEADS), label("value", _VALUE_HEADS))


def _copy(key: str, hf: str, *dims: Dim, tp_dim: int | None = None) -> Weight:
    return Weight(key, dims, (HFTensor(hf, dims),), tp_dim)


def _gated(key: str, hf: str, ffn: str, *, stacked: bool = False) -> tuple[Weight, Weight]:
    """A SwiGLU MLP: Megatron's fc1 is [gate; up]."""
    gate, up = label("gate", ffn), label("up", ffn)
    return (
        Weight(
            f"{key}.linear_fc1.weight",
            (concat(gate, up), "hidden"),
            (HFTensor(f"{hf}.gate_proj.weight", (gate, "hidden")), HFTensor(f"{hf}.up_proj.weight", (up, "hidden"))),
            tp_dim=0,
            stacked=stacked,
        ),
        Weight(
            f"{key}.linear_fc2.weight",
            ("hidden", ffn),
            (HFTensor(f"{hf}.down_proj.weight", ("hidden", ffn)),),
            tp_dim=1,
            stacked=stacked,
        ),
    )


FULL_ATTENTION_ROWS = (
    _copy("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight", "hidden"),
    Weight(
        "self_attention.linear_qkv.weight",
        (
            product(
                "kv_group",
                concat(
                    product("query_per_group", label("query", "head_dim")),
                    product("query_per_group", label("gate", "head_dim")),
                    label("key", "head_dim"),
                    label("value", "head_dim"),
                ),
            ),
            "hidden",
        ),
        (
            HFTensor(
                "self_attn.q_proj.weight",
                (
                    product(
                        "kv_group", "query_per_group", concat(label("query", "head_dim"), label("gate", "head_dim"))
                    ),
                    "hidden",
                ),
            ),
            HFTensor("self_attn.k_proj.weight", (product("kv_group", label("key", "head_dim")), "hidden")),
            HFTensor("self_attn.v_proj.weight", (product("kv_group", label("value", "head_dim")), "hidden")),
        ),
        tp_dim=0,
    ),
    _copy("self_attention.linear_proj.weight", "self_attn.o_proj.weight", "hidden", _QUERY_HEADS, tp_dim=1),
    _copy("self_attention.q_layernorm.weight", "self_attn.q_norm.weight", "head_dim"),
    _copy("self_attention.k_layernorm.weight", "self_attn.k_norm.weight", "head_dim"),
)

LINEAR_ATTENTION_ROWS = (
    _copy("self_attention.in_proj.layer_norm_weight", "input_layernorm.weight", "hidden"),
    Weight(
        "self_attention.in_proj.weight",
        (
            concat(*_GDN_QKV, label("z", _VALUE_HEADS), label("beta", _HEAD_SCALARS), label("alpha", _HEAD_SCALARS)),
            "hidden",
        ),
        (
            HFTensor(
                "linear_attn.in_proj_qkvz.weight",
                (
                    product(
                        "gdn_key_head",
                        concat(
                            label("query", "gdn_key_dim"),
                            label("key", "gdn_key_dim"),
                            label("value", "gdn_value_per_key", "gdn_value_dim"),
                            label("z", "gdn_value_per_key", "gdn_value_dim"),
                        ),
                    ),
                    "hidden",
                ),
            ),
            HFTensor(
                "linear_attn.in_proj_ba.weight",
                (
                    product(
                        "gdn_key_head",
                        concat(label("beta", "gdn_value_per_key"), label("alpha", "gdn_value_per_key")),
                    ),
                    "hidden",
                ),
            ),
        ),
        tp_dim=0,
        split=True,
    ),
    Weight(
        "self_attention.conv1d.weight",
        (concat(*_GDN_QKV), "one", "conv_kernel"),
        (HFTensor("linear_attn.conv1d.weight", (concat(*_GDN_QKV), "one", "conv_kernel")),),
        tp_dim=0,
        split=True,
    ),
    _copy("self_attention.A_log", "linear_attn.A_log", _HEAD_SCALARS, tp_dim=0),
    _copy("self_attention.dt_bias", "linear_attn.dt_bias", _HEAD_SCALARS, tp_dim=0),
    _copy("self_attention.out_norm.weight", "linear_attn.norm.weight", "gdn_value_dim"),
    _copy("self_attention.out_proj.weight", "linear_attn.out_proj.weight", "hidden", _VALUE_HEADS, tp_dim=1),
)

MOE_ROWS = (
    _copy("pre_mlp_layernorm.weight", "post_attention_layernorm.weight", "hidden"),
    _copy("mlp.router.weight", "mlp.gate.weight", "expert", "hidden"),
    *_gated("mlp.experts.experts", "mlp.experts.{expert}", "moe_ffn", stacked=True),
    *_gated("mlp.shared_experts", "mlp.shared_expert", "shared_ffn"),
    _copy("mlp.shared_experts.gate_weight", "mlp.shared_expert_gate.weight", "one", "hidden"),
)

_PAIR = concat("hidden", "hidden")
MTP_ROWS = (
    _copy("eh_proj.weight", "mtp.fc.weight", "hidden", _PAIR, tp_dim=0),
    _copy("enorm.weight", "mtp.pre_fc_norm_embedding.weight", "hidden"),
    _copy("hnorm.weight", "mtp.pre_fc_norm_hidden.weight", "hidden"),
    _copy("final_layernorm.weight", "mtp.norm.weight", "hidden"),
)

FIRST_ROWS = (_copy("embedding.word_embeddings.weight", "model.embed_tokens.weight", "vocab", "hidden", tp_dim=0),)
LAST_ROWS = (
    _copy("decoder.final_layernorm.weight", "model.norm.weight", "hidden"),
    _copy("output_layer.weight", "lm_head.weight", "vocab", "hidden", tp_dim=0),
)


def weights(model: ModelShape) -> Iterator[Weight]:
    """Every parameter of a model, in the order of the forward pass, names complete but for ``{expert}``."""
    yield from FIRST_ROWS
    for layer, kind in enumerate(model.layer_types):
        attention = FULL_ATTENTION_ROWS if kind == FULL_ATTENTION else LINEAR_ATTENTION_ROWS
        yield from _in_block((*attention, *MOE_ROWS), f"decoder.layers.{layer}", f"model.layers.{layer}")
    yield from LAST_ROWS
    for depth in range(model.mtp_num_layers):
        yield from _renamed(MTP_ROWS, f"mtp.layers.{depth}.")
        block = (*FULL_ATTENTION_ROWS, *MOE_ROWS)
        yield from _in_block(block, f"mtp.layers.{depth}.transformer_layer", f"mtp.layers.{depth}")


def _in_block(rows: tuple[Weight, ...], key: str, hf: str) -> Iterator[Weight]:
    yield from _renamed(rows, f"{key}.", f"{hf}.", block=hf)


def _renamed(rows: tuple[Weight, ...], key: str, hf: str = "", block: str = "") -> Iterator[Weight]:
    for row in rows:
        sources = tuple(HFTensor(hf + source.name, source.dims) for source in row.sources)
        yield Weight(key + row.key, row.dims, sources, row.tp_dim, row.split, row.stacked, block)


def hf_tensors(model: ModelShape) -> dict[str, HFTensor]:
    """Every tensor of the Hugging Face checkpoint by name."""
    return {tensor.name: tensor for weight in weights(model) for tensor, _ in weight.hf_tensors(model)}


def mtp_layers_in(names: Iterator[str] | set[str]) -> int:
    """Number of MTP blocks in a set of Hugging Face tensor names; 0 when there is no ``mtp.`` tensor at all."""
    depths = [-1]
    for name in names:
        if name.startswith("mtp."):
            digits = name.removeprefix("mtp.layers.").split(".")[0]
            depths.append(int(digits) if name.startswith("mtp.layers.") and digits.isdecimal() else 0)
    return max(depths) + 1


@dataclass(frozen=True)
class ParameterCount:
    """Parameters of a model: ``active`` counts, of the routed experts, the top-k that a token visits."""

    total: int
    active: int


def count_parameters(model: ModelShape, *, include_mtp: bool = True) -> ParameterCount:
    """Count a model's parameters from the table alone.

    Active parameters are all but the routed experts that a token does not visit, embeddings and head included.
    """
    total = idle = 0
    for weight in weights(model):
        if weight.key.startswith("mtp.") and not include_mtp:
            continue
        numel = weight.numel(model)
        total += numel
        if weight.stacked:
            idle += numel // model.num_moe_experts * (model.num_moe_experts - model.moe_router_topk)
    return ParameterCount(total=total, active=total - idle)


__all__ = [
    "HFTensor",
    "ParameterCount",
    "Product",
    "Weight",
    "count_parameters",
    "hf_tensors",
    "mtp_layers_in",
    "weights",
]
