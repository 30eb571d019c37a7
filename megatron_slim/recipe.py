"""The recipe: what a person wants a model to become, as a short YAML file (version 1).

A recipe names target sizes under Megatron's names and the method for each axis. It knows nothing of a particular
model: whether its target can be met is decided where the source's shape is known (`pruning.plan.check_recipe`).
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron_slim.errors import RecipeError

VERSION = 1


@dataclass(frozen=True)
class Target:
    """Sizes of the target; None leaves the source's size as it is."""

    num_layers: int | None = None
    hidden_size: int | None = None
    num_moe_experts: int | None = None
    moe_router_topk: int | None = None
    moe_ffn_hidden_size: int | None = None
    moe_shared_expert_intermediate_size: int | None = None
    num_attention_heads: int | None = None
    linear_num_value_heads: int | None = None


@dataclass(frozen=True)
class Depth:
    """Which layers go: the ``last`` ones, the run that changes its input least (``adjacent_cosine``),
    or those that do so one by one (``block_influence``).
    """

    method: str = "last"


@dataclass(frozen=True)
class Width:
    """What ranks the hidden dimensions."""

    importance: str = "norm_activation"


@dataclass(frozen=True)
class Experts:
    """What becomes of the experts that the target has no room for.

    Attributes:
        method: ``prune`` drops them, ``merge`` folds each into its nearest survivor, ``partial_preservation`` leaves
            the most important survivors untouched and merges into the others (SlimQwen, algorithm 1).
        importance: the statistic that ranks experts.
        similarity: the cosine that says which survivor is nearest.
        preserve: share of the survivors that ``partial_preservation`` leaves untouched, in [0, 1).
        weighting: how the members of a group are averaged: by importance, all at once (``group``), or one after the
            other into the base (``pairwise``, SlimQwen eq. 9; `pruning.experts.pairwise_weights`).
        num_groups: runs of equal length, by index, that experts survive and are merged within.
        align: what the hidden neurons of a member are matched with its base's by before they are averaged
            (`pruning.align`), ``none`` for leaving them where they are.
    """

    method: str = "partial_preservation"
    importance: str = "soft_logits"
    similarity: str = "router_weights"
    preserve: float = 0.5
    weighting: str = "group"
    num_groups: int = 1
    align: str = "none"


@dataclass(frozen=True)
class Recipe:
    """A whole recipe; every section but ``target`` has defaults."""

    target: Target
    depth: Depth = Depth()
    width: Width = Width()
    experts: Experts = Experts()

    def to_dict(self) -> dict[str, Any]:
        """As a version 1 document, all defaults filled in."""
        sections = dataclasses.asdict(self)
        sections["target"] = {key: value for key, value in sections["target"].items() if value is not None}
        return {"version": VERSION, **sections}


SECTIONS: dict[str, type] = {"target": Target, "depth": Depth, "width": Width, "experts": Experts}
CHOICES = {
    "depth.method": ("last", "adjacent_cosine", "block_influence"),
    "width.importance": ("norm_activation", "norm_activation_l2"),
    "experts.method": ("prune", "merge", "partial_preservation"),
    "experts.importance": ("frequency", "soft_logits", "reap", "output_norm"),
    "experts.similarity": ("router_weights", "router_logits", "expert_vectors"),
    "experts.weighting": ("group", "pairwise"),
    "experts.align": ("none", "weights"),
}


def load_recipe(path: Path) -> Recipe:
    """Read a recipe from a YAML file.

    Raises:
        RecipeError: the file is missing, is not YAML, or breaks the schema; lists every violation.
    """
    try:
        document = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except FileNotFoundError:
        raise RecipeError("no such file", where=str(path)) from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError, ValueError) as error:
        raise RecipeError(f"not readable as YAML ({error})", where=str(path)) from None
    return parse_recipe(document, where=str(path))


def parse_recipe(document: Any, *, where: str = "recipe") -> Recipe:
    """Check a parsed recipe against the schema.

    Raises:
        RecipeError: lists every violation.
    """
    if not isinstance(document, Mapping):
        kind = type(document).__name__
        raise RecipeError(f"a recipe is a mapping, not {kind}", where=where, fix="start it with 'version: 1'")
    found = _version_violations(document)
    found += _unknown_keys(document, ["version", *SECTIONS], "")
    if "target" not in document:
        found.append("target is missing")
    for section, schema in SECTIONS.items():
        if section in document:
            found += _section_violations(section, schema, document[section])
    if found:
        raise RecipeError("; ".join(found), where=where)
    return Recipe(**{section: kind(**document[section]) for section, kind in SECTIONS.items() if section in document})


def _version_violations(document: Mapping[Any, Any]) -> list[str]:
    if "version" not in document:
        return [f"version is missing (this release reads version {VERSION})"]
    version = document["version"]
    supported = type(version) is int and version == VERSION
    return [] if supported else [f"version {version!r} is not supported (this release reads version {VERSION})"]


def _unknown_keys(mapping: Mapping[Any, Any], known: list[str], prefix: str) -> list[str]:
    found = []
    for key in mapping:
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"
            found.append(f"unknown key {prefix}{key} ({hint})")
    return found


def _section_violations(section: str, kind: type, value: Any) -> list[str]:
    if not isinstance(value, Mapping):
        return [f"{section} {value!r} is not a mapping"]
    known = [field.name for field in dataclasses.fields(kind)]
    found = _unknown_keys(value, known, f"{section}.")
    for key in known:
        if key in value and (sentence := _value_violation(f"{section}.{key}", value[key])):
            found.append(sentence)
    if section == "experts" and value.get("method") == "prune":
        found += [
            f"experts.{key} {value[key]!r} says how to merge, but experts.method 'prune' merges none (leave it out, or "
            "take method 'merge' or 'partial_preservation')"
            for key, without in (("weighting", Experts.weighting), ("align", Experts.align))
            if key in value and value[key] in CHOICES[f"experts.{key}"] and value[key] != without
        ]
    return found


def _value_violation(key: str, value: Any) -> str | None:
    """What is wrong with one value, or None."""
    if key.startswith("target.") or key == "experts.num_groups":
        return None if type(value) is int and value > 0 else f"{key} {value!r} is not a positive integer"
    if key == "experts.preserve":
        is_share = type(value) in (int, float) and math.isfinite(value) and 0 <= value < 1
        return None if is_share else f"{key} {value!r} is not a number in [0, 1)"
    if value in CHOICES[key]:
        return None
    close = difflib.get_close_matches(str(value), CHOICES[key], n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(CHOICES[key])}"
    return f"{key} {value!r} is unknown ({hint})"


class _Loader(yaml.SafeLoader):
    """A safe loader that refuses a key given twice, which YAML's own lets the last one win."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = key_node.value
            if isinstance(key, str) and key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"duplicate key {key!r}", key_node.start_mark)
            if isinstance(key, str):
                seen.add(key)
        return super().construct_mapping(node, deep)
