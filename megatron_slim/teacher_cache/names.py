"""Names of the files of a teacher's cache, and whether a directory is one (no torch)."""

from __future__ import annotations

from pathlib import Path

CACHE, HEAD, RECORDING, CONFIG = "cache.json", "head.safetensors", "recording.json", "config.json"


def is_cache(path: Path) -> bool:
    """Whether a path names a cache, finished or not."""
    return any((path / name).is_file() for name in (CACHE, RECORDING))


def is_finished(path: Path) -> bool:
    """Whether a path names a cache that was recorded to its end."""
    return (path / CACHE).is_file()
