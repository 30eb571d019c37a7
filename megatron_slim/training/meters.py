"""What one rank measures as it trains: compute time, tokens per expert, loss terms.

Nothing here synchronises with the device or with other ranks: sums stay on the device, and time is what passes between
two CUDA events, which are read at the end of an iteration, when the device has done its work anyway.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import megatron_slim.mcore

import torch
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor, nn

from megatron_slim.distillation.elastic import ElasticModel
from megatron_slim.distillation.losses import LossWeights
from megatron_slim.distillation.model import DistillationModel
from megatron_slim.distillation.terms import LOSS_TERMS, MTP_BETA, factors, terms_of
from megatron_slim.training.run_figures import BACKWARD, KINDS, LOSSES, STUDENT, TEACHER


def weights_of_terms(weights: LossWeights, *, has_teacher: bool) -> dict[str, float]:
    """What each term that is minimised is multiplied by, by its name in the log.

    >>> weights_of_terms({"kd_lambda": 0.75, "mtp_beta": 0.2}, has_teacher=True)["mtp lm loss"]
    0.05
    """
    terms = terms_of(has_teacher=has_teacher, has_mtp=True)
    return {
        terms[key].name: (weights[MTP_BETA.key] if terms[key].mtp else 1.0) * factor
        for key, factor in factors(terms, weights).items()
    }


def _now() -> torch.cuda.Event:
    """An event on the current stream; on a CPU, the time (`device.py`)."""
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


@dataclass(frozen=True)
class _Span:
    """Time of one kind of work on one virtual stage, from one event to another."""

    chunk: int
    kind: str
    start: torch.cuda.Event
    end: torch.cuda.Event
    within: str | None = None


@dataclass
class StageClock:
    """Seconds that this rank computes, by virtual stage and kind; what it waits for between stages is not in it."""

    seconds: dict[tuple[int, str], float] = field(default_factory=dict)
    _spans: list[_Span] = field(default_factory=list)
    _chunk: int | None = None

    def watch(self, chunk: DistillationModel) -> None:
        """Tell what a stage's forward pass spends on the teacher; it tells the losses' itself, by `losses`."""
        if chunk.teacher is None:
            return
        teacher: list[torch.cuda.Event] = []
        chunk.teacher.register_forward_pre_hook(lambda *_: teacher.append(_now()))
        chunk.teacher.register_forward_hook(lambda *_: self._add_part(TEACHER, teacher.pop()))

    @contextlib.contextmanager
    def forward(self, vp_stage: int | None) -> Iterator[None]:
        """Around the forward pass of a training step; validation is not timed."""
        if not torch.is_grad_enabled():
            yield
            return
        self._chunk, start = vp_stage or 0, _now()
        try:
            yield
        finally:
            self._spans.append(_Span(self._chunk, STUDENT, start, _now()))
            self._chunk = None

    @contextlib.contextmanager
    def teacher_alone(self, vp_stage: int | None) -> Iterator[None]:
        """Around a forward pass of a teacher that computes ahead."""
        start = _now()
        yield
        self._spans.append(_Span(vp_stage or 0, TEACHER, start, _now()))

    @contextlib.contextmanager
    def losses(self) -> Iterator[None]:
        """Around output layers and losses: the student's ``timed_losses``."""
        start = _now()
        yield
        self._add_part(LOSSES, start)

    def _add_part(self, kind: str, start: torch.cuda.Event) -> None:
        if self._chunk is not None:
            self._spans.append(_Span(self._chunk, kind, start, _now(), within=STUDENT))

    def watch_backward(self, output: Tensor, vp_stage: int | None) -> None:
        """Time the backward pass from when a stage's output gets its gradient to when nothing is left to do."""
        if not output.requires_grad:
            return

        def begin(_: Tensor) -> None:
            start = _now()

            def end() -> None:
                self._spans.append(_Span(vp_stage or 0, BACKWARD, start, _now()))

            # As DistributedDataParallel: called once, after the backward pass, on the stream that it was started on.
            torch.autograd.Variable._execution_engine.queue_callback(end)

        output.register_hook(begin)

    def end_iteration(self) -> None:
        """Read the events, of which the device must have passed the last."""
        for span in self._spans:
            span.end.synchronize()  # has passed: returns at once
            seconds = span.start.elapsed_time(span.end) / 1000.0
            self._add(span.chunk, span.kind, seconds)
            if span.within is not None:
                self._add(span.chunk, span.within, -seconds)
        self._spans.clear()

    def _add(self, chunk: int, kind: str, seconds: float) -> None:
        self.seconds[chunk, kind] = self.seconds.get((chunk, kind), 0.0) + seconds

    def take(self, chunks: int) -> Tensor:
        """Seconds [chunks, kinds] since this was called last."""
        found = [[self.seconds.get((chunk, kind), 0.0) for kind in KINDS] for chunk in range(chunks)]
        self.seconds.clear()
        return torch.tensor(found, dtype=torch.float64)


