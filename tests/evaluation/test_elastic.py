"""``evaluate --elastic``: every budget as its slice, sizes between them, and arguments that do not fit."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_slim.checkpoint.convert import open_checkpoint
from megatron_slim.checkpoint.huggingface_writer import total_bytes
from megatron_slim.pruning.apply import PrunedCheckpoint
from megatron_slim.pruning.between import between
from megatron_slim.pruning.elastic import find_elastic
from megatron_slim.pruning.elastic_plans import plan_budgets
from megatron_slim.pruning.pipeline import write_pruned
from megatron_slim.pruning.statistics import FORMAT, Statistics, expected_shapes
from megatron_slim.recipe import parse_recipe
from megatron_slim.streaming.fingerprint import fingerprint
from megatron_slim.testing import tiny_shape, write_random_samples, write_tiny_checkpoint

Tool = Callable[..., Any]
EVALUATE, SLICE = "tools/evaluate.py", "tools/slice_checkpoint.py"
BUDGETS = [
    {"name": "full", "weight": 2},
    {"name": "small", "target": {"num_layers": 4, "hidden_size": 48, "num_moe_experts": 4, "moe_ffn_hidden_size": 24}},
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An elastic checkpoint of two budgets, its source as a teacher, and token ids; to be read alone."""
    root = tmp_path_factory.mktemp("elastic")
    source = open_checkpoint(write_tiny_checkpoint(root / "source", tiny_shape(num_layers=6), seed=3))
    rng = np.random.default_rng(0)
    tensors = {key: np.asarray(rng.random(size), dtype=np.float32) for key, size in expected_shapes(source.shape)}
    stats = Statistics(tensors, {"format": FORMAT, "source_sha256": fingerprint(source)})
    recipe = parse_recipe({"version": 1, "budgets": BUDGETS})
    budgets = plan_budgets(recipe.budgets, stats, source.shape)
    write_pruned(PrunedCheckpoint(budgets[0].plan, source), root / "elastic", stats=None, to="hf", budgets=budgets)
    write_tiny_checkpoint(root / "trained", source.shape, seed=4)
    shutil.copyfile(root / "elastic" / "elastic.json", root / "trained" / "elastic.json")
    write_tiny_checkpoint(root / "other", tiny_shape())
    shutil.copyfile(root / "elastic" / "elastic.json", root / "other" / "elastic.json")
    np.save(root / "tokens.npy", rng.integers(0, source.shape.vocab_size, (3, 16)).astype(np.int32))
    write_random_samples(root / "set", 3, 16, source.shape.vocab_size, documents=True)
    np.save(root / "prompts.npy", rng.integers(0, source.shape.vocab_size, (2, 6)).astype(np.int32))
    return root


def evaluate(tool: Tool, place: Path, load: Path, *more: object, data: str = "tokens.npy") -> Any:
    done = tool(EVALUATE, "--load", load, "--data", place / data, "--dtype", "fp32", "--json", *more)
    assert done.code == 0, done.stderr
    return done


@pytest.mark.one_case
@pytest.mark.parametrize("data", ["tokens.npy", "set"])
def test_a_budget_has_the_figures_of_its_slice(tool: Tool, place: Path, data: str, tmp_path: Path) -> None:
    """All of them, equal: losses, standard errors, distance from the teacher, accepted drafts; of a sample set too."""
    more = ("--teacher", place / "source", "--acceptance", place / "prompts.npy", "--max-new-tokens", 6)
    done = evaluate(tool, place, place / "trained", "--elastic", *more, data=data)
    rows = done.json["budgets"]
    assert [(row["budget"], row["weight"], row["untrained"]) for row in rows] == [
        ("full", 2.0, False),
        ("small", 1.0, False),
    ]
    for row in rows:
        name = row["budget"]
        assert tool(SLICE, "--load", place / "trained", "--budget", name, "--save", tmp_path / name).code == 0
        alone = evaluate(tool, place, tmp_path / name, *more, data=data).json
        known = ("budget", "weight", "untrained", "sizes", "load")
        assert {key: row[key] for key in row if key not in known} == {k: alone[k] for k in alone if k != "load"}
        assert {"loss", "kl", "top1_agreement", "acceptance", "mtp_loss"} <= row.keys()
        slice_ = open_checkpoint(tmp_path / name)
        assert row["sizes"]["bytes"] == total_bytes(slice_.shape, slice_.dtypes)
        assert row["sizes"]["num_layers"] == slice_.shape.num_layers
        assert f"{row['sizes']['parameters']:,}" in done.stdout and f"{row['loss']:.4f}" in done.stdout
        assert f"{row['acceptance']['mean_accepted_length']:.3f}" in done.stdout
    assert rows[0]["loss"] != rows[1]["loss"]


