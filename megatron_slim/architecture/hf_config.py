"""config.json of a model: its sizes read, or written back; of a larger model around it too (`wrapper`)."""

from __future__ import annotations

from collections.abc import Mapping

from megatron_slim.aliases import HFConfig, JsonObject
from megatron_slim.architecture.family import Family
from megatron_slim.architecture.mtp_keys import MTP_KEYS, mtp_entries
from megatron_slim.architecture.rope import Yarn, inside, read_rope
from megatron_slim.architecture.shape import (
    FAMILIES,
    ModelShape,
    layer_pattern,
    unknown_model_type,
    unused_fields,
    wrapped_families,
)
from megatron_slim.architecture.wrapper import Wrapper, text_config
from megatron_slim.errors import ShapeError

# Keys of config.json that only some families have, about things that are not plain sizes.
LAYER_TYPES, INTERVAL = "layer_types", "full_attention_interval"
PER_LAYER = "per_layer_num_experts"  # as in the models of RCO, arXiv 2605.00649
OWN_COUNTS = "released transformers, vLLM and SGLang do not load layers with different numbers of experts"
MAX_LAYERS = 100_000  # far above any model: a typo must not fill the memory with layer types


def wrapper_of(config: HFConfig) -> Wrapper | None:
    """The larger model that a config.json describes; None where it is that of a language model."""
    model_type = config.get("model_type")
    family = wrapped_families().get(model_type) if isinstance(model_type, str) else None
    return None if family is None else family.wrapper


def language_config(config: HFConfig) -> HFConfig:
    """What a config.json says of the language model, `Wrapper` or not."""
    return text_config(config, wrapper_of(config))


def shape_from_hf_config(config: HFConfig, *, mtp_num_layers: int, where: str = "config.json") -> ModelShape:
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
            for key, accepted in wrapped_families()[wrapper.model_type].accepted.items()
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
        raise ShapeError([unknown_model_type(model_type)], where=where)
    values, yarn, found = _under_one_name(config, family)
    wanted = (*family.keys.values(), *(key for key, _ in family.multiples.values()))
    found += [f"{key} is missing" for key in wanted if key not in values]
    found += [
        f"{key} {values[key]!r} is not supported (only {accepted[0]!r})"
        for key, accepted in family.accepted.items()
        if key in values and values[key] not in accepted
    ]
    found += _layer_type_violations(values)
    if not isinstance(values.get(PER_LAYER, []), list | None):
        found.append(f"{PER_LAYER} {values[PER_LAYER]!r} is not a list")
    found += [
        f"{key} {values[key]!r} is not a positive integer"
        for key, _ in family.multiples.values()
        if key in values and not (type(values[key]) is int and values[key] > 0)
    ]
    if not found:
        sizes = {name: values[key] for name, key in family.keys.items()}
        sizes |= {name: values[key] * sizes[unit] for name, (key, unit) in family.multiples.items()}
        sizes.setdefault("router_aux_loss_coef", values.get("router_aux_loss_coef", 0.001))
        sizes |= family.fixed
        shape = ModelShape(
            model_type=model_type,
            layer_types=_layer_types(values, family),
            experts_per_layer=tuple(values.get(PER_LAYER) or ()),
            mtp_num_layers=mtp_num_layers,
            rope_scaling=yarn,
            **unused_fields(family) | {name: _as_declared(name, value) for name, value in sizes.items()},
        )
        found = shape.type_violations(family.keys) or shape.violations()
    if found:
        raise ShapeError(found, where=where)
    return shape.simplest()


def _under_one_name(config: HFConfig, family: Family) -> tuple[JsonObject, Yarn | None, list[str]]:
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


def _as_declared(name: str, value: object) -> object:
    """An integer that stands for a float as one; anything else as it is, for `ModelShape.violations` to judge."""
    return float(value) if type(value) is int and ModelShape.__annotations__[name] == "float" else value


def _layer_type_violations(config: HFConfig) -> list[str]:
    """What is wrong with the keys that `_layer_types` reads."""
    kinds, layers, interval = (config.get(key) for key in (LAYER_TYPES, "num_hidden_layers", INTERVAL))
    if kinds is not None:
        return [] if isinstance(kinds, list) else [f"layer_types {kinds!r} is not a list"]
    if type(layers) is int and layers > MAX_LAYERS:
        return [f"num_hidden_layers {layers} is more than {MAX_LAYERS}"]
    whole = interval is None or (type(interval) is int and interval > 0)
    return [] if whole else [f"{INTERVAL} {interval!r} is not a positive integer"]


def _layer_types(config: HFConfig, family: Family) -> tuple[str, ...]:
    if config.get(LAYER_TYPES) is not None:
        return tuple(config[LAYER_TYPES])
    layers = config["num_hidden_layers"]
    interval = config.get(INTERVAL) or family.full_attention_interval
    return layer_pattern(layers, interval) if type(layers) is int else ()


def shape_to_hf_config(shape: ModelShape, base: HFConfig) -> JsonObject:
    """config.json of a model of this shape, for transformers, vLLM and SGLang alike.

    Everything in ``base`` (the source model's config.json) that is not a size is carried over. Where that is one of a
    larger model, so is the result (`Wrapper`). Where layers differ,
    ``layer_types`` (which transformers reads) and ``full_attention_interval`` (which SGLang reads) are both written,
    the latter only where the pattern has a period; `mtp_keys` says who reads what about MTP.
    """
    if (wrapper := wrapper_of(base)) is not None:
        return wrapper.wrapped(base, shape_to_hf_config(shape, language_config(base)), shape.hidden_size)
    family = shape.family
    stale = {LAYER_TYPES, INTERVAL, PER_LAYER, *MTP_KEYS, *family.aliases}
    config = {key: value for key, value in base.items() if key not in stale}
    config |= {key: getattr(shape, name) for name, key in family.keys.items() if key not in inside(base)}
    config |= {key: getattr(shape, name) // getattr(shape, unit) for name, (key, unit) in family.multiples.items()}
    config["model_type"] = shape.model_type
    config.setdefault("architectures", [family.architecture])
    if len(family.attention) > 1:
        config[LAYER_TYPES] = list(shape.layer_types)
        if shape.full_attention_interval is not None:
            config[INTERVAL] = shape.full_attention_interval
    if shape.experts_per_layer:
        config[PER_LAYER] = list(shape.experts_per_layer)
    if family.mtp_rows:
        config |= mtp_entries(shape.mtp_num_layers, family.mtp_count)
    return config
