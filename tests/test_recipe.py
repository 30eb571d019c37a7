"""Recipes: the schema, its errors, and the recipes that are shipped."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path

import numpy as np
import pytest

from megatron_slim.architecture.hf_config import shape_from_hf_config
from megatron_slim.architecture.kinds import KINDS
from megatron_slim.architecture.published import GLM_4_5_AIR, QWEN3_5_35A3B
from megatron_slim.architecture.shape import FAMILIES, ModelShape, layer_pattern, unused_fields
from megatron_slim.architecture.table import count_parameters
from megatron_slim.errors import RecipeError
from megatron_slim.pruning.elastic_plans import check_budgets
from megatron_slim.pruning.recipe_checks import check_recipe, space_before_statistics
from megatron_slim.pruning.search import search
from megatron_slim.pruning.statistics import Statistics, expected_shapes
from megatron_slim.pruning.target import target_shape
from megatron_slim.recipe import Recipe, load_recipe, parse_recipe, select_phase
from megatron_slim.recipe_budget import SEARCHABLE, Search
from megatron_slim.recipe_sections import Depth, Experts, Phase, Target

RECIPES = Path(__file__).parents[1] / "examples" / "slimqwen" / "recipes"
ISSUE_RECIPE = """
version: 1
target: {num_layers: 36, hidden_size: 1536, num_moe_experts: 256, moe_router_topk: 8}
depth: {method: last}                    # last | adjacent_cosine
width: {importance: norm_activation}
experts: {method: partial_preservation,  # prune | merge | partial_preservation
          importance: soft_logits,       # frequency | soft_logits | reap
          similarity: router_weights,    # router_weights | router_logits | expert_vectors
          preserve: 0.5}
