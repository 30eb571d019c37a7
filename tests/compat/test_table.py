"""The table of changes: complete, made as it says, each row with a test that shows its need; none for CPUs on a GPU."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import megatron_slim.mcore

import pytest
import torch
from megatron.core.transformer.moe import router

from megatron_slim import compat
from megatron_slim.compat import cpu_kernels, cpu_megatron, libraries, patch
from megatron_slim.compat.patch import BUG, CPU, HOOK, LIBRARY, MADE, NOT_REPORTED, SPEED, Patch, instead
from megatron_slim.compat.table import FIXES, LOOP, PATCHES
from megatron_slim.errors import SlimError

ROOT = Path(__file__).resolve().parents[2]
MODULES = [importlib.import_module(f"{compat.__name__}.{each.name}") for each in pkgutil.iter_modules(compat.__path__)]
NAMES = {name: value for module in MODULES for name, value in vars(module).items() if isinstance(value, Patch)}


def test_every_row_is_in_the_table_once() -> None:
    assert sorted(each.name for each in PATCHES) == sorted({each.name for each in NAMES.values()})
    targets = [target for each in PATCHES for target in each.targets]
    assert len(targets) == len(set(targets))


@pytest.mark.parametrize("row", PATCHES, ids=lambda row: row.name)
def test_a_row_says_why_and_where(row: Patch) -> None:
    assert row.kind in (BUG, HOOK, LIBRARY, CPU, SPEED) and row.targets
    assert row.why.endswith(".") and len(row.why) > 40
    link = r"https://github\.com/NVIDIA/Megatron-LM/(issues|pull)/\d+"
    assert re.fullmatch(link, row.upstream) or row.upstream.endswith(NOT_REPORTED)
    assert len(row.changes) in (0, len(row.targets)) and (row.changes or row in LOOP)


def test_every_row_has_a_test_that_it_is_needed() -> None:
    """Of a name that begins with `test_without_`, and that names the row."""
    shown = set()
    for path in (ROOT / "tests/compat").glob("test_*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_without_"):
                shown |= {each.id for each in ast.walk(node) if isinstance(each, ast.Name)}
    assert {name for name in NAMES if name not in shown} == set()


@pytest.mark.skipif(torch.cuda.is_available(), reason="libraries may be there")
def test_what_is_made_on_a_cpu_is_what_the_table_says() -> None:
    made = [*FIXES, *libraries.PATCHES, *cpu_megatron.PATCHES, *cpu_kernels.PATCHES]
    assert {target for each in made for target in each.targets} <= MADE.keys()
    assert MADE.keys() <= {target for each in (*made, *LOOP) for target in each.targets}


@pytest.mark.skipif(torch.cuda.is_available(), reason="it is tried by telling lies about CUDA")
def test_nothing_for_cpus_is_made_where_there_is_cuda() -> None:
    """Torch says that there is CUDA once Megatron is there; Megatron itself is imported as on any machine."""
    code = (
        "import torch; zeros, compile = torch.zeros, torch.compile\n"
        "import megatron.core.optimizer, megatron.core.ssm.gated_delta_net, megatron.training.training\n"
        "torch.cuda.is_available = lambda: True\n"
        "import megatron_slim.mcore\n"
        "from megatron_slim.compat.patch import MADE\n"
        "assert torch.zeros is zeros and torch.compile is compile\n"
        "print(*MADE)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    wanted = {target for each in (*FIXES, *libraries.PATCHES) for target in each.targets}
    assert set(done.stdout.splitlines()[-1].split()) == wanted


def own(self: object) -> None:
    """In Megatron's place."""


def row(target: str, *changes: object) -> Patch:
    return Patch("a test", BUG, (f"megatron.core.transformer.moe.router:{target}",), "", "", changes)  # type: ignore[arg-type]


def test_a_change_that_is_made_again_is_made_of_what_megatron_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(router.Router, "gating", own)
    monkeypatch.setattr(patch, "MADE", {})
    seen: list[object] = []
    once = row("Router.gating", lambda theirs: seen.append(theirs) or (lambda self: None))
    once.apply()
    once.apply()
    assert seen == [own, own]
    other = instead(own)(None)
    monkeypatch.setattr(router.Router, "gating", other)  # by somebody else
    once.apply()
    assert seen[-1] is other


@pytest.mark.parametrize("target", ["Router.no_such_method", "NoSuchClass.gating", "no_such_function"])
def test_another_megatron_is_one_line(target: str) -> None:
    with pytest.raises(SlimError, match=rf"this Megatron has no .*{target}, which is changed for: a test"):
        row(target, instead(None)).apply()


def test_another_module_too() -> None:
    with pytest.raises(SlimError, match="install megatron-core"):
        Patch("a test", BUG, ("megatron.core.none:f",), "", "", (instead(None),)).apply()


def test_what_megatron_needs_is_something_else(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "needs_more.py").write_text("import not_installed_here")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ModuleNotFoundError, match="not_installed_here"):
        Patch("a test", BUG, ("needs_more:f",), "", "", (instead(None),)).apply()
