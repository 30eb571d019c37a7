"""Running a command and measuring it: time, anonymous memory of its process tree, bytes it read and wrote."""

from __future__ import annotations

import contextlib
import functools
import os
import socket
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
MEANWHILE_SECONDS = 0.1


@dataclass(frozen=True)
class Run:
    """A command that ended well.

    Attributes:
        seconds: from its start to its end.
        cpu_seconds: of CPU time that it and the children that it waited for have used.
        stdout: what it printed.
        read_bytes: what it and its children asked of files, from whatever cache, Python's own modules included.
        peak_anonymous: most anonymous memory that the tree held at once, shared pages counted once; 0 if not sampled.
    """

    seconds: float
    cpu_seconds: float
    stdout: str
    read_bytes: int
    peak_anonymous: int


def free_port() -> int:
    """A free TCP port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def python(*arguments: object) -> list[str]:
    """A command of this interpreter."""
    return [sys.executable, *map(str, arguments)]


def run(
    command: Sequence[str],
    *,
    sample_seconds: float | None = None,
    meanwhile: Callable[[], None] | None = None,
    variables: Mapping[str, str] | None = None,
) -> Run:
    """Run a command to its end.

    Args:
        command: the program and its arguments.
        sample_seconds: look at its memory this often, or less often where a look (30 ms a GB) would take a core more
            than a quarter of its time; None does not look.
        meanwhile: called again and again until the command has ended; an exception from it ends the command.
        variables: of its environment, in addition to ours.

    Raises:
        SlimError: it failed; holds the end of its standard error.
    """
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment, peak = os.environ | {"PYTHONPATH": path} | dict(variables or {}), [0]
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        started = time.monotonic()
        process = subprocess.Popen(command, stdout=out, stderr=err, stdin=subprocess.DEVNULL, env=environment)
        with _reaped(process), contextlib.ExitStack() as watchers:
            if sample_seconds is not None:
                look = functools.partial(_keep_largest, peak, process.pid)
                watchers.enter_context(_repeated(look, sample_seconds, process, rest=3.0))
            if meanwhile is not None:
                watchers.enter_context(_repeated(meanwhile, MEANWHILE_SECONDS, process))
            os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
            seconds = time.monotonic() - started
            # Not reaped yet: its counters are still there, those of the children that it waited for added.
            read_bytes = counters(process.pid)["rchar"]
            cpu_seconds = sum(psutil.Process(process.pid).cpu_times()[:4])  # user, system, children's user, system
        texts = [_text(stream) for stream in (out, err)]
    if process.returncode != 0:
        raise SlimError(f"exit code {process.returncode} of {' '.join(command)}: {texts[1].strip()[-2000:]}")
    return Run(seconds, cpu_seconds, texts[0], read_bytes, peak[0])


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
def _repeated(
    work: Callable[[], None], interval: float, process: subprocess.Popen[bytes], *, rest: float = 0.0
) -> Iterator[None]:
    """Do something every so often in a thread while a process runs; when that fails, end the process.

    Args:
        work: what to do.
        interval: seconds between the end of one time and the next, at least.
        process: what to end.
        rest: the same, as a multiple of what the last time took.
    """
    stop, failures = threading.Event(), list[Exception]()

    def loop() -> None:
        pause = interval
        try:
            while not stop.wait(pause):
                started = time.monotonic()
                work()
                pause = max(interval, rest * (time.monotonic() - started))
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
    peak[0] = max(peak[0], tree_anonymous(pid, above=peak[0]))


def tree_anonymous(pid: int, *, above: int = 0) -> int:
    """Bytes of anonymous memory of a process and its children, pages that a fork shares counted once.

    Args:
        pid: the process.
        above: say 0 where a glance shows that it is no more than this: counting shared pages takes far longer.
    """
    try:
        process = psutil.Process(pid)
        tree = [pid, *(child.pid for child in process.children(recursive=True))]
    except psutil.NoSuchProcess:
        return 0
    resident = {member: _kilobytes(member, "status", "RssAnon") or 0 for member in tree}
    if sum(resident.values()) * 1024 <= above:
        return 0
    proportional = {member: _kilobytes(member, "smaps_rollup", "Pss_Anon") for member in tree}
    return 1024 * sum(resident[member] if size is None else size for member, size in proportional.items())


def _kilobytes(pid: int, file: str, field: str) -> int | None:
    """A field of a file in /proc; None where there is none, because the process is gone or the kernel old."""
    try:
        return _fields(Path(f"/proc/{pid}/{file}")).get(field)
    except OSError:
        return None


def counters(pid: int) -> Mapping[str, int]:
    """What a process, and those of its children that it has waited for, have read and written; see proc(5)."""
    return _fields(Path(f"/proc/{pid}/io"))


def _fields(file: Path) -> Mapping[str, int]:
    """``name: number`` lines of a file in /proc."""
    lines = (line.partition(":") for line in file.read_text().splitlines())
    numbers = {name: rest.split()[0] for name, _, rest in lines if rest.strip()}
    return {name: int(number) for name, number in numbers.items() if number.isdecimal()}


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
    """Start an interpreter that imports these modules and reports its own memory; sampling would slow it down."""
    code = "import os; from benchmarks.processes import tree_anonymous; print(tree_anonymous(os.getpid()))"
    found = run(python("-c", f"import {', '.join(modules)}; {code}"))
    return StartUp(found.seconds, int(found.stdout))
