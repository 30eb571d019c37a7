"""Pictures of results: arms as points of every seed with mean and spread, and effects over sizes (no torch)."""

from __future__ import annotations

import io
from typing import Any

from benchmarks.findings.claims import CLAIMS
from benchmarks.findings.collect import Results
from benchmarks.findings.matrix import QUESTIONS
from benchmarks.findings.paired import difference
from benchmarks.findings.sizes import SIZES
from benchmarks.findings.tables import NAMES, SMALLER_IS_BETTER

DPI = 110
ROW_INCHES, HEAD_INCHES = 0.32, 1.1


def picture(results: Results, key: str) -> bytes | None:
    """PNG bytes of a question; None where none of its arms is there."""
    if not results.rows[key]:
        return None
    from matplotlib.figure import Figure

    question = QUESTIONS[key]
    metrics = [metric for metric in question.metrics if _drawn(results, key, metric)][:2]
    height = HEAD_INCHES + ROW_INCHES * len(results.lines(key))
    figure = Figure(figsize=(11, max(3.0, height)), layout="constrained")
    panels = figure.subplots(1, len(metrics), squeeze=False, sharey=True)[0]
    for axes, metric in zip(panels, metrics, strict=True):
        _arms(axes, results, key, metric)
    return _png(figure)


def _drawn(results: Results, key: str, metric: str) -> bool:
    return any(row.metric == metric for row in results.rows[key])


def _arms(axes: Any, results: Results, key: str, metric: str) -> None:
    """One line for each arm of a teacher: its seeds, their mean, and a bar of their standard deviation."""
    lines = results.lines(key)
    several = results.has_several_teachers(key)
    labels = [f"{label} ({teacher})" if several and teacher else label for label, teacher in lines]
    for line, (label, teacher) in enumerate(lines):
        spread = results.spread(key, label, metric, teacher)
        if spread is None:
            continue
        values = results.of_seeds(key, label, metric, teacher)
        axes.scatter(values, [line] * len(values), s=14, color="C0", alpha=0.5)
        axes.errorbar(spread.mean, line, xerr=spread.deviation or 0.0, fmt="|", color="C1", capsize=3, markersize=12)
    direction = "smaller is better" if metric in SMALLER_IS_BETTER else "larger is better"
    axes.set(title=f"{NAMES[metric]} ({direction})", yticks=range(len(labels)), yticklabels=labels)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.locator_params(axis="x", nbins=6)
    axes.grid(axis="x", alpha=0.3)


def scaling(results: Results) -> bytes | None:
    """PNG bytes of the two effects at each size of teacher; None of fewer than two sizes."""
    effects: dict[str, dict[str, tuple[float, float]]] = {}
    for claim in CLAIMS:
        if claim.question != "s":
            continue
        one, other = (results.values("s", label, claim.metric) for label in (claim.first, claim.second))
        if (found := difference(one, other)) is not None:
            size = claim.first.partition(",")[0]
            effects.setdefault(claim.metric, {})[size] = (found.mean, found.error or 0.0)
    if max((len(by_size) for by_size in effects.values()), default=0) < 2:
        return None
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.6), layout="constrained")
    for axes, (metric, by_size) in zip(
        figure.subplots(1, len(effects), squeeze=False)[0], effects.items(), strict=True
    ):
        sizes = [size for size in SIZES if size in by_size]
        means, errors = zip(*(by_size[size] for size in sizes), strict=True)
        axes.errorbar(sizes, means, yerr=errors, marker="o", capsize=4)
        axes.axhline(0, color="0.6", linewidth=1)
        axes.set(title=f"difference of {NAMES[metric]}", xlabel="teacher", xmargin=0.2)
    return _png(figure)


def _png(figure: Any) -> bytes:
    stream = io.BytesIO()
    figure.savefig(stream, dpi=DPI, format="png", metadata={"Software": None})
    return stream.getvalue()
