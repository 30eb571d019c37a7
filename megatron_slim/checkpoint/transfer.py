"""Streaming a checkpoint into another: unit by unit, each read back at once, in one process or several."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import hashlib
import multiprocessing
import os
import signal
import traceback
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, Protocol, TypedDict, TypeVar

import torch
from torch import Tensor

from megatron_slim.checkpoint.units import UNIT_BYTES, Checkpoint, Unit
from megatron_slim.errors import CheckpointError, SlimError
from megatron_slim.processes import die_with_parent
from megatron_slim.reporting import byte_progress

T = TypeVar("T")
BYTES_PER_PROCESS = 500_000_000  # below that, another process costs more than it brings
MOST_PROCESSES = 8  # more only without being asked: disks are saturated by then
REPORT_BYTES = 16 << 20
READERS = 2  # threads of a process
READ_AHEAD_BYTES = 2 * UNIT_BYTES  # or one unit, if that is larger
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8  # of glibc's mallopt


Outcome = TypeVar("Outcome", covariant=True)


class Writer(Protocol[Outcome]):
    """One process's part of the checkpoint that is being written."""

    def write(self, unit: Unit, tensors: dict[str, Tensor]) -> None:
        """Write a unit."""

    def read(self, unit: Unit) -> dict[str, Tensor]:
        """Read a unit back from the files."""

    def finish(self) -> Outcome:
        """Close the files; returns what the others must know (it is pickled)."""


