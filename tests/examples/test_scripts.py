"""The shell scripts: what they refuse, the command they would run, and the demo in miniature."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_slim.architecture.hf_config import shape_from_hf_config
from megatron_slim.files import to_json
from megatron_slim.testing import tiny_hf_config, tiny_shape, write_tiny_checkpoint, write_tokens
from megatron_slim.training.variables import expand

ROOT = Path(__file__).resolve().parents[2]
WARMUP = {"LR_WARMUP_ITERS": "7"}
TRAIN, DEMO, ELASTIC_DEMO = (
    ROOT / "examples/slimqwen" / name for name in ("pretrain_distill.sh", "demo.sh", "demo_elastic.sh")
)


def run(script: Path, *arguments: str, timeout: float = 60, **variables: str) -> subprocess.CompletedProcess[str]:
    clean = {key: value for key, value in os.environ.items() if key in ("PATH", "HOME", "LANG", "TMPDIR")}
    environment = clean | {"PYTHON": sys.executable} | variables
    return subprocess.run(
        ["bash", str(script), *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def megatrons(done: subprocess.CompletedProcess[str]) -> list[str]:
    """Megatron's arguments, as a rank makes them of the command that was printed."""
    words = shlex.split(done.stdout)
    return expand(words[words.index("megatron_slim.cli.pretrain") + 1 :], "")


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({}, "SAVE is not set"),
        ({"SAVE": "run"}, "DATA is not set"),
        ({"SAVE": "run", "DATA": "text"}, "neither STUDENT nor HF_CONFIG is set"),
        ({"SAVE": "run", "DATA": "text", "STUDENT": "s", "PRECISION": "fp8"}, "PRECISION=fp8: it is bf16 or fp32"),
        ({"SAVE": "run", "DATA": "text", "STUDENT": "s", "PROGRAM": "none.py"}, "PROGRAM=none.py: no such file"),
        *(
            (
                {"SAVE": "run", "DATA": "text", "STUDENT": "s", name: value},
                f"{name}={value} is not a whole number above",
            )
            for name, value in (("TP", "two"), ("EP", "08"), ("PP", "0"), ("NNODES", "2.5"), ("NPROC_PER_NODE", "-1"))
        ),
    ],
)
def test_what_is_missing_is_named(variables: dict[str, str], message: str) -> None:
    done = run(TRAIN, **variables)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ") and message in line


def test_dry_run_prints_the_command() -> None:
    variables = {"SAVE": "run", "DATA": "0.3 a 0.7 b", "STUDENT": "pruned", "TEACHER": "big", "TP": "2", "PP": "2"}
    done = run(TRAIN, "--lr", "1", DRY_RUN="1", PRECISION="bf16", **variables)
    assert done.returncode == 0, done.stderr
    assert "-m megatron_slim torchrun --node-rank 0 --nproc-per-node 4 " in done.stdout
    words = megatrons(done)
    command = " ".join(words)
    assert "--data-path 0.3 a 0.7 b --split" in command
    assert "--pretrained-checkpoint pruned --teacher-load big" in command and "--sequence-parallel --bf16" in command
    assert "--default-lr-warmup-iters 2000" in command and "--lr-warmup-iters" not in words
    assert words[-2:] == ["--lr", "1"] and "--lr 4e-4" in command  # what is given by hand comes last and wins


@pytest.mark.slow
def test_a_program_of_the_users_own(tmp_path: Path) -> None:
    """It registers a term of the loss, whose flags our own main does not have."""
    own, shape = tmp_path / "my run.py", tiny_shape(vocab_size=96)
    own.write_text(
        "import sys\nfrom megatron_slim.cli.pretrain import main\n"
        "from megatron_slim.distillation.terms import LOSS_TERMS, MTP_BETA, LossTerm, LossWeight\n"
        "WEIGHT = LossWeight('z weight', MTP_BETA.default, 'the weight of z')\n"
        "LOSS_TERMS['z'] = LossTerm('z loss', lambda inputs: inputs.logits.square().sum(-1), WEIGHT)\n"
        "if __name__ == '__main__':\n    main(sys.argv[1:], sys.argv[0])\n"
    )
    (tmp_path / "config.json").write_text(to_json(tiny_hf_config(shape)))
    variables = {"HF_CONFIG": str(tmp_path), "DATA": str(tmp_path / "data"), "SAVE": str(tmp_path / "run")}
    write_tokens(tmp_path / "data", np.random.default_rng(0).integers(0, 96, (40, 33)))
    variables |= {"SEQ_LENGTH": "32", "GLOBAL_BATCH_SIZE": "2", "TRAIN_ITERS": "2", "EVAL_ITERS": "0"}
    variables |= {"MASTER_PORT": "29683"}
    flags = ("--z-weight-end", "0.25", "--check-arguments")
    shown = shlex.split(run(TRAIN, *flags, DRY_RUN="1", PROGRAM=str(own), **variables).stdout)
    place = shown.index(str(own))
    assert shown[place - 2 : place] == ["--master-port", "29683"] and shown[place + 1 : place + 3] == ["--tp", "1"]
    assert "--module" not in shown and shown[-3:] == [*flags]
    done = run(TRAIN, *flags, timeout=200, PROGRAM=str(own), **variables)
    assert done.returncode == 0, done.stderr
    without = run(TRAIN, *flags, timeout=200, **variables)
    assert without.returncode == 2 and "--z-weight-end" in without.stderr


