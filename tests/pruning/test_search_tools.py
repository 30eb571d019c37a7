"""Budgets through the tools, candidates measured."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from megatron_slim.architecture.table import count_parameters
from megatron_slim.checkpoint.huggingface import HFCheckpoint
from megatron_slim.pruning.statistics import Statistics

PRUNE, PLAN, EVALUATE = "tools/prune_checkpoint.py", "tools/plan_pruning.py", "tools/evaluate.py"


def test_the_candidate_of_the_least_loss_is_written(
    tool: Callable[..., Any], source: HFCheckpoint, random_stats: Callable[..., Statistics], tmp_path: Path
) -> None:
    """Its loss is what tools/evaluate.py measures of what was written."""
    bound = count_parameters(source.shape, include_mtp=False).total // 2
    recipe, data, stats = tmp_path / "r.yaml", tmp_path / "tokens.npy", tmp_path / "s.safetensors"
    recipe.write_text(f"version: 1\ntarget: {{params: {bound}}}\n")
    np.save(data, np.random.default_rng(0).integers(0, source.shape.vocab_size, (4, 12)).astype(np.int32))
    random_stats(source).save(stats)
    common = ("--load", source.path, "--recipe", recipe, "--stats", stats, "--search-data", data, "--search-top", 2)

    made = tool(PLAN, *common, "--save", tmp_path / "plan.json", "--json")
    assert made.code == 0, made.stderr
    search = json.loads((tmp_path / "plan.json").read_text())["search"]
    losses = [row["loss"] for row in search["candidates"]]
    assert losses[2:] == [None] * (len(losses) - 2) and search["chosen"] == losses.index(min(losses[:2]))

    pruned = tool(PRUNE, *common, "--save", tmp_path / "out", "--json")
    assert pruned.code == 0, pruned.stderr
    assert pruned.json["plan_sha256"] == made.json["plan_sha256"]
    assert pruned.json["after"]["parameters_without_mtp"] <= bound
    measured = tool(EVALUATE, "--load", tmp_path / "out", "--data", data, "--json")
    assert abs(measured.json["loss"] - min(losses[:2])) < 1e-6


def test_measuring_without_a_budget_or_without_data_is_refused(
    tool: Callable[..., Any], source: HFCheckpoint, tmp_path: Path
) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("version: 1\ntarget: {num_layers: 4}\n")
    common = ("--load", source.path, "--recipe", recipe, "--stats", tmp_path / "s", "--save", tmp_path / "out")
    assert "the recipe has no budget" in tool(PRUNE, *common, "--search-data", tmp_path / "none.npy").error
    assert "give --search-data" in tool(PRUNE, *common, "--search-top", 2).error
    assert not (tmp_path / "out").exists()
