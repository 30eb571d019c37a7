#!/usr/bin/env python3
"""What the demo found: a table, ``report.json`` and ``loss_curves.png`` from the results of its steps."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_slim.architecture.shape import shape_from_hf_config
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


def accuracy(result: dict[str, Any]) -> float:
    """Share of the passages whose continuation a model finds."""
    value: float = result["tasks"]["continuation"]["metrics"]["acc"]["value"]
    return value


def build_report(out: Path) -> dict[str, Any]:
    """Collect losses, parameter counts and times."""
    results = {name: read_json(out / file) for name, (file, _) in MODELS.items()}
    timings = [json.loads(line) for line in (out / "timings.jsonl").read_text().splitlines()]
    timings += [{"step": step["name"], "seconds": round(step["seconds"])} for step in run_steps(out)]
    return {
        "validation_loss": {name: result["loss"] for name, result in results.items()},
        "validation_perplexity": {name: result["perplexity"] for name, result in results.items()},
        "validation_mtp_loss": {name: result["mtp_loss"] for name, result in results.items()},
        "kl_from_teacher": {name: result["kl"] for name, result in results.items() if "kl" in result},
        "task_accuracy": {name: accuracy(result) for name, result in results.items() if "tasks" in result},
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


def print_table(report: dict[str, Any]) -> None:
    """The table that ends the demo."""
    from rich.table import Table

    extra = {key: column for key, column in EXTRA_COLUMNS.items() if report[key]}
    table = Table(title=f"validation, {report['validation_tokens']} tokens")
    for column in ("model", "parameters", "active", "loss", "perplexity", "MTP loss", *extra.values()):
        table.add_column(column, justify="left" if column == "model" else "right", no_wrap=True)
    for name, loss in report["validation_loss"].items():
        parameters = report["parameters"][name]
        table.add_row(
            name.replace("_", " "),
            f"{parameters['total']:,}",
            f"{parameters['active']:,}",
            f"{loss:.4f}",
            f"{report['validation_perplexity'][name]:.2f}",
            ", ".join(f"{value:.4f}" for value in report["validation_mtp_loss"][name]),
            *(f"{report[key][name]:.4f}" if name in report[key] else "" for key in extra),
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