def test_settings_are_a_file_here_before_one_along_path(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    for folder, size in ((tmp_path / "bin", 64), (tmp_path, 2)):
        (folder / "mine.sh").write_text(f"TP=${{TP:-{size}}}\n")
    environment = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "PYTHON": sys.executable, "DRY_RUN": "1"}
    environment |= {"SAVE": "run", "DATA": "text", "STUDENT": "s", "SETTINGS": "mine.sh"}
    options = {"cwd": tmp_path, "env": environment, "capture_output": True, "text": True, "timeout": 60}
    done = subprocess.run(["bash", str(TRAIN)], check=True, **options)
    assert "--tp 2 " in done.stdout


def test_tokens_are_counted_by_the_sizes_that_are_trained() -> None:
    """Megatron's flags take precedence."""
    variables = {"SAVE": "run", "DATA": "text", "STUDENT": "s", "TOKENS": "1000000", "DRY_RUN": "1"}
    words = megatrons(run(TRAIN, "--global-batch-size", "8", "--seq-length=32", **variables))
    assert words[words.index("--train-iters") + 1] == str(-(-1000000 // (8 * 32)))
    words = megatrons(run(TRAIN, "--train-samples", "8", **(variables | {"TOKENS": ""})))
    assert "--train-iters" not in words and words[-2:] == ["--train-samples", "8"]


def test_separate_validation_data() -> None:
    done = run(
        TRAIN,
        DRY_RUN="1",
        SAVE="run",
        DATA="a",
        VALID_DATA="b",
        HF_CONFIG="config",
        NNODES="4",
        NODE_RANK="3",
        **WARMUP,
    )
    command = " ".join(megatrons(done))
    assert "--lr-warmup-iters 7" in command and "--default-lr-warmup-iters" not in command
    assert "--train-data-path a --valid-data-path b --test-data-path b" in command and "--hf-config config" in command
    assert "--node-rank 3 " in done.stdout and "--nnodes 4 " in done.stdout


def test_the_demo_spares_a_directory_that_is_not_its_own(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("data")
    done = run(DEMO, str(tmp_path))
    assert done.returncode == 2 and "is not a demo's output" in done.stderr
    assert (tmp_path / "precious").read_text() == "data"


def test_the_elastic_demo_needs_the_other_ones_teacher(tmp_path: Path) -> None:
    done = run(ELASTIC_DEMO, str(tmp_path / "out"), DEMO=str(tmp_path))
    assert done.returncode == 2 and "has no teacher and data; run make demo first" in done.stderr
    assert not (tmp_path / "out").exists()


def test_the_report_of_the_elastic_demo(tmp_path: Path, tool: Callable[..., Any]) -> None:
    """Means and standard deviations over seeds, and the largest budget's loss above that of it alone."""
    results = tmp_path / "results"
    results.mkdir()
    sizes, names = {"parameters": 5}, ("large", "small")

    def figures(loss: float) -> dict[str, Any]:
        return {"loss": loss, "mtp_loss": [loss + 1], "kl": loss / 10, "sizes": sizes}

    for way, loss in (
        ("pruned", 9.0),
        ("in-turn-1", 4.25),
        ("in-turn-2", 4.5),
        ("together-1", 4.0),
        ("together-2", 4.0),
    ):
        rows = [{"budget": name, **figures(loss + number)} for number, name in enumerate(names)]
        (results / f"evaluate-{way}.json").write_text(json.dumps({"budgets": rows}))
    for seed, name, loss in ((1, "large", 4.0), (2, "large", 4.5), (1, "small", 5.0), (2, "small", 5.5)):
        (results / f"evaluate-alone-{name}-{seed}.json").write_text(json.dumps(figures(loss)))
    for seed in (1, 2):
        (results / f"evaluate-alone-all-{seed}.json").write_text(json.dumps(figures(4.0)))
    (tmp_path / "timings.jsonl").write_text('{"step": "prune", "seconds": 3}\n')
    done = tool("examples/slimqwen/demo_elastic_report.py", tmp_path)
    assert done.code == 0, done
    lines = [line.split() for line in done.stdout.splitlines()]
    row = next(words for words in lines if "large" in words)
    assert [word for word in row if word not in "│┃"][
        1:
    ] == "5 9.0000 4.2500 ±0.3536 4.3750 ±0.1768 4.0000 ±0.0000".split()
    assert "in turn, own tokens: the largest budget's loss is 0.1250 ±0.1768 above" in done.stdout
    report = json.loads((tmp_path / "report.json").read_text())
    found = {"in turn, own tokens": [0.25, 0.0], "in turn, all tokens": [0.25, 0.5], "together": [0.0, -0.5]}
    assert report["interference"] == found and report["total_seconds"] == 3


@pytest.mark.slow
def test_the_elastic_demo_in_miniature(tmp_path: Path) -> None:
    """On a teacher of random weights, in two steps for each budget."""
    demo, out = tmp_path / "demo", tmp_path / "out"
    (demo / "data").mkdir(parents=True)
    config = json.loads((ROOT / "examples/slimqwen/demo_teacher/config.json").read_text())
    shape = shape_from_hf_config(config, mtp_num_layers=config["num_nextn_predict_layers"])
    write_tiny_checkpoint(demo / "teacher", shape, seed=1, dtype=torch.float32)
    for split in ("train", "validation"):
        write_tokens(demo / f"data/{split}_text_document", np.random.default_rng(0).integers(0, 2048, (120, 257)))
    short = {"ITERS": "2", "SEEDS": "1 2", "LR_WARMUP_ITERS": "1", "LOG_INTERVAL": "1", "DEMO": str(demo)}
    short["TRAIN_FLAGS"] = "--no-teacher-check"  # random weights guess
    done = run(ELASTIC_DEMO, str(out), timeout=900, MASTER_PORT="29676", **short)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((out / "report.json").read_text())
    assert report["seeds"] == ["1", "2"] and list(report["budgets"]) == ["large", "middle", "small"]
    for budget in report["budgets"].values():
        for way in ("before training", "alone", "in turn", "together"):
            assert all(0 < figures["loss"] < 9 and figures["kl"] >= 0 for figures in budget[way])
    assert "interference, together" in done.stdout


@pytest.mark.slow
def test_the_demo_in_miniature(tmp_path: Path) -> None:
    out = tmp_path / "demo"
    short = {"TEACHER_ITERS": "2", "STUDENT_ITERS": "2", "LR_WARMUP_ITERS": "1", "LOG_INTERVAL": "1"}
    done = run(DEMO, str(out), timeout=900, MASTER_PORT="29678", **short)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((out / "report.json").read_text())
    assert set(report["validation_loss"]) == {"teacher", "pruned_before_training", "student", "random_init_student"}
    assert all(0 < loss < 8 for loss in report["validation_loss"].values())
    assert report["parameters"]["student"] == report["parameters"]["random_init_student"]
    assert report["parameters"]["student"]["total"] < report["parameters"]["teacher"]["total"] / 2
    assert (out / "loss_curves.png").read_bytes().startswith(b"\x89PNG")
    assert "random init student" in done.stdout
    for key in ("validation_loss", "kl_from_teacher"):
        for name, value in report[key].items():
            assert f"{value:.4f} ±{report[f'{key}_stderr'][name]:.4f}" in done.stdout


@pytest.mark.slow
def test_a_schedule_in_phases(tmp_path: Path) -> None:
    """As in docs/cluster.md: prune, train, prune what training gave, train on, with one schedule over both.

    And with the optimizer of the first phase in the second.
    """
    teacher, recipe, data = tmp_path / "teacher", tmp_path / "recipe.yaml", tmp_path / "data"
    write_tiny_checkpoint(teacher, tiny_shape(num_layers=8, num_moe_experts=8, vocab_size=96), seed=1)
    write_tokens(data, np.random.default_rng(0).integers(0, 96, (40, 33)))
    recipe.write_text(
        "version: 1\nphases:\n- {tokens: 128, target: {num_layers: 6}}\n"
        "- {tokens: 192, target: {num_layers: 4, num_moe_experts: 4}}\n"
    )
    small = {"SEQ_LENGTH": "32", "GLOBAL_BATCH_SIZE": "2", "LR_WARMUP_ITERS": "1", "EVAL_ITERS": "0"}
    small |= {"LOG_INTERVAL": "1", "LR": "1e-3", "MIN_LR": "1e-4", "MASTER_PORT": "29679"}
    previous, rates = teacher, []
    carried: tuple[str, ...] = ()
    for phase, iterations in ((1, range(1, 3)), (2, range(3, 6))):
        student, save = tmp_path / f"student_{phase}", tmp_path / f"run_{phase}"
        prune = [sys.executable, ROOT / "tools/prune_checkpoint.py", "--load", previous, "--recipe", recipe]
        prune += ["--phase", phase, "--calibration-data", data, "--num-samples", 2, "--seq-length", 32]
        subprocess.run([str(word) for word in [*prune, "--save", student, *carried]], check=True, capture_output=True)
        variables = {"TEACHER": str(teacher), "STUDENT": str(student), "SAVE": str(save), "DATA": str(data)}
        variables |= {"PROGRESSIVE": "1", "CARRY_OPTIMIZER": "1" if carried else "0"}
        done = run(TRAIN, "--split", "1,0,0", "--no-teacher-check", timeout=300, **variables, **small)
        assert done.returncode == 0, done.stdout + done.stderr
        lines = re.findall(r" iteration +(\d+)/ +(\d+) .*learning rate: (\S+)", done.stdout)
        assert [(int(number), int(total)) for number, total, _ in lines] == [(number, 5) for number in iterations]
        rates += [float(rate) for _, _, rate in lines]
        assert f"slim {iterations[-1]}/{iterations[-1]} (100.0%) (phase {phase} of 2)" in done.stdout
        assert ("the optimizer's moments were carried, after 2 steps" in done.stdout) == bool(carried)
        previous, carried = save, ("--carry-optimizer", "--to", "torch_dist")
    # Warm-up of one of five iterations, then half a cosine.
    decay = [1e-4 + 9e-4 * (1 + math.cos(math.pi * part / 4)) / 2 for part in range(5)]
    assert rates == pytest.approx(decay, rel=1e-5)


def test_a_schedule_in_phases_has_the_length_of_its_recipe() -> None:
    variables = {"SAVE": "run", "DATA": "a", "STUDENT": "pruned", "DRY_RUN": "1"}
    words = megatrons(run(TRAIN, PROGRESSIVE="1", **variables))
    assert "--progressive-schedule" in words and "--train-iters" not in words
    given = megatrons(run(TRAIN, PROGRESSIVE="1", TRAIN_ITERS="7", **variables))
    assert "--progressive-schedule" in given and "--train-iters 7 " in " ".join(given)
    assert run(TRAIN, PROGRESSIVE="yes", **variables).stderr == "error: PROGRESSIVE=yes: it is 0 or 1\n"
    begun = megatrons(run(TRAIN, PROGRESSIVE="1", CARRY_OPTIMIZER="1", STAGE_WARMUP="5", **variables))
    assert "--carry-optimizer" in begun and "--stage-warmup 5" in " ".join(begun)
    refused = run(TRAIN, CARRY_OPTIMIZER="yes", **variables).stderr
    assert refused == "error: CARRY_OPTIMIZER=yes: it is 0 or 1\n"


def test_an_error_found_by_all_ranks_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    """Through the launcher: torchrun by itself would add thirty lines and exit with 1."""
    shape = tiny_shape(vocab_size=96)
    (tmp_path / "config.json").write_text(to_json(tiny_hf_config(shape)))
    variables = {"HF_CONFIG": str(tmp_path), "DATA": "nothing", "SAVE": str(tmp_path / "run"), "TEACHER": "nowhere"}
    done = run(TRAIN, NPROC_PER_NODE="2", MASTER_PORT="29677", timeout=200, **variables)
    assert done.returncode == 2
    assert done.stderr.splitlines() == ["error: nowhere: no such directory; give the one with config.json"]
    assert not (tmp_path / "run").exists()
