"""Rotary embeddings as config.json describes them: plain ones, and YaRN (arXiv 2309.00071), as transformers reads both.

There are two spellings: ``rope_scaling`` with ``rope_theta`` and ``partial_rotary_factor``, as published, and
``rope_parameters`` with everything inside, as transformers 5 writes it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass

from megatron_slim.aliases import HFConfig, JsonObject

SPELLINGS = ("rope_scaling", "rope_parameters")
INSIDE = ("rope_theta", "partial_rotary_factor")  # keys of config.json that either spelling may hold, and then wins
_ORIGINAL = "original_max_position_embeddings"
_TYPES = ("rope_type", "type")
# Which dimensions turn by which of three positions; those of a text are the same, and then it is plain.
_GRIDS = ("mrope_section", "mrope_interleaved")
# Numbers that YaRN takes -> the least they may be.
_LEAST = {
    "factor": 1.0,
    _ORIGINAL: 1.0,
    "attention_factor": 1e-6,
    "beta_fast": 1e-6,
    "beta_slow": 1e-6,
    "mscale": 0.0,
    "mscale_all_dim": 0.0,
}


@dataclass(frozen=True)
class Yarn:
    """What YaRN does to rotary embeddings, everything resolved; names are config.json's.

    Attributes:
        factor: by how much slow dimensions are slowed down.
        original_max_position_embeddings: length before that.
        attention_factor: what sine and cosine are multiplied by.
        beta_fast: rotations over the original length from which on a dimension is left alone.
        beta_slow: rotations up to which it is slowed down whole.
        truncate: whether the dimensions between both are counted in whole ones.
    """

    factor: float
    original_max_position_embeddings: int
    attention_factor: float
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True

    def to_config(self) -> JsonObject:
        """As a value of ``rope_scaling``."""
        return {"rope_type": "yarn", **dataclasses.asdict(self)}

    def ramp(self, dim: int, base: float) -> tuple[float, float]:
        """Where, of dim / 2 frequencies from the fastest on, slowing down begins and where it is whole."""
        low, high = (
            dim * math.log(self.original_max_position_embeddings / (rotations * 2 * math.pi)) / (2 * math.log(base))
            for rotations in (self.beta_fast, self.beta_slow)
        )
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dim - 1)
        return low, high + 0.001 * (low == high)


def read_rope(config: HFConfig) -> tuple[JsonObject, Yarn | None, list[str]]:
    """What config.json says of rotary embeddings.

    Returns:
        those keys of `INSIDE` that are given inside; what YaRN does, if it is asked for; everything wrong.
    """
    given = {key: config[key] for key in SPELLINGS if config.get(key)}
    if found := [f"{key} {value!r} is not an object" for key, value in given.items() if not isinstance(value, Mapping)]:
        return {}, None, found
    if len(given) == 2 and _one_type(given[SPELLINGS[0]]) != _one_type(given[SPELLINGS[1]]):
        return {}, None, [f"{' and '.join(SPELLINGS)} are two names of one thing and differ (remove one)"]
    key = next(iter(given), "")
    rope: HFConfig = given.get(key, {})
    inside = {name: rope[name] for name in INSIDE if rope.get(name) is not None}
    kinds = [rope[name] for name in _TYPES if name in rope] or ["default"]
    if all(kind == "yarn" for kind in kinds):
        yarn, found = _read_yarn(rope, config)
        return inside, yarn, [f"{key}: {sentence}" for sentence in found]
    if any(kind != "default" for kind in kinds) or any(isinstance(value, Mapping) for value in rope.values()):
        what = "/".join(str(kind) for kind in kinds) if any(kind != "default" for kind in kinds) else "by layer type"
        found = [
            f"{key} {what} is not supported (only default and yarn; without it, where the model was only extended by "
            "it, the model runs within its original length)"
        ]
    return inside, None, found


def inside(config: HFConfig) -> frozenset[str]:
    """Those keys of `INSIDE` that a config.json gives inside a spelling and nowhere else."""
    held = {name for key in SPELLINGS if isinstance(config.get(key), Mapping) for name in config[key]}
    return frozenset(name for name in INSIDE if name in held and name not in config)


def _one_type(rope: HFConfig) -> JsonObject:
    """The same under one name of its type."""
    kind = rope.get("rope_type", rope.get("type", "default"))
    return {"rope_type": kind} | {name: value for name, value in rope.items() if name not in _TYPES}


def _read_yarn(rope: HFConfig, config: HFConfig) -> tuple[Yarn | None, list[str]]:
    """YaRN with transformers' defaults, or what is wrong with its values."""
    values: JsonObject = {_ORIGINAL: config.get("max_position_embeddings")}
    values |= {
        name: value for name, value in rope.items() if value is not None and name not in (*_TYPES, *INSIDE, *_GRIDS)
    }
    found = [] if "factor" in values else ["factor is missing"]
    if (outside := config.get(_ORIGINAL)) is not None:  # which transformers lets win
        if rope.get(_ORIGINAL, outside) != outside:
            found.append(f"{_ORIGINAL} {rope[_ORIGINAL]!r}, and {outside!r} outside it")
        values[_ORIGINAL] = outside
    for name, value in values.items():
        least = _LEAST.get(name)
        if name == "truncate" and type(value) is not bool:
            found.append(f"truncate {value!r} is neither true nor false")
        elif name == _ORIGINAL and type(value) is not int:
            found.append(f"{name} {value!r} is not an integer")
        elif least is not None and not (type(value) in (int, float) and least <= value < math.inf):
            found.append(f"{name} {value!r} is not a number of {least:g} or more")
        elif least is None and name != "truncate":
            found.append(f"{name} is unknown (remove it: transformers ignores it, others may not)")
    if found:
        return None, found
    values.setdefault("attention_factor", _attention_factor(values))
    kinds = {each.name: {"float": float, "int": int, "bool": bool}[str(each.type)] for each in dataclasses.fields(Yarn)}
    yarn = Yarn(**{name: kind(values[name]) for name, kind in kinds.items() if name in values})
    if yarn.beta_fast < yarn.beta_slow:
        return None, [f"beta_fast {yarn.beta_fast} is below beta_slow {yarn.beta_slow}"]
    return yarn, []


def _attention_factor(values: HFConfig) -> float:
    """The paper's; or the ratio of two, where DeepSeek's models leave a part of it to the scale of the scores."""

    def one(weight: float) -> float:
        return 0.1 * weight * math.log(values["factor"]) + 1.0

    if values.get("mscale") and values.get("mscale_all_dim"):
        return one(values["mscale"]) / one(values["mscale_all_dim"])
    return one(1.0)
