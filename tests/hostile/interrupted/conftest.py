"""Runs in forked children whose file operations are counted, and in which something happens at one of them."""

from __future__ import annotations

import builtins
import io
import os
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch

from tests.signals import default_signals

SECONDS = 60  # no child takes longer; one that hangs is killed
WRITES = ("write", "writev", "pwrite", "pwritev", "sendfile", "copy_file_range", "truncate", "ftruncate")
FLUSHES = ("fsync", "fdatasync")
OTHERS = ("rename", "replace", "link", "mkdir", "posix_fallocate")
Action = Callable[[str, Any], None]  # gets the name of the operation and its first argument


@dataclass(frozen=True)
class Ending:
    """How a child ended.

    Attributes:
        code: its exit code, or minus the signal that killed it.
        stderr: its standard error.
        operations: how many operations it did; 0 if it was killed.
    """

    code: int
    stderr: str
    operations: int

    @property
    def error(self) -> str:
        """The one line that a user error is, and that nothing follows."""
        assert self.code == 2, (self.code, self.stderr)
        assert "Traceback" not in self.stderr
        lines = self.stderr.splitlines()
        assert [line for line in lines if line.startswith("error: ")] == lines[-1:], self.stderr
        return lines[-1].removeprefix("error: ")


class Operations:
    """Counts what changes files in this process, by whatever function it is done, and acts at number ``at``."""

    def __init__(self, at: int, action: Action | None) -> None:
        self.at, self.action, self.count = at, action, 0
        self.real_open, self.real_os_open = io.open, os.open

    def install(self) -> None:
        """Patch this process, for good: it is a forked child."""
        for name in (*WRITES, *FLUSHES, *OTHERS):
            # Flushing takes most of the time and makes no difference to a process that is killed.
            setattr(os, name, self.counted(name, bool if name in FLUSHES else getattr(os, name)))
        os.open = self.os_open  # type: ignore[assignment]
        io.open = builtins.open = self.open  # type: ignore[assignment]

    def happens(self, name: str, argument: Any) -> None:
        self.count += 1
        if self.count == self.at and self.action is not None:
            self.action(name, argument)

    def torn(self, name: str, argument: Any, data: Any, write: Callable[[Any], int]) -> int:
        """Write ``data``, or at the operation in question half of it, as the system may."""
        if self.count + 1 != self.at:
            self.happens(name, argument)
            return write(data)
        written = write(memoryview(data)[: (len(data) + 1) // 2])
        self.happens(name, argument)
        return written

    def counted(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def patched(*args: Any, **kwargs: Any) -> Any:
            if name in ("write", "pwrite"):
                return self.torn(name, args[0], args[1], lambda data: real(args[0], data, *args[2:], **kwargs))
            self.happens(name, args[0])
            return real(*args, **kwargs)

        return patched

    def os_open(self, path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            self.happens("open", path)
        return self.real_os_open(path, flags, *args, **kwargs)

    def open(self, file: Any, mode: str = "r", buffering: int = -1, *args: Any, **kwargs: Any) -> Any:
        """As the builtin, but with writing that can be seen."""
        if not set(mode) & set("wax+"):
            return self.real_open(file, mode, buffering, *args, **kwargs)
        operations = self

        class Raw(io.FileIO):
            def write(self, data: Any) -> int:
                return operations.torn("write", self.name, data, super().write)

            def truncate(self, size: int | None = None) -> int:
                operations.happens("truncate", self.name)
                return super().truncate(size)

        self.happens("open", file)
        buffer = io.BufferedWriter(Raw(file, mode.replace("b", "").replace("t", "")))
        return buffer if "b" in mode else io.TextIOWrapper(buffer, *args, **kwargs)


def run_child(log: Path, main: Callable[[], Any], *, at: int = 0, action: Action | None = None) -> int:
    """Start ``main`` in a forked child; returns its process id."""
    process = os.fork()
    if process:
        return process
    default_signals()
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(SECONDS)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout, sys.stderr = io.StringIO(), os.fdopen(2, "w", buffering=1)
    torch.set_num_threads(1)  # the threads of before are not there any more
    _end(main, Operations(at, action), log)


def _end(main: Callable[[], Any], operations: Operations, log: Path) -> NoReturn:
    code = 1
    try:
        operations.install()
        main()
        code = 0
    except SystemExit as exit_:
        code = exit_.code if isinstance(exit_.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        with operations.real_open(log.with_suffix(".count"), "w") as stream:
            stream.write(str(operations.count))
        os._exit(code)


def ending(process: int, log: Path) -> Ending:
    """Wait for a child."""
    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    assert code != -signal.SIGALRM, f"hangs:\n{log.read_text()}"
    counted = log.with_suffix(".count")
    operations = int(counted.read_text()) if counted.exists() else 0
    return Ending(code, log.read_text(), operations)


@pytest.fixture
def start(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Callable[[], Ending]]:
    """``start(main, at=3, action=kill)`` runs ``main`` in a child and returns the function that waits for its end."""
    folder = tmp_path_factory.mktemp("children")
    started = 0

    def run(main: Callable[[], Any], *, at: int = 0, action: Action | None = None) -> Callable[[], Ending]:
        nonlocal started
        log = folder / f"{started}.log"
        started += 1
        process = run_child(log, main, at=at, action=action)
        return lambda: ending(process, log)

    return run
