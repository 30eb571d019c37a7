"""Which directory of a torch_dist checkpoint has the weights."""

from __future__ import annotations

import re
from pathlib import Path

from megatron_slim.checkpoint.torch_dist_names import METADATA, RELEASE, TRACKER
from megatron_slim.errors import CheckpointError

_WEIGHTS = re.compile(rf"iter_\d+|{RELEASE}")  # directories with weights, below that of the checkpoint


def iteration_directory(path: Path) -> Path:
    """The directory of the weights: ``path`` itself, or what its latest_checkpointed_iteration.txt names.

    Raises:
        CheckpointError: there is no checkpoint, or the tracker file is torn.
    """
    if not path.is_dir():
        what = "is a file, not a checkpoint directory" if path.exists() else "no such directory"
        raise CheckpointError(what, where=str(path))
    tracker = path / TRACKER
    if not tracker.is_file():
        return path
    text = tracker.read_text(errors="replace").strip()
    if text != RELEASE and not text.isdecimal():
        raise CheckpointError(f"holds {text[:40]!r}, neither 'release' nor a number", where=str(tracker))
    found = path / (RELEASE if text == RELEASE else f"iter_{int(text):07d}")
    if not found.is_dir():
        raise CheckpointError(f"names {found.name}, which does not exist", where=str(tracker))
    return found


def roots(checkpoint: Path) -> list[Path]:
    """Directories that may have what goes with weights: their own, and that above an iteration or a release."""
    place = checkpoint.absolute()
    return [place, *([place.parent] if _WEIGHTS.fullmatch(place.name) else [])]


def has_saved(run: Path) -> bool:
    """Whether a run has saved a checkpoint in its directory: until then nothing that is there is of any weights.

    Metadata are written last: an iteration without them was killed on the way.
    """
    return (run / TRACKER).is_file() or any((each / METADATA).is_file() for each in run.glob("iter_*"))


def is_torch_dist(path: Path) -> bool:
    """Whether a directory looks like a torch_dist checkpoint."""
    return (path / TRACKER).is_file() or (path / METADATA).is_file()
