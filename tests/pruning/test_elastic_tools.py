"""Elastic checkpoints as a person makes, converts, lists and slices them, and every kind of bad input."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import megatron_slim as slim
from megatron_slim.architecture.shape import FAMILIES
from megatron_slim.checkpoint.convert import open_checkpoint, same_bytes
from megatron_slim.checkpoint.huggingface import HFCheckpoint
from megatron_slim.files import read_json
from megatron_slim.pruning.elastic import find_elastic
from megatron_slim.pruning.elastic_slices import sliced
from megatron_slim.pruning.plan_reader import load_plan
from megatron_slim.pruning.statistics import Statistics
from megatron_slim.streaming.fingerprint import fingerprint
from megatron_slim.testing import write_tiny_checkpoint
from tests.pruning.test_elastic import NAMES, assert_same_tensors, document, family_source, targets

PRUNE, SLICE, CONVERT = "tools/prune_checkpoint.py", "tools/slice_checkpoint.py", "tools/convert_checkpoint.py"
Tool = Callable[..., Any]


class Made:
    """A model, statistics drawn for it, a recipe with budgets, and the elastic checkpoint in both formats."""

    def __init__(self, root: Path, family: str, random_stats: Callable[..., Statistics]) -> None:
        self.root, self.family = root, family
        self.source = family_source(root / "source", family)
        (self.source.path / "tokenizer.json").write_text("{}")
        random_stats(self.source).save(root / "s.stats")
        self.targets = targets(family)
        self.recipe = root / "recipe.json"  # JSON is YAML
        self.recipe.write_text(json.dumps(document(self.targets, depth={"method": "last"})))

    def prune(self, tool: Tool, *more: object, recipe: Path | None = None) -> Any:
        stats = ("--stats", self.root / "s.stats")
        return tool(PRUNE, "--load", self.source.path, "--recipe", recipe or self.recipe, *stats, "--json", *more)

    def elastic(self, tool: Tool, to: str = "hf") -> Path:
        """The elastic checkpoint in a format, made once."""
        path = self.root / f"elastic-{to}"
        if not path.exists():
            done = self.prune(tool, "--save", path, "--to", to)
            assert done.code == 0, done.stderr
        return path


@pytest.fixture(scope="module", params=FAMILIES)
def made(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, random_stats: Callable[..., Statistics]
) -> Made:
    return Made(tmp_path_factory.mktemp("made"), request.param, random_stats)


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory, random_stats: Callable[..., Statistics]) -> Made:
    return Made(tmp_path_factory.mktemp("one"), "qwen3_next", random_stats)


@pytest.mark.one_case
@pytest.mark.parametrize("to", ["hf", "torch_dist"])
def test_a_slice_is_what_the_plan_of_its_budget_prunes(tool: Tool, made: Made, to: str, tmp_path: Path) -> None:
    """And what a recipe of that size alone makes of the source, byte for byte, from and to both formats."""
    load = made.elastic(tool, to)
    for number, name in enumerate(NAMES):
        other = "hf" if to == "torch_dist" else "torch_dist"
        done = tool(SLICE, "--load", load, "--budget", name, "--save", tmp_path / name, "--to", other, "--json")
        assert done.code == 0, done.stderr
        assert done.json["verified"] and done.json["format"] == other and done.json["budget"] == name
        plan = tmp_path / f"{name}.json"
        plan.write_text(json.dumps(read_json(load / "elastic.json")["budgets"][number]["plan"]))
        by_plan = tool(PRUNE, "--load", load, "--plan", plan, "--save", tmp_path / f"{name}-plan")
        assert by_plan.code == 0, by_plan.stderr
        alone = tmp_path / f"{name}-recipe.json"
        experts = {"method": "prune"}
        alone.write_text(json.dumps({"version": 1, "target": made.targets[number], "experts": experts}))
        assert made.prune(tool, "--save", tmp_path / f"{name}-alone", recipe=alone).code == 0
        found = open_checkpoint(tmp_path / name)
        for same in (f"{name}-plan", f"{name}-alone"):
            assert_same_tensors(found, open_checkpoint(tmp_path / same))


def test_a_slice_of_a_slice_is_a_slice_of_the_parent(tool: Tool, made: Made, tmp_path: Path) -> None:
    load = made.elastic(tool)
    for start, budget, save in ((load, "middle", "m"), (tmp_path / "m", "small", "ms"), (load, "small", "s")):
        done = tool(SLICE, "--load", start, "--budget", budget, "--save", tmp_path / save, "--to", "torch_dist")
        assert done.code == 0, done.stderr
    assert_same_tensors(open_checkpoint(tmp_path / "ms"), open_checkpoint(tmp_path / "s"))
    middle = find_elastic(tmp_path / "m")
    assert middle is not None and [each.name for each in middle.budgets] == ["middle", "small"]
    assert middle.shape == open_checkpoint(tmp_path / "m").shape
    assert find_elastic(tmp_path / "s") is None and find_elastic(tmp_path / "ms") is None
    plan = load_plan(tmp_path / "ms")
    assert plan.source_sha256 == fingerprint(open_checkpoint(tmp_path / "m"))
    assert plan.target_shape == open_checkpoint(tmp_path / "s").shape


@pytest.mark.one_case
def test_stock_loaders_open_parent_and_slices(tool: Tool, made: Made, tmp_path: Path) -> None:
    """transformers, with the logits of the model that was pruned to that size by itself."""
    from transformers import AutoModelForCausalLM

    load = made.elastic(tool)
    tokens = torch.arange(24).reshape(2, 12)

    def logits(path: Path) -> torch.Tensor:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        with torch.no_grad():
            found: torch.Tensor = model(tokens).logits
        return found

    for number, name in enumerate(NAMES):
        assert tool(SLICE, "--load", load, "--budget", name, "--save", tmp_path / name).code == 0
        alone = tmp_path / f"{name}.json"
        document = {"version": 1, "target": made.targets[number], "experts": {"method": "prune"}}
        alone.write_text(json.dumps(document))
        assert made.prune(tool, "--save", tmp_path / f"{name}-alone", recipe=alone).code == 0
        assert torch.equal(logits(tmp_path / name), logits(tmp_path / f"{name}-alone"))
    assert torch.equal(logits(load), logits(tmp_path / "large"))


def test_pruning_says_what_all_budgets_are(tool: Tool, one: Made) -> None:
    dry = one.prune(tool, "--dry-run")
    assert dry.code == 0, dry.stderr
    assert [row["name"] for row in dry.json["budgets"]] == list(NAMES)
    assert [row["hidden_size"] for row in dry.json["budgets"]] == [56, 48, 40]
    for row in dry.json["budgets"]:
        assert row["bytes"] == 2 * row["parameters"]
    (hidden,) = [line for line in dry.stdout.splitlines() if "hidden size" in line and "56" in line and "48" in line]
    assert [int(word) for word in hidden.split() if word.isdecimal()] == [56, 48, 40]
    assert sorted(path.name for path in one.root.iterdir() if path.name.startswith("dry")) == []


@pytest.mark.parametrize("to", ["hf", "torch_dist"])
def test_the_parent_is_that_of_the_first_budget(tool: Tool, one: Made, to: str, tmp_path: Path) -> None:
    load = one.elastic(tool, to)
    first = tmp_path / "r.json"
    first.write_text(json.dumps({"version": 1, "target": one.targets[0], "experts": {"method": "prune"}}))
    assert one.prune(tool, "--save", tmp_path / "first", "--to", to, recipe=first).code == 0
    assert (load / "plan.json").read_bytes() == (tmp_path / "first" / "plan.json").read_bytes()
    assert_same_tensors(open_checkpoint(load), open_checkpoint(tmp_path / "first"))
    elastic = find_elastic(load)
    assert elastic is not None and (load / "elastic.json").read_text() == elastic.to_json()
    assert {each.plan.source_sha256 for each in elastic.budgets} == {fingerprint(open_checkpoint(load))}
    assert read_json(load / "slim_provenance.json")["elastic_sha256"] == elastic.sha256
    if to == "torch_dist":
        assert find_elastic(load / "release") == elastic


def test_both_formats_have_one_document(tool: Tool, one: Made) -> None:
    documents = [(one.elastic(tool, to) / "elastic.json").read_bytes() for to in ("hf", "torch_dist")]
    assert documents[0] == documents[1]


def test_conversion_carries_the_document_and_pruning_does_not(tool: Tool, one: Made, tmp_path: Path) -> None:
    load = one.elastic(tool)
    for start, to in (
        (load, "torch_dist"),
        (tmp_path / "torch_dist", "hf"),
        (tmp_path / "torch_dist/release", "again"),
    ):
        done = tool(CONVERT, "--load", start, "--save", tmp_path / to)
        assert done.code == 0, done.stderr
        assert (tmp_path / to / "elastic.json").read_bytes() == (load / "elastic.json").read_bytes()
    assert tool(CONVERT, "--load", load, "--save", tmp_path / "fp8", "--quantize", "fp8").code == 0
    assert (tmp_path / "fp8" / "elastic.json").is_file()
    done = tool(CONVERT, "--load", load, "--save", tmp_path / "no-mtp", "--without-mtp", "--to", "hf")
    assert done.code == 0 and not (tmp_path / "no-mtp" / "elastic.json").exists()
    assert "is for a model of other sizes, and is not carried over" in done.stderr
    plan = tmp_path / "p.json"
    plan.write_text(json.dumps(read_json(load / "elastic.json")["budgets"][1]["plan"]))
    assert tool(PRUNE, "--load", load, "--plan", plan, "--save", tmp_path / "pruned").code == 0
    assert not (tmp_path / "pruned" / "elastic.json").exists()


def test_trained_weights_are_sliced(tool: Tool, one: Made, tmp_path: Path) -> None:
    """Other values under the parent's names; the plan of the slice is of them, and prunes them."""
    load = one.elastic(tool)
    trained = HFCheckpoint.open(write_tiny_checkpoint(tmp_path / "trained", open_checkpoint(load).shape, seed=5))
    shutil.copyfile(load / "elastic.json", trained.path / "elastic.json")
    done = tool(SLICE, "--load", trained.path, "--budget", "small", "--save", tmp_path / "small")
    assert done.code == 0, done.stderr
    elastic = find_elastic(load)
    assert elastic is not None
    small = open_checkpoint(tmp_path / "small")
    assert_same_tensors(small, sliced(trained, elastic, "small"))
    kept = list(elastic.named("small").plan.kept_hidden)
    name = "model.norm.weight"
    assert same_bytes(small.read(name), trained.read(name)[kept])
    assert not same_bytes(small.read(name), sliced(open_checkpoint(load), elastic, "small").read(name))
    again = tool(PRUNE, "--load", trained.path, "--plan", tmp_path / "small", "--save", tmp_path / "again")
    assert again.code == 0, again.stderr
    assert_same_tensors(small, open_checkpoint(tmp_path / "again"))


