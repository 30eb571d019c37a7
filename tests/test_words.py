"""The words of documentation, help, messages and comments: plain, one for one thing, in short sentences."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
MOST_WORDS_OF_A_SENTENCE = 40
MOST_WORDS_OF_A_PAGE = {"README.md": 900, "CONTRIBUTING.md": 900}
_PAGES = (
    "README.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
    "CHANGELOG.md",
    "findings/README.md",
    "benchmarks/gpu/README.md",
)
PAGES = [path for path in (ROOT / page for page in _PAGES) if path.exists()] + sorted((ROOT / "docs").rglob("*.md"))
_FOLDERS = ("megatron_slim", "tools", "benchmarks", "examples", "findings")
SOURCES = sorted(
    path for folder in _FOLDERS for end in ("py", "sh", "yaml") for path in (ROOT / folder).rglob(f"*.{end}")
)

# What not to write, and what to write in its place. Inline code and code blocks are not looked at.
BANNED = {
    r"mend(s|ed|ing|able)?": "fix (a user), repair (the code)",
    r"(go|goes|going|went|gone) on(?! the\b)": "continue, resume",
    r"beside": "next to (files), co-located with (teacher and student), besides",
    r"(?<!there )(is|are|was|were) no(?! (longer|more|less|fewer|larger|smaller|better|worse|slower)\b)": "not a",
    r"shar(e|es|ed|ing)[ -]out": "sharded, split across",
    r"lessons?|learners?|taught|teaches|learn(s|t|ed)? from": "distillation target, student, supervised by",
    r"(run|runs|log|logs|line|lines) tells?": "metrics, logs, reports",
    r"own_part|own_positions": "local_part, local_positions",
    r"(?<!page )(?<!segmentation )faults?(?![ -]toleran)": "error (a user's input), bug (of a library)",
    r"complain\w*|refusals?": "error, violation, finding",
    r"seams?": "compatibility layer",
    r"honest(ly)?": "the fact itself",
    r"pays(?! for\b)": "is worth it",
    r"to know (a|the|its) \w+ by": "to recognise",
    r"said|without a word": "stated, logged, reported, silently",
    r"promis\w+(?=[^.]*\bmtp\b)|mtp\b[^.]*\bpromis\w+": "declared",
    r"head of (a|the|its|each|every) files?|at its end": "header, at the end of ...",
    r"(lay|lays|laid|laying) out": "sharded over, split across",
    r"room": "space, memory",
    r"stages? of (a|an|the|one|all) (recipe|schedule)s?": "phase of a recipe",
    r"tell(s|ing)? apart|be told so": "distinguish, be given the flag",
}
_BANNED = [(re.compile(rf"\b(?:{pattern})(?!\w)", re.IGNORECASE), instead) for pattern, instead in BANNED.items()]

# Headings that say nothing of what is below them: questions, pronouns, and single words that fit everywhere.
_QUESTION = re.compile(r"^(what|how|why|when|where|which|who|whose|is|are|does|do|can)\b|\?$", re.IGNORECASE)
_VAGUE_START = re.compile(
    r"^(it|this|that|they|these|other|more|further|two|three|first|then|looking|turning)\b", re.IGNORECASE
)
_TITLES = {"megatron_slim"}
_VAGUE = set(
    "background basics details general introduction misc miscellaneous notes numbers options overview remarks soak"
    " stuff things tips usage various".split()
)


class Passage(NamedTuple):
    """A heading, a paragraph, a list item or a table's cell."""

    line: int
    text: str


def _without_code(text: str) -> str:
    """Comments, fenced and indented blocks made empty, lines kept."""

    def blank(match: re.Match[str]) -> str:
        return "\n" * match.group().count("\n")

    text = re.sub(r"<!--.*?-->", blank, text, flags=re.DOTALL)
    text = re.sub(r"^ *(```|~~~).*?^ *\1[^\n]*$", blank, text, flags=re.MULTILINE | re.DOTALL)
    # After an empty line; deeper than the text of a list item, whose own lines stand two to three spaces in.
    return re.sub(r"(?<=\n\n)(?: {4,}[^\n]*\n+)+", blank, text)


def passages(text: str) -> Iterator[Passage]:
    """What a page says, in pieces within which sentences do not end without a mark."""
    started, gathered = 0, ""
    for number, line in enumerate([*_without_code(text).splitlines(), ""], start=1):
        own = re.match(r"\s*(?:#+|[-*]|\d+\.) ", line)
        table = line.lstrip().startswith("|")
        if gathered and (own or table or not line.strip()):
            yield Passage(started, gathered)
            gathered = ""
        if table:
            cells = re.split(r"(?<!\\)\|", line.strip().strip("|"))
            yield from (Passage(number, cell.strip()) for cell in cells if cell.strip(" -:"))
        elif line.strip():
            if not gathered:
                started = number
            gathered += " " + (line[own.end() :] if own else line.strip())
        if line.startswith("#") and gathered:
            yield Passage(started, gathered)
            gathered = ""


def readable(text: str) -> str:
    """Text with each link as its words and each piece of inline code as one word."""
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text)
    return re.sub(r"``[^`]+``|`[^`]+`", "CODE", text).replace("**", "").strip()


def sentences(passage: Passage) -> Iterator[str]:
    """Sentences of a passage; an abbreviation's full stop does not end one."""
    text = re.sub(r"\b(e\.g|i\.e|eq|no|vs|cf)\. ", r"\1 ", readable(passage.text))
    yield from (part for part in re.split(r"(?<=[.!?])[)\"']?\s+(?=[^a-z])", text) if part)


