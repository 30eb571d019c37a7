#!/usr/bin/env python3
"""Measure what healing a student from a teacher's cache costs, compared with training without a teacher.

Runs of tools/pretrain.py on the same tokens, in turns: LM and MTP-LM losses alone; four terms from a cache; four terms
with the teacher in the same process. What counts is Megatron's own time per iteration, and the anonymous memory of the
process. Then a teacher of some GB is recorded, compared with its streamed forward pass alone. See docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import shutil
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.kd_step import WARM_UP, kernels, seconds_of, shapes, training_command, write_models
from benchmarks.processes import run
from megatron_slim.cli.tool import run_tool
from megatron_slim.command_line import positive, tool_parser
from megatron_slim.errors import SlimError
from megatron_slim.recipe_run import STATES

LM, CACHED, KD = "lm", "cached", "kd"
HALF, MAIN, CHATS = "cached, head in bf16", "cached, main head", "cached, chats"
# Flags of each kind of run, and the samples that it reads.
KINDS: dict[str, tuple[tuple[str, ...], str]] = {
    LM: ((), "whole"),
    CACHED: ((), "whole"),
    HALF: (("--teacher-dtype", "bf16"), "whole"),
    MAIN: (("--mtp-kd-target", "teacher-main"), "whole"),
    CHATS: ((), "chats"),
    KD: ((), "whole"),
}
COUNTED = 0.45  # share of the tokens of chats that count
SAMPLE_SECONDS = 0.1
WAIT = "batch-generator-time"  # Megatron's own timer of what a step waits for its data


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = tool_parser(__doc__.splitlines()[0])
    parser.add_argument("--dir", type=Path, default=Path("runs/healing"), help="where a teacher is recorded")
    parser.add_argument("--seq-length", type=positive, default=1024, help="tokens of a sample")
    parser.add_argument("--micro-batch-size", type=positive, default=2, help="samples of a forward pass")
    parser.add_argument("--iterations", type=positive, default=5, help=f"of a run, after {WARM_UP} that do not count")
    parser.add_argument("--repeats", type=positive, default=3, help="runs of each kind; the medians are compared")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="of run")
    parser.add_argument("--states", choices=STATES, default="bf16", help="type of the states in the cache")
    parser.add_argument("--record-gb", type=float, default=2.0, help="of the teacher that is recorded; 0 records none")
    parser.add_argument("--record-samples", type=positive, default=16, help="that it is recorded on")
    parser.add_argument("--extra", default="", help="further arguments of tools/pretrain.py, for all")
    return parser.parse_args(argv)


def record_teacher(folder: Path, args: argparse.Namespace, samples: int) -> None:
    """The samples that all kinds of run read, and the teacher's cache of them."""
    import numpy as np

    from megatron_slim.checkpoint.convert import open_checkpoint
    from megatron_slim.sample_set import write_samples
    from megatron_slim.teacher_cache.record import RecordOptions, record
    from megatron_slim.teacher_cache.recording_pass import Recorded

    teacher = open_checkpoint(folder / "teacher")
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, teacher.shape.vocab_size, (samples, args.seq_length + 1))
    whole = Recorded.whole(tokens, {})
    masks = {"whole": whole.loss_mask, "chats": rng.random(whole.loss_mask.shape) < COUNTED}
    for name, mask in masks.items():
        (folder / name).mkdir()
        write_samples(folder / name, tokens, mask, whole.position_ids, documents=False, about={})
        given = dataclasses.replace(whole, loss_mask=mask)
        record(teacher, given, folder / f"{name}-cache", RecordOptions(kind=args.states, check_teacher=False))


def one_run(folder: Path, args: argparse.Namespace, kind: str) -> tuple[list[float], int, list[float]]:
    """Seconds of every counted iteration, the most memory in use, and seconds that each waited for its data."""
    iterations = WARM_UP + args.iterations
    flags, samples = KINDS[kind]
    data = ("--data-path", folder / samples) if kind in (LM, KD) else ("--teacher-cache", folder / f"{samples}-cache")
    size = args.seq_length, args.micro_batch_size, args.micro_batch_size
    command = training_command(folder, iterations, *size, teacher=kind == KD, data=data)
    events = tempfile.mkdtemp(dir=folder)
    command += ["--split", "1,0,0", "--timing-log-level", "2", "--log-timers-to-tensorboard"]
    command += ["--tensorboard-dir", events, "--tensorboard-log-interval", "1", *flags, *args.extra.split()]
    done = run(command, sample_seconds=SAMPLE_SECONDS)
    found, waits = seconds_of(done.stdout), waits_of(events)
    if len(found) != iterations or len(waits) != iterations:
        raise SlimError(f"{len(found)} iterations and {len(waits)} waits of {iterations} in the log of a run")
    return found[WARM_UP:], done.peak_anonymous, waits[WARM_UP:]


