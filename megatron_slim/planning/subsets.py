"""Which parts of a student can be trained where not all of it can (no torch)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

from megatron_slim.architecture.parts import (
    EXPERTS,
    IN_BLOCKS,
    MTP_PART,
    NORMS,
    PARTS,
    ROUTER,
    TrainOnly,
    rows_by_place,
)
from megatron_slim.architecture.shape import ModelShape
from megatron_slim.planning.layouts import Wanted
from megatron_slim.planning.memory import host_bytes, rank_counts
from megatron_slim.planning.search import Candidate, Job, Search
from megatron_slim.planning.storage import STORAGES

SPARE = 0.05  # of a GPU's memory, which is left: routing may be less even than it is counted


@dataclass(frozen=True)
class Subset:
    """Parts that fit.

    Attributes:
        job: with them as its ``train_only``, and where the optimizer has its states.
        candidate: the quickest layout.
        trained: parameters.
    """

    job: Job
    candidate: Candidate
    trained: int

    @property
    def name(self) -> str:
        """As on the command line."""
        return self.job.settings.train_only or "all"

    @property
    def host(self) -> float:
        """Bytes on the host for each GPU."""
        job, candidate = self.job, self.candidate
        return host_bytes(job.student, candidate.layout, candidate.stages, job.settings)


def choices(shape: ModelShape) -> list[Callable[[int], str]]:
    """Choices of parts, each by the number of last layers that it has experts, or all, of; "" is everything."""
    places = {place.part for row, place in rows_by_place(shape) if not row.buffer}
    there = [part for part in PARTS if part in places]
    rest = ",".join(part for part in there if part not in (EXPERTS, MTP_PART))
    count, mtp = shape.num_layers, f",{MTP_PART}" * (MTP_PART in there)

    def last(part: str, layers: int) -> str:
        return part if layers == count else f"{part}@{count - layers}-{count - 1}"

    def all_but_experts(layers: int, *, mtp: str) -> str:
        if layers == count and (mtp or MTP_PART not in there):
            return ""
        return rest + (f",{last(EXPERTS, layers)}" if layers else "") + mtp

    found: list[Callable[[int], str]] = [
        partial(all_but_experts, mtp=mtp),
        partial(all_but_experts, mtp=""),
        lambda layers: last("blocks", layers) if layers else f"{NORMS},{ROUTER}",
        lambda layers: last(EXPERTS, layers) if layers else NORMS,
    ]
    small = ",".join(part for part in IN_BLOCKS if part in there and part != EXPERTS)
    return [lambda layers: "" if layers == count else small, *found]


def subsets(
    job: Job, wanted: Wanted, storages: Sequence[str] = (), report: Callable[[Iterable[str]], Iterable[str]] = iter
) -> list[Subset]:
    """What fits, most parameters first; of every way to choose, as many of the last layers as there is memory for.

    Args:
        job: whose student does not fit as a whole.
        wanted: layouts to try.
        storages: keys of `STORAGES`; none: all that go with the run.
        report: passes them through, as a progress bar does.
    """
    settings, found = job.settings, dict[tuple[str, str], Subset]()
    for storage in report(list(storages or STORAGES)):
        if STORAGES[storage].violations(settings.optimizer, settings.precision):
            continue
        for choice in choices(job.student):
            for subset in _most(replace(job, settings=replace(settings, states=storage)), wanted, choice):
                found.setdefault((subset.name, storage), subset)
    order = {name: number for number, name in enumerate(STORAGES)}
    return sorted(found.values(), key=lambda each: (-each.trained, order[each.job.settings.states]))


def _most(job: Job, wanted: Wanted, choice: Callable[[int], str]) -> Iterator[Subset]:
    """The choice with most layers that fits, if any does: what fits with some layers does with fewer."""
    fits, low, high = _fitting(job, wanted, choice(0)), 0, job.student.num_layers
    if fits is None:
        return
    while low < high:
        middle = (low + high + 1) // 2
        if (more := _fitting(job, wanted, choice(middle))) is None:
            high = middle - 1
        else:
            fits, low = more, middle
    yield fits


def _fitting(job: Job, wanted: Wanted, words: str) -> Subset | None:
    settings = replace(job.settings, train_only=TrainOnly.of(words).name if words else "")
    job = replace(job, settings=settings)
    smaller = replace(job.gpu, memory=(1 - SPARE) * job.gpu.memory)
    ranked = Search(replace(job, gpu=smaller)).run(wanted).ranked
    if not ranked:
        return None
    only, shape, layout = job.settings.only, job.student, replace(ranked[0].layout, gpus=1, tp=1, pp=1, vpp=1, ep=1)
    return Subset(job, ranked[0], rank_counts(shape, [shape.num_layers], layout, only)[0].total)
