"""A directory in which a pass over a model keeps its hidden states and what it has measured.

Memory then no longer grows with the number of samples, and a run that was killed is taken up after the last module that
it had finished. ``hidden.N`` holds the hidden states after N modules, and ``state`` all else: the SHA-256 of what
follows it, and safetensors. ``state`` is replaced when ``hidden.N`` is on the disk, and ``hidden.N-1`` is removed after
that, so at any moment there is one complete state, the old or the new one.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load, save
from torch import Tensor

from megatron_slim.checkpoint.raw_files import OpenFile, OutputFile, as_bytes
from megatron_slim.errors import SlimError
from megatron_slim.files import check_space, fsync_path, remove, sole_writer, write_atomic

STATE = "state"
_OURS = re.compile(r"hidden\.\d+|state|\.state\.(partial|lock)")
_AGAIN = "remove the directory and start again"
_DIGEST = 64  # hex digits


@dataclass(frozen=True)
class Saved:
    """Where a pass stands.

    Attributes:
        finished: number of modules that everything has gone through.
        measured: what the pass had measured by then.
    """

    finished: int
    measured: dict[str, Tensor]


class WorkDir:
    """The directory, locked for this process; from `open_work_dir`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._inputs: dict[str, str] = {}
        self._finished = 0
        self._sizes: list[int] = []  # of the micro-batches of hidden.N, and their checksums
        self._checksums: list[int] = []
        self._next: tuple[OutputFile, list[int], list[int]] | None = None

    def begin(self, inputs: Mapping[str, str], nbytes: int) -> Saved | None:
        """Start a pass, or take up the one that was killed here.

        Args:
            inputs: everything that decides its result.
            nbytes: size of all hidden states.

        Raises:
            SlimError: what is here was begun with other inputs or is damaged, or there is too little space.
        """
        self._inputs = dict(inputs)
        saved = self._load() if (self.path / STATE).exists() else None
        self._remove_except({STATE, self._hidden.name} if saved else set())
        check_space(self.path, nbytes if saved else 2 * nbytes)  # of hidden.N-1, if there is one, and hidden.N
        self.path.mkdir(exist_ok=True)
        return saved

    def read(self, batch: int, dtype: torch.dtype) -> Tensor:
        """The hidden states of a micro-batch, flat, as the last finished module has left them.

        Raises:
            SlimError: they are not what was written.
        """
        content = torch.empty(self._sizes[batch], dtype=torch.uint8)
        done = OpenFile(self._hidden).read(as_bytes(content), sum(self._sizes[:batch]))
        if done < len(content) or zlib.crc32(as_bytes(content)) != self._checksums[batch]:
            raise SlimError("its content is not what was written", where=str(self._hidden), fix=_AGAIN)
        return content.view(dtype)

    def write(self, values: Tensor) -> None:
        """Append the output of the next module for the next micro-batch."""
        if self._next is None:
            file = self.path / f"hidden.{self._finished + 1}"
            remove(file)  # of a pass that was given up in this process
            self._next = OutputFile(file), [], []
        file_, sizes, checksums = self._next
        content = as_bytes(values.contiguous())
        file_.append([content])
        sizes.append(len(content))
        checksums.append(zlib.crc32(content))

    def turn(self) -> None:
        """All of a module's output is written: from now on `read` gives that."""
        assert self._next is not None
        file, self._sizes, self._checksums = self._next
        self._next = None
        file.close()
        fsync_path(self.path)
        self._finished += 1

    def commit(self, measured: Mapping[str, Tensor]) -> None:
        """Make the state after the last module the one that a later run resumes from."""
        metadata = {
            "inputs": json.dumps(self._inputs),
            "finished": str(self._finished),
            "sizes": json.dumps(self._sizes),
            "checksums": json.dumps(self._checksums),
        }
        content = save({name: value.detach().cpu().contiguous() for name, value in measured.items()}, metadata)
        write_atomic(self.path / STATE, _digest(content) + content)
        self._remove_except({STATE, self._hidden.name})

    def clear(self) -> None:
        """Remove what is in the directory: the result is where it belongs."""
        # The state first: hidden states without one are known to be rubbish, and one without them is not readable.
        remove(self.path / STATE)
        self._remove_except(set())

    @property
    def _hidden(self) -> Path:
        return self.path / f"hidden.{self._finished}"

    def _remove_except(self, kept: set[str]) -> None:
        for entry in _entries(self.path):
            if entry not in kept and _OURS.fullmatch(entry):  # whatever else came here is not ours to remove
                remove(self.path / entry)

    def _load(self) -> Saved:
        """Read the state, and compare it with this run."""
        file = self.path / STATE
        data = file.read_bytes()
        if data[:_DIGEST] != _digest(data[_DIGEST:]):
            raise SlimError("is damaged", where=str(file), fix=_AGAIN)
        metadata, measured = _parsed(data[_DIGEST:])
        begun: dict[str, str] = json.loads(metadata["inputs"])
        for name in {**begun, **self._inputs}:
            if (was := begun.get(name)) != (now := self._inputs.get(name)):
                fix = "run it with the same inputs, or remove the directory"
                raise SlimError(f"was begun with {name} {was}, this run has {now}", where=str(self.path), fix=fix)
        self._finished = int(metadata["finished"])
        self._sizes, self._checksums = (json.loads(metadata[key]) for key in ("sizes", "checksums"))
        if not self._hidden.is_file() or self._hidden.stat().st_size != sum(self._sizes):
            raise SlimError("is missing or was cut off", where=str(self._hidden), fix=_AGAIN)
        return Saved(self._finished, measured)


@contextlib.contextmanager
def open_work_dir(path: Path) -> Iterator[WorkDir]:
    """Be the only process that works in a directory; on success what is in it is removed, else it stays.

    Raises:
        SlimError: another process works in it, or it holds something else.
    """
    path = path.absolute()
    if not path.parent.is_dir():
        raise SlimError("parent directory of the work directory does not exist", where=str(path), fix="create it first")
    if path.exists() and not path.is_dir():
        raise SlimError("is not a directory", where=str(path), fix="choose another name")
    with sole_writer(path):
        if foreign := [name for name in _entries(path) if not _OURS.fullmatch(name)]:
            fix = "name a new or an empty directory"
            raise SlimError(f"holds something else ({foreign[0]})", where=str(path), fix=fix)
        work = WorkDir(path)
        yield work
        work.clear()


def refuse_in_work_dir(save: Path, work_dir: Path) -> None:
    """Refuse an output in a work directory, which a later start takes for its own and nobody else's.

    Raises:
        SlimError: it is the directory, or lies in it.
    """
    place, work = save.absolute().resolve(), work_dir.absolute().resolve()
    if work in (place, *place.parents):
        raise SlimError("is in the directory of --work-dir", where=str(save), fix="choose a place outside")


def _entries(path: Path) -> Sequence[str]:
    return sorted(os.listdir(path)) if path.is_dir() else []


def _digest(content: bytes) -> bytes:
    return hashlib.sha256(content).hexdigest().encode()


def _parsed(content: bytes) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and tensors of a safetensors file in memory."""
    length = int.from_bytes(content[:8], "little")
    metadata: dict[str, str] = json.loads(content[8 : 8 + length])["__metadata__"]
    return metadata, load(content)
