"""The collector is off where it should be, and on afterwards."""

from __future__ import annotations

import gc
import subprocess
import sys

import pytest

from megatron_slim.garbage import without_collection


def test_collection_is_off_within_and_on_afterwards() -> None:
    with pytest.raises(KeyError), without_collection(), without_collection():
        assert not gc.isenabled()
        raise KeyError
    assert gc.isenabled()


def test_one_who_has_switched_it_off_keeps_it_off() -> None:
    gc.disable()
    try:
        with without_collection():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_a_cycle_is_not_collected_at_exit() -> None:
    """Only then is nothing gone through; what `atexit` has to do is done."""
    code = (
        "import atexit, gc, sys\n"
        "from megatron_slim.garbage import no_collection_at_exit\n"
        "class Cycle:\n"
        "    def __init__(self): self.me = self\n"
        "    def __del__(self): print('collected')\n"
        "gc.disable()\n"
        "if 'quick' in sys.argv: no_collection_at_exit()\n"
        "atexit.register(print, 'atexit')\n"
        "Cycle()\n"
    )
    outputs = [
        subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True, check=True).stdout.split()
        for argv in ([], ["quick"])
    ]
    assert outputs == [["atexit", "collected"], ["atexit"]]
