"""Times: the fused losses, a step of distillation, calibration; by the benchmarks that a CPU runs too."""

from __future__ import annotations

from typing import Any

from benchmarks import calibration as calibration_benchmark
from benchmarks import kd_loss as kd_loss_benchmark
from benchmarks import kd_step as kd_step_benchmark
from benchmarks.gpu.machine import need
from benchmarks.gpu.parts import Check, Found, Setting
from benchmarks.kd_loss import FULL

FOUR_TERMS_MS = 40.0  # on an H200, at the sizes of `benchmarks.kd_loss.FULL`
OVER_LIGER = 1.5
OVER_FLOOR = 1.15
TINY_LOSS = "--tokens 64 --vocab 1000 --hidden 32 --teacher-hidden 48 --chunk 16 --repeats 1"
TINY_LAYER = {"hidden_size": 64, "num_experts": 16, "moe_intermediate_size": 16, "num_hidden_layers": 4}


def loss_arguments(setting: Setting) -> Any:
    """Arguments of `benchmarks.kd_loss` for this machine."""
    sizes = TINY_LOSS if setting.quick else "--repeats 10"
    return kd_loss_benchmark.parse_args(["--device", setting.device, "--no-liger", *sizes.split()])


def loss_case(setting: Setting) -> Any:
    """Its inputs."""
    import torch

    torch.manual_seed(0)
    args = loss_arguments(setting)
    dtype = torch.bfloat16 if setting.device == "cuda" else torch.float32
    sizes = args.tokens, args.vocab, args.hidden, args.teacher_hidden
    return kd_loss_benchmark.Case.make(*sizes, setting.device, dtype)


def kd_loss(setting: Setting) -> Found:
    """Four terms at the published sizes: milliseconds, and against naive losses; both must give the same gradients."""
    results = kd_loss_benchmark.benchmark(loss_arguments(setting))
    milliseconds = 1000 * results["seconds"]["fused"]
    judged = not setting.quick and "H200" in setting.device_name
    size = ", ".join(f"{name} {value}" for name, value in FULL.items())
    found = Found(details=results)
    found.add(Check.at_most(f"four terms, ms (for an H200 at {size})", milliseconds, FOUR_TERMS_MS, judged=judged))
    found.add(
        Check(
            "the same with the teacher's main head for both heads, ms", 1000 * results["seconds"]["fused_teacher_main"]
        )
    )
    for name in ("time_over_naive", "time_over_plain_ce", "memory_over_naive"):
        if name in results:
            found.add(Check(name, results[name]))
    return found


def liger(setting: Setting) -> Found:
    """Cross entropy and Jensen-Shannon divergence of one head, against Liger's fused linear distillation loss."""
    need("Liger")
    contestants = kd_loss_benchmark.liger(loss_case(setting))
    assert contestants is not None
    results = kd_loss_benchmark.compare_with_liger(contestants, loss_arguments(setting).repeats)
    judged = not setting.quick
    return Found(
        [Check.at_least("times faster than Liger", results["speedup_over_liger"], OVER_LIGER, judged=judged)], results
    )


def kd_step(setting: Setting) -> Found:
    """A step with teacher and four terms over a step of LM training, against the operations of both."""
    if setting.quick:
        sizes = "--seq-length 32 --micro-batch-size 1 --vocab-size 256 --iterations 1 --repeats 1"
    else:
        sizes = "--widths published --seq-length 4096 --micro-batch-size 1 --iterations 6 --repeats 1"
    extra = ["--extra=--bf16"] if setting.device == "cuda" else []
    results = kd_step_benchmark.measure(kd_step_benchmark.parse_args([*sizes.split(), *extra]))
    found = Found(details=results)
    found.add(Check("kd_over_lm", results["kd_over_lm"]), Check("flop_floor", results["flop_floor"]))
    # The goal was set for a CPU, where operations are what takes the time.
    found.add(Check.at_most("kd_over_lm over flop_floor", results["over_floor"], OVER_FLOOR, judged=False))
    found.add(Check("a step of distillation, s", results["seconds"]["kd"]))
    return found


def calibration(setting: Setting) -> Found:
    """Seconds of a layer of each kind of the published 80B model with all that calibration listens to."""
    from megatron_slim.compat import runtime

    runtime.init_single_process()
    import torch

    argv = f"--published-layers --layer-tokens {64 if setting.quick else 4096} --repeats {1 if setting.quick else 3}"
    with torch.no_grad():
        args = calibration_benchmark.parse_args(argv.split())
        results = calibration_benchmark.published_layers(args, **(TINY_LAYER if setting.quick else {}))
    found = Found(details=results)
    for kind, seconds in results["layer_seconds"].items():
        found.add(Check(f"{kind}, s per {args.layer_tokens} tokens", seconds))
    found.add(Check("the 80B model with 1024 samples of 4096 tokens, minutes", results["measured_80b_minutes"]))
    return found