def test_a_model_that_lost_its_mtp_block_is_sliced(tool: Tool, one: Made, tmp_path: Path) -> None:
    """As the slice of the whole model, less its MTP block; its document is of models without one."""
    load, trunk = one.elastic(tool), tmp_path / "trunk"
    assert tool(CONVERT, "--load", load, "--save", trunk, "--without-mtp", "--to", "hf").code == 0
    shutil.copyfile(load / "elastic.json", trunk / "elastic.json")
    for start, save in ((load, "whole"), (trunk, "less")):
        done = tool(SLICE, "--load", start, "--budget", "middle", "--save", tmp_path / save)
        assert done.code == 0, done.stderr
    less, whole = open_checkpoint(tmp_path / "less"), open_checkpoint(tmp_path / "whole")
    assert set(less.names) == {name for name in whole.names if not name.startswith("mtp.")} < set(whole.names)
    assert all(same_bytes(less.read(name), whole.read(name)) for name in less.names)
    found = find_elastic(tmp_path / "less")
    assert found is not None and found.shape == less.shape and not found.shape.mtp_num_layers
    for command, save in ((("tools/sort_checkpoint.py",), "sorted"), (("tools/sort_checkpoint.py", "--undo"), "back")):
        start = trunk if save == "sorted" else tmp_path / "sorted"
        assert tool(*command, "--load", start, "--save", tmp_path / save).code == 0
    assert_same_tensors(open_checkpoint(tmp_path / "back"), open_checkpoint(trunk))


