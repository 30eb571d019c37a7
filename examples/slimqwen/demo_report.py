#!/usr/bin/env python3
"""What the demo found: a table, ``report.json`` and ``loss_curves.png`` from the results of its steps."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_slim.architecture.hf_config import shape_from_hf_config
from megatron_slim.architecture.table import count_parameters
from megatron_slim.cli.terminal import wide_console
from megatron_slim.cli.tool import run_tool
from megatron_slim.command_line import tool_parser
from megatron_slim.files import read_json, to_json, write_atomic

# Model -> what evaluated it, and the directory of its weights.
MODELS = {
    "teacher": ("run/results/teacher-evaluate.json", "teacher"),
    "pruned_before_training": ("run/results/phase-1-evaluate-pruned.json", "run/phase-1/pruned"),
    "student": ("run/results/phase-1-evaluate.json", "run/model"),
    "random_init_student": ("results/evaluate-random-init.json", "random-init-student"),
}
CURVES = {
    "teacher-training": "teacher",
    "run/phase-1/training": "student, pruned",
    "random-init": "student, random init",
}
# Key of the report -> that of `megatron-slim evaluate --json`, whose errors are under the same names with _stderr.
FIGURES = {
    "validation_loss": "loss",
    "validation_perplexity": "perplexity",
    "validation_mtp_loss": "mtp_loss",
    "kl_from_teacher": "kl",
}
# What is not measured of every model, or not everywhere -> its column.
EXTRA_COLUMNS = {"kl_from_teacher": "KL", "task_accuracy": "task"}


def count(directory: Path) -> dict[str, int]:
    """Total and active parameters of an exported model, MTP included."""
    config = read_json(directory / "config.json")
    shape = shape_from_hf_config(config, mtp_num_layers=config["num_nextn_predict_layers"])
    counted = count_parameters(shape)
    return {"total": counted.total, "active": counted.active}


def run_steps(out: Path) -> list[dict[str, Any]]:
    """The steps of `megatron-slim run`."""
    steps: list[dict[str, Any]] = read_json(out / "run" / "run.json")["steps"]
    return steps


def accuracy(results: dict[str, dict[str, Any]], part: str) -> dict[str, float]:
    """Share of the passages whose continuation every model finds, or its error."""
    scored = {name: result["tasks"]["continuation"] for name, result in results.items() if "tasks" in result}
    return {name: task["metrics"]["acc"][part] for name, task in scored.items()}


def figures(results: dict[str, dict[str, Any]], key: str) -> dict[str, Any]:
    """What `megatron-slim evaluate` measured of every model that has it."""
    return {name: result[key] for name, result in results.items() if key in result}


def build_report(out: Path) -> dict[str, Any]:
    """Collect losses, parameter counts and times."""
    results = {name: read_json(out / file) for name, (file, _) in MODELS.items()}
    timings = [json.loads(line) for line in (out / "timings.jsonl").read_text().splitlines()]
    timings += [{"step": step["name"], "seconds": round(step["seconds"])} for step in run_steps(out)]
    return {
        **{name: figures(results, key) for name, key in FIGURES.items()},
        **{f"{name}_stderr": figures(results, f"{key}_stderr") for name, key in FIGURES.items()},
        "task_accuracy": accuracy(results, "value"),
        "task_accuracy_stderr": accuracy(results, "stderr"),
        "validation_tokens": results["teacher"]["tokens"],
        "parameters": {name: count(out / directory) for name, (_, directory) in MODELS.items()},
        "seconds": {timing["step"]: timing["seconds"] for timing in timings},
        "total_seconds": sum(timing["seconds"] for timing in timings),
    }


def read_curves(out: Path) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """(iteration, loss) of every training run and loss term, from tensorboard."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    curves = {}
    for run in CURVES:
        events = EventAccumulator(str(out / run / "tensorboard"))
        events.Reload()
        tags = [tag for tag in events.Tags()["scalars"] if tag.endswith("loss") and "balancing" not in tag]
        curves[run] = {tag: [(point.step, point.value) for point in events.Scalars(tag)] for tag in tags}
    return curves


def plot(out: Path, report: dict[str, Any], target: Path) -> None:
    """Loss curves of the three runs, and the validation losses as bars."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    curves = read_curves(out)
    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(15, 4.5), constrained_layout=True)
    for run, caption in CURVES.items():
        left.plot(*zip(*curves[run]["lm loss"], strict=True), label=caption)
    for run, color in (("run/phase-1/training", "C1"), ("random-init", "C2")):  # as on either side
        for tag, style in (("logits distillation loss", "-"), ("mtp distillation loss", ":")):
            middle.plot(*zip(*curves[run][tag], strict=True), style, color=color, label=f"{CURVES[run]}: {tag}")
    left.set(title="LM loss in training", xlabel="iteration", ylabel="nats per token")
    middle.set(title="Distillation losses", xlabel="iteration")
    losses = report["validation_loss"]
    names = [name.replace("_", "\n") for name in losses]
    bars = right.bar(names, list(losses.values()), color=["C0", "C7", "C1", "C2"])
    right.bar_label(bars, fmt="%.2f")
    right.set(title="Validation loss")
    left.legend()
    middle.legend(fontsize="small")
    figure.savefig(target, dpi=110)


def cell(report: dict[str, Any], key: str, name: str, digits: int = 4) -> str:
    """A figure of a model with its standard error; one of every MTP depth where it is a list."""
    values, errors = (report[each].get(name, []) for each in (key, f"{key}_stderr"))
    if not isinstance(values, list):
        values, errors = [values], [errors]
    shown = (f"{value:.{digits}f} ±{error:.{digits}f}" for value, error in zip(values, errors, strict=True))
    return ", ".join(shown)


def print_table(report: dict[str, Any]) -> None:
    """The table that ends the demo."""
    from rich.table import Table

    extra = {key: column for key, column in EXTRA_COLUMNS.items() if report[key]}
    table = Table(title=f"validation, {report['validation_tokens']} tokens")
    for column in ("model", "parameters", "active", "loss", "perplexity", "MTP loss", *extra.values()):
        table.add_column(column, justify="left" if column == "model" else "right", no_wrap=True)
    for name in report["validation_loss"]:
        parameters = report["parameters"][name]
        table.add_row(
            name.replace("_", " "),
            f"{parameters['total']:,}",
            f"{parameters['active']:,}",
            cell(report, "validation_loss", name),
            cell(report, "validation_perplexity", name, 2),
            cell(report, "validation_mtp_loss", name),
            *(cell(report, key, name) for key in extra),
        )
    wide_console().print(table)


def write_report(out: Path) -> dict[str, Any]:
    """Write the report of the demo that ran in ``out``."""
    report = build_report(out)
    write_atomic(out / "report.json", to_json(report))
    plot(out, report, out / "loss_curves.png")
    print_table(report)
    gain = report["validation_loss"]["random_init_student"] - report["validation_loss"]["student"]
    print(f"pruning and distilling instead of starting from random weights: {gain:+.4f} nats per token better")
    print(
        f"{report['total_seconds']} s in all; curves: {out}/loss_curves.png; report of the run: {out}/run/report.html"
    )
    return report


def parse_args() -> argparse.Namespace:
    """Command line."""
    parser = tool_parser(__doc__)
    parser.add_argument("directory", type=Path, help="output directory of examples/slimqwen/demo.sh")
    return parser.parse_args()


if __name__ == "__main__":
    arguments = parse_args()
    run_tool(lambda: write_report(arguments.directory), as_json=arguments.json)