"""


def teacher(**changes: object) -> ModelShape:
    """Qwen3-Next-80A3B."""
    sizes: dict[str, object] = {
        "model_type": "qwen3_next",
        "num_layers": 48,
        "hidden_size": 2048,
        "vocab_size": 151936,
        "num_attention_heads": 16,
        "num_query_groups": 2,
        "kv_channels": 256,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 32,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "linear_conv_kernel_dim": 4,
        "num_moe_experts": 512,
        "moe_router_topk": 10,
        "moe_ffn_hidden_size": 512,
        "moe_shared_expert_intermediate_size": 512,
        "mtp_num_layers": 1,
        "rotary_base": 1e7,
        "rotary_percent": 0.25,
        "max_position_embeddings": 262144,
        "layernorm_epsilon": 1e-6,
        "norm_topk_prob": True,
        **changes,
    }
    return ModelShape(layer_types=layer_pattern(sizes["num_layers"], 4), **sizes)  # type: ignore[arg-type]


def moe_teacher() -> ModelShape:
    """Qwen3-30B-A3B."""
    return ModelShape(
        model_type="qwen3_moe",
        num_layers=48,
        layer_types=layer_pattern(48, 1),
        hidden_size=2048,
        vocab_size=151936,
        num_attention_heads=32,
        num_query_groups=4,
        kv_channels=128,
        num_moe_experts=128,
        moe_router_topk=8,
        moe_ffn_hidden_size=768,
        mtp_num_layers=0,
        rotary_base=1e6,
        max_position_embeddings=40960,
        layernorm_epsilon=1e-6,
        norm_topk_prob=True,
        **unused_fields(FAMILIES["qwen3_moe"]),
    )


def demo_teacher() -> ModelShape:
    """The teacher that `make demo` trains."""
    config = json.loads((RECIPES.parent / "demo_teacher" / "config.json").read_text())
    return shape_from_hf_config(config, mtp_num_layers=1)


def load(text: str, tmp_path: Path) -> Recipe:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return load_recipe(path)


def test_documented_recipe_reads_back(tmp_path: Path) -> None:
    recipe = load(ISSUE_RECIPE, tmp_path)
    assert recipe == Recipe(Target(36, 1536, 256, 8))
    assert parse_recipe(recipe.to_dict()) == recipe


FIXED = ({}, {"num_layers": 4}, {"num_layers": 4, "hidden_size": 64}, dict.fromkeys(Search.axes, 4))
SEARCHES = (
    {},
    {"grid": {"moe_ffn_hidden_size": [8, 16]}, "axes": ["moe_ffn_hidden_size"]},
    {"grid": {"num_moe_experts": [2]}},
)


@pytest.mark.parametrize("sizes", FIXED)
@pytest.mark.parametrize("search", SEARCHES)
def test_a_budget_reads_back_with_any_sizes(sizes: dict[str, int], search: dict[str, object]) -> None:
    """A plan records the recipe with all defaults, which name no size that the target gives."""
    if "num_moe_experts" in sizes and search == SEARCHES[-1]:
        search = {}  # which would name it
    recipe = parse_recipe({"version": 1, "target": {"params": "1B", **sizes}, "search": search})
    document = json.loads(json.dumps(recipe.to_dict()))
    assert parse_recipe(document) == recipe and not {*recipe.search.axes} & sizes.keys()


def test_what_a_recipe_leaves_out_has_defaults() -> None:
    recipe = parse_recipe({"version": 1, "target": {"num_layers": 3}, "depth": {"method": "adjacent_cosine"}})
    assert recipe == Recipe(Target(num_layers=3), Depth("adjacent_cosine"), experts=Experts())
    assert recipe.to_dict()["target"] == {"num_layers": 3}


BAD = {
    "- 1": "a recipe is a mapping, not list",
    "": "a recipe is a mapping, not NoneType",
    "version: 1": "target is missing",
    "target: {}": "version is missing (this release reads version 1)",
    "version: 2\ntarget: {}": "version 2 is not supported (this release reads version 1)",
    "version: '1'\ntarget: {}": "version '1' is not supported",
    "version: true\ntarget: {}": "version True is not supported",
    "version: 1\ntarget: {num_layer: 3}": "unknown key target.num_layer (did you mean 'num_layers'?)",
    "version: 1\ntarget: {}\nexpert: {}": "unknown key expert (did you mean 'experts'?)",
    "version: 1\ntarget: {}\n7: {}": "unknown key 7 (known: version, target, depth, width, experts, search,",
    "version: 1\ntarget: 5": "target 5 is not a mapping",
    "version: 1\ntarget: {}\ndepth:": "depth None is not a mapping",
    "version: 1\ntarget: {num_layers: '3'}": "target.num_layers '3' is not a positive integer",
    "version: 1\ntarget: {num_layers: true}": "target.num_layers True is not a positive integer",
    "version: 1\ntarget: {hidden_size: 0}": "target.hidden_size 0 is not a positive integer",
    "version: 1\ntarget: {hidden_size: 48.0}": "target.hidden_size 48.0 is not a positive integer",
    "version: 1\ntarget: {}\nexperts: {method: merges}": "experts.method 'merges' is unknown (did you mean 'merge'?)",
    "version: 1\ntarget: {}\nexperts: {importance: [reap]}": "experts.importance ['reap'] is unknown",
    "version: 1\ntarget: {}\nexperts: {preserve: 1}": "experts.preserve 1 is not a number in [0, 1)",
    "version: 1\ntarget: {}\nexperts: {preserve: .nan}": "experts.preserve nan is not a number in [0, 1)",
    "version: 1\ntarget: {}\nexperts: {weightings: group}": "experts.weightings (did you mean 'weighting'?)",
    "version: 1\ntarget: {}\nexperts: {num_groups: 0}": "experts.num_groups 0 is not a positive integer",
    "version: 1\ntarget: {}\nexperts: {num_groups: true}": "experts.num_groups True is not a positive integer",
    "version: 1\ntarget: {}\nexperts: {align: weight}": "experts.align 'weight' is unknown (did you mean 'weights'?)",
    "version: 1\ntarget: {}\nexperts: {method: prune, align: weights}": "experts.align 'weights' says how to merge",
    "version: 1\ntarget: {}\nexperts: {method: prune, weighting: pairwise}": "but experts.method 'prune' merges none",
    "version: 1\nversion: 1\ntarget: {}": "duplicate key 'version'",
    "version: 1\ntarget: {num_layers: 3, num_layers: 4}": "duplicate key 'num_layers'",
    "version: [1": "not readable as YAML",
    "version: 1\ntarget: !!python/object/apply:os.getcwd []": "not readable as YAML",
}


@pytest.mark.parametrize("text", BAD)
def test_each_error_has_its_one_line(text: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        load(text, tmp_path)
    message = str(caught.value)
    assert BAD[text] in message
    assert "recipe.yaml" in message and "\n" not in message


def test_all_errors_at_once(tmp_path: Path) -> None:
    text = "version: 3\ntarget: {num_layer: 3, hidden_size: -1}\nwidth: {importance: norm}\nexperts: {preserve: 2}\n"
    with pytest.raises(RecipeError) as caught:
        load(text, tmp_path)
    for part in ("version 3", "target.num_layer ", "target.hidden_size -1", "width.importance", "experts.preserve 2"):
        assert part in str(caught.value)


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"[" * 100_000], ids=["no text", "very deep"])
def test_what_is_not_yaml_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    with pytest.raises(RecipeError, match="not readable as YAML"):
        load_recipe(path)
    with pytest.raises(RecipeError, match="no such file"):
        load_recipe(tmp_path / "none.yaml")
    with pytest.raises(RecipeError, match="is a directory"):
        load_recipe(tmp_path)


def test_impossible_targets_are_all_listed() -> None:
    recipe = parse_recipe(
        {
            "version": 1,
            "target": {"num_layers": 64, "hidden_size": 4096, "num_moe_experts": 8, "moe_router_topk": 9},
        }
    )
    with pytest.raises(RecipeError) as caught:
        check_recipe(recipe, teacher(), where="r.yaml")
    for part in (
        "r.yaml: ",
        "target.num_layers 64 is larger than the source's 48",
        "target.hidden_size 4096 is larger than the source's 2048",
        "moe_router_topk 9 is larger than num_moe_experts 8",
    ):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("target", "depth", "message"),
    [
        ({"num_moe_experts": 8}, "last", "moe_router_topk 10 is larger than num_moe_experts 8 of the target"),
        ({"hidden_size": 1540}, "last", "target.hidden_size 1540 is not a multiple of 8"),
        ({"num_layers": 3}, "last", "target.num_layers 3 leaves no full_attention layer"),
        ({"moe_router_topk": 1}, "last", "moe_router_topk 1 with norm_topk_prob"),
    ],
)
def test_impossible_target(target: dict[str, int], depth: str, message: str) -> None:
    recipe = parse_recipe({"version": 1, "target": target, "depth": {"method": depth}})
    with pytest.raises(RecipeError, match=message):
        check_recipe(recipe, teacher())


@pytest.mark.parametrize(("groups", "experts"), [(3, 256), (64, 96), (1024, 256)])
def test_expert_groups_divide_source_and_target(groups: int, experts: int) -> None:
    document = {"version": 1, "target": {"num_moe_experts": experts}, "experts": {"num_groups": groups}}
    message = f"num_groups {groups} does not divide both num_moe_experts 512 of the source and {experts} of the target"
    with pytest.raises(RecipeError, match=message):
        check_recipe(parse_recipe(document), teacher())
    check_recipe(parse_recipe({**document, "experts": {"num_groups": 32}}), teacher())


def test_adjacent_cosine_may_keep_three_layers_of_which_one_is_full_attention() -> None:
    recipe = parse_recipe({"version": 1, "target": {"num_layers": 3}, "depth": {"method": "adjacent_cosine"}})
    check_recipe(recipe, teacher())


SCHEDULE = """
version: 1
phases:
  - {name: depth, tokens: 40B, target: {num_layers: 42}}
  - {tokens: 3.6e11, target: {hidden_size: 1536}, experts: {method: merge}}
