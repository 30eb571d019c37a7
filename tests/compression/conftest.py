"""Training looks at its arguments before a run starts: here without the import of Megatron that takes seconds."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_slim.compression import checks
from megatron_slim.testing import FORKSERVER


def _program(words: Sequence[str], environment: Mapping[str, str], folder: Path) -> None:
    """``python -m MODULE ARGUMENTS``, with its output in two files."""
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT), number)
    os.environ.update(environment)
    sys.argv = [*words[2:]]
    runpy.run_module(words[2], run_name="__main__", alter_sys=True)


@pytest.fixture(autouse=True)
def forked_check(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Programs of modules are forked from a server that has imported Megatron."""

    def run(words: Sequence[str], **options: Any) -> subprocess.CompletedProcess[str]:
        if "--check-arguments" not in words or words[1] != "-m":
            return subprocess.run(words, **options)
        folder = tmp_path_factory.mktemp("check")
        process = FORKSERVER.Process(target=_program, args=(words, options["env"], folder))
        process.start()
        process.join()
        output, errors = ((folder / name).read_text() for name in ("stdout", "stderr"))
        return subprocess.CompletedProcess(words, process.exitcode or 0, output, errors)

    monkeypatch.setattr(checks, "subprocess", SimpleNamespace(run=run))
