"""Which data sets a run is given, in which of the ways that Megatron has: on the command line, or in a file.

A blend is a list of prefixes, or of a weight before every prefix. Megatron separates the two by whether their number
is even, and takes a mixture of both for prefixes.
"""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_slim.errors import DataError
from megatron_slim.files import read_json

PARTS = ("train", "valid", "test")


@dataclass(frozen=True)
class Blend:
    """Data sets that are read together.

    Attributes:
        prefixes: of their .bin/.idx pairs.
        weights: shares of the samples, up to a common factor; None where none are given.
    """

    prefixes: tuple[str, ...]
    weights: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Sources:
    """Data of a run.

    Attributes:
        whole: what ``--split`` divides into training, validation and test part.
        parts: or what each part has for itself, None for a part without data.
    """

    whole: Blend | None = None
    parts: tuple[Blend | None, Blend | None, Blend | None] = (None, None, None)

    def blends(self) -> tuple[Blend | None, Blend | None, Blend | None]:
        """What each part is made of, or is a share of."""
        return self.parts if self.whole is None else (self.whole,) * 3


def parse_blend(words: Sequence[str], where: str) -> Blend:
    """Read prefixes, or weights and prefixes in turn.

    Args:
        words: as they stand on a command line.
        where: flag or file, for messages.

    Raises:
        DataError: no words, a weight without a prefix or the other way round, a weight that is not one.

    >>> parse_blend(["0.3", "a", "0.7", "b"], "--data-path")
    Blend(prefixes=('a', 'b'), weights=(0.3, 0.7))
    >>> parse_blend(["a", "b"], "--data-path")
    Blend(prefixes=('a', 'b'), weights=None)
    """
    words = [word.strip() for word in words]
    if not all(words) or not words:
        raise DataError("names no data set", where=where, fix="give the prefix of a .bin/.idx pair")
    numbers = [number_of(word) for word in words]
    if len(words) == 1 or all(number is None for number in numbers):
        return Blend(tuple(words))
    weights = [number for number in numbers[::2] if number is not None]
    if len(words) % 2 or len(weights) < len(words) // 2 or any(number is not None for number in numbers[1::2]):
        raise DataError(
            f"weights and data sets do not alternate in '{' '.join(words)}'",
            where=where,
            fix="give a weight before every data set, or before none (a data set whose name is a number: ./NAME)",
        )
    # A finite weight has no share either where all together are too large for a number, or one is far larger.
    wrong = [word for word, weight in zip(words[::2], weights, strict=True) if not 0 < weight < math.inf]
    wrong = wrong or [word for word, weight in zip(words[::2], weights, strict=True) if weight / sum(weights) == 0]
    if wrong:
        raise DataError(f"weight {wrong[0]} is not positive and finite", where=where, fix="leave out what has no share")
    return Blend(tuple(words[1::2]), tuple(weights))


def read_sources(args: Namespace) -> Sources:
    """What the arguments name, read from files where they name files; mock data are not a source.

    Where they name none, the samples of a teacher's cache are the data.

    Args:
        args: Megatron's arguments as parsed.

    Raises:
        DataError: data are given in more than one way, a file is not what it should be, or `parse_blend`.
    """
    per_part = {part: getattr(args, f"{part}_data_path") for part in PARTS}
    ways = {
        "--data-path": args.data_path is not None,
        "--data-args-path": args.data_args_path is not None,
        "--per-split-data-args-path": args.per_split_data_args_path is not None,
        "--train-data-path, --valid-data-path and --test-data-path": any(w is not None for w in per_part.values()),
        "--mock-data": args.mock_data,
    }
    given = [way for way, is_given in ways.items() if is_given]
    if len(given) > 1:
        raise DataError(f"data are given twice: by {' and by '.join(given)}", fix="give them in one way")
    if args.data_path is not None:
        return Sources(parse_blend(args.data_path, "--data-path"))
    if args.data_args_path is not None:
        return Sources(parse_blend(_read_words(Path(args.data_args_path)), args.data_args_path))
    if not given and args.teacher_cache is not None:
        return Sources(Blend((str(args.teacher_cache),)))
    if args.per_split_data_args_path is not None:
        return _read_parts(Path(args.per_split_data_args_path))
    train, valid, test = (
        None if words is None else parse_blend(words, f"--{part}-data-path") for part, words in per_part.items()
    )
    return Sources(parts=(train, valid, test))


def number_of(word: str) -> float | None:
    """A word of a blend as a weight; None of a name."""
    try:
        return float(word)
    except ValueError:
        return None


def _read_words(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").split()
    except OSError as error:
        raise DataError(f"not readable ({error.strerror})", where=str(path)) from None
    except UnicodeDecodeError:
        raise DataError("holds no text in UTF-8", where=str(path)) from None


def _read_parts(path: Path) -> Sources:
    """Blends from a JSON file with keys train, valid and test, of words in one string or in a list."""
    content = read_json(path)
    if not isinstance(content, dict) or (unknown := content.keys() - set(PARTS)):
        found = f"has key {sorted(unknown)[0]}" if isinstance(content, dict) else "is not a JSON object"
        raise DataError(f"{found}, not train, valid and test", where=str(path))
    blends: list[Blend | None] = []
    for part in PARTS:
        value = content.get(part)
        words = value.split() if isinstance(value, str) else value
        if words is not None and not isinstance(words, list):
            raise DataError(f"{part} is neither a string nor a list", where=str(path))
        blends.append(None if words is None else parse_blend([str(word) for word in words], f"{path}: {part}"))
    train, valid, test = blends
    return Sources(parts=(train, valid, test))
