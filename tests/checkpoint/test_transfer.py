"""Streaming in one process and in several: the same result, and no failure that goes unnoticed."""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import re
import resource
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from megatron_slim.checkpoint import transfer, units
from megatron_slim.checkpoint.convert import open_checkpoint, same_bytes, write_checkpoint
from megatron_slim.checkpoint.huggingface import HFCheckpoint
from megatron_slim.checkpoint.transfer import keeping_memory
from megatron_slim.checkpoint.units import UNIT_BYTES, Unit
from megatron_slim.errors import CheckpointError, SlimError
from megatron_slim.testing import tiny_shape, write_tiny_checkpoint

SHAPE = tiny_shape()


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("source") / "hf", SHAPE)


def assert_same_tensors(a: Path, b: Path) -> None:
    first, second = open_checkpoint(a), open_checkpoint(b)
    assert first.names == second.names
    assert all(same_bytes(first.read(name), second.read(name)) for name in first.names)


def test_several_processes_write_what_one_does(hf: Path, tmp_path: Path) -> None:
    contents = set()
    for processes in (1, 2, 3):
        there, back = tmp_path / f"there{processes}", tmp_path / f"back{processes}"
        for source, target, to in ((hf, there, "torch_dist"), (there, back, "hf")):
            contents.add(write_checkpoint(open_checkpoint(source), target, to=to, processes=processes)["content"])
        assert len({file.name.split("_")[2] for file in (there / "release").glob("*.distcp")}) == processes
        assert_same_tensors(hf, there)
        assert_same_tensors(hf, back)
    assert len(contents) == 1  # whatever the format
    one, many = (tmp_path / name / "model.safetensors" for name in ("back1", "back3"))
    assert one.read_bytes() == many.read_bytes()


def test_rows_of_large_tensors_are_streamed(hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(units, "UNIT_BYTES", 1000)
    found = list(units.units(SHAPE, dict.fromkeys(HFCheckpoint.open(hf).names, torch.bfloat16)))
    whole = [unit for unit in found if unit.rows is not None and unit.weight.key.startswith("embedding")]
    assert [(unit.rows.start, unit.rows.stop) for unit in whole if unit.rows] == [
        (row, min(row + 7, 128)) for row in range(0, 128, 7)
    ]
    write_checkpoint(open_checkpoint(hf), tmp_path / "there", to="torch_dist")
    write_checkpoint(open_checkpoint(tmp_path / "there"), tmp_path / "back", to="hf", processes=2)
    assert_same_tensors(hf, tmp_path / "there")
    assert_same_tensors(hf, tmp_path / "back")


def _sized(*sizes: int) -> list[Any]:
    return [Unit(None, None, None, size) for size in sizes]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("sizes", "parts", "expected"),
    [
        ((1, 1, 1, 1), 2, [2, 2]),
        ((9, 1, 1, 1), 2, [1, 3]),
        ((1, 1, 1, 9), 2, [4]),
        ((5,), 4, [1]),
        ((1, 1, 1), 3, [1, 1, 1]),
        ((100, 1, 1, 1), 3, [1, 1, 2]),
    ],
)
def test_parts_are_contiguous_even_and_never_empty(sizes: tuple[int, ...], parts: int, expected: list[int]) -> None:
    assert [len(part) for part in transfer.split(_sized(*sizes), parts)] == expected


@pytest.mark.parametrize(("allowed", "ahead"), [(0, 1), (1, 1), (2, 2), (3, 3), (9, 5)])
def test_so_many_bytes_are_read_ahead_but_at_least_one_unit(
    hf: Path, monkeypatch: pytest.MonkeyPatch, allowed: int, ahead: int
) -> None:
    source = HFCheckpoint.open(hf)
    found = list(units.units(SHAPE, source.dtypes))[:6]
    names = [next(name for name, _ in unit.tensors) for unit in found]
    monkeypatch.setattr(transfer, "READ_AHEAD_BYTES", sum(unit.nbytes for unit in found[: allowed + 1]))
    started = threading.Semaphore(0)
    read: list[tuple[str, int]] = []

    class Recording:
        def read_rows(self, name: str, *index: Any) -> torch.Tensor:
            if name in names:  # the first tensor of a unit
                read.append((name, threading.get_ident()))
                started.release()
            return source.read_rows(name, *index)

    reader = transfer.read_ahead(Recording(), found, None)  # type: ignore[arg-type]
    unit, tensors = next(reader)
    assert unit is found[0] and same_bytes(tensors[names[0]], source.read(names[0]))
    for _ in range(1 + ahead):
        assert started.acquire(timeout=60)
    assert not started.acquire(timeout=0.1)
    assert sorted(name for name, _ in read) == sorted(names[: 1 + ahead])
    assert threading.get_ident() not in dict(read).values()
    assert [unit for unit, _ in reader] == found[1:]
    assert list(transfer.read_ahead(source, [], None)) == []


