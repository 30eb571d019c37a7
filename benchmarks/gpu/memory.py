"""Bytes that training and the fused losses hold on the device, against what the planner says."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from benchmarks import kd_loss as kd_loss_benchmark
from benchmarks import kd_step as kd_step_benchmark
from benchmarks.gpu.parts import Check, Found, Setting
from benchmarks.gpu.speed import loss_arguments, loss_case
from megatron_slim.architecture.shape import ModelShape
from megatron_slim.planning.hardware import GPUS
from megatron_slim.planning.layouts import Settings, TrainLayout
from megatron_slim.planning.memory import LOSS_BYTES, Memory, rank_memory
from megatron_slim.planning.search import Job, Search

STATIC_OFF, LOSS_OVER, PEAK_OVER = 0.01, 1.1, 1.1
_ALLOCATED = re.compile(r"\(after (\d+) iterations\) memory \(MB\) \| allocated: ([\d.]+) \| max allocated: ([\d.]+)")


def planned(teacher: ModelShape, student: ModelShape, run: Settings, micro_batch: int) -> Memory:
    """What the planner says that the run takes on one GPU."""
    layout, job = TrainLayout(1, micro_batch=micro_batch), Job(student, teacher, run, 1, GPUS["h100"])
    stages = Search(job).stages(layout)
    assert stages is not None
    (one,) = rank_memory(student, teacher, layout, stages, run, job.assumed)
    return one


def loss_bytes(tokens: int, vocab: int, precision: str) -> int:
    """What the fused losses need beyond their inputs, by the formula of docs/distillation.md."""
    return LOSS_BYTES[precision] * tokens * vocab


def memory(setting: Setting) -> Found:
    """Both."""
    found = Found()
    _losses(setting, found)
    _training(setting, found)
    return found


def _losses(setting: Setting, found: Found) -> None:
    from megatron_slim.distillation.fused import default_chunk

    args, case = loss_arguments(setting), loss_case(setting)
    chunk = args.chunk or default_chunk(case.weight.device)
    kd_loss_benchmark.fused(case, chunk)  # what the libraries allocate once is not the losses'
    peak = kd_loss_benchmark.peak_above(lambda: kd_loss_benchmark.fused(case, chunk), setting.device)
    expected = loss_bytes(chunk, args.vocab, _precision(setting))
    # Gradients of the hidden states, which are the caller's in the end, are not in the formula.
    expected += sum(each.numel() * each.element_size() for each in case.hidden)
    found.details |= {"loss_peak_bytes": peak, "loss_expected_bytes": expected}
    if peak is not None:
        judged = setting.device == "cuda" and not setting.quick
        label = f"peak of the fused losses in chunks of {chunk} over the formula"
        found.add(Check.at_most(label, peak / expected, LOSS_OVER, judged=judged))


def _training(setting: Setting, found: Found) -> None:
    if setting.quick:
        sizes = "--seq-length 32 --micro-batch-size 1 --vocab-size 256"
    else:
        sizes = "--widths published --seq-length 4096 --micro-batch-size 1 --vocab-size 65536"
    extra = "--extra=--bf16" if setting.device == "cuda" else "--extra="
    args = kd_step_benchmark.parse_args([*sizes.split(), "--iterations", "1", "--repeats", "1", extra])
    models = kd_step_benchmark.shapes(args.widths, args.vocab_size)
    kd_step_benchmark.write_models(setting.work, models)
    output = kd_step_benchmark.train(
        setting.work, args, kd_step_benchmark.KD, kd_step_benchmark.WARM_UP + args.iterations
    )
    print(output)
    allocated, most = last_report(output)
    run = Settings(args.seq_length, args.micro_batch_size, _precision(setting), kernels=kd_step_benchmark.kernels())
    plan = planned(models["teacher"], models["student"], run, args.micro_batch_size)
    expected, expected_peak = plan.static, plan.total - plan.overhead
    found.details |= {"allocated_bytes": allocated, "max_allocated_bytes": most, "planned": dataclasses.asdict(plan)}
    judged = setting.device == "cuda" and not setting.quick
    # On a CPU it is the process that is measured, not what it allocated.
    label = "allocated after a step over static bytes (parameters, gradients, optimizer, teacher), difference from 1"
    found.add(Check.at_most(label, abs(allocated / expected - 1), STATIC_OFF, judged=judged))
    found.add(Check("allocated after a step, GB", allocated / 1e9), Check("static bytes, GB", expected / 1e9))
    label = "peak of a step over the planner's, what the allocator and libraries take left out"
    found.add(Check.at_most(label, most / expected_peak, PEAK_OVER, judged=judged))
    found.add(Check("peak of a step, GB", most / 1e9), Check("the planner's, GB", expected_peak / 1e9))


def last_report(output: str) -> tuple[float, float]:
    """Bytes allocated now and at most, of Megatron's last report."""
    *_, (_, allocated, most) = _ALLOCATED.findall(output)
    return float(allocated) * 2**20, float(most) * 2**20


def _precision(setting: Setting) -> Any:
    return "bf16" if setting.device == "cuda" else "fp32"
