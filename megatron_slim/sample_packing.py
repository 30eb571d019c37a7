"""Conversations packed into samples of one length, whole wherever they fit; their order alone decides where."""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from megatron_slim.aliases import Array
from megatron_slim.chat_template import Chat
from megatron_slim.command_line import CUT, DROP

OPEN = 512  # samples that still take conversations; more fill samples hardly better


@dataclass
class Counts:
    """What has become of the conversations.

    Attributes:
        conversations: that are in the samples; of a conversation with a changing history every part.
        tokens: in the samples, padding apart.
        counted: predictions in the loss.
        truncated: conversations that were cut at the end of a sample.
        lost: tokens that were cut off.
        too_long: conversations that were left out because they are.
        without_answer: conversations that were left out because nothing of the assistant's is in them, or left in them.
        samples: made of them.
        padding: share of padding in the samples.
    """

    conversations: int = 0
    tokens: int = 0
    counted: int = 0
    truncated: int = 0
    lost: int = 0
    too_long: int = 0
    without_answer: int = 0
    samples: int = 0
    padding: float = 0.0


@dataclass(frozen=True)
class Row:
    """A sample.

    Attributes:
        tokens: [S + 1].
        loss_mask: [S].
        position_ids: [S].
    """

    tokens: npt.NDArray[np.int32]
    loss_mask: npt.NDArray[np.uint8]
    position_ids: npt.NDArray[np.int32]


@dataclass
class Packer:
    """Fills samples: a conversation goes where it leaves the least space, among the samples that are open.

    Attributes:
        seq_length: positions of a sample, S; it holds one token more, which is predicted alone.
        pad: id that fills what is left.
        too_long: `CUT`, conversations end where a sample does; `DROP`, they are left out.
        counts: so far.
    """

    seq_length: int
    pad: int
    too_long: str = CUT
    counts: Counts = field(default_factory=Counts)
    _open: list[tuple[int, int]] = field(default_factory=list)  # space and number, the fullest first
    _held: dict[int, list[Chat]] = field(default_factory=dict)

    def rows(self, chats: Iterable[Chat]) -> Iterator[Row]:
        """The samples of all conversations."""
        for chat in chats:
            if (taken := self._taken(chat)) is not None:
                self._place(taken)
                if len(self._open) > OPEN:
                    yield self._row(self._held.pop(self._open.pop(0)[1]))
        for number in sorted(self._held):
            yield self._row(self._held[number])
        self._open.clear()
        self._held.clear()
        space = self.counts.samples * (self.seq_length + 1)
        self.counts.padding = 1 - self.counts.tokens / space if space else 0.0

    def _taken(self, chat: Chat) -> Chat | None:
        """What of a conversation goes into a sample; the first token is predicted by nothing."""
        size = self.seq_length + 1
        if any(chat.counts[1:]) and len(chat.ids) > size and self.too_long == DROP:
            self.counts.too_long += 1
            return None
        if not any(chat.counts[1:size]):
            self.counts.without_answer += 1
            return None
        cut = max(0, len(chat.ids) - size)
        self.counts.truncated += cut > 0
        self.counts.lost += cut
        return Chat(chat.ids[:size], chat.counts[:size])

    def _place(self, chat: Chat) -> None:
        size = len(chat.ids)
        self.counts.conversations += 1
        self.counts.tokens += size
        place = bisect.bisect_left(self._open, (size, -1))
        if place < len(self._open):
            space, number = self._open.pop(place)
        else:
            space, number = self.seq_length + 1, self.counts.samples
            self.counts.samples += 1
        self._held.setdefault(number, []).append(chat)
        bisect.insort(self._open, (space - size, number))

    def _row(self, chats: Sequence[Chat]) -> Row:
        size = self.seq_length + 1
        tokens = np.full(size, self.pad, np.int32)
        counts, positions = np.zeros(size, np.uint8), np.zeros(size, np.int32)
        begin = 0
        for chat in chats:
            end = begin + len(chat.ids)
            tokens[begin:end], counts[begin:end] = chat.ids, chat.counts
            counts[begin] = 0  # which the token before would predict, of another conversation
            positions[begin:end] = np.arange(end - begin)
            begin = end
        positions[begin:] = np.arange(size - begin)  # padding, a document of its own
        self.counts.counted += int(counts.sum())
        return Row(tokens, counts[1:], positions[:-1])


def as_columns(rows: Iterable[Row], files: Sequence[BinaryIO]) -> None:
    """Write tokens, masks and positions of all rows one after the other into three open files."""
    for row in rows:
        columns: tuple[Array, ...] = (row.tokens, row.loss_mask, row.position_ids)
        for file, values in zip(files, columns, strict=True):
            file.write(values.tobytes())
