"""Which layers of student and teacher each pipeline stage holds, so that none is much slower than the mean (no torch).

The hidden states of both models are sent together, and each model has its own stages: contiguous, in order, the
embedding on the first, heads, MTP blocks and loss on the last. Stage c of P x V virtual ones is on rank c modulo P.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate, pairwise, permutations
from operator import add

from megatron_slim.architecture.flops import Flops

SKEWS = (1.0, 0.5, 2.0)  # of what interleaved stages start from
NEAR = 1.01  # slowest rank over the mean that is as good as even
NO_TEACHER = Flops((), 0.0)
Counts = tuple[int, ...]
# Layers of student and teacher that a trial of `_improved` moves from one stage to another.
MOVES = ((1, 0), (0, 1), (1, -1), (1, -2), (1, -3))


@dataclass(frozen=True)
class Stages:
    """Layers of each virtual stage, in the order of the forward pass.

    Attributes:
        ranks: pipeline parallel size.
        student: operations of the student.
        teacher: operations of the teacher.
        student_layers: the student's layers on each stage.
        teacher_layers: the teacher's.
    """

    ranks: int
    student: Flops
    teacher: Flops
    student_layers: Counts
    teacher_layers: Counts

    def model_loads(self) -> list[tuple[float, float]]:
        """Operations per token of student and teacher on each virtual stage."""
        models = ((self.student, self.student_layers), (self.teacher, self.teacher_layers))
        own, theirs = (_loads(flops, counts) for flops, counts in models)
        return list(zip(own, theirs, strict=True))

    def rank_loads(self) -> list[float]:
        """Operations per token of each rank, over all its virtual stages."""
        each = [sum(both) for both in self.model_loads()]
        return [sum(each[rank :: self.ranks]) for rank in range(self.ranks)]

    @property
    def slowest_over_mean(self) -> float:
        """What balancing can gain at most: 1.0 is even."""
        loads = self.rank_loads()
        return max(loads) * self.ranks / sum(loads)

    @property
    def floor(self) -> float:
        """What no layout goes below: heads, MTP blocks and loss stay together, and no stage is without the student."""
        loads, virtual = self.rank_loads(), len(self.student_layers) // self.ranks
        least = self.student.last + self.teacher.last + (virtual - 1) * min(self.student.layers)
        return max(1.0, least * self.ranks / sum(loads))


def _loads(flops: Flops, counts: Counts) -> list[float]:
    ends = [0, *accumulate(counts)]
    loads = [flops.stages_from(start)[stop - start] for start, stop in pairwise(ends)]
    loads[-1] += flops.last
    return loads


def even_layers(num_layers: int, stages: int) -> Counts:
    """Megatron's own division; the number of layers must divide by that of stages."""
    assert num_layers % stages == 0
    return (num_layers // stages,) * stages


def balanced(student: Flops, teacher: Flops | None, ranks: int, virtual: int = 1) -> Stages | None:
    """Stages whose slowest rank does the least.

    Without interleaving that is exact, but for `NEAR`: the smallest limit is found (by bisection) that stages of both
    models, filled together, can keep. Interleaved, stages are filled towards an equal share of every rank. Both are
    then improved by moving layers of one or both models from any stage to any other while that helps.

    Args:
        student: operations of the student, every stage of which holds something: a layer, embedding or loss.
        teacher: operations of the teacher, stages of which may be empty; None without a teacher.
        ranks: pipeline parallel size.
        virtual: virtual stages of a rank.

    Returns:
        The same for the same arguments; None when the student has too few layers.
    """
    best = None
    for start in _starts(student, teacher or NO_TEACHER, ranks, virtual):
        stages = _improved(start)
        best = min(best or stages, stages, key=_badness)
        if NEAR < best.slowest_over_mean <= best.floor + 1e-9:
            break  # the last rank is the slowest with nothing that could be taken from it
    return best


def balanced_apart(student: Flops, teacher: Flops, losses: float, ranks: int, virtual: int = 1) -> Stages | None:
    """Stages of which each model's are even by themselves, for a teacher that computes ahead of its student.

    Args:
        student: operations of the student.
        teacher: operations of the teacher, ``losses`` included.
        losses: those of its output layer, which are part of the student's step then.
        ranks: pipeline parallel size.
        virtual: virtual stages of a rank.

    Returns:
        None when one of them has too few layers.
    """
    own = balanced(replace(student, last=student.last + losses), None, ranks, virtual)
    theirs = balanced(replace(teacher, last=teacher.last - losses), None, ranks, virtual)
    if own is None or theirs is None:
        return None
    return Stages(ranks, student, teacher, own.student_layers, theirs.student_layers)


def _starts(student: Flops, teacher: Flops, ranks: int, virtual: int) -> Iterator[Stages]:
    """Stages that each model would have alone; then stages of both, filled together."""
    if teacher.layers:
        own, theirs = (
            _tightest(flops, NO_TEACHER, _shares(flops, NO_TEACHER, ranks, virtual)) for flops in (student, teacher)
        )
        if own and theirs:
            yield Stages(ranks, student, teacher, own[0], theirs[0])
    shares = [_shares(student, teacher, ranks, virtual, skew) for skew in SKEWS]
    for share in [(1.0,) * ranks] if virtual == 1 else shares:
        if together := _tightest(student, teacher, share):
            yield Stages(ranks, student, teacher, *together)


def _shares(student: Flops, teacher: Flops, ranks: int, virtual: int, skew: float = 1.0) -> tuple[float, ...]:
    """What each virtual stage should do: ranks alike as far as possible.

    Of a rank's virtual stages, each should do ``skew`` times what the one before does.
    """
    total, last = student.total + teacher.total, student.last + teacher.last
    layers_of_last = max(0.0, total / ranks - last)
    others = (total - last - layers_of_last) / max(1, ranks - 1)
    parts = [skew**stage for stage in range(virtual)]
    share = [
        (layers_of_last if rank == ranks - 1 else others) * part / sum(parts) for part in parts for rank in range(ranks)
    ]
    share[-1] += last
    return tuple(max(part, min(student.layers)) for part in share)


@lru_cache(maxsize=256)  # the teacher's own stages are the same however much of the student is recomputed
def _tightest(student: Flops, teacher: Flops, share: tuple[float, ...]) -> tuple[Counts, Counts] | None:
    """Stages within the smallest multiple of ``share`` that all layers fit in."""
    low, high = 0.0, (student.total + sum(student.first_layers) + teacher.total) / min(share)
    found = _filled(student, teacher, [high * part for part in share])
    while found and high - low > 1e-7 * high:
        middle = (low + high) / 2
        if within := _filled(student, teacher, [middle * part for part in share]):
            high, found = middle, within
        else:
            low = middle
    return found


def _filled(student: Flops, teacher: Flops, caps: Sequence[float]) -> tuple[Counts, Counts] | None:
    """Stages that do at most ``caps`` each, None where there are none.

    After every stage and for every number of the student's layers in it and before it, only the largest number of the
    teacher's that fits is kept: whatever can be completed from fewer can be completed from more.
    """
    ahead, layers, final = teacher.prefix, len(student.layers), len(caps) - 1
    reached: dict[int, tuple[int, int]] = {0: (0, 0)}  # the student's layers -> the teacher's, where the stage started
    steps = []
    for stage, cap in enumerate(caps):
        here: dict[int, tuple[int, int]] = {}
        limit = cap - (student.last + teacher.last if stage == final else 0.0)
        for start, (theirs, _) in reached.items():
            loads, done = student.stages_from(start), ahead[theirs]
            for stop in range(start + (0 < stage < final), layers + 1):
                left = limit - loads[stop - start]
                if left < 0:
                    break
                most = bisect_right(ahead, done + left * (1 + 1e-12)) - 1
                if stop not in here or most > here[stop][0]:
                    here[stop] = (most, start)
        reached = here
        steps.append(here)
    if reached.get(layers, (-1, 0))[0] != len(teacher.layers):
        return None
    return _counts(steps, layers)


def _counts(steps: list[dict[int, tuple[int, int]]], layers: int) -> tuple[Counts, Counts]:
    """The stages that led to all layers, backwards through what `_filled` reached."""
    student, theirs = [], []
    for here in reversed(steps):
        most, start = here[layers]
        student.append(layers - start)
        theirs.append(most)
        layers = start
    return tuple(reversed(student)), tuple(stop - start for start, stop in pairwise([0, *reversed(theirs)]))


def _badness(stages: Stages) -> tuple[float, ...]:
    """Slowest rank beyond `NEAR`; unevenness of the student over ranks, of ranks, of virtual stages; rounded."""
    own, theirs = zip(*stages.model_loads(), strict=True)
    return _badness_of(own, theirs, stages.ranks)


def _badness_of(
    own: Sequence[float], theirs: Sequence[float], ranks: int, seen: tuple[float, ...] = (math.inf,)
) -> tuple[float, ...]:
    """The same, by what both models do on each virtual stage; cut off where it is known to be worse than ``seen``."""
    each = list(map(add, own, theirs))
    of_ranks = _over_ranks(each, ranks)
    found: tuple[float, ...] = (round(max(NEAR, max(of_ranks) * ranks / sum(of_ranks)), 9),)
    if found > seen:
        return found
    student = _over_ranks(own, ranks)
    mean = sum(student) / ranks
    for part in (student, of_ranks, each):
        found = (*found, round(sum((load / mean) ** 2 for load in part), 9))
        if found > seen:
            return found
    return found


def _over_ranks(each: Sequence[float], ranks: int) -> Sequence[float]:
    """Of each rank, over all its virtual stages."""
    return each if len(each) == ranks else [sum(each[rank::ranks]) for rank in range(ranks)]


class _Loads(dict[Counts, list[float]]):
    """What a model does on each virtual stage, by its layers there: the same divisions come up again and again."""

    def __init__(self, flops: Flops) -> None:
        super().__init__()
        self._flops = flops

    def __missing__(self, counts: Counts) -> list[float]:
        found = self[counts] = _loads(self._flops, counts)
        return found


def _improved(stages: Stages) -> Stages:
    """Move layers between stages as long as that helps; the first move that helps is taken.

    What fills the memory of a rank is its share of the student, so that comes right after the slowest rank.
    """
    own, theirs, worse = _Loads(stages.student), _Loads(stages.teacher), set[tuple[Counts, Counts]]()
    best, seen, tried = (stages.student_layers, stages.teacher_layers), _badness(stages), None
    while tried != seen:
        tried = seen
        for other in _neighbours(len(best[0])):
            moved = _moved(best, *other)
            if moved is None or moved in worse:
                continue
            now = _badness_of(own[moved[0]], theirs[moved[1]], stages.ranks, seen)
            if now < seen:
                best, seen = moved, now
            else:
                worse.add(moved)  # and so for good: what is best only becomes better
    return replace(stages, student_layers=best[0], teacher_layers=best[1])


def _neighbours(stages: int) -> Iterator[tuple[int, int, int, int]]:
    for source, target in permutations(range(stages), 2):
        for student, teacher in MOVES:
            yield source, target, student, teacher


def _moved(
    layers: tuple[Counts, Counts], source: int, target: int, student: int, teacher: int
) -> tuple[Counts, Counts] | None:
    """Layers of both models with so many on ``target`` instead of ``source``; None where there are none left."""
    own, theirs = _moved_of(layers[0], source, target, student, 1), _moved_of(layers[1], source, target, teacher, 0)
    return None if own is None or theirs is None else (own, theirs)


def _moved_of(layers: Counts, source: int, target: int, moved: int, keep: int) -> Counts | None:
    """The same of one model, of which every stage but the first and the last keeps so many."""
    changed = list(layers)
    changed[source] -= moved
    changed[target] += moved
    inner = changed[1:-1]
    if min(changed) < 0 or (inner and min(inner) < keep):
        return None
    return tuple(changed)
