"""The README's commands and Python, and the step-by-step guide, as they stand but for sizes."""

from __future__ import annotations

import importlib
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml

from megatron_slim.architecture.shape import FAMILIES
from megatron_slim.cli.main import COMMANDS
from megatron_slim.command_line import tool_parser
from megatron_slim.recipe import parse_recipe
from megatron_slim.testing import tiny_shape, write_tiny_checkpoint, write_tokens

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")] + sorted(ROOT.glob("docs/**/*.md"))
README = PAGES[0].read_text(encoding="utf-8")
STEPS = (ROOT / "docs/guides/step_by_step.md").read_text(encoding="utf-8")
OTHER_PARSERS = {"pretrain", "torchrun"}  # Megatron's and torch's: tests/test_docs.py knows their flags


def blocks(text: str, language: str) -> list[str]:
    """Fenced blocks of a language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def commands(page: Path) -> Iterator[list[str]]:
    """Words of every complete ``megatron-slim`` command that a page shows in a block."""
    text = re.sub(r"\\\n", " ", page.read_text(encoding="utf-8"))
    for line in re.findall(r"^ *(?:\w+=\S* )*megatron-slim +(.*)$", text, flags=re.MULTILINE):
        yield shlex.split(line, comments=True)


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "CONTRIBUTING.md"], ids=lambda page: page.name)
def test_it_is_short(page: Path) -> None:
    assert len(page.read_text(encoding="utf-8").split()) <= 900


def test_every_family_has_a_column() -> None:
    table = (ROOT / "docs/support.md").read_text(encoding="utf-8")
    (header,) = re.findall(r"^\| \| (.*) \| shown by \|$", table, flags=re.MULTILINE)
    names = [re.sub(r"[-.]", "_", name.lower()) for name in header.split(" | ")]
    assert sorted(names) == sorted(family.removesuffix("_text") for family in FAMILIES)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_are_accepted(page: Path) -> None:
    """By their parsers, with nothing left over."""
    for name, *words in commands(page):
        if name.startswith("-") or name.isupper():
            continue
        assert name in COMMANDS, name
        if name in OTHER_PARSERS or "..." in words:
            continue
        if name in ("distill", "run"):  # what they do not know is Megatron's, as in OTHER_PARSERS
            importlib.import_module(f"megatron_slim.cli.{name}").parser(name).parse_known_args(words)
            continue
        parser = tool_parser(name)
        importlib.import_module(f"megatron_slim.cli.{name.replace('-', '_')}").add_arguments(parser)
        parser.parse_args(words)


def test_the_recipe_is_one() -> None:
    (recipe,) = blocks(STEPS, "yaml")
    assert parse_recipe(yaml.safe_load(recipe)).target.num_layers == 36


def test_python_of_the_readme(tmp_path: Path) -> None:
    """With a tiny model, a tiny recipe and little data under the names that it has there."""
    (code,) = blocks(README, "python")
    shape = tiny_shape(num_layers=2, layer_types=("linear_attention", "full_attention"))
    write_tiny_checkpoint(tmp_path / "Qwen3-Next-80B-A3B", shape)
    (tmp_path / "qwen3_next_80a3b_to_23a2b").write_text("version: 1\ntarget: {num_moe_experts: 4}\n")
    for name in ("corpus", "validation"):
        tokens = np.random.default_rng(0).integers(0, shape.vocab_size, (8, 40))
        write_tokens(tmp_path / f"{name}_text_document", tokens)
    code = code.replace("seq_length=4096, num_samples=64", "seq_length=16, num_samples=4")
    code = code.replace('"corpus_text_document"', '"corpus_text_document", seq_length=16, num_samples=4')
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert 0 < float(done.stdout.split()[-1]) < 9 and "experts" in done.stdout
    assert (tmp_path / "slim-23a2b" / "calibration.stats").is_file()


@pytest.mark.slow
def test_step_by_step(tmp_path: Path) -> None:
    """From data to an evaluated student; the environment is the one that runs this test."""
    script = f'set -euo pipefail\nmegatron-slim() {{ "{sys.executable}" -m megatron_slim "$@"; }}\n'
    script += "".join(block for block in blocks(STEPS, "bash") if "make venv" not in block)
    # The teacher keeps its sixty steps: with two it would be refused as no better than guessing.
    script = script.replace("--train-iters 30", "--train-iters 2").replace("--log-interval 5", "--log-interval 1")
    script = script.replace("runs/steps", str(tmp_path))
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["bash", "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    losses = re.findall(r'"loss": ([\d.]+)', done.stdout)
    assert len(losses) == 3 and all(0 < float(loss) < 9 for loss in losses)
    assert (tmp_path / "student" / "config.json").is_file()
