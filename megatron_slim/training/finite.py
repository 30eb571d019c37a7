"""NaN, infinity, token ids beyond the vocabulary: found before each optimizer step, and where they began.

What is watched is reduced to one number where it arises and stays on the device; the host looks once per iteration,
just before Megatron reads the gradient norm, which waits for the device anyway. All ranks then know together whether
anything was found on any of them, so that they leave together and no rank waits for one that has gone.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import megatron_slim.mcore

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel as DDP
from megatron.core.distributed import finalize_model_grads
from megatron.core.transformer import MegatronModule
from megatron.training import get_args
from torch import Tensor

from megatron_slim.errors import DataError, SlimError, summarise

T = TypeVar("T")
FIX = "nothing of this step was saved: resume from the last checkpoint with other data or a lower learning rate"


@dataclass(frozen=True)
class Found:
    """Something that is not finite.

    Attributes:
        stage: position in the (virtual) pipeline, from 1.
        rank: global rank.
        kind: ``states`` (hidden states that leave a stage), ``loss`` or ``gradient``.
        name: whose states, which term, which parameter.
        value: nan, inf or -inf.
    """

    stage: int
    rank: int
    kind: str
    name: str
    value: float


@dataclass
class FiniteWatch:
    """What one rank has seen since the host looked last: running sums, which stay finite only if every addend is.

    Attributes:
        sums: by kind, name and stage.
        refused: what was wrong with batches that this rank has read.
    """

    sums: dict[tuple[str, str, int], Tensor] = field(default_factory=dict)
    refused: list[DataError] = field(default_factory=list)

    def refuse(self, error: DataError) -> None:
        """Have all ranks leave at the end of this iteration with what one of them has read."""
        self.refused.append(error)

    def add(self, kind: str, name: str, vp_stage: int | None, value: Tensor) -> None:
        """Watch a scalar on the device; reads nothing back."""
        key = (kind, name, _stage(vp_stage))
        value = value.detach().float()
        self.sums[key] = self.sums[key] + value if key in self.sums else value

    def add_states(self, name: str, vp_stage: int | None, hidden_states: Tensor) -> None:
        """Watch hidden states that leave a pipeline stage, by the largest of them."""
        self.add("states", name, vp_stage, torch.linalg.vector_norm(hidden_states.detach(), torch.inf))

    def finalize_grads(self, model: list[MegatronModule], *args: object, **kwargs: object) -> None:
        """Megatron's ``finalize_model_grads_func``: what it does at the end of an iteration, and `check`."""
        finalize_model_grads(model, *args, **kwargs)
        self.check(model)

    def check(self, model: Sequence[MegatronModule] = ()) -> None:
        """Look at all that was watched, and at the gradients of ``model``; every rank must call it.

        Raises:
            SlimError: on all ranks, where one of them has something that is not finite.
            DataError: on all ranks, where one of them has refused a batch.
        """
        values = [*self.sums.values(), *_gradient_bounds(model)]
        device = torch.cuda.current_device()
        stacked = torch.stack([value.to(device) for value in values]) if values else torch.zeros(1, device=device)
        bad = ((~stacked.isfinite()).any() | bool(self.refused)).float().reshape(1)
        torch.distributed.all_reduce(bad, op=torch.distributed.ReduceOp.MAX)
        if bad.item():
            where = f"iteration {getattr(get_args(), 'curr_iteration', 0) + 1}"
            if refused := _everywhere(map(str, self.refused)):  # before losses, which it may have made infinite
                raise DataError(refused[0], where=where)
            found = _everywhere([*self._found(), *_found_in_gradients(model)])
            raise SlimError(describe(found, _stages()), where=where, fix=FIX)
        self.sums.clear()

    def _found(self) -> Iterator[Found]:
        rank = torch.distributed.get_rank()
        for (kind, name, stage), value in self.sums.items():
            if not value.isfinite():
                yield Found(stage, rank, kind, name, value.item())


