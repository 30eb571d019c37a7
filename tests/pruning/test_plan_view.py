"""Plans shown: the numbers against a count of the plan's own JSON, the files, and every kind of bad input."""

from __future__ import annotations

import base64
import html.parser
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_slim.architecture.fp8_sizes import RECIPES, size_violations
from megatron_slim.architecture.shape import FAMILIES
from megatron_slim.architecture.table import count_parameters
from megatron_slim.checkpoint.huggingface import HFCheckpoint
from megatron_slim.pruning.plan import Plan, make_plan
from megatron_slim.pruning.plan_page import write_page
from megatron_slim.pruning.plan_tables import sections
from megatron_slim.pruning.plan_view import depth_reason, ranking_lines, summary
from megatron_slim.pruning.statistics import Statistics
from megatron_slim.recipe import parse_recipe

SHOW = "tools/show_plan.py"
FILES = ["experts.png", "importances.png", "index.html", "ranking.jsonl"]
TARGET = {"num_layers": 5, "hidden_size": 48, "num_moe_experts": 4}
Tool = Callable[..., Any]


@pytest.fixture(scope="module")
def stats(source: HFCheckpoint, random_stats: Callable[..., Statistics]) -> Statistics:
    return random_stats(source)


@pytest.fixture
def work(tmp_path: Path, plan_for: Callable[..., Plan], stats: Statistics) -> Path:
    plan_for(TARGET, depth="block_influence", method="merge").save(tmp_path / "plan.json")
    stats.save(tmp_path / "stats.safetensors")
    return tmp_path


def test_numbers_are_those_of_the_plan(tool: Tool, work: Path, stats: Statistics, source: HFCheckpoint) -> None:
    found = tool(SHOW, work / "plan.json", "--stats", work / "stats.safetensors", "--json").json
    document = json.loads((work / "plan.json").read_text())
    assert found["before"]["parameters"] == count_parameters(source.shape).total
    assert found["after"]["num_layers"] == 5 and found["after"]["hidden_size"] == 48
    gone = sorted(set(range(8)) - set(document["kept_layers"]))
    assert [entry["layer"] for entry in found["dropped_layers"]] == gone
    for entry in found["dropped_layers"]:
        assert entry["block_influence"] == stats.tensors[f"model.layers.{entry['layer']}.block_influence"]
    (hidden,) = found["axes"]
    importance = stats.tensors["hidden.norm_activation"].astype(np.float64)
    assert (hidden["size"], hidden["kept"]) == (64, 48)
    assert hidden["importance_share"] == pytest.approx(
        sum(importance[i] for i in document["kept_hidden"]) / sum(importance), rel=1e-12
    )
    assert [entry["block"] for entry in found["experts"]] == list(document["experts"])
    for entry in found["experts"]:
        check_block(entry, document["experts"][entry["block"]], stats)


def check_block(entry: dict[str, Any], decision: dict[str, Any], stats: Statistics) -> None:
    kept, merged = decision["kept"], decision["merged"]
    absorbed = sum(len(group["members"]) - 1 for group in merged.values())
    assert (entry["kept"], entry["unchanged"]) == (len(kept), len(kept) - len(merged))
    assert (entry["absorbed"], entry["dropped"]) == (absorbed, 8 - len(kept) - absorbed)
    assert entry["largest_group"] == max(len(group["members"]) for group in merged.values())
    for key, kind in (("importance_share", "soft_logits"), ("routing_share", "frequency")):
        values = stats.tensors[f"{entry['block']}.mlp.experts.{kind}"].astype(np.float64)
        assert entry[key] == pytest.approx(sum(values[i] for i in kept) / sum(values), rel=1e-12)
    values = stats.tensors[f"{entry['block']}.mlp.experts.soft_logits"].tolist()
    assert entry["least_kept"]["importance"] == min(values[i] for i in kept)
    assert entry["most_dropped"]["importance"] == max(value for i, value in enumerate(values) if i not in kept)


