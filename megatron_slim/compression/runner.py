"""Running the steps that are not done yet, each as a process that ends with this one."""

from __future__ import annotations

import json
import logging
import subprocess
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from megatron_slim.compression.state import DONE, FAILED, RUNNING, RunState
from megatron_slim.compression.steps import TRAIN, Step, command_line
from megatron_slim.errors import EXIT_USER_ERROR, SlimError, last_error
from megatron_slim.files import write_atomic
from megatron_slim.processes import run_to_end

logger = logging.getLogger(__name__)

EXIT_DIED = 1  # a process died, or a bug of ours
_LINES = 12  # of its log that a failed step shows


def run_steps(steps: Sequence[Step], state: RunState, save: Path) -> None:
    """Run what is not done, in order.

    Raises:
        SlimError: a step found an error that a user can fix, or left before it was done.
        SystemExit: a step died.
    """
    for folder in ("logs", "results", *{str(step.output.parent) for step in steps}):
        (save / folder).mkdir(parents=True, exist_ok=True)
    for number, step in enumerate(steps, 1):
        title = f"{number}/{len(steps)} {step.name}"
        if step.done():
            if not step.result.is_file():
                _recover(step, save)
            if state.steps[step.name]["state"] != DONE:
                state.set(step, DONE)
            logger.info(f"{title}: done before")
            continue
        logger.info(f"{title}: running, log {save / 'logs' / step.log_name}.err")
        state.set(step, RUNNING)
        begin = time.monotonic()
        try:
            _run(step, save)
        except BaseException:
            state.set(step, FAILED, time.monotonic() - begin)
            raise
        state.set(step, DONE, time.monotonic() - begin)
        logger.info(f"{title}: {time.monotonic() - begin:.0f} s")


def _run(step: Step, save: Path) -> None:
    code, last = _process(command_line(step), save / "logs" / step.log_name)
    log = save / "logs" / f"{step.log_name}.err"
    if code:
        text = log.read_text(errors="replace")
        if code == EXIT_USER_ERROR and (found := last_error(text)):
            raise SlimError(f"step {step.name}: {found}")
        for line in text.strip().splitlines()[-_LINES:]:
            logger.error(line)
        logger.error(f"error: {log}: step {step.name} ended with exit code {code}; run again to resume")
        raise SystemExit(EXIT_DIED)
    if step.kind == TRAIN:
        if not step.done():
            raise SlimError(f"step {step.name} was stopped before its end", where=str(log), fix="run again to resume")
        _recover(step, save)
    else:
        _write_result(step, last)
    if not step.done():
        raise SlimError(f"step {step.name} left no {step.output}", where=str(log), fix="run again")


def _recover(step: Step, save: Path) -> None:
    """Give a step that is done its result."""
    if step.recover is None:
        _write_result(step, "{}")
        return
    asked = replace(step, command=step.recover)
    code, last = _process(command_line(asked), save / "logs" / f"{step.log_name}-result")
    _write_result(step, last if code == 0 else "{}")


def _write_result(step: Step, last: str) -> None:
    """The last line of a command's output, which is JSON with ``--json``."""
    json.loads(last)
    write_atomic(step.result, last + "\n")


def _process(command: Sequence[str], log: Path) -> tuple[int, str]:
    """Run a command to its end, its output in files; gives its exit code and the last line of its output."""
    out, err = (Path(f"{log}.{kind}") for kind in ("out", "err"))
    with out.open("wb") as stdout, err.open("wb") as stderr:
        code = run_to_end(command, stdout=stdout, stderr=stderr, stdin=subprocess.DEVNULL)
    lines = out.read_text(errors="replace").strip().splitlines()
    return code, lines[-1] if lines else ""
