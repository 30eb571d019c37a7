"""Writing that is killed, refused by the system, stopped or done twice: the output is whole or not there.

Every tool runs in a forked child, which is disturbed at its 1st, 2nd, ... file operation.
"""

from __future__ import annotations

import errno
import itertools
import os
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from torch import Tensor

import megatron_slim.pruning.pipeline  # noqa: F401 (what tools import when they run: a child has it already)
from megatron_slim.checkpoint.common_state import read_common_state  # noqa: F401 (as above)
from megatron_slim.checkpoint.convert import hf_to_torch_dist, open_checkpoint, write_checkpoint
from megatron_slim.checkpoint.distributed import DistCheckpoint
from megatron_slim.checkpoint.huggingface import HFCheckpoint
from megatron_slim.checkpoint.optimizer_state import MAIN, MOMENTS, OptimizerState, open_optimizer_state
from megatron_slim.files import write_atomic
from megatron_slim.pruning.plan import make_plan
from megatron_slim.pruning.statistics import FORMAT, Statistics, expected_shapes
from megatron_slim.recipe import parse_recipe
from megatron_slim.streaming.fingerprint import fingerprint
from megatron_slim.testing import tiny_shape, write_tiny_checkpoint
from tests.signals import default_signals

ROOT = Path(__file__).resolve().parents[3]
SHAPE = tiny_shape(
    num_layers=2,
    layer_types=("linear_attention", "full_attention"),
    num_moe_experts=2,
    moe_router_topk=1,
    hidden_size=32,
    vocab_size=32,
    moe_ffn_hidden_size=16,
    moe_shared_expert_intermediate_size=16,
)
CONVERT, PRUNE = "tools/convert_checkpoint.py", "tools/prune_checkpoint.py"
SCENARIOS = {
    "to torch_dist": (CONVERT, "--load", "from-hf"),
    "to hf": (CONVERT, "--load", "from-torch-dist"),
    "pruned to hf": (PRUNE, "--load", "from-hf", "--plan", "plan.json"),
    "pruned to torch_dist": (PRUNE, "--load", "from-torch-dist", "--plan", "plan.json", "--to", "torch_dist"),
    "with its optimizer": (PRUNE, "--load", "run", "--plan", "plan.json", "--to", "torch_dist", "--carry-optimizer"),
}
BUSY = "another process is writing it"
FEW = 5  # operations at which the fast tests disturb a tool
Start = Callable[..., Callable[[], Any]]
Tensors = dict[str, Tensor]


class Case(NamedTuple):
    """A tool on its input, the directory where its output is to be, what is to be in it, and how much it does."""

    main: Callable[..., None]  # takes more options
    out: Path
    expected: Tensors
    operations: int


def run_script(script: str, *args: object) -> None:
    sys.argv = [script, *map(str, args)]
    runpy.run_path(str(ROOT / script), run_name="__main__")


def tensors_in(path: Path) -> Tensors:
    checkpoint = open_checkpoint(path)
    found = {name: checkpoint.read(name) for name in checkpoint.names}
    if isinstance(checkpoint, DistCheckpoint) and checkpoint.optimizer_by_names:
        for state, tensors in open_optimizer_state(checkpoint).tensors.items():
            found |= {f"{state} {name}": tensors.read(name) for name in tensors.names}
    return found


def same(found: Tensors, expected: Tensors) -> bool:
    return found.keys() == expected.keys() and all(
        found[name].dtype == tensor.dtype and found[name].equal(tensor) for name, tensor in expected.items()
    )