def _everywhere(mine: Iterable[T]) -> list[T]:
    """What each rank has, in their order; all ranks must call it."""
    everywhere: list[list[T]] = [[] for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather_object(everywhere, list(mine))
    return list(itertools.chain.from_iterable(everywhere))


def _stages() -> int:
    pipeline = parallel_state.get_pipeline_model_parallel_world_size()
    return int(pipeline * (parallel_state.get_virtual_pipeline_model_parallel_world_size() or 1))


def _stage(vp_stage: int | None) -> int:
    """Position in the whole pipeline, from 1; interleaved, a rank's chunks are a pipeline's length apart."""
    pipeline = parallel_state.get_pipeline_model_parallel_world_size()
    return int((vp_stage or 0) * pipeline + parallel_state.get_pipeline_model_parallel_rank() + 1)


def _gradients(model: Sequence[MegatronModule]) -> Iterator[tuple[int, str, Tensor]]:
    """Pipeline position, name and gradient of every parameter that has one."""
    for number, chunk in enumerate(model):
        for name, parameter in chunk.named_parameters():
            gradient = getattr(parameter, "main_grad", None)
            gradient = parameter.grad if gradient is None else gradient
            if gradient is not None:
                yield _stage(number), name.removeprefix("module.").removeprefix("module."), gradient


def _gradient_bounds(model: Sequence[MegatronModule]) -> Iterator[Tensor]:
    """Least and largest gradients; under fp16 infinite ones are how Megatron finds its loss scale, and it skips them.

    DDP has the gradients of many parameters in one buffer: it is read once, which an infinite norm takes longer for.
    """
    for chunk in () if get_args().fp16 else model:
        buffers = [*chunk.buffers, *chunk.expert_parallel_buffers] if isinstance(chunk, DDP) else []
        gradients = [buffer.grad_data for buffer in buffers] or [gradient for _, _, gradient in _gradients([chunk])]
        for gradient in gradients:
            if gradient.numel():
                yield from (bound.float() for bound in gradient.aminmax())


def _found_in_gradients(model: Sequence[MegatronModule]) -> Iterator[Found]:
    for stage, name, gradient in () if get_args().fp16 else _gradients(model):
        if not gradient.isfinite().all():
            yield Found(stage, torch.distributed.get_rank(), "gradient", name, gradient.float().sum().item())


def describe(found: Iterable[Found], stages: int) -> str:
    """Which terms, and where it began: the first stage in the order of the forward pass; for gradients, the last.

    >>> states = Found(1, 0, "states", "student", float("nan"))
    >>> describe([Found(2, 1, "loss", "lm loss", float("nan")), states], 2)
    'lm loss is nan; first seen in hidden states of the student that leave pipeline stage 1 of 2 (rank 0)'
    >>> describe([Found(1, 0, "gradient", "a", float("inf")), Found(2, 1, "gradient", "b", float("nan"))], 2)
    'gradients are not finite, the losses are; on pipeline stage 2 of 2 (rank 1): b is nan'
    """
    by_kind: dict[str, list[Found]] = {"loss": [], "states": [], "gradient": []}
    for each in found:
        by_kind[each.kind].append(each)
    losses, states, gradients = by_kind["loss"], by_kind["states"], by_kind["gradient"]
    if not losses and not states:
        last = max(each.stage for each in gradients)
        # Backward, so the last of them in the model is nearest to where it began.
        here = [each for each in gradients if each.stage == last][::-1]
        return f"gradients are not finite, the losses are; on {_place(here[0], stages)}: {_name_all(here)}"
    terms = _name_all(losses) or "hidden states are not finite"
    first = min([*states, *losses], key=lambda each: (each.stage, each.kind == "loss", each.rank))
    what = f"hidden states of the {first.name} that leave " if first.kind == "states" else ""
    return f"{terms}; first seen {'in ' if what else 'on '}{what}{_place(first, stages)}"


def _place(found: Found, stages: int) -> str:
    return f"pipeline stage {found.stage} of {stages} (rank {found.rank})"


def _name_all(found: Iterable[Found]) -> str:
    """Each name once, with its value."""
    values = {each.name: each.value for each in found}
    return summarise([f"{name} is {value}" for name, value in values.items()])
