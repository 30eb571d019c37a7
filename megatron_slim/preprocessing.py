"""Text to Megatron .bin/.idx: documents tokenized by several processes and written in the order of the input.

The result does not depend on the number of workers. Both files appear under their names only when they are complete,
the index last, because a data set without its index cannot be opened.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_slim.cli import say
from megatron_slim.documents import Source, batches, check_inputs, read_sources, sentence_splitter
from megatron_slim.errors import DataError
from megatron_slim.files import fsync_path, refuse_existing, remove, sole_writer
from megatron_slim.tokenizers import load_tokenizer

TEMPORARY, SUFFIXES = "data", (".bin", ".idx")
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
    """

    tokenizer_type: str
    tokenizer_model: Path
    json_keys: tuple[str, ...] = ("text",)
    append_eod: bool = False
    split_sentences: bool = False
    lang: str | None = None

    def prefixes(self, output_prefix: Path) -> dict[str, Path]:
        """Megatron's names for the outputs: ``PREFIX_{key}_{document|sentence}``."""
        level = "sentence" if self.split_sentences else "document"
        return {key: Path(f"{output_prefix}_{key}_{level}") for key in self.json_keys}


class Encoder:
    """Turns sources into token ids; each worker process has one of its own."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.tokenizer = load_tokenizer(options.tokenizer_type, options.tokenizer_model)
        if options.append_eod and self.tokenizer.eod is None:
            raise DataError("has no eos token to append", where=str(options.tokenizer_model), fix="drop --append-eod")
        self._split = sentence_splitter(options.lang) if options.split_sentences else lambda text: [text]

    def encode(self, sources: Sequence[Source]) -> list[dict[str, Document]]:
        """Token ids of a batch of documents by key; a document without a token is an empty list."""
        texts = [source.texts(self.options.json_keys) for source in sources]
        pieces = [{key: self._split(text) for key, text in document.items()} for document in texts]
        ids = iter(self.tokenizer.encode([piece for doc in pieces for split in doc.values() for piece in split]))
        return [{key: self._finish([next(ids) for _ in split]) for key, split in doc.items()} for doc in pieces]

    def _finish(self, sentences: Document) -> Document:
        filled = [ids for ids in sentences if ids]
        if filled and self.options.append_eod:
            assert self.tokenizer.eod is not None
            filled[-1] = [*filled[-1], self.tokenizer.eod]
        return filled


_worker: Encoder | None = None  # of a worker process, set once by its initializer


def _start_worker(options: Options) -> None:
    global _worker
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the workers are the parallelism
    _worker = Encoder(options)


def _work(sources: list[Source]) -> list[dict[str, Document]]:
    assert _worker is not None
    return _worker.encode(sources)


def _encode_all(encoder: Encoder, groups: Iterable[list[Source]], workers: int) -> Iterator[list[dict[str, Document]]]:
    """Encoded batches in the order of ``groups``."""
    if workers == 1:
        yield from map(encoder.encode, groups)
        return
    # Forked workers share the libraries that this process has imported; a spawned one takes seconds to import them.
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(workers, context, _start_worker, (encoder.options,)) as pool:
        pending: deque[Future[list[dict[str, Document]]]] = deque()
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
            pool.shutdown(cancel_futures=True)  # and wait: CPython may deadlock when told not to


class _Writer:
    """A Megatron data set under temporary names, renamed by `publish`."""

    def __init__(self, prefix: Path, directory: Path, dtype: Any) -> None:
        from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

        self.prefix, self.temporary = prefix, directory / TEMPORARY
        self.builder = IndexedDatasetBuilder(f"{self.temporary}.bin", dtype=dtype)
        self.documents = self.skipped = self.tokens = 0

    def add(self, document: Document) -> None:
        """Append a document; one without tokens is counted and left out."""
        if not document:
            self.skipped += 1
            return
        ids = np.concatenate([np.asarray(sentence, dtype=np.int64) for sentence in document])
        self._check_fit(ids)
        self.builder.add_document(ids, [len(sentence) for sentence in document])
        self.documents += 1
        self.tokens += len(ids)

    def _check_fit(self, ids: npt.NDArray[np.int64]) -> None:
        """Megatron's builder would wrap an id that its type does not hold, such as one that no vocabulary names."""
        lowest, highest = int(ids.min()), int(ids.max())
        if lowest < 0 or highest > np.iinfo(self.builder.dtype).max:
            raise DataError(
                f"the tokenizer gave id {lowest if lowest < 0 else highest}, which its vocabulary does not have",
                where=str(self.prefix),
                fix="repair the tokenizer's files: an added token, or eos, has another id than its vocabulary says",
            )

    def finish(self, where: str) -> None:
        """Write the index, flush, and read the data set back."""
        from megatron_slim.data import read_stream

        if self.documents == 0:
            raise DataError("holds no text at all", where=where)
        self.builder.finalize(f"{self.temporary}.idx")
        found = len(read_stream(self.temporary))
        assert found == self.tokens, (found, self.tokens)
        for suffix in SUFFIXES:
            fsync_path(Path(f"{self.temporary}{suffix}"))

    def publish(self) -> None:
        """Give the files their names, the index last."""
        for suffix in SUFFIXES:
            refuse_existing(Path(f"{self.prefix}{suffix}"))
        for suffix in SUFFIXES:
            os.rename(f"{self.temporary}{suffix}", f"{self.prefix}{suffix}")
        fsync_path(self.prefix.absolute().parent)


