"""Losses of all phases over the tokens of training, read from their events, as numbers and as a picture (no torch)."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_slim.aliases import Document, JsonObject
from megatron_slim.compression.report_inputs import CompressionRun
from megatron_slim.errors import SlimError
from megatron_slim.extras import require
from megatron_slim.training.run_plots import other_scale
from megatron_slim.training.run_view import Series, in_nats, line_style, loss_names, read_run

DPI = 200  # of a picture that a phone shows in a third of its size
MAX_MARKED, MAX_POINTS = 40, 200  # points of a curve that are marked; that are drawn, means of more
_FRACTION, _TOKENS = "slim/progress/fraction", "slim/progress/tokens"
_RATE = "slim/throughput/tokens_per_second_per_gpu"


@dataclass(frozen=True)
class PhaseCurves:
    """One phase of training.

    Attributes:
        phase: its number.
        before: tokens of the phases before it.
        tokens: its own, so far.
        fraction: of its iterations that is done.
        losses: [points, 2] of every term: tokens of all phases so far, nats per token.
        flops_per_token: operations of a training step by model, as the run counted them (`architecture.flops`).
    """

    phase: int
    before: float
    tokens: float
    fraction: float
    losses: Document
    flops_per_token: Mapping[str, float]

    @property
    def flops(self) -> float:
        """Of all its tokens, teacher and student."""
        return self.tokens * sum(self.flops_per_token.values())


def read_curves(run: CompressionRun) -> tuple[list[PhaseCurves], str]:
    """Curves of the phases that have logged something, and why there are none of the others."""
    found: list[PhaseCurves] = []
    reasons = []
    for phase in run.phases:
        events = run.phase_directory(phase) / "training"
        if not events.is_dir():
            continue
        before = found[-1].before + found[-1].tokens if found else 0.0
        try:
            require("plots", "tensorboard", "a curve of losses")
            found.append(_phase_curves(phase, before, read_run(events), events))
        except SlimError as error:
            reasons.append(str(error))
    return found, "; ".join(dict.fromkeys(reasons))


def _phase_curves(phase: int, before: float, run: Series, where: Path) -> PhaseCurves:
    if not run.get(_TOKENS) or not run.get(_FRACTION):
        raise SlimError("the events hold nothing of slim/", where=str(where))
    (start, first), tokens = _beginning(run), run[_TOKENS]
    steps = sorted(tokens)
    losses = {}
    for name in loss_names(run):
        if points := run[name]:
            at = np.interp(sorted(points), [start, *steps], [first, *(tokens[step] for step in steps)])
            losses[name] = np.column_stack([before + at - first, [points[step] for step in sorted(points)]])
    fraction = run[_FRACTION][max(run[_FRACTION])]
    return PhaseCurves(phase, before, tokens[steps[-1]] - first, fraction, losses, _flops_per_token(run))


def _beginning(run: Series) -> tuple[int, float]:
    """Iteration and tokens that a phase began after: it may count on from the phases before it.

    Both grow evenly with the done fraction, so two logs give them. A phase with a single one is taken to count from 0.
    """
    fractions, tokens = run[_FRACTION], run[_TOKENS]
    first, last = min(fractions), max(fractions)
    rise = fractions[last] - fractions[first]
    start = round(first - fractions[first] * (last - first) / rise) if rise > 0 else 0
    if start <= 0:
        return 0, 0.0
    return start, tokens[first] - (tokens[last] - tokens[first]) / (last - first) * (first - start)


def _flops_per_token(run: Series) -> dict[str, float]:
    """What the run multiplied its rate by, from its last log."""
    found, rates = {}, run.get(_RATE, {})
    for model in ("student", "teacher"):
        points = run.get(f"slim/throughput/{model}_tflops_per_gpu", {})
        if points and rates.get(last := max(points)):
            found[model] = points[last] * 1e12 / rates[last]
    return found


def summary(curves: Sequence[PhaseCurves]) -> list[JsonObject]:
    """The curves as a few numbers each, for report.json."""
    return [
        {
            "phase": each.phase,
            "tokens_before": each.before,
            "tokens": each.tokens,
            "fraction": each.fraction,
            "flops_per_token": dict(each.flops_per_token),
            "losses": {
                name: {"first": float(values[0, 1]), "last": float(values[-1, 1]), "least": float(values[:, 1].min())}
                for name, values in each.losses.items()
            },
        }
        for each in curves
    ]


def thinned(values: Any) -> Any:
    """A curve of at most `MAX_POINTS` points, [points, 2]: means of as many neighbours as that takes.

    >>> thinned(np.array([[1.0, 5.0], [2.0, 6.0]])).tolist()
    [[1.0, 5.0], [2.0, 6.0]]
    """
    together = -(-len(values) // MAX_POINTS)
    return np.array([values[at : at + together].mean(axis=0) for at in range(0, len(values), together)])


def picture(curves: Sequence[PhaseCurves]) -> bytes:
    """All terms of all phases on one axis of tokens, as PNG bytes."""
    require("plots", "matplotlib", "the picture of losses")
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    from megatron_slim.training.run_figures import amount

    figure = Figure(figsize=(5.6, 4.4), layout="constrained")
    axes = figure.subplots()
    names = loss_names({name for each in curves for name in each.losses})
    other = None if all(map(in_nats, names)) else other_scale(axes)
    for number, name in enumerate(names):
        parts = [each.losses[name] for each in curves if name in each.losses]
        for part, values in enumerate(map(thinned, parts)):
            marker = "." if len(values) < MAX_MARKED else None
            style: JsonObject = {"color": f"C{number}", "linestyle": line_style(name), "marker": marker}
            where: Any = axes if in_nats(name) else other
            where.plot(values[:, 0], values[:, 1], label=None if part else name, linewidth=1.3, **style)
    for each in curves if len(curves) > 1 else ():
        axes.axvline(each.before, color="grey", linewidth=0.8, linestyle=":")
        axes.annotate(f"phase {each.phase}", (each.before, 1), xycoords=("data", "axes fraction"), xytext=(0, 4),
                      textcoords="offset points", fontsize="small", color="dimgrey")  # fmt: skip
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: amount(value) if value > 0 else "0"))
    axes.set(xlabel="tokens", ylabel="nats per token")
    axes.grid(alpha=0.3)
    figure.legend(ncols=2, loc="outside lower center", frameon=False)
    stream = io.BytesIO()
    figure.savefig(stream, dpi=DPI, format="png", metadata={"Software": None})
    return stream.getvalue()
