"""A run read back: what was written is shown, the later of two starts wins, and what is not a run is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch.utils.tensorboard import SummaryWriter

from megatron_slim.distillation.terms import LOSS_TERMS
from megatron_slim.training.run_figures import KINDS, Interval, Progress, RunConstants, figures

RUN = RunConstants(
    ranks=2, pipeline=2, chunks=1, layers=10, seq_length=8, iterations=40, flops={"student": 3e9, "teacher": 1e9}
)
NAMES = [term.name for term in LOSS_TERMS.values()]
Tool = Callable[..., Any]


def write_start(directory: Path, iterations: range, seconds: float) -> None:
    """What one start of a run leaves; its last layer is the most uneven."""
    computing = np.ones((2, 1, len(KINDS)))
    computing[0, 0, 2] = 0.0  # no losses on the first stage
    tokens = np.full((11, 4), 5.0)
    tokens[9] = 20, 0, 0, 0
    tokens[10] = 10, 10, 0, 0
    losses = np.ones((len(NAMES), 3))
    interval = Interval(10, 20, seconds, np.array([0.0, 1.0]), np.array([1e9, 2e9]), computing, losses, tokens)
    with SummaryWriter(str(directory)) as writer:
        for iteration in iterations:
            for name in (*NAMES, "other loss"):
                writer.add_scalar(name, 1.0 / iteration, iteration)
            found = figures(RUN, interval, Progress(iteration, 2 * iteration, 1.0, None))
            for tag, value in found.items() if iteration % 10 == 0 else ():
                writer.add_scalar(tag, value, iteration)


@pytest.fixture
def save(tmp_path: Path) -> Path:
    """Killed after iteration 20, resumed from 10 at half the speed."""
    write_start(tmp_path / "run/tensorboard", range(1, 21), seconds=10.0)
    write_start(tmp_path / "run/tensorboard", range(11, 31), seconds=20.0)
    return tmp_path / "run"


def test_a_step_without_a_loss_is_left_out(tool: Tool, save: Path) -> None:
    """Megatron logs 0 / 0 where no prediction of an MTP block counts, and JSON has no such number."""
    with SummaryWriter(str(save / "tensorboard")) as writer:
        writer.add_scalar("mtp lm loss", float("nan"), 31)
        writer.add_scalar("mtp never loss", float("nan"), 31)
    outcome = tool("tools/show_run.py", save, "--json")
    assert outcome.code == 0, outcome.stderr
    assert outcome.json["curves"]["mtp lm loss"]["last"] == pytest.approx(1 / 30)
    assert "mtp never loss" not in outcome.json["curves"]


def test_a_run_of_two_starts(tool: Tool, save: Path, tmp_path: Path) -> None:
    outcome = tool("tools/show_run.py", save, "--save", tmp_path / "run.png", "--json")
    assert outcome.code == 0, outcome.stderr
    found = outcome.json
    assert (tmp_path / "run.png").read_bytes()[:4] == b"\x89PNG" and found["picture"] == str(tmp_path / "run.png")
    assert found["iteration"] == 30 and found["progress"]["fraction"] == 0.75
    rates = found["curves"]["throughput/tokens_per_second_per_gpu"]
    # 20 samples of 8 tokens on 2 ranks, in 10 s and then in 20 s: iteration 20 was done again.
    assert rates == {"first": 8.0, "last": 4.0, "least": 4.0, "most": 8.0}
    assert found["curves"]["lm loss"]["last"] == pytest.approx(1 / 30)
    assert list(found["curves"])[: len(NAMES) + 1] == [*NAMES, "other loss"]
    assert list(found["stages"]) == ["1", "2"] and "losses" not in found["stages"]["1"]
    assert found["stages"]["2"]["total"] == pytest.approx(0.4)
    assert list(found["experts"]["max_over_mean"]) == [*(f"layer_{layer:02d}" for layer in range(1, 11)), "mtp_1"]
    assert found["experts"]["max_over_mean"]["layer_10"] == 4.0 and found["experts"]["without_tokens"]["mtp_1"] == 0.5
    assert found["memory_gb"] == {"1": 1.0, "2": 2.0}
    again = tool("tools/show_run.py", save / "tensorboard", "--save", tmp_path / "run.png")
    assert again.code == 2 and "run.png: output already exists" in again.error


def test_tables(tool: Tool, save: Path) -> None:
    text = tool("tools/show_run.py", save).stdout
    rows = [line.split("│")[1].strip() for line in text.splitlines() if line.startswith("│")]
    assert rows[0] == "lm loss" and rows[rows.index("layer_10") + 1] == "mtp_1"


def test_what_is_not_a_run(tool: Tool, tmp_path: Path) -> None:
    assert "no tensorboard events of a run" in tool("tools/show_run.py", tmp_path).error
    assert "none: no such directory" in tool("tools/show_run.py", tmp_path / "none").error
    with SummaryWriter(str(tmp_path)) as writer:
        writer.add_scalar("lm loss", 1.0, 1)
    assert "the events hold nothing of slim/" in tool("tools/show_run.py", tmp_path).error
