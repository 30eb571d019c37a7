"""Which optimizer updates what: the table covers a model, and says what training does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_slim.architecture.shape import FAMILIES
from megatron_slim.architecture.table import count_parameters
from megatron_slim.testing import tiny_shape, write_tiny_checkpoint
from megatron_slim.training.optimizer_table import optimizer_lines


@pytest.mark.parametrize("name", ["adam", "muon", "aurora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_it_covers_the_model(family: str, name: str) -> None:
    """Every element once."""
    shape = tiny_shape(family)
    lines = optimizer_lines(shape, name)
    assert sum(line.elements for line in lines) == count_parameters(shape).total
    assert {line.optimizer for line in lines} == {name, "adam"}


def test_thin_matrices_are_asked_for() -> None:
    shape = tiny_shape()
    moved = set()
    for before, after in zip(
        *(optimizer_lines(shape, "muon", all_matrices=each) for each in (False, True)), strict=True
    ):
        if before.optimizer != after.optimizer:
            moved.add((after.parameter.rpartition(".mlp.")[2].rpartition("self_attention.")[2], after.part))
    wanted = {
        ("router.weight", ""),
        ("shared_experts.gate_weight", ""),
        ("in_proj.weight", "beta"),
        ("in_proj.weight", "alpha"),
    }
    assert moved == wanted


def test_command(tool: Any, tmp_path: Path) -> None:
    write_tiny_checkpoint(tmp_path, tiny_shape())
    done = tool("tools/show_optimizer.py", "--load", tmp_path, "--json")
    rows = {(row["parameter"], row["part"]): row for row in done.json["rows"]}
    query = rows["decoder.layers.*.self_attention.linear_qkv.weight", "query"]
    assert (query["shape"], query["count"], query["optimizer"], query["why"]) == (
        [64, 64],
        1,
        "aurora",
        "square matrix",
    )
    shown = tool("tools/show_optimizer.py", "--load", tmp_path, "--optimizer", "muon").stdout
    assert "muon: " in shown and "one row for every head" in shown
    assert tool("tools/show_optimizer.py", "--load", tmp_path / "none").code == 2
