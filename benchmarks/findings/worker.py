"""Commands in processes that are forked from one in which everything is imported: the imports take seconds.

Each command has a process of its own, because Megatron keeps the arguments of a run for its whole process. The server
they are forked from ends with the driver, and they end with the server.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import multiprocessing
import os
import sys
import time
import traceback
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import psutil

from benchmarks.findings.commands import Command
from benchmarks.processes import free_port
from megatron_slim.errors import SlimError, last_error
from megatron_slim.processes import die_with_parent, exit_at_once

PRELOAD = "benchmarks.findings.preload"


def named(what: str) -> Any:
    """A function by ``module:name``."""
    module, _, name = what.partition(":")
    return getattr(importlib.import_module(module), name)


def execute(command: Command) -> None:
    """Run a command in this process; what it gives is the last line of standard output."""
    if command.prepare:
        named(command.prepare)()
    if command.function:
        print(json.dumps(named(command.function)(**command.arguments), allow_nan=False))
        return
    from megatron_slim.cli.main import main

    sys.argv = ["megatron-slim", *command.argv]
    main()


def _child(command: Command, logs: str, env: dict[str, str]) -> None:
    """Body of a process."""
    die_with_parent()
    for descriptor, end in ((1, "out"), (2, "err")):
        opened = os.open(Path(logs, f"{command.name}.{end}"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        os.dup2(opened, descriptor)
        os.close(opened)
    os.environ.update(env)
    status = 0
    try:
        execute(command)
    except SystemExit as exit_:
        status = exit_.code if isinstance(exit_.code, int) else int(exit_.code is not None)
    except SlimError as error:
        print(f"error: {error}", file=sys.stderr)
        status = 2
    except BaseException:
        traceback.print_exc()
        status = 1
    exit_at_once(status)


class Running:
    """A command that runs.

    Attributes:
        command: which.
        seconds: that it took, when it has ended.
    """

    def __init__(self, command: Command, logs: Path) -> None:
        """Start it."""
        self.command, self.logs, self.seconds = command, logs, 0.0
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([PRELOAD])
        env = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        self._started = time.monotonic()
        self.process: BaseProcess = context.Process(target=_child, args=(command, str(logs), env))
        self.process.start()

    @property
    def sentinel(self) -> Any:
        """Of `multiprocessing.connection.wait`."""
        return self.process.sentinel

    def spent(self) -> float:
        """Seconds since it was started."""
        return time.monotonic() - self._started

    def result(self) -> dict[str, Any]:
        """Of a command that has ended; nothing of one that gives none.

        Raises:
            SlimError: it has failed, and why.
        """
        self.process.join()
        self.seconds = self.spent()
        out, err = (
            (self.logs / f"{self.command.name}.{end}").read_text(errors="replace")
            if (self.logs / f"{self.command.name}.{end}").exists()
            else ""
            for end in ("out", "err")
        )
        if self.process.exitcode:
            lines = err.strip().splitlines() or [f"exit code {self.process.exitcode}"]
            what = last_error(err) or lines[-1]
            raise SlimError(f"{self.command.name} failed: {what}", where=str(self.logs), fix="see its logs, run again")
        if not self.command.function and "--json" not in self.command.argv:
            return {}
        found: dict[str, Any] = json.loads(out.strip().splitlines()[-1])
        return found

    def end(self) -> None:
        """Kill it and what it has started."""
        if self.process.exitcode is None and self.process.pid is not None:
            with contextlib.suppress(psutil.NoSuchProcess):
                for child in psutil.Process(self.process.pid).children(recursive=True):
                    child.kill()
            self.process.kill()
        self.process.join()


def run_all(commands: list[Command], logs: Path) -> dict[str, dict[str, Any]]:
    """Run commands one after the other; their results by name."""
    found = {}
    for command in commands:
        running = Running(command, logs)
        try:
            found[command.name] = running.result()
        finally:
            running.end()
    return found