def test_budgets_are_listed(tool: Tool, one: Made) -> None:
    done = tool(SLICE, "--load", one.elastic(tool), "--list", "--json")
    assert done.code == 0, done.stderr
    assert done.json["budgets"] == one.prune(tool, "--dry-run").json["budgets"]
    assert all(name in done.stdout for name in NAMES)


def test_what_cannot_be_sliced_is_one_line(tool: Tool, one: Made, tmp_path: Path) -> None:
    load = one.elastic(tool)

    def error(where: Path, *more: object) -> str:
        given = more or ("--budget", "small", "--save", tmp_path / "out")
        message: str = tool(SLICE, "--load", where, *given).error
        assert not (tmp_path / "out").exists()
        return message

    assert "there is no elastic.json here: not an elastic checkpoint; make one with megatron-slim prune" in error(
        one.source.path
    )
    assert "there is no budget 'tiny'; give one of large, middle, small" in error(
        load, "--budget", "tiny", "--save", tmp_path / "out"
    )
    assert error(load, "--save", tmp_path / "out") == "no budget; give --budget NAME; --list shows the names"
    assert error(load, "--budget", "small") == "no output directory; give --save, or --list"
    for more in (("--budget", "small"), ("--save", tmp_path / "out")):
        assert error(load, "--list", *more).startswith("--list shows all budgets and writes nothing; leave --budget")
    other = tmp_path / "other"
    shutil.copytree(one.source.path, other)
    shutil.copyfile(load / "elastic.json", other / "elastic.json")
    message = error(other)
    assert "elastic.json is for a model of other sizes: num_layers 7, not 8" in message
    assert "hidden_size 56, not 64" in message
    (other / "elastic.json").write_text((load / "elastic.json").read_text()[:-40])
    assert "elastic.json: not readable as JSON" in error(other)
    (other / "elastic.json").write_text("[]")
    assert "elastic.json: not a document of budgets of version 1" in error(other)
    assert "elastic.json: not a document of budgets of version 1" in error(other, "--list")


