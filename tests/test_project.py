"""The project's own files agree with one another."""

from __future__ import annotations

import doctest
import importlib
import importlib.util
import os
import re
import shutil
import subprocess
import tomllib
from importlib.metadata import version
from pathlib import Path

import megatron_slim.mcore

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import megatron_slim
from megatron_slim import extras
from megatron_slim.errors import SlimError

ROOT = Path(__file__).resolve().parents[1]
IGNORED_PARTS = {".venv", ".git", "runs", "build"}
SHELL_SCRIPTS = [
    path for path in sorted(ROOT.rglob("*.sh")) if not IGNORED_PARTS.intersection(path.relative_to(ROOT).parts)
] + [ROOT / ".ci" / "run"]
WITH_DOCTESTS = sorted(
    path for path in (ROOT / "megatron_slim").rglob("*.py") if ">>>" in path.read_text(encoding="utf-8")
)


PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = {name: list(map(Requirement, lines)) for name, lines in PROJECT["optional-dependencies"].items()}
# lm-evaluation-harness brings some forty packages: neither the images have it, nor the environment of `make venv`.
TASKS = [each for each in EXTRAS["eval"] if each.name in ("lm-eval", "accelerate")]
# An image has everything else, and so has that environment, whose extra names the others.
REQUIREMENTS = [Requirement(line) for line in PROJECT["dependencies"]]
REQUIREMENTS += [each for name in extras.EXTRAS for each in EXTRAS[name] if each not in TASKS]
(OURS,) = [each for each in EXTRAS["dev"] if each.name == PROJECT["name"]]
DEVELOPMENT = [each for each in EXTRAS["dev"] if each is not OURS]


@pytest.mark.parametrize("requirement", REQUIREMENTS + DEVELOPMENT, ids=lambda requirement: requirement.name)
def test_tested_versions_are_installed(requirement: Requirement) -> None:
    assert requirement.specifier, "unpinned"
    assert requirement.specifier.contains(version(requirement.name).split("+")[0])


def test_extras() -> None:
    assert OURS.extras | {"eval"} == extras.EXTRAS.keys() == EXTRAS.keys() - {"gpu", "dev"}
    assert {each.name for each in EXTRAS["eval"]} - {each.name for each in TASKS} <= {
        each.name for each in EXTRAS["text"]
    }
    for name, (purpose, modules) in extras.EXTRAS.items():
        assert purpose and [each.name.replace("-", "_") for each in EXTRAS[name]] == list(modules)
    assert all(each.specifier for each in TASKS), "unpinned"


def test_what_needs_an_extra_says_so_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    extras.require("align", "scipy", "experts.align")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SlimError) as caught:
        extras.require("align", "scipy", "experts.align")
    assert str(caught.value) == (
        "experts.align needs scipy, which is not installed; pip install 'megatron_slim[align]'"
    )


def pins(name: str) -> dict[str, str]:
    """Of a file in requirements/: names to versions; every one has its hashes."""
    entries = re.split(r"\n(?=[^ #])", (ROOT / "requirements" / name).read_text())[1:]
    assert entries and all("==" in entry and "--hash=sha256:" in entry for entry in entries)
    return dict(entry.split()[0].split("==") for entry in entries)


def test_images_install_what_the_project_allows() -> None:
    """One truth: what pyproject.toml declares is pinned once, inside its ranges; each image gets all of it."""
    files = {name: pins(name) for name in ("image.txt", "base.txt", "dev.txt", "gpu.txt")}
    every = [name for found in files.values() for name in found]
    assert len(every) == len(set(every))
    for declared, places in (
        (REQUIREMENTS, ("image.txt", "base.txt")),
        (DEVELOPMENT, ("image.txt", "base.txt", "dev.txt")),
        (EXTRAS["gpu"], ("gpu.txt",)),
    ):
        found = {name: pinned for place in places for name, pinned in files[place].items()}
        for requirement in declared:
            if requirement.name != "transformer-engine":  # of NVIDIA's image
                assert requirement.specifier.contains(found[canonicalize_name(requirement.name)]), requirement


def test_the_gpu_image_keeps_its_own_packages() -> None:
    text = (ROOT / "Dockerfile").read_text()
    gpu = text[text.index("AS gpu") :]
    assert "image.txt" not in gpu and "base.txt" in gpu and "gpu.txt" in gpu
    own = ("torch", "triton", "numpy", "apex", "transformer-engine", "flash-attn", "nvidia-nccl-cu13")
    assert not {*own} & (pins("base.txt").keys() | pins("gpu.txt").keys())
    (pattern,) = re.findall(r"grep -iE '(.+)'", gpu)
    for name in own:  # what the build compares before and after
        assert re.match(pattern, f"{name}=="), name
    assert not re.match(pattern, "transformers==")


def test_dockerfile() -> None:
    text = (ROOT / "Dockerfile").read_text()
    commands = re.sub(r"\\\n", " ", re.sub(r"^#.*\n", "", text, flags=re.MULTILINE)).splitlines()
    installs = [line for line in commands if line.startswith("RUN") and "pip install" in line]
    assert all("--require-hashes" in line or "-e ." in line for line in installs)
    assert all("--mount=type=cache" in line or "--no-cache-dir" in line for line in installs)
    assert re.findall(r"^FROM (\S+) AS", text, re.MULTILINE) == [
        "python:${PYTHON_TAG}",
        "nvcr.io/nvidia/pytorch:${NGC_TAG}",
    ]
    assert text.count("\nUSER 1000:1000\n") == 2 and text.count("chmod -R a+rX") == 2
    labels = re.findall(r'org\.opencontainers\.image\.version="(.+)"', text)
    assert labels == [megatron_slim.__version__] * 2


@pytest.mark.parametrize("path", WITH_DOCTESTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_examples_in_docstrings(path: Path) -> None:
    module = importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
    results = doctest.testmod(module)
    assert results.attempted and not results.failed


@pytest.mark.parametrize("path", SHELL_SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_shell_scripts_stop_at_the_first_error(path: Path) -> None:
    text = path.read_text()
    if text.startswith("# shellcheck shell=bash "):  # sourced by a script
        assert not os.access(path, os.X_OK)
        return
    assert os.access(path, os.X_OK)
    assert text.startswith("#!/usr/bin/env bash\n") and "set -euo pipefail" in text


def make(*arguments: str, path: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHON", "VENV", "MAKEFLAGS")}
    command = ["make", "--no-print-directory", "-n", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment | {"PATH": path}, capture_output=True, text=True)


@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
def test_make_uses_the_current_environment_as_it_is() -> None:
    found = make("demo", "VENV=", path=os.environ["PATH"])
    assert found.returncode == 0 and found.stdout == 'PYTHON="python3" bash examples/slimqwen/demo.sh\n'


@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
def test_make_says_when_there_is_no_python(tmp_path: Path) -> None:
    """With a shim that fails and a python3 that is older."""
    for name, body in (("python3.12", "exit 127"), ("python3", "echo")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    for extra in ((), (f"PYTHON={tmp_path}/python3",)):
        command = ["make", "--no-print-directory", "venv", f"VENV={tmp_path}/venv", *extra]
        found = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert found.returncode == 2 and "error: no Python 3.12" in found.stderr, found.stderr
        assert not (tmp_path / "venv").exists()
