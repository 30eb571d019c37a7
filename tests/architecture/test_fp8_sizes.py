"""Which sizes FP8 forbids, by recipe, dimension and parallel size, and which ones are suggested instead."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from megatron_slim.architecture.fp8_sizes import RECIPES, fp8_sides, row_violations, size_violations
from megatron_slim.architecture.parallelism import layout_violations
from megatron_slim.testing import tiny_shape

SIXTEEN = ("delayed", "tensorwise", "blockwise")
# Every dimension is a multiple of 32 on each of 2 ranks: in_proj has 2 x 160 + 2 x 1536 + 2 x 32 = 2 x 1728 outputs.
FITTING = tiny_shape(
    hidden_size=64,
    linear_num_value_heads=32,
    linear_value_head_dim=48,
    linear_key_head_dim=80,
    kv_channels=32,
    moe_ffn_hidden_size=64,
    moe_shared_expert_intermediate_size=64,
)
PUBLISHED = tiny_shape(
    num_layers=48,
    hidden_size=2048,
    num_attention_heads=16,
    kv_channels=256,
    linear_num_key_heads=16,
    linear_num_value_heads=32,
    linear_key_head_dim=128,
    linear_value_head_dim=128,
    num_moe_experts=512,
    moe_router_topk=10,
    moe_ffn_hidden_size=512,
    moe_shared_expert_intermediate_size=512,
)


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_shape_that_every_recipe_takes(recipe: str, tp: int) -> None:
    assert size_violations(FITTING, recipe, tp=tp, etp=tp) == []


# Field, value, tensor parallel size, and the nearest values that per-tensor and blockwise scaling, and mxfp8, take.
CASES: list[tuple[str, int, int, str, str]] = [
    ("hidden_size", 72, 1, "64 or 80", "64 or 96"),
    ("hidden_size", 80, 2, "64 or 96", "64 or 128"),  # eh_proj gives each rank half of it
    ("num_attention_heads", 6, 2, "", "4 or 8"),
    ("linear_num_value_heads", 12, 1, "8 or 16", "16"),
    ("moe_ffn_hidden_size", 40, 1, "32 or 48", "32 or 64"),
    ("moe_ffn_hidden_size", 48, 2, "32 or 64", "64"),
    ("moe_shared_expert_intermediate_size", 24, 1, "16 or 32", "32"),
    ("moe_shared_expert_intermediate_size", 80, 2, "64 or 96", "64 or 128"),
]


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize(("field", "value", "tp", "sixteen", "thirty_two"), CASES)
def test_every_dimension(field: str, value: int, tp: int, sixteen: str, thirty_two: str, recipe: str) -> None:
    near = thirty_two if recipe == "mxfp8" else sixteen
    base = dataclasses.replace(FITTING, kv_channels=16) if field == "num_attention_heads" else FITTING
    shape = base.replace(**{field: value})
    found = [sentence for sentence in size_violations(shape, recipe, tp=tp, etp=tp) if f"{field} {value} " in sentence]
    if not near:
        assert not found
        return
    (sentence,) = found
    assert f": {field} {value} would have to be {near}" in sentence
    for choice in near.split(" or "):
        allowed = base.replace(**{field: int(choice)})
        assert not layout_violations(allowed, tp=tp, etp=tp)
        assert not [each for each in size_violations(allowed, recipe, tp=tp, etp=tp) if field in each]


def test_no_number_of_heads_may_do() -> None:
    """linear_proj needs a multiple of 8 heads, linear_qkv with its 2 keys and values an even one that is not of 4."""
    shape = dataclasses.replace(FITTING, kv_channels=8, num_attention_heads=6)
    assert size_violations(shape, "mxfp8", tp=2) == [
        "linear_proj has 24 inputs on each of 2 ranks, not a multiple of 32"
    ]


def test_the_published_model() -> None:
    """in_proj's beta and alpha, two outputs per value head, are what does not divide; forward alone takes more."""
    for recipe in SIXTEEN:
        assert [bool(size_violations(PUBLISHED, recipe, tp=tp)) for tp in (1, 2, 4, 8)] == [False, False, False, True]
    assert [bool(size_violations(PUBLISHED, "mxfp8", tp=tp)) for tp in (1, 2, 4)] == [False, False, True]
    assert size_violations(PUBLISHED, "tensorwise", tp=8, trained=False) == []
    assert size_violations(PUBLISHED, "tensorwise", tp=8) == [
        "in_proj of Gated DeltaNet has 1544 outputs on each of 8 ranks, not a multiple of 16: linear_num_value_heads 32"
        " would have to be 64, or tensor parallel size 4 would do"
    ]


def test_qwen3_moe_has_no_gated_delta_net_and_no_shared_expert() -> None:
    layers = {side.layer for side in fp8_sides(tiny_shape("qwen3_moe"))}
    assert layers == {"every layer", "linear_qkv", "linear_proj", "linear_fc1 of experts", "linear_fc2 of experts"}


@pytest.mark.parametrize(
    ("arguments", "options", "near"),
    [
        ((24, 1, "tensorwise"), {}, "16 or 32"),
        ((24, 2, "tensorwise"), {}, ""),
        ((24, 1, "tensorwise"), {"trained": False}, ""),
        ((48, 1, "mxfp8"), {}, "32 or 64"),
        ((48, 1, "mxfp8"), {"trained": False}, "32 or 64"),
        ((48, 1, "blockwise"), {"ranks": 4}, "32 or 64"),
        ((64, 1, "mxfp8"), {"ranks": 4}, "128"),
    ],
)
def test_tokens_of_a_micro_batch(arguments: Any, options: dict[str, Any], near: str) -> None:
    found = row_violations(*arguments, **options)
    assert [sentence.rpartition(" would have to be ")[2] for sentence in found] == ([near] if near else [])
