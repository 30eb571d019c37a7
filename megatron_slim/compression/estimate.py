"""What every step of a run needs, before anything begins: tokens, operations, bytes of disk and time."""

from __future__ import annotations

import math
import re
import shlex
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_slim.architecture.flops import FUSED, TORCH, student_flops, teacher_flops
from megatron_slim.architecture.gpus import peak_flops
from megatron_slim.architecture.shape import ModelShape
from megatron_slim.architecture.table import count_parameters
from megatron_slim.compression.settings import SEQ_LENGTH, RunSettings
from megatron_slim.compression.steps import (
    ACCEPTANCE,
    EVALUATE_TEACHER,
    EXPORT,
    PRUNE,
    QUANTIZE,
    SHOW_PLAN,
    TRAIN,
    Step,
    carries_optimizer,
    measures,
)
from megatron_slim.data import data_prefix, open_stream
from megatron_slim.optimizers import ADAM, MAIN_COPY, OPTIMIZERS
from megatron_slim.streaming.samples import NUM_SAMPLES

# Shares of the rate of large products. Training on GPUs: what the planner's estimates come to for 80A3B -> 23A2B on
# H100s; on a CPU: measured, as is the streaming pass.
GPU_SHARE, CPU_SHARE = 0.15, 0.3
SAVE_INTERVAL = 1000
WRITTEN_PER_SECOND = 1e9  # bytes of a checkpoint, on a disk of today


@dataclass(frozen=True)
class Machine:
    """What a run computes on.

    Attributes:
        name: for people.
        training: operations per second of all its processes in training.
        streaming: of the one process that calibrates and evaluates.
        on_gpus: type of the weights is bf16.
    """

    name: str
    training: float
    streaming: float
    on_gpus: bool


@dataclass(frozen=True)
class Need:
    """What a step needs; None is what cannot be known before statistics are there."""

    step: Step
    tokens: int = 0
    seconds: float | None = None
    nbytes: int | None = None


def find_machine(settings: RunSettings) -> Machine:
    """That of the settings' name (``h100_64``), else this one."""
    train = settings.section("train")
    named = re.fullmatch(r"([a-z]+\d+)_(\d+)", str(train.get("settings", "")))
    if named and (peak := peak_flops(named[1])):
        count = int(named[2])
        return Machine(f"{count} {named[1].upper()}", count * peak * GPU_SHARE, peak * GPU_SHARE, on_gpus=True)
    import torch

    return this_machine(train.get("nproc_per_node", torch.cuda.device_count()) * train.get("nnodes", 1))


def this_machine(count: int) -> Machine:
    """This machine, and others like it: ``count`` GPUs in all, where it has any."""
    import torch

    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
        if peak := peak_flops(name):
            return Machine(f"{count} {name}", count * peak * GPU_SHARE, peak * GPU_SHARE, on_gpus=True)
        return Machine(f"{count} {name} (rate unknown)", math.nan, math.nan, on_gpus=True)
    rate = _product_rate() * CPU_SHARE
    return Machine("this CPU", rate, rate, on_gpus=False)


def _product_rate() -> float:
    """Operations per second of a product in fp32 with all threads."""
    import torch

    from megatron_slim.products import linear

    size, count = 1024, 8
    matrix = torch.ones(size, size)
    linear(matrix, matrix)
    begin = time.perf_counter()
    for _ in range(count):
        linear(matrix, matrix)
    return count * 2.0 * size**3 / (time.perf_counter() - begin)


def needs(settings: RunSettings, found: Sequence[Step], teacher: ModelShape, machine: Machine) -> Iterator[Need]:
    """Of every step; sizes that a budget leaves open are unknown, and all that follows from them."""
    student: ModelShape | None = teacher
    source, length = teacher, settings.section("train").get("seq_length", SEQ_LENGTH)
    for step in found:
        if step.kind == PRUNE:
            assert step.phase is not None
            source, student = student, _pruned(settings, step.phase, student)  # type: ignore[assignment]
            tokens = _calibration_tokens(settings, length) if measures(settings, step.phase) else 0
            size = _size(student, machine)
            if student is not None and size is not None and carries_optimizer(settings, step.phase):
                size += count_parameters(student).total * (MAIN_COPY + OPTIMIZERS[ADAM].state_bytes)
            yield Need(step, tokens, streaming_seconds(source, length, tokens, machine), size)
        elif step.kind == TRAIN:
            yield _training(settings, step, teacher, student, machine)
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
    length, kernels = train.get("seq_length", SEQ_LENGTH), FUSED if machine.on_gpus else TORCH
    flops = student_flops(student, length, kernels).total + teacher_flops(teacher, length, kernels, runs_mtp=True).total
    checkpoints = max(1, math.ceil(iterations / train.get("save_interval", SAVE_INTERVAL)))
    precision = train.get("precision", "bf16" if machine.on_gpus else "fp32")
    per_parameter = OPTIMIZERS[ADAM].checkpoint_bytes({"bf16": 2, "fp32": 4}[precision])
    nbytes = checkpoints * per_parameter * count_parameters(student).total
    return Need(step, tokens, _seconds(flops, tokens, machine.training), nbytes)


def _size(shape: ModelShape | None, machine: Machine) -> int | None:
    """Bytes of a Hugging Face checkpoint."""
    return None if shape is None else count_parameters(shape).total * (2 if machine.on_gpus else 4)


def streaming_seconds(shape: ModelShape | None, length: int, tokens: int, machine: Machine) -> float | None:
    """Seconds of a forward pass in one process; None where they cannot be known."""
    kernels = FUSED if machine.on_gpus else TORCH
    flops = None if shape is None else teacher_flops(shape, length, kernels, runs_mtp=True).total
    return _seconds(flops, tokens, machine.streaming)


def _seconds(flops: float | None, tokens: int, rate: float) -> float | None:
    return None if flops is None or math.isnan(rate) else flops * tokens / rate


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
    """As `streaming.samples` draws them: where no number is given, all of data that have fewer than the default."""
    calibrate, data = settings.section("calibrate"), settings.calibration_data
    length, number = calibrate.get("seq_length", length), calibrate.get("num_samples")
    if number is None:
        matrix = data.suffix == ".npy"
        number = NUM_SAMPLES if matrix else min(NUM_SAMPLES, len(open_stream(data_prefix(data), None)[0]) // length)
    return int(number * length)


def _evaluation_tokens(settings: RunSettings) -> int:
    evaluate, data = settings.section("evaluate"), settings.evaluation_data
    assert data is not None
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
    return sorted({str(settings.teacher), str(settings.save), *(str(each.parent) for each in (*data, *files))})


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


def size_text(nbytes: int | None) -> str:
    """Bytes for people; "?" where they are not known.

    >>> size_text(46_300_000_000), size_text(999), size_text(None)
    ('46.3 GB', '0.0 MB', '?')
    """
    if nbytes is None:
        return "?"
    return f"{nbytes / 1e9:.1f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.1f} MB"


def time_text(seconds: float | None) -> str:
    """Seconds for people.

    >>> time_text(30.2), time_text(5000.0), time_text(1e6), time_text(None)
    ('30 s', '1.4 h', '11.6 days', '?')
    """
    if seconds is None:
        return "?"
    for unit, size in (("days", 172800.0), ("h", 3600.0), ("min", 120.0)):
        if seconds >= size:
            return f"{seconds / {'days': 86400.0, 'h': 3600.0, 'min': 60.0}[unit]:.1f} {unit}"
    return f"{seconds:.0f} s"
