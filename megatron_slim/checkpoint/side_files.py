"""Side files of a checkpoint directory: which are copied to a new one, and which are not."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

from megatron_slim.checkpoint.huggingface_files import CONFIG, find_file
from megatron_slim.checkpoint.records import RECORDS
from megatron_slim.errors import one_line, summarise

logger = logging.getLogger(__name__)

# In lower case, as names are compared; of a name with a directory both parts.
CARRIED_FILES = (
    # tokenizer
    "tokenizer*",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "tekken.json",
    "normalizer.json",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template*",
    "additional_chat_templates/*.jinja",
    # processors of pictures, films and sound, which a language model cut out of a larger one may still be asked for
    "*preprocessor_config.json",
    "processor_config.json",
    # generation
    "generation_config.json",
    # licence
    "*license*",
    "*licence*",
    "*use_policy*",
    "copying*",
    "notice*",
    "licenses/*",
)
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json")


def carried_files(source: Path) -> Iterator[str]:
    """Names, within a checkpoint directory, of the files of tokenizer, processor, generation and licence.

    Raises:
        CheckpointError: one is a link out of the directory, or no regular file.
    """
    for name in _names(source):
        if _is_carried(name) and find_file(source, name) is not None:
            yield name


def carry_files(source: Path, target: Path) -> None:
    """Copy them from one checkpoint directory to another."""
    for name in carried_files(source):
        (target / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(source / name, target / name)


def carried_bytes(source: Path) -> int:
    """Bytes of them."""
    return sum((source / name).stat().st_size for name in carried_files(source))


def left_behind(source: Path) -> list[str]:
    """What else there is: not carried, no weights, config.json or index, none of our records, and not hidden.

    Cards and code are among it. They describe the model that it was, or are not run.
    """
    return [
        name
        for name in _names(source)
        if not _is_carried(name)
        and name != CONFIG
        and name not in RECORDS
        and not any(fnmatchcase(name, pattern) for pattern in _WEIGHTS)
    ]


def log_left_behind(source: Path) -> None:
    """Name it in a line, if there is any."""
    if found := left_behind(source):
        logger.info(one_line(f"{source}: not carried over: {len(found)} ({summarise(found)})"))


def _is_carried(name: str) -> bool:
    depth = name.count("/")
    return any(
        pattern.count("/") == depth and fnmatchcase(name.lower(), pattern)
        for pattern in CARRIED_FILES
        if not name.endswith("/")
    )


def _names(source: Path) -> Iterator[str]:
    """Files of a directory, and of its directories that hold some to carry; others as ``name/``. No hidden ones."""
    for name in sorted(name for name in os.listdir(source) if not name.startswith(".")):
        if not (source / name).is_dir():
            yield name
            continue
        within = [f"{name}/{child}" for child in sorted(os.listdir(source / name))]
        if any(_is_carried(child) for child in within):
            yield from (f"{child}/" if (source / child).is_dir() else child for child in within)
        else:
            yield f"{name}/"
