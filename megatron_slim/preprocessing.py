"""Text to Megatron .bin/.idx: documents tokenized by several processes and written in the order of the input.

The result does not depend on the number of workers. Both files appear under their names only when they are complete,
the index last, because a data set without its index cannot be opened.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megatron_slim.aliases import JsonObject
from megatron_slim.documents import batches, check_inputs, read_sources
from megatron_slim.encoding import Document, Encoded, Encoder, Options, encode_all
from megatron_slim.errors import DataError
from megatron_slim.files import fsync_path, refuse_existing, remove, sole_writer
from megatron_slim.reporting import count_progress

logger = logging.getLogger(__name__)

TEMPORARY, SUFFIXES = "data", (".bin", ".idx")


@dataclass
class Remarks:
    """How many of the documents there is something to say about, and what of the first."""

    count: int = 0
    first: str | None = None

    def add(self, found: Sequence[str]) -> None:
        """Count those of a batch, which comes after all before."""
        self.count += len(found)
        self.first = self.first or next(iter(found), None)


class _Writer:
    """A Megatron data set under temporary names, renamed by `publish`."""

    def __init__(self, prefix: Path, directory: Path, dtype: npt.DTypeLike) -> None:
        import megatron_slim.mcore

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

    def finish(self, where: str, left_out: Remarks) -> None:
        """Write the index, flush, and read the data set back."""
        from megatron_slim.data import read_stream

        if self.documents == 0:
            fix = f"left out lines: {left_out.count}, the first: {left_out.first}" if left_out.count else ""
            raise DataError("holds no text at all", where=where, fix=fix)
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


def _fill(writers: dict[str, _Writer], encoded: Iterable[Encoded], log_interval: int | None) -> tuple[Remarks, Remarks]:
    """Write all documents; gives those that were left out, and those with characters replaced."""
    started, done, tokens, left_out, replaced = time.monotonic(), 0, 0, Remarks(), Remarks()
    reported = count_progress("tokenizing", "tokens") if log_interval is None else contextlib.nullcontext(_ignore)
    with reported as advance:
        for batch in encoded:
            left_out.add(batch.left_out)
            replaced.add(batch.replaced)
            for document in batch.documents:
                for key, ids in document.items():
                    writers[key].add(ids)
                done += 1
                if log_interval is not None and done % log_interval == 0:
                    tokens = sum(writer.tokens for writer in writers.values())
                    speed = tokens / (time.monotonic() - started)
                    logger.info(f"{done} documents, {tokens} tokens ({speed:.0f}/s)")
            before, tokens = tokens, sum(writer.tokens for writer in writers.values())
            advance(tokens - before)
    return left_out, replaced


def _ignore(done: int) -> None:
    """Progress that is logged in another way."""


def preprocess(
    inputs: Sequence[Path], output_prefix: Path, options: Options, *, workers: int = 1, log_interval: int | None = None
) -> JsonObject:
    """Tokenize text files into Megatron data sets, one per JSON key.

    Args:
        inputs: .jsonl, .json (one JSON object a line) or .txt (one document a file), each also as .gz, in order.
        output_prefix: see `Options.prefixes`.
        options: how documents become tokens.
        workers: number of processes that tokenize.
        log_interval: documents between two lines of progress; None: progress is reported as tokens (`reporting`).

    Returns:
        ``prefix`` (of the first key), ``prefixes``, ``documents``, ``skipped_documents`` (without a token), ``tokens``
        (counted over all keys), ``bad_lines`` (left out) and ``first_bad_line``, ``replaced_documents`` (with half of a
        surrogate pair) and ``first_replaced``, ``vocab_size``, ``eod`` and ``dtype``.

    Raises:
        DataError: bad input, named by file and line.
        SlimError: an output exists.
    """
    for name, value in (("--workers", workers), ("--log-interval", log_interval)):
        if value is not None and value < 1:
            raise DataError(f"{name} {value} is not a positive number")
    check_inputs(inputs)
    prefixes = options.prefixes(output_prefix)
    with contextlib.ExitStack() as stack:
        directories = {key: stack.enter_context(_building(prefix)) for key, prefix in prefixes.items()}
        encoder = Encoder(options)
        import megatron_slim.mcore

        from megatron.core.datasets.indexed_dataset import DType

        dtype = DType.optimal_dtype(encoder.tokenizer.vocab_size)
        writers = {key: _Writer(prefix, directories[key], dtype) for key, prefix in prefixes.items()}
        encoded = encode_all(encoder, batches(read_sources(inputs)), workers)
        left_out, replaced = _fill(writers, encoded, log_interval)
        for writer in writers.values():
            writer.finish(", ".join(map(str, inputs)), left_out)
        for writer in writers.values():
            writer.publish()
    return {
        "prefix": str(next(iter(prefixes.values()))),
        "prefixes": {key: str(prefix) for key, prefix in prefixes.items()},
        "documents": sum(writer.documents for writer in writers.values()),
        "skipped_documents": sum(writer.skipped for writer in writers.values()),
        "tokens": sum(writer.tokens for writer in writers.values()),
        "bad_lines": left_out.count,
        "first_bad_line": left_out.first,
        "replaced_documents": replaced.count,
        "first_replaced": replaced.first,
        "vocab_size": encoder.tokenizer.vocab_size,
        "eod": encoder.tokenizer.eod,
        "dtype": np.dtype(dtype).name,
    }
