"""What the common state of a checkpoint says in plain dictionaries, lists and numbers.

It is a pickle of the run's arguments, schedule and groups of parameters. Megatron reads it whole, with its own classes;
to import them takes seconds and a hundred megabytes. Here nothing is imported and nothing of the pickle runs: whatever
is not plain is left out.
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

from megatron_slim.checkpoint.archives import Window, pickle_of
from megatron_slim.checkpoint.metadata_pickle import Metadata, MetadataIndex
from megatron_slim.checkpoint.raw_files import OpenFile
from megatron_slim.checkpoint.torch_dist_names import COMMON_STATE


class LeftOut:
    """Stands for all that is not plain: a class, what is made of it, and what that is asked for."""

    def __new__(cls, *_args: object, **_kwargs: object) -> LeftOut:
        """Whatever it is made of."""
        return object.__new__(cls)

    def __init__(self, *_args: object, **_kwargs: object) -> None:
        """Keep nothing."""

    def _ignore(self, *_args: object, **_kwargs: object) -> LeftOut:
        return self

    __setstate__ = __setitem__ = __call__ = append = extend = add = _ignore


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> object:
        return dict if (module, name) == ("collections", "OrderedDict") else LeftOut

    def persistent_load(self, pid: object) -> object:
        return LeftOut()


def read_plain_state(directory: Path, metadata: Metadata) -> Any:
    """What is plain of the common state; None where that cannot be read, or is not where Megatron 0.19 puts it.

    Args:
        directory: of an iteration.
        metadata: its metadata.
    """
    info = metadata.storage_data.get(MetadataIndex(COMMON_STATE))
    if info is None or Path(info.relative_path).name != info.relative_path:
        return None
    try:
        opened = OpenFile(directory / info.relative_path)
        window = io.BufferedReader(Window(opened.descriptor, info.offset, info.length))
        return _PlainUnpickler(io.BytesIO(pickle_of(window, info.length))).load()
    except Exception:  # any exception: the bytes are not ours
        return None
