"""What functions of the Python API are given: checkpoints and data by value or by path, and a reporter of progress."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

from megatron_slim.checkpoint.convert import Checkpoint, log_left_out, open_checkpoint
from megatron_slim.errors import SlimError
from megatron_slim.reporting import Progress, use_progress

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Data: TypeAlias = str | os.PathLike[str] | npt.NDArray[np.int64]


StrPath: TypeAlias = str | os.PathLike[str]


Format: TypeAlias = Literal["hf", "torch_dist"]


def expect(value: object, kind: type, name: str, fix: str) -> None:
    """Refuse an argument of another type, such as the path of what is expected."""
    if not isinstance(value, kind):
        raise SlimError(f"is of type {type(value).__name__}, not {kind.__name__}", where=name, fix=fix)


def above_zero(**numbers: int | None) -> None:
    """Refuse numbers, by their names, unless they are whole and above zero; None stands for a default.

    Raises:
        SlimError: the first that is not.
    """
    for name, number in numbers.items():
        if number is not None and (type(number) is not int or number < 1):
            raise SlimError(f"{number!r} is not a whole number above zero", where=name)


def data_of(data: Data) -> Path | npt.NDArray[np.int64]:
    """Data as the readers take it."""
    return Path(data) if isinstance(data, (str, os.PathLike)) else data


def opened(checkpoint: Checkpoint | StrPath) -> Checkpoint:
    """A checkpoint that is given by value or by path.

    Raises:
        SlimError: it is neither, or cannot be opened.
    """
    if not isinstance(checkpoint, (str, os.PathLike)):
        if not hasattr(checkpoint, "read_rows"):
            raise SlimError(
                f"is of type {type(checkpoint).__name__}, not a checkpoint",
                where="checkpoint",
                fix="give its path, or open it with open_checkpoint",
            )
        return checkpoint
    source = open_checkpoint(Path(checkpoint))
    log_left_out(source)
    return source


@contextlib.contextmanager
def shown(progress: Progress | None) -> Iterator[None]:
    """Report progress to what the caller gives, in a ``with`` statement; without one it is logged."""
    with use_progress(progress) if progress is not None else contextlib.nullcontext():
        yield
