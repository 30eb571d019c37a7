#!/usr/bin/env python3
"""What the elastic demo found: each budget trained alone, in turn and together, as a table and ``report.json``."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_slim.cli.terminal import wide_console
from megatron_slim.cli.tool import run_tool
from megatron_slim.command_line import tool_parser
from megatron_slim.files import read_json, to_json, write_atomic

FIGURES = ("loss", "mtp_loss", "kl")
ALONE, PRUNED = "alone", "before training"
SCHEDULES = ("in turn", "together")


def evaluations(out: Path, name: str) -> dict[str, Any]:
    """What `megatron-slim evaluate --elastic` measured, by budget."""
    return {each["budget"]: each for each in read_json(out / "results" / f"evaluate-{name}.json")["budgets"]}


def figures_of(found: dict[str, Any]) -> dict[str, float]:
    """Loss, MTP loss of the first depth, and KL from the teacher."""
    return {key: found[key][0] if isinstance(found[key], list) else found[key] for key in FIGURES}


def build_report(out: Path) -> dict[str, Any]:
    """Figures of every budget by how it was trained, one of each seed."""
    start = "evaluate-together-"
    seeds = sorted(path.stem.removeprefix(start) for path in out.glob(f"results/{start}*.json"))
    before = evaluations(out, "pruned")
    trained = {(way, seed): evaluations(out, f"{way.replace(' ', '-')}-{seed}") for way in SCHEDULES for seed in seeds}
    budgets: dict[str, Any] = {}
    for name, one_shot in before.items():
        ways: dict[str, list[dict[str, float]]] = {PRUNED: [figures_of(one_shot)]}
        alone = (read_json(out / "results" / f"evaluate-alone-{name}-{seed}.json") for seed in seeds)
        ways[ALONE] = [figures_of(each) for each in alone]
        ways |= {way: [figures_of(trained[way, seed][name]) for seed in seeds] for way in SCHEDULES}
        budgets[name] = {"sizes": one_shot["sizes"], **ways}
    timings = [json.loads(line) for line in (out / "timings.jsonl").read_text().splitlines()]
    largest = next(iter(budgets.values()))
    all_tokens = [figures_of(read_json(out / "results" / f"evaluate-alone-all-{seed}.json")) for seed in seeds]
    return {
        "seeds": seeds,
        "budgets": budgets,
        "largest_alone_with_all_tokens": all_tokens,
        # The largest budget's loss above that of it alone: with as many tokens of its own, and with all of the run.
        "interference": {
            "in turn, own tokens": differences(largest["in turn"], largest[ALONE]),
            "in turn, all tokens": differences(largest["in turn"], all_tokens),
            "together": differences(largest["together"], largest[ALONE]),
        },
        "seconds": {timing["step"]: timing["seconds"] for timing in timings},
        "total_seconds": sum(timing["seconds"] for timing in timings),
    }


def differences(elastic: list[dict[str, float]], alone: list[dict[str, float]]) -> list[float]:
    """Of losses, seed by seed."""
    return [one["loss"] - other["loss"] for one, other in zip(elastic, alone, strict=True)]


def _cell(values: list[float]) -> str:
    spread = f" ±{statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.4f}{spread}"


def print_tables(report: dict[str, Any]) -> None:
    """The tables that end the demo: means and standard deviations over seeds."""
    from rich.table import Table

    for key, title in (("loss", "validation loss"), ("mtp_loss", "MTP loss"), ("kl", "KL from the teacher")):
        ways = (PRUNED, ALONE, *SCHEDULES)
        table = Table(title=f"{title}, {len(report['seeds'])} seeds")
        for column in ("budget", "parameters", *ways):
            table.add_column(column, justify="left" if column == "budget" else "right", no_wrap=True)
        for name, budget in report["budgets"].items():
            cells = [_cell([each[key] for each in budget[way]]) for way in ways]
            table.add_row(name, f"{budget['sizes']['parameters']:,}", *cells)
        wide_console().print(table)
    for way, found in report["interference"].items():
        wide_console().print(f"interference, {way}: the largest budget's loss is {_cell(found)} above that of it alone")


def write_report(out: Path, *, show: bool) -> dict[str, Any]:
    """Write the report of the demo that ran in ``out``."""
    report = build_report(out)
    write_atomic(out / "report.json", to_json(report))
    if show:
        print_tables(report)
        print(f"{report['total_seconds']} s in all; {out}/report.json has the numbers of every seed")
    return report


def parse_args() -> argparse.Namespace:
    """Command line."""
    parser = tool_parser(__doc__)
    parser.add_argument("directory", type=Path, help="output directory of examples/slimqwen/demo_elastic.sh")
    return parser.parse_args()


if __name__ == "__main__":
    arguments = parse_args()
    run_tool(lambda: write_report(arguments.directory, show=not arguments.json), as_json=arguments.json)