def test_small_models_take_one_process() -> None:
    assert transfer.default_processes(10_000_000) == 1
    assert transfer.default_processes(10**12) == min(8, len(os.sched_getaffinity(0)))


class Failing:
    """A checkpoint that breaks at one tensor."""

    def __init__(self, checkpoint: HFCheckpoint, name: str, action: Callable[[], Any]) -> None:
        self._checkpoint, self._name, self._action = checkpoint, name, action

    def __getattr__(self, name: str) -> Any:
        return getattr(self._checkpoint, name)

    def read_rows(self, name: str, *index: Any) -> Any:
        if name == self._name:
            self._action()
        return self._checkpoint.read_rows(name, *index)


def _raise(error: Exception) -> Callable[[], Any]:
    def action() -> None:
        raise error

    return action


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (CheckpointError("odd", where="file", fix="fix it"), SlimError, "^file: odd; fix it$"),
        (OSError(28, "No space left on device"), OSError, "No space left"),
        (ZeroDivisionError("oops"), Exception, "oops"),
    ],
)
def test_a_failure_ends_everything(
    hf: Path, tmp_path: Path, processes: int, error: Exception, kind: type[Exception], message: str
) -> None:
    source = Failing(HFCheckpoint.open(hf), "lm_head.weight", _raise(error))
    others = set(psutil.Process().children())  # of earlier tests: Megatron's checkpoint writer keeps a worker
    with pytest.raises(kind, match=message):
        write_checkpoint(source, tmp_path / "out", to="torch_dist", processes=processes)
    assert os.listdir(tmp_path) == []
    assert set(psutil.Process().children()) <= others


def test_a_killed_process_is_noticed(hf: Path, tmp_path: Path) -> None:
    source = Failing(HFCheckpoint.open(hf), "lm_head.weight", lambda: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(SlimError, match="was killed"):
        write_checkpoint(source, tmp_path / "out", to="hf", processes=2)
    assert os.listdir(tmp_path) == []


def test_processes_end_when_their_parent_is_killed(hf: Path, tmp_path: Path) -> None:
    children = tmp_path / "children"

    def slowly() -> None:
        with children.open("a") as stream:
            stream.write(f"{os.getpid()}\n")
        time.sleep(1)

    parent = os.fork()
    if parent == 0:
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            source = Failing(HFCheckpoint.open(hf), name, slowly)
            write_checkpoint(source, tmp_path / "out", to="hf", processes=2)
        os._exit(0)
    while not children.exists() or not children.read_text().endswith("\n"):
        time.sleep(0.01)
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    (child,) = map(int, children.read_text().split())
    psutil.wait_procs([psutil.Process(child)] if psutil.pid_exists(child) else [], timeout=10)
    assert not psutil.pid_exists(child)
    assert not (tmp_path / "out").exists()


def test_integrity_and_provenance(hf: Path, tmp_path: Path) -> None:
    results = write_checkpoint(
        open_checkpoint(hf), tmp_path / "out", to="torch_dist", processes=2, arguments={"load": hf, "json": False}
    )
    release = tmp_path / "out" / "release"
    manifest = json.loads((release / "integrity.json").read_text())
    assert manifest["algorithm"] == "sha256"
    assert manifest["files"] == {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest()
        for file in release.iterdir()
        if file.name != "integrity.json"
    }
    provenance = json.loads((tmp_path / "out" / "slim_provenance.json").read_text())
    assert provenance["output"] == results
    assert provenance["source"]["path"] == str(hf)
    assert provenance["arguments"] == {"load": str(hf), "json": False}
    assert provenance["versions"]["torch"] == torch.__version__.split("+")[0]
    write_checkpoint(open_checkpoint(tmp_path / "out"), tmp_path / "back", to="hf")
    later = json.loads((tmp_path / "back" / "slim_provenance.json").read_text())
    assert later["source"]["provenance"] == provenance
    assert later["output"]["content"] == provenance["output"]["content"]


def test_a_stream_takes_memory_once_and_gives_it_back() -> None:
    def churn(times: int) -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(times):
            torch.ones(UNIT_BYTES, dtype=torch.uint8)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    pages = UNIT_BYTES // mmap.PAGESIZE
    with keeping_memory():
        churn(4)
        assert churn(32) < 4 * pages  # 32 times, if every block were new
        held = [torch.ones(UNIT_BYTES, dtype=torch.uint8) for _ in range(8)]
        del held
        kept = _anonymous_bytes()
    assert kept - _anonymous_bytes() > 7 * UNIT_BYTES


def _anonymous_bytes() -> int:
    found = re.search(r"^Anonymous:\s+(\d+) kB", Path("/proc/self/smaps_rollup").read_text(), re.MULTILINE)
    assert found
    return int(found[1]) << 10
