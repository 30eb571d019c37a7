"""Preprocessing that is killed, refused by the system or stopped: a data set is whole or cannot be opened."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import megatron_slim.mcore

import numpy as np
import pytest

from megatron_slim import encoding, preprocessing
from megatron_slim.cli.tool import run_tool
from megatron_slim.data import read_stream
from megatron_slim.encoding import Options
from megatron_slim.errors import DataError

TEXT = "written whole or not at all\n" * 2000
Start = Callable[..., Callable[[], Any]]


@pytest.fixture
def main(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Makes ``data/out_text_document`` of one text, one token per byte."""
    import megatron.core.datasets.indexed_dataset  # noqa: F401 (a child has it already)

    bytewise = SimpleNamespace(vocab_size=256, eod=None, encode=lambda texts: [list(text.encode()) for text in texts])
    monkeypatch.setattr(encoding, "load_tokenizer", lambda kind, model: bytewise)
    (tmp_path / "text.txt").write_text(TEXT)
    (tmp_path / "data").mkdir()
    options = Options("", Path())
    run = preprocessing.preprocess
    return lambda: run_tool(lambda: run([tmp_path / "text.txt"], tmp_path / "data/out", options), as_json=False)


def assert_whole(prefix: Path) -> None:
    assert np.array_equal(read_stream(prefix), np.frombuffer(TEXT.encode(), np.uint8))
    for suffix in (".bin", ".idx"):
        Path(f"{prefix}{suffix}").unlink()


def do(number: signal.Signals) -> Callable[[str, Any], None]:
    return lambda name, argument: os.kill(os.getpid(), number)


def refuse(name: str, argument: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("action", [do(signal.SIGKILL), do(signal.SIGTERM), refuse], ids=["kill", "stop", "refuse"])
def test_disturbed_at_any_operation(
    main: Callable[[], None], tmp_path: Path, start: Start, action: Callable[[str, Any], None]
) -> None:
    data, prefix = tmp_path / "data", tmp_path / "data" / "out_text_document"
    undisturbed = start(main)()
    assert undisturbed.code == 0 and len(os.listdir(data)) == 2, undisturbed.stderr
    assert_whole(prefix)
    for at in range(1, undisturbed.operations + 1):
        ended = start(main, at=at, action=action)()
        if action is refuse:
            assert "no space left on device; make space" in ended.error
        else:
            assert -ended.code in (signal.SIGKILL, -128 - signal.SIGTERM), ended.stderr
        left = os.listdir(data)
        if f"{prefix.name}.idx" in left:
            assert_whole(prefix)
        elif ended.code != -signal.SIGKILL:
            assert left == [], f"operation {at}"
        else:
            with pytest.raises((DataError, FileNotFoundError)):
                read_stream(prefix)
    again = start(main)()
    assert again.code == 0, again.stderr
    assert_whole(prefix)
    assert os.listdir(data) == []