experts: {importance: reap}
"""


def test_a_phase_takes_from_the_recipe_what_it_leaves_out(tmp_path: Path) -> None:
    recipe = load(SCHEDULE, tmp_path)
    first, second = select_phase(recipe, 1), select_phase(recipe, 2)
    schedule = (40_000_000_000, 360_000_000_000)
    phase = Phase(1, 2, "depth", schedule[0], schedule)
    assert first == Recipe(Target(num_layers=42), experts=Experts(importance="reap"), phase=phase)
    assert second.experts == Experts("merge", "reap") and second.phase == Phase(2, 2, "", schedule[1], schedule)
    assert all(parse_recipe(json.loads(json.dumps(phase.to_dict()))) == phase for phase in recipe.phases)


def test_a_schedule_of_which_one_phase_has_no_tokens_is_not_recorded(tmp_path: Path) -> None:
    recipe = load(SCHEDULE.replace("tokens: 3.6e11", "name: rest"), tmp_path)
    assert [phase.phase for phase in recipe.phases] == [Phase(1, 2, "depth", 40_000_000_000), Phase(2, 2, "rest")]


def test_the_old_key_of_phases_is_read_with_a_notice(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    recipe = load(SCHEDULE, tmp_path)
    assert not caplog.records
    old = load(SCHEDULE.replace("phases:", "stages:"), tmp_path)
    assert old == recipe and len(caplog.messages) == 1
    assert caplog.messages[0].endswith(".yaml: the key 'stages' is now called 'phases'; both are read")


@pytest.mark.parametrize("number", [None, 3])
def test_a_schedule_needs_a_phase_that_it_has(number: int | None, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"2.*give --phase 1 to 2"):
        select_phase(load(SCHEDULE, tmp_path), number)


def test_a_recipe_without_phases_has_none_to_select() -> None:
    recipe = parse_recipe({"version": 1, "target": {}})
    assert select_phase(recipe, None) is recipe
    with pytest.raises(RecipeError, match="--phase 1, but the recipe has no phases"):
        select_phase(recipe, 1)


BAD_PHASES = {
    "stages: 5": "phases 5 is not a list of phases",
    "stages: []\nphases: []": "stages and phases exclude one another",
    "phases: 5": "phases 5 is not a list of phases",
    "phases: []": "phases [] is not a list of phases",
    "phases: [7]": "phase 1: 7 is not a mapping",
    "target: {}\nphases: [{target: {}}]": "target and phases exclude one another",
    "target: {}\nstage: 5": "stage 5 is not a mapping",
    "target: {}\nstage: {number: 1}": "stage.count is missing",
    "target: {}\nstage: {number: 3, count: 2}": "stage.number 3 is larger than stage.count 2",
    "target: {}\nstage: {number: 1, count: 2, schedule: 4B}": "stage.schedule '4B' is not a list of numbers of tokens",
    "target: {}\nstage: {number: 1, count: 2, tokens: 5, schedule: [6, 5]}": "stage.schedule [6, 5] is not that of 2",
    "target: {}\nstage: {number: 1, count: 2, tokens: 5, schedule: [5]}": "stage.schedule [5] is not that of 2 phases",
    "phases: [{tokens: 1B}]": "phase 1: target is missing",
    "phases: [{target: {}, token: 1B}]": "phase 1: unknown key token (did you mean 'tokens'?)",
    "phases: [{target: {}, tokens: 40 B}]": "phase 1: tokens '40 B' is not a number of tokens",
    "phases: [{target: {}, tokens: 0}]": "phase 1: tokens 0 is not a number of tokens",
    "phases: [{target: {}, tokens: 0.5}]": "phase 1: tokens 0.5 is not a number of tokens",
    "phases: [{target: {}, tokens: true}]": "phase 1: tokens True is not a number of tokens",
    "phases: [{target: {}, name: 3}]": "phase 1: name 3 is not a text",
    "phases: [{target: {}, experts: {method: merges}}]": "phase 1: experts.method 'merges' is unknown",
    "experts: {align: weights}\nphases: [{target: {}}, {target: {}, experts: {method: prune}}]": (
        "phase 2: experts.align 'weights' says how to merge, but experts.method 'prune' merges none (leave it out, or "
        "give 'none', or take"
    ),
    "experts: {method: prune}\nphases: [{target: {}, experts: {weighting: pairwise}}]": (
        "phase 1: experts.weighting 'pairwise' says how to merge, but experts.method 'prune' merges none"
    ),
}


@pytest.mark.parametrize("text", BAD_PHASES)
def test_each_error_of_a_phase_has_its_line(text: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        load(f"version: 1\n{text}\n", tmp_path)
    assert BAD_PHASES[text] in str(caught.value) and "\n" not in str(caught.value)


def test_phases_never_grow_and_all_that_do_are_listed() -> None:
    sizes = ({"num_layers": 40, "hidden_size": 1536}, {}, {"num_layers": 42, "hidden_size": 1792}, {"num_layers": 41})
    with pytest.raises(RecipeError) as caught:
        parse_recipe({"version": 1, "phases": [{"target": target} for target in sizes]})
    for part in (
        "phase 3: target.num_layers 42 is larger than the 40 of phase 1",
        "phase 3: target.hidden_size 1792 is larger than the 1536 of phase 1",
        "phase 4: target.num_layers 41 is larger than the 40 of phase 1",
    ):
        assert part in str(caught.value)


# Parameters and active parameters of every phase, MTP left out, in billions; the last ones are SlimQwen's (table 6, and
# its text where they differ).
BUDGET = "qwen3_next_80a3b_budget_23b.yaml"
SHIPPED: dict[str, tuple[ModelShape, list[tuple[float, float]]]] = {
    "qwen3_next_80a3b_to_23a2b.yaml": (teacher(), [(23.2, 2.1)]),
    "qwen3_next_80a3b_to_23a2b_depth_first.yaml": (teacher(), [(69.8, 3.5), (23.2, 2.1)]),
    "qwen3_next_80a3b_to_23a2b_width_first.yaml": (teacher(), [(52.8, 3.2), (23.2, 2.1)]),
    "qwen3_next_80a3b_to_23a2b_joint.yaml": (teacher(), [(46.3, 2.9), (23.2, 2.1)]),
    "qwen3_next_80a3b_to_24a2b.yaml": (teacher(), [(24.2, 2.3)]),
    "slimqwen_24a2b_to_6a1b.yaml": (teacher(num_layers=28, num_moe_experts=256, moe_router_topk=8), [(5.9, 1.1)]),
    "qwen3_moe_30a3b_to_9a2b.yaml": (moe_teacher(), [(9.1, 2.0)]),
    "qwen3_5_35a3b_to_19a3b.yaml": (QWEN3_5_35A3B.shape, [(18.8, 2.6)]),
    "qwen3_5_35a3b_to_11a2b.yaml": (QWEN3_5_35A3B.shape, [(11.3, 2.2)]),
    "glm_4_5_air_106a13b_to_62a10b.yaml": (GLM_4_5_AIR.shape, [(62.3, 10.3)]),
    "glm_4_5_air_106a13b_to_29a6b.yaml": (GLM_4_5_AIR.shape, [(29.0, 6.5)]),
    "demo.yaml": (demo_teacher(), []),
    "demo_every_axis.yaml": (demo_teacher(), []),
    "demo_elastic.yaml": (demo_teacher(), []),
    BUDGET: (teacher(), []),
}


def by_hand(shape: ModelShape, experts: int) -> int:
    """Parameters of Qwen3-Next without MTP, written out, with so many routed experts in a layer."""
    h, f, s = shape.hidden_size, shape.moe_ffn_hidden_size, shape.moe_shared_expert_intermediate_size
    moe = shape.num_moe_experts * h + experts * 3 * h * f + 3 * h * s + h + 2 * h
    full = (2 * 16 * 256 + 2 * 2 * 256 + 16 * 256) * h + 2 * 256
    mixed = 2 * 16 * 128 + 32 * 128  # queries, keys, values
    linear = (mixed + 32 * 128 + 2 * 32) * h + 4 * mixed + 2 * 32 + 128 + 32 * 128 * h
    full_layers = sum((layer + 1) % 4 == 0 for layer in range(shape.num_layers))
    layers = full_layers * full + (shape.num_layers - full_layers) * linear + shape.num_layers * moe
    return layers + 2 * 151936 * h + h


def test_every_shipped_recipe_is_tested() -> None:
    assert sorted(SHIPPED) == sorted(path.name for path in RECIPES.parent.parent.rglob("*.yaml"))


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_recipe(name: str) -> None:
    """Every phase can become what it names of what the phase before it gave, down to the paper's sizes."""
    shape, expected = SHIPPED[name]
    recipe, billions = load_recipe(RECIPES / name), []
    if recipe.budgets:
        check_budgets(recipe.budgets, shape, where=name)
        return
    for phase in recipe.phases or (recipe,):
        check_recipe(phase, shape)
        shape = target_shape(phase, shape, tuple(range(phase.target.num_layers or shape.num_layers)))
        counted = count_parameters(shape, include_mtp=False)
        billions.append((round(counted.total / 1e9, 1), round(counted.active / 1e9, 1)))
        if shape.model_type == "qwen3_next" and expected:
            assert counted.total == by_hand(shape, shape.num_moe_experts)
            assert counted.active == by_hand(shape, shape.moe_router_topk)
            assert shape.full_attention_interval == 4
    assert billions == expected or not expected
    assert [phase.phase.tokens for phase in recipe.phases if phase.phase] == [40 * 10**9, 360 * 10**9][
        : len(recipe.phases)
    ]