def test_sizes_between_are_marked_and_measured(tool: Tool, place: Path, tmp_path: Path) -> None:
    done = evaluate(tool, place, place / "elastic", "--elastic", "--between")
    rows = done.json["budgets"]
    elastic = find_elastic(place / "elastic")
    assert elastic is not None
    sizes = list(between(elastic))
    assert [row["budget"] for row in rows] == ["full", "small", *(size.name for size in sizes)] and len(sizes) == 4
    assert [row["untrained"] for row in rows] == [False, False, True, True, True, True]
    assert done.stdout.count("│ untrained │") == 4
    for row, size in zip(rows[2:], sizes, strict=True):
        plan = tmp_path / "plan.json"
        size.plan.save(plan)
        pruned = tmp_path / row["budget"]
        done = tool("tools/prune_checkpoint.py", "--load", place / "elastic", "--plan", plan, "--save", pruned)
        assert done.code == 0, done.stderr
        assert evaluate(tool, place, pruned).json["loss"] == row["loss"]
    losses = [row["loss"] for row in rows]
    assert len(set(losses)) == len(losses)


def test_mtp_may_be_left_out(tool: Tool, place: Path) -> None:
    whole, trunk = (
        evaluate(tool, place, place / "elastic", "--elastic", *more).json["budgets"]
        for more in ((), ("--without-mtp",))
    )
    assert [row["loss"] for row in trunk] == [row["loss"] for row in whole]
    assert [row["mtp_loss"] for row in trunk] == [[], []] and all(len(row["mtp_loss"]) == 1 for row in whole)


def test_both_formats_give_the_same(tool: Tool, place: Path, tmp_path: Path) -> None:
    there = tmp_path / "torch_dist"
    assert tool("tools/convert_checkpoint.py", "--load", place / "elastic", "--save", there).code == 0
    found = [evaluate(tool, place, load, "--elastic").json["budgets"] for load in (place / "elastic", there)]
    one, other = ([row | {"load": ""} for row in rows] for rows in found)
    assert one == other


def test_arguments_that_do_not_fit_are_one_line(tool: Tool, place: Path) -> None:
    def error(load: str, *more: object) -> str:
        found: str = tool(EVALUATE, "--load", place / load, "--data", place / "tokens.npy", *more).error
        return found

    assert error("elastic", "--between") == "--between without --elastic; give --elastic, or leave --between out"
    assert error("elastic", "--elastic", "--record") == "--record and --elastic exclude one another; leave one out"
    assert "--every-checkpoint and --elastic exclude one another" in error("elastic", "--elastic", "--every-checkpoint")
    assert "there is no elastic.json here: not an elastic checkpoint" in error("source", "--elastic")
    message = "elastic.json is for a model of other sizes: num_layers 6, not 4"
    assert message in error("other", "--elastic")


def test_a_teacher_in_fp8(tool: Tool, place: Path, tmp_path: Path) -> None:
    """The budgets are not, and read as they are."""
    convert = ("tools/convert_checkpoint.py", "--load", place / "source", "--save", tmp_path / "fp8")
    assert tool(*convert, "--to", "hf", "--quantize", "fp8").code == 0
    words = ("--elastic", "--teacher", tmp_path / "fp8", "--dequantize-fp8")
    rows = evaluate(tool, place, place / "trained", *words).json["budgets"]
    assert [row["loss"] for row in rows] == [
        row["loss"] for row in evaluate(tool, place, place / "trained", "--elastic").json["budgets"]
    ]
    assert all(row["kl"] > 0 for row in rows)
