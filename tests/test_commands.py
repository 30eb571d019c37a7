"""The ``megatron-slim`` command: every command under its name, and ``distill`` as the script it stands for."""

from __future__ import annotations

import importlib
import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron_slim import packaged
from megatron_slim.cli import distill, main
from megatron_slim.errors import RecipeError
from megatron_slim.recipe import load_recipe
from megatron_slim.testing import reserved_port, tiny_shape, write_tiny_checkpoint, write_tokens
from megatron_slim.training.run_view import read_run, summary
from megatron_slim.training.variables import VARIABLES
from tests.compression.test_report import write_events

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ROOT / "examples" / "slimqwen"
SHARED = {
    "main",
    "tool",
    "terminal",
    "calibration_run",
    "carried_optimizer",
    "pruning_run",
    "decision_run",
    "elastic_evaluation",
}
SHARED |= {"elastic_evaluation", "search_arguments", "evaluation_extras", "acceptance_run", "given_statistics"}
# Of the environment that the scripts look at, what is not an argument: where things are, and what others read.
NOT_ARGUMENTS = {"ROOT", "PYTHON", "IDLE_REQUEUES", "PYTHONPATH", "CUDA_DEVICE_MAX_CONNECTIONS", "OMP_NUM_THREADS"}
NOT_ARGUMENTS |= {"NCCL_DEBUG", "PYTORCH_CUDA_ALLOC_CONF", "TRITON_CACHE_DIR", "SETTINGS_NODES", "DEPENDENCY"}


