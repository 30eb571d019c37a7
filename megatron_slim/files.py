"""Files and directories that appear whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_slim.errors import SlimError


def fsync_path(path: Path) -> None:
    """Flush a file or a directory entry to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomic(path: Path, data: bytes | str) -> None:
    """Write ``data`` to ``path``: temporary name in the same directory, fsync, rename."""
    payload = data.encode() if isinstance(data, str) else data
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(payload)
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    fsync_path(path.parent)


def to_json(value: Any) -> str:
    """Canonical, readable JSON: sorted keys, two spaces, newline at the end; NaN refused."""
    return json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n"


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        SlimError: the file is missing or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SlimError("no such file", where=str(path)) from None
    except (OSError, UnicodeDecodeError, ValueError, RecursionError) as error:
        raise SlimError(f"not readable as JSON ({error})", where=str(path)) from None


def sha256(data: bytes | str) -> str:
    """Hex SHA-256 of bytes or of UTF-8 text."""
    return hashlib.sha256(data.encode() if isinstance(data, str) else data).hexdigest()


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


@contextlib.contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """Build a directory under a temporary name beside ``path``; rename it to ``path`` on success only.

    An exception, or a signal that Python turns into one, removes the temporary directory.
    """
    refuse_existing(path)
    temporary = Path(tempfile.mkdtemp(dir=path.absolute().parent, prefix=f".{path.name}.partial-"))
    try:
        yield temporary
        for entry in temporary.rglob("*"):
            fsync_path(entry)
        fsync_path(temporary)
        os.chmod(temporary, 0o755)
        os.rename(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    fsync_path(path.absolute().parent)
