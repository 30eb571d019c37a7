"""The sizes of a model: read from a Hugging Face config.json, validated whole, written back."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_slim.errors import ShapeError

LINEAR_ATTENTION, FULL_ATTENTION = "linear_attention", "full_attention"
MODEL_TYPE = "qwen3_next"
INTERVAL = "full_attention_interval"
MAX_LAYERS = 100_000  # far above any model: a typo must not fill the memory with layer types
MAX_SIZE = 2**31 - 1  # torch and Megatron index many things with 32 bits


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a Qwen3-Next model under Megatron's names; `layer_types` under Hugging Face's.

    ``mtp_num_layers`` is not in the published config.json: it comes from the names of the checkpoint's tensors.
    """

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
            "gdn_value_per_key": self.linear_num_value_heads // self.linear_num_key_heads,
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

    def replace(self, **changes: Any) -> ModelShape:
        """A copy with other sizes, validated."""
        shape = dataclasses.replace(self, **changes)
        shape.validate()
        return shape

    def violations(self) -> list[str]:
        """Everything that makes this shape impossible to build, one sentence each."""
        if found := self.type_violations():
            return found
        checks = {
            f"num_attention_heads {self.num_attention_heads} is not a multiple of num_query_groups "
            f"{self.num_query_groups}": self.num_attention_heads % self.num_query_groups == 0,
            f"linear_num_value_heads {self.linear_num_value_heads} is not a multiple of linear_num_key_heads "
            f"{self.linear_num_key_heads}": self.linear_num_value_heads % self.linear_num_key_heads == 0,
            f"moe_router_topk {self.moe_router_topk} is larger than num_moe_experts "
            f"{self.num_moe_experts}": self.moe_router_topk <= self.num_moe_experts,
            f"layer_types has {len(self.layer_types)} entries for num_layers {self.num_layers}": len(self.layer_types)
            == self.num_layers,
            f"rotary_base {self.rotary_base} is not above zero": self.rotary_base > 0,
            "no full_attention layer is left (transformers cannot run such a model)": FULL_ATTENTION
            in self.layer_types,
            f"rotary_percent {self.rotary_percent} of kv_channels {self.kv_channels} is not an even number "
            "of dimensions": self.rotary_percent <= 1 and self.rotary_dim > 0 and self.rotary_dim % 2 == 0,
            f"mtp_num_layers {self.mtp_num_layers} is not 0 or 1 (the Hugging Face format has one MTP "
            "block)": self.mtp_num_layers in (0, 1),
        }
        found += [sentence for sentence, holds in checks.items() if not holds]
        unknown = sorted(set(self.layer_types) - {LINEAR_ATTENTION, FULL_ATTENTION})
        found += [f"unknown layer type {kind!r} (known: {LINEAR_ATTENTION}, {FULL_ATTENTION})" for kind in unknown]
        return found

    def type_violations(self, names: Mapping[str, str] | None = None) -> list[str]:
        """Values that are no numbers of the right kind; with one of them no other check makes sense.

        Args:
            names: what the values are called where they were read, as far as that differs.
        """
        found = []
        for field in dataclasses.fields(self):
            value, name = getattr(self, field.name), (names or {}).get(field.name, field.name)
            if field.type == "int" and field.name != "mtp_num_layers":
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


# Megatron's name -> Hugging Face's, for the keys that are a plain copy.
HF_KEYS = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "vocab_size": "vocab_size",
    "num_attention_heads": "num_attention_heads",
    "num_query_groups": "num_key_value_heads",
    "kv_channels": "head_dim",
    "linear_num_key_heads": "linear_num_key_heads",
    "linear_num_value_heads": "linear_num_value_heads",
    "linear_key_head_dim": "linear_key_head_dim",
    "linear_value_head_dim": "linear_value_head_dim",
    "linear_conv_kernel_dim": "linear_conv_kernel_dim",
    "num_moe_experts": "num_experts",
    "moe_router_topk": "num_experts_per_tok",
    "moe_ffn_hidden_size": "moe_intermediate_size",
    "moe_shared_expert_intermediate_size": "shared_expert_intermediate_size",
    "max_position_embeddings": "max_position_embeddings",
    "layernorm_epsilon": "rms_norm_eps",
    "norm_topk_prob": "norm_topk_prob",
}

_HF_NAMES = {**HF_KEYS, "rotary_base": "rope_theta", "rotary_percent": "partial_rotary_factor"}

