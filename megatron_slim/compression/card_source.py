"""What is known of the model that was compressed: its name and its licence."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

MAX_BYTES = 1_000_000  # of a card or a licence
_FRONT_MATTER = re.compile(r"\A---\s*\n(.*?)\n---\s*(?:\n|\Z)", re.DOTALL)
_HUB = re.compile(r"models--([^/]+)--([^/]+)")
_LICENCE_FILES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "LICENCE", "COPYING")
# How a licence is recognised that stands next to the weights and is not named in a card.
_TEXTS = {"apache-2.0": ("Apache License", "Version 2.0"), "mit": ("MIT License", "Permission is hereby granted")}


def model_name(path: Path) -> str:
    """Name of the model in a directory, that of the hub where the directory is of its cache.

    >>> model_name(Path("cache/models--Qwen--Qwen3-Next/snapshots/0123")), model_name(Path("models/teacher"))
    ('Qwen/Qwen3-Next', 'teacher')
    """
    for part in path.parts:
        if match := _HUB.fullmatch(part):
            return "/".join(match.groups())
    return path.name


def front_matter(text: str) -> dict[str, Any]:
    """The YAML that a model card begins with; empty where it has none that can be read."""
    match = _FRONT_MATTER.match(text)
    try:
        found = yaml.safe_load(match.group(1)) if match else None
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def licence(directory: Path) -> dict[str, str]:
    """What a model's card says of its licence, else what the file of its licence is recognised as.

    Returns:
        ``license``, an identifier of the hub, and ``license_name`` and ``license_link`` where the card has them;
        empty where nothing is stated.

    Raises:
        CheckpointError: card or licence is a link out of the directory.
    """
    for _, text in _texts(directory, ("README.md",)):
        stated = front_matter(text)
        if isinstance(stated.get("license"), str):
            keys = ("license", "license_name", "license_link")
            return {key: stated[key] for key in keys if isinstance(stated.get(key), str)}
    for name, text in _texts(directory, _LICENCE_FILES):
        known = [licence for licence, words in _TEXTS.items() if all(word in text for word in words)]
        return {"license": known[0]} if known else {"license": "other", "license_link": name}
    return {}


def _texts(directory: Path, names: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """Names and contents of those files that are there; a torch_dist checkpoint has them in hf/."""
    from megatron_slim.checkpoint.huggingface_files import find_file

    for place in (directory, directory / "hf"):
        for name in names:
            if (file := find_file(place, name)) is not None:
                with file.open(encoding="utf-8", errors="replace") as stream:
                    yield name, stream.read(MAX_BYTES)
