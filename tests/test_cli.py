"""What all tools share: how they end, and what they show meanwhile."""

from __future__ import annotations

import ast
import errno
import io
import json
import logging
import os
import re
import select
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron_slim import reporting
from megatron_slim.cli import terminal
from megatron_slim.cli.terminal import TerminalProgress, messages_shown
from megatron_slim.cli.tool import run_tool
from megatron_slim.errors import SlimError
from megatron_slim.reporting import byte_progress, count_progress, progress, use_progress
from tests.signals import default_signals

ROOT = Path(__file__).resolve().parents[1]
HEAD = """
import multiprocessing, os, sys, time
from pathlib import Path
from megatron_slim.cli.terminal import say
from megatron_slim.cli.tool import run_tool
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
import signal

def work(pipe):
    pipe.send([signal.getsignal(number) is signal.SIG_DFL for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)])
    time.sleep(60)

def start():
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    worker = context.Process(target=work, args=(theirs,))
    worker.start()
    default = ours.recv()
    worker.terminate()
    worker.join()
    return {"default": default, "exitcode": worker.exitcode}

run_tool(start, as_json=True)
"""
TALK = """
def talk():
    with new_directory(Path(sys.argv[1])) as partial:
        (partial / "model.safetensors").write_bytes(b"all of it")
        sys.stdin.read()
        if sys.argv[2] == "stderr":
            say("a message")
    return {"a": "result"}

run_tool(talk, as_json=True)
"""
WORKER_LEFT = """
def send():
    ours, theirs = multiprocessing.Pipe()
    theirs.close()
    ours.send("work")

run_tool(send, as_json=False)
"""


class Deaf(io.StringIO):
    def write(self, text: str) -> int:
        raise OSError(errno.EIO, "the terminal is gone")


