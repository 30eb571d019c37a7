"""What all tools share: how they end."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

from megatron_slim.cli import run_tool

ROOT = Path(__file__).resolve().parents[1]
HEAD = """
import multiprocessing, sys, time
from pathlib import Path
from megatron_slim.cli import run_tool
from megatron_slim.files import new_directory
"""
CONVERSION = """
def convert():
    with new_directory(Path(sys.argv[1])) as partial:
        (partial / "model.safetensors").write_bytes(b"half")
        print("writing", flush=True)
        time.sleep(60)

run_tool(convert, as_json=False)
"""
WORKER = """
def work(running):
    running.set()
    time.sleep(60)

def start():
    context = multiprocessing.get_context("fork")
    running = context.Event()
    worker = context.Process(target=work, args=(running,))
    worker.start()
    running.wait()
    worker.terminate()
    worker.join()
    return {"exitcode": worker.exitcode}

run_tool(start, as_json=True)
"""


def started(script: str, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", HEAD + script, *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_tool_that_is_terminated_leaves_nothing_behind(tmp_path: Path) -> None:
    with started(CONVERSION, tmp_path / "out") as process:
        assert process.stdout is not None and process.stdout.readline() == "writing\n"
        (partial,) = tmp_path.iterdir()
        assert partial.name.startswith(".out.partial-")
        process.terminate()
        assert process.communicate(timeout=30) == ("", "")
    assert process.returncode == 143 and list(tmp_path.iterdir()) == []


def test_a_forked_worker_dies_of_the_signal() -> None:
    with started(WORKER) as process:
        assert process.communicate(timeout=30) == ('{"exitcode": -15}\n', "")


def test_the_signal_is_the_caller_s_again() -> None:
    before = signal.getsignal(signal.SIGTERM)
    run_tool(dict, as_json=False)
    assert signal.getsignal(signal.SIGTERM) == before
