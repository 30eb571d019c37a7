"""Chat data: JSON lines of messages to a sample set, through a tokenizer's chat template."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from megatron_slim.aliases import JsonObject
from megatron_slim.chat_template import Chat, ChatTemplate
from megatron_slim.command_line import CUT
from megatron_slim.documents import Source, batches, check_inputs, read_sources
from megatron_slim.encoding import encode_all
from megatron_slim.errors import DataError
from megatron_slim.files import file_sha256, new_directory, refuse_existing
from megatron_slim.reporting import count_progress
from megatron_slim.sample_packing import Counts, Packer, as_columns
from megatron_slim.sample_set import write_samples

logger = logging.getLogger(__name__)

# What of a tokenizer directory decides how a conversation becomes tokens.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "chat_template*",
    "additional_chat_templates/*",
)


@dataclass(frozen=True)
class ChatOptions:
    """How conversations become samples.

    Attributes:
        tokenizer: directory of the tokenizer, which has the chat template.
        seq_length: positions of a sample.
        too_long: what becomes of a conversation longer than a sample, `command_line.TOO_LONG`.
        unroll: make several documents of a conversation whose history changes.
        skip_bad_lines: leave out what is not a conversation, or one that cannot be masked, instead of ending with it.
    """

    tokenizer: Path
    seq_length: int
    too_long: str = CUT
    unroll: bool = False
    skip_bad_lines: bool = False


@dataclass(frozen=True)
class EncodedChats:
    """A batch of conversations.

    Attributes:
        chats: in tokens.
        unrolled: how many conversations are several of them.
        left_out: what was wrong with lines that are not among them.
    """

    chats: list[Chat]
    unrolled: int
    left_out: list[str]


class ChatEncoder:
    """Turns lines into conversations in tokens; each worker process has one of its own."""

    def __init__(self, options: ChatOptions) -> None:
        self.options = options
        self.template = ChatTemplate(options.tokenizer, unroll=options.unroll)

    def encode(self, sources: Sequence[Source]) -> EncodedChats:
        """Conversations of a batch of lines.

        Raises:
            DataError: what the first line is that is none, or that cannot be masked, unless such are left out.
        """
        chats, unrolled, left_out = list[Chat](), 0, list[str]()
        for source in sources:
            try:
                found = self.template.encode(source.record(), source.where)
            except DataError as error:
                if not self.options.skip_bad_lines:
                    raise
                left_out.append(str(error))
            else:
                unrolled += len(found) > 1
                chats += found
        return EncodedChats(chats, unrolled, left_out)


@dataclass
class _Seen:
    """What was read on the way."""

    unrolled: int = 0
    bad_lines: int = 0
    first_bad_line: str | None = None

    def chats(self, encoded: Iterator[EncodedChats]) -> Iterator[Chat]:
        with count_progress("tokenizing", "tokens") as advance:
            for batch in encoded:
                self.unrolled += batch.unrolled
                self.bad_lines += len(batch.left_out)
                self.first_bad_line = self.first_bad_line or next(iter(batch.left_out), None)
                advance(sum(len(chat.ids) for chat in batch.chats))
                yield from batch.chats


def make_samples(inputs: Sequence[Path], output: Path, options: ChatOptions, *, workers: int = 1) -> JsonObject:
    """Pack conversations into a sample set.

    Args:
        inputs: .jsonl or .json files, one conversation a line, each also as .gz, in order.
        output: directory of the sample set, which must not exist.
        options: how conversations become samples.
        workers: number of processes that tokenize; they do not change the output.

    Returns:
        ``path``, ``seq_length``, ``vocab_size``, what `sample_packing.Counts` has, ``unrolled`` (conversations that are
        several documents), ``bad_lines`` (left out) and ``first_bad_line``.

    Raises:
        DataError: bad input, named by file and line; nothing in it counts.
        SlimError: the output exists.
    """
    if options.seq_length < 1:
        raise DataError(f"--seq-length {options.seq_length} is not a positive number")
    check_inputs(inputs)
    if texts := [path for path in inputs if path.name.removesuffix(".gz").endswith(".txt")]:
        raise DataError("is a text, not conversations", where=str(texts[0]), fix="give .jsonl files")
    refuse_existing(output)
    encoder, seen = ChatEncoder(options), _Seen()
    packer = Packer(options.seq_length, encoder.template.pad, options.too_long)
    encoded = encode_all(encoder, batches(read_sources(inputs)), workers)
    with new_directory(output) as directory, _spooled(directory.parent) as files:
        as_columns(packer.rows(seen.chats(encoded)), files)
        counts = packer.counts
        if not counts.samples:
            raise DataError(
                "no conversation in which a token counts", where=", ".join(map(str, inputs)), fix=_why(counts, seen)
            )
        columns = (options.seq_length + 1, options.seq_length, options.seq_length)
        kinds = zip(files, columns, (np.int32, np.uint8, np.int32), strict=True)
        arrays = [np.memmap(file, dtype, "r", shape=(counts.samples, width)) for file, width, dtype in kinds]
        figures = dataclasses.asdict(counts) | dataclasses.asdict(seen)
        about = figures | {"kind": "chats", "inputs": [path.name for path in inputs]}
        write_samples(directory, *arrays, documents=True, about=about | _origin(inputs, options))
    logger.info(say(figures, output))
    return {"path": str(output), "seq_length": options.seq_length, "vocab_size": encoder.template.vocab_size, **figures}


def say(figures: JsonObject, output: Path) -> str:
    """What was made, in one line."""
    left_out = figures["too_long"] + figures["without_answer"]
    return (
        f"{figures['conversations']} conversations, {figures['tokens']} tokens, {figures['counted']} of them in the "
        f"loss; truncated: {figures['truncated']}, left out: {left_out} and {figures['bad_lines']} bad lines; "
        f"{figures['samples']} samples, {figures['padding']:.1%} padding -> {output}"
    )


def _why(counts: Counts, seen: _Seen) -> str:
    found = f"without an answer that fits: {counts.without_answer}, too long: {counts.too_long}"
    return found + (f", bad lines: {seen.bad_lines}, the first: {seen.first_bad_line}" if seen.bad_lines else "")


def _origin(inputs: Sequence[Path], options: ChatOptions) -> JsonObject:
    """What samples are made of: they are the same where this is."""
    return {
        "input_sha256": [file_sha256(path) for path in inputs],
        "tokenizer_sha256": tokenizer_digests(options.tokenizer),
        "too_long": options.too_long,
        "unroll": options.unroll,
    }


def tokenizer_digests(path: Path) -> dict[str, str]:
    """SHA-256 of each file of a tokenizer directory that decides about tokens, by its name."""
    files = {file for pattern in TOKENIZER_FILES for file in path.glob(pattern) if file.is_file()}
    return {str(file.relative_to(path)): file_sha256(file) for file in sorted(files)}


@contextlib.contextmanager
def _spooled(directory: Path) -> Iterator[list[BinaryIO]]:
    """Three files without a name, for columns that grow row by row and may not fit into memory."""
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(tempfile.TemporaryFile(dir=directory)) for _ in range(3)]
