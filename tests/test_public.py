"""What a public project keeps: a citation, a workflow that changes nothing by itself, and who may do what."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

import megatron_slim

ROOT = Path(__file__).resolve().parents[1]
CITATION = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
WORKFLOW = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8"))


def steps() -> list[dict[str, Any]]:
    return [step for job in WORKFLOW["jobs"].values() for step in job["steps"]]


def test_citation() -> None:
    """The keys that the schema of 1.2.0 requires, and the version that is here."""
    assert CITATION["cff-version"] == "1.2.0" and CITATION["message"] and CITATION["title"] and CITATION["authors"]
    assert CITATION["version"] == megatron_slim.__version__
    for reference in CITATION["references"]:
        assert reference["type"] and reference["title"] and reference["authors"]


def test_actions_are_pinned_by_hash_and_may_only_read() -> None:
    used = [step["uses"] for step in steps() if "uses" in step]
    assert used and all(re.fullmatch(r"[\w/-]+@[0-9a-f]{40}", name) for name in used)
    assert WORKFLOW["permissions"] == {"contents": "read"}
    assert {step["with"]["python-version"] for step in steps() if "setup-python" in step.get("uses", "")} == {"3.12"}


def test_the_workflow_calls_what_is_there() -> None:
    runs = "\n".join(step["run"] for step in steps() if "run" in step)
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    called = re.findall(r"make ([\w-]+)", runs)
    assert {"lint", "test"} <= set(called) <= set(targets)
    assert "pip wheel" in runs and "megatron-slim --help" in runs