def test_tables_hold_the_same_numbers(plan_for: Callable[..., Plan], stats: Statistics) -> None:
    plan = plan_for(TARGET, method="prune")
    tables = {section.title: section for section in sections(plan, stats)}
    assert all(len(row) == len(section.columns) for section in tables.values() for row in section.rows)
    assert [row[0] for row in tables["Removed layers"].rows] == ["5", "6", "7"]
    assert tables["Removed layers"].note == "3 of 8 layers are removed: the last ones"
    first = dict(zip(tables["Experts by block"].columns, tables["Experts by block"].rows[0], strict=True))
    numbers = summary(plan, stats)["experts"][0]
    assert first["importance"] == f"{numbers['importance_share']:.1%}"
    assert (first["kept"], first["absorbed"], first["dropped"], first["largest"]) == ("4", "0", "4", "1")
    fp8 = tables["Training in FP8"]
    assert fp8.columns[:2] == ("recipe", "tp 1") and [row[0] for row in fp8.rows] == list(RECIPES)
    for recipe, *cells in fp8.rows:
        ranks = [int(column.removeprefix("tp ")) for column in fp8.columns[1:]]
        found = [size_violations(plan.target_shape, recipe, tp=tp) for tp in ranks]
        assert cells == ["no" if violations else "fits" for violations in found], recipe
    assert fp8.note and fp8.note in size_violations(plan.target_shape, "tensorwise")


def test_without_statistics_their_figures_are_left_out(tool: Tool, work: Path, plan_for: Callable[..., Plan]) -> None:
    outcome = tool(SHOW, work / "plan.json", "--json")
    assert outcome.code == 0 and "Experts by block" in outcome.stdout and "block influence" in outcome.stdout
    assert outcome.json["axes"][0]["importance_share"] is None and outcome.json["save"] is None
    assert all(entry["cosine"] is None for entry in outcome.json["dropped_layers"])
    tables = {section.title: section for section in sections(plan_for(TARGET), None)}
    assert "importance" not in tables["Experts by block"].columns
    assert tables["Ranked axes"].rows[0] == ("hidden dimensions", "residual stream", "48", "64")


def test_why_layers_go(plan_for: Callable[..., Plan], stats: Statistics) -> None:
    assert depth_reason(plan_for({}), stats) == "all layers stay"
    plan = plan_for({"num_layers": 6}, depth="adjacent_cosine")
    cosines = [float(stats.tensors[f"model.layers.{layer}.cosine"]) for layer in range(1, 7)]
    start = 1 + cosines.index(max(cosines))
    assert f"from layer {start}" in depth_reason(plan, stats) and f"{max(cosines):.4f}" in depth_reason(plan, stats)
    plan = plan_for({"num_layers": 6}, depth="block_influence")
    influences = sorted(float(stats.tensors[f"model.layers.{layer}.block_influence"]) for layer in range(8))
    assert f"at most {influences[1]:.4g}; the others have at least {influences[2]:.4g}" in depth_reason(plan, stats)


@pytest.mark.parametrize("method", ["prune", "merge", "partial_preservation"])
def test_ranking_is_complete_and_agrees_with_the_plan(
    plan_for: Callable[..., Plan], stats: Statistics, method: str
) -> None:
    plan = plan_for(TARGET, method=method)
    lines = [json.loads(line) for line in ranking_lines(plan, stats)]
    assert len(lines) == 6 * 8
    assert list(dict.fromkeys(line["block"] for line in lines)) == list(plan.experts)
    for block, decision in plan.to_dict()["experts"].items():
        mine = [line for line in lines if line["block"] == block]
        assert [line["rank"] for line in mine] == list(range(1, 9))
        assert sorted(line["expert"] for line in mine) == list(range(8))
        values = [line["importance"] for line in mine]
        assert values == sorted(values, reverse=True)
        assert values == [stats.tensors[f"{block}.mlp.experts.soft_logits"][line["expert"]] for line in mine]
        assert sorted(line["expert"] for line in mine if line["kept"]) == decision["kept"]
        into = {str(line["expert"]): line["merged_into"] for line in mine if line["merged_into"] is not None}
        expected = {
            str(member): int(base)
            for base, group in decision["merged"].items()
            for member in group["members"]
            if member != int(base)
        }
        assert into == expected and (method == "prune") == (not into)


