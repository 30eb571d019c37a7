"""Everything that the report shows as numbers: ``report.json``, which page and card are made of."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from megatron_slim.aliases import Document, JsonObject
from megatron_slim.checkpoint.records import PLAN, PROVENANCE, STATS
from megatron_slim.compression import report_curves
from megatron_slim.compression.card_source import licence, model_name
from megatron_slim.compression.report_curves import PhaseCurves
from megatron_slim.compression.report_inputs import CompressionRun, Step, metrics_of
from megatron_slim.compression.report_recorded import recorded
from megatron_slim.compression.state import DONE, FAILED, RUNNING
from megatron_slim.compression.steps import (
    EVALUATE,
    EVALUATE_FP8,
    EVALUATE_PRUNED,
    EVALUATE_TEACHER,
    EXPORT,
    PRUNE,
    QUANTIZE,
)
from megatron_slim.files import read_json
from megatron_slim.page import Section
from megatron_slim.pruning import plan_tables, plan_view
from megatron_slim.pruning.plan_page import PAGE
from megatron_slim.pruning.plan_reader import load_plan
from megatron_slim.pruning.statistics import Statistics

VERSION = 1
TEACHER = "teacher"
PLAN_PAGE = "plan"  # of a phase, the directory that megatron-slim show-plan --save writes
_KINDS = {EVALUATE_PRUNED: "pruned", EVALUATE: "student", EVALUATE_FP8: "student, FP8"}
# What an evaluation has of each model; errors under the same names with _stderr.
FIGURES = ("loss", "perplexity", "kl", "top1_agreement")
DEPTHS = ("mtp_loss", "mtp_kl", "mtp_top1_agreement")


@dataclass(frozen=True)
class Gathered:
    """What a report is made of.

    Attributes:
        facts: as in report.json.
        plans: tables of what each phase kept.
        curves: of each phase that has trained.
    """

    facts: JsonObject
    plans: Mapping[int, Sequence[Section]]
    curves: Sequence[PhaseCurves]


def gather(run: CompressionRun) -> Gathered:
    """Everything that a run has left, as numbers.

    Raises:
        SlimError: a file cannot be read or holds something else.
    """
    curves, why_no_curves = report_curves.read_curves(run)
    kept, plans = _plans(run)
    facts = {
        "version": VERSION,
        "megatron_slim": run.document.get("megatron_slim"),
        "model": "" if run.teacher is None else model_name(run.teacher),
        "license": licence(run.teacher) if run.teacher and run.teacher.is_dir() else {},
        "progress": _progress(run),
        "sizes": _sizes(run),
        "kept": kept,
        "training": report_curves.summary(curves),
        "training_not_read": why_no_curves,
        "evaluations": _evaluations(run),
        "recorded": recorded(run.document["settings"].get("train", {}), run.save),
        "quantization": _quantization(run),
        "cost": _cost(run, curves),
        "versions": _versions(run),
        "seeds": dict(_seeds(run)),
        "inputs": run.document["inputs"],
        "settings": run.document["settings"],
        "recipe": run.document["recipe"],
        "commands": {step.name: shlex.join(step.command) for step in run.steps if step.command},
    }
    return Gathered(facts, plans, curves)


def _progress(run: CompressionRun) -> JsonObject:
    """Where the run is; the report does not count itself."""
    steps = _own_steps(run)
    done = sum(step.state == DONE for step in steps)
    now = next(((step.name, step.state) for step in steps if step.state in (RUNNING, FAILED)), None)
    return {"steps": len(steps), "done": done, "finished": done == len(steps), "now": None if now is None else [*now]}


def _own_steps(run: CompressionRun) -> list[Step]:
    return [step for step in run.steps if step.kind != "report"]


def _sizes(run: CompressionRun) -> list[JsonObject]:
    """Sizes of the teacher, then of every phase that is pruned; bytes of its export, whose type may be another."""
    found: list[JsonObject] = []
    for phase in run.phases:
        result = run.result(PRUNE, phase) or {}
        if not found and result.get("before"):
            found.append({"model": TEACHER, **result["before"]})
        if result.get("after"):
            exported = (run.result(EXPORT, phase) or {}).get("bytes")
            size = {} if exported is None else {"bytes": exported}
            found.append({"model": f"phase {phase}", **result["after"], **size})
    return found


def _plans(run: CompressionRun) -> tuple[list[JsonObject], dict[int, list[Section]]]:
    found, tables = [], {}
    for phase in run.phases:
        pruned, step = run.phase_directory(phase) / "pruned", run.of(PRUNE, phase)
        if step is None or step.state != DONE or not (pruned / PLAN).exists():
            continue
        plan = load_plan(pruned)
        stats = Statistics.load(pruned / STATS) if (pruned / STATS).exists() else None
        if stats is not None:
            plan_view.check_statistics(plan, stats, where=str(pruned / STATS))
        numbers = plan_view.summary(plan, stats)
        page = run.phase_directory(phase) / PLAN_PAGE / PAGE
        link = str(page.relative_to(run.save)) if page.is_file() else None
        keys = ("plan_sha256", "source_sha256", "stats_sha256", "depth_reason", "dropped_layers", "axes", "experts")
        found.append({"phase": phase, "page": link, **{key: numbers[key] for key in keys}})
        shown = plan_tables.sections(plan, stats)
        tables[phase] = [section for section in shown if section.title in (plan_tables.LAYERS, plan_tables.AXES)]
    return found, tables


def _evaluations(run: CompressionRun) -> list[JsonObject]:
    """Figures of the teacher and of every phase's models, each with its difference to the teacher's loss."""
    results = {(phase, kind): run.result(kind, phase) for phase in run.phases for kind in _KINDS}
    known = [result for result in results.values() if result is not None]
    teacher = _evaluation(TEACHER, None, _teacher(run.result(EVALUATE_TEACHER), known))
    found = [teacher] if len(teacher) > 2 else []
    for (phase, kind), result in results.items():
        if result is None:
            continue
        model = _evaluation(_KINDS[kind], phase, result)
        if "loss" in model and "loss" in teacher:
            model["loss_difference"] = model["loss"] - teacher["loss"]
            if (error := result.get("loss_difference_stderr")) is not None:
                model["loss_difference_stderr"] = error
        found.append(model)
    return found


def _teacher(own: Document | None, others: Sequence[Document]) -> Document:
    """What is known of the teacher, its students' evaluations included."""
    found = dict(own or {})
    for result in others:
        if found.get("loss") is None and result.get("teacher_loss") is not None:
            found |= {"loss": result["teacher_loss"], "loss_stderr": result.get("teacher_loss_stderr")}
        if found.get("acceptance") is None and result.get("teacher_acceptance") is not None:
            found["acceptance"] = result["teacher_acceptance"]
    return found


