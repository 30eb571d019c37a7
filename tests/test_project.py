"""The project's own files agree with one another."""

from __future__ import annotations

import ast
import doctest
import importlib
import os
import re
import shutil
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

from megatron_slim import device

ROOT = Path(__file__).resolve().parents[1]
IGNORED_PARTS = {".venv", ".git", "runs", "build"}
SHELL_SCRIPTS = [
    path for path in sorted(ROOT.rglob("*.sh")) if not IGNORED_PARTS.intersection(path.relative_to(ROOT).parts)
] + [ROOT / ".ci" / "run"]
WITH_DOCTESTS = sorted(
    path for path in (ROOT / "megatron_slim").rglob("*.py") if ">>>" in path.read_text(encoding="utf-8")
)


def setup_keyword(name: str) -> Any:
    tree = ast.parse((ROOT / "setup.py").read_text())
    (call,) = [node.value for node in tree.body if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)]
    (value,) = [keyword.value for keyword in call.keywords if keyword.arg == name]
    return ast.literal_eval(value)


REQUIREMENTS = [Requirement(line) for line in setup_keyword("install_requires")]
DEVELOPMENT = [Requirement(line) for line in setup_keyword("extras_require")["dev"]]


@pytest.mark.parametrize("requirement", REQUIREMENTS + DEVELOPMENT, ids=lambda requirement: requirement.name)
def test_tested_versions_are_installed(requirement: Requirement) -> None:
    assert requirement.specifier, "unpinned"
    assert requirement.specifier.contains(version(requirement.name).split("+")[0])


def test_image_installs_the_tested_ranges_and_leaves_its_own_packages_alone() -> None:
    text = (ROOT / "Dockerfile").read_text()
    quoted = [Requirement(line) for line in re.findall(r'"([A-Za-z][\w.-]*[<>=]=?[^"]*)"', text)]
    tested = {requirement.name: requirement.specifier for requirement in REQUIREMENTS}
    assert quoted and all(tested[requirement.name] == requirement.specifier for requirement in quoted)
    from_image = {"torch", "megatron-core", "numpy"}
    assert {requirement.name for requirement in quoted} == tested.keys() - from_image
    assert f"--no-deps megatron-core=={version('megatron-core')}" in text


@pytest.mark.parametrize("path", WITH_DOCTESTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_examples_in_docstrings(path: Path) -> None:
    device.install()
    module = importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
    results = doctest.testmod(module)
    assert results.attempted and not results.failed


@pytest.mark.parametrize("path", SHELL_SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_shell_scripts_stop_at_the_first_error(path: Path) -> None:
    assert os.access(path, os.X_OK)
    text = path.read_text()
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
