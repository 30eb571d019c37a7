"""Pictures of a plan: what was measured, with the cuts drawn in, and what became of the experts."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from megatron_slim.aliases import Array
from megatron_slim.extras import require
from megatron_slim.pruning.plan import Plan
from megatron_slim.pruning.plan_view import EXPERTS, Axis, BlockExperts, block_experts, dropped_layers, ranked_axes
from megatron_slim.pruning.statistics import LAYER_KINDS, Statistics, importance_key, layer_key

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import Locator

DPI = 110
MAX_LABELS = 24  # along an axis of a picture; more would overlap
LOG_RATIO = 30.0  # largest over smallest value from which a logarithmic scale shows more
LEGEND_INCHES = 0.35  # below an axis, clear of its ticks
KEPT_COLOUR, CUT_COLOUR, OTHER_COLOUR = "tab:blue", "tab:red", "tab:orange"


def figures(plan: Plan, stats: Statistics) -> dict[str, bytes]:
    """Every picture as PNG bytes, the same for the same plan; by file name."""
    require("plots", "matplotlib", "the page of a plan")
    return {"importances.png": _png(_importances(plan, stats)), "experts.png": _png(_experts(plan, stats))}


def _png(figure: Figure) -> bytes:
    stream = io.BytesIO()
    figure.savefig(stream, dpi=DPI, format="png", metadata={"Software": None})
    return stream.getvalue()


def _height(blocks: int) -> float:
    """Inches for a picture with a row per block."""
    return min(max(2.8, 0.17 * blocks), 9.0)


def short(block: str) -> str:
    """A block as a label.

    >>> short("model.layers.12"), short("mtp.layers.0")
    ('12', 'MTP 0')
    """
    kind, _, index = block.partition(".layers.")
    return index if kind == "model" else f"{kind.upper()} {index}"


def label_positions(count: int) -> list[int]:
    """Which of many get a label: at most `MAX_LABELS`, evenly spaced, the last one too unless it would overlap.

    >>> label_positions(3), label_positions(49)[-3:]
    ([0, 1, 2], [42, 45, 48])
    """
    step = -(-count // MAX_LABELS)
    positions = list(range(0, count, step))
    if positions[-1] != count - 1:
        positions[-1:] = [count - 1]
    return positions


def _label_blocks(axes: Axes, blocks: Sequence[str], dropped: frozenset[int] = frozenset()) -> None:
    positions = label_positions(len(blocks))
    axes.set_yticks(positions, [short(blocks[i]) for i in positions], fontsize="small")
    for tick, position in zip(axes.get_yticklabels(), positions, strict=True):
        if position in dropped:
            tick.set_color(CUT_COLOUR)


def _importances(plan: Plan, stats: Statistics) -> Figure:
    """Experts' importances by block, their cumulative share, every other ranked axis, and what layers do."""
    from matplotlib.figure import Figure

    others = [axis for axis in ranked_axes(plan, stats) if axis.name != EXPERTS]
    names = list(dict.fromkeys(axis.name for axis in others))
    rows = 1 + -(-len(names) // 2)
    top = _height(len(list(plan.source_shape.blocks)))
    figure = Figure(figsize=(13, top + 3.4 * rows), layout="constrained")
    grid = figure.add_gridspec(rows + 1, 2, height_ratios=[top, *[3.2] * rows])
    _heatmap(figure, figure.add_subplot(grid[0, :]), plan, stats)
    _cumulative(figure.add_subplot(grid[1, 0]), [axis for axis in ranked_axes(plan, stats) if axis.name == EXPERTS])
    _layers(figure.add_subplot(grid[1, 1]), plan, stats)
    for place, name in enumerate(names):
        cell = grid[2 + place // 2, :] if len(names) == 1 else grid[2 + place // 2, place % 2]
        _ranked(figure.add_subplot(cell), [axis for axis in others if axis.name == name])
    return figure


def _heatmap(figure: Figure, axes: Axes, plan: Plan, stats: Statistics) -> None:
    """Blocks of the source by rank of the expert, each block relative to its own mean."""
    from matplotlib import colormaps
    from matplotlib.colors import LogNorm, Normalize

    kind, blocks = plan.recipe.experts.importance, list(plan.source_shape.routed_blocks)
    sorted_BE = _rows([_descending(stats.tensors[importance_key(block, kind)]) for block in blocks])
    means = np.nanmean(sorted_BE, axis=1, keepdims=True)
    relative_BE = np.divide(sorted_BE, means, out=np.where(np.isnan(sorted_BE), np.nan, 0.0), where=means > 0)
    positive = relative_BE[relative_BE > 0]
    low, high = (float(positive.min()), float(positive.max())) if positive.size else (0.0, 1.0)
    # A few values next to zero must not take the whole scale.
    logarithmic = bool(positive.size) and high > LOG_RATIO * low
    norm = LogNorm(max(low, high * 1e-4), high, clip=False) if logarithmic else Normalize(0, high)
    # A logarithmic scale has no zeros: they are below it. What a block lacks is masked.
    shown = np.where(relative_BE == 0, low / 2, relative_BE) if logarithmic else relative_BE
    picture = np.ma.masked_invalid(shown)
    colours = colormaps["viridis"].with_extremes(bad="white", under="black")
    extent = (0.5, sorted_BE.shape[1] + 0.5, len(blocks) - 0.5, -0.5)  # ranks count from 1
    image = axes.imshow(picture, aspect="auto", norm=norm, cmap=colours, extent=extent, interpolation="nearest")
    kept = [len(plan.experts[block]) + 0.5 if block in plan.experts else np.nan for block in blocks]
    axes.stairs(
        kept, np.arange(len(blocks) + 1) - 0.5, orientation="horizontal", baseline=None, color=CUT_COLOUR, linewidth=1.5
    )
    removed = {f"model.layers.{layer}" for layer in dropped_layers(plan)}
    gone = [row for row, block in enumerate(blocks) if block in removed]
    axes.hlines(gone, 0.5, sorted_BE.shape[1] + 0.5, color="white", alpha=0.5, linewidth=1.0)
    _label_blocks(axes, blocks, frozenset(gone))
    struck = "; removed layers are struck out" if gone else ""
    axes.set(
        title=f"Experts by {kind}, relative to the mean of the block (red line: kept experts end here{struck})",
        xlabel="rank of the expert in its block",
        ylabel="block",
    )
    axes.title.set_fontsize("medium")
    figure.colorbar(image, ax=axes, pad=0.01, extend="min" if logarithmic and low < high * 1e-4 else "neither")


def _rows(rows: Sequence[npt.NDArray[np.float64]]) -> npt.NDArray[np.float64]:
    """Rows of different lengths as a matrix, not a number beyond their ends."""
    longest = max(map(len, rows))
    return np.stack([np.concatenate([row, np.full(longest - len(row), np.nan)]) for row in rows])


def _span(counts: Sequence[int]) -> str:
    """How many there are, where they may differ.

    >>> _span([4, 4]), _span([4, 7, 2])
    ('4', '2 to 7')
    """
    low, high = min(counts), max(counts)
    return str(low) if low == high else f"{low} to {high}"


def _descending(values: Array) -> npt.NDArray[np.float64]:
    return -np.sort(-values.astype(np.float64))


def _cumulative(axes: Axes, experts: Sequence[Axis]) -> None:
    """Share of the importance against the number of experts kept: every block, and their mean."""
    curves = [_shares(axis) for axis in experts]
    for curve in curves:
        axes.plot(curve, color=KEPT_COLOUR, alpha=0.25, linewidth=0.8)
    axes.plot(np.mean(_rows(curves), axis=0), color="black", label="mean of the blocks")
    kept = [len(axis.kept) for axis in experts]
    reached = float(np.mean([curve[count] for curve, count in zip(curves, kept, strict=True)]))
    for count in sorted(set(kept)):
        first = count == min(kept)
        axes.axvline(count, color=CUT_COLOUR, label=f"{_span(kept)} kept: {reached:.1%}" if first else None)
    axes.plot([0, max(axis.size for axis in experts)], [0, 1], color="grey", linestyle=":", label="all alike")
    axes.set(title="Kept share of the importance", xlabel="experts kept", ylabel="share of a block's importance")
    axes.legend(fontsize="small", loc="lower right")
    axes.margins(x=0.01)


def _shares(axis: Axis) -> npt.NDArray[np.float64]:
    """Cumulative share of the most important 0, 1, ... of an axis."""
    assert axis.importance is not None
    total = axis.importance.sum()
    flat = np.full(axis.size, 1 / axis.size)
    return np.concatenate(([0.0], np.cumsum(_descending(axis.importance) / total if total > 0 else flat)))


def _layers(axes: Axes, plan: Plan, stats: Statistics) -> None:
    """What every layer does to its input, with removed layers shaded."""
    indices = np.arange(plan.source_shape.num_layers)
    handles: list[Artist] = []
    other = axes.twinx()
    for where, kind, colour in zip((axes, other), LAYER_KINDS, (KEPT_COLOUR, OTHER_COLOUR), strict=True):
        values = [float(stats.tensors[layer_key(f"model.layers.{layer}", kind)]) for layer in indices]
        handles += where.plot(indices, values, "o-", color=colour, markersize=3, linewidth=1, label=kind)
        where.set_ylabel(kind, color=colour)
        where.tick_params(axis="y", colors=colour)
    for layer in dropped_layers(plan):
        band = axes.axvspan(layer - 0.5, layer + 0.5, color=CUT_COLOUR, alpha=0.15, linewidth=0, label="removed")
    if dropped_layers(plan):
        handles.append(band)
    positions = label_positions(len(indices))
    axes.set_xticks(positions, [str(each) for each in positions], fontsize="small")
    axes.set(title=f"Effect of a layer on its input (depth: {plan.recipe.depth.method})", xlabel="layer")
    axes.margins(x=0.01, y=0.22)
    other.margins(x=0.01, y=0.22)
    axes.legend(handles=handles, fontsize="small", loc="upper center", ncols=3)


def _ranked(axes: Axes, places: Sequence[Axis]) -> None:
    """Importance against rank in every place where an axis was ranked, and the cut."""
    curves = [_descending(axis.importance) for axis in places if axis.importance is not None]
    for curve in curves:
        axes.plot(np.arange(1, len(curve) + 1), curve, color=KEPT_COLOUR, alpha=1 if len(curves) == 1 else 0.3)
    kept, size = len(places[0].kept), places[0].size
    known = [axis.importance_share for axis in places if axis.importance_share is not None]
    reached = f": {np.mean(known):.1%} of the importance" if known else ""
    axes.axvline(kept + 0.5, color=CUT_COLOUR, label=f"{kept:,} of {size:,} kept{reached}")
    values = np.concatenate(curves)
    if values.min() > 0 and values.max() > LOG_RATIO * values.min():
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)
    axes.set(title=places[0].name.capitalize(), xlabel="rank", ylabel="importance")
    axes.legend(fontsize="small", loc="lower left")
    axes.margins(x=0.01)


def _experts(plan: Plan, stats: Statistics) -> Figure:
    """By surviving block: what became of the experts, how large groups are, and what the survivors had."""
    from matplotlib.figure import Figure

    blocks = block_experts(plan, stats)
    names = [block.axis.place for block in blocks]
    height = _height(len(blocks))
    figure = Figure(figsize=(13, height + 1.6), layout="constrained")
    left, middle, right = figure.subplots(1, 3, sharey=True, width_ratios=[4, 4, 3])
    rows = np.arange(len(blocks))
    _fates(left, rows, blocks)
    _legend_below(left, height)
    _group_sizes(figure, middle, blocks)
    for label, values in {
        f"importance ({plan.recipe.experts.importance})": [block.axis.importance_share for block in blocks],
        "routing (frequency)": [block.routing_share for block in blocks],
    }.items():
        right.plot([np.nan if value is None else value for value in values], rows, "o-", markersize=4, label=label)
    right.set(title="Kept share of the importance", xlim=(0, 1.02))
    right.grid(axis="x", alpha=0.4)
    _legend_below(right, height)
    left.set_ylim(len(blocks) - 0.5, -0.5)
    left.set_ylabel("block of the source")
    _label_blocks(left, names)
    figure.suptitle(
        f"{plan.recipe.experts.method}: {_span([block.axis.size for block in blocks])} experts in a block, "
        f"{_span([len(block.groups) for block in blocks])} of them stay"
    )
    return figure


def _fates(axes: Axes, rows: Array, blocks: Sequence[BlockExperts]) -> None:
    parts = {
        "unchanged": ([block.unchanged for block in blocks], KEPT_COLOUR),
        "survives, absorbs others": ([len(block.groups) - block.unchanged for block in blocks], "tab:cyan"),
        "absorbed": ([block.absorbed for block in blocks], OTHER_COLOUR),
        "dropped": ([block.dropped for block in blocks], "lightgrey"),
    }
    start = np.zeros(len(blocks))
    for label, (counts, colour) in parts.items():
        if any(counts):
            axes.barh(rows, counts, left=start, color=colour, height=0.8, label=label)
        start += counts
    axes.set(title="What became of the experts", xlim=(0, start.max()))


def _group_sizes(figure: Figure, axes: Axes, blocks: Sequence[BlockExperts]) -> None:
    """How many survivors are made of 2, 3, ... experts; the unchanged ones would outshine them."""
    largest = max(block.largest_group for block in blocks)
    axes.set(title="Merged groups by size", xlabel="experts in a group")
    if largest < 2:
        axes.set_xticks([])
        axes.text(0.5, 0.5, "nothing is merged", ha="center", va="center", transform=axes.transAxes)
        return
    counts = np.zeros((len(blocks), largest - 1))
    for row, block in enumerate(blocks):
        for group in block.groups:
            if len(group.members) > 1:
                counts[row, len(group.members) - 2] += 1
    extent = (1.5, largest + 0.5, len(blocks) - 0.5, -0.5)
    picture = np.ma.masked_equal(counts, 0)
    image = axes.imshow(picture, aspect="auto", cmap="viridis_r", extent=extent, interpolation="nearest", vmin=1)
    _at_integers(axes.xaxis.get_major_locator())
    bar = figure.colorbar(image, ax=axes, pad=0.01, label="groups")
    _at_integers(bar.ax.yaxis.get_major_locator())


def _at_integers(locator: Locator) -> None:
    from matplotlib.ticker import MaxNLocator

    assert isinstance(locator, MaxNLocator)
    locator.set_params(integer=True)


def _legend_below(axes: Axes, height: float) -> None:
    axes.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -LEGEND_INCHES / height), ncols=2)
