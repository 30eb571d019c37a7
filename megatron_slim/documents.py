"""Text documents from JSON lines and text files, and their sentences."""

from __future__ import annotations

import gzip
import itertools
import json
import re
import zlib
from codecs import BOM_UTF8
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from megatron_slim.aliases import Function
from megatron_slim.errors import DataError
from megatron_slim.extras import require
from megatron_slim.files import without_duplicates

JSON_SUFFIXES, TEXT_SUFFIXES = (".jsonl", ".json"), (".txt",)
BATCH_BYTES = 1 << 18
REPLACEMENT = "\ufffd"
_SURROGATE = re.compile("[\ud800-\udfff]")
_OTHER_KEY = "name another key with --json-keys, or leave such lines out with --skip-bad-lines"


@dataclass(frozen=True)
class Texts:
    """What a document says.

    Attributes:
        by_key: text under each key.
        replaced: whether there were halves of surrogate pairs, for which `REPLACEMENT` stands now.
    """

    by_key: dict[str, str]
    replaced: bool


@dataclass(frozen=True)
class Source:
    """A stretch of input as it was read: a line of JSON, or a whole text file (line 0)."""

    path: str
    line: int
    content: bytes

    @property
    def where(self) -> str:
        """Where it came from, for errors."""
        return f"{self.path}:{self.line}" if self.line else self.path

    def texts(self, keys: Sequence[str]) -> Texts:
        """The document's text under each of ``keys``; a text file has the same text under all of them.

        JSON may name half of a surrogate pair, not a character: no tokenizer takes it. It is what is left of one
        that another program cut in two, so the rest of the document is kept.

        Raises:
            DataError: not UTF-8, not JSON, or no text under a key.
        """
        text = self._decoded()
        record = dict.fromkeys(keys, text) if self.line == 0 else self._parsed(text)
        for key in keys:
            if not isinstance(record, dict) or not isinstance(record.get(key), str):
                raise DataError(f"has no text under {key!r}", where=self.where, fix=_OTHER_KEY)
        found = {key: record[key] for key in keys}
        whole = {key: _without_surrogates(text) for key, text in found.items()}
        return Texts(whole, whole != found)

    def record(self) -> Any:
        """What a line of JSON holds.

        Raises:
            DataError: not UTF-8, or not JSON, a key that is there twice included.
        """
        return self._parsed(self._decoded(), without_duplicates)

    def _decoded(self) -> str:
        """Its characters, without a byte order mark in front."""
        try:
            return self.content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise DataError(f"not readable as UTF-8 text ({error})", where=self.where) from None

    def _parsed(self, text: str, pairs: Function | None = None) -> Any:
        try:
            return json.loads(text, object_pairs_hook=pairs)
        except (ValueError, RecursionError) as error:
            raise DataError(f"not a line of JSON ({error})", where=self.where) from None


def _without_surrogates(text: str) -> str:
    try:
        text.encode()  # far quicker than a search
    except UnicodeEncodeError:
        return _SURROGATE.sub(REPLACEMENT, text)
    return text


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
            with _open(path) as stream:
                if _kind(path) in TEXT_SUFFIXES:
                    yield Source(str(path), 0, stream.read())
                else:
                    lines = enumerate(stream, 1)
                    yield from (Source(str(path), n, line) for n, line in lines if line.removeprefix(BOM_UTF8).strip())
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(f"not readable ({error})", where=str(path)) from None


def _kind(path: Path) -> str:
    return Path(path.name.removesuffix(".gz")).suffix


def _open(path: Path) -> gzip.GzipFile | IO[bytes]:
    return gzip.open(path, "rb") if path.name.endswith(".gz") else open(path, "rb")


def batches(sources: Iterator[Source]) -> Iterator[list[Source]]:
    """Group documents into batches of about `BATCH_BYTES`, the unit of work of a process."""
    batch: list[Source] = []
    size = 0
    for source in sources:
        batch.append(source)
        size += len(source.content)
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
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
    require("text", "nltk", "--split-sentences")
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
