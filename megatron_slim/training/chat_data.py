"""``--sft``: files of conversations among the data of a run become sample sets before it starts.

A set is named after the file and a digest of all that decides what is in it: the file, the tokenizer, the length of
samples, what becomes of conversations that do not fit, and this version. So a run that is started again, on whatever
machine, finds what was made for it.
"""

from __future__ import annotations

import logging
import os
import time
from argparse import Namespace
from pathlib import Path

from megatron_slim import __version__
from megatron_slim.chats import ChatOptions, make_samples, tokenizer_digests
from megatron_slim.command_line import CUT
from megatron_slim.documents import JSON_SUFFIXES
from megatron_slim.errors import DataError
from megatron_slim.files import file_sha256, sha256, to_json
from megatron_slim.sample_set import is_sample_set
from megatron_slim.training.blends import PARTS
from megatron_slim.training.document_checks import prefixes_of

logger = logging.getLogger(__name__)

SFT = "--sft"
_TYPE = ("--tokenizer-type", "HuggingFaceTokenizer")
_PATHS = ("data_path", *(f"{part}_data_path" for part in PARTS))
_LOOK_AGAIN = 1.0  # seconds between two looks for what another process makes


def without_tokenizer_type(argv: list[str]) -> list[str]:
    """A command line without the type that a tokenizer with a chat template has, which is the only one."""
    words = list(argv)
    if SFT in words and "=".join(_TYPE) in words:
        words.remove("=".join(_TYPE))
    if SFT in words and _TYPE[0] in words and words[words.index(_TYPE[0]) + 1 :][:1] == [_TYPE[1]]:
        place = words.index(_TYPE[0])
        del words[place : place + 2]
    return words


def name_sample_sets(args: Namespace) -> list[str]:
    """Put the sample sets that conversations become in their place.

    Args:
        args: Megatron's arguments as parsed; paths of its data are changed, and ``chats`` says what is to be made, by
            directory the file.

    Returns:
        The flags that name the sets, as they follow those that were given.

    Raises:
        DataError: a file, the tokenizer or the length of samples is missing, the data are not conversations, or flags
            of conversations are given without ``--sft``.
    """
    given = {"--unroll": args.unroll, "--too-long": args.too_long != CUT}
    if not args.sft and (flags := [flag for flag, is_given in given.items() if is_given]):
        raise DataError(f"{flags[0]} is for conversations, with --sft", fix="leave it out")
    args.chats, words = {}, list[str]()
    for name in _PATHS if args.sft else ():
        given = getattr(args, name)
        if not any(_is_conversations(word) for word in given or ()):
            continue
        found = [str(_sample_set(Path(word), args)) if _is_conversations(word) else word for word in given]
        setattr(args, name, found)
        words += [f"--{name.replace('_', '-')}", *found]
    if args.sft and not args.chats:
        _refuse_documents(args)
    return words


def make_sample_sets(args: Namespace) -> None:
    """Make what is not there yet, on the first rank; the others wait until it is."""
    for directory, file in args.chats.items():
        if args.rank == 0 and is_sample_set(directory):
            logger.info(f"{file}: packed before, in {directory}")
        elif args.rank == 0:
            directory.parent.mkdir(parents=True, exist_ok=True)
            make_samples([file], directory, _options(args))
        elif not is_sample_set(directory):
            if int(os.environ.get("LOCAL_RANK", "0")) == 0:  # of a machine that may not see what the first one writes
                logger.info(f"{file}: waiting for {directory}, which the first rank makes")
            while not is_sample_set(directory):  # where the first rank ends with an error, so do all
                time.sleep(_LOOK_AGAIN)


def _is_conversations(word: str) -> bool:
    return Path(word.removesuffix(".gz")).suffix in JSON_SUFFIXES


def _sample_set(file: Path, args: Namespace) -> Path:
    """Where the sample set of a file is, or will be."""
    if not file.is_file():
        raise DataError("no such file", where=str(file))
    options = _options(args)
    origin = {
        "file": file_sha256(file),
        "tokenizer": tokenizer_digests(options.tokenizer),
        "seq_length": options.seq_length,
        "too_long": options.too_long,
        "unroll": options.unroll,
        "version": __version__,
    }
    folder = file.parent if args.data_cache_path is None else Path(args.data_cache_path)
    directory = folder / f"{file.name}-{sha256(to_json(origin))[:16]}"
    args.chats[directory] = file
    return directory


def _options(args: Namespace) -> ChatOptions:
    if args.tokenizer_model is None:
        raise DataError("--sft needs a tokenizer with a chat template", fix="give --tokenizer-model, its directory")
    if args.seq_length is None:
        raise DataError("--sft needs the length of samples", fix="give --seq-length")
    return ChatOptions(Path(args.tokenizer_model), args.seq_length, args.too_long, args.unroll)


def _refuse_documents(args: Namespace) -> None:
    """See that what a run with ``--sft`` is given is sample sets."""
    if not any(is_sample_set(Path(prefix)) for prefix in prefixes_of(args)):
        raise DataError(
            "--sft finds no conversations in the data",
            fix="give .jsonl files or sample sets by --data-path, or by --train-data-path and --valid-data-path",
        )
