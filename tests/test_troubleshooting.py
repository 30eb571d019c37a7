"""docs/troubleshooting.md has every message that the package can end with, and none that it cannot."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs/troubleshooting.md"
ERRORS = {"SlimError", "RecipeError", "CheckpointError", "DataError", "PlanError"}
FOREIGN = {"Watchdog caught collective operation timeout", "CUDA out of memory", "iteration 7: lm loss is nan, ..."}

# Messages that are put together elsewhere and have a row of their own, and a piece of each that stands in the code.
COMPOSED = {
    "... missing tensors: ...; ... extra tensors: ...; ... wrong shapes: ...": '"extra tensors": [',
    "... missing weights: ...; ... unknown weights: ...; ... wrong shapes: ...": '"unknown weights": [',
    "... is not supported (only default and yarn; ...)": "is not supported (only default and yarn; ",
    "... are two names of one thing and differ (remove one)": "are two names of one thing and differ (remove one)",
    "... weights of the model are not in the checkpoint: ...; ... weights that no rank's model has: ...; "
    "... weights of other shapes: ...": '"weights of other shapes": {',
    "argument --...: '...' is not a positive integer": '"a positive integer"',
    "argument --...: '...' is not an integer that is zero or more": '"an integer that is zero or more"',
    "--lr-warmup-iters ... is not from 0 to below --train-iters ...": "is not from 0 to below",
    "... is ..., and the run began with ...": ", and the run began with {",
    "nothing to plan from": '"nothing to plan from"',
    "... and ... exclude one another": '" exclude one another"',
    "unknown key ... (did you mean ...?)": 'f"did you mean {',
    "unknown key ... (known: ...)": 'f"known: {',
    "num_layers ... does not divide into ... pipeline stages": "does not divide into {pp} pipeline stages",
    "num_layers ... does not divide into ... (--pipeline-layout auto needs no division)": "auto needs no division)",
}


def _templates(node: ast.expr) -> Iterator[str]:
    """A string as it stands in the code, with ... for what is filled in; both sides of a choice."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
    elif isinstance(node, ast.JoinedStr):
        yield "".join(part.value if isinstance(part, ast.Constant) else "..." for part in node.values)
    elif isinstance(node, ast.IfExp):
        yield from _templates(node.body)
        yield from _templates(node.orelse)
    elif isinstance(node, ast.BinOp):
        for left in _templates(node.left):
            yield from (left + right for right in _templates(node.right))
    else:
        yield "..."


def _calls() -> Iterator[ast.Call]:
    for folder in ("megatron_slim", "tools"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ERRORS:
                    yield node


def test_every_message_is_explained_and_every_explanation_has_its_message() -> None:
    """Messages that are put together elsewhere (lists of violations) are not compared."""
    messages = {template for call in _calls() if call.args for template in _templates(call.args[0])}
    messages = {template for template in messages if re.search("[a-z]{2}", template)}
    first_columns = (line.split("|")[1] for line in PAGE.read_text().splitlines() if line.startswith("| "))
    explained = {span for column in first_columns for span in re.findall(r"`([^`]+)`", column)}
    explained -= FOREIGN | COMPOSED.keys()
    assert sorted(messages - explained) == []
    assert sorted(explained - messages) == []


def test_messages_put_together_elsewhere_are_there() -> None:
    code = "".join(path.read_text() for path in sorted((ROOT / "megatron_slim").rglob("*.py")))
    assert [message for message, piece in COMPOSED.items() if piece not in code] == []
    assert [message for message in COMPOSED if f"`{message}`" not in PAGE.read_text()] == []
