"""Prompts to generate from: a line of JSON each, text or token ids, or a matrix of ids."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

from megatron_slim.architecture.shape import ModelShape
from megatron_slim.data import check_ids, read_samples
from megatron_slim.documents import JSON_SUFFIXES, check_inputs, read_sources
from megatron_slim.errors import DataError
from megatron_slim.tokenizers import HuggingFaceTokenizer

Prompts = list[list[int]]


def read_prompts(path: Path, tokenizer: Path, *, number: int | None = None, length: int | None = None) -> Prompts:
    """Read prompts.

    Args:
        path: a ``.npy`` matrix of token ids [prompts, tokens]; or JSON lines, each with ``tokens``, a list of ids, or
            with ``text``.
        tokenizer: directory of the tokenizer, of which text alone has need.
        number: prompts to take, the first ones; None is all.
        length: tokens to take of each, from its beginning; None is all.

    Raises:
        DataError: nothing there, or something else; names the line.
    """
    if path.suffix == ".npy":
        prompts: Prompts = read_samples(path, seq_length=None, num_samples=None)[:number].tolist()
    else:
        check_inputs([path])
        if Path(path.name.removesuffix(".gz")).suffix not in JSON_SUFFIXES:
            raise DataError("not a file of prompts", where=str(path), fix="give JSON lines or a .npy matrix")
        prompts = list(itertools.islice(_of_lines(path, tokenizer), number))
    if not prompts:
        raise DataError("holds no prompts", where=str(path))
    return [prompt[:length] for prompt in prompts]


def check_prompts(prompts: Prompts, shape: ModelShape, *, max_new_tokens: int, where: str) -> None:
    """Refuse prompts that a model cannot continue.

    Raises:
        DataError: there is none, or an empty one, ids outside its vocabulary, or too many positions.
    """
    if not prompts or not all(prompts):
        raise DataError("no prompts" if not prompts else "a prompt is empty", where=where)
    check_ids(min(map(min, prompts)), max(map(max, prompts)), shape.vocab_size, where)
    longest = max(map(len, prompts)) + max_new_tokens
    if longest > shape.max_position_embeddings:
        raise DataError(
            f"prompts and new tokens take up to {longest} positions, the model's max_position_embeddings is "
            f"{shape.max_position_embeddings}",
            where=where,
            fix="take less of each prompt (--prompt-tokens), or generate less (--max-new-tokens)",
        )


def _of_lines(path: Path, tokenizer: Path) -> Iterator[list[int]]:
    loaded = None
    for source in read_sources([path]):
        record = source.record()
        if isinstance(record, dict) and "tokens" in record:
            ids = record["tokens"]
        elif isinstance(record, dict) and isinstance(record.get("text"), str):
            if loaded is None:
                loaded = HuggingFaceTokenizer(tokenizer)
            ids = loaded.encode([record["text"]])[0]
        else:
            raise DataError("has neither text nor tokens", where=source.where, fix='write {"text": "..."}')
        if not isinstance(ids, list) or not ids or any(type(token) is not int for token in ids):
            raise DataError("is not a prompt of one token or more", where=source.where, fix="remove the line")
        yield ids