def waits_of(events: str) -> list[float]:
    """Seconds that every iteration waited for its data."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(events)
    accumulator.Reload()
    return [float(point.value) for point in accumulator.Scalars(WAIT)]


def train(args: argparse.Namespace) -> dict[str, Any]:
    """All kinds of run, in turns."""
    models = shapes("eighth")
    seconds, waits = defaultdict[str, list[float]](list), defaultdict[str, list[float]](list)
    peaks = defaultdict[str, int](int)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_models(folder, models)
        record_teacher(folder, args, samples=(WARM_UP + args.iterations) * args.micro_batch_size)
        for _ in range(args.repeats):
            for kind in args.kinds:
                found, peak, waited = one_run(folder, args, kind)
                seconds[kind] += found
                waits[kind] += waited
                peaks[kind] = max(peaks[kind], peak)
    head = 4 * models["teacher"].vocab_size * models["teacher"].hidden_size
    medians = {kind: statistics.median(found) for kind, found in seconds.items()}
    return {
        **ratios_of(medians, peaks, waits, head),
        "operations": operations(models, args.seq_length),
        "seconds": medians,
        "samples": seconds,
    }


def operations(models: Mapping[str, Any], seq_length: int) -> float:
    """What a step from a cache costs over one of training without a teacher, by operations alone."""
    from megatron_slim.architecture.flops import head_flops, student_flops

    heads = 1 + models["student"].mtp_num_layers
    return 1 + heads * head_flops(models["teacher"]) / student_flops(models["student"], seq_length, kernels()).total


def ratios_of(
    seconds: Mapping[str, float], peaks: Mapping[str, int], waits: Mapping[str, list[float]], head: int
) -> dict[str, float]:
    """What is claimed, of medians, peaks and waits by kind of run; ``head``: bytes of the teacher's output layer."""
    names = {
        CACHED: "cached_over_lm",
        HALF: "cached_over_lm_head_in_bf16",
        MAIN: "cached_over_lm_teacher_main",
        CHATS: "cached_over_lm_chats",
        KD: "colocated_over_lm",
    }
    found = {name: seconds[kind] / seconds[LM] for kind, name in names.items() if {kind, LM} <= seconds.keys()}
    if {CACHED, LM} <= seconds.keys():
        found["memory_over_student"] = (peaks[CACHED] - head) / peaks[LM]
        found["memory_over_student_with_head"] = peaks[CACHED] / peaks[LM]
        found["data_wait"] = statistics.median(waits[CACHED]) / seconds[CACHED]
    if {KD, LM} <= seconds.keys():
        found["colocated_memory_over_student"] = peaks[KD] / peaks[LM]
    return found


def recording(args: argparse.Namespace) -> Iterator[tuple[str, Any]]:
    """Recording over the forward pass alone, in turns in this process; what is written included."""
    import numpy as np

    from benchmarks import models, storage
    from megatron_slim.checkpoint.convert import open_checkpoint
    from megatron_slim.compat import runtime
    from megatron_slim.streaming.forward import StreamingForward
    from megatron_slim.teacher_cache.record import RecordOptions, record
    from megatron_slim.teacher_cache.recording_pass import Recorded

    work = args.dir / "work"
    shutil.rmtree(work, ignore_errors=True)  # of a run that was killed
    work.mkdir(parents=True)
    try:
        models.write_model(work / "teacher", models.scaled_config(8, 1024, args.record_gb * 1e9), sparse=False)
        teacher = open_checkpoint(work / "teacher")
        tokens = np.random.default_rng(0).integers(
            0, teacher.shape.vocab_size, (args.record_samples, args.seq_length + 1)
        )
        micro_batch, dtype = max(1, 4096 // args.seq_length), runtime.default_dtype()
        runtime.init_single_process()

        def forward(_: int) -> None:
            given = np.ascontiguousarray(tokens[:, :-1])
            StreamingForward(teacher, given, micro_batch_size=micro_batch, dtype=dtype).run("forward pass")

        def whole(number: int) -> None:
            options = RecordOptions(kind=args.states, micro_batch_size=micro_batch, check_teacher=False)
            record(teacher, Recorded.whole(tokens, {}), work / f"cache-{number}", options)

        contestants: dict[str, Callable[[int], None]] = {"forward": forward, "record": whole}
        seconds = defaultdict[str, list[float]](list)
        for number in range(args.repeats + 1):
            for name, contestant in contestants.items():
                storage.drop_cache(work / "teacher")
                started = time.perf_counter()
                contestant(number)
                if number:  # the first allocates
                    seconds[name].append(time.perf_counter() - started)
            cache = work / f"cache-{number}"
            nbytes = storage.bytes_of(cache)
            shutil.rmtree(cache)
        medians = {name: statistics.median(found) for name, found in seconds.items()}
        yield "record_over_forward", medians["record"] / medians["forward"]
        yield "record_gb", storage.bytes_of(work / "teacher") / 1e9
        yield "cache_gb", nbytes / 1e9
        yield "record_seconds", dict(seconds)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Training, then recording."""
    import torch

    results = train(args)
    with torch.no_grad():
        results |= dict(recording(args)) if args.record_gb else {}
    if not args.json:
        for name, value in results.items():
            if isinstance(value, float):
                print(f"{name}: {value:.3g}")
    return results


if __name__ == "__main__":
    arguments = parse_args()
    run_tool(lambda: measure(arguments), as_json=arguments.json)