def test_equal_importances_rank_by_index(source: HFCheckpoint, stats: Statistics) -> None:
    alike = {key: np.zeros_like(value) for key, value in stats.tensors.items()}
    flat = Statistics(alike, stats.metadata)
    plan = make_plan(parse_recipe({"version": 1, "target": {"num_moe_experts": 4}}), flat, source.shape)
    lines = [json.loads(line) for line in ranking_lines(plan, flat)]
    assert [line["expert"] for line in lines[:8]] == list(range(8))
    assert summary(plan, flat)["experts"][0]["importance_share"] is None, "nothing of nothing"


class References(html.parser.HTMLParser):
    """Everything in a page that a browser would fetch or run."""

    def __init__(self) -> None:
        super().__init__()
        self.pictures: list[str] = []
        self.others: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        for key, value in attributes:
            if key == "src" and tag == "img":
                self.pictures.append(str(value))
            elif key in ("src", "href", "srcset", "data", "action", "poster") or key.startswith("on"):
                self.others.append(f"{tag} {key}={value}")
        if tag in ("script", "link", "iframe", "object", "base"):
            self.others.append(tag)


def test_directory_is_complete_and_always_the_same(tool: Tool, work: Path) -> None:
    for name in ("one", "two"):
        outcome = tool(SHOW, work / "plan.json", "--stats", work / "stats.safetensors", "--save", work / name)
        assert outcome.code == 0, outcome.stderr
        assert sorted(file.name for file in (work / name).iterdir()) == FILES
    for file in FILES:
        assert (work / "one" / file).read_bytes() == (work / "two" / file).read_bytes()
    text = (work / "one" / "index.html").read_text()
    page = References()
    page.feed(text)
    assert page.others == [] and "url(" not in text and "@import" not in text and not re.search("https?:", text)
    embedded = [base64.b64decode(source.removeprefix("data:image/png;base64,")) for source in page.pictures]
    assert embedded == [(work / "one" / name).read_bytes() for name in ("importances.png", "experts.png")]
    assert all(content.startswith(b"\x89PNG") for content in embedded)


@pytest.mark.one_case
@pytest.mark.parametrize("source", FAMILIES, indirect=True)
@pytest.mark.parametrize(
    "target", [{}, {"num_layers": 7}, {"hidden_size": 8, "num_moe_experts": 2}, {"num_moe_experts": 7}], ids=str
)
def test_any_plan_can_be_drawn(
    source: HFCheckpoint, random_stats: Callable[..., Statistics], tmp_path: Path, target: dict[str, int]
) -> None:
    """Either family, nothing pruned or one axis; with all importances 0 as well."""
    stats = random_stats(source, 3)
    for name, given in {
        "random": stats,
        "zero": Statistics({key: np.zeros_like(value) for key, value in stats.tensors.items()}, stats.metadata),
    }.items():
        plan = make_plan(parse_recipe({"version": 1, "target": target}), given, source.shape)
        write_page(plan, given, sections(plan, given), tmp_path / name)
        assert sorted(file.name for file in (tmp_path / name).iterdir()) == FILES


def test_bad_input_is_one_line_and_leaves_nothing(
    tool: Tool, work: Path, source: HFCheckpoint, random_stats: Callable[..., Statistics]
) -> None:
    plan, stats = work / "plan.json", work / "stats.safetensors"
    random_stats(source, 1).save(work / "other.safetensors")
    (work / "no-plan.json").write_text("{}")
    (work / "there").mkdir()
    before = sorted(work.iterdir())
    save = ("--save", work / "new")
    assert "not a plan" in tool(SHOW, work / "no-plan.json", "--stats", stats, *save).error
    assert "no such file" in tool(SHOW, work / "missing.json").error
    assert "not readable as JSON" in tool(SHOW, stats).error
    assert "follows from other statistics" in tool(SHOW, plan, "--stats", work / "other.safetensors", *save).error
    assert "not readable as safetensors" in tool(SHOW, plan, "--stats", plan, *save).error
    assert "give --stats" in tool(SHOW, plan, *save).error
    assert "already exists" in tool(SHOW, plan, "--stats", stats, "--save", work / "there").error
    assert sorted(work.iterdir()) == before