@contextlib.contextmanager
def _building(prefix: Path) -> Iterator[Path]:
    """A new directory for a data set that does not exist and that no other process makes."""
    data, index = (Path(f"{prefix}{suffix}") for suffix in SUFFIXES)
    refuse_existing(index)
    with sole_writer(prefix) as directory:
        _take_back(data, directory)  # a run may have been killed there
        refuse_existing(data)
        refuse_existing(index)
        remove(directory)
        directory.mkdir()
        try:
            yield directory
        finally:
            _take_back(data, directory)


def _take_back(data: Path, directory: Path) -> None:
    """Remove data that are published while their index is not."""
    if [file.name for file in directory.glob("*")] == [f"{TEMPORARY}.idx"]:
        data.unlink(missing_ok=True)


def _fill(writers: dict[str, _Writer], encoded: Iterable[list[dict[str, Document]]], log_interval: int) -> None:
    started, done = time.monotonic(), 0
    for batch in encoded:
        for document in batch:
            for key, ids in document.items():
                writers[key].add(ids)
            done += 1
            if done % log_interval == 0 and sys.stderr.isatty():
                tokens = sum(writer.tokens for writer in writers.values())
                say(f"{done} documents, {tokens} tokens ({tokens / (time.monotonic() - started):.0f}/s)")


def preprocess(
    inputs: Sequence[Path], output_prefix: Path, options: Options, *, workers: int = 1, log_interval: int = 1000
) -> dict[str, Any]:
    """Tokenize text files into Megatron data sets, one per JSON key.

    Args:
        inputs: .jsonl, .json (one JSON object a line) or .txt (one document a file), each also as .gz, in order.
        output_prefix: see `Options.prefixes`.
        options: how documents become tokens.
        workers: number of processes that tokenize.
        log_interval: documents between two lines of progress.

    Returns:
        ``prefix`` (of the first key), ``prefixes``, ``documents``, ``skipped_documents`` (without a token), ``tokens``
        (counted over all keys), ``vocab_size``, ``eod`` and ``dtype``.

    Raises:
        DataError: bad input, named by file and line.
        SlimError: an output exists.
    """
    for name, value in (("--workers", workers), ("--log-interval", log_interval)):
        if value < 1:
            raise DataError(f"{name} {value} is not a positive number")
    check_inputs(inputs)
    prefixes = options.prefixes(output_prefix)
    with contextlib.ExitStack() as stack:
        directories = {key: stack.enter_context(_building(prefix)) for key, prefix in prefixes.items()}
        encoder = Encoder(options)
        from megatron_slim import device

        device.install()
        from megatron.core.datasets.indexed_dataset import DType

        dtype = DType.optimal_dtype(encoder.tokenizer.vocab_size)
        writers = {key: _Writer(prefix, directories[key], dtype) for key, prefix in prefixes.items()}
        _fill(writers, _encode_all(encoder, batches(read_sources(inputs)), workers), log_interval)
        for writer in writers.values():
            writer.finish(", ".join(map(str, inputs)))
        for writer in writers.values():
            writer.publish()
    return {
        "prefix": str(next(iter(prefixes.values()))),
        "prefixes": {key: str(prefix) for key, prefix in prefixes.items()},
        "documents": sum(writer.documents for writer in writers.values()),
        "skipped_documents": sum(writer.skipped for writer in writers.values()),
        "tokens": sum(writer.tokens for writer in writers.values()),
        "vocab_size": encoder.tokenizer.vocab_size,
        "eod": encoder.tokenizer.eod,
        "dtype": np.dtype(dtype).name,
    }
