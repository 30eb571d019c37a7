"""Jobs under the launcher that get signals, lose ranks or diverge: exit codes, time, and the curve they resume with."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from megatron_slim.testing import reserved_port

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 60.0  # in which a job must be gone
TERMS = ("lm loss", "logits distillation loss", "mtp lm loss", "mtp distillation loss", "grad-norm", "learning-rate")
TERMS += ("kd lambda", "mtp beta")
STAYS = "import signal, time; signal.signal(signal.SIGTERM, lambda *_: {}); print('ready', flush=True); time.sleep(60)"
SCRIPTS = {
    # What two ranks do, what happens to the launcher or to a rank, and the launcher's exit code.
    "saves at SIGTERM": (STAYS.format("(time.sleep(1), print('saved', flush=True), __import__('os')._exit(0))"), 0),
    "dies of SIGTERM": ("import time; print('ready', flush=True); time.sleep(60)", 1),
    "says what is wrong": ("import time; print('ready', flush=True); time.sleep(1); raise SystemExit(2)", 2),
}


@contextlib.contextmanager
def launch(log: Path, script: Path, *argv: str) -> Iterator[subprocess.Popen[bytes]]:
    """Two ranks under tools/torchrun.py; none of them is there afterwards."""
    command = [sys.executable, str(ROOT / "tools/torchrun.py"), "--nproc-per-node", "2", "--master-port"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    with reserved_port() as port, log.open("wb") as stream:
        job = subprocess.Popen([*command, str(port), str(script), *argv], stdout=stream, stderr=stream, env=environment)
        try:
            yield job
        finally:
            left = psutil.Process(job.pid).children(recursive=True) if job.poll() is None else []
            job.kill()
            for process in left:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            job.wait()


def wait_for(job: subprocess.Popen[bytes], log: Path, pattern: str, count: int = 1) -> None:
    deadline = time.monotonic() + 120
    while len(re.findall(pattern, log.read_text(errors="replace"))) < count:
        assert job.poll() is None and time.monotonic() < deadline, log.read_text(errors="replace")[-3000:]
        time.sleep(0.05)


def end(job: subprocess.Popen[bytes]) -> int:
    """The exit code; all processes of the job must be gone in time."""
    ranks = psutil.Process(job.pid).children(recursive=True)
    code = job.wait(timeout=SECONDS)
    _, alive = psutil.wait_procs(ranks, timeout=10)
    assert not alive
    return code


@pytest.mark.one_case
@pytest.mark.parametrize("case", SCRIPTS)
def test_the_launcher_ends_as_its_ranks_do(tmp_path: Path, case: str) -> None:
    body, wanted = SCRIPTS[case]
    script, log = tmp_path / "rank.py", tmp_path / "log"
    script.write_text(body)
    with launch(log, script) as job:
        wait_for(job, log, "ready", 2)
        if wanted != 2:
            job.send_signal(signal.SIGTERM)
        assert end(job) == wanted
    assert log.read_text().count("saved") == (2 if wanted == 0 else 0)


@pytest.mark.slow
def test_ranks_die_with_their_launcher(tmp_path: Path) -> None:
    script, log = tmp_path / "rank.py", tmp_path / "log"
    script.write_text(
        "import time; from megatron_slim.processes import die_with_parent; die_with_parent(); "
        "print('ready', flush=True); time.sleep(60)"
    )
    with launch(log, script) as job:
        wait_for(job, log, "ready", 2)
        ranks = psutil.Process(job.pid).children()
        job.kill()
        _, alive = psutil.wait_procs(ranks, timeout=10)
        assert len(ranks) == 2 and not alive


@pytest.mark.slow
def test_one_curve_through_sigterm_and_kills(workplace, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """The same command again and again, until it is done: every step that any of them logged is the unbroken run's."""
    script, steps, board = ROOT / "tools/pretrain.py", 60, tmp_path / "board"
    common = f"--micro-batch-size 2 --train-iters {steps} --pipeline-model-parallel-size 2".split()
    common += ["--tensorboard-queue-size", "1"]
    whole = workplace.train("unbroken", 2, *common)
    save = ["--save", str(tmp_path / "run"), "--load", str(tmp_path / "run"), "--tensorboard-dir", str(board)]
    argv = workplace.argv("broken", *common, *save)

    def run(name: str, stop: signal.Signals | None, victim: str, *flags: str) -> tuple[int, float]:
        log = tmp_path / f"{name}.log"
        with launch(log, script, *argv, *flags) as job:
            if stop is not None:
                wait_for(job, log, r"iteration +\d+/ +\d+ \|", 5)
                target = psutil.Process(job.pid) if victim == "launcher" else psutil.Process(job.pid).children()[0]
                target.send_signal(stop)
            begin = time.monotonic()
            return end(job), time.monotonic() - begin

    assert run("sigterm", signal.SIGTERM, "launcher", "--exit-signal-handler")[0] == 0
    saved = int((tmp_path / "run" / "latest_checkpointed_iteration.txt").read_text())
    assert 5 <= saved < steps
    code, seconds = run("dead-rank", signal.SIGKILL, "rank", "--exit-signal-handler")
    assert code == 1 and seconds < 45, seconds
    assert run("unhandled", signal.SIGTERM, "launcher")[0] == 1
    assert run("again", signal.SIGTERM, "launcher", "--exit-signal-handler")[0] == 0
    assert int((tmp_path / "run" / "latest_checkpointed_iteration.txt").read_text()) > saved
    assert run("rest", None, "")[0] == 0
    found: dict[str, dict[int, set[float]]] = {term: {} for term in TERMS}
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for file in board.glob("events*"):
        events = EventAccumulator(str(file))
        events.Reload()
        for term in TERMS:
            for point in events.Scalars(term) if term in events.Tags()["scalars"] else []:
                found[term].setdefault(point.step, set()).add(point.value)
    for term in TERMS:
        expected = dict(enumerate(whole[term], start=1))
        assert {step: {value} for step, value in expected.items() if step in found[term]} == found[term], term
        assert len(found[term]) == steps, term


@pytest.mark.slow
def test_a_run_that_diverges_is_one_line_and_exit_code_2(workplace, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    flags = "--micro-batch-size 1 --lr 1e30 --min-lr 1e29 --clip-grad 0".split()
    with launch(tmp_path / "log", ROOT / "tools/pretrain.py", *workplace.argv("diverges", *flags)) as job:
        assert end(job) == 2
    errors = [line for line in (tmp_path / "log").read_text().splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and re.match(r"error: iteration \d+: .*lm loss is (nan|inf).*rank \d", errors[0]), errors
    assert "Traceback" not in (tmp_path / "log").read_text()
