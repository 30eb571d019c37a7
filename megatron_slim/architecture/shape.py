"""The sizes of a model, validated whole, and the families that there are."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_slim.architecture.family import FULL_ATTENTION, LINEAR_ATTENTION, Family
from megatron_slim.architecture.qwen3_5_moe import QWEN3_5_MOE
from megatron_slim.architecture.qwen3_moe import QWEN3_MOE
from megatron_slim.architecture.qwen3_next import QWEN3_NEXT
from megatron_slim.architecture.rope import Yarn
from megatron_slim.errors import ShapeError

__all__ = [
    "FAMILIES",
    "FULL_ATTENTION",
    "LINEAR_ATTENTION",
    "ModelShape",
    "layer_pattern",
    "unused_fields",
]
FAMILIES = {family.model_type: family for family in (QWEN3_NEXT, QWEN3_MOE, QWEN3_5_MOE)}
MAX_SIZE = 2**31 - 1  # torch and Megatron index many things with 32 bits


@dataclass(frozen=True)
class ModelShape:
    """Family and sizes of a model under Megatron's names; `model_type` and `layer_types` under Hugging Face's.

    A size of something that the family does not have is 0. ``mtp_num_layers`` is not in the published config.json: it
    comes from the names of the checkpoint's tensors.
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

    @property
    def family(self) -> Family:
        """What this model has in common with others of its type."""
        return FAMILIES[self.model_type]

    @property
    def sizes(self) -> dict[str, int]:
        """Size of every named axis of the architecture table."""
        return {
            "one": 1,
            "vocab": self.vocab_size,
            "hidden": self.hidden_size,
            "kv_group": self.num_query_groups,
            "query_per_group": self.num_attention_heads // self.num_query_groups,
            "head_dim": self.kv_channels,
            "gdn_key_head": self.linear_num_key_heads,
            "gdn_value_per_key": self.linear_num_value_heads // max(1, self.linear_num_key_heads),
            "gdn_key_dim": self.linear_key_head_dim,
            "gdn_value_dim": self.linear_value_head_dim,
            "conv_kernel": self.linear_conv_kernel_dim,
            "expert": self.num_moe_experts,
            "moe_ffn": self.moe_ffn_hidden_size,
            "shared_ffn": self.moe_shared_expert_intermediate_size,
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
        """Hugging Face prefixes of all transformer blocks, the MTP blocks last."""
        yield from (f"model.layers.{layer}" for layer in range(self.num_layers))
        yield from (f"mtp.layers.{depth}" for depth in range(self.mtp_num_layers))

    def layer_type(self, block: str) -> str:
        """Type of a transformer block by its Hugging Face prefix; the MTP block is one of full attention."""
        return FULL_ATTENTION if block.startswith("mtp.") else self.layer_types[int(block.rpartition(".")[2])]

    def replace(self, **changes: Any) -> ModelShape:
        """A copy with other sizes, validated."""
        shape = dataclasses.replace(self, **changes)
        shape.validate()
        return shape

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON has them; ``rope_scaling`` only where there is one, as before there could be."""
        fields = dataclasses.asdict(self) | {"layer_types": list(self.layer_types)}
        del fields["rope_scaling"]
        return fields if self.rope_scaling is None else fields | {"rope_scaling": self.rope_scaling.to_config()}

    def violations(self) -> list[str]:
        """Everything that makes this shape impossible to build, one sentence each."""
        if found := self.type_violations():
            return found
        checks = {
            f"num_attention_heads {self.num_attention_heads} is not a multiple of num_query_groups "
            f"{self.num_query_groups}": self.num_attention_heads % self.num_query_groups == 0,
            f"linear_num_value_heads {self.linear_num_value_heads} is not a multiple of linear_num_key_heads "
            f"{self.linear_num_key_heads}": self.linear_num_value_heads % max(1, self.linear_num_key_heads) == 0,
            f"moe_router_topk {self.moe_router_topk} is larger than num_moe_experts "
            f"{self.num_moe_experts}": self.moe_router_topk <= self.num_moe_experts,
            f"layer_types has {len(self.layer_types)} entries for num_layers {self.num_layers}": len(self.layer_types)
            == self.num_layers,
            f"rotary_base {self.rotary_base} is not above zero": self.rotary_base > 0,
            f"rotary_base {self.rotary_base} is not above 1, as YaRN needs": self.rope_scaling is None
            or self.rotary_base > 1,
            "no full_attention layer is left (transformers cannot run such a model)": FULL_ATTENTION
            in self.layer_types,
            f"rotary_percent {self.rotary_percent} of kv_channels {self.kv_channels} is not an even number "
            "of dimensions": self.rotary_percent <= 1 and self.rotary_dim > 0 and self.rotary_dim % 2 == 0,
            f"mtp_num_layers {self.mtp_num_layers} is not 0 or 1 (the Hugging Face format has one MTP "
            "block)": self.mtp_num_layers in (0, 1),
            f"mtp_num_layers {self.mtp_num_layers}, but {self.model_type} has no MTP block": self.mtp_num_layers == 0
            or bool(self.family.mtp_rows),
        }
        found += [sentence for sentence, holds in checks.items() if not holds]
        known = self.family.attention_rows
        unknown = sorted(set(self.layer_types) - known.keys())
        found += [f"unknown layer type {kind!r} ({self.model_type} has {', '.join(known)})" for kind in unknown]
        return found

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
            elif field.type == "int" and field.name != "mtp_num_layers":
                if type(value) is not int or not 1 <= value <= MAX_SIZE:
                    found.append(f"{name} {value!r} is not a positive integer below 2**31")
            elif field.type == "float":
                if type(value) not in (int, float) or not math.isfinite(value) or value < 0:
                    found.append(f"{name} {value!r} is not a finite number of zero or more")
            elif field.type == "bool" and type(value) is not bool:
                found.append(f"{name} {value!r} is neither true nor false")
        if not all(isinstance(kind, str) for kind in self.layer_types):
            found.append(f"layer_types {list(self.layer_types)!r} are not all strings")
        return found

    @property
    def rotary_dim(self) -> int:
        """Number of dimensions of a head that rotate."""
        return int(self.kv_channels * self.rotary_percent)

    def validate(self, where: str = "") -> None:
        """Raise one `ShapeError` that lists every violation."""
        if violations := self.violations():
            raise ShapeError(violations, where=where)


def layer_pattern(num_layers: int, full_attention_interval: int) -> tuple[str, ...]:
    """Layer types of a hybrid stack with one full-attention layer per interval.

    >>> layer_pattern(4, 2)
    ('linear_attention', 'full_attention', 'linear_attention', 'full_attention')
    """
    return tuple(
        FULL_ATTENTION if (layer + 1) % full_attention_interval == 0 else LINEAR_ATTENTION
        for layer in range(num_layers)
    )


def unused_fields(family: Family) -> dict[str, int | float]:
    """The sizes that a family does not have, and what they are in its shapes.

    >>> unused_fields(QWEN3_MOE)["linear_num_key_heads"], unused_fields(QWEN3_MOE)["rotary_percent"]
    (0, 1.0)
    """
    neutral = {field.name: 0 for field in dataclasses.fields(ModelShape) if field.type == "int"} | {
        "rotary_percent": 1.0
    }
    return {name: value for name, value in neutral.items() if name not in family.keys and name != "mtp_num_layers"}


def wrapped_families() -> dict[str, Family]:
    """The families that larger models hold, by the ``model_type`` of those."""
    return {family.wrapper.model_type: family for family in FAMILIES.values() if family.wrapper is not None}


def unknown_model_type(value: object) -> str:
    """What is wrong with a ``model_type``."""
    return f"model_type {value!r} is not supported (only {', '.join(map(repr, (*FAMILIES, *wrapped_families())))})"
