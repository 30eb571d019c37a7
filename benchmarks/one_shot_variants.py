"""What benchmarks/one_shot.py compares: for every axis, which sizes of the target it takes and which ways there are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_slim.recipe import Recipe, parse_recipe
from megatron_slim.recipe_sections import CHOICES

ALL = "all together"
# Axis -> the sizes of a recipe's target that prune it.
TARGETS = {
    "depth": ("num_layers",),
    "width": ("hidden_size",),
    "experts": ("num_moe_experts", "moe_router_topk"),
    "expert FFN": ("moe_ffn_hidden_size",),
    "shared expert FFN": ("moe_shared_expert_intermediate_size",),
    "query heads": ("num_attention_heads",),
    "linear value heads": ("linear_num_value_heads",),
}
# Axis -> name of the variant -> the sections of its recipe other than the target.
VARIANTS: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "depth": {
        **{method: {"depth": {"method": method}} for method in CHOICES["depth.method"]},
        "block_influence, pattern of source": {"depth": {"method": "block_influence", "pattern": "source"}},
    },
    "width": {kind: {"width": {"importance": kind}} for kind in CHOICES["width.importance"]},
    "experts": {
        **{
            f"prune by {kind}": {"experts": {"method": "prune", "importance": kind}}
            for kind in CHOICES["experts.importance"]
        },
        **{
            f"{method} by {kind}": {"experts": {"method": method, "similarity": kind}}
            for method in ("merge", "partial_preservation")
            for kind in CHOICES["experts.similarity"]
        },
        "merge, pairwise weights": {"experts": {"method": "merge", "weighting": "pairwise"}},
        "merge, aligned by weights": {"experts": {"method": "merge", "align": "weights"}},
        **{
            f"{method}, allocated by loss": {"experts": {"method": method, "allocation": "loss"}}
            for method in CHOICES["experts.method"]
        },
    },
    **{axis: {"by activation": {}} for axis in list(TARGETS)[3:]},
}


@dataclass(frozen=True)
class Variant:
    """One way of pruning.

    Attributes:
        axis: what is pruned; `ALL` for the whole recipe.
        name: how.
        recipe: both.
    """

    axis: str
    name: str
    recipe: Recipe


def variants(whole: Recipe) -> Iterator[Variant]:
    """Every axis that a recipe prunes alone, in every way there is; then the recipe as it is.

    >>> whole = parse_recipe({"version": 1, "target": {"num_layers": 4}})
    >>> [variant.name for variant in variants(whole)]
    ['last', 'adjacent_cosine', 'block_influence', 'the recipe']
    """
    document = whole.to_dict()
    for axis, keys in TARGETS.items():
        target = {key: document["target"][key] for key in keys if key in document["target"]}
        if target:
            for name, sections in VARIANTS[axis].items():
                yield Variant(axis, name, parse_recipe({"version": document["version"], "target": target, **sections}))
    yield Variant(ALL, "the recipe", whole)
