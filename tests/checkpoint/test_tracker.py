"""What a run resumes from after every way in which the last one can have died."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_slim.checkpoint import tracker
from megatron_slim.checkpoint.tracker import repair_tracker
from megatron_slim.errors import CheckpointError

TRACKER = "latest_checkpointed_iteration.txt"


@pytest.fixture
def run(tiny_release: Path, tmp_path: Path) -> Path:
    """A run that saved at 2, 4 and 10, in that order."""
    for when, number in enumerate((2, 4, 10)):
        shutil.copytree(tiny_release, tmp_path / f"iter_{number:07d}")
        os.utime(tmp_path / f"iter_{number:07d}" / ".metadata", (1000 + when, 1000 + when))
    (tmp_path / TRACKER).write_text("10")
    return tmp_path


def half_written(run: Path) -> None:
    """Killed while the newest was being saved: no .metadata yet."""
    (run / "iter_0000010" / ".metadata").unlink()


def truncated(run: Path) -> None:
    file = next((run / "iter_0000010").glob("*.distcp"))
    file.write_bytes(file.read_bytes()[:-1])


def lost_file(run: Path) -> None:
    next((run / "iter_0000010").glob("*.distcp")).unlink()


def abandoned(run: Path) -> None:
    """Went back to 2 and saved 4 again: 10 is of another attempt."""
    os.utime(run / "iter_0000004" / ".metadata", (5000, 5000))


def nothing(run: Path) -> None:
    pass


def nothing_complete(run: Path) -> None:
    for metadata in run.glob("iter_*/.metadata"):
        metadata.unlink()


def gone(run: Path) -> None:
    shutil.rmtree(run / "iter_0000010")


# Content of the tracker (None: there is none), what else happened, what the tracker must hold then.
REPAIRED: dict[str, tuple[str | None, Callable[[Path], None], str]] = {
    "whole": ("10", nothing, "10"),
    "killed while saving, the tracker names an older one": ("4", half_written, "4"),
    "set back by hand": ("2", nothing, "2"),
    "killed in the write of the tracker": ("", nothing, "10"),
    "killed before the first tracker": (None, nothing, "10"),
    "empty, and the newest is half written": ("", half_written, "4"),
    "empty, and the newest lost its end": ("\n", truncated, "4"),
}
TO_RESUME = "; to resume from a complete checkpoint write "
REFUSED: dict[str, tuple[str | None, Callable[[Path], None], str]] = {
    "garbage": ("1x", nothing, f"holds '1x', neither 'release' nor a number{TO_RESUME}2 or 4 or 10 into "),
    "binary": ("\0\0", nothing, f"neither 'release' nor a number{TO_RESUME}"),
    "names nothing": ("7", nothing, f"names iter_0000007, which does not exist{TO_RESUME}2 or 4 or 10 into "),
    "names what is gone": ("10", gone, f"names iter_0000010, which does not exist{TO_RESUME}2 or 4 into "),
    "names what is half written": ("10", half_written, "names iter_0000010, which is incomplete: no .metadata"),
    "names what is truncated": ("10", truncated, f"incomplete: __0_0.distcp is truncated{TO_RESUME}2 or 4 into "),
    "names what lost a file": ("10", lost_file, f"incomplete: __0_0.distcp is missing{TO_RESUME}2 or 4 into "),
    "empty, and two are possible": ("", abandoned, f"holds '', and the last one is unclear{TO_RESUME}2 or 4 or 10"),
    "missing, and two are possible": (None, abandoned, f"is missing, and the last one is unclear{TO_RESUME}"),
    "empty next to nothing": ("", nothing_complete, "holds ''; there is no complete checkpoint next to it: remove "),
}


def prepare(run: Path, content: str | None, change: Callable[[Path], None]) -> None:
    (run / TRACKER).unlink() if content is None else (run / TRACKER).write_text(content)
    change(run)


@pytest.mark.parametrize("case", REPAIRED)
def test_resumes(run: Path, case: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "megatron_slim")
    content, change, wanted = REPAIRED[case]
    prepare(run, content, change)
    repair_tracker(run, rank=0)
    assert (run / TRACKER).read_text() == wanted
    assert len(caplog.messages) == (content != wanted)
    assert all(f"resuming from iter_{int(wanted):07d}" in message for message in caplog.messages)


@pytest.mark.parametrize("case", REFUSED)
def test_refused(run: Path, case: str) -> None:
    content, change, message = REFUSED[case]
    prepare(run, content, change)
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    for rank in (0, 1):
        with pytest.raises(CheckpointError) as caught:
            repair_tracker(run, rank=rank)
        assert message in str(caught.value) and "\n" not in str(caught.value), str(caught.value)
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


def test_nothing_was_saved(tmp_path: Path) -> None:
    """Killed in its first save: the run starts anew, and writes over what there is."""
    repair_tracker(tmp_path / "not-yet", rank=0)
    (tmp_path / "iter_0000002").mkdir()
    repair_tracker(tmp_path, rank=1)
    assert not (tmp_path / TRACKER).exists()


def test_other_ranks_wait_for_the_first(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (run / TRACKER).write_text("")
    waiting = threading.Thread(target=repair_tracker, args=(run,), kwargs={"rank": 3})
    waiting.start()
    time.sleep(0.05)
    assert waiting.is_alive() and (run / TRACKER).read_text() == ""
    repair_tracker(run, rank=0)
    waiting.join(timeout=10)
    assert not waiting.is_alive()
    (run / TRACKER).write_text("")
    monkeypatch.setattr(tracker, "SECONDS_FOR_TRACKER", 0.0)
    with pytest.raises(CheckpointError, match="rank 0 did not repair it"):
        repair_tracker(run, rank=3)
