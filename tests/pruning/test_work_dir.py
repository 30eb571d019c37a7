"""Hidden states in files: the same statistics, little memory, and runs that are killed anywhere and resume."""

from __future__ import annotations

import gc
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import megatron_slim.mcore

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_slim.checkpoint.convert import open_checkpoint
from megatron_slim.checkpoint.huggingface import HFCheckpoint
from megatron_slim.compat import runtime
from megatron_slim.errors import SlimError
from megatron_slim.pruning.calibrate import calibrate
from megatron_slim.streaming.forward import StreamingForward
from megatron_slim.streaming.work_dir import WorkDir, open_work_dir
from megatron_slim.testing import run_distributed, tiny_shape, write_tiny_checkpoint

SHAPE = tiny_shape()
SAMPLES = np.random.default_rng(0).integers(0, SHAPE.vocab_size, (5, 12))
THREADS = torch.get_num_threads()
KILLED = f"exit code -{signal.SIGKILL.value}"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> HFCheckpoint:
    return HFCheckpoint.open(write_tiny_checkpoint(tmp_path_factory.mktemp("model") / "hf", SHAPE))


@pytest.fixture(scope="module")
def unbroken(model: HFCheckpoint) -> str:
    return calibrate(model, SAMPLES, micro_batch_size=2).sha256


def in_files(model: HFCheckpoint, path: Path, samples: np.ndarray = SAMPLES, micro_batch_size: int = 2) -> str:
    with open_work_dir(path) as work:
        return calibrate(model, samples, micro_batch_size=micro_batch_size, work=work).sha256


def as_the_tests() -> None:
    """Compute with as many threads as the tests and tools: sums depend on that in their last bit on some processors."""
    torch.set_num_threads(THREADS)


def killed_at_an_event(model: str, path: str, number: int) -> int:
    """Calibrate and be killed at the n-th operation on the directory; returns how many there were if it is later."""
    events = 0

    def count(event: str, args: tuple[Any, ...]) -> None:
        nonlocal events
        if event in ("open", "os.rename", "os.remove", "os.mkdir") and str(args[0]).startswith(path):
            events += 1
            if events == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    as_the_tests()
    in_files(open_checkpoint(model), Path(path))
    return events


def killed_in_a_module(model: str, path: str, module: str, batch: int) -> None:
    """Calibrate and be killed when a micro-batch has gone through a module, or all have (batch 3)."""
    seen = 0

    def watched(method: Callable[..., None]) -> Callable[..., None]:
        def run(self: StreamingForward, name: str, *args: Tensor) -> None:
            nonlocal seen
            seen += name == module
            if seen > batch:
                os.kill(os.getpid(), signal.SIGKILL)
            method(self, name, *args)

        return run

    from megatron_slim.pruning.calibrate import _Calibration

    for name in ("observe", "leave"):
        setattr(_Calibration, name, watched(getattr(_Calibration, name)))
    as_the_tests()
    in_files(open_checkpoint(model), Path(path))


def test_files_change_no_bit_and_leave_nothing(model: HFCheckpoint, unbroken: str, tmp_path: Path) -> None:
    assert in_files(model, tmp_path / "work") == unbroken
    assert [p.name for p in tmp_path.rglob("*")] == ["work"]


@pytest.mark.parametrize(
    ("module", "batch"), [("embedding", 1), ("model.layers.2", 1), ("model.layers.1", 3), ("mtp_input", 2)]
)
def test_killed_in_a_module(model: HFCheckpoint, unbroken: str, tmp_path: Path, module: str, batch: int) -> None:
    work = tmp_path / "work"
    with pytest.raises(RuntimeError, match=KILLED):
        run_distributed(1, killed_in_a_module, str(model.path), str(work), module, batch, initialise=False)
    before = module != "embedding"
    assert (work / "state").exists() == before
    assert in_files(model, work) == unbroken
    assert not list(work.iterdir())


@pytest.mark.slow
def test_killed_at_any_operation_on_the_directory(model: HFCheckpoint, unbroken: str, tmp_path: Path) -> None:
    (total,) = run_distributed(1, killed_at_an_event, str(model.path), str(tmp_path / "all"), 10**9, initialise=False)
    assert total > 50
    for number in (1, 2, 3, 4, 5, *range(6, total, 7), total - 1, total):
        work = tmp_path / f"work-{number}"
        with pytest.raises(RuntimeError, match=KILLED):
            run_distributed(1, killed_at_an_event, str(model.path), str(work), number, initialise=False)
        assert in_files(model, work) == unbroken, f"killed at operation {number}"


