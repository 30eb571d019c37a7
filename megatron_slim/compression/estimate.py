"""What every step of a run needs, before anything begins: tokens, operations, bytes of disk and time."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_slim.architecture.flops import FUSED, TORCH, student_flops, teacher_flops
from megatron_slim.architecture.shape import ModelShape
from megatron_slim.architecture.table import count_parameters
from megatron_slim.compression.machine import (
    WRITTEN_PER_SECOND,
    Machine,
    find_machine,
    recording_seconds,
    seconds_of,
    size_text,
    streaming_seconds,
    time_text,
)
from megatron_slim.compression.recordings import Recording, cache_of, recordings
from megatron_slim.compression.settings import SEQ_LENGTH, RunSettings
from megatron_slim.compression.steps import (
    ACCEPTANCE,
    EVALUATE_TEACHER,
    EXPORT,
    PRUNE,
    QUANTIZE,
    RECORD,
    RECORD_VALIDATION,
    SHOW_PLAN,
    TRAIN,
    Step,
    carries_optimizer,
    measures,
)
from megatron_slim.data import data_prefix, open_stream
from megatron_slim.optimizers import MAIN_COPY, OPTIMIZERS
from megatron_slim.sample_set import is_sample_set, open_samples
from megatron_slim.streaming.samples import NUM_SAMPLES

SAVE_INTERVAL = 1000


@dataclass(frozen=True)
class Need:
    """What a step needs; None is what cannot be known before statistics are there."""

    step: Step
    tokens: int = 0
    seconds: float | None = None
    nbytes: int | None = None


def needs(settings: RunSettings, found: Sequence[Step], teacher: ModelShape, machine: Machine) -> Iterator[Need]:
    """Of every step; sizes that a budget leaves open are unknown, and all that follows from them."""
    student: ModelShape | None = teacher
    source, length = teacher, settings.seq_length
    for step in found:
        if step.kind == PRUNE:
            assert step.phase is not None
            source, student = student, _pruned(settings, step.phase, student)  # type: ignore[assignment]
            tokens = _calibration_tokens(settings, length) if measures(settings, step.phase) else 0
            size = _size(student, machine)
            if student is not None and size is not None and carries_optimizer(settings, step.phase):
                size += count_parameters(student).total * (MAIN_COPY + OPTIMIZERS[settings.optimizer].state_bytes)
            yield Need(step, tokens, streaming_seconds(source, length, tokens, machine), size)
        elif step.kind == TRAIN:
            yield _training(settings, step, teacher, student, machine)
        elif step.kind in (RECORD, RECORD_VALIDATION):
            recording = next(each for each in recordings(settings) if each.cache == step.output)
            yield _recording(settings, step, recording, teacher, machine)
        elif step.kind == SHOW_PLAN:
            yield Need(step, seconds=5.0, nbytes=0)
        elif step.kind == EXPORT:
            size = _size(student, machine)
            yield Need(step, 0, None if size is None else size / WRITTEN_PER_SECOND, size)
        elif step.kind == QUANTIZE:
            size = None if student is None else _bytes_in_fp8(student)
            yield Need(step, 0, None if size is None else size / WRITTEN_PER_SECOND, size)
        elif step.kind == ACCEPTANCE:
            yield Need(step, nbytes=0)  # texts of a length that the models decide
        else:
            model = teacher if step.kind == EVALUATE_TEACHER else student
            tokens = _evaluation_tokens(settings)
            yield Need(step, tokens, streaming_seconds(model, length, tokens, machine), 0)


def _bytes_in_fp8(student: ModelShape) -> int:
    from megatron_slim.checkpoint.fp8_writer import fp8_specs  # which brings torch

    return sum(spec.nbytes for spec in fp8_specs(student))


def _training(
    settings: RunSettings, step: Step, teacher: ModelShape, student: ModelShape | None, machine: Machine
) -> Need:
    assert step.phase is not None
    train = settings.section("train")
    begin = settings.stops[step.phase - 2] if step.phase > 1 else 0
    iterations = settings.stops[step.phase - 1] - begin
    tokens = iterations * settings.tokens_per_iteration
    if student is None:
        return Need(step, tokens)
    length, kernels = settings.seq_length, FUSED if machine.on_gpus else TORCH
    of_teacher = teacher_flops(teacher, length, kernels, runs_mtp=True).total
    if cache_of(settings) is not None:  # of its heads alone
        of_teacher = 2.0 * (1 + teacher.mtp_num_layers) * teacher.vocab_size * teacher.hidden_size
    flops = student_flops(student, length, kernels).total + of_teacher
    checkpoints = max(1, math.ceil(iterations / train.get("save_interval", SAVE_INTERVAL)))
    precision = train.get("precision", "bf16" if machine.on_gpus else "fp32")
    per_parameter = OPTIMIZERS[settings.optimizer].checkpoint_bytes({"bf16": 2, "fp32": 4}[precision])
    nbytes = checkpoints * per_parameter * count_parameters(student).total
    return Need(step, tokens, seconds_of(flops, tokens, machine.training), nbytes)


def _recording(settings: RunSettings, step: Step, found: Recording, teacher: ModelShape, machine: Machine) -> Need:
    from megatron_slim.teacher_cache.recording import ROUND_TOKENS  # which brings torch

    nbytes = recording_bytes(settings, found, teacher)
    readings = -(-found.tokens // ROUND_TOKENS)
    seconds = recording_seconds(teacher, found.seq_length, found.tokens, nbytes, machine, readings=readings)
    return Need(step, found.tokens, seconds, nbytes)


def recording_bytes(settings: RunSettings, found: Recording, teacher: ModelShape) -> int:
    """Bytes of the states that are recorded, of all heads."""
    from megatron_slim.teacher_cache.stored_states import row_bytes  # which brings torch

    kind = settings.section("train")["record"]
    return found.tokens * (1 + teacher.mtp_num_layers) * row_bytes(kind, teacher.hidden_size)


def _size(shape: ModelShape | None, machine: Machine) -> int | None:
    """Bytes of a Hugging Face checkpoint."""
    return None if shape is None else count_parameters(shape).total * (2 if machine.on_gpus else 4)


def _pruned(settings: RunSettings, phase: int, source: ModelShape | None) -> ModelShape | None:
    """Sizes of the student of a phase; None where statistics choose them."""
    recipe = settings.phases[phase - 1]
    if source is None or recipe.budget is not None:
        return None
    from megatron_slim.pruning.depth import layers_before_statistics
    from megatron_slim.pruning.target import shape_before_statistics

    layers = layers_before_statistics(source, recipe.target.num_layers or source.num_layers)
    return shape_before_statistics(recipe, source, layers)


def first_student(settings: RunSettings, teacher: ModelShape) -> ModelShape | None:
    """Sizes of the student of the first phase; None where statistics choose them."""
    return _pruned(settings, 1, teacher)


def _calibration_tokens(settings: RunSettings, length: int) -> int:
    """As `streaming.model_input` draws them: where no number is given, all of data that have fewer than the default."""
    calibrate, data = settings.section("calibrate"), settings.calibration_data
    if is_sample_set(data):
        samples = open_samples(data)
        return int(calibrate.get("num_samples", min(NUM_SAMPLES, len(samples))) * samples.seq_length)
    length, number = calibrate.get("seq_length", length), calibrate.get("num_samples")
    if number is None:
        matrix = data.suffix == ".npy"
        number = NUM_SAMPLES if matrix else min(NUM_SAMPLES, len(open_stream(data_prefix(data), None)[0]) // length)
    return int(number * length)


def _evaluation_tokens(settings: RunSettings) -> int:
    evaluate, data = settings.section("evaluate"), settings.evaluation_data
    assert data is not None
    if is_sample_set(data):
        samples = open_samples(data)
        return int(evaluate.get("num_samples", len(samples)) * samples.seq_length)
    if "num_samples" in evaluate:
        return int(evaluate["num_samples"] * evaluate.get("seq_length", SEQ_LENGTH))
    return len(open_stream(data_prefix(data), None)[0]) if data.suffix != ".npy" else 0


def show(settings: RunSettings, found: Sequence[Step], teacher: ModelShape, *, as_json: bool) -> dict[str, Any]:
    """The steps of a run as a table, unless ``as_json``; and as data."""
    machine = find_machine(settings)
    every = list(needs(settings, found, teacher, machine))
    if not as_json:
        _print(settings, every, machine)
    return {
        "save": str(settings.save),
        "machine": machine.name,
        "paths": _paths(settings),
        "settings": settings.cluster,
        "steps": [
            {
                "name": need.step.name,
                "kind": need.step.kind,
                "done": need.step.done(),
                "tokens": need.tokens,
                "seconds": None if need.seconds is None else float(f"{need.seconds:.3g}"),
                "bytes": need.nbytes,
                "command": ["megatron-slim", *need.step.command],
            }
            for need in every
        ],
    }


def _paths(settings: RunSettings) -> list[str]:
    """Directories that the steps read and write, for the mounts of a container."""
    data = [Path(word) for word in (*settings.data, *settings.valid_data) if word.startswith("/")]
    files = [settings.calibration_data, *([settings.evaluation_data] if settings.evaluation_data else [])]
    whole = {settings.teacher, settings.save, *filter(None, [cache_of(settings)])}
    return sorted({*map(str, whole), *(str(each.parent) for each in (*data, *files))})


def _print(settings: RunSettings, every: Sequence[Need], machine: Machine) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{settings.save}: steps, by estimate, on {machine.name}")
    for column in ("step", "tokens", "disk", "time", ""):
        table.add_column(column, justify="left" if column in ("step", "") else "right", no_wrap=True)
    for need in every:
        done = "done" if need.step.done() else ""
        table.add_row(need.step.name, f"{need.tokens:,}", size_text(need.nbytes), time_text(need.seconds), done)
    known = [need for need in every if need.nbytes is not None]
    table.add_section()
    total = sum(need.seconds for need in every if need.seconds is not None)
    table.add_row("all", "", size_text(sum(need.nbytes or 0 for need in known)), time_text(total), "")
    console = Console(width=max(96, Console().width), highlight=False)
    console.print(table)
    for need in every:
        console.print(shlex.join(["megatron-slim", *need.step.command]), soft_wrap=True, markup=False)
