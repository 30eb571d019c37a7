"""The program of docs/guides/add_a_loss.md, which adds a term to the loss from outside the package, in whole runs."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_slim.testing import reserved_port, run_distributed
from tests.training.conftest import Workplace, read_scalars, train
from tests.training.test_parallel_layouts import TERMS

ROOT = Path(__file__).resolve().parents[2]
WEIGHTS = "--z-weight-schedule linear --z-weight-start 0.01 --z-weight-end 0.03".split()
NONE = "--z-weight-start 0 --z-weight-end 0".split()
LAYOUTS = {
    "tp2": (2, "--tensor-model-parallel-size 2 --sequence-parallel"),
    "pp2": (2, "--pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2"),
    "cp2": (2, "--context-parallel-size 2"),
    "teacher ahead": (1, "--teacher-ahead 2"),
}


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    guide = (ROOT / "docs/guides/add_a_loss.md").read_text(encoding="utf-8")
    (text,) = [text for text in re.findall(r"```python\n(.*?)```", guide, flags=re.DOTALL) if "LOSS_TERMS[" in text]
    file = tmp_path_factory.mktemp("program") / "my_run.py"
    file.write_text(text)
    return file


def start(program: Path, argv: list[str]) -> subprocess.CompletedProcess[str]:
    """As the guide says."""
    with reserved_port() as port:
        command = f"-m megatron_slim torchrun --nproc-per-node 1 --master-port {port} {program}".split()
        return subprocess.run([sys.executable, *command, *argv], capture_output=True, text=True, cwd=ROOT, timeout=120)


def train_with(program: Path, argv: list[str], log: str) -> None:
    """Body of one rank."""
    runpy.run_path(str(program))
    train(argv, log)


@pytest.fixture(scope="module")
def own(program: Path, workplace: Workplace) -> tuple[dict[str, list[float]], str]:
    """What a run logs, and what it prints."""
    argv, log = workplace.argv("own", "--micro-batch-size", "2", *WEIGHTS), workplace.new_log("own")
    run_distributed(1, train_with, program, argv, str(log), initialise=False)
    return read_scalars(workplace.root / "tensorboard/own"), log.read_text()


def test_the_term_is_minimised_and_logged(own: Any, reference: dict[str, list[float]]) -> None:
    found, printed = own
    assert found["z weight"] == pytest.approx([0.01, 0.015, 0.02, 0.025, 0.03]) == found["slim/loss/z_weight"]
    assert len(found["z loss validation"]) == len(found["lm loss validation"]) and "z weight validation" not in found
    # Before the first step nothing differs but the gradient; log Z of 120 equal logits is 4.79.
    assert [found[term][0] for term in TERMS[:5]] == [reference[term][0] for term in TERMS[:5]]
    assert found["grad-norm"][0] != reference["grad-norm"][0] and found["lm loss"][1] != reference["lm loss"][1]
    assert found["z loss"][0] == pytest.approx(np.log(120) ** 2, rel=0.1) and found["z loss"][-1] < found["z loss"][0]
    kd, beta, z = (np.array(found[name]) for name in ("kd lambda", "mtp beta", "z weight"))
    lm, teacher, mtp_lm, mtp_kd, z_loss = (np.array(found[name]) for name in (*TERMS[:2], *TERMS[3:5], "z loss"))
    whole = (1 - kd) * lm + kd * teacher + beta * ((1 - kd) * mtp_lm + kd * mtp_kd) + z * z_loss
    assert found["slim/loss/share_z"] == pytest.approx(z * z_loss / whole, rel=1e-5)
    (last,) = [line for line in printed.splitlines() if line.startswith("slim 5/5")]
    assert re.search(r"mtp_kd \d+%, z \d+% \| kd_lambda 0\.750, mtp_beta 0\.100, z_weight 0\.0300 ", last)
    assert re.search(r"\| z loss: \d", printed)


@pytest.mark.slow
def test_a_term_without_weight_changes_no_bit(program: Path, workplace: Workplace, reference: Any) -> None:
    argv = workplace.argv("none", "--micro-batch-size", "2", *NONE)
    run_distributed(1, train_with, program, argv, str(workplace.new_log("none")), initialise=False)
    found = read_scalars(workplace.root / "tensorboard/none")
    for term in TERMS:
        assert found[term] == reference[term], term
    assert set(found["z weight"]) == {0.0} == set(found["slim/loss/share_z"]) and len(found["z loss"]) == 5


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_the_same_run_under_every_layout(program: Path, workplace: Workplace, own: Any, name: str) -> None:
    ranks, flags = LAYOUTS[name]
    argv = workplace.argv(f"own-{name}", "--micro-batch-size", "2", *WEIGHTS, *flags.split())
    run_distributed(ranks, train_with, program, argv, str(workplace.new_log(f"own-{name}")), initialise=False)
    found = read_scalars(workplace.root / f"tensorboard/own-{name}")
    for term in (*TERMS, "z loss"):
        assert found[term] == pytest.approx(own[0][term], rel=1e-4), term


@pytest.mark.slow
def test_who_does_not_know_the_term_finds_it_in_the_log(
    tool: Callable[..., Any], workplace: Workplace, own: Any, tmp_path: Path
) -> None:
    outcome = tool("tools/show_run.py", workplace.root / "tensorboard/own", "--save", tmp_path / "run.png", "--json")
    curves = outcome.json["curves"]
    assert [name for name in curves if name.endswith(" loss")] == [*TERMS[:5], "z loss"]
    assert curves["z loss"]["last"] == pytest.approx(own[0]["z loss"][-1])
    assert (tmp_path / "run.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.slow
def test_the_program_runs_as_the_guide_says(program: Path, workplace: Workplace) -> None:
    done = start(program, workplace.argv("started", "--micro-batch-size", "2", *WEIGHTS))
    assert done.returncode == 0, done.stderr
    assert re.search(r"\| z loss: \d", done.stdout)


@pytest.mark.slow
def test_a_mistake_is_one_line(program: Path, workplace: Workplace, tmp_path: Path) -> None:
    argv = workplace.argv("refused", "--micro-batch-size", "2")
    text = program.read_text()
    for name, wrong, message in (
        ("name", text.replace('"z loss"', '"lm loss"'), "error: LOSS_TERMS['z']: two terms are called 'lm loss'"),
        ("sum", text.replace(".square()", ".square().sum()"), "error: the function of 'z loss' gives [] for 3 tokens"),
    ):
        (tmp_path / f"{name}.py").write_text(wrong)
        done = start(tmp_path / f"{name}.py", argv)
        (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert done.returncode == 2 and line.startswith(message), done.stderr
    unknown = start(program, [*argv, "--z-weight-start", "nan"])
    assert unknown.returncode == 2 and "--z-weight-start nan is not finite" in unknown.stderr