def default_processes(nbytes: int) -> int:
    """How many processes write a checkpoint of this size by default."""
    return max(1, min(len(os.sched_getaffinity(0)), MOST_PROCESSES, nbytes // BYTES_PER_PROCESS))


class TransferOptions(TypedDict):
    """Options of `transfer` that are the same for all parts of a checkpoint."""

    dtype: torch.dtype | None
    verify: bool
    processes: int | None
    where: str


def transfer(
    source: Checkpoint,
    writer: Callable[[int], Writer[Outcome]],
    units: Sequence[Unit],
    *,
    dtype: torch.dtype | None = None,
    verify: bool = True,
    processes: int | None = None,
    where: str = "",
) -> tuple[list[Outcome], str]:
    """Read every unit from ``source`` and write it.

    Args:
        source: where the tensors come from.
        writer: makes the writer of a part, by number; called in the process that writes it.
        units: what to write.
        dtype: cast every tensor.
        verify: read every unit back and compare it with what was read from the source.
        processes: how many, each with its own contiguous part; None chooses by size and cores.
        where: name of the target, for errors.

    Returns:
        What the writers gave on finishing, in order, and the digest of all content, which depends on tensors alone.

    Raises:
        CheckpointError: a unit differs when read back.
    """
    total = sum(unit.nbytes for unit in units)
    parts = split(units, processes or default_processes(total))

    def run(number: int, advance: Callable[[int], None]) -> tuple[Outcome, list[str]]:
        part = writer(number)
        digests = []
        for unit, tensors in read_ahead(source, parts[number], dtype):
            digests.append(unit.digest(tensors))
            part.write(unit, tensors)
            tensors.clear()  # or the largest units would be in memory twice
            if verify and unit.digest(part.read(unit)) != digests[-1]:
                what = f"{', '.join(name for name, _ in unit.tensors)}: not what was written when read back"
                raise CheckpointError(what, where=where, fix="check disk and memory")
            advance(unit.nbytes)
        return part.finish(), digests

    with source.reading_once(), keeping_memory(), byte_progress("writing", total) as advance:
        if len(parts) == 1:
            outcomes = [run(0, advance)]
        else:
            outcomes = _in_processes(run, len(parts), advance)
    digest = hashlib.sha256("".join(line for _, lines in outcomes for line in lines).encode()).hexdigest()
    return [outcome for outcome, _ in outcomes], digest


def read_ahead(
    source: Checkpoint, units: Sequence[Unit], dtype: torch.dtype | None
) -> Iterator[tuple[Unit, dict[str, Tensor]]]:
    """Every unit and its tensors; while the caller works on one, threads read those that follow.

    Several at a time, because a disk gives what is scattered sooner if it is asked for more than one thing.
    """
    waiting: deque[Future[dict[str, Tensor]]] = deque()
    asked, ahead = 0, 0  # units, and bytes of those not given out yet
    # OpenMP's number of threads is a thread's own, and a forked process must keep to one.
    with ThreadPoolExecutor(READERS, "reader", torch.set_num_threads, (torch.get_num_threads(),)) as readers:
        for number, unit in enumerate(units):
            while asked < len(units) and (asked <= number + 1 or ahead + units[asked].nbytes <= READ_AHEAD_BYTES):
                waiting.append(readers.submit(units[asked].read, source, dtype))
                ahead += units[asked].nbytes
                asked += 1
            tensors = waiting.popleft().result()
            ahead -= unit.nbytes
            yield unit, tensors


@contextlib.contextmanager
def keeping_memory() -> Iterator[None]:
    """Memory that is freed within stays with the process and serves the next unit; blocks of several units do not.

    glibc otherwise returns large blocks at once, and the kernel clears every page again for the next. One arena for all
    threads, or what the reader took and the writer freed would be found by neither.
    """
    libc = ctypes.CDLL(None)
    options = [
        (M_MMAP_THRESHOLD, 2 * UNIT_BYTES, 128 << 10),  # option, value within, default
        (M_TRIM_THRESHOLD, 1 << 30, 128 << 10),
        (M_ARENA_MAX, 1, 0),
    ]
    if not hasattr(libc, "mallopt"):  # another C library
        options = []
    for option, value, _ in options:
        libc.mallopt(option, value)
    try:
        yield
    finally:
        for option, _, default in options:
            libc.mallopt(option, default)
        if options:
            libc.malloc_trim(0)


def split(units: Sequence[Unit], parts: int) -> list[Sequence[Unit]]:
    """Contiguous parts of about the same number of bytes, none empty."""
    total, done, found = sum(unit.nbytes for unit in units), 0, [0]
    for index, unit in enumerate(units):
        if done >= total * len(found) / parts and index > found[-1]:
            found.append(index)
        done += unit.nbytes
    return [units[start:stop] for start, stop in zip(found, [*found[1:], len(units)], strict=True)]


def _in_processes(
    run: Callable[[int, Callable[[int], None]], T], count: int, advance: Callable[[int], None]
) -> list[T]:
    """Run ``run(number, advance)`` in forked processes; the first failure ends all.

    Forked, as torch's data loader forks its workers: they share what has been imported and every header that has been
    read, and start at once. They compute with one thread each, so nothing that a fork loses is needed.
    """
    context = multiprocessing.get_context("fork")
    with contextlib.ExitStack() as stack:
        workers: list[BaseProcess] = []
        stack.callback(_end, workers)
        pipes: list[Connection] = []
        for number in range(count):
            ours, theirs = context.Pipe(duplex=False)
            worker = context.Process(target=_work, args=(run, number, theirs, os.getpid()), daemon=True)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # of forking with threads; see above
                worker.start()
            theirs.close()
            workers.append(worker)
            pipes.append(ours)
        return list(_outcomes(pipes, advance))


def _outcomes(pipes: list[Connection], advance: Callable[[int], None]) -> Iterator[Any]:
    found: dict[Connection, Any] = {}
    while len(found) < len(pipes):
        for pipe in wait([pipe for pipe in pipes if pipe not in found]):
            assert isinstance(pipe, Connection)
            try:
                kind, value = pipe.recv()
            except EOFError:
                raise SlimError(
                    "a writing process was killed", fix="check the memory, or give fewer --processes"
                ) from None
            if kind == "progress":
                advance(value)
            elif kind == "done":
                found[pipe] = value
            elif isinstance(value, Exception):
                raise value
            else:
                raise RuntimeError(f"a writing process failed:\n{value}")
    return (found[pipe] for pipe in pipes)


def _work(run: Callable[[int, Callable[[int], None]], object], number: int, pipe: Connection, parent: int) -> None:
    """Body of a process."""
    for signum in (signal.SIGINT, signal.SIGHUP):  # the terminal sends them to all; the parent ends us
        signal.signal(signum, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    die_with_parent()
    if os.getppid() != parent:  # it died before that
        os._exit(1)
    torch.set_num_threads(1)
    gc.freeze()  # looking through all that was imported would copy its pages
    waiting = 0

    def advance(nbytes: int) -> None:
        nonlocal waiting
        waiting += nbytes
        if waiting >= REPORT_BYTES:
            pipe.send(("progress", waiting))
            waiting = 0

    try:
        message: tuple[str, object] = ("done", run(number, advance))
        pipe.send(("progress", waiting))
    except SlimError as error:
        message = ("failed", SlimError(str(error)))
    except (OSError, MemoryError) as error:
        message = ("failed", error)
    except BaseException:
        message = ("failed", traceback.format_exc())
    pipe.send(message)


def _end(workers: list[BaseProcess]) -> None:
    for worker in workers:
        if worker.is_alive():
            worker.kill()
        worker.join()
