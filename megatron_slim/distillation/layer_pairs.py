"""Which layer of the student is supervised by which layer of the teacher (no torch)."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise

LayerPair = tuple[int, int]  # layer of the student, layer of the teacher, both from 0 as in model.layers.N

FLAG = "--hidden-kd-layers"


def name_of(pair: LayerPair) -> str:
    """As on the command line and in the log.

    >>> name_of((2, 5))
    '2:5'
    """
    return f"{pair[0]}:{pair[1]}"


def parse_layer_pairs(text: str) -> tuple[LayerPair, ...]:
    """An argparse type.

    >>> parse_layer_pairs("2:5,3:7")
    ((2, 5), (3, 7))
    """
    pairs = []
    for word in text.split(","):
        numbers = word.split(":")
        if len(numbers) != 2 or not all(number.strip().isdecimal() for number in numbers):
            raise argparse.ArgumentTypeError(f"{word!r} is not a layer of the student and one of the teacher as in 2:5")
        pairs.append((int(numbers[0]), int(numbers[1])))
    return tuple(pairs)


def pair_violations(pairs: Sequence[LayerPair], student_layers: int, teacher_layers: int) -> list[str]:
    """Pairs that are given twice, and layers that are not there."""
    found = [f"{FLAG} names {name_of(pair)} {times} times" for pair, times in Counter(pairs).items() if times > 1]
    for number, (model, layers) in enumerate((("student", student_layers), ("teacher", teacher_layers))):
        if beyond := sorted({pair[number] for pair in pairs if pair[number] >= layers}):
            names = ", ".join(map(str, beyond))
            found.append(f"{FLAG}: the {model} has layers 0 to {layers - 1}, not {names}")
    return found


def stage_violations(
    pairs: Sequence[LayerPair], student_layers: Sequence[int], teacher_layers: Sequence[int]
) -> Iterator[str]:
    """Pairs that no stage holds both layers of; the arguments after the first are layers of each virtual stage.

    >>> list(stage_violations([(0, 0), (2, 1)], (2, 1), (2, 2)))
    ['2:1 (stages 2 and 1 of 2; stage 2 has layers 2-2 of the student, 2-3 of the teacher)']
    """
    ends = [[0, *accumulate(counts)] for counts in (student_layers, teacher_layers)]
    for pair in pairs:
        own, other = (
            next(stage for stage, (start, stop) in enumerate(pairwise(each)) if start <= layer < stop)
            for layer, each in zip(pair, ends, strict=True)
        )
        if own != other:
            ours, theirs = (_range(each[own], each[own + 1]) for each in ends)
            there = f"stage {own + 1} has layers {ours} of the student, {theirs} of the teacher"
            yield f"{name_of(pair)} (stages {own + 1} and {other + 1} of {len(student_layers)}; {there})"


def _range(start: int, stop: int) -> str:
    return f"{start}-{stop - 1}" if stop > start else "none"
