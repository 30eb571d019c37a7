"""Sorted elastic checkpoints: every budget first on every axis, the same function, and back byte for byte."""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import megatron_slim.mcore

import pytest
import torch

from megatron_slim.architecture.kinds import KINDS
from megatron_slim.checkpoint.convert import open_checkpoint, same_bytes
from megatron_slim.checkpoint.huggingface import HFCheckpoint
from megatron_slim.errors import PlanError, SlimError
from megatron_slim.evaluation.perplexity import evaluate
from megatron_slim.pruning.apply import PrunedCheckpoint
from megatron_slim.pruning.elastic import Elastic, contained, elastic_of, find_elastic, parse_elastic
from megatron_slim.pruning.elastic_slices import sliced
from megatron_slim.pruning.nesting import ElasticBudget, neurons_of, survivors_of
from megatron_slim.pruning.pipeline import write_pruned
from megatron_slim.pruning.plan import Plan
from megatron_slim.pruning.sorting import inverse, ranked, reordered, sorting_plan
from megatron_slim.pruning.statistics import Statistics
from megatron_slim.testing import tiny_shape, write_tiny_checkpoint
from tests.pruning.test_elastic import Family, assert_same_tensors, family, planned

__all__ = ["family"]
SORT, SLICE = "tools/sort_checkpoint.py", "tools/slice_checkpoint.py"
Tool = Callable[..., Any]
# One product or sum in another order, through eight layers, in fp32.
ROUNDING = 2e-6


def lists_of(plan: Plan) -> list[tuple[int, ...]]:
    """All lists of a plan on axes that are sorted as a whole; heads by themselves."""
    found = [plan.kept_hidden]
    for block in plan.source_blocks.values():
        survivors = survivors_of(plan, block)
        found += [kept for axis, kept in survivors.items() if axis != "heads"]
        found += [neurons_of(plan, block, expert) for expert in range(len(plan.experts.get(block, ())))]
    return found


def assert_first_heads(plan: Plan) -> None:
    """The first heads of the first groups."""
    shape, target = plan.source_shape, plan.target_shape
    for block in plan.source_blocks.values():
        axis = KINDS[shape.layer_type(block)].heads
        groups, width = getattr(target, axis.groups_field), shape.sizes[axis.axis]
        each = getattr(target, axis.field) // groups
        expected = tuple(group * width + head for group in range(groups) for head in range(each))
        assert survivors_of(plan, block)["heads"] == expected


def test_every_budget_comes_first_on_every_axis(family: Family) -> None:
    elastic = elastic_of(family[1])
    order = sorting_plan(elastic.budgets)
    moved = [reordered(each.plan, order) for each in elastic.budgets]
    for plan, before in zip(moved, elastic.budgets, strict=True):
        assert all(kept == tuple(range(len(kept))) for kept in lists_of(plan))
        assert_first_heads(plan)
        assert plan.kept_layers == before.plan.kept_layers and plan.target_shape == before.plan.target_shape
    undo = inverse(order)
    assert [reordered(plan, undo) for plan in moved] == [each.plan for each in elastic.budgets]
    assert inverse(undo) == order
    assert order.kept_hidden != tuple(range(elastic.shape.hidden_size))


def test_the_function_stays_and_the_order_comes_back(family: Family, tmp_path: Path) -> None:
    """Losses of the trunk and of MTP, of the parent and of a slice, on fp32 weights; then the bytes."""
    elastic = elastic_of(family[1])
    parent = HFCheckpoint.open(write_tiny_checkpoint(tmp_path / "parent", elastic.shape, 3, dtype=torch.float32))
    order = sorting_plan(elastic.budgets)
    moved = PrunedCheckpoint(order, parent, check_source=False)
    assert not all(same_bytes(moved.read(name), parent.read(name)) for name in parent.names)
    assert_same_tensors(PrunedCheckpoint(inverse(order), moved, check_source=False), parent)
    samples = torch.randint(elastic.shape.vocab_size, (3, 16), generator=torch.Generator().manual_seed(0)).numpy()
    for number, budget in enumerate(elastic.budgets):
        name, after = budget.name, Elastic(tuple(_moved(each, order) for each in elastic.budgets))
        one, other = sliced(parent, elastic, name), sliced(moved, after, name)
        found = [evaluate(each, samples, dtype=torch.float32) for each in (one, other)]
        assert found[0].loss == pytest.approx(found[1].loss, abs=ROUNDING), number
        assert found[0].mtp_loss == pytest.approx(found[1].mtp_loss, abs=ROUNDING)


def _moved(budget: ElasticBudget, order: Plan) -> ElasticBudget:
    return dataclasses.replace(budget, plan=reordered(budget.plan, order))


