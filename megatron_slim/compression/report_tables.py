"""The tables of the report, for the page and for the model card (no torch)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from megatron_slim.compression.report_facts import TEACHER
from megatron_slim.page import Section
from megatron_slim.pruning.report import LABELS
from megatron_slim.reporting import duration
from megatron_slim.training.run_figures import amount

NOT_MEASURED = "not measured"
CLIENTS = "Clients that load the export"
_EXACT = 10_000_000  # a larger size is shown in millions or billions, which a phone has space for
Model = Mapping[str, Any]
Models = Sequence[Model]
Rows = Mapping[str, Callable[[Model], str]]


def count(number: float) -> str:
    """A size, exact unless it has more than seven digits.

    >>> count(7_429_408), count(29_717_632), count(79_674_391_296)
    ('7,429,408', '29.718M', '79.674B')
    """
    if number < _EXACT:
        return f"{number:,}"
    return f"{number / 1e9:,.3f}B" if number >= 1e9 else f"{number / 1e6:,.3f}M"


def headline(facts: Mapping[str, Any]) -> Iterator[str]:
    """The result: parameters, and loss."""
    sizes, evaluations = facts["sizes"], facts["evaluations"]
    if len(sizes) > 1:
        before, after = sizes[0], sizes[-1]
        yield (
            f"{count(before['parameters'])} parameters ({count(before['active_parameters'])} active) became "
            f"{count(after['parameters'])} ({count(after['active_parameters'])} active)."
        )
    students = [model for model in evaluations if model["model"] == "student" and "loss_difference" in model]
    if students:
        loss, difference = students[-1]["loss"], students[-1]["loss_difference"]
        of_both = f"{loss - difference:.4f}, of the student {loss:.4f} ({_difference(students[-1])})"
        yield f"Loss of the teacher {of_both} nats per token."
    in_fp8 = [model["loss"] for model in evaluations if model["model"] == "student, FP8" and "loss" in model]
    if students and in_fp8:
        yield f"Loss of the student in FP8 {in_fp8[-1]:.4f} ({in_fp8[-1] - students[-1]['loss']:+.4f} to its own)."


def size_section(sizes: Models) -> Section:
    """Sizes of the teacher and after every phase."""
    if len(sizes) < 2:
        return unknown("Sizes")
    rows = []
    for key, label in LABELS.items():
        values = [size.get(key) for size in sizes]
        shown = ["" if value is None else count(value) for value in values]
        share = f"{100 * values[-1] / values[0]:.1f}%" if values[0] and values[-1] is not None else ""
        if any(shown):
            rows.append((label, *shown, share))
    return Section("Sizes", ("", *(size["model"] for size in sizes), "left"), tuple(rows))


def unknown(heading: str) -> Section:
    """What stands in the place of a table of which nothing is measured."""
    return Section(heading, (), (), f"{NOT_MEASURED.capitalize()}.")


def loss_section(training: Models) -> Section:
    """First and last value of every term in every phase."""
    names = list(dict.fromkeys(name for phase in training for name in phase["losses"]))
    columns = [f"phase {phase['phase']} {which}" for phase in training for which in ("first", "last")]
    rows = [
        (name, *(_number(phase["losses"].get(name, {}).get(w)) for phase in training for w in ("first", "last")))
        for name in names
    ]
    return Section("Loss terms in training", ("nats per token", *columns), tuple(rows))


def _number(value: float | None) -> str:
    return NOT_MEASURED if value is None else f"{value:.4f}"


def _label(model: Model, several: bool) -> str:
    return f"phase {model['phase']} {model['model']}" if several and model["phase"] is not None else model["model"]


def labels(models: Models) -> list[str]:
    """Names of the models, with their phase where there are several."""
    several = len({model["phase"] for model in models} - {None}) > 1
    return [_label(model, several) for model in models]


def _error(value: float | None, digits: int = 4) -> str:
    return "" if value is None else f" ±{value:.{digits}f}"


def _with_error(model: Model, key: str, digits: int) -> str:
    if key not in model:
        return NOT_MEASURED
    return f"{model[key]:.{digits}f}{_error(model.get(f'{key}_stderr'), digits)}"


def _difference(model: Model) -> str:
    if "loss_difference" not in model:
        return ""
    return f"{model['loss_difference']:+.4f}{_error(model.get('loss_difference_stderr'))}"


def evaluation_sections(models: Models) -> list[Section]:
    """Losses, agreement with the teacher, acceptance of drafts, tasks and clients, the models side by side."""
    return [
        _losses(models),
        _agreement([model for model in models if model["model"] != TEACHER]),
        _acceptance([model for model in models if model["model"] in (TEACHER, "student") or "acceptance" in model]),
        _tasks(models),
        _clients(models),
    ]


def _rows(models: Models, rows: Rows) -> tuple[tuple[str, ...], ...]:
    """Rows of a table with a column per model, without those that no model has."""
    found = [(name, *map(show, models)) for name, show in rows.items()]
    return tuple(row for row in found if any(cell not in ("", NOT_MEASURED) for cell in row[1:]))


def _depth_rows(models: Models, key: str, label: str) -> dict[str, Callable[[Model], str]]:
    """A row for every MTP depth."""
    depths = max((len(model.get(key, ())) for model in models), default=0)

    def show(depth: int) -> Callable[[Model], str]:
        def cell(model: Model) -> str:
            value, error = (dict(enumerate(model.get(name, ()))).get(depth) for name in (key, f"{key}_stderr"))
            return _number(value) + _error(error)

        return cell

    return {f"{label} {depth + 1}" if depths > 1 else label: show(depth) for depth in range(depths)}


def _table(heading: str, models: Models, rows: Rows, note: str) -> Section:
    shown = _rows(models, rows)
    return Section(heading, ("", *labels(models)), shown, note) if shown else unknown(heading)


def _losses(models: Models) -> Section:
    data = {
        (model.get("tokens"), model.get("samples"), model.get("seq_length"), model.get("dtype")) for model in models
    }
    known = [each for each in data if None not in each]
    note = "nats per token"
    if len(known) == 1:
        tokens, samples, length, dtype = known[0]
        note += f", over {tokens:,} tokens ({samples} samples of {length}), computed in {dtype}"
    rows: dict[str, Callable[[Model], str]] = {
        "loss": lambda model: _with_error(model, "loss", 4),
        "to the teacher": _difference,
        "perplexity": lambda model: _with_error(model, "perplexity", 2),
        **_depth_rows(models, "mtp_loss", "MTP loss"),
    }
    if any("loss_stderr" in model for model in models):
        note += ", with standard errors over samples; that of a difference is paired"
    return _table("Evaluation", models, rows, f"{note}.")


def _agreement(models: Models) -> Section:
    rows: dict[str, Callable[[Model], str]] = {
        "KL": lambda model: _with_error(model, "kl", 4),
        "same likeliest token": lambda model: _with_error(model, "top1_agreement", 4),
        **_depth_rows(models, "mtp_kl", "MTP KL"),
        **_depth_rows(models, "mtp_top1_agreement", "MTP same likeliest token"),
    }
    note = (
        "KL divergence from the teacher in nats per token; share of positions whose likeliest token is the teacher's."
    )
    return _table("Agreement with the teacher", models, rows, note)


def _acceptance(models: Models) -> Section:
    longest = max((len(model["acceptance"]["acc"]) for model in models if "acceptance" in model), default=0)

    def rate(k: int) -> Callable[[Model], str]:
        return lambda model: _number(dict(enumerate(model.get("acceptance", {}).get("acc", ()))).get(k))

    rows: dict[str, Callable[[Model], str]] = {f"acc_{k}": rate(k) for k in range(longest)}
    rows |= {
        "mean accepted length": lambda model: _number(model.get("acceptance", {}).get("mean_accepted_length")),
        "drafts": lambda model: f"{model['acceptance']['drafts']:,}" if "acceptance" in model else NOT_MEASURED,
    }
    note = "acc_k: share of drafts whose first k + 1 tokens were all accepted. Length: tokens per pass of the trunk."
    return _table("Acceptance of MTP drafts", models, rows, note)


def _tasks(models: Models) -> Section:
    names = list(
        dict.fromkeys(
            (task, metric) for model in models for task, found in model.get("tasks", {}).items() for metric in found
        )
    )

    def show(task: str, metric: str) -> Callable[[Model], str]:
        def cell(model: Model) -> str:
            value, error = model.get("tasks", {}).get(task, {}).get(metric, (None, None))
            return _number(value) + _error(error)

        return cell

    rows = {f"{task}, {metric}": show(task, metric) for task, metric in names}
    return _table("Tasks", [model for model in models if "tasks" in model], rows, "Value and standard error.")


def _clients(models: Models) -> Section:
    """Of the last model that was tried."""
    tried = [model["clients"] for model in models if "clients" in model]
    if not tried:
        return unknown(CLIENTS)
    loads = {True: "yes", False: "no"}
    rows = tuple(
        (
            name,
            str(client.get("version", "")),
            loads.get(client.get("loads"), NOT_MEASURED),
            str(client.get("note", "")),
        )
        for name, client in tried[-1].items()
    )
    return Section(CLIENTS, ("client", "version", "loads", "note"), rows, text=True)


def cost_section(cost: Mapping[str, Any]) -> Section:
    """Tokens and operations of training, the time of everything, and the device."""

    def row(label: str, tokens: float | None, flops: float | None) -> tuple[str, ...]:
        return (label, NOT_MEASURED if tokens is None else amount(tokens), f"{flops:.3g}" if flops else NOT_MEASURED)

    rows = [row(f"phase {each['phase']}", each["tokens"], each["flops"]) for each in cost["phases"]]
    rows = rows if len(rows) == 1 else [*rows, row("all", cost["tokens"], cost["flops"])]
    time = NOT_MEASURED if cost["seconds"] is None else duration(cost["seconds"])
    device = cost["device"] or NOT_MEASURED
    note = (
        f"FLOPs of teacher and student in training, without recomputation. Time of all steps: {time}. Device: {device}."
    )
    return Section("Cost of training", ("", "tokens", "FLOPs"), tuple(rows), note)


def step_section(steps: Models) -> Section:
    """Every step with its state and its time."""
    rows = tuple(
        (
            step["step"],
            step["state"],
            str(step["attempts"]),
            "" if step["seconds"] is None else duration(step["seconds"]),
        )
        for step in steps
    )
    return Section("Time of the steps", ("step", "state", "attempts", "time"), rows)
