"""Pipeline schedules as Megatron runs them: 1F1B and interleaved 1F1B (arXiv 2104.04473), no torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from itertools import accumulate
from typing import NamedTuple

FORWARD, BACKWARD = "forward", "backward"
SETTLED = 4  # micro-batches a rank after which nothing changes from one to the next but where the step ends


class Task(NamedTuple):
    """A task that is not interrupted; ``batch`` counts micro-batches, ``stage`` the virtual stages of all ranks."""

    kind: str
    batch: int
    stage: int
    part: int = 0


def one_forward_one_backward(ranks: int, micro_batches: int, virtual: int, rank: int) -> Iterator[Task]:
    """A rank's forward and backward passes of one step, in Megatron's order.

    Args:
        ranks: pipeline parallel size p.
        micro_batches: m of a step, with ``virtual`` above 1 a multiple of ``ranks``.
        virtual: stages of a rank, v.
        rank: whose.
    """
    p, v, total = ranks, virtual, micro_batches * virtual

    def task(kind: str, number: int) -> Task:
        chunk = number // p % v
        stage = rank + p * (chunk if kind == FORWARD else v - 1 - chunk)
        return Task(kind, number if v == 1 else number // (p * v) * p + number % p, stage)

    warm_up = min(total, p - rank - 1 if v == 1 else 2 * (p - rank - 1) + (v - 1) * p)
    yield from (task(FORWARD, number) for number in range(warm_up))
    for number in range(warm_up, total):
        yield task(FORWARD, number)
        yield task(BACKWARD, number - warm_up)
    yield from (task(BACKWARD, number) for number in range(total - warm_up, total))


def settled(ranks: int, micro_batches: int) -> int:
    """As many micro-batches as show everything that more of them would, a multiple of ``ranks`` if all are."""
    return min(micro_batches, SETTLED * ranks)


def most_held(ranks: int, micro_batches: int, virtual: int, held: Sequence[float]) -> list[float]:
    """What each rank holds at its fullest for backward passes to come.

    Args:
        ranks: pipeline parallel size.
        micro_batches: of a step.
        virtual: stages of a rank.
        held: what one micro-batch leaves on each virtual stage.

    >>> most_held(4, 8, 1, [1.0, 1.0, 1.0, 1.0])
    [4.0, 3.0, 2.0, 1.0]
    """
    changes = [*held, *(-each for each in held)]
    orders = _orders(ranks, settled(ranks, micro_batches), virtual)
    return [max(0.0, *accumulate(changes[slot] for slot in own)) for own in orders]


@cache
def _orders(ranks: int, micro_batches: int, virtual: int) -> tuple[tuple[int, ...], ...]:
    """Of each rank, the virtual stages of its passes in their order; backward ones count on after the forward ones."""
    stages = ranks * virtual
    return tuple(
        tuple(
            task.stage + stages * (task.kind == BACKWARD)
            for task in one_forward_one_backward(ranks, micro_batches, virtual, rank)
        )
        for rank in range(ranks)
    )


def step_seconds(
    ranks: int, micro_batches: int, virtual: int, forward: Sequence[float], backward: Sequence[float], send: float = 0.0
) -> float:
    """Seconds from the first forward pass of a step to its last backward pass.

    Args:
        ranks: pipeline parallel size.
        micro_batches: of a step.
        virtual: stages of a rank.
        forward: seconds of a micro-batch on each virtual stage, the teacher's included.
        backward: likewise.
        send: seconds to the next stage. Interleaved, only what waits for it is delayed; without, also the sender,
            because Megatron then overlaps nothing.

    >>> step_seconds(2, 4, 1, [1.0, 1.0], [2.0, 2.0])
    15.0
    """
    few = settled(ranks, micro_batches)
    found = _simulated(ranks, few, virtual, forward, backward, send)
    if few == micro_batches:
        return found
    pace = (found - _simulated(ranks, few - ranks, virtual, forward, backward, send)) / ranks
    return found + (micro_batches - few) * pace


def _simulated(
    ranks: int, micro_batches: int, virtual: int, forward: Sequence[float], backward: Sequence[float], send: float
) -> float:
    """All tasks in turn, each as early as its rank and what it waits for allow."""
    busy = send if virtual == 1 and ranks > 1 else 0.0
    send = send if ranks > 1 else 0.0
    seconds = [*forward, *backward]
    free, ends = [0.0] * ranks, list[float]()
    for step in _in_turn(ranks, micro_batches, virtual):
        ready = 0.0 if step.after is None else ends[step.after] + (send if step.sent else 0.0)
        end = max(free[step.rank], ready) + seconds[step.slot] + busy
        free[step.rank] = end
        ends.append(end)
    return max(free)


class _Turn(NamedTuple):
    """A task in the order of a simulation: whose, which of `_orders`, after which one, and whether that is sent."""

    rank: int
    slot: int
    after: int | None
    sent: bool


@cache
def _in_turn(ranks: int, micro_batches: int, virtual: int) -> tuple[_Turn, ...]:
    """All tasks in an order in which each comes after what it waits for; it does not depend on how long they take."""
    tasks = [list(one_forward_one_backward(ranks, micro_batches, virtual, rank)) for rank in range(ranks)]
    last, found, numbers = ranks * virtual - 1, list[_Turn](), dict[Task, int]()
    position, waiting = [0] * ranks, True
    while waiting:
        waiting = False
        for rank, own in enumerate(tasks):
            while position[rank] < len(own):
                task = own[position[rank]]
                before = _before(task, last)
                if before is not None and before not in numbers:
                    break
                after = None if before is None else numbers[before]
                numbers[task] = len(found)
                slot = task.stage + (last + 1) * (task.kind == BACKWARD)
                found.append(_Turn(rank, slot, after, before is not None and before.kind == task.kind))
                position[rank] += 1
                waiting = True
    assert all(position[rank] == len(own) for rank, own in enumerate(tasks)), "the schedule came to a standstill"
    return tuple(found)


def _before(task: Task, last: int) -> Task | None:
    """What a task waits for: that of the stage before, backward of the one after; None where there is nothing."""
    if task.kind == FORWARD:
        return None if task.stage == 0 else task._replace(stage=task.stage - 1)
    return task._replace(kind=FORWARD) if task.stage == last else task._replace(stage=task.stage + 1)
