"""What a run computes on, how long that takes by estimate, and sizes and times for people."""

from __future__ import annotations

import math
import re
import time
from dataclasses import dataclass

from megatron_slim.architecture.flops import FUSED, TORCH, teacher_flops
from megatron_slim.architecture.gpus import peak_flops
from megatron_slim.architecture.shape import ModelShape
from megatron_slim.architecture.table import count_parameters
from megatron_slim.compression.settings import RunSettings

# Shares of the rate of large products. Training on GPUs: what the planner's estimates come to for 80A3B -> 23A2B on
# H100s; on a CPU: measured, as is the streaming pass.
GPU_SHARE, CPU_SHARE = 0.15, 0.3
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


def streaming_seconds(shape: ModelShape | None, length: int, tokens: int, machine: Machine) -> float | None:
    """Seconds of a forward pass in one process; None where they cannot be known."""
    kernels = FUSED if machine.on_gpus else TORCH
    flops = None if shape is None else teacher_flops(shape, length, kernels, runs_mtp=True).total
    return seconds_of(flops, tokens, machine.streaming)


def recording_seconds(
    shape: ModelShape,
    length: int,
    tokens: int,
    nbytes: int,
    machine: Machine,
    *,
    readings: int = 1,
    processes: int = 1,
) -> float | None:
    """Seconds of recording a teacher; None where they cannot be known.

    Args:
        shape: of the teacher.
        length: positions of a sample.
        tokens: of all samples.
        nbytes: that are written.
        machine: what it is recorded on.
        readings: how often each process reads the teacher, in 16 bits.
        processes: that record.
    """
    seconds, read = streaming_seconds(shape, length, tokens, machine), readings * 2 * count_parameters(shape).total
    return None if seconds is None else seconds / processes + (read + nbytes) / WRITTEN_PER_SECOND


def seconds_of(flops: float | None, tokens: int, rate: float) -> float | None:
    """Seconds of so many operations per token; None where operations or rate are not known."""
    return None if flops is None or math.isnan(rate) else flops * tokens / rate


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
