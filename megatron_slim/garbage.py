"""Python's garbage collector, switched off where it only takes time."""

from __future__ import annotations

import atexit
import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def without_collection() -> Iterator[None]:
    """No collection within: where very many objects are made and all stay, going through them again and again is slow.

    It takes a fifth of the time in which the modules of a large model are built, and half of that of large pickles.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def no_collection_at_exit() -> None:
    """Have the interpreter end without a last collection, which takes a second once Megatron has been imported."""
    atexit.register(gc.freeze)
