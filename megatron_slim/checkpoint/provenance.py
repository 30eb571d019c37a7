"""``slim_provenance.json``: what a checkpoint was made of, and how."""

from __future__ import annotations

import importlib.metadata
import platform
from datetime import UTC, datetime

from megatron_slim import __version__
from megatron_slim.aliases import Document, JsonObject
from megatron_slim.checkpoint.huggingface import CONFIG
from megatron_slim.checkpoint.iterations import is_torch_dist, roots
from megatron_slim.checkpoint.records import PROVENANCE
from megatron_slim.checkpoint.units import Checkpoint
from megatron_slim.errors import SlimError
from megatron_slim.files import read_json, sha256

_PACKAGES = ("torch", "megatron-core", "numpy", "transformers")


def describe_source(source: Checkpoint) -> JsonObject:
    """Where a checkpoint came from, and what of it is not part of the model; its own provenance too, if it has one."""
    described: JsonObject = {
        "path": str(source.path.absolute()),
        "format": "torch_dist" if is_torch_dist(source.path) else "hf",
        "config_sha256": sha256((source.config_path / CONFIG).read_bytes()),
    }
    if source.left_out:
        described["left_out"] = list(source.left_out)
    for directory in roots(source.path):
        if (file := directory / PROVENANCE).is_file():
            try:
                described["provenance"] = read_json(file)
            except SlimError as error:
                described["provenance"] = f"not readable: {error}"
            break
    return described


def software(arguments: Document | None) -> JsonObject:
    """Command line, versions and time."""
    versions = {"megatron_slim": __version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "arguments": {name: _plain(value) for name, value in (arguments or {}).items()},
        "versions": versions,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _plain(value: object) -> object:
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)
