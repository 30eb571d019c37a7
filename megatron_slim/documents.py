"""Text documents from JSON lines and text files, and their sentences."""

from __future__ import annotations

import gzip
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from megatron_slim.errors import DataError

JSON_SUFFIXES, TEXT_SUFFIXES = (".jsonl", ".json"), (".txt",)
BATCH_CHARACTERS = 1 << 18


@dataclass(frozen=True)
class Source:
    """A stretch of input: a line of JSON, or a whole text file (line 0)."""

    path: str
    line: int
    text: str

    @property
    def where(self) -> str:
        """Where it came from, for errors."""
        return f"{self.path}:{self.line}" if self.line else self.path

    def texts(self, keys: Sequence[str]) -> dict[str, str]:
        """The document's text under each of ``keys``; a text file has the same text under all of them.

        Raises:
            DataError: not JSON, or no text under a key.
        """
        if self.line == 0:
            return dict.fromkeys(keys, self.text)
        try:
            record = json.loads(self.text)
        except (ValueError, RecursionError) as error:
            raise DataError(f"not a line of JSON ({error})", where=self.where) from None
        for key in keys:
            if not isinstance(record, dict) or not isinstance(record.get(key), str):
                raise DataError(f"has no text under {key!r}", where=self.where, fix="name the key with --json-keys")
        return {key: record[key] for key in keys}


def check_inputs(paths: Sequence[Path]) -> None:
    """Refuse input that is missing or of an unknown kind, all of it before work starts."""
    for path in paths:
        if not path.is_file():
            raise DataError("no such file", where=str(path))
        if _kind(path) not in (*JSON_SUFFIXES, *TEXT_SUFFIXES):
            known = ", ".join((*JSON_SUFFIXES, *TEXT_SUFFIXES))
            raise DataError("unknown kind of input", where=str(path), fix=f"known: {known}, also with .gz")


def read_sources(paths: Sequence[Path]) -> Iterator[Source]:
    """Documents in order: every line of .jsonl and .json files that is not blank, every .txt file as a whole."""
    for path in paths:
        try:
            with _open_text(path) as stream:
                if _kind(path) in TEXT_SUFFIXES:
                    yield Source(str(path), 0, stream.read())
                else:
                    yield from (Source(str(path), n, line) for n, line in enumerate(stream, 1) if line.strip())
        except (UnicodeDecodeError, OSError, EOFError) as error:
            raise DataError(f"not readable as UTF-8 text ({error})", where=str(path)) from None


def _kind(path: Path) -> str:
    return Path(path.name.removesuffix(".gz")).suffix


def _open_text(path: Path) -> IO[str]:
    if path.name.endswith(".gz"):
        return gzip.open(path, "rt", encoding="utf-8", newline="\n")
    return open(path, encoding="utf-8", newline="\n")


def batches(sources: Iterator[Source]) -> Iterator[list[Source]]:
    """Group documents into batches of about `BATCH_CHARACTERS`, the unit of work of a process."""
    batch: list[Source] = []
    characters = 0
    for source in sources:
        batch.append(source)
        characters += len(source.text)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def sentence_splitter(lang: str | None) -> Callable[[str], list[str]]:
    """A function that cuts a text into sentences, each with the white space that follows it.

    The pieces of a text, one after the other, are the text: nothing is lost to the training data.

    Args:
        lang: language of an installed nltk ``punkt_tab`` model; None takes Punkt untrained, which needs no data but
            takes every abbreviation for the end of a sentence.

    Raises:
        DataError: nltk's model of that language is not installed.
    """
    from nltk.tokenize import punkt

    try:
        tokenizer: Any = punkt.PunktSentenceTokenizer() if lang is None else punkt.PunktTokenizer(lang)
    except (LookupError, OSError):
        raise DataError(
            f"nltk's punkt_tab model for {lang!r} is not installed",
            fix="run `python -m nltk.downloader punkt_tab`, or drop --lang for the untrained model",
        ) from None

    def split(text: str) -> list[str]:
        starts = [start for start, _ in tokenizer.span_tokenize(text)]
        bounds = [0, *starts[1:], len(text)]
        return [text[begin:end] for begin, end in itertools.pairwise(bounds)]

    return split