def _quantization(run: CompressionRun) -> JsonObject | None:
    """What the step found that quantized the last export; None where it is not done."""
    found = [result for phase in run.phases if (result := run.result(QUANTIZE, phase)) is not None]
    if not found:
        return None
    size = {"bytes": found[-1]["bytes"]} if "bytes" in found[-1] else {}
    return size | dict(found[-1].get("quantization", {}))


def _evaluation(model: str, phase: int | None, result: Document) -> JsonObject:
    found: JsonObject = {"model": model, "phase": phase}
    for key in FIGURES:
        found |= {name: result[name] for name in (key, f"{key}_stderr") if result.get(name) is not None}
    for key in DEPTHS:
        for name in (key, f"{key}_stderr"):
            if (value := result.get(name)) not in (None, []):
                found[name] = value if isinstance(value, list) else [value]
    if result.get("tasks"):
        found["tasks"] = {name: metrics_of(task) for name, task in result["tasks"].items()}
    keys = ("tokens", "samples", "seq_length", "dtype", "acceptance", "clients")
    return found | {key: result[key] for key in keys if result.get(key) is not None}


def _cost(run: CompressionRun, curves: Sequence[PhaseCurves]) -> JsonObject:
    steps = [
        {"step": step.name, "state": step.state, "attempts": step.attempts, "seconds": step.seconds}
        for step in _own_steps(run)
    ]
    timed = [step.seconds for step in _own_steps(run) if step.seconds is not None]
    return {
        "steps": steps,
        "seconds": sum(timed) if timed else None,
        "tokens": sum(each.tokens for each in curves) if curves else None,
        "flops": sum(each.flops for each in curves) if any(each.flops_per_token for each in curves) else None,
        "phases": [{"phase": each.phase, "tokens": each.tokens, "flops": each.flops} for each in curves],
        "device": run.document.get("device"),
    }


def _versions(run: CompressionRun) -> dict[str, str]:
    """Versions of the packages by the provenance of the last output that has one."""
    outputs = [run.final_model()]
    outputs += [run.phase_directory(phase) / name for phase in reversed(run.phases) for name in ("model", "pruned")]
    for file in (directory / PROVENANCE for directory in outputs):
        versions = _document(file).get("versions") if file.exists() else None
        if isinstance(versions, dict):
            return {name: str(version) for name, version in versions.items()}
    return {"megatron_slim": str(run.document["megatron_slim"])} if "megatron_slim" in run.document else {}


def _document(file: Path) -> Document:
    found = read_json(file)
    return found if isinstance(found, dict) else {}


def _seeds(run: CompressionRun) -> Iterator[tuple[str, Any]]:
    """Seeds of settings and of command lines."""
    for section, values in run.document["settings"].items():
        for name, value in values.items() if isinstance(values, dict) else ():
            if "seed" in name.replace("-", "_").split("_"):
                yield f"{section}.{name}", value
    for step in run.steps:
        for word, following in pairwise((*step.command, "")):
            name, _, value = word.partition("=")
            if name.startswith("--") and "seed" in name.strip("-").split("-"):
                yield f"{step.name} {name}", value or following
