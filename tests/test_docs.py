"""Links, paths and flags in README, CONTRIBUTING, CHANGELOG, docs/ and the READMEs of folders are there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_slim.training import variables

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    *sorted(ROOT.glob("*.md")),
    ROOT / "findings/README.md",
    ROOT / "benchmarks/gpu/README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]
# Of pip, git, docker, sbatch, hf, model servers and the like; docs/comparison.md has two columns of others' flags.
FOREIGN = set(
    "--local-dir --target --build-arg --requeue --kill-on-invalid-dep --wait --no-deps --no-index --only-binary"
    " --python-version"
    " --implementation --platform --quiet --model_args --tasks --model --prompt --speculative-config --model-path"
    " --speculative-algorithm --speculative-num-steps --speculative-eagle-topk --speculative-num-draft-tokens --outfile"
    " --outtype --no-mtp --mmproj --limit-mm-per-prompt --spec-type --spec-draft-n-max --module"
    " --z-weight-schedule --z-weight-start --z-weight-end".split()
)


def _page_id(page: Path) -> str:
    return str(page.relative_to(ROOT))


def _anchors(page: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=_page_id)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
        if target.startswith(("http://", "https://")):
            continue
        name, _, anchor = target.partition("#")
        there = (page.parent / name).resolve() if name else page
        assert there.exists(), f"{page.name}: {target}"
        assert not anchor or anchor in _anchors(there), f"{page.name}: {target}"


@pytest.mark.parametrize("page", PAGES, ids=_page_id)
def test_files_named_are_there(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for path in re.findall(
        r"\b(?:tools|examples|benchmarks|tests|megatron_slim)/[\w/.-]+\.(?:py|sh|yaml|json|md)\b", text
    ):
        assert (ROOT / path).is_file(), f"{page.name}: {path}"


def test_every_page_is_in_the_index() -> None:
    index = (ROOT / "docs/README.md").read_text(encoding="utf-8")
    pages = {str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md")} - {"README.md"}
    assert pages == set(re.findall(r"\]\(([\w/]+\.md)\)", index))


@pytest.fixture(scope="session")
def flags() -> set[str]:
    """Every flag of our tools, scripts and benchmarks, and of Megatron."""
    command = [sys.executable, str(ROOT / "tools/pretrain.py"), "--help-megatron"]
    known = set(
        re.findall(r"--[a-z][\w-]*", subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    )
    for folder in ("megatron_slim", "tools", "benchmarks", "examples"):
        for path in (ROOT / folder).rglob("*.py"):
            known |= set(re.findall(r'"(--[a-z][\w-]*)"', path.read_text(encoding="utf-8")))
    return known | set(map(variables.flag, variables.VARIABLES))


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "comparison.md"], ids=_page_id)
def test_flags_exist(page: Path, flags: set[str]) -> None:
    lines = [line for line in page.read_text(encoding="utf-8").splitlines() if "-->" not in line]
    named = set(re.findall(r"(?<![\w-])--[a-z][\w-]*\w", "\n".join(lines)))
    unknown = {flag for flag in named - flags - FOREIGN if not any(known.startswith(flag) for known in flags)}
    assert not unknown
