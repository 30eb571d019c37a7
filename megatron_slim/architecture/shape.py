"""The sizes of a model, validated whole, and the families that there are."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_slim.aliases import JsonObject, Keywords
from megatron_slim.architecture.family import (
    DENSE,
    FULL_ATTENTION,
    LAYERS,
    LINEAR_ATTENTION,
    MOE,
    MTP,
    MTP_SUBLAYERS,
    Family,
)
from megatron_slim.architecture.glm4_moe import GLM4_MOE
from megatron_slim.architecture.kinds import AXES
from megatron_slim.architecture.qwen3_5_moe import QWEN3_5_MOE
from megatron_slim.architecture.qwen3_moe import QWEN3_MOE
from megatron_slim.architecture.qwen3_next import QWEN3_NEXT
from megatron_slim.architecture.rope import Yarn
from megatron_slim.architecture.shape_checks import violations
from megatron_slim.errors import ShapeError

__all__ = [
    "FAMILIES",
    "FULL_ATTENTION",
    "LINEAR_ATTENTION",
    "ModelShape",
    "layer_pattern",
    "unused_fields",
]
FAMILIES = {family.model_type: family for family in (QWEN3_NEXT, QWEN3_MOE, QWEN3_5_MOE, GLM4_MOE)}
MAX_SIZE = 2**31 - 1  # torch and Megatron index many things with 32 bits
# Fields that documents may lack, which older ones do: they mean what they say by default.
LATER = (
    "rope_scaling",
    *("ffn_hidden_size", "num_dense_layers", "qk_layernorm", "add_qkv_bias"),
    *("moe_router_topk_scaling_factor", "moe_router_num_groups", "moe_router_group_topk"),
    "experts_per_layer",
)
_MAY_BE_ZERO = ("mtp_num_layers", "num_dense_layers")


@dataclass(frozen=True)
class ModelShape:
    """Family and sizes of a model under Megatron's names; `model_type` and `layer_types` under Hugging Face's.

    A size of something that the family does not have is 0. ``mtp_num_layers`` is not in the published config.json: it
    comes from the names of the checkpoint's tensors. Where the layers of the trunk have different numbers of experts,
    ``experts_per_layer`` has them, 0 for dense layers, and ``num_moe_experts`` is the MTP block's; else it is empty.
    """

    model_type: str
    num_layers: int
    layer_types: tuple[str, ...]
    hidden_size: int
    vocab_size: int
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    linear_num_key_heads: int
    linear_num_value_heads: int
    linear_key_head_dim: int
    linear_value_head_dim: int
    linear_conv_kernel_dim: int
    num_moe_experts: int
    moe_router_topk: int
    moe_ffn_hidden_size: int
    moe_shared_expert_intermediate_size: int
    mtp_num_layers: int
    rotary_base: float
    rotary_percent: float
    max_position_embeddings: int
    layernorm_epsilon: float
    norm_topk_prob: bool
    router_aux_loss_coef: float = 0.001
    rope_scaling: Yarn | None = None
    ffn_hidden_size: int = 0
    num_dense_layers: int = 0
    moe_router_topk_scaling_factor: float = 1.0
    moe_router_num_groups: int = 1
    moe_router_group_topk: int = 1
    qk_layernorm: bool = True
    add_qkv_bias: bool = False
    experts_per_layer: tuple[int, ...] = ()

    @property
    def family(self) -> Family:
        """What this model has in common with others of its type."""
        return FAMILIES[self.model_type]

    @functools.cached_property
    def sizes(self) -> Mapping[str, int]:
        """Size of every named axis of the architecture table."""
        return {
            "one": 1,
            "vocab": self.vocab_size,
            "head_dim": self.kv_channels,
            "gdn_key_dim": self.linear_key_head_dim,
            "gdn_value_dim": self.linear_value_head_dim,
            "conv_kernel": self.linear_conv_kernel_dim,
            **{name: size for axis in AXES.values() for name, size in axis.sizes(self).items()},
        }

    @property
    def full_attention_interval(self) -> int | None:
        """Period n such that every n-th layer, and only that, is full attention; None where there is none."""
        full = [i for i, kind in enumerate(self.layer_types) if kind == FULL_ATTENTION]
        if not full:
            return None
        interval = full[0] + 1
        return interval if self.layer_types == layer_pattern(self.num_layers, interval) else None

    @property
    def blocks(self) -> Iterator[str]:
        """Names of all transformer blocks, the MTP blocks last: ``model.layers.{i}`` and ``mtp.layers.{i}``.

        They are those of most families' files; `hf_prefix` has what a family's files call a block.
        """
        yield from (f"{LAYERS}{layer}" for layer in range(self.num_layers))
        yield from (f"{MTP}layers.{depth}" for depth in range(self.mtp_num_layers))

    @property
    def routed_blocks(self) -> Iterator[str]:
        """Those of them with routed experts."""
        return (block for block in self.blocks if self.ffn_kind(block) == MOE)

    @property
    def sublayers(self) -> tuple[tuple[str, str], ...]:
        """Kinds of attention and feed-forward network of every layer."""
        dense = self.num_dense_layers
        return tuple((kind, DENSE if layer < dense else MOE) for layer, kind in enumerate(self.layer_types))

    def sublayers_of(self, block: str) -> tuple[str, str]:
        """The same of a transformer block by its name."""
        return MTP_SUBLAYERS if block.startswith(MTP) else self.sublayers[int(block.rpartition(".")[2])]

    def layer_type(self, block: str) -> str:
        """Kind of attention of a transformer block by its name; the MTP block is one of full attention."""
        return self.sublayers_of(block)[0]

    def ffn_kind(self, block: str) -> str:
        """Kind of feed-forward network of a transformer block by its name."""
        return self.sublayers_of(block)[1]

    def in_block(self, block: str) -> ModelShape:
        """The sizes of a transformer block by its name, as those of a model whose blocks all have its experts."""
        if not self.experts_per_layer:
            return self
        own = self.experts_per_layer[int(block.rpartition(".")[2])] if block.startswith(LAYERS) else 0
        return _with_experts(self, own or self.num_moe_experts)

    @property
    def expert_counts(self) -> dict[str, int]:
        """Routed experts of every block that has some, by its name."""
        return {block: self.in_block(block).num_moe_experts for block in self.routed_blocks}

    def simplest(self) -> ModelShape:
        """The same, without ``experts_per_layer`` where every block with experts has as many."""
        counts = {*self.experts_per_layer} - {0} | ({self.num_moe_experts} if self.mtp_num_layers else set())
        if not self.experts_per_layer or len(counts) != 1:
            return self
        return dataclasses.replace(self, experts_per_layer=(), num_moe_experts=counts.pop())

    def hf_prefix(self, block: str) -> str:
        """What names of a block's tensors begin with in Hugging Face files."""
        if not block.startswith(MTP):
            return block
        return self.family.mtp_prefix(self.num_layers, int(block.rpartition(".")[2]))

    def replace(self, **changes: Any) -> ModelShape:
        """A copy with other sizes, validated."""
        shape = dataclasses.replace(self, **changes)
        shape.validate()
        return shape

    def to_dict(self) -> JsonObject:
        """All fields as JSON has them; those of `LATER` only where they say something, as before there were any."""
        fields = dataclasses.asdict(self) | {"layer_types": list(self.layer_types)}
        if self.rope_scaling is not None:
            fields["rope_scaling"] = self.rope_scaling.to_config()
        fields["experts_per_layer"] = list(self.experts_per_layer)
        default = {field.name: field.default for field in dataclasses.fields(self) if field.name in LATER}
        default["experts_per_layer"] = []
        return {name: value for name, value in fields.items() if name not in default or value != default[name]}

    def violations(self) -> list[str]:
        """Everything that makes this shape impossible to build, one sentence each."""
        return self.type_violations() or violations(self)

    def type_violations(self, names: Mapping[str, str] | None = None) -> list[str]:
        """Values that are not numbers of the right kind; with one of them no other check makes sense.

        Args:
            names: what the values are called where they were read, as far as that differs.
        """
        if self.model_type not in FAMILIES:
            return [unknown_model_type(self.model_type)]
        found, absent = [], unused_fields(self.family)
        for field in dataclasses.fields(self):
            value, name = getattr(self, field.name), (names or {}).get(field.name, field.name)
            if field.name in absent:
                if value != absent[field.name]:
                    found.append(f"{name} {value!r} is not {absent[field.name]}: {self.model_type} has no such thing")
            elif field.name in self.family.fixed:
                if value != self.family.fixed[field.name]:
                    found.append(f"{name} {value!r} is not {self.family.fixed[field.name]!r}, as in {self.model_type}")
            elif field.type == "int":
                least = 0 if field.name in _MAY_BE_ZERO else 1
                if field.name != "mtp_num_layers" and (type(value) is not int or not least <= value <= MAX_SIZE):
                    number = "an integer of zero or more" if least == 0 else "a positive integer"
                    found.append(f"{name} {value!r} is not {number} below 2**31")
            elif field.type == "float":
                if type(value) not in (int, float) or not math.isfinite(value) or value < 0:
                    found.append(f"{name} {value!r} is not a finite number of zero or more")
            elif field.type == "bool" and type(value) is not bool:
                found.append(f"{name} {value!r} is neither true nor false")
        if any(type(count) is not int or not 0 <= count <= MAX_SIZE for count in self.experts_per_layer):
            found.append(f"experts_per_layer {list(self.experts_per_layer)!r} are not all integers of zero or more")
        if not all(isinstance(kind, str) for kind in self.layer_types):
            found.append(f"layer_types {list(self.layer_types)!r} are not all strings")
        return found

    @property
    def rotary_dim(self) -> int:
        """Number of dimensions of a head that rotate."""
        return int(self.kv_channels * self.rotary_percent)

    def validate(self, where: str = "") -> None:
        """Raise one `ShapeError` that lists every violation."""
        if found := self.violations():
            raise ShapeError(found, where=where)


