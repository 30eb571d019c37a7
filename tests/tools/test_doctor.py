"""tools/doctor.py on the machine that runs the tests."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


def test_reports_versions_and_device(tool: Callable[..., Any], tmp_path: Path) -> None:
    outcome = tool("tools/doctor.py", "--json", "--disk", tmp_path)
    report = outcome.json
    findings = {finding["name"]: finding for finding in report["findings"]}
    assert findings["megatron-core"]["found"] == importlib.metadata.version("megatron-core")
    assert {"python", "torch", "transformers", "device", "cpu seam", "disk"} <= findings.keys()
    assert outcome.code == (1 if report["problems"] else 0)
    assert all(finding["fix"] for finding in report["findings"] if finding["state"] == "problem")


def test_missing_package_is_a_problem_with_a_fix(tool: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.metadata.version

    def version(name: str) -> str:
        if name == "megatron-core":
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    outcome = tool("tools/doctor.py", "--json")
    assert outcome.code == 1 and "megatron-core" in outcome.json["problems"]
    (finding,) = [finding for finding in outcome.json["findings"] if finding["name"] == "megatron-core"]
    assert "make venv" in finding["fix"]


def test_directory_that_does_not_exist(tool: Callable[..., Any], tmp_path: Path) -> None:
    assert "no such directory" in tool("tools/doctor.py", "--disk", tmp_path / "none").error
