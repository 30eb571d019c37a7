"""The guides for extending the project, and the tour of its packages, are those of the code as it is."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from megatron_slim.cli import plan_parallelism
from megatron_slim.command_line import tool_parser
from megatron_slim.distillation.divergences import DIVERGENCES
from megatron_slim.distillation.terms import LOSS_TERMS, MTP_BETA, weights_of
from megatron_slim.recipe_sections import CHOICES
from megatron_slim.training.slim_arguments import add_slim_arguments
from tests.distillation import test_fused, test_logits

ROOT = Path(__file__).resolve().parents[1]
GUIDES = sorted((ROOT / "docs/guides").glob("add_*.md"))
PACKAGES = sorted(path.parent for path in (ROOT / "megatron_slim").glob("*/__init__.py"))


def page(name: str) -> str:
    return (ROOT / "docs" / name).read_text(encoding="utf-8")


def first_cells(text: str) -> set[str]:
    """Names in code in the first cell of every row of a page's tables."""
    return {
        name for cell in re.findall(r"^\| (.*?) \|", text, flags=re.MULTILINE) for name in re.findall("`(.*?)`", cell)
    }


@pytest.mark.parametrize("guide", GUIDES, ids=lambda guide: guide.stem)
def test_what_a_checklist_names_is_in_that_file(guide: Path) -> None:
    rows = re.findall(r"^\| `([\w/.]+\.py)` \| (.*) \|$", guide.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert len(rows) > 4
    for path, what in rows:
        content = (ROOT / path).read_text(encoding="utf-8")
        missing = [name for name in re.findall(r"`([\w.]+)`", what) if name not in content]
        assert not missing, (path, missing)


def choices(parser: object, flag: str) -> set[str]:
    (found,) = [action for action in parser._actions if flag in action.option_strings]  # type: ignore[attr-defined]
    return set(found.choices)


def test_every_divergence_is_everywhere() -> None:
    kinds = {*DIVERGENCES}
    training, planning = tool_parser(""), tool_parser("")
    add_slim_arguments(training)
    plan_parallelism.add_arguments(planning)
    for place, found in {
        "flag of training": choices(training, "--kd-loss"),
        "flag of planning": choices(planning, "--kd-loss"),
        "tests against fp64": {kd.kind for kd in test_fused.KINDS},
        "tests of memory": {kd.kind for kd in test_logits.KINDS},
        "docs/distillation.md": first_cells(page("distillation.md")) & kinds,
    }.items():
        assert found == kinds, place


def test_every_term_of_the_loss_is_documented() -> None:
    rows = first_cells(page("distillation.md"))
    assert {term.name for term in LOSS_TERMS.values()} <= rows
    for key, weight in [(key, term.weight) for key, term in LOSS_TERMS.items()]:
        assert f"`{key}`" in page("distillation.md"), key
        assert weight is None or f"`{weight.flag}-*`" in page("distillation.md"), weight
    assert f"`{MTP_BETA.flag}-*`" in page("distillation.md")


def test_benchmarks_read_the_dictionary_of_terms() -> None:
    names = [term.name for term in LOSS_TERMS.values()]
    names += [f"{weight.flag}-" for weight in weights_of(LOSS_TERMS.values())]
    for file in sorted((ROOT / "benchmarks").rglob("*.py")):
        assert not [name for name in names if name in file.read_text(encoding="utf-8")], file


def test_every_importance_and_similarity_is_documented() -> None:
    for key in ("experts.importance", "experts.similarity"):
        for choice in CHOICES[key]:
            assert choice in page("recipes.md"), choice
            assert choice in page("calibration.md"), choice


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.name)
def test_the_docstring_of_a_package_names_every_module(package: Path) -> None:
    tour = ast.get_docstring(ast.parse((package / "__init__.py").read_text(encoding="utf-8"))) or ""
    named = set(re.findall(r"`([\w*]+)`", tour))
    modules = {path.stem for path in package.glob("*.py")} - {"__init__"}
    if package.name == "cli":  # a module is a command, but for those that several share
        return
    assert named == modules
