"""The data sets that a run is given: on the command line, or in a file that it names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_slim.errors import DataError
from megatron_slim.files import read_json

_ON_COMMAND_LINE = ("data_path", "train_data_path", "valid_data_path", "test_data_path")
_PARTS = ("train", "valid", "test")
SPLIT = ("data_path", "data_args_path")  # what --split divides into parts


def given_words(args: Any) -> dict[str, list[str]]:
    """Prefixes, perhaps with weights, by the argument of Megatron that gave them; those of a file by part.

    Raises:
        DataError: a file of them is not there, or is none.
    """
    given: dict[str, list[str] | None] = {name: getattr(args, name) for name in _ON_COMMAND_LINE}
    if args.data_args_path is not None:
        given["data_args_path"] = _read_words(Path(args.data_args_path))
    if args.per_split_data_args_path is not None:
        given |= _read_parts(Path(args.per_split_data_args_path))
    return {name: words for name, words in given.items() if words}


def _read_words(path: Path) -> list[str]:
    """Words of a text file."""
    try:
        words = path.read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"not readable as a list of data sets ({error})", where=str(path)) from None
    if not words:
        raise DataError("names no data set", where=str(path))
    return words


def _read_parts(path: Path) -> dict[str, list[str] | None]:
    """Words of the three lists in a JSON file; each may be one string, or null for none."""
    content = read_json(path)
    if not isinstance(content, dict) or not content.keys() >= set(_PARTS):
        raise DataError("is no object with train, valid and test", where=str(path))
    found: dict[str, list[str] | None] = {}
    for part in _PARTS:
        words = content[part].split() if isinstance(content[part], str) else content[part]
        if words is not None and not (isinstance(words, list) and all(isinstance(word, str) for word in words)):
            raise DataError(f"{part} is no list of data sets", where=str(path))
        found[f"{part} of {path}"] = words
    return found