def test_logits_are_those_of_the_parent(family: Family, tmp_path: Path, tool: Tool) -> None:
    """In transformers, which has none of our code."""
    from transformers import AutoModelForCausalLM

    source, budgets = family
    write_pruned(PrunedCheckpoint(budgets[0].plan, source), tmp_path / "p", stats=None, to="hf", budgets=budgets)
    assert tool(SORT, "--load", tmp_path / "p", "--save", tmp_path / "s").code == 0
    tokens = torch.arange(24).reshape(2, 12)
    with torch.no_grad():
        one, other = (
            AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32).eval()(tokens).logits
            for name in "ps"
        )
    torch.testing.assert_close(other, one, rtol=0, atol=1e-5)
    before, after = (open_checkpoint(tmp_path / name).read("model.norm.weight") for name in "ps")
    assert not torch.equal(before, after) and torch.equal(before.sort().values, after.sort().values)


@pytest.fixture
def place(source: HFCheckpoint, random_stats: Callable[..., Statistics], tmp_path: Path) -> Path:
    """An elastic checkpoint, of whose weights other ones have been trained."""
    sizes = [{}, {"num_layers": 6, "hidden_size": 48, "num_moe_experts": 4, "moe_ffn_hidden_size": 24}]
    budgets = planned(source, random_stats(source), sizes)
    pruned = PrunedCheckpoint(budgets[0].plan, source)
    write_pruned(pruned, tmp_path / "elastic", stats=None, to="torch_dist", budgets=budgets)
    return tmp_path


def test_a_sorted_checkpoint_is_undone_to_the_bytes(tool: Tool, place: Path) -> None:
    """Through files of both formats; its document too."""
    for number, (load, save, more) in enumerate(
        (("elastic", "sorted", ()), ("sorted", "back", ("--undo", "--to", "torch_dist")))
    ):
        done = tool(SORT, "--load", place / load, "--save", place / save, *more, "--json")
        assert done.code == 0, done.stderr
        assert done.json["verified"] and done.json["sorted"] == (number == 0)
    assert_same_tensors(open_checkpoint(place / "back"), open_checkpoint(place / "elastic"))
    documents = [(place / name / "elastic.json").read_bytes() for name in ("elastic", "back")]
    assert documents[0] == documents[1]
    found = find_elastic(place / "sorted")
    assert found is not None and found.order is not None
    assert found.to_json() == (place / "sorted" / "elastic.json").read_text()
    assert not (place / "sorted" / "plan.json").exists()
    assert contained(found.budgets) == []


def test_slices_of_a_sorted_checkpoint_are_its_first_rows(tool: Tool, place: Path) -> None:
    """And its conversion is sorted too."""
    assert tool(SORT, "--load", place / "elastic", "--save", place / "sorted").code == 0
    assert tool(SLICE, "--load", place / "sorted", "--budget", "middle", "--save", place / "slice").code == 0
    whole, part = open_checkpoint(place / "sorted"), open_checkpoint(place / "slice")
    assert same_bytes(part.read("model.embed_tokens.weight"), whole.read("model.embed_tokens.weight")[:, :48])
    assert same_bytes(part.read("mtp.layers.0.mlp.gate.weight"), whole.read("mtp.layers.0.mlp.gate.weight")[:4, :48])
    assert find_elastic(place / "slice") is None
    done = tool("tools/convert_checkpoint.py", "--load", place / "sorted", "--save", place / "converted")
    assert done.code == 0 and find_elastic(place / "converted") == find_elastic(place / "sorted")


def test_experts_are_balanced_over_ranks(tool: Tool, place: Path) -> None:
    """Of four, two and one rank each has equally many of either budget, in every block."""
    more = ("--expert-parallel", 4)
    assert tool(SORT, "--load", place / "elastic", "--save", place / "sorted", *more).code == 0
    found = find_elastic(place / "sorted")
    assert found is not None
    groups = found.named("middle").plan.experts
    assert len(groups) == 7 and "mtp.layers.0" in groups
    assert {tuple(each.base for each in here) for here in groups.values()} == {(0, 2, 4, 6)}
    assert tool(SORT, "--load", place / "sorted", "--save", place / "back", "--undo").code == 0
    assert_same_tensors(open_checkpoint(place / "back"), open_checkpoint(place / "elastic"))


