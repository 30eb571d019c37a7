"""The soak says that two runs are one only where they are."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch.utils.tensorboard import SummaryWriter

from benchmarks.soak_compare import compare
from benchmarks.soak_run import plan_kills
from megatron_slim.checkpoint.convert import open_checkpoint
from megatron_slim.errors import SlimError

LINE = (
    "iteration {0:8d}/ 4 | consumed samples: 1 | learning rate: 1.0 | lm loss: {1} | number of skipped iterations: 0\n"
)


@pytest.fixture
def runs(tiny_release: Path, tmp_path: Path) -> Path:
    """Four steps; the second run was killed in the third, resumed from the first, and logged the mean of 2 and 3."""
    for name, steps in (("whole", [1, 2, 3, 4]), ("killed", [1, 2, 2, 3, 4])):
        shutil.copytree(tiny_release, tmp_path / name / "iter_0000004")
        (tmp_path / f"{name}.log").write_text("".join(LINE.format(step, step / 2) for step in steps))
        with SummaryWriter(str(tmp_path / name / "tensorboard")) as writer:
            for step in steps:
                writer.add_scalar("lm loss", step / 2, step)
    log = tmp_path / "killed.log"
    log.write_text(log.read_text().replace(LINE.format(3, 1.5), LINE.format(3, 1.25)))
    return tmp_path


def test_one_run(runs: Path) -> None:
    found = compare(runs, 4, averaged={3})
    assert found.pop("entries_compared") > 20
    assert found == {"bit_equal": True, "steps_of_logs_compared": 3, "losses_of_tensorboard_compared": 4}


def flip_a_bit(runs: Path) -> None:
    piece = open_checkpoint(runs / "killed" / "iter_0000004", runs / "hf").pieces["output_layer.weight"][0]
    with piece.file.open("r+b") as file:
        file.seek(piece.position + piece.length // 2)
        (byte,) = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte ^ 1]))


def log_another(runs: Path) -> None:
    with (runs / "killed.log").open("a") as log:
        log.write(LINE.format(2, 1.0000001))


def lose_a_step(runs: Path) -> None:
    log = runs / "whole.log"
    log.write_text(log.read_text().replace(LINE.format(4, 2.0), ""))


def write_another(runs: Path) -> None:
    with SummaryWriter(str(runs / "killed" / "tensorboard")) as writer:
        writer.add_scalar("lm loss", 1.0 + 2**-23, 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (flip_a_bit, "1 entries differ, output_layer.weight first"),
        (log_another, r"the logs differ at steps \[2\]"),
        (lose_a_step, r"the logs differ at steps \[4\]"),
        (write_another, r"what tensorboard got differs, \('lm loss', 2\) first"),
    ],
)
def test_not_one_run(runs: Path, tiny_release: Path, change: Callable[[Path], None], message: str) -> None:
    shutil.copytree(tiny_release.parent / "hf", runs / "hf")
    change(runs)
    with pytest.raises(SlimError, match=message):
        compare(runs, 4, averaged={3})


@pytest.mark.parametrize("seed", range(20))
def test_the_kills_follow_one_another(seed: int) -> None:
    args = argparse.Namespace(steps=24, save_interval=6, seed=seed)
    rank, save, last = plan_kills(args)
    assert (rank.what, save.what, last.what) == ("rank", "save", "all")
    assert 6 < rank.step < save.step < last.step < 24 and save.step % 6 == 0


@pytest.mark.slow
def test_a_short_soak(tool: Callable[..., Any], tmp_path: Path) -> None:
    arguments = ("--steps", 24, "--save-interval", 6, "--model", "tiny", "--seq-length", 32, "--json")
    found = tool("benchmarks/soak.py", "--dir", tmp_path / "soak", *arguments)
    assert found.code == 0, found.stderr
    assert found.json["bit_equal"] and [kill["what"] for kill in found.json["kills"]] == ["rank", "save", "all"]
    assert all(kill["exit_code"] != 0 and kill["seconds"] < 45 for kill in found.json["kills"])