def test_the_shipped_budget_is_met_in_seconds() -> None:
    """Of random statistics; the score needs no similarities and, as no neuron goes, no neurons' importances."""
    recipe, shape, rng = load_recipe(RECIPES / BUDGET), teacher(), np.random.default_rng(0)
    needed = [item for item in expected_shapes(shape) if ".ffn" not in item[0] and "similarity" not in item[0]]
    stats = Statistics({key: np.asarray(rng.random(size), dtype=np.float32) for key, size in needed}, {})
    started = time.monotonic()
    space = space_before_statistics(recipe, shape)
    found = search(space, stats, lambda count: tuple(range(count)))
    assert time.monotonic() - started < 30
    best = space.model(found.candidates[0].sizes)
    assert 22.0e9 < by_hand(best, best.num_moe_experts) <= 23.5e9 and by_hand(best, 8) <= 2.2e9
    assert found.count > 3 and best.moe_router_topk == 8 and best.full_attention_interval == 4


def test_a_target_names_every_axis_that_kinds_declare() -> None:
    groups = {kind.heads.groups_field for kind in KINDS.values()}
    assert {part.name for part in dataclasses.fields(Target)} == {*SEARCHABLE, *groups, "moe_router_topk"}


ELASTIC = {
    "version": 1,
    "source": "SlimQwen-24A2B",
    "experts": {"importance": "reap"},
    "search": {"axes": ["num_layers"]},
    "budgets": [
        {"name": "full"},
        {"name": "half.1", "weight": 2, "target": None, "experts": {"num_groups": 2}},
        {"name": "small", "target": {"params": "9B", "hidden_size": 1024}, "depth": {"method": "block_influence"}},
    ],
}


