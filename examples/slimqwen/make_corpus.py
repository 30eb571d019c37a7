#!/usr/bin/env python3
"""A corpus of real text that every machine has: the sources of the Python standard library, as JSON lines."""

from __future__ import annotations

import hashlib
import json
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_slim.cli.terminal import say
from megatron_slim.cli.tool import run_tool
from megatron_slim.command_line import tool_parser
from megatron_slim.errors import DataError, SlimError
from megatron_slim.files import new_directory

# Tests, other people's packages, and generated tables would train a model to recite rather than to write.
SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "encodings", "lib2to3", "pydoc_data"}


def source_files(root: Path) -> Iterator[Path]:
    """Python files below ``root`` in a fixed order."""
    for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).as_posix()):
        if not SKIPPED.intersection(path.relative_to(root).parts):
            yield path


def is_validation(name: str, percent: int) -> bool:
    """Whether a file belongs to the validation split: a hash of its name, so that the split never moves."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") % 100 < percent


def make_corpus(root: Path, output: Path, *, validation_percent: int, max_bytes: int | None) -> dict[str, Any]:
    """Write ``train.jsonl`` and ``validation.jsonl`` into the new directory ``output``.

    Returns:
        Number of documents and bytes of text of each split.
    """
    splits: dict[str, list[str]] = {"train": [], "validation": []}
    counts = {"train": 0, "validation": 0}
    for path in source_files(root):
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        name = path.relative_to(root).as_posix()
        if max_bytes is not None and sum(counts.values()) + len(text.encode()) > max_bytes:
            break
        split = "validation" if is_validation(name, validation_percent) else "train"
        if text.strip():
            splits[split].append(json.dumps({"text": text, "source": name}) + "\n")
            counts[split] += len(text.encode())
    if not all(splits.values()):
        raise DataError("too few Python files for two splits", where=str(root), fix="raise --max-bytes")
    with new_directory(output) as temporary:
        for split, lines in splits.items():
            (temporary / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
    return {split: {"documents": len(splits[split]), "bytes": counts[split]} for split in splits}


def main() -> None:
    """Parse the command line and run `make_corpus`."""
    parser = tool_parser(__doc__)
    parser.add_argument("--output", type=Path, required=True, help="new directory for train.jsonl and validation.jsonl")
    parser.add_argument("--validation-percent", type=int, default=5, help="percent of the files held out")
    parser.add_argument("--max-bytes", type=int, help="stop after so much text; all of it by default")
    arguments = parser.parse_args()

    def run() -> dict[str, Any]:
        if not 0 < arguments.validation_percent < 100:
            raise SlimError(f"--validation-percent {arguments.validation_percent} is not between 1 and 99")
        root = Path(sysconfig.get_paths()["stdlib"])
        results = make_corpus(
            root, arguments.output, validation_percent=arguments.validation_percent, max_bytes=arguments.max_bytes
        )
        for split, counts in results.items():
            say(f"{split}: {counts['documents']} files, {counts['bytes'] / 1e6:.1f} MB")
        return results

    run_tool(run, as_json=arguments.json)


if __name__ == "__main__":
    main()
