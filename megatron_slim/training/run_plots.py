"""A run as one picture: losses, throughput, time of stages, balance of experts (no torch)."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_slim.training.run_view import PARTS, Series, drawn_names, in_nats, layers, line_style, loss_names, stages

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

DPI = 110
MAX_LABELS = 24  # along an axis; more would overlap


def picture(run: Series) -> bytes:
    """PNG bytes."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(13, 8.5), layout="constrained")
    axes = figure.subplots(2, 2)
    _losses(axes[0, 0], run)
    _throughput(axes[0, 1], run)
    _stages(axes[1, 0], run)
    _experts(figure, axes[1, 1], run)
    for over_time in (axes[0, 0], axes[0, 1], axes[1, 1]):
        over_time.xaxis.set_major_locator(MaxNLocator(integer=True))
    stream = io.BytesIO()
    figure.savefig(stream, dpi=DPI, format="png", metadata={"Software": None})
    return stream.getvalue()


def _curve(axes: Axes, points: Mapping[int, float], label: str, **style: Any) -> Line2D:
    steps = sorted(points)
    marker = "." if len(steps) < 40 else None
    (drawn,) = axes.plot(steps, [points[step] for step in steps], label=label, marker=marker, **style)
    return drawn


def _losses(axes: Axes, run: Series) -> None:
    drawn, names = [], drawn_names(loss_names(run))
    other = None if all(map(in_nats, names)) else other_scale(axes)
    for number, name in enumerate(names):
        style = {"color": f"C{number}", "linestyle": line_style(name), "linewidth": 1.3}
        drawn.append(_curve(axes if other is None or in_nats(name) else other, run[name], name, **style))
    axes.set(title="Loss terms", xlabel="iteration", ylabel="nats per token")
    scales = [axes] if other is None else [axes, other]
    for scale in scales:  # space for the legend, which is on the scale that is drawn last
        low, high = scale.get_ylim()
        scale.set_ylim(top=high + 0.1 * (1 + len(scales)) * (high - low))
    size = "small" if other is None else "x-small"
    columns = 2 if any("/" in name for name in names) else 3  # names of budgets are longer
    scales[-1].legend(handles=drawn, fontsize=size, ncols=columns, loc="upper center")
    axes.grid(alpha=0.3)


def other_scale(axes: Axes) -> Axes:
    """A second scale on the right, for terms that are not in nats."""
    other = axes.twinx()
    other.set_ylabel("other terms, per token")
    return other


def _throughput(axes: Axes, run: Series) -> None:
    """Tokens per second on the left, and what the models make of the hardware on the right."""
    rate = _curve(axes, run["slim/throughput/tokens_per_second_per_gpu"], "tokens/s/GPU", color="tab:blue")
    axes.set(title="Throughput", xlabel="iteration", ylabel="tokens/s/GPU")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    other, drawn = axes.twinx(), [rate]
    known = any(tag.startswith("slim/mfu/") for tag in run)
    for model, colour in (("student", "tab:orange"), ("teacher", "tab:green")):
        tag = f"slim/mfu/{model}" if known else f"slim/throughput/{model}_tflops_per_gpu"
        if tag in run:
            points = {step: value * (100 if known else 1) for step, value in run[tag].items()}
            drawn.append(_curve(other, points, model, color=colour, linestyle="--" if model == "student" else ":"))
    other.set_ylabel("model FLOP utilisation, %" if known else "TFLOP/s/GPU")
    other.set_ylim(bottom=0)
    axes.legend(handles=drawn, fontsize="small", loc="lower right")


def _stages(axes: Axes, run: Series) -> None:
    """Seconds of each stage at the last log, part upon part, and their mean."""
    found = stages(run)
    names, below = list(found), np.zeros(len(found))
    for part in PARTS:
        seconds = np.array([found[name].get(part, 0.0) for name in names])
        if seconds.any():
            axes.bar(names, seconds, bottom=below, label=part.replace("_", " "), width=0.7)
            below = below + seconds
    axes.axhline(below.mean(), color="black", linestyle=":", linewidth=1, label="mean")
    axes.set_xticks(range(0, len(names), -(-len(names) // MAX_LABELS)))
    axes.set(title="What stages compute, at the last log", xlabel="virtual stage", ylabel="seconds per iteration")
    axes.set_ylim(top=1.3 * below.max())
    axes.legend(fontsize="small", ncols=3, loc="upper center")


def _experts(figure: Figure, axes: Axes, run: Series) -> None:
    """Maximum over mean of every layer, in time."""
    found = layers(run, "max_over_mean")
    steps = sorted(set().union(*found.values()))
    values = np.array([[points.get(step, np.nan) for step in steps] for points in found.values()])
    edges = np.array([steps[0] - (steps[1] - steps[0] if len(steps) > 1 else 1), *steps])
    drawn = axes.pcolormesh(edges, np.arange(len(found) + 1), values, cmap="YlOrRd", vmin=1.0)
    every = -(-len(found) // MAX_LABELS)
    rows = range(0, len(found), every)
    labels = [list(found)[row].replace("layer_", "").replace("mtp_", "MTP ") for row in rows]
    axes.set_yticks([row + 0.5 for row in rows], labels, fontsize="small")
    axes.invert_yaxis()
    axes.set(title="Tokens of the busiest expert over the mean", xlabel="iteration", ylabel="layer")
    # Next to the map: the layout would put it beyond the second scale of the picture above.
    figure.colorbar(drawn, cax=axes.inset_axes((1.02, 0.0, 0.03, 1.0)))
