"""Training from a teacher's cache on this device, against the teacher in the same process."""

from __future__ import annotations

from pathlib import Path

from benchmarks.gpu.hide import compile_nothing
from benchmarks.gpu.parts import Check, Found, Setting
from benchmarks.gpu.training_runs import LOSSES, SIZES, STEPS, train, worst, write_models

LENGTH, SAMPLES = 32, 24
# On a CPU they are equal bit for bit; kernels of a GPU may add in another order from run to run.
SAME = 1e-5
# On a CPU e4m3 moves the losses of these models by 0.11%, less than bf16 would.
ROUNDED = 0.005


def record(teacher: Path, samples: Path, save: Path, kind: str) -> float:
    """Record the teacher in fp32; the mean KL that rounding its states costs."""
    import torch

    from megatron_slim.checkpoint.convert import open_checkpoint
    from megatron_slim.teacher_cache.given import read_recorded
    from megatron_slim.teacher_cache.record import RecordOptions
    from megatron_slim.teacher_cache.record import record as write

    source = open_checkpoint(teacher)
    given = read_recorded(samples, source.shape, seq_length=None, num_samples=None, seed=0)
    options = RecordOptions(kind, torch.float32, micro_batch_size=1, check_teacher=False)
    cache = write(source, given, save, options)
    assert cache is not None
    return float(cache.figures["kl_of_rounding"])


def cache(setting: Setting) -> Found:
    """Losses of a few steps from caches in fp32 and FP8, of whole samples and of documents."""
    compile_nothing()
    from megatron_slim.testing import write_random_samples

    found, work = Found(), setting.work
    write_models(work)
    for documents in (False, True):
        name = "documents" if documents else "whole"
        samples = write_random_samples(work / name, SAMPLES, LENGTH, SIZES["vocab_size"], documents=documents).path
        common = ("--split", "1,0,0", "--micro-batch-size", "1")
        expected = train(setting, f"{name}-colocated", *common, data=("--data-path", samples))
        for kind, limit in (("fp32", SAME), ("fp8", ROUNDED)):
            directory = work / f"{name}-{kind}"
            divergence = record(work / "teacher", samples, directory, kind)
            run = f"{name}-{kind}-run"
            flags = ("--teacher-head-offload", *common)
            losses = train(setting, run, *flags, data=("--teacher-cache", directory), teacher=False)
            label = f"{'documents' if documents else 'whole samples'}, states in {kind}: losses of {STEPS} steps, "
            label += "worst relative difference from a teacher in the same process"
            found.add(Check.at_most(label, worst(losses, expected, LOSSES), limit))
            found.details[f"{name}-{kind}"] = {"losses": losses, "kl_of_rounding": divergence}
    return found