def started(script: str, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", HEAD + script, *map(str, arguments)]
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command, cwd=ROOT, stdin=pipe, stdout=pipe, stderr=pipe, text=True, preexec_fn=default_signals
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_tool_that_is_stopped_leaves_nothing_behind(tmp_path: Path, number: signal.Signals) -> None:
    with started(CONVERSION, tmp_path / "out") as process:
        assert process.stdout is not None and process.stdout.readline() == "writing\n"
        assert (tmp_path / ".out.partial" / "model.safetensors").read_bytes() == b"half"
        assert not (tmp_path / "out").exists()
        process.send_signal(number)
        assert process.communicate(timeout=30) == ("", "")
    assert process.returncode == 128 + number and list(tmp_path.iterdir()) == []


def test_a_forked_worker_dies_of_the_signal() -> None:
    # Without a handler of Python, which a signal right before a call that waits would not reach.
    with started(WORKER) as process:
        found, errors = process.communicate(timeout=30)
    assert errors == "" and json.loads(found) == {"default": [True, True, True], "exitcode": -15}


def test_signals_are_the_caller_s_again_and_nohup_is_heeded(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        run_tool(lambda: os.kill(os.getpid(), signal.SIGHUP) or {}, as_json=False)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before[signal.SIGHUP])
    run_tool(dict, as_json=False)
    assert {number: signal.getsignal(number) for number in numbers} == before


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_reader_that_has_left_ends_the_tool(tmp_path: Path, stream: str) -> None:
    with started(TALK, tmp_path / "out", stream) as process:
        assert process.stdin is not None and process.stdout is not None and process.stderr is not None
        closed, other = (process.stdout, process.stderr) if stream == "stdout" else (process.stderr, process.stdout)
        closed.close()
        process.stdin.close()
        assert other.read() == ""
        assert process.wait(timeout=30) == 128 + signal.SIGPIPE
    # Messages are said while it writes, results when the output is complete.
    assert os.listdir(tmp_path) == (["out"] if stream == "stdout" else [])


def test_a_worker_that_has_left_is_a_fault_of_ours() -> None:
    with started(WORKER_LEFT) as process:
        _, stderr = process.communicate(timeout=30)
    assert process.returncode == 1 and stderr.rstrip().endswith("BrokenPipeError: [Errno 32] Broken pipe")


def ended(main: Callable[[], object], capsys: pytest.CaptureFixture[str]) -> tuple[object, str]:
    """Exit code and standard error of a tool."""
    with pytest.raises(SystemExit) as caught:
        run_tool(lambda: (main() and {}) or {}, as_json=False)
    return caught.value.code, capsys.readouterr().err


def refusal(code: int, *name: str) -> Callable[[], object]:
    def refuse() -> None:
        raise OSError(code, os.strerror(code), *name)

    return refuse


@pytest.mark.parametrize(
    ("code", "line"),
    [
        (errno.ENOSPC, "no space left on device; make space"),
        (errno.EDQUOT, "disk quota exceeded; make space or ask for a larger quota"),
        (errno.EFBIG, "file too large; raise the limit of file sizes (ulimit -f)"),
        (errno.EIO, "input/output error; check the storage it is on and run again"),
        (errno.ESTALE, "stale file handle; check the storage it is on and run again"),
        (errno.EROFS, "read-only file system; choose a place that can be written"),
        (errno.EACCES, "permission denied; check its permissions"),
        (errno.EPERM, "operation not permitted; check its permissions"),
        (errno.EMFILE, "too many open files; raise the limit of open files (ulimit -n)"),
        (errno.ENAMETOOLONG, "file name too long; choose a shorter name"),
        (errno.ENOTDIR, "not a directory; choose another name"),
    ],
)
def test_what_the_system_refuses_is_one_line(code: int, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert ended(refusal(code, "/x/out"), capsys) == (2, f"error: /x/out: {line}\n")
    assert ended(refusal(code), capsys) == (2, f"error: {line}\n")


def test_a_name_that_the_system_finds_too_long(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, line = ended((tmp_path / ("x" * 300)).mkdir, capsys)
    assert code == 2 and line.endswith("xxx: file name too long; choose a shorter name\n") and str(tmp_path) in line


@pytest.mark.parametrize("allocate", [lambda: bytearray(1 << 62), lambda: torch.empty(1 << 58)])
def test_too_little_memory_is_one_line(allocate: Callable[[], object], capsys: pytest.CaptureFixture[str]) -> None:
    code, line = ended(allocate, capsys)
    assert code == 2 and re.fullmatch(r"error: not enough memory.*; free memory or take a machine with more\n", line)


@pytest.mark.parametrize("error", [FileNotFoundError(errno.ENOENT, "no"), ValueError("v"), OSError("bare"), KeyError()])
def test_a_fault_of_ours_keeps_its_traceback(error: Exception) -> None:
    def fail() -> None:
        raise error

    with pytest.raises(type(error)) as caught:
        run_tool(fail, as_json=False)  # type: ignore[arg-type]
    assert caught.value is error


def test_nobody_hears_and_the_exit_code_is_still_right(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise SlimError("wrong")

    monkeypatch.setattr(sys, "stderr", Deaf())
    with pytest.raises(SystemExit) as caught:
        run_tool(fail, as_json=False)  # type: ignore[arg-type]
    assert caught.value.code == 2


def test_progress_in_a_log_is_a_line_every_half_minute(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 1000.0
    monkeypatch.setattr(reporting, "monotonic", lambda: now)
    with messages_shown(), byte_progress("writing", 163_000_000_000) as advance:
        for step in range(240):
            now += 0.25
            advance(152_500_000)
            assert step != 118 or capsys.readouterr().err == ""
    assert capsys.readouterr().err.splitlines() == [
        "writing: 18.3 of 163.0 GB, 0.61 GB/s, 4 min left",
        "writing: 36.6 of 163.0 GB, 0.61 GB/s, 3 min left",
    ]


def test_progress_of_items_in_a_log(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    now = 1000.0
    monkeypatch.setattr(reporting, "monotonic", lambda: now)
    with messages_shown():
        for number in progress(range(8), "blocks"):
            now += 12.0 + number
    assert capsys.readouterr().err.splitlines() == [
        "blocks: 3 of 8, 1 min left",
        "blocks: 5 of 8, 42 s left",
        "blocks: 7 of 8, 15 s left",
    ]


def test_progress_of_an_unknown_number_in_a_log(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 1000.0
    monkeypatch.setattr(reporting, "monotonic", lambda: now)
    with messages_shown(), count_progress("tokenizing", "tokens") as advance:
        for _ in range(5):
            now += 10.0
            advance(1500)
    assert capsys.readouterr().err == "tokenizing: 4,500 tokens, 150 tokens/s\n"


def test_only_commands_print() -> None:
    """A library that prints cannot be used by another program; processes that end on an error are the exception."""
    found = []
    for path in sorted((ROOT / "megatron_slim").rglob("*.py")):
        calls = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
        prints = any(isinstance(call.func, ast.Name) and call.func.id == "print" for call in calls)
        if prints and path.parent.name != "cli":
            found.append(path.name)
    assert found == ["processes.py"]


def test_without_a_command_the_library_is_silent(capsys: pytest.CaptureFixture[str]) -> None:
    with byte_progress("writing", 100) as advance:
        advance(100)
    logging.getLogger("megatron_slim.x").info("a message")
    assert capsys.readouterr() == ("", "")


def test_messages_go_where_a_program_wants_them(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "megatron_slim"):
        logging.getLogger("megatron_slim.x").info("a message")
    assert caplog.messages == ["a message"]


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0 s"), (59, "59 s"), (60, "1 min"), (9000, "2.5 h")])
def test_durations(seconds: float, text: str) -> None:
    assert reporting.duration(seconds) == text


def test_progress_on_a_terminal_is_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    ours, theirs = os.openpty()
    now = 1000.0
    with os.fdopen(ours, "rb", buffering=0) as screen, os.fdopen(theirs, "w") as screen_end:
        monkeypatch.setattr(sys, "stderr", screen_end)
        monkeypatch.setattr(terminal, "monotonic", lambda: now)
        with use_progress(TerminalProgress()), byte_progress("writing", 8_000_000_000) as advance:
            for _ in range(4):
                now += 0.5
                advance(1_000_000_000)
        screen_end.flush()
        text = b""
        while b"4.0 of 8.0 GB" not in text and select.select([screen], [], [], 10)[0]:
            text += screen.read(100_000)
        while select.select([screen], [], [], 0.2)[0]:
            text += screen.read(100_000)
        shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text.decode())
    assert "writing" in shown and "4.0 of 8.0 GB" in shown and "2.0 GB/s" in shown and "0:00:02" in shown