class Broken(Exception):
    pass


def interrupted(model: HFCheckpoint, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave a run that ended after some modules."""
    commit = WorkDir.commit

    def stop(self: WorkDir, measured: Any) -> None:
        commit(self, measured)
        if self._finished == 3:
            raise Broken

    with monkeypatch.context() as patch, pytest.raises(Broken):
        patch.setattr(WorkDir, "commit", stop)
        in_files(model, path)


def test_going_on_reads_no_block_twice(
    model: HFCheckpoint, unbroken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(model, tmp_path / "work", monkeypatch)
    again = HFCheckpoint.open(model.path)
    read, names = again.read, []
    again.read = lambda name: names.append(name) or read(name)  # type: ignore[method-assign,func-returns-value]
    assert in_files(again, tmp_path / "work") == unbroken
    assert not any(name.startswith(("model.layers.0.mlp.experts", "model.layers.1.mlp.experts")) for name in names)
    assert any(name.startswith("model.layers.2.mlp.experts") for name in names)


def test_other_inputs_are_refused(
    model: HFCheckpoint, unbroken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = tmp_path / "work"
    interrupted(model, work, monkeypatch)
    other = HFCheckpoint.open(write_tiny_checkpoint(tmp_path / "other", SHAPE, seed=1))
    with pytest.raises(SlimError, match=r"work: was begun with checkpoint \w{64}, this run has \w{64}; run it with"):
        in_files(other, work)
    with pytest.raises(SlimError, match=r"was begun with samples \[5, 12\] "):
        in_files(model, work, samples=SAMPLES[::-1].copy())
    with pytest.raises(SlimError, match="was begun with micro-batch size 2, this run has 1"):
        in_files(model, work, micro_batch_size=1)
    monkeypatch.setattr("megatron_slim.pruning.calibrate.default_dtype", lambda: torch.bfloat16)
    with pytest.raises(SlimError, match="was begun with dtype float32, this run has bfloat16"):
        in_files(model, work)
    monkeypatch.undo()
    assert in_files(model, work) == unbroken, "refusing changed nothing"


def test_damage_is_seen(model: HFCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, work = tmp_path / "whole", tmp_path / "work"
    interrupted(model, whole, monkeypatch)
    assert sorted(file.name for file in whole.iterdir()) == ["hidden.3", "state"]

    def error(name: str, change: Callable[[bytes], bytes]) -> str:
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(whole, work)
        (work / name).write_bytes(change((work / name).read_bytes()))
        with pytest.raises(SlimError) as caught:
            in_files(model, work)
        return str(caught.value)

    assert "state: is damaged; remove the directory and start again" in error("state", lambda data: data[:-1])
    assert "state: is damaged" in error("state", lambda data: data[:200] + b"\0" + data[201:])
    assert "state: is damaged" in error("state", lambda data: b"")
    assert "hidden.3: is missing or was cut off" in error("hidden.3", lambda data: data[:-4])
    zeroed = error("hidden.3", lambda data: data[:-4096] + bytes(4096))
    assert "hidden.3: its content is not what was written; remove the directory" in zeroed


def test_one_process_at_a_time_and_no_foreign_files(
    model: HFCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_work_dir(tmp_path / "work"), pytest.raises(SlimError, match="another process is writing it"):
        in_files(model, tmp_path / "work")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("")
    with pytest.raises(SlimError, match=r"mine: holds something else \(thesis.tex\); name a new or an empty directory"):
        in_files(model, tmp_path / "mine")
    with pytest.raises(SlimError, match="is not a directory"):
        in_files(model, tmp_path / "mine" / "thesis.tex")
    with pytest.raises(SlimError, match="parent directory"):
        in_files(model, tmp_path / "none" / "work")
    monkeypatch.setattr(os, "statvfs", lambda _: os.statvfs_result((1,) * 10))
    with pytest.raises(SlimError, match=r"work: needs 0.0 GB, 0.0 GB are free; make space"):
        in_files(model, tmp_path / "work")
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["mine", "thesis.tex"]


def _hidden_states() -> dict[int, int]:
    """Bytes by address of all tensors alive that hidden states can be in."""
    held = [o for o in gc.get_objects() if type(o) is Tensor and o.dim() == 3 and o.shape[2] == 64]
    return {o.untyped_storage().data_ptr(): o.untyped_storage().nbytes() for o in held}


class Watched(StreamingForward):
    """Most bytes of them at the same time, those of earlier tests left out."""

    most = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.before = _hidden_states()
        super().__init__(*args, **kwargs)

    def observe(self, module: str, inputs: Tensor, output: Tensor) -> None:
        now = _hidden_states()
        self.most = max(self.most, sum(now[address] for address in now.keys() - self.before.keys()))


@torch.no_grad()
@pytest.mark.slow
def test_memory_does_not_grow_with_the_samples(model: HFCheckpoint, tmp_path: Path) -> None:
    runtime.init_single_process()

    def most(samples: int, *, in_files: bool) -> int:
        tokens = np.zeros((samples, 16), dtype=np.int64)
        with open_work_dir(tmp_path / "work") as work:
            options = {"micro_batch_size": 2, "dtype": torch.float32, "work": work if in_files else None}
            forward = Watched(model, tokens, **options)  # type: ignore[arg-type]
            forward.run("")
        return forward.most

    all_of_them = 40 * 16 * 64 * 4
    assert most(40, in_files=True) == most(4, in_files=True) < all_of_them / 2
    assert most(40, in_files=False) > all_of_them


def test_the_tools_go_on(tool: Callable[..., Any], model: HFCheckpoint, tmp_path: Path) -> None:
    np.save(tmp_path / "tokens.npy", SAMPLES)
    command = ("tools/calibrate.py", "--load", model.path, "--calibration-data", tmp_path / "tokens.npy")
    plain = tool(*command, "--save", tmp_path / "plain", "--json")
    kept = ("--work-dir", tmp_path / "work")
    with pytest.raises(RuntimeError, match=KILLED):
        run_distributed(1, killed_by_tool, str(model.path), str(tmp_path), initialise=False)
    resumed = tool(*command, "--save", tmp_path / "resumed", "--json", *kept)
    assert resumed.code == 0, resumed.stderr
    assert "resuming after 3 of 9 modules" in resumed.stderr
    assert (tmp_path / "resumed").read_bytes() == (tmp_path / "plain").read_bytes() and plain.code == 0
    assert not list((tmp_path / "work").iterdir())
    prune = ("tools/prune_checkpoint.py", "--load", model.path, "--recipe", tmp_path / "r", "--dry-run")
    for given in (kept, ("--num-samples", 3), ("--seq-length", 8), ("--micro-batch-size", 1)):
        error = tool(*prune, "--stats", tmp_path / "plain", *given).error
        assert error == f"{given[0]} without a calibration; leave it out"


def killed_by_tool(model: str, folder: str) -> None:
    """As tools/calibrate.py would run, killed after three modules."""
    from megatron_slim.cli.calibration_run import CalibrationOptions, run_calibrate

    commit = WorkDir.commit

    def stop(self: WorkDir, measured: Any) -> None:
        commit(self, measured)
        if self._finished == 3:
            os.kill(os.getpid(), signal.SIGKILL)

    WorkDir.commit = stop  # type: ignore[method-assign]
    as_the_tests()
    options = CalibrationOptions(Path(folder, "tokens.npy"), None, None, 1234, None, Path(folder, "work"))
    run_calibrate(Path(model), Path(folder, "killed"), options)


@pytest.mark.parametrize("save", ["work/result", "work", "work/../work/result"])
def test_an_output_in_it_is_refused(tool: Callable[..., Any], model: HFCheckpoint, tmp_path: Path, save: str) -> None:
    """It would be taken away with the hidden states, or refuse the next start."""
    np.save(tmp_path / "tokens.npy", SAMPLES)
    (tmp_path / "recipe.yaml").write_text("version: 1\ntarget: {hidden_size: 32}\n")
    if save != "work":
        (tmp_path / "work").mkdir()
    before = sorted(tmp_path.rglob("*"))
    given = ("--load", model.path, "--calibration-data", tmp_path / "tokens.npy", "--work-dir", tmp_path / "work")
    for command in (("tools/calibrate.py",), ("tools/prune_checkpoint.py", "--recipe", tmp_path / "recipe.yaml")):
        error = tool(*command, *given, "--save", tmp_path / save).error
        assert error.endswith("is in the directory of --work-dir; choose a place outside")
        assert sorted(tmp_path.rglob("*")) == before


def test_what_is_not_its_own_stays(tmp_path: Path) -> None:
    with open_work_dir(tmp_path / "work") as work:
        work.path.mkdir()
        (work.path / "hidden.3").write_text("ours")
        (work.path / "result").write_text("somebody's")
    assert [entry.name for entry in (tmp_path / "work").iterdir()] == ["result"]