def test_other_commands_say_what_to_do_with_budgets(tool: Tool, one: Made, tmp_path: Path) -> None:
    load, stats = ("--load", one.source.path), ("--stats", one.root / "s.stats")
    np.save(tmp_path / "tokens.npy", np.zeros((2, 8), dtype=np.int32))
    run = ("--teacher", one.source.path, "--save", tmp_path / "x", "--data", tmp_path / "tokens.npy")
    for command in (
        ("tools/plan_pruning.py", *load, *stats, "--recipe", one.recipe, "--save", tmp_path / "p.json"),
        (PRUNE, *load, *stats, "--recipe", one.recipe, "--save", tmp_path / "p", "--phase", 1),
        ("tools/plan_parallelism.py", "--recipe", one.recipe, "--gpus", 8),
        ("tools/run.py", one.recipe, *run),
    ):
        error = tool(*command).error
        assert "the recipe has budgets, for an elastic checkpoint; give the recipe to megatron-slim prune" in error
    from megatron_slim import SlimError, read_recipe

    with pytest.raises(SlimError, match="the recipe has budgets"):
        read_recipe(one.recipe)


def test_search_data_need_a_budget_with_something_to_choose(tool: Tool, one: Made, tmp_path: Path) -> None:
    np.save(tmp_path / "tokens.npy", np.arange(24, dtype=np.int32).reshape(2, 12))
    data = ("--search-data", tmp_path / "tokens.npy", "--dry-run")
    assert "--search-data, but the recipe has no budget" in one.prune(tool, *data).error
    recipe = json.loads(one.recipe.read_text())
    recipe["budgets"][1:] = [{"name": "searched", "target": {"params": "300K"}}]
    recipe["budgets"][0]["target"] = {}
    (tmp_path / "r.json").write_text(json.dumps(recipe))
    done = one.prune(tool, *data, recipe=tmp_path / "r.json")
    assert done.code == 0, done.stderr
    assert done.json["budgets"][1]["parameters_without_mtp"] <= 300_000 < done.json["budgets"][0]["parameters"]


def test_python_gives_what_the_command_gives(tool: Tool, one: Made, tmp_path: Path) -> None:
    load = one.elastic(tool, "torch_dist")
    written = slim.slice_budget(load, "middle", tmp_path / "python")
    by_command = tool(SLICE, "--load", load, "--budget", "middle", "--save", tmp_path / "command", "--json").json
    assert written == {key: by_command[key] for key in written}
    found = open_checkpoint(tmp_path / "python")
    assert_same_tensors(found, open_checkpoint(tmp_path / "command"))
    budget = slim.open_budget(slim.open_checkpoint(load), "middle")
    assert_same_tensors(found, budget)
    tokens = np.arange(24, dtype=np.int64).reshape(2, 12)
    assert slim.evaluate(budget, tokens) == slim.evaluate(tmp_path / "python", tokens)
    assert slim.count_parameters(budget).total == written["parameters"]
    with pytest.raises(slim.SlimError, match="there is no budget 'x'"):
        slim.open_budget(load, "x")
    with pytest.raises(slim.SlimError, match="output already exists"):
        slim.slice_budget(load, "middle", tmp_path / "python")
