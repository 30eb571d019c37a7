#!/usr/bin/env python3
"""A task of lm-evaluation-harness from any JSON lines of text: which of four continuations follows a passage."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_slim.cli.terminal import say
from megatron_slim.cli.tool import run_tool
from megatron_slim.command_line import positive, tool_parser
from megatron_slim.documents import check_inputs, read_sources
from megatron_slim.errors import DataError
from megatron_slim.files import new_directory

CHOICES = 4
# Lines of a passage, of what follows it, and from one passage to the next.
PASSAGE, CONTINUATION, STRIDE = 12, 4, 40
# Wrong continuations follow other passages; they are drawn from so many of nearly the same length, for a short text is
# more probable than a long one.
NEAREST = 12
TASK = """\
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {documents}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{passage}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: ""
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
  - metric: acc_norm
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1.0
"""


def passages(path: Path) -> Iterator[tuple[str, str]]:
    """Passages of every text, and what follows each."""
    check_inputs([path])
    for source in read_sources([path]):
        lines = source.texts(("text",)).by_key["text"].splitlines(keepends=True)
        for first in range(0, len(lines) - PASSAGE - CONTINUATION + 1, STRIDE):
            passage = "".join(lines[first : first + PASSAGE])
            continuation = "".join(lines[first + PASSAGE : first + PASSAGE + CONTINUATION])
            if passage.strip() and continuation.strip():
                # The harness moves blanks that end a passage to the continuation; here they are there already.
                text = passage.rstrip()
                yield text, passage[len(text) :] + continuation.rstrip()


def make_task(source: Path, output: Path, *, name: str, documents: int, seed: int) -> dict[str, Any]:
    """Write ``NAME.jsonl`` and ``NAME.yaml`` into the new directory ``output``.

    Returns:
        The number of documents.
    """
    found = list(dict.fromkeys(passages(source)))
    chance = random.Random(seed)
    chance.shuffle(found)
    if len({continuation for _, continuation in found}) < CHOICES:
        raise DataError(f"{len(found)} passages are too few", where=str(source), fix="give more text")
    rows = []
    for passage, continuation in found[:documents]:
        others = sorted(
            {text for _, text in found} - {continuation}, key=lambda text: (abs(len(text) - len(continuation)), text)
        )
        choices = [continuation, *chance.sample(others[:NEAREST], CHOICES - 1)]
        chance.shuffle(choices)
        rows.append({"passage": passage, "choices": choices, "answer": choices.index(continuation)})
    with new_directory(output) as temporary:
        (temporary / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        file = json.dumps(str(output.absolute() / f"{name}.jsonl"))
        (temporary / f"{name}.yaml").write_text(TASK.format(name=name, documents=file), encoding="utf-8")
    return {"task": name, "documents": len(rows)}


def main() -> None:
    """Parse the command line and run `make_task`."""
    parser = tool_parser(__doc__)
    parser.add_argument(
        "--input", type=Path, required=True, help="JSON lines with a text each, such as a validation set"
    )
    parser.add_argument("--output", type=Path, required=True, help="new directory for the task and its documents")
    parser.add_argument("--name", default="continuation", help="name of the task")
    parser.add_argument("--documents", type=positive, default=200, help="at most so many documents")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of passages and continuations")
    arguments = parser.parse_args()

    def run() -> dict[str, Any]:
        results = make_task(
            arguments.input,
            arguments.output,
            name=arguments.name,
            documents=arguments.documents,
            seed=arguments.seed,
        )
        say(f"{results['task']}: {results['documents']} documents; use it with --tasks-dir {arguments.output}")
        return results

    run_tool(run, as_json=arguments.json)


if __name__ == "__main__":
    main()
