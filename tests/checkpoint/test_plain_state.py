"""The common state of a checkpoint, read without running anything of it."""

from __future__ import annotations

import argparse
import io
import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

from megatron_slim.checkpoint.plain_state import LeftOut, _PlainUnpickler


def read(value: Any) -> Any:
    return _PlainUnpickler(io.BytesIO(pickle.dumps(value))).load()


class Touches:
    """Makes a file when it is unpickled as usual."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return (Path.touch, (self.file,))


def test_what_is_plain_is_read_as_it_is() -> None:
    value = {"iteration": 7, "groups": [{"lr": 1e-4, "betas": (0.9, 0.95), "step": 7}], "order": OrderedDict(a=None)}
    assert read(value) == value


def test_nothing_of_it_runs_and_what_is_not_plain_is_left_out(tmp_path: Path) -> None:
    file = tmp_path / "made"
    pickle.loads(pickle.dumps(Touches(file)))
    assert file.exists()
    file.unlink()
    found = read({"args": argparse.Namespace(lr=1.0), "touches": Touches(file), "step": 3})
    assert not file.exists()
    assert found["step"] == 3 and isinstance(found["args"], LeftOut) and isinstance(found["touches"], LeftOut)
