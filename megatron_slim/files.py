"""Files and directories that appear whole or not at all, and that one process at a time writes.

While ``NAME`` is being written there are two entries next to it: ``.NAME.partial``, which gets that name when it is
complete, and ``.NAME.lock``, which its writer holds locked. The kernel unlocks it when the writer dies, however it
dies, so the next writer of ``NAME`` finds out what is left of a killed one, and removes it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import math
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_slim.aliases import JsonObject
from megatron_slim.errors import SlimError

# Network file systems mounted without locks; directories that some file systems cannot flush.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EINVAL)
_NO_FLUSH = (errno.EINVAL, errno.ENOTSUP)
MAX_JSON_BYTES = 200_000_000
MAX_JSON_ITEMS = 4_000_000  # what a parsed file takes in memory goes by these; 50 times the index of a large model
MAX_JSON_DEPTH = 64


def fsync_path(path: Path) -> None:
    """Flush a file or a directory entry to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_FLUSH or not path.is_dir():
            raise
    finally:
        os.close(descriptor)


def _fsync_tree(directory: Path) -> None:
    """Flush all files of a directory, and the directories after what they hold."""
    for folder, _, files in os.walk(directory, topdown=False):
        for file in files:
            fsync_path(Path(folder, file))
        fsync_path(Path(folder))


def remove(path: Path) -> None:
    """Remove a file, a link or a directory, if there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _lock(file: Path, target: Path) -> tuple[int, bool]:
    """Descriptor of ``file``, locked; and whether this file system locks at all.

    A file and not the directory that is being written: network file systems lock directories for one machine only.
    """
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The process that held it may have removed it meanwhile: then this one locks nothing.
            if os.path.samestat(os.fstat(descriptor), os.stat(file)):
                return descriptor, True
        except BlockingIOError:
            os.close(descriptor)
            fix = "wait for it, end it, or choose another name"
            raise SlimError("another process is writing it", where=str(target), fix=fix) from None
        except FileNotFoundError:
            pass
        except OSError as error:
            if error.errno in _NO_LOCKS:
                return descriptor, False
            os.close(descriptor)
            raise
        os.close(descriptor)


def _temporary(path: Path) -> Path:
    """Where ``path`` is built."""
    return path.with_name(f".{path.name}.partial")


@contextlib.contextmanager
def sole_writer(path: Path) -> Iterator[Path]:
    """Be the only process that writes ``path``; yields the name next to it under which to build it.

    What has that name at the start was left by a process that was killed: `remove` it. What has it at the end is
    removed: rename it to publish it. Where files cannot be locked, every process gets a name of its own.

    Raises:
        SlimError: another process is writing ``path``.
        OSError: with a file name in any case, that of ``path`` where the error itself has none.
    """
    path = path.absolute()
    lock = path.with_name(f".{path.name}.lock")
    descriptor, locked = _lock(lock, path)
    temporary = _temporary(path)
    if not locked:
        temporary = temporary.with_name(f"{temporary.name}-{secrets.token_hex(4)}")
    try:
        yield temporary
    except OSError as error:
        error.filename = error.filename or str(path)  # writing to a descriptor names no file
        raise
    finally:
        with contextlib.suppress(OSError):
            remove(temporary)
        with contextlib.suppress(OSError):
            lock.unlink()  # before it is unlocked
        os.close(descriptor)


def write_atomic(path: Path, data: bytes | str) -> None:
    """Write ``data`` to ``path``, which has its old content or all of the new at any time."""
    with sole_writer(path) as temporary:
        remove(temporary)
        with temporary.open("xb") as stream:
            stream.write(data.encode() if isinstance(data, str) else data)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
        fsync_path(path.absolute().parent)


def to_json(value: object) -> str:
    """Canonical, readable JSON: sorted keys, two spaces, newline at the end; NaN refused."""
    return json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n"


def parse_json(data: bytes, max_items: int = MAX_JSON_ITEMS) -> Any:
    """Parse JSON strictly: no key twice, no NaN, no number that is beyond a double, nothing huge or nested deeply.

    Raises:
        ValueError: what is wrong.
    """
    if sum(map(data.count, (b",", b"[", b"{"))) > max_items:
        raise ValueError(f"more than {max_items:,} items")
    try:
        value = json.loads(
            data.decode(),
            object_pairs_hook=without_duplicates,
            parse_constant=_finite,
            parse_float=_finite,
            parse_int=_integer,
        )
    except RecursionError:
        raise ValueError("nested too deeply") from None
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > MAX_JSON_DEPTH:
            raise ValueError("nested too deeply")
        parts = [part.values() if isinstance(part, dict) else part for part in level if isinstance(part, (dict, list))]
        level = [inner for part in parts for inner in part]
    return value


def without_duplicates(pairs: list[tuple[str, Any]]) -> JsonObject:
    """An ``object_pairs_hook`` of `json.loads` that takes no key twice.

    Raises:
        ValueError: there is one.
    """
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"key {twice!r} is there twice")
    return found


def _finite(text: str) -> float:
    """A number as a double, which Python would let overflow to infinity."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is not a finite number")
    return value