def test_budgets_are_recipes_by_name() -> None:
    recipe = parse_recipe(ELASTIC)
    assert [(each.name, each.weight) for each in recipe.budgets] == [("full", 1.0), ("half.1", 2.0), ("small", 1.0)]
    full, half, small = (each.recipe for each in recipe.budgets)
    assert full.target == half.target == Target() and full.budget is None
    assert full.experts == Experts(method="prune", importance="reap")
    assert half.experts == Experts(method="prune", importance="reap", num_groups=2)
    assert small.target == Target(hidden_size=1024) and small.depth == Depth("block_influence")
    assert small.budget is not None and small.budget.params == 9 * 10**9 and small.search.axes == ("num_layers",)
    assert parse_recipe(small.to_dict()) == small and small.source == "SlimQwen-24A2B"


def test_only_pruning_follows_budgets() -> None:
    message = r"r\.yaml: the recipe has budgets, for an elastic checkpoint; give the recipe to megatron-slim prune"
    for number in (None, 1):
        with pytest.raises(RecipeError, match=message):
            select_phase(parse_recipe(ELASTIC), number, where="r.yaml")


BAD_BUDGETS = {
    "{}": "budgets {} is not a list of budgets",
    "[]": "budgets [] is not a list of budgets",
    "[3]": "budget 1: 3 is not a mapping",
    "[{target: {num_layers: 2}}]": "budget 1: name is missing",
    "[{name: a/b}]": "budget 1: name 'a/b' is not made of letters, digits",
    "[{name: ..}]": "budget 1: name '..' is not made of",
    "[{name: 3}]": "budget 1: name 3 is not made of",
    "[{name: a}, {name: b}, {name: a}]": "budgets: name 'a' is there 2 times",
    "[{name: a, weight: 0}]": "budget a: weight 0 is not a finite number above zero",
    "[{name: a, weight: .inf}]": "budget a: weight inf is not a finite number above zero",
    "[{name: a, weight: true}]": "budget a: weight True is not",
    "[{name: a, tokens: 4}]": "budget a: unknown key tokens",
    "[{name: a, target: {layers: 4}}]": "budget a: unknown key target.layers",
    "[{name: a, target: 4}]": "budget a: target 4 is not a mapping",
    "[{name: a, experts: {method: merge}}]": "budget a: experts.method 'merge': a merged expert is a new value",
    "[{name: a, experts: {align: weights}}]": "budget a: experts.align 'weights' is for merging",
    "[{name: a, experts: {weighting: pairwise}}]": "budget a: experts.weighting 'pairwise' is for merging",
    "[{name: a, search: {axes: [num_layers]}}]": "budget a: search without a bound",
    "[{name: a, search: 3}]": "budget a: search 3 is not a mapping",
    "[{name: a, target: {hidden_size: 8}}, {name: b, target: {hidden_size: 16}}]": (
        "budget b: target.hidden_size 16 is larger than the 8 of budget a"
    ),
    "[{name: a, target: {moe_router_topk: 2}}, {name: b}, {name: c, target: {moe_router_topk: 4}}]": (
        "budget c: target.moe_router_topk 4 is larger than the 2 of budget a"
    ),
    "[{name: a, target: {params: 9B}}, {name: b, target: {params: 10e9}}]": (
        "budget b: target.params 10000000000 is larger than the 9000000000 of budget a"
    ),
    "[{name: a}]\ntarget: {num_layers: 2}": "target and budgets exclude one another",
    "[{name: a}]\nphases: [{target: {num_layers: 2}}]": "phases and budgets exclude one another",
    "[{name: a}]\nstages: [{target: {num_layers: 2}}]": "phases and budgets exclude one another",
    "[{name: a}]\nstage: {number: 1, count: 1}": "stage and budgets exclude one another",
    "[{name: a}]\nsearch: {axes: [num_layers]}": "search without a bound (params, active_params, memory_gb) in the",
    "[{name: a}]\nsearch: 3": "search 3 is not a mapping",
    "[{name: a}]\nexperts: {method: partial_preservation}": "budget a: experts.method 'partial_preservation'",
    "[{name: a}]\nexperts: 3": "experts 3 is not a mapping",
}


