"""Which optimizer updates what: the table covers a model, and says what training does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_slim.architecture.parts import PARTS, TrainOnly
from megatron_slim.architecture.shape import FAMILIES
from megatron_slim.architecture.table import count_parameters
from megatron_slim.testing import tiny_shape, write_tiny_checkpoint
from megatron_slim.training.optimizer_table import FROZEN, optimizer_lines


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


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_frozen_says_so(family: str) -> None:
    """Every part alone trains elements of its own, all of them together every element."""
    shape, trained = tiny_shape(family), 0
    for part in (part for part in PARTS if not TrainOnly.of(part).violations(shape)):
        lines = optimizer_lines(shape, "aurora", only=TrainOnly.of(part))
        assert sum(line.elements for line in lines) == count_parameters(shape).total
        own = sum(line.elements for line in lines if line.optimizer != FROZEN)
        assert own > 0, part
        trained += own
    assert trained == count_parameters(shape).total


def test_command_with_parts(tool: Any, tmp_path: Path) -> None:
    write_tiny_checkpoint(tmp_path, tiny_shape())
    done = tool("tools/show_optimizer.py", "--load", tmp_path, "--train-only", "attention,experts@0", "--json")
    by_name: dict[str, set[str]] = {}
    for row in done.json["rows"]:
        by_name.setdefault(row["parameter"], set()).add(row["optimizer"])
    assert by_name["output_layer.weight"] == {"frozen"}
    assert by_name["decoder.layers.*.mlp.experts.experts.linear_fc1.weight"] == {"frozen", "aurora"}
    assert by_name["decoder.layers.*.self_attention.linear_proj.weight"] == {"aurora"}
    shown = tool("tools/show_optimizer.py", "--load", tmp_path, "--train-only", "attention").stdout
    assert "not in --train-only" in shown
    refused = tool("tools/show_optimizer.py", "--load", tmp_path, "--train-only", "mlp")
    assert refused.code == 2 and "--train-only mlp: the model has none" in refused.stderr