@dataclass
class ExpertCounter:
    """Tokens that this rank sent to each expert of each layer of the student, the layers of MTP blocks last.

    Layers have the numbers under which Megatron records what routers do; of an elastic student all budgets have some.

    Counted from the router's map of tokens to experts: Megatron's own counters are kept for some ways of load balancing
    only, and in the parameters' dtype, where numbers above 256 are rounded in bf16.
    """

    counts: dict[int, Tensor] = field(default_factory=dict)

    def watch(self, chunk: DistillationModel) -> None:
        """Count in all layers of a stage."""
        students = chunk.students if isinstance(chunk, ElasticModel) else (chunk,)
        for module in (module for student in students for module in student.modules()):
            if isinstance(module, TopKRouter):
                layer = module.layer_number - 1 + (module.config.num_layers if module.is_mtp_layer else 0)
                device = torch.cuda.current_device()
                self.counts[layer] = torch.zeros(module.num_experts, dtype=torch.int64, device=device)
                module.register_forward_hook(self._hook(layer))

    def _hook(self, layer: int) -> Callable[[nn.Module, object, tuple[Tensor, Tensor]], None]:
        def count(_module: nn.Module, _inputs: object, output: tuple[Tensor, Tensor]) -> None:
            # Not in validation, and of the two forward passes of recomputation in the second.
            if torch.is_grad_enabled():
                self.counts[layer] += output[1].sum(dim=0)

        return count

    def forget(self) -> None:
        """Begin again with the next iteration."""
        for counts in self.counts.values():
            counts.zero_()

    def take(self, layers: int, experts: int) -> Tensor:
        """Counts [layers, experts] since they were zero, on the device; zeros for the layers of other ranks."""
        found = torch.zeros(layers, experts, dtype=torch.float64, device=torch.cuda.current_device())
        for layer, counts in self.counts.items():
            found[layer, : len(counts)] += counts
        self.forget()
        return found


@dataclass
class LossSums:
    """Of every loss term, over this rank's tokens: its sum, their number, and the sum times the term's weight.

    Attributes:
        totals: of the last iteration, [terms, 3]; None where this rank has no losses.
    """

    totals: Tensor | None = None
    _current: Tensor | None = None

    def add(self, report: Mapping[str, Tensor], weight: float = 1.0) -> None:
        """One micro-batch: (sum, count) by name, what else the log carries among them.

        Args:
            report: what is logged.
            weight: of all terms, where the micro-batch goes through one of several models.
        """
        none = torch.zeros(2, device=torch.cuda.current_device())
        names = [term.name for term in LOSS_TERMS.values()]
        pairs = torch.stack([report[name].float() if name in report else none for name in names])
        found = torch.cat([pairs.double(), weight * pairs[:, :1].double()], dim=1)
        self._current = found if self._current is None else self._current + found

    def end_iteration(self, weights: Mapping[str, float]) -> None:
        """Weigh what came in this iteration; what came before is forgotten."""
        self.totals, found = None, self._current
        if found is None:
            return
        each = [weights.get(term.name, 0.0) for term in LOSS_TERMS.values()]
        found[:, 2] *= torch.tensor(each, dtype=torch.float64, device=found.device)
        self.totals, self._current = found, None

    def take(self) -> Tensor:
        """Sum, count and weighted sum [terms, 3] of the last iteration, on the device."""
        if self.totals is None:
            return torch.zeros(len(LOSS_TERMS), 3, dtype=torch.float64, device=torch.cuda.current_device())
        return self.totals