@pytest.mark.parametrize("budgets", BAD_BUDGETS)
def test_budgets_that_are_none(budgets: str, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(f"version: 1\nbudgets: {budgets}\n")
    with pytest.raises(RecipeError) as raised:
        load_recipe(tmp_path / "r.yaml")
    assert BAD_BUDGETS[budgets] in str(raised.value)


def test_all_violations_of_budgets_are_in_one_line() -> None:
    budgets = [{"name": "a", "weight": -1, "experts": {"method": "merge"}}, {"target": {"num_layers": 0}}]
    with pytest.raises(RecipeError) as raised:
        parse_recipe({"version": 1, "budgets": budgets, "target": {}, "more": 1})
    for part in (
        "unknown key more",
        "target and budgets",
        "budget a: weight -1",
        "budget a: experts.method",
        "num_layers 0",
    ):
        assert part in str(raised.value)


def test_sizes_that_divide_one_another_are_searched_as_such() -> None:
    """GLM's shared expert is a multiple of a routed one's; what cannot be built would be found after calibration."""
    shape = GLM_4_5_AIR.shape
    for axis in ("moe_ffn_hidden_size", "moe_shared_expert_intermediate_size"):
        recipe = parse_recipe({"version": 1, "target": {"params": "107B"}, "search": {"axes": [axis]}})
        check_recipe(recipe, shape)
        space = space_before_statistics(recipe, shape)
        sizes = space.grid[axis]
        assert len(sizes) > (axis == "moe_ffn_hidden_size") and sizes[-1] == getattr(shape, axis)
        assert [space.model({axis: size}).violations() for size in sizes] == [[]] * len(sizes)
    both = parse_recipe(
        {
            "version": 1,
            "target": {"params": "90B"},
            "search": {"axes": ["moe_ffn_hidden_size", "moe_shared_expert_intermediate_size"]},
        }
    )
    with pytest.raises(RecipeError, match="the one is a multiple of the other \\(leave one out\\)"):
        check_recipe(both, shape)


def test_experts_by_loss_and_named_sizes_of_another_axis() -> None:
    """The number of experts on average is searched, too."""
    document = {"version": 1, "target": {"params": "40B"}, "experts": {"method": "prune", "allocation": "loss"}}
    check_recipe(parse_recipe({**document, "search": {"grid": {"hidden_size": [1024, 1536, 2048]}}}), teacher())
    with pytest.raises(RecipeError, match=r"search\.grid\.hidden_size 4096: target\.hidden_size 4096 is larger"):
        check_recipe(parse_recipe({**document, "search": {"grid": {"hidden_size": [1024, 4096]}}}), teacher())