def count_words(text: str) -> int:
    return sum(1 for word in text.split() if re.search(r"\w", word))


def banned_words(text: str) -> list[str]:
    """Which banned words a text has, each with what to write instead."""
    return [f'"{found.group().strip()}": {instead}' for word, instead in _BANNED if (found := word.search(text))]


def _named(path: Path, line: int, text: str) -> str:
    return f"{path.relative_to(ROOT)}:{line}: {text}"


def _report(problems: list[str]) -> None:
    assert not problems, "\n" + "\n".join(problems)


def _page_id(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=_page_id)
def test_sentences_are_short(page: Path) -> None:
    _report(
        [
            _named(page, passage.line, f"{count_words(sentence)} words: {sentence}")
            for passage in passages(page.read_text(encoding="utf-8"))
            for sentence in sentences(passage)
            if count_words(sentence) > MOST_WORDS_OF_A_SENTENCE
        ]
    )


@pytest.mark.parametrize("page", PAGES, ids=_page_id)
def test_pages_use_plain_words(page: Path) -> None:
    _report(
        [
            _named(page, passage.line, f"{found}: {sentence}")
            for passage in passages(page.read_text(encoding="utf-8"))
            for sentence in sentences(passage)
            for found in banned_words(sentence)
        ]
    )


@pytest.mark.parametrize("page", PAGES, ids=_page_id)
def test_headings_say_what_is_below_them(page: Path) -> None:
    lines = _without_code(page.read_text(encoding="utf-8")).splitlines()
    headings = [(number, line.lstrip("# ")) for number, line in enumerate(lines, start=1) if re.match("#+ ", line)]
    repeated = {heading for heading, count in Counter(heading for _, heading in headings).items() if count > 1}
    _report([_named(page, number, heading) for number, heading in headings if heading in repeated or vague(heading)])


def vague(heading: str) -> bool:
    """Whether a reader could not guess what is below a heading: a question, a pronoun, an empty word, or code alone."""
    plain = re.findall(r"[A-Za-z][\w'-]+", re.sub(r"`[^`]+`|\S*[/_.]\S+", "", heading))
    if heading in _TITLES:
        return False
    return (
        not plain or heading.lower() in _VAGUE or bool(_QUESTION.search(heading)) or bool(_VAGUE_START.search(heading))
    )


@pytest.mark.parametrize("name", MOST_WORDS_OF_A_PAGE)
def test_first_pages_are_short(name: str) -> None:
    assert len((ROOT / name).read_text(encoding="utf-8").split()) <= MOST_WORDS_OF_A_PAGE[name]


def _strings(tree: ast.AST) -> Iterator[Passage]:
    """String constants, docstrings and format strings (a value is `{}`) with their lines."""
    inside = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            parts = (str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values)
            yield Passage(node.lineno, "".join(parts))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inside:
            yield Passage(node.lineno, node.value)


def _texts(source: Path) -> Iterator[Passage]:
    """Strings and comments of a Python file; of a script or a recipe, every line."""
    text = source.read_text(encoding="utf-8")
    if source.suffix != ".py":
        yield from (Passage(number, line) for number, line in enumerate(text.splitlines(), start=1))
        return
    yield from _strings(ast.parse(text))
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            yield Passage(token.start[0], token.string)


@pytest.mark.parametrize("source", SOURCES, ids=_page_id)
def test_help_messages_and_comments_use_plain_words(source: Path) -> None:
    """A string without a blank is a name or a key, and not looked at."""
    _report(
        [
            _named(source, passage.line, f"{found}: {' '.join(passage.text.split())}")
            for passage in _texts(source)
            if " " in passage.text.strip()
            for found in banned_words(re.sub(r"`[^`]+`", "CODE", passage.text))
        ]
    )


@pytest.mark.parametrize(
    ("text", "counts"),
    [
        (
            "# A title\n\nOne sentence. Another `--flag of it`: 3.5 GB.\nStill [this one](a.md#b), e.g. so.\n",
            [2, 2, 4, 5],
        ),
        ("- item one\n  continued\n- item two\n\n```\nnot counted at all\n```\n\n    nor is this\n", [3, 2]),
        ("| a cell | two. Sentences |\n|---|---|\n", [2, 1, 1]),
    ],
)
def test_sentences_are_counted(text: str, counts: list[int]) -> None:
    assert [count_words(sentence) for passage in passages(text) for sentence in sentences(passage)] == counts


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("it goes on from step 3", True),
        ("it goes on the command line", False),
        ("8 is no multiple of 3", True),
        ("there is no limit, and it is no longer read", False),
        ("page faults by default", False),
        ("a fault of the input", True),
        ("no room for a checkpoint", True),
        ("a roomy folder", False),
        ("mtp.layers is missing, which config.json promised", False),
        ("config.json promises an MTP block", True),
        ("the first stage of a recipe", True),
        ("the first pipeline stage", False),
    ],
)
def test_banned_words_are_found(text: str, found: bool) -> None:
    assert bool(banned_words(text)) == found


@pytest.mark.parametrize("heading", ["What a run tells", "Soak", "It is slow", "`plan.json`", "benchmarks/convert.py"])
def test_vague_headings_are_found(heading: str) -> None:
    assert vague(heading)


@pytest.mark.parametrize("heading", ["Metrics of a run", "Contents of `plan.json`", "Stop a run", "YaRN"])
def test_clear_headings_are_not_vague(heading: str) -> None:
    assert not vague(heading)
