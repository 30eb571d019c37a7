"""What is kept of the results of commands."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

FIGURES = ("loss", "kl", "top1_agreement", "teacher_loss")
FIGURES_BY_DEPTH = ("mtp_loss", "mtp_kl", "mtp_top1_agreement")


def metrics_of(results: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Figures of a step, by name; those of a budget of an elastic student as ``budget/figure``.

    Args:
        results: what its commands gave, by their names.
    """
    found: dict[str, float] = {}
    for name in ("losses", "acceptance", "experts"):
        result = results.get(name, {})
        for budget in result.get("budgets", ()):
            found |= {f"{budget['budget']}/{key}": value for key, value in _figures(budget).items()}
        found |= _figures(result)
    found |= {key: float(value) for key, value in results.get("experts", {}).items()}
    if record := results.get("record"):
        found["kl_of_rounding"] = float(record["kl_of_rounding"])
    return found


def _figures(result: Mapping[str, Any]) -> dict[str, float]:
    found = {key: float(result[key]) for key in FIGURES if result.get(key) is not None}
    found |= {key: float(result[key][0]) for key in FIGURES_BY_DEPTH if result.get(key)}
    if accepted := result.get("acceptance"):
        found |= {f"acc_{k}": float(share) for k, share in enumerate(accepted["acc"])}
        found["mean_accepted_length"] = float(accepted["mean_accepted_length"])
    return found