def _integer(text: str) -> int:
    _finite(text)
    return int(text)


def read_json(path: Path, max_bytes: int = MAX_JSON_BYTES, max_items: int = MAX_JSON_ITEMS) -> Any:
    """Read a JSON file, strictly; see `parse_json`.

    Raises:
        SlimError: the file is missing, is larger than ``max_bytes``, has more than ``max_items`` or is not JSON.
    """
    try:
        with path.open("rb") as stream:
            if os.fstat(stream.fileno()).st_size > max_bytes or len(data := stream.read(max_bytes + 1)) > max_bytes:
                raise ValueError(f"larger than {max_bytes:,} bytes")
        return parse_json(data, max_items)
    except FileNotFoundError:
        raise SlimError("no such file", where=str(path)) from None
    except OSError as error:
        raise SlimError(f"not readable ({error.strerror})", where=str(path)) from None
    except ValueError as error:
        raise SlimError(f"not readable as JSON ({error})", where=str(path)) from None


def sha256(data: bytes | str) -> str:
    """Hex SHA-256 of bytes or of UTF-8 text."""
    return hashlib.sha256(data.encode() if isinstance(data, str) else data).hexdigest()


def file_sha256(path: Path) -> str:
    """Hex SHA-256 of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def refuse_existing(path: Path) -> None:
    """Refuse to write into an output directory that already exists.

    Raises:
        SlimError: ``path`` exists, or its parent does not.
    """
    try:
        os.lstat(path)  # not exists(), which follows a dead link
        found = True
    except (FileNotFoundError, NotADirectoryError):
        found = False
    except OSError as error:
        raise SlimError(f"cannot be written ({error.strerror})", where=str(path), fix="choose another name") from None
    if found:
        raise SlimError("output already exists", where=str(path), fix="choose another name or remove it first")
    if not path.absolute().parent.is_dir():
        raise SlimError("parent directory of the output does not exist", where=str(path), fix="create it first")


def check_writable(directory: Path) -> None:
    """Refuse a directory that is, or will be, where nothing can be written, before there is something to write.

    Raises:
        SlimError: names the file, or the directory without permission, that is in the way.
    """
    path = directory.absolute()
    there = next(each for each in (path, *path.parents) if os.path.lexists(each))
    if not there.is_dir():
        raise SlimError("is not a directory", where=str(there), fix=f"choose another name than {directory}")
    if not os.access(there, os.W_OK | os.X_OK):
        raise SlimError(
            "cannot be written", where=str(there), fix="ask for the right to write, or choose another place"
        )


def check_space(path: Path, needed: int) -> None:
    """Refuse to start writing what the disk has no space for.

    Args:
        path: what is to be written, or the directory that it is built in.
        needed: bytes.

    Raises:
        SlimError: fewer are free to this user, what a killed run has left counted as free.
    """
    disk = os.statvfs(path if path.is_dir() else path.absolute().parent)
    free = disk.f_bavail * disk.f_frsize
    for folder, _, files in os.walk(_temporary(path)):
        free += sum(os.lstat(os.path.join(folder, file)).st_blocks * 512 for file in files)
    if needed > free:
        raise SlimError(f"needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free", where=str(path), fix="make space")


@contextlib.contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """Build a directory under a temporary name next to ``path``; flush it and rename it to ``path`` on success only.

    An exception, or a signal that Python turns into one, removes the temporary directory; what a killed process has
    left is removed by the next one that writes ``path``.

    Raises:
        SlimError: ``path`` exists, or another process is writing it.
    """
    refuse_existing(path)
    with sole_writer(path) as temporary:
        refuse_existing(path)  # it may have been finished before the lock was ours
        remove(temporary)
        temporary.mkdir()
        made = temporary.stat()
        yield temporary
        _fsync_tree(temporary)
        refuse_existing(path)  # renaming would replace an empty directory silently
        if not temporary.is_dir() or not os.path.samestat(made, temporary.stat()):
            raise SlimError("was removed while it was being written", where=str(temporary), fix="run again")
        os.rename(temporary, path)
        fsync_path(path.absolute().parent)
