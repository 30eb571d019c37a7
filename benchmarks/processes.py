"""Running a command and measuring it: time, anonymous memory of its process tree, bytes it read and wrote."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from megatron_slim.errors import SlimError

ROOT = Path(__file__).resolve().parents[1]
BESIDE_SECONDS = 0.1


@dataclass(frozen=True)
class Run:
    """A command that ended well.

    Attributes:
        seconds: from its start to its end.
        stdout: what it printed.
        read_bytes: what it and its children asked of files, from whatever cache, Python's own modules included.
        peak_anonymous: most anonymous memory that the tree held at once, shared pages counted once; 0 if not sampled.
    """

    seconds: float
    stdout: str
    read_bytes: int
    peak_anonymous: int


def python(*arguments: object) -> list[str]:
    """A command of this interpreter."""
    return [sys.executable, *map(str, arguments)]


def run(
    command: Sequence[str],
    *,
    sample_seconds: float | None = None,
    beside: Callable[[], None] | None = None,
) -> Run:
    """Run a command to its end.

    Args:
        command: the program and its arguments.
        sample_seconds: look at its memory this often, which takes a core some 30 ms a GB; None does not.
        beside: called again and again until the command has ended; an exception from it ends the command.

    Raises:
        SlimError: it failed; holds the end of its standard error.
    """
    environment, peak = os.environ | {"PYTHONPATH": str(ROOT)}, [0]
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        started = time.monotonic()
        process = subprocess.Popen(command, stdout=out, stderr=err, stdin=subprocess.DEVNULL, env=environment)
        with _reaped(process), contextlib.ExitStack() as watchers:
            if sample_seconds is not None:
                watchers.enter_context(_repeated(lambda: _keep_largest(peak, process.pid), sample_seconds, process))
            if beside is not None:
                watchers.enter_context(_repeated(beside, BESIDE_SECONDS, process))
            os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
            seconds = time.monotonic() - started
            # Not reaped yet: its counters are still there, those of the children that it waited for added.
            counters = _fields(Path(f"/proc/{process.pid}/io"))
        texts = [_text(stream) for stream in (out, err)]
    if process.returncode != 0:
        raise SlimError(f"exit code {process.returncode} of {' '.join(command)}: {texts[1].strip()[-2000:]}")
    return Run(seconds, texts[0], counters["rchar"], peak[0])


@contextlib.contextmanager
def _reaped(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Wait for a process in the end; when we are interrupted, end it and its children first."""
    try:
        yield
    except BaseException:
        _kill_tree(process)
        raise
    finally:
        process.wait()


def _kill_tree(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        for child in psutil.Process(process.pid).children(recursive=True):
            child.kill()
    process.kill()


@contextlib.contextmanager
def _repeated(work: Callable[[], None], interval: float, process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Do something every so often in a thread while a process runs; when that fails, end the process."""
    stop, failures = threading.Event(), list[Exception]()

    def loop() -> None:
        try:
            while not stop.wait(interval):
                work()
        except Exception as error:
            failures.append(error)
            _kill_tree(process)

    thread = threading.Thread(target=loop, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
    if failures:
        raise failures[0]


def _keep_largest(peak: list[int], pid: int) -> None:
    peak[0] = max(peak[0], tree_anonymous(pid))


def tree_anonymous(pid: int) -> int:
    """Bytes of anonymous memory of a process and its children, pages that a fork shares counted once."""
    try:
        process = psutil.Process(pid)
        tree = [pid, *(child.pid for child in process.children(recursive=True))]
    except psutil.NoSuchProcess:
        return 0
    return sum(_anonymous(member) for member in tree)


def _anonymous(pid: int) -> int:
    """Proportional share of anonymous pages where the kernel tells it, else all resident ones; 0 once it is gone."""
    try:
        found = _fields(Path(f"/proc/{pid}/smaps_rollup"))
        if "Pss_Anon" not in found:
            found = {"Pss_Anon": _fields(Path(f"/proc/{pid}/status"))["RssAnon"]}
    except (OSError, KeyError):
        return 0
    return found["Pss_Anon"] * 1024


def _fields(file: Path) -> Mapping[str, int]:
    """``name: number`` lines of a file in /proc."""
    lines = (line.split() for line in file.read_text().splitlines())
    return {words[0][:-1]: int(words[1]) for words in lines if words[0].endswith(":") and words[1].isdecimal()}


def _text(stream: object) -> str:
    assert hasattr(stream, "seek") and hasattr(stream, "read")
    stream.seek(0)
    return str(stream.read().decode(errors="replace"))


@dataclass(frozen=True)
class StartUp:
    """What a tool costs before it does anything: the interpreter and its imports."""

    seconds: float
    anonymous: int


def start_up(modules: Sequence[str]) -> StartUp:
    """Start an interpreter that imports these modules and tells its own memory; sampling would slow it down."""
    tell = "import os; from benchmarks.processes import tree_anonymous; print(tree_anonymous(os.getpid()))"
    found = run(python("-c", f"import {', '.join(modules)}; {tell}"))
    return StartUp(found.seconds, int(found.stdout))
