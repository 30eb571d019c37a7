"""What one-shot pruning costs, measured in memory, against the tools that write every checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from benchmarks.models import write_statistics
from benchmarks.one_shot_variants import ALL, TARGETS, variants
from megatron_slim.recipe import parse_recipe
from megatron_slim.recipe_sections import CHOICES
from megatron_slim.testing import tiny_shape, write_tiny_checkpoint

ONE_SHOT = "benchmarks/one_shot.py"
TARGET = {
    "num_layers": 5,
    "hidden_size": 48,
    "num_moe_experts": 4,
    "moe_router_topk": 2,
    "moe_ffn_hidden_size": 24,
    "moe_shared_expert_intermediate_size": 24,
    "num_attention_heads": 2,
    "linear_num_value_heads": 2,
}
RECIPE = {"version": 1, "target": TARGET}
Tool = Callable[..., Any]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model of eight layers, statistics, a recipe and tokens."""
    path = tmp_path_factory.mktemp("one-shot")
    write_tiny_checkpoint(path / "model", tiny_shape(num_layers=8, num_moe_experts=8))
    write_statistics(path / "model", path / "stats.safetensors")
    (path / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    np.save(path / "tokens.npy", np.random.default_rng(0).integers(0, 128, (4, 16)).astype(np.int32))
    return path


def options(work: Path) -> tuple[object, ...]:
    recipe = ("--recipe", work / "recipe.yaml", "--validation-data", work / "tokens.npy", "--json")
    return ("--load", work / "model", *recipe)


def test_every_method_of_a_recipe_is_compared() -> None:
    found = list(variants(parse_recipe(RECIPE)))
    for key, choices in CHOICES.items():
        section, name = key.split(".")
        used = {getattr(getattr(variant.recipe, section), name) for variant in found}
        assert used == set(choices)
    assert {variant.axis for variant in found} == {*TARGETS, ALL}
    assert len({(variant.axis, variant.name) for variant in found}) == len(found) == 26
    depth = next(variant for variant in found if variant.axis == "depth")
    assert depth.recipe.to_dict()["target"] == {"num_layers": 5}


@pytest.mark.slow
def test_losses_are_those_of_the_tools(tool: Tool, work: Path, tmp_path: Path) -> None:
    """The source and every variant: the same plans, and losses of checkpoints that were written and read."""
    outcome = tool(ONE_SHOT, *options(work), "--stats", work / "stats.safetensors", "--save", tmp_path / "table.md")
    assert outcome.code == 0, outcome.stderr
    assert "3 variants allocate experts by loss, which needs --calibration-data: left out" in outcome.stderr
    results = outcome.json
    assert [line for line in outcome.stderr.splitlines() if line.startswith("[24/24] all together")]
    table = (tmp_path / "table.md").read_text()
    assert table in outcome.stdout and table.count("\n|") == 2 + 24
    assert len(results["variants"]) == 23
    evaluate = ("tools/evaluate.py", "--data", work / "tokens.npy", "--micro-batch-size", 4, "--json", "--load")
    source = tool(*evaluate, work / "model").json
    assert (results["source"]["loss"], results["source"]["mtp_loss"]) == (source["loss"], source["mtp_loss"])
    for row in (results["variants"][0], results["variants"][10], results["variants"][-1]):
        name = tmp_path / row["plan_sha256"]
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(row["recipe"]))
        given = ("--recipe", tmp_path / "recipe.yaml", "--stats", work / "stats.safetensors")
        pruned = tool("tools/prune_checkpoint.py", "--load", work / "model", *given, "--save", name, "--json").json
        assert (pruned["plan_sha256"], pruned["after"]["parameters"]) == (row["plan_sha256"], row["parameters"])
        written = tool(*evaluate, name).json
        assert (row["loss"], row["mtp_loss"]) == (written["loss"], written["mtp_loss"])
        assert f"{row['loss']:.4f} | {row['loss'] - source['loss']:+.4f}" in table


def test_statistics_may_be_measured_once_for_all(tool: Tool, work: Path, tmp_path: Path) -> None:
    data = ("--calibration-data", work / "tokens.npy")
    measured = tool(ONE_SHOT, *options(work), *data, "--only", "width").json
    assert (
        tool("tools/calibrate.py", "--load", work / "model", *data, "--save", tmp_path / "stats.safetensors").code == 0
    )
    read = tool(ONE_SHOT, *options(work), "--stats", tmp_path / "stats.safetensors", "--only", "width").json
    for results in (measured, read):
        del results["seconds"]
    assert measured == read
    assert [row["variant"] for row in read["variants"]] == list(CHOICES["width.importance"])


@pytest.mark.slow
def test_allocation_by_loss_is_measured_on_calibration_data(tool: Tool, work: Path) -> None:
    data = ("--calibration-data", work / "tokens.npy", "--only", "experts")
    rows = tool(ONE_SHOT, *options(work), *data).json["variants"]
    found = {row["variant"]: row for row in rows}
    for method in CHOICES["experts.method"]:
        assert found[f"{method}, allocated by loss"]["parameters"] == rows[0]["parameters"]
    assert len({row["plan_sha256"] for row in rows}) == len(rows)


def test_bad_input_is_one_line(tool: Tool, work: Path, tmp_path: Path) -> None:
    stats = ("--stats", work / "stats.safetensors")
    assert "nothing to plan from" in tool(ONE_SHOT, *options(work)).error
    assert "both are given" in tool(ONE_SHOT, *options(work), *stats, "--calibration-data", "x").error
    assert "already exists" in tool(ONE_SHOT, *options(work), *stats, "--save", work / "tokens.npy").error
    (tmp_path / "recipe.yaml").write_text("version: 1\ntarget: {num_layers: 99}\n")
    recipe = ("--recipe", tmp_path / "recipe.yaml")
    assert "99 is larger than" in tool(ONE_SHOT, *options(work), *recipe, *stats).error
    assert "prunes nothing of width" in tool(ONE_SHOT, *options(work), *recipe, *stats, "--only", "width").error
    (tmp_path / "recipe.yaml").write_text("version: 1\ntarget: {num_layers: 3}\ndepth: {method: block_influence}\n")
    assert "depth: target.num_layers 3 leaves no full" in tool(ONE_SHOT, *options(work), *recipe, *stats).error
