"""The wheel: built, installed into an empty directory, and used from there alone, outside of the checkout."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import numpy as np
import pytest

from megatron_slim.cli.main import COMMANDS
from megatron_slim.testing import tiny_shape, write_tiny_checkpoint

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("megatron_slim", "examples", "tools", "setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE")
LEFT_OUT = shutil.ignore_patterns("__pycache__", "*.pyc", "slimqwen.egg-info")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of the sources: setuptools leaves files in the directory that it builds from."""
    copy = tmp_path_factory.mktemp("sources")
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, copy / name, ignore=LEFT_OUT)
        else:
            shutil.copy(source, copy / name)
    options = ["--no-deps", "--no-index", "--no-build-isolation", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "wheel", *options, "--wheel-dir", copy / "dist", copy]
    subprocess.run([*map(str, command)], check=True, capture_output=True)
    (found,) = (copy / "dist").glob("*.whl")
    return found


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("site")
    options = ["--no-deps", "--no-index", "--quiet", "--disable-pip-version-check", "--target", str(target)]
    subprocess.run([sys.executable, "-m", "pip", "install", *options, str(wheel)], check=True)
    return target


def command(installed: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """``megatron-slim`` of the wheel; the other packages are those of this environment."""
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(installed), "HOME": str(installed)}
    words = [sys.executable, installed / "bin" / "megatron-slim", *arguments]
    return subprocess.run([*map(str, words)], cwd=installed.parent, env=environment, capture_output=True, text=True)


def test_what_the_wheel_holds(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (metadata,) = [archive.read(name).decode() for name in names if name.endswith(".dist-info/METADATA")]
    packages = {str(path.relative_to(ROOT)) for path in (ROOT / "megatron_slim").rglob("*.py")}
    assert packages | {"megatron_slim/py.typed"} <= names
    examples = ROOT / "examples" / "slimqwen"
    for kind in ("recipes/*.yaml", "settings/*.sh", "pretrain_distill.sh", "slurm*.sh", "demo_teacher/config.json"):
        found = {f"megatron_slim/slimqwen/{path.relative_to(examples)}" for path in examples.glob(kind)}
        assert found and found <= names, kind
    assert not [name for name in names if not name.startswith("megatron_slim")]
    fields = Parser().parsestr(metadata)
    assert {"text", "plots", "align", "optimizers", "eval", "gpu", "dev"} == set(fields.get_all("Provides-Extra", []))
    needed = {
        line.split(">")[0].split("=")[0] for line in fields.get_all("Requires-Dist", []) if "extra ==" not in line
    }
    assert not needed & {"matplotlib", "scipy", "nltk", "sentencepiece", "transformers", "tensorboard"}


@pytest.mark.slow
def test_every_command_answers(installed: Path) -> None:
    for name in COMMANDS:
        found = command(installed, name, "--help")
        assert found.returncode == 0 and found.stdout.startswith("usage:"), (name, found.stderr)
        assert found.stderr == ""


def test_doctor_and_recipes(installed: Path) -> None:
    found = command(installed, "doctor", "--json")
    assert found.stderr == "" and found.returncode in (0, 1)
    findings = json.loads(found.stdout.splitlines()[-1])["findings"]
    assert {"torch", "megatron-core", "matplotlib"} <= {each["name"] for each in findings}
    found = command(installed, "recipes", "--json")
    recipes = json.loads(found.stdout.splitlines()[-1])["recipes"]
    assert all(str(installed) in each["path"] and each["about"] for each in recipes.values()) and "demo" in recipes


@pytest.mark.slow
def test_convert_prune_and_start_a_run(installed: Path, tmp_path: Path) -> None:
    write_tiny_checkpoint(tmp_path / "teacher", tiny_shape())
    np.save(tmp_path / "samples.npy", np.random.default_rng(0).integers(0, tiny_shape().vocab_size, (2, 16)))
    (tmp_path / "recipe.yaml").write_text("version: 1\ntarget: {hidden_size: 32}\n")
    found = command(installed, "convert", "--load", tmp_path / "teacher", "--save", tmp_path / "dist")
    assert found.returncode == 0 and "read back and verified" in found.stderr, found.stderr
    found = command(
        installed,
        *("prune", "--load", tmp_path / "dist", "--recipe", tmp_path / "recipe.yaml", "--save", tmp_path / "student"),
        *("--calibration-data", tmp_path / "samples.npy", "--json"),
    )
    assert found.returncode == 0, found.stderr
    assert json.loads(found.stdout.splitlines()[-1])["after"]["parameters"]
    given = ("--student", tmp_path / "student", "--data", "x", "--save", tmp_path / "run", "--settings", "h100_8")
    found = command(installed, "distill", *given, "--dry-run")
    assert found.returncode == 0 and "--module megatron_slim.cli.pretrain" in found.stdout, found.stderr
