"""docs/formats.md: the versions that are written and read, and what other ones get."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from megatron_slim import recipe, sample_set
from megatron_slim.checkpoint.records import PROVENANCE, REFERENCE
from megatron_slim.checkpoint.reference import read_reference
from megatron_slim.compression import report_facts
from megatron_slim.errors import CheckpointError, RecipeError, SlimError
from megatron_slim.pruning import elastic, plan, statistics
from megatron_slim.pruning.plan_reader import parse_plan
from megatron_slim.pruning.statistics import Statistics
from megatron_slim.recipe import parse_recipe
from megatron_slim.testing import tiny_shape, write_tiny_checkpoint

PAGE = (Path(__file__).resolve().parents[1] / "docs/formats.md").read_text(encoding="utf-8")


def row(start: str) -> list[str]:
    """Cells of the first row of the page's tables whose first cell begins so."""
    (line,) = re.findall(rf"^\| {re.escape(start)}.*$", PAGE[: PAGE.index("## Newer")], flags=re.MULTILINE)
    return [cell.strip().strip("`") for cell in line.strip("|").split("|")]


def test_the_page_has_the_versions_of_the_code() -> None:
    assert row("recipe")[2:] == [str(recipe.VERSION)] * 2
    assert row("plan")[2:] == [str(plan.VERSION)] * 2
    assert row("budgets of an elastic checkpoint")[2:] == [str(elastic.VERSION)] * 2
    assert row("statistics")[2] == statistics.FORMAT
    assert row("sample set")[2:] == [str(sample_set.FORMAT)] * 2
    assert row("report of a compression run")[2:] == [str(report_facts.VERSION), "never"]
    assert PROVENANCE in row("provenance")[0] and REFERENCE in row("recorded losses")[0]


@pytest.mark.parametrize("version", [recipe.VERSION - 1, recipe.VERSION + 1])
def test_another_version_of_a_recipe(version: int) -> None:
    with pytest.raises(RecipeError, match=f"version {version} .* reads version {recipe.VERSION}"):
        parse_recipe({"version": version, "target": {"num_layers": 4}})


@pytest.mark.parametrize("version", [plan.VERSION - 1, plan.VERSION + 1])
def test_another_version_of_a_plan(version: int) -> None:
    with pytest.raises(SlimError, match=f"version {plan.VERSION}"):
        parse_plan({"version": version})


@pytest.mark.parametrize("number", [1, 3])
def test_another_version_of_statistics(number: int, tmp_path: Path) -> None:
    assert statistics.FORMAT.endswith(" 2")
    metadata = {"format": f"{statistics.FORMAT[:-1]}{number}"}
    save_file({"hidden.norm_activation": np.zeros(4, np.float32)}, tmp_path / "stats", metadata)
    with pytest.raises(CheckpointError, match=f"not {statistics.FORMAT!r}"):
        Statistics.load(tmp_path / "stats")


def test_a_record_of_losses_may_have_more_keys_but_no_fewer(tmp_path: Path) -> None:
    content: Mapping[str, Any] = {"tokens": [[1, 2, 3]], "losses": [[1.0, 2.0]], "dtype": "float32"}
    (tmp_path / REFERENCE).write_text(json.dumps({**content, "of a later release": 1}))
    assert read_reference(tmp_path, 8) is not None
    for missing in content:
        (tmp_path / REFERENCE).write_text(json.dumps({key: content[key] for key in content if key != missing}))
        with pytest.raises(CheckpointError):
            read_reference(tmp_path, 8)


@pytest.mark.parametrize("former", ['{"of a later release": [1]}', "not JSON"])
def test_any_provenance_is_carried_along(former: str, tool: Callable[..., Any], tmp_path: Path) -> None:
    shape = tiny_shape(num_layers=1, layer_types=("full_attention",), num_moe_experts=2, mtp_num_layers=0)
    source = write_tiny_checkpoint(tmp_path / "hf", shape)
    (source / PROVENANCE).write_text(former)
    assert tool("tools/convert_checkpoint.py", "--load", source, "--save", tmp_path / "dist").code == 0
    (found,) = (tmp_path / "dist").rglob(PROVENANCE)
    carried = json.loads(found.read_text())["source"]["provenance"]
    assert carried == json.loads(former) if former.startswith("{") else carried.startswith("not readable")