def call(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    command = [sys.executable, "-m", "megatron_slim", *arguments]
    return subprocess.run(command, cwd=ROOT, env=clean | environment, capture_output=True, text=True)


def test_every_module_is_a_command() -> None:
    modules = {path.stem for path in (ROOT / "megatron_slim" / "cli").glob("*.py")} - {"__init__"} - SHARED
    assert modules == {name.replace("-", "_") for name in main.COMMANDS}
    for name in modules:
        assert callable(importlib.import_module(f"megatron_slim.cli.{name}").main)


def test_every_tool_is_a_command_under_its_former_name() -> None:
    for path in (ROOT / "tools").glob("*.py"):
        text = path.read_text(encoding="utf-8")
        (name,) = re.findall(r"``megatron-slim ([\w-]+)``", text)
        assert f"from megatron_slim.cli.{name.replace('-', '_')} import main" in text and name in main.COMMANDS
        assert len(text.splitlines()) < 15


@pytest.mark.parametrize("arguments", [(), ("--help",), ("-h",)])
def test_overview(
    arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["megatron-slim", *arguments])
    main.main()
    shown = capsys.readouterr().out
    assert shown.startswith("usage: megatron-slim COMMAND")
    assert re.findall(r"^  ([\w-]+)  ", shown, re.MULTILINE) == list(main.COMMANDS)
    assert max(map(len, shown.splitlines())) <= 110


def test_a_command_that_does_not_exist() -> None:
    found = call("prun", "--load", "x")
    assert (found.returncode, found.stdout) == (2, "")
    assert found.stderr == "error: there is no command 'prun'; did you mean prune?\n"
    assert call("xyzzy").stderr == "error: there is no command 'xyzzy'; see megatron-slim --help\n"


def test_errors_name_the_command() -> None:
    found = call("convert", "--load", "x")
    assert found.returncode == 2
    assert found.stderr == ("error: the following arguments are required: --save; see megatron-slim convert --help\n")


def test_distill_knows_the_variables_of_the_script() -> None:
    text = "".join((SCRIPTS / name).read_text() for name in ("pretrain_distill.sh", "slurm.sh"))
    read = set(re.findall(r"\$\{([A-Z][A-Z_]+):?-", text))
    read -= {name for name in read if name.startswith("SLURM_")}
    assert read - NOT_ARGUMENTS == set(VARIABLES)


def test_distill_is_the_script_with_arguments_for_variables() -> None:
    variables = {"STUDENT": "pruned", "TEACHER": "big", "SAVE": "run", "DATA": "0.3 a 0.7 b", "PP": "2", "LR": "1e-3"}
    script = subprocess.run(
        ["bash", SCRIPTS / "pretrain_distill.sh", "--clip-grad", "0.5"],
        env=os.environ | variables | {"DRY_RUN": "1", "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        check=True,
    )
    given = "--student pruned --teacher big --data 0.3 a 0.7 b --pp 2 --lr 1e-3 --dry-run --clip-grad 0.5".split()
    found = call("distill", *given, SAVE="run")
    assert (found.returncode, found.stdout, found.stderr) == (0, script.stdout, "")
    assert call("distill", *given, "--save", "x", SAVE="run").stdout == script.stdout.replace(" run", " x")
    place = given.index("--clip-grad")
    assert call("distill", *given[:place], "--", *given[place:], SAVE="run").stdout == script.stdout


def test_distill_gives_results_when_the_run_has_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """By a script in place of the training, next to what a run has logged."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    write_events(tmp_path / "run", 0, True)
    script = 'echo "training in $SAVE"; [[ ${1:-} != --wrong ]] || { echo "error: $1" >&2; exit 2; }'
    (tmp_path / distill.SCRIPT).write_text(script)
    monkeypatch.setattr(distill, "directory", lambda: tmp_path)
    distill.main(["--save", str(tmp_path / "run"), "--json"], "megatron-slim distill")
    *training, last = capfd.readouterr().out.splitlines()
    assert training == [f"training in {tmp_path / 'run'}"]
    assert json.loads(last) == {"save": str(tmp_path / "run"), **summary(read_run(tmp_path / "run"))}
    distill.main(["--save", str(tmp_path / "run"), "--node-rank", "1", "--json"], "megatron-slim distill")
    assert capfd.readouterr().out == f"training in {tmp_path / 'run'}\n"
    errors = {"--wrong": "error: --wrong\n", "--dry-run": "error: --json with --dry-run: there is no run to show"}
    for argument, error in errors.items():
        with pytest.raises(SystemExit, match="2"):
            distill.main(["--save", str(tmp_path / "run"), "--json", argument], "megatron-slim distill")
        shown = capfd.readouterr()
        assert shown.err.startswith(error) and "{" not in shown.out


@pytest.mark.slow
def test_results_of_a_real_run(tmp_path: Path) -> None:
    write_tiny_checkpoint(tmp_path / "student", tiny_shape(vocab_size=96))
    write_tokens(tmp_path / "data", [np.arange(600) % 96])
    words = ["--student", tmp_path / "student", "--data", tmp_path / "data", "--save", tmp_path / "run", "--json"]
    words += ["--train-iters", 2, "--global-batch-size", 2, "--seq-length", 16, "--eval-iters", 0]
    with reserved_port() as port:
        found = call("distill", *map(str, words), "--split", "1,0,0", MASTER_PORT=str(port))
    assert found.returncode == 0, found.stderr
    result = json.loads(found.stdout.splitlines()[-1])
    assert (result["iteration"], result["save"]) == (2, str(tmp_path / "run"))
    shown = call("show-run", result["save"], "--json").stdout.splitlines()[-1]
    assert result == {"save": result["save"], **json.loads(shown)}
    assert 4 < result["curves"]["lm loss"]["last"] < 5.5  # guessing among 96 tokens is 4.56


def test_a_port_in_use_is_one_line() -> None:
    with socket.socket() as held:
        held.bind(("", 0))
        held.listen()
        done = call("torchrun", "--master-port", str(held.getsockname()[1]), "--nproc-per-node", "1", "none.py")
    assert done.returncode == 2 and "give another --master-port" in done.stderr.strip().splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_distill_refuses_in_one_line() -> None:
    found = call("distill", "--student", "pruned", "--data", "a")
    assert found.returncode == 2 and found.stderr.startswith("error: SAVE is not set")
    found = call("distill", "--pp", "0")
    assert found.returncode == 2
    assert found.stderr == "error: argument --pp: '0' is not a positive integer; see megatron-slim distill --help\n"


def test_recipes_have_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = packaged.recipe_names()
    assert names == sorted(path.stem for path in (SCRIPTS / "recipes").glob("*.yaml"))
    found = call("recipes", "--json")
    assert [line for line in found.stdout.splitlines() if not line.startswith((" ", "{"))] == names
    assert load_recipe(Path("demo")) == load_recipe(SCRIPTS / "recipes" / "demo.yaml")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").write_text("version: 1\ntarget: {num_layers: 3}\n")
    assert load_recipe(Path("demo")).target.num_layers == 3  # a file comes before a name
    (tmp_path / "demo_every_axis").mkdir()  # a directory does not: it is mostly the result of that recipe
    assert load_recipe(Path("demo_every_axis")) == load_recipe(SCRIPTS / "recipes" / "demo_every_axis.yaml")
    (tmp_path / "mine").mkdir()
    with pytest.raises(RecipeError, match="mine: is a directory; give the recipe's file"):
        load_recipe(Path("mine"))
    with pytest.raises(RecipeError, match=r"dem0: no such file; did you mean demo\?"):
        load_recipe(Path("dem0"))
    with pytest.raises(RecipeError, match="no such file; give a file, or a name"):
        load_recipe(Path("elsewhere/demo"))