def spread(most: int, count: int) -> list[int]:
    """``most`` numbers from 1 to ``count``, both included, or all."""
    return sorted({round(at) for at in np.linspace(1, count, min(most, count))})


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in both formats, one with optimizer state (its weights, for all states), and a plan for it."""
    work = tmp_path_factory.mktemp("inputs")
    source = HFCheckpoint.open(write_tiny_checkpoint(work / "from-hf", SHAPE))
    hf_to_torch_dist(work / "from-hf", work / "from-torch-dist")
    state = OptimizerState(3, dict.fromkeys((MAIN[0], *MOMENTS), source))
    write_checkpoint(source, work / "run", to="torch_dist", optimizer=state)
    rng = np.random.default_rng(0)
    random = {key: np.asarray(rng.random(size), dtype=np.float32) for key, size in expected_shapes(SHAPE)}
    recipe = parse_recipe({"version": 1, "target": {"num_layers": 2, "hidden_size": 16, "num_moe_experts": 1}})
    stats = Statistics(random, {"format": FORMAT, "source_sha256": fingerprint(source)})
    make_plan(recipe, stats, SHAPE).save(work / "plan.json")
    return work


@pytest.fixture(scope="module")
def undisturbed() -> dict[str, tuple[Tensors, int]]:
    """What undisturbed runs write (that it is right is tested elsewhere), and in how many operations."""
    return {}


@pytest.fixture
def case(inputs: Path, undisturbed: dict[str, Any], tmp_path: Path, start: Start, request: Any) -> Case:
    name = getattr(request, "param", "to torch_dist")
    script, *options = SCENARIOS[name]
    arguments = [inputs / option if (inputs / option).exists() else option for option in options]
    out = tmp_path / "out"

    def main(*more: object) -> None:
        run_script(script, *arguments, "--save", out, *more)

    if name not in undisturbed:
        ending = start(main)()
        assert ending.code == 0 and os.listdir(tmp_path) == ["out"], ending.stderr
        undisturbed[name] = tensors_in(out), ending.operations
        shutil.rmtree(out)
    return Case(main, out, *undisturbed[name])


def assert_absent_or_whole(case: Case) -> bool:
    """Returns whether it is there, and takes it away."""
    if not os.path.lexists(case.out):
        return False
    assert same(tensors_in(case.out), case.expected)
    shutil.rmtree(case.out)
    return True


def assert_it_works_now(case: Case, start: Start) -> None:
    again = start(case.main)()
    assert again.code == 0, again.stderr
    assert os.listdir(case.out.parent) == ["out"]
    assert assert_absent_or_whole(case)


def kill(name: str, argument: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def refuse(code: int) -> Callable[[str, Any], None]:
    def action(name: str, argument: Any) -> None:
        file = () if isinstance(argument, int) else (argument,)
        raise OSError(code, os.strerror(code), *file)

    return action


@pytest.mark.one_case
@pytest.mark.parametrize("case", SCENARIOS, indirect=True)
@pytest.mark.parametrize("most", [FEW, pytest.param(10**6, marks=pytest.mark.slow)])
def test_killed_at_any_operation(case: Case, start: Start, most: int) -> None:
    published = []
    for at in spread(most, case.operations):
        # What the previous one has left is in its way.
        assert start(case.main, at=at, action=kill)().code == -signal.SIGKILL, f"operation {at}"
        published.append(assert_absent_or_whole(case))
    assert published == sorted(published) and not published[0]
    assert_it_works_now(case, start)


@pytest.mark.one_case
@pytest.mark.parametrize("case", SCENARIOS, indirect=True)
@pytest.mark.parametrize("most", [FEW, pytest.param(10**6, marks=pytest.mark.slow)])
def test_refused_by_the_system_at_any_operation(case: Case, start: Start, most: int) -> None:
    codes = (errno.ENOSPC, errno.EIO)
    published = []
    for at, code in zip(spread(most, case.operations), itertools.cycle(codes), strict=False):
        error = start(case.main, at=at, action=refuse(code))().error
        assert os.strerror(code).lower() in error and str(case.out.parent) in error, f"operation {at}: {error}"
        published.append(assert_absent_or_whole(case))
        assert os.listdir(case.out.parent) == []
    assert not any(published[:-1])  # only flushing the parent comes after the rename
    assert_it_works_now(case, start)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_stopped_at_any_operation(case: Case, start: Start, number: signal.Signals) -> None:
    def stop(name: str, argument: Any) -> None:
        os.kill(os.getpid(), number)

    for at in spread(FEW // 2, case.operations - 2):
        stopped = start(case.main, at=at, action=stop)()
        assert (stopped.code, stopped.stderr) == (128 + number, ""), f"operation {at}"
        assert os.listdir(case.out.parent) == []
    assert_it_works_now(case, start)


@pytest.mark.parametrize("case", SCENARIOS, indirect=True)
def test_a_limit_on_file_sizes(case: Case, start: Start) -> None:
    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, resource.RLIM_INFINITY))
        case.main()

    error = start(limited)().error
    assert error.startswith(f"{case.out.parent}/")
    assert error.endswith(": file too large; raise the limit of file sizes (ulimit -f)")
    assert os.listdir(case.out.parent) == []


@pytest.mark.parametrize("case", SCENARIOS, indirect=True)
def test_free_space_is_looked_at_before_anything_is_written(
    case: Case, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "statvfs", lambda _: os.statvfs_result((4096, 4096, 1000, 1, 1, 0, 0, 0, 0, 255)))
    refused = start(case.main)()
    assert "0.0 GB are free; make space" in refused.error
    assert refused.operations <= 2  # the lock, and the directory that was to be filled
    assert os.listdir(case.out.parent) == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 32 KiB, much too small for a model."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if shutil.which("mount") is None:
        pytest.skip("no mount command here")
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32k", "tmpfs", disk], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", disk], check=True)


@pytest.mark.parametrize("announced", [True, False])
def test_a_full_disk(inputs: Path, small_disk: Path, start: Start, announced: bool) -> None:
    def main() -> None:
        if not announced:  # as by a quota, which statvfs does not know of
            os.statvfs = lambda _: os.statvfs_result((4096, 4096, 1 << 30, 1 << 30, 1 << 30, 0, 0, 0, 0, 255))  # type: ignore[assignment]
        run_script(CONVERT, "--load", inputs / "from-hf", "--save", small_disk / "out")

    error = start(main)().error
    assert error.startswith(str(small_disk)) and error.endswith("; make space")
    assert ("are free" in error) == announced and ("no space left on device" in error) != announced
    assert os.listdir(small_disk) == []


@pytest.mark.parametrize("case", ["to torch_dist", "pruned to hf"], indirect=True)
def test_two_at_once_and_the_second_is_refused(case: Case, start: Start) -> None:
    started_in, started = os.pipe()
    go, release = os.pipe()

    def wait(name: str, argument: Any) -> None:
        os.close(started)
        os.close(release)
        os.read(go, 1)

    first = start(case.main, at=case.operations // 2, action=wait)
    os.close(started)
    os.read(started_in, 1)  # the end of it: the first is in the middle
    second = start(case.main)()
    assert second.error == f"{case.out}: {BUSY}; wait for it, end it, or choose another name"
    assert not case.out.exists()
    for descriptor in (started_in, go, release):
        os.close(descriptor)
    assert first().code == 0
    assert os.listdir(case.out.parent) == ["out"] and assert_absent_or_whole(case)


def test_four_at_once_and_one_wins(case: Case, start: Start) -> None:
    endings = [end() for end in [start(case.main) for _ in range(4)]]
    assert sorted(end.code for end in endings) == [0, 2, 2, 2]
    for end in endings:
        assert end.code == 0 or BUSY in end.error or "already exists" in end.error
    assert os.listdir(case.out.parent) == ["out"] and assert_absent_or_whole(case)


def test_a_file_is_replaced_whole(tmp_path: Path, start: Start) -> None:
    file, old, new = tmp_path / "plan.json", "old" * 100_000, "new" * 100_000
    file.write_text(old)
    whole = start(lambda: write_atomic(file, new))()
    assert (whole.code, file.read_text()) == (0, new)
    for action in (kill, refuse(errno.ENOSPC)):
        file.write_text(old)
        for at in range(1, whole.operations + 1):
            assert start(lambda: write_atomic(file, new), at=at, action=action)().code != 0
            assert file.read_text() in (old, new)
            if action is not kill:
                assert os.listdir(tmp_path) == ["plan.json"]
        assert start(lambda: write_atomic(file, new))().code == 0
        assert file.read_text() == new and os.listdir(tmp_path) == ["plan.json"]


def when_free(run: Callable[[], Any]) -> Any:
    """Run it until those that a killed process had started have noticed, and let go of the lock."""
    for _ in range(600):
        ended = run()
        if BUSY not in ended.stderr:
            return ended
        time.sleep(0.1)
    raise TimeoutError(BUSY)


def test_one_of_several_processes_is_killed(case: Case, start: Start) -> None:
    """The count continues in those that are forked, so that now one of them is killed and now the one that waits."""

    def main() -> None:
        case.main("--processes", 2)

    undisturbed = start(main)()
    assert undisturbed.code == 0 and assert_absent_or_whole(case), undisturbed.stderr
    killed = []
    for at in spread(FEW, undisturbed.operations):
        ended = when_free(lambda at=at: start(main, at=at, action=kill)())  # type: ignore[misc]
        killed.append(ended.code)
        assert_absent_or_whole(case)
        if ended.code != -signal.SIGKILL:
            assert "process was killed" in ended.error
            assert os.listdir(case.out.parent) == []
    assert set(killed) == {2, -signal.SIGKILL}
    assert_it_works_now(case, start)


@pytest.fixture(scope="module")
def larger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that takes long enough to write: 500 MB."""
    shape = tiny_shape(hidden_size=1024, vocab_size=1024, num_moe_experts=64, moe_ffn_hidden_size=256)
    return write_tiny_checkpoint(tmp_path_factory.mktemp("larger") / "hf", shape)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGKILL])
def test_the_real_command_line(larger: Path, tmp_path: Path, number: signal.Signals) -> None:
    """In a process of its own, with two that write, as soon as they do."""
    command = [sys.executable, ROOT / CONVERT, "--load", larger, "--save", tmp_path / "out", "--processes", "2"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=default_signals) as process:
        while len(list(tmp_path.glob(".out.partial/*/*"))) < 2 and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(number)
        _, stderr = process.communicate()
    if number == signal.SIGKILL:
        assert process.returncode == -number and not (tmp_path / "out").exists()
    else:
        assert (process.returncode, stderr) == (128 + number, "")
        assert os.listdir(tmp_path) == []
    again = when_free(lambda: subprocess.run(command, capture_output=True, text=True))
    assert again.returncode == 0, again.stderr
    assert os.listdir(tmp_path) == ["out"]