def test_the_router_keeps_its_groups_of_experts(random_stats: Callable[..., Statistics], tmp_path: Path) -> None:
    """Each group is sorted by itself, and none gets another's experts."""
    shape = tiny_shape("glm4_moe", moe_router_num_groups=2, moe_router_group_topk=1)
    source = HFCheckpoint.open(write_tiny_checkpoint(tmp_path / "hf", shape))
    sizes = [{}, {"num_moe_experts": 4}]
    elastic = elastic_of(planned(source, random_stats(source), sizes, experts={"num_groups": 2}))
    order = sorting_plan(elastic.budgets)
    for groups in order.experts.values():
        assert [group.base // 4 for group in groups] == [0, 0, 0, 0, 1, 1, 1, 1]
    small = reordered(elastic.budgets[1].plan, order)
    assert all([group.base for group in groups] == [0, 1, 4, 5] for groups in small.experts.values())
    document = Elastic(tuple(_moved(each, order) for each in elastic.budgets), inverse(order))
    assert parse_elastic(json.loads(document.to_json())) == document
    with pytest.raises(SlimError, match="the router chooses groups of experts first; leave --expert-parallel out"):
        sorting_plan(elastic.budgets, 2)


def test_ties_keep_their_order() -> None:
    assert ranked(4, [range(4), range(4)]) == (0, 1, 2, 3) and ranked(4, [[3], [3, 1]]) == (3, 1, 0, 2)


def test_what_cannot_be_sorted_is_one_line(tool: Tool, place: Path) -> None:
    def error(load: str, *more: object) -> str:
        found: str = tool(SORT, "--load", place / load, "--save", place / "none", *more).error
        return found

    assert error("elastic", "--undo").endswith("is not sorted; leave --undo out")
    assert tool(SORT, "--load", place / "elastic", "--save", place / "sorted").code == 0
    assert error("sorted").endswith("is sorted already; undo that first with --undo")
    assert error("sorted", "--undo", "--expert-parallel", 2).startswith("--undo and --expert-parallel exclude")
    assert error("elastic", "--expert-parallel", 8) == (
        "--expert-parallel: 8 ranks do not divide 4 experts of a budget; give a number that divides all"
    )
    shutil.copytree(place / "sorted", place / "plain")
    (place / "plain" / "elastic.json").unlink()
    assert "there is no elastic.json here" in error("plain")


def test_statistics_in_the_order_of_before_are_refused(
    tool: Tool, place: Path, random_stats: Callable[..., Statistics]
) -> None:
    (place / "recipe.yaml").write_text("version: 1\ntarget: {hidden_size: 40}\n")
    source = open_checkpoint(place / "elastic")
    assert find_elastic(place / "elastic") is not None
    random_stats(source).save(place / "stats.safetensors")
    prune = ("tools/prune_checkpoint.py", "--recipe", place / "recipe.yaml", "--save")
    first = tool(*prune, place / "slim", "--load", place / "elastic", "--stats", place / "stats.safetensors")
    assert first.code == 0, first.stderr
    assert tool(SORT, "--load", place / "elastic", "--save", place / "sorted").code == 0
    error = tool(*prune, place / "none", "--load", place / "sorted", "--carry-statistics", place / "slim").error
    assert error.startswith(f"{place / 'sorted'}") and "was sorted, and the statistics are in the order of be" in error
    assert not (place / "none").exists()


ORDERS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "kind": (lambda o: o.update(more=1), "order is not an object with kept_hidden, experts, heads, neurons"),
    "hidden": (lambda o: o["kept_hidden"].pop(), "order: kept_hidden are not all, each once"),
    "twice": (lambda o: o["kept_hidden"].__setitem__(0, o["kept_hidden"][1]), "order: kept_hidden are not all"),
    "experts": (lambda o: o["experts"].pop("mtp.layers.0"), "order: experts are not given for exactly the blocks"),
    "expert": (lambda o: o["experts"]["mtp.layers.0"].__setitem__(0, 99), "order: experts of mtp.layers.0 are not all"),
    "heads": (lambda o: o["heads"]["mtp.layers.0"].sort(key=lambda h: h % 2), "order: heads of mtp.layers.0 are not"),
    "shared": (lambda o: o.update(shared_neurons=[]), "order: shared_neurons are not given for exactly"),
    "neurons": (lambda o: o["neurons"]["mtp.layers.0"].pop(), "order: neurons of mtp.layers.0 are not all"),
    "blocks": (lambda o: o["neurons"].pop("mtp.layers.0"), "order: neurons are not given for exactly the blocks"),
}


@pytest.mark.parametrize("damage", ORDERS)
def test_a_damaged_order_is_one_line(
    source: HFCheckpoint, random_stats: Callable[..., Statistics], damage: str
) -> None:
    elastic = elastic_of(planned(source, random_stats(source), [{}, {"moe_ffn_hidden_size": 24}]))
    order = sorting_plan(elastic.budgets)
    document = Elastic(tuple(_moved(each, order) for each in elastic.budgets), inverse(order)).to_dict()
    found = json.loads(json.dumps(copy.deepcopy(document)))
    assert parse_elastic(found).order == inverse(order)
    change, message = ORDERS[damage]
    change(found["order"])
    with pytest.raises(PlanError) as raised:
        parse_elastic(found)
    assert message in str(raised.value)
