"""The sizes of a model: read from a Hugging Face config.json, validated whole, written back."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_slim.architecture.family import FULL_ATTENTION, LINEAR_ATTENTION, Family
from megatron_slim.architecture.mtp_keys import MTP_KEYS, mtp_entries
from megatron_slim.architecture.qwen3_5_moe import QWEN3_5_MOE
from megatron_slim.architecture.qwen3_moe import QWEN3_MOE
from megatron_slim.architecture.qwen3_next import QWEN3_NEXT
from megatron_slim.architecture.rope import Yarn, inside, read_rope
from megatron_slim.architecture.wrapper import Wrapper, text_config
from megatron_slim.errors import ShapeError

__all__ = [
    "FAMILIES",
    "FULL_ATTENTION",
    "LINEAR_ATTENTION",
    "ModelShape",
    "layer_pattern",
    "shape_from_hf_config",
    "shape_to_hf_config",
    "unused_fields",
]
FAMILIES = {family.model_type: family for family in (QWEN3_NEXT, QWEN3_MOE, QWEN3_5_MOE)}
_WRAPPED = {family.wrapper.model_type: family for family in FAMILIES.values() if family.wrapper is not None}
# Keys of config.json that only some families have, about things that are not plain sizes.
LAYER_TYPES, INTERVAL = "layer_types", "full_attention_interval"
MAX_LAYERS = 100_000  # far above any model: a typo must not fill the memory with layer types
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
            return [_unknown_model_type(self.model_type)]
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


def _unknown_model_type(value: object) -> str:
    return f"model_type {value!r} is not supported (only {', '.join(map(repr, (*FAMILIES, *_WRAPPED)))})"


def wrapper_of(config: Mapping[str, Any]) -> Wrapper | None:
    """The larger model that a config.json describes; None where it is that of a language model."""
    model_type = config.get("model_type")
    family = _WRAPPED.get(model_type) if isinstance(model_type, str) else None
    return None if family is None else family.wrapper


def language_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a config.json says of the language model, `Wrapper` or not."""
    return text_config(config, wrapper_of(config))


def shape_from_hf_config(config: Mapping[str, Any], *, mtp_num_layers: int, where: str = "config.json") -> ModelShape:
    """Read family and sizes of a language model from its config.json, or that of the larger model which holds it.

    Args:
        config: the parsed file.
        mtp_num_layers: number of MTP blocks found in the checkpoint's tensor names.
        where: the file's name, for errors.

    Raises:
        ShapeError: lists every missing key, unsupported value and impossible size.
    """
    if (wrapper := wrapper_of(config)) is not None:
        if not isinstance(config.get(wrapper.text), Mapping):
            raise ShapeError([f"{wrapper.text} is missing, or is not an object"], where=where)
        found = [
            f"{key} {config[key]!r} is not supported (only {accepted[0]!r})"
            for key, accepted in _WRAPPED[wrapper.model_type].accepted.items()
            if key in config and config[key] not in accepted
        ]
        if found:
            raise ShapeError(found, where=where)
        config, where = config[wrapper.text], f"{where}: {wrapper.text}"
    if "model_type" not in config:
        raise ShapeError(["model_type is missing"], where=where)
    model_type = config["model_type"]
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        raise ShapeError([_unknown_model_type(model_type)], where=where)
    values, yarn, found = _under_one_name(config, family)
    found += [f"{key} is missing" for key in family.keys.values() if key not in values]
    found += [
        f"{key} {values[key]!r} is not supported (only {accepted[0]!r})"
        for key, accepted in family.accepted.items()
        if key in values and values[key] not in accepted
    ]
    found += _layer_type_violations(values)
    if not found:
        sizes = {name: values[key] for name, key in family.keys.items()}
        sizes["router_aux_loss_coef"] = values.get("router_aux_loss_coef", 0.001)
        shape = ModelShape(
            model_type=model_type,
            layer_types=_layer_types(values, family),
            mtp_num_layers=mtp_num_layers,
            rope_scaling=yarn,
            **family.fixed,
            **unused_fields(family) | {name: _as_declared(name, value) for name, value in sizes.items()},
        )
        found = shape.type_violations(family.keys) or shape.violations()
    if found:
        raise ShapeError(found, where=where)
    return shape


def _under_one_name(config: Mapping[str, Any], family: Family) -> tuple[dict[str, Any], Yarn | None, list[str]]:
    """config.json with every value where this package looks for it, YaRN, and what contradicts itself on the way."""
    inside, yarn, found = read_rope(config)
    values = dict(config) | inside
    for alias, key in family.aliases.items():
        if alias in config and values.setdefault(key, config[alias]) != config[alias]:
            found.append(f"{key} {config[key]!r} and {alias} {config[alias]!r} are two names of one thing")
    hidden, heads = config.get("hidden_size"), config.get("num_attention_heads")
    if family.optional_head_dim and "head_dim" not in config and type(hidden) is type(heads) is int and heads > 0:
        values["head_dim"] = hidden // heads
    return values, yarn, found


def _as_declared(name: str, value: Any) -> Any:
    """An integer that stands for a float as one; anything else as it is, for `ModelShape.violations` to judge."""
    return float(value) if type(value) is int and ModelShape.__annotations__[name] == "float" else value


def _layer_type_violations(config: Mapping[str, Any]) -> list[str]:
    """What is wrong with the keys that `_layer_types` reads."""
    kinds, layers, interval = (config.get(key) for key in (LAYER_TYPES, "num_hidden_layers", INTERVAL))
    if kinds is not None:
        return [] if isinstance(kinds, list) else [f"layer_types {kinds!r} is not a list"]
    if type(layers) is int and layers > MAX_LAYERS:
        return [f"num_hidden_layers {layers} is more than {MAX_LAYERS}"]
    whole = interval is None or (type(interval) is int and interval > 0)
    return [] if whole else [f"{INTERVAL} {interval!r} is not a positive integer"]


def _layer_types(config: Mapping[str, Any], family: Family) -> tuple[str, ...]:
    if config.get(LAYER_TYPES) is not None:
        return tuple(config[LAYER_TYPES])
    layers = config["num_hidden_layers"]
    interval = config.get(INTERVAL) or family.full_attention_interval
    return layer_pattern(layers, interval) if type(layers) is int else ()


def shape_to_hf_config(shape: ModelShape, base: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of a model of this shape, for transformers, vLLM and SGLang alike.

    Everything in ``base`` (the source model's config.json) that is not a size is carried over. Where that is one of a
    larger model, so is the result (`Wrapper`). Where layers differ,
    ``layer_types`` (which transformers reads) and ``full_attention_interval`` (which SGLang reads) are both written,
    the latter only where the pattern has a period; `mtp_keys` says who reads what about MTP.
    """
    if (wrapper := wrapper_of(base)) is not None:
        return wrapper.wrapped(base, shape_to_hf_config(shape, language_config(base)), shape.hidden_size)
    family = shape.family
    stale = {LAYER_TYPES, INTERVAL, *MTP_KEYS, *family.aliases}
    config = {key: value for key, value in base.items() if key not in stale}
    config |= {key: getattr(shape, name) for name, key in family.keys.items() if key not in inside(base)}
    config["model_type"] = shape.model_type
    config.setdefault("architectures", [family.architecture])
    if len(family.attention_rows) > 1:
        config[LAYER_TYPES] = list(shape.layer_types)
        if shape.full_attention_interval is not None:
            config[INTERVAL] = shape.full_attention_interval
    if family.mtp_rows:
        config |= mtp_entries(shape.mtp_num_layers, family.mtp_count)
    return config