@functools.cache
def _with_experts(shape: ModelShape, experts: int) -> ModelShape:
    return dataclasses.replace(shape, num_moe_experts=experts, experts_per_layer=())


def layer_pattern(num_layers: int, full_attention_interval: int) -> tuple[str, ...]:
    """Layer types of a hybrid stack with one full-attention layer per interval.

    >>> layer_pattern(4, 2)
    ('linear_attention', 'full_attention', 'linear_attention', 'full_attention')
    """
    return tuple(
        FULL_ATTENTION if (layer + 1) % full_attention_interval == 0 else LINEAR_ATTENTION
        for layer in range(num_layers)
    )


def unused_fields(family: Family) -> Keywords:
    """The sizes that a family does not have, and what they are in its shapes.

    >>> unused_fields(QWEN3_MOE)["linear_num_key_heads"], unused_fields(QWEN3_MOE)["rotary_percent"]
    (0, 1.0)
    """
    fields = dataclasses.fields(ModelShape)
    neutral: Keywords = {field.name: 0 for field in fields if field.type == "int"} | {"rotary_percent": 1.0}
    sizes = set(LATER) - {"rope_scaling", "experts_per_layer"}
    neutral |= {field.name: field.default for field in fields if field.name in sizes}
    had = {*family.keys, *family.multiples, "mtp_num_layers"}
    return {name: value for name, value in neutral.items() if name not in had}


def wrapped_families() -> dict[str, Family]:
    """The families that larger models hold, by the ``model_type`` of those."""
    return {family.wrapper.model_type: family for family in FAMILIES.values() if family.wrapper is not None}


def unknown_model_type(value: object) -> str:
    """What is wrong with a ``model_type``."""
    return f"model_type {value!r} is not supported (only {', '.join(map(repr, (*FAMILIES, *wrapped_families())))})"
