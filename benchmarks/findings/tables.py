"""Results as CSV files and back, and as tables."""

from __future__ import annotations

import csv
import dataclasses
import io
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks.findings.claims import BELOW, SAME
from benchmarks.findings.collect import Judged, Results, Row
from benchmarks.findings.matrix import QUESTIONS
from benchmarks.findings.paired import MISSING, Spread
from megatron_slim.errors import SlimError

COLUMNS = tuple(field.name for field in dataclasses.fields(Row))
NAMES = {
    "loss": "loss",
    "kl": "KL",
    "top1_agreement": "same first token",
    "mtp_loss": "MTP loss",
    "mean_accepted_length": "mean accepted length",
    "one_shot_loss": "loss before training",
    "one_shot_kl": "KL before training",
    **{f"acc_{k}": f"acc_{k}" for k in range(5)},
}
SMALLER_IS_BETTER = ("loss", "kl", "mtp_loss", "one_shot_loss", "one_shot_kl")


def to_csv(rows: Iterable[Row]) -> str:
    """Long form, a line for every figure; values have all of their digits."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows([getattr(row, column) for column in COLUMNS] for row in rows)
    return stream.getvalue()


def from_csv(path: Path) -> list[Row]:
    """What `to_csv` has written; nothing where there is no file.

    Raises:
        SlimError: a line cannot be read.
    """
    if not path.exists():
        return []
    rows = []
    with path.open(encoding="utf-8", newline="") as stream:
        for number, line in enumerate(csv.DictReader(stream), 2):
            try:
                texts = {name: line[name] for name in ("arm", "cell", "teacher", "definition", "metric")}
                rows.append(Row(**texts, seed=int(line["seed"]), value=float(line["value"])))
            except (KeyError, TypeError, ValueError) as error:
                raise SlimError("the line cannot be read", where=f"{path}:{number}", fix="restore the file") from error
    return rows


def shown(spread: Spread | None) -> str:
    """A mean with its standard deviation over seeds, or that it is missing.

    >>> shown(Spread(1.25, 0.5, 3)), shown(Spread(1.25, None, 1)), shown(None)
    ('1.2500 ± 0.5000', '1.2500 (one seed)', 'missing')
    """
    if spread is None:
        return MISSING
    return f"{spread.mean:.4f} " + ("(one seed)" if spread.deviation is None else f"± {spread.deviation:.4f}")


def arms_table(results: Results, key: str) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Headings and rows: an arm each, or an arm of a teacher, where there are several."""
    metrics, lines = QUESTIONS[key].metrics, results.lines(key)
    several = results.has_several_teachers(key)
    heads = ("arm", *(["teacher"] if several else []), *(NAMES[metric] for metric in metrics))
    rows = [
        (
            label,
            *([teacher or MISSING] if several else []),
            *(shown(results.spread(key, label, metric, teacher)) for metric in metrics),
        )
        for label, teacher in lines
    ]
    return heads, rows


def convergence(results: Results, key: str) -> str:
    """A sentence on how far the arms' means are apart before and after training; "" where that was not measured.

    Of the teacher that most arms have.
    """
    (teacher, _), *_ = Counter(teacher for _, teacher in results.lines(key) if teacher).most_common(1) or [("", 0)]
    ranges = []
    for metric in ("one_shot_loss", "loss"):
        spreads = (results.spread(key, arm.label, metric, teacher) for arm in QUESTIONS[key].arms)
        means = [spread.mean for spread in spreads if spread is not None]
        if metric not in QUESTIONS[key].metrics or len(means) < 2:
            return ""
        ranges.append(max(means) - min(means))
    return f"The arms' mean losses are {ranges[0]:.4f} nats apart before training and {ranges[1]:.4f} after it."


def claims_table(judged: Sequence[Judged]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Headings and rows: a claim each."""
    heads = ("claim", "paper", "here", "seeds", "verdict")
    return heads, [(each.claim.text, each.claim.paper or "none", *here(each), each.verdict) for each in judged]


def here(judged: Judged) -> tuple[str, str]:
    """The difference with its interval in words, and the number of seeds."""
    found, claim = judged.found, judged.claim
    if found is None:
        return MISSING, "0"
    good = {SAME: "", BELOW: ", below zero is better"}.get(claim.relation, ", above zero is better")
    interval = "no interval of one seed" if found.error is None else f"{found.low:+.4f} to {found.high:+.4f}"
    return f"{NAMES[claim.metric]} {found.mean:+.4f} ({interval}{good})", str(found.seeds)


def markdown(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table."""
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])
