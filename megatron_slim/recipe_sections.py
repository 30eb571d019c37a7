"""Sections of a recipe that say what becomes of the model: their keys, and the values that these may have."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from megatron_slim.aliases import JsonObject
from megatron_slim.expert_metrics import EXPERT_IMPORTANCES, EXPERT_SIMILARITIES
from megatron_slim.recipe_budget import BOUNDS, bound_violation, is_number, unknown_keys, whole_number


@dataclass(frozen=True)
class Target:
    """Sizes of the target; None leaves the source's size as it is.

    Heads follow the groups that share a key where only the number of groups is given.
    """

    num_layers: int | None = None
    hidden_size: int | None = None
    num_moe_experts: int | None = None
    moe_router_topk: int | None = None
    moe_ffn_hidden_size: int | None = None
    moe_shared_expert_intermediate_size: int | None = None
    ffn_hidden_size: int | None = None
    num_query_groups: int | None = None
    num_attention_heads: int | None = None
    linear_num_key_heads: int | None = None
    linear_num_value_heads: int | None = None


@dataclass(frozen=True)
class Depth:
    """Which layers go: the ``last`` ones, the run that changes its input least (``adjacent_cosine``),
    or those that do so one by one (``block_influence``).

    Attributes:
        method: which go.
        pattern: kinds of the layers that are left: ``any``, or ``source``, those of its first layers in their order,
            so that a period of attention stays one.
    """

    method: str = "last"
    pattern: str = "any"


@dataclass(frozen=True)
class Width:
    """What ranks the hidden dimensions."""

    importance: str = "norm_activation"


@dataclass(frozen=True)
class Experts:
    """What becomes of the experts that do not fit into the target.

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
        allocation: ``uniform``, every layer keeps ``target.num_moe_experts``; ``loss``, so many on average, each layer
            by what its experts are worth (`pruning.allocation`).
        multiple: with ``loss``, what the number of each layer is a multiple of, such as the ranks that share experts.
    """

    method: str = "partial_preservation"
    importance: str = "soft_logits"
    similarity: str = "router_weights"
    preserve: float = 0.5
    weighting: str = "group"
    num_groups: int = 1
    align: str = "none"
    allocation: str = "uniform"
    multiple: int = 1


@dataclass(frozen=True)
class Phase:
    """Which phase of a progressive schedule a recipe is.

    Attributes:
        number: from 1.
        count: phases of the whole schedule.
        name: what a person calls it.
        tokens: that training sees after this pruning; None where the recipe does not say.
        schedule: tokens of all phases; empty where the recipe leaves those of any out.
    """

    number: int
    count: int
    name: str = ""
    tokens: int | None = None
    schedule: tuple[int, ...] = ()

    def to_dict(self) -> JsonObject:
        """As a plan records it, without what the recipe does not say."""
        return {key: value for key, value in dataclasses.asdict(self).items() if value not in (None, ())}


NORM_ACTIVATION, NORM_ACTIVATION_L2 = _HIDDEN = ("norm_activation", "norm_activation_l2")
SECTIONS: dict[str, type] = {"target": Target, "depth": Depth, "width": Width, "experts": Experts}


BOUND_KEYS = tuple(("target", bound) for bound in BOUNDS)


CHOICES: dict[str, Collection[str]] = {
    "depth.method": ("last", "adjacent_cosine", "block_influence"),
    "depth.pattern": ("any", "source"),
    "width.importance": _HIDDEN,
    "experts.method": ("prune", "merge", "partial_preservation"),
    "experts.importance": EXPERT_IMPORTANCES,
    "experts.similarity": EXPERT_SIMILARITIES,
    "experts.weighting": ("group", "pairwise"),
    "experts.align": ("none", "weights"),
    "experts.allocation": ("uniform", "loss"),
}


def section_violations(section: str, kind: type, value: object) -> list[str]:
    """What is wrong with a section as it was written.

    Args:
        section: its name.
        kind: the class that it becomes.
        value: what was written.
    """
    if not isinstance(value, Mapping):
        return [f"{section} {value!r} is not a mapping"]
    known = [part.name for part in dataclasses.fields(kind)]
    known += [key for name, key in BOUND_KEYS if name == section]
    found = unknown_keys(value, known, f"{section}.")
    for key in known:
        if key in value and (sentence := value_violation(f"{section}.{key}", value[key])):
            found.append(sentence)
    if section == "experts" and value.get("method") == "prune":
        found += [
            f"experts.{key} {value[key]!r} says how to merge, but experts.method 'prune' merges none (leave it out, or "
            f"give '{without}', or take method 'merge' or 'partial_preservation')"
            for key, without in (("weighting", Experts.weighting), ("align", Experts.align))
            if key in value and str(value[key]) in CHOICES[f"experts.{key}"] and value[key] != without
        ]
    return found


def value_violation(key: str, value: object) -> str | None:
    """What is wrong with one value, or None."""
    if tuple(key.split(".")) in BOUND_KEYS:
        return bound_violation(key, value)
    if key == "stage.name":
        return None if isinstance(value, str) else f"{key} {value!r} is not a text"
    if key == "stage.tokens":
        return None if whole_number(value) else f"{key} {value!r} is not a number of tokens (such as 40B, 2.5e9, 1000)"
    if key == "stage.schedule":
        good = isinstance(value, list | tuple) and all(type(each) is int and each > 0 for each in value)
        return None if good else f"{key} {value!r} is not a list of numbers of tokens"
    if key.startswith(("target.", "stage.")) or key in ("experts.num_groups", "experts.multiple"):
        return None if type(value) is int and value > 0 else f"{key} {value!r} is not a positive integer"
    if key == "experts.preserve":
        is_share = is_number(value) and 0 <= value < 1
        return None if is_share else f"{key} {value!r} is not a number in [0, 1)"
    if isinstance(value, str) and value in CHOICES[key]:
        return None
    close = difflib.get_close_matches(str(value), list(CHOICES[key]), n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(CHOICES[key])}"
    return f"{key} {value!r} is unknown ({hint})"
