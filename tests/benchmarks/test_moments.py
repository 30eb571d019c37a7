"""What carried moments are worth: all runs of the benchmark, of a tiny model, and its table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from benchmarks.moments_run import markdown
from megatron_slim.recipe_run import MOMENT_RULES
from megatron_slim.testing import tiny_shape, write_tiny_checkpoint, write_tokens

MOMENTS = "benchmarks/moments.py"
VARIANTS = ["new", "new, warm-up", *(f"carried, {rule}" for rule in MOMENT_RULES)]


def test_the_table_has_means_and_paired_differences() -> None:
    losses = {
        "new": [{"10": 4.0}, {"10": 5.0}],
        "carried, base": [{"10": 3.9}, {"10": 4.7}],
    }
    lines = markdown({"after": [10], "losses": losses}).splitlines()
    assert lines[2] == "| new | 4.5000 |  |"
    assert lines[3] == "| carried, base | 4.3000 | -0.2000 ± 0.1414 |"


def test_steps_without_a_validation_are_refused(tool: Any, tmp_path: Path) -> None:
    options = ("--dir", tmp_path / "out", "--teacher", tmp_path, "--data", "d", "--validation-data", "d")
    done = tool(MOMENTS, *options, "--after", 15)
    assert done.code == 2 and "--after 15 is not a multiple of 10 up to --steps" in done.error
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_every_way_to_begin_is_run(tool: Any, tmp_path: Path) -> None:
    write_tiny_checkpoint(tmp_path / "teacher", tiny_shape(num_layers=8, num_moe_experts=8, vocab_size=96), seed=1)
    write_tokens(tmp_path / "data", np.random.default_rng(0).integers(0, 96, (200, 33)))
    phases = [{"target": {"num_layers": 6}}, {"target": {"num_moe_experts": 4, "hidden_size": 40}}]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"phases": phases}))
    options = ["--dir", tmp_path / "out", "--teacher", tmp_path / "teacher", "--recipe", tmp_path / "recipe.yaml"]
    options += ["--data", tmp_path / "data", "--validation-data", tmp_path / "data", "--seq-length", 32]
    options += ["--steps-before", 10, "--steps", 10, "--after", 10, "--warmup", 5, "--seeds", 1, "--ranks", 1]
    done = tool(MOMENTS, *options, "--json")
    assert done.code == 0, done
    losses = done.json["losses"]
    assert list(losses) == VARIANTS and len({json.dumps(each) for each in losses.values()}) == len(VARIANTS)