# What this package does not implement: key -> the values it accepts.
_REQUIRED_VALUES: dict[str, tuple[Any, ...]] = {
    "model_type": (MODEL_TYPE,),
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "attention_dropout": (0, 0.0),
    "decoder_sparse_step": (1,),
    "mlp_only_layers": ([], None),
    "tie_word_embeddings": (False,),
    "rope_scaling": (None,),
}


def shape_from_hf_config(config: Mapping[str, Any], *, mtp_num_layers: int, where: str = "config.json") -> ModelShape:
    """Read the sizes of a Qwen3-Next model from its config.json.

    Args:
        config: the parsed file.
        mtp_num_layers: number of MTP blocks found in the checkpoint's tensor names.
        where: the file's name, for errors.

    Raises:
        ShapeError: lists every missing key, unsupported value and impossible size.
    """
    found = [f"{key} is missing" for key in HF_KEYS.values() if key not in config]
    found += [
        f"{key} {config[key]!r} is not supported (only {accepted[0]!r})"
        for key, accepted in _REQUIRED_VALUES.items()
        if key in config and config[key] not in accepted
    ]
    if "model_type" not in config:
        found.append("model_type is missing")
    rope = config.get("rope_parameters") or {}
    if not isinstance(rope, Mapping):
        found.append(f"rope_parameters {rope!r} is not an object")
        rope = {}
    if rope.get("rope_type", "default") != "default":
        found.append(f"rope_parameters.rope_type {rope['rope_type']!r} is not supported (only 'default')")
    rope_theta = rope.get("rope_theta", config.get("rope_theta"))
    rotary_percent = rope.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    found += [
        f"{name} is missing"
        for name, value in (("rope_theta", rope_theta), ("partial_rotary_factor", rotary_percent))
        if value is None
    ]
    found += _layer_type_violations(config)
    if not found:
        values = {name: config[key] for name, key in HF_KEYS.items()}
        shape = ModelShape(
            **values,
            layer_types=_layer_types(config),
            mtp_num_layers=mtp_num_layers,
            rotary_base=_as_float(rope_theta),
            rotary_percent=_as_float(rotary_percent),
            router_aux_loss_coef=_as_float(config.get("router_aux_loss_coef", 0.001)),
        )
        found = shape.type_violations(_HF_NAMES) or shape.violations()
    if found:
        raise ShapeError(found, where=where)
    return shape


def _as_float(value: Any) -> Any:
    """An integer as a float; anything else as it is, for `ModelShape.violations` to judge."""
    return float(value) if type(value) is int else value


def _layer_type_violations(config: Mapping[str, Any]) -> list[str]:
    """What is wrong with the keys that `_layer_types` reads."""
    kinds, layers, interval = (config.get(key) for key in ("layer_types", "num_hidden_layers", INTERVAL))
    if kinds is not None:
        return [] if isinstance(kinds, list) else [f"layer_types {kinds!r} is not a list"]
    if type(layers) is int and layers > MAX_LAYERS:
        return [f"num_hidden_layers {layers} is more than {MAX_LAYERS}"]
    whole = interval is None or (type(interval) is int and interval > 0)
    return [] if whole else [f"{INTERVAL} {interval!r} is not a positive integer"]


def _layer_types(config: Mapping[str, Any]) -> tuple[str, ...]:
    if config.get("layer_types") is not None:
        return tuple(config["layer_types"])
    layers = config["num_hidden_layers"]
    return layer_pattern(layers, config.get(INTERVAL) or 4) if type(layers) is int else ()


def shape_to_hf_config(shape: ModelShape, base: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of a model of this shape, for transformers, vLLM and SGLang alike.

    Everything in ``base`` (the source model's config.json) that is not a size is carried over. ``layer_types`` (which
    transformers reads) and ``full_attention_interval`` (which SGLang reads) are both written, the latter only where
    the pattern has a period; ``num_nextn_predict_layers`` is what vLLM reads.
    """
    config = dict(base)
    config.update({key: getattr(shape, name) for name, key in HF_KEYS.items()})
    config["model_type"] = MODEL_TYPE
    config.setdefault("architectures", ["Qwen3NextForCausalLM"])
    config["layer_types"] = list(shape.layer_types)
    config["num_nextn_predict_layers"] = shape.mtp_num_layers
    config.pop("full_attention_interval", None)
    if shape.full_attention_interval is not None:
        config["full_attention_interval"] = shape.full_attention_interval
    config["rope_theta"], config["partial_rotary_factor"] = shape.rotary_base, shape.rotary_percent
    return config
