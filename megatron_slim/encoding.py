"""Documents to token ids, by several processes, in the order of the input."""

from __future__ import annotations

import multiprocessing
import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from megatron_slim.aliases import Function
from megatron_slim.documents import Source, sentence_splitter
from megatron_slim.errors import DataError
from megatron_slim.tokenizers import load_tokenizer

BATCHES_AHEAD = 4  # per worker: enough to keep it busy, few enough to bound memory

Document = list[list[int]]  # token ids, one list per sentence, or a single one


@dataclass(frozen=True)
class Options:
    """How documents become tokens.

    Attributes:
        tokenizer_type: Megatron's name of the tokenizer's kind.
        tokenizer_model: directory or file of the tokenizer.
        json_keys: keys of a JSON line, each of which makes a data set of its own.
        append_eod: end every document with the tokenizer's eos.
        split_sentences: one sequence per sentence, cut by nltk's Punkt.
        lang: see `documents.sentence_splitter`.
        skip_bad_lines: leave out what is not a document, instead of ending with the first.
    """

    tokenizer_type: str
    tokenizer_model: Path
    json_keys: tuple[str, ...] = ("text",)
    append_eod: bool = False
    split_sentences: bool = False
    lang: str | None = None
    skip_bad_lines: bool = False

    def prefixes(self, output_prefix: Path) -> dict[str, Path]:
        """Megatron's names for the outputs: ``PREFIX_{key}_{document|sentence}``."""
        level = "sentence" if self.split_sentences else "document"
        return {key: Path(f"{output_prefix}_{key}_{level}") for key in self.json_keys}


@dataclass(frozen=True)
class Encoded:
    """A batch of documents.

    Attributes:
        documents: token ids by key; a document without a token is an empty list.
        replaced: where those came from in which characters were replaced.
        left_out: what was wrong with sources that are not among them.
    """

    documents: list[dict[str, Document]]
    replaced: list[str]
    left_out: list[str]


class Encoder:
    """Turns sources into token ids; each worker process has one of its own."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.tokenizer = load_tokenizer(options.tokenizer_type, options.tokenizer_model)
        if options.append_eod and self.tokenizer.eod is None:
            raise DataError("has no eos token to append", where=str(options.tokenizer_model), fix="drop --append-eod")
        self._split = sentence_splitter(options.lang) if options.split_sentences else lambda text: [text]

    def encode(self, sources: Sequence[Source]) -> Encoded:
        """Token ids of a batch of documents.

        Raises:
            DataError: what the first source is that is not a document, unless such are left out.
        """
        try:
            return self._encode(sources)
        except MemoryError:
            raise
        except Exception:  # of one of them; tokenizers raise whatever they like, and do not say of which
            return self._encode_apart(sources)

    def _encode(self, sources: Sequence[Source]) -> Encoded:
        texts = [source.texts(self.options.json_keys) for source in sources]
        pieces = [{key: self._split(text) for key, text in each.by_key.items()} for each in texts]
        ids = iter(self.tokenizer.encode([piece for doc in pieces for split in doc.values() for piece in split]))
        documents = [{key: self._finish([next(ids) for _ in split]) for key, split in doc.items()} for doc in pieces]
        replaced = [source.where for source, each in zip(sources, texts, strict=True) if each.replaced]
        return Encoded(documents, replaced, [])

    def _encode_apart(self, sources: Sequence[Source]) -> Encoded:
        found = Encoded([], [], [])
        for source in sources:
            try:
                one = self._encode_one(source)
            except DataError as error:
                if not self.options.skip_bad_lines:
                    raise
                found.left_out.append(str(error))
            else:
                found.documents.extend(one.documents)
                found.replaced.extend(one.replaced)
        return found

    def _encode_one(self, source: Source) -> Encoded:
        try:
            return self._encode([source])
        except (DataError, MemoryError):
            raise
        except Exception as error:
            raise DataError(f"the tokenizer fails on it ({error})", where=source.where) from None

    def _finish(self, sentences: Document) -> Document:
        filled = [ids for ids in sentences if ids]
        if filled and self.options.append_eod:
            assert self.tokenizer.eod is not None
            filled[-1] = [*filled[-1], self.tokenizer.eod]
        return filled


class AnyEncoder[Result](Protocol):
    """What makes something of lines, the same in every process."""

    @property
    def options(self) -> object:
        """What its constructor takes."""

    def encode(self, sources: Sequence[Source]) -> Result:
        """What a batch of lines becomes."""
        ...


_worker: Any = None  # the encoder of a worker process, set once by its initializer


def _start_worker(kind: Function, options: object) -> None:
    global _worker
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the workers are the parallelism
    _worker = kind(options)


def _work(sources: list[Source]) -> Any:
    return _worker.encode(sources)


def encode_all[Result](encoder: AnyEncoder[Result], groups: Iterable[list[Source]], workers: int) -> Iterator[Result]:
    """Encoded batches in the order of ``groups``."""
    if workers == 1:
        yield from map(encoder.encode, groups)
        return
    # Forked workers share the libraries that this process has imported; a spawned one takes seconds to import them.
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(workers, context, _start_worker, (type(encoder), encoder.options)) as pool:
        pending: deque[Future[Result]] = deque()
        try:
            for group in groups:
                pending.append(pool.submit(_work, group))
                if len(pending) >= BATCHES_AHEAD * workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        except BrokenProcessPool:
            raise DataError("a worker process died", fix="out of memory? use fewer --workers") from None
        finally:
            pool.shutdown(cancel_futures=True)  # and wait: CPython may deadlock otherwise
