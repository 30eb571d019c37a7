"""What lies between two phases is measured, tiny, with Megatron's own saving and loading."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import models, processes, switch_run
from megatron_slim.architecture.table import count_parameters


def test_what_a_pruning_with_moments_must_move(tmp_path: Path) -> None:
    """Twice as much of main weights as of weights, and of moments no merged experts."""
    config = models.scaled_config(4, 64, 0.003e9)
    models.write_model(tmp_path / "hf", config, sparse=False)
    models.write_statistics(tmp_path / "hf", tmp_path / "stats")
    models.write_recipe(config, tmp_path / "recipe.yaml")
    command = (processes.ROOT / "tools" / "plan_pruning.py", "--load", tmp_path / "hf", "--save", tmp_path / "plan")
    processes.run(processes.python(*command, "--stats", tmp_path / "stats", "--recipe", tmp_path / "recipe.yaml"))
    weights = models.needed_by_plan(tmp_path / "plan")
    base = models.needed_by_plan(tmp_path / "plan", 4, merged=False)
    found = switch_run.needed_for_state(tmp_path / "plan")
    assert (
        base.kept
        == base.written
        < 2 * weights.kept
        < 2 * weights.rows
        < 2 * models.model_bytes(models.shape_of(config))
    )
    assert found.rows == 3 * weights.rows + 2 * base.rows
    assert found.written == 7 * weights.written < 7 * count_parameters(models.shape_of(config)).total * 2


@pytest.mark.slow
def test_switch(tmp_path: Path) -> None:
    script = processes.ROOT / "benchmarks" / "switch.py"
    options = ("--dir", tmp_path / "work", "--size-gb", 0.05, "--hidden-size", 64, "--layers", 4, "--repeats", 1)
    results = json.loads(processes.run(processes.python(script, *options, "--json")).stdout.splitlines()[-1])
    parts, nbytes = results["parts"], results["bytes"]
    assert set(parts) == {"save", "prune", "load"}
    assert all(
        part["over_raw_io"] == pytest.approx(part["seconds"] / part["raw_io_seconds"]) for part in parts.values()
    )
    total = [sum(part[key] for part in parts.values()) for key in ("seconds", "raw_io_seconds")]
    assert results["over_raw_io"] == pytest.approx(total[0] / total[1])
    # 14 bytes of a parameter are saved, and names and sizes around each piece
    assert 0.02e9 < nbytes["pruned"] < nbytes["trained"] < 0.2e9 and nbytes["kept"] < nbytes["rows_read"]
    assert results["peak_anonymous_bytes"] > results["interpreter_anonymous_bytes"] > 50e6
    assert not any((tmp_path / "work").iterdir()), "left something behind"
