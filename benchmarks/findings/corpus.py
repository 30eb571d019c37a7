"""Text of three kinds that every installation has: Python code, C++ headers, and prose from documentation strings."""

from __future__ import annotations

import ast
import importlib.util
import json
import sysconfig
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.findings.commands import TEXTS
from examples.slimqwen.make_corpus import is_validation, source_files
from megatron_slim.errors import DataError
from megatron_slim.files import sha256, write_atomic

PACKAGES = ("torch", "numpy", "transformers", "scipy", "matplotlib")  # whose documentation strings are read
VALIDATION_PERCENT = 5
SHORTEST, LONGEST = 1000, 60_000  # characters of a document; a longer one is cut
MEASURING_SAMPLES = 16  # that layers are measured on where experts are allocated by loss


def _package(name: str) -> Path | None:
    spec = importlib.util.find_spec(name)
    return None if spec is None or spec.origin is None else Path(spec.origin).parent


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError):
        return ""


def _files(root: Path, pattern: str) -> list[Path]:
    """Files below a directory in an order that mixes them and is the same everywhere."""
    return sorted(root.rglob(pattern), key=lambda path: sha256(path.relative_to(root).as_posix()))


def _code() -> Iterator[tuple[str, str]]:
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(source_files(root), key=lambda path: sha256(path.name)):
        yield path.relative_to(root).as_posix(), _read(path)


def _headers() -> Iterator[tuple[str, str]]:
    root = _package("torch")
    assert root is not None, "torch is installed"
    for path in _files(root / "include", "*.h"):
        yield path.relative_to(root).as_posix(), _read(path)


def documentation(source: str) -> str:
    r"""The documentation strings of a module, without indentation.

    >>> documentation('def f():\n    "Adds.\\n\\n    Twice."\n')
    'Adds.\n\nTwice.'
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            tree = ast.parse(source)
        except (SyntaxError, ValueError, RecursionError):
            return ""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds))
    return "\n\n".join(text for text in found if text)


def _prose() -> Iterator[tuple[str, str]]:
    for name in PACKAGES:
        if (root := _package(name)) is not None:
            for path in _files(root, "*.py"):
                if "tests" not in path.parts:
                    yield f"{name}/{path.relative_to(root).as_posix()}", documentation(_read(path))


SOURCES: dict[str, Callable[[], Iterator[tuple[str, str]]]] = dict(zip(TEXTS, (_code, _headers, _prose), strict=True))


def documents(kind: str, limit: int) -> Iterator[dict[str, str]]:
    """Documents of a kind, up to a number of bytes of text.

    Args:
        kind: one of `TEXTS`.
        limit: bytes.
    """
    size = 0
    for name, text in SOURCES[kind]():
        text = text.strip()[:LONGEST]
        if len(text) >= SHORTEST:
            if size >= limit:
                return
            size += len(text.encode())
            yield {"text": text, "kind": kind, "source": name}


def make_text(output: str, bytes_per_kind: int, vocab_size: int) -> dict[str, Any]:
    """Write ``train.jsonl``, ``validation-KIND.jsonl`` and ``tokenizer`` into a directory.

    Returns:
        Bytes of text of each file.
    """
    from examples.slimqwen.train_tokenizer import train_tokenizer

    folder = Path(output)
    splits: dict[str, list[dict[str, str]]] = {"train": [], **{f"validation-{kind}": [] for kind in TEXTS}}
    for kind in TEXTS:
        for number, document in enumerate(documents(kind, bytes_per_kind)):
            # The second document of each kind at least, in a corpus of a few.
            held = number == 1 or is_validation(f"{kind}/{document['source']}", VALIDATION_PERCENT)
            splits[f"validation-{kind}" if held else "train"].append(document)
    for split, found in splits.items():
        if not found:
            raise DataError(f"there is no text for {split}", fix="install what pyproject.toml names")
        found.sort(key=lambda document: sha256(document["kind"] + document["source"]))
        write_atomic(folder / f"{split}.jsonl", "".join(json.dumps(each) + "\n" for each in found))
    train_tokenizer([folder / "train.jsonl"], folder / "tokenizer", vocab_size=vocab_size)
    return {split: sum(len(each["text"].encode()) for each in found) for split, found in splits.items()}


def make_samples(
    folder: str, seq_length: int, train_samples: int, validation_samples: int, prompts: int, prompt_tokens: int
) -> dict[str, Any]:
    """Cut tokens into what students train on (a sample set), what models are measured on, and prompts.

    Returns:
        Number of samples of each.
    """
    import numpy as np

    from megatron_slim.data import Tokens, read_samples
    from megatron_slim.sample_set import write_samples
    from megatron_slim.teacher_cache.recording_pass import Recorded

    where = Path(folder)
    data, length = where / "train_text_document", seq_length + 1
    tokens = read_samples(data, seq_length=length, num_samples=train_samples, at_most=True).astype(np.int32)
    whole = Recorded.whole(tokens, {"data": "windows of the training text, drawn at random"})
    (where / "samples").mkdir()
    write_samples(where / "samples", tokens, whole.loss_mask, whole.position_ids, documents=False, about=whole.about)
    np.save(where / "measuring.npy", tokens[:MEASURING_SAMPLES, :seq_length].astype(np.int64))
    validation, beginnings = list[Tokens](), list[Tokens]()
    for kind in TEXTS:
        windows = read_samples(where / f"validation-{kind}_text_document", seq_length=seq_length, num_samples=None)
        wanted, share = validation_samples // len(TEXTS), prompts // len(TEXTS)
        if len(windows) < wanted + share:
            raise DataError(f"{len(windows)} windows of {kind} for validation, {wanted + share} are needed")
        order = np.random.default_rng(0).permutation(len(windows))
        np.save(where / f"validation-{kind}.npy", windows[order[:wanted]])
        validation.append(windows[order[:wanted]])
        beginnings.append(windows[order[wanted : wanted + share], :prompt_tokens])
    np.save(where / "validation.npy", np.concatenate(validation))
    np.save(where / "prompts.npy", np.concatenate(beginnings))
    return {"samples": len(tokens), "validation": validation_samples, "prompts": prompts}
