"""Whether a run can be trained on its data, seen before Megatron builds anything: every data set, and every part."""

from __future__ import annotations

import math
import re
from argparse import Namespace
from pathlib import Path

import megatron_slim.mcore

import numpy as np
import numpy.typing as npt
from megatron.core.datasets.blended_megatron_dataset_config import (
    convert_split_vector_to_split_matrix,
    parse_and_normalize_split,
)

from megatron_slim.data import document_lengths, exact_prefix, open_stream
from megatron_slim.errors import DataError
from megatron_slim.sample_set import SampleSet
from megatron_slim.training.blends import Sources, read_sources
from megatron_slim.training.document_checks import prefixes_of, sample_sets, will_be_made

DEFAULT_SPLIT = "969, 30, 1"  # Megatron's
_NAMES = ("training", "validation", "test")
_OWN_PATHS = "--train-data-path, --valid-data-path and --test-data-path"

Bounds = tuple[float, float] | None


def check_data(args: Namespace, vocab_size: int) -> None:
    """See that all data sets are there, whole, of the vocabulary, and that every part that is built can be.

    Training checks the ids of every batch; here it is a part of each data set.

    Raises:
        DataError: the first error found.
    """
    sources = read_sources(args)
    if args.mock_data:
        return
    if not any(sources.blends()):
        raise DataError("no training data", fix="give --data-path, the prefix of a .bin/.idx pair")
    sets = {str(each.path): _check_samples(each, vocab_size, args) for each in sample_sets(args)}
    documents = [each for each in prefixes_of(args) if str(Path(each)) not in sets and not will_be_made(args, each)]
    lengths = {prefix: _check_set(prefix, vocab_size) for prefix in documents}
    bounds = part_bounds(sources, args)
    for number, (name, needed, blend) in enumerate(zip(_NAMES, needed_parts(args), sources.blends(), strict=True)):
        ends = bounds[number]
        if not needed:
            continue
        if blend is None or ends is None:
            if name != "test":  # without one Megatron ends with the validation
                _refuse_missing_part(name, sources)
            continue
        for prefix in blend.prefixes:
            rows = args.before_recording if sources.whole is not None else None
            if (rows := rows or sets.get(str(Path(prefix)))) is not None:
                _check_rows(name, prefix, ends, rows, sources, args)
            elif prefix in lengths:
                _check_part(name, prefix, ends, lengths[prefix], sources, args)


def needed_parts(args: Namespace) -> tuple[bool, bool, bool]:
    """Which of training, validation and test part are used; Megatron would build the others too."""
    evaluates = args.eval_iters > 0
    return True, evaluates, evaluates


def part_bounds(sources: Sources, args: Namespace) -> tuple[Bounds, Bounds, Bounds]:
    """Where each part begins and ends in the documents of its data sets, as fractions; None for a part without any.

    Raises:
        DataError: ``--split`` is not a list of shares, or there is nothing to split.
    """
    if sources.whole is None:
        if args.split is not None:
            raise DataError(f"--split {args.split} has nothing to split", fix=f"leave it out with {_OWN_PATHS}")
        train, valid, test = (None if blend is None else (0.0, 1.0) for blend in sources.parts)
        return train, valid, test
    split = args.split or DEFAULT_SPLIT
    # Megatron takes the digits and dots for the shares, whatever stands between them: of -5 and 1e3 something else.
    words = [] if re.search(r"[-+a-zA-Z]", split) else re.findall(r"[.0-9]+", split)
    if not 1 <= len(words) <= len(_NAMES) or not all(map(_is_share, words)) or not any(map(float, words)):
        fix = "give the shares of training, validation and test part, as in --split 990,5,5"
        raise DataError(f"--split {split} is not three numbers that are not negative, one of them positive", fix=fix)
    train, valid, test = convert_split_vector_to_split_matrix(parse_and_normalize_split(split))
    return train, valid, test


def _is_share(word: str) -> bool:
    return word.count(".") < 2 and word != "." and math.isfinite(float(word))


def _check_set(prefix: str, vocab_size: int) -> npt.NDArray[np.int32]:
    """See that a data set can be read and fits the model; the lengths of its documents."""
    found = exact_prefix(Path(prefix))
    open_stream(found, vocab_size)
    return document_lengths(found)


def _check_samples(samples: SampleSet, vocab_size: int, args: Namespace) -> int:
    """See that a sample set fits the model and the run; how many samples it has."""
    where = str(samples.path)
    if samples.seq_length != args.seq_length:
        fix = f"give --seq-length {samples.seq_length}, or make the samples again"
        raise DataError(f"has samples of {samples.seq_length}, --seq-length is {args.seq_length}", where=where, fix=fix)
    samples.largest_id(vocab_size)
    return len(samples)


def _check_rows(
    name: str, prefix: str, ends: tuple[float, float], rows: int, sources: Sources, args: Namespace
) -> None:
    """See that a sample set has at least one sample for a part."""
    begin, end = (round(fraction * rows) for fraction in ends)
    if begin < end:
        return
    fixes = f"give {_OWN_PATHS}, another --split, or more samples" + (
        "" if name == "training" else ", or --eval-iters 0"
    )
    split = args.split or DEFAULT_SPLIT
    raise DataError(f"--split {split} leaves none of its {rows} samples for the {name} part", where=prefix, fix=fixes)


def _refuse_missing_part(name: str, sources: Sources) -> None:
    path = "--train-data-path" if name == "training" else "--valid-data-path"
    fix = f"give {path if sources.whole is None else 'it a share in --split'}"
    fix += "" if name == "training" else ", or --eval-iters 0"
    raise DataError(f"there are no data for the {name} part", fix=fix)


def _check_part(
    name: str, prefix: str, ends: tuple[float, float], lengths: npt.NDArray[np.int32], sources: Sources, args: Namespace
) -> None:
    """See that a data set has at least one sample for a part.

    Of no tokens Megatron builds an index forever: it adds epochs until they are enough. Of fewer than one sample's it
    would fill samples with the same documents again and again, which measures nothing.
    """
    begin, end = (round(fraction * len(lengths)) for fraction in ends)
    tokens, needed = int(lengths[begin:end].sum(dtype=np.int64)), (args.seq_length or 0) + 1
    if tokens >= needed:
        return
    fixes = [] if sources.whole is None else [_OWN_PATHS, "another --split"]
    fixes += ["more documents", "a shorter --seq-length"] if tokens else ["more documents"]
    fixes += [] if name == "training" else ["--eval-iters 0"]
    fix = f"give {', '.join(fixes[:-1])}{', or ' if fixes[1:] else ''}{fixes[-1]}"
    if sources.whole is not None and begin == end:
        split, documents = args.split or DEFAULT_SPLIT, len(lengths)
        raise DataError(
            f"--split {split} leaves none of its {documents} documents for the {name} part", where=prefix, fix=fix
        )
    raise DataError(
        f"has {tokens} tokens in {end - begin} documents for the {name} part, one sample takes {needed}",
        where=prefix,
        fix=fix,
    )
