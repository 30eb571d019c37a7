"""What functions of the Python API are given: checkpoints and data by value or by path, and a reporter of progress."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias, TypeVar

import numpy as np

from megatron_slim.checkpoint.convert import Checkpoint, log_left_out, open_checkpoint
from megatron_slim.errors import SlimError
from megatron_slim.reporting import Progress, use_progress

if TYPE_CHECKING:
    import numpy.typing as npt

    Data: TypeAlias = str | os.PathLike[str] | npt.NDArray[np.int64]


StrPath: TypeAlias = str | os.PathLike[str]


Format: TypeAlias = Literal["hf", "torch_dist"]
Number = TypeVar("Number", int, "int | None")


def expect(value: object, kind: type, name: str, fix: str) -> None:
    """Refuse an argument of another type, such as the path of what is expected."""
    if not isinstance(value, kind):
        raise SlimError(f"is of type {type(value).__name__}, not {kind.__name__}", where=name, fix=fix)


def above_zero(name: str, number: Number) -> Number:
    """A number that is whole, of NumPy too, and above zero, as an int; None, which stands for a default, as it is.

    Raises:
        SlimError: it is another, or no number.
    """
    if number is None:
        return number
    if not isinstance(number, Integral) or isinstance(number, bool) or number < 1:
        raise SlimError(f"{number!r} is not a whole number above zero", where=name)
    return int(number)


def data_of(data: Data) -> Path | npt.NDArray[np.int64]:
    """Data as the readers take it.

    Raises:
        SlimError: it is neither a path nor an array of NumPy.
    """
    if isinstance(data, (str, os.PathLike)):
        return Path(data)
    if not isinstance(data, np.ndarray):
        fix = "give a path, or a NumPy array of token ids [samples, sequence]"
        raise SlimError(f"is of type {type(data).__name__}, not a path or an array", where="data", fix=fix)
    return data


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
