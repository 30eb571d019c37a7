"""``integrity.json``: SHA-256 of every file of a torch_dist checkpoint, as Megatron's ``--verify-integrity`` has it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

from megatron_slim.checkpoint.torch_dist_names import BACKEND, INTEGRITY, METADATA
from megatron_slim.errors import CheckpointError, summarise
from megatron_slim.files import read_json
from megatron_slim.reporting import byte_progress

_AT_ONCE = 8 << 20


def read_manifest(directory: Path) -> dict[str, str]:
    """Hashes by file name; a file that they do not name would not be looked at.

    Raises:
        CheckpointError: there is no manifest, or it names other files than there are.
    """
    if not (directory / INTEGRITY).is_file():
        fix = "only what was saved with --verify-integrity, or converted, can be verified: leave the flag out"
        raise CheckpointError(f"no {INTEGRITY}", where=str(directory), fix=fix)
    manifest = read_json(directory / INTEGRITY)
    named = manifest.get("files") if isinstance(manifest, dict) else None
    if not isinstance(named, dict):
        raise CheckpointError("is not a manifest of hashes", where=str(directory / INTEGRITY))
    found = {path.name for path in directory.iterdir()}
    needed = {name for name in found if name in (METADATA, BACKEND) or name.endswith(".distcp")}
    for names, what in (
        (needed - named.keys(), "does not name"),
        (named.keys() - found, "names files that are not there:"),
    ):
        if names:
            raise CheckpointError(f"{what} {summarise(sorted(names))}", where=str(directory / INTEGRITY))
    return named


def verify_manifest(directory: Path) -> None:
    """Hash every file and compare.

    Raises:
        CheckpointError: names the first file that is not what was written.
    """
    named = read_manifest(directory)
    if odd := [name for name in named if not (directory / name).is_file() or (directory / name).is_symlink()]:
        raise CheckpointError(f"names what are not regular files: {summarise(odd)}", where=str(directory / INTEGRITY))
    total = sum((directory / name).stat().st_size for name in named)
    with byte_progress("verifying", total) as advance:
        for name, wanted in sorted(named.items()):
            _verify(directory / name, wanted, advance)


def verify_metadata(directory: Path) -> None:
    """Where there is a manifest, compare what says which bytes are which weights; it is small, and read anyway.

    Raises:
        CheckpointError: as `verify_manifest`, of these files.
    """
    if (directory / INTEGRITY).is_file():
        named = read_manifest(directory)
        for name in (METADATA, BACKEND):
            _verify(directory / name, named[name])


def _verify(file: Path, wanted: str, advance: Callable[[int], None] = lambda _: None) -> None:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(_AT_ONCE):
            digest.update(block)
            advance(len(block))
    if digest.hexdigest() != wanted:
        raise CheckpointError(
            f"is damaged: its SHA-256 is not that of {INTEGRITY}",
            where=str(file),
            fix="get the file again from where it was written",
        )
