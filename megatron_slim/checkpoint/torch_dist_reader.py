"""Reading pieces of tensors from the files of a torch distributed checkpoint, in any order, checked in passing."""

from __future__ import annotations

import io
import math
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from megatron_slim.checkpoint.archives import Frame, Window, locate_data
from megatron_slim.checkpoint.raw_files import OpenFile, OpenFiles, as_bytes, as_tensor
from megatron_slim.checkpoint.torch_dist_files import Piece
from megatron_slim.checkpoint.torch_dist_names import METADATA
from megatron_slim.errors import CheckpointError

_PASS_BYTES = 8 << 20


class PieceReader:
    """Reads pieces, or some of their rows, straight into tensors.

    Data are compared with their CRC-32, if one was written: those of whole pieces as they pass; of a piece of which
    rows are wanted only with ``check_parts``, by one more pass over all of it, before the first of them.

    Attributes:
        files: what it reads through.
        check_parts: see above.
    """

    def __init__(self, written: Mapping[tuple[tuple[int, ...], torch.dtype], Frame] | None = None) -> None:
        """Make a reader of any archives or, with ``written``, of those alone that have these frames.

        Those were written just now, and whoever wrote them compares the data: no checksums.
        """
        self.files = OpenFiles()
        self.check_parts = False
        self._strict = written is not None
        self._frames: Mapping[tuple[tuple[int, ...], torch.dtype], Frame] = {} if written is None else written
        self._checked: set[tuple[Path, int]] = set()

    def read_rows(self, piece: Piece, rows: npt.NDArray[np.int64], *, dims: int = 1) -> Tensor:
        """Read some rows of a piece.

        Args:
            piece: the piece.
            rows: indices in the order wanted.
            dims: how many leading dimensions a row index counts through, the last of them fastest.

        Returns:
            [rows, remaining dimensions].

        Raises:
            CheckpointError: the bytes are not the tensor that the metadata describes.
        """
        shape = (rows.size, *piece.sizes[dims:])
        if rows.size == math.prod(piece.sizes[:dims]) and bool(np.all(np.diff(rows) == 1)):
            return as_tensor(self._whole(piece), piece.dtype, shape)
        start, crc = self._locate(piece)
        if self.check_parts and (piece.file, piece.position) not in self._checked:
            self._check_in_passing(piece, start, crc)
            self._checked.add((piece.file, piece.position))
        row_bytes = math.prod(piece.sizes[dims:]) * piece.dtype.itemsize
        return as_tensor(self.files.gather(piece.file, start, rows, row_bytes), piece.dtype, shape)

    def _whole(self, piece: Piece) -> Tensor:
        """Its data; read in one go with what surrounds them, where that is known."""
        if (known := self._frames.get((piece.sizes, piece.dtype))) is not None:
            content = self.files.read(piece.file, piece.position, piece.length)
            head, data, tail = content.split(
                (len(known.head), piece.length - len(known.head) - len(known.tail), len(known.tail))
            )
            if known.fits(bytes(as_bytes(head)), end := bytes(as_bytes(tail))):
                self._compare(piece, known.crc_in(end), as_bytes(data))
                return data
        start, crc = self._locate(piece)
        data = self.files.read(piece.file, start, piece.nbytes)
        self._compare(piece, crc, as_bytes(data))
        return data

    def _check_in_passing(self, piece: Piece, start: int, crc: int | None) -> None:
        """Compare data of any size, some megabytes at a time."""
        if crc is None:
            return
        found = 0
        for done in range(0, piece.nbytes, _PASS_BYTES):
            found = zlib.crc32(
                as_bytes(self.files.read(piece.file, start + done, min(_PASS_BYTES, piece.nbytes - done))), found
            )
        _refuse_other_crc(piece, crc, found)

    def _compare(self, piece: Piece, crc: int | None, data: memoryview) -> None:
        if crc is not None and not self._strict:
            _refuse_other_crc(piece, crc, zlib.crc32(data))

    def _locate(self, piece: Piece) -> tuple[int, int | None]:
        """Byte of its file at which the data start, and their CRC-32 if it was written.

        One framed as one parsed before has the same layout.
        """
        known = self._frames.get((piece.sizes, piece.dtype))
        if known is not None:
            head, tail = self._ends(piece, len(known.head), len(known.tail))
            if known.fits(head, tail):
                return piece.position + len(known.head), known.crc_in(tail)
        if self._strict:
            raise CheckpointError(f"byte {piece.position}: not what was written when read back", where=str(piece.file))
        opened = OpenFile(piece.file)
        window = io.BufferedReader(Window(opened.descriptor, piece.position, piece.length))
        try:
            start, crc_at = locate_data(window, piece.length, piece.sizes, piece.dtype)
        except ValueError as error:
            raise CheckpointError(
                f"byte {piece.position} is not the tensor that {METADATA} describes ({error})", where=str(piece.file)
            ) from None
        end = start + piece.nbytes
        head, tail = self._ends(piece, start, piece.length - end)
        frame = Frame.of(head, tail, tuple(place - end for place in crc_at))
        self._frames = {**self._frames, (piece.sizes, piece.dtype): frame}
        return piece.position + start, frame.crc_in(tail)

    def _ends(self, piece: Piece, head: int, tail: int) -> tuple[bytes, bytes]:
        """The given number of bytes at the two ends of an archive."""
        end = piece.position + piece.length
        first, last = (self.files.read(piece.file, *span) for span in ((piece.position, head), (end - tail, tail)))
        return bytes(as_bytes(first)), bytes(as_bytes(last))


def _refuse_other_crc(piece: Piece, written: int, found: int) -> None:
    if written != found:
        raise CheckpointError(
            f"byte {piece.position}: damaged data, their CRC-32 is {found:08x} and was {written:08x}",
            where=str(piece.file),
            fix="get the file again from where it was written",
        )
