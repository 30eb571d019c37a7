"""Two runs of the same training, one of them killed three times, and their comparison."""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from benchmarks.models import demo_shapes
from benchmarks.report import machine
from benchmarks.soak_compare import LOGGED, compare
from megatron_slim.architecture.shape import ModelShape
from megatron_slim.checkpoint.torch_dist_names import METADATA
from megatron_slim.errors import SlimError
from megatron_slim.testing import tiny_shape, write_tiny_checkpoint

ROOT = Path(__file__).resolve().parents[1]
RANKS = 4
END_SECONDS = 60.0  # within which a job must have ended after one of its ranks was killed


@dataclass
class Kill:
    """One kill: what died (``rank``, ``save`` or ``all``), when, and what came of it."""

    what: str
    step: int
    seconds: float = 0.0
    exit_code: int = 0
    resumed_from: int = 0


def shapes(model: str) -> tuple[ModelShape, ModelShape]:
    """Teacher and student: those of the demo, or the tests'."""
    if model == "tiny":
        sizes: dict[str, Any] = {"layer_types": ("linear_attention", "full_attention"), "num_layers": 2}
        sizes["vocab_size"] = 120
        return tiny_shape(**sizes), tiny_shape(**sizes, hidden_size=48, num_moe_experts=4)
    return demo_shapes()


def prepare(args: argparse.Namespace) -> None:
    """Write random teacher and student, and a stream of random tokens that is read more than once."""
    import megatron_slim.mcore

    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    args.dir.mkdir()
    teacher, student = shapes(args.model)
    for seed, (name, shape) in enumerate({"teacher": teacher, "student": student}.items()):
        write_tiny_checkpoint(args.dir / name, shape, seed=seed, dtype=torch.float32)
    builder = IndexedDatasetBuilder(str(args.dir / "data.bin"), dtype=np.int32)
    rng = np.random.default_rng(args.seed)
    for _ in range(64):
        length = int(rng.integers(args.seq_length, 8 * args.seq_length))
        builder.add_document(rng.integers(0, student.vocab_size, length), [length])
    builder.finalize(str(args.dir / "data.idx"))


class Job:
    """One start of the training script, in a session of its own."""

    def __init__(self, args: argparse.Namespace, name: str) -> None:
        self.save = args.dir / name
        self.log = args.dir / f"{name}.log"
        self._read = self.log.stat().st_size if self.log.exists() else 0
        self._tail = ""
        settings = {
            "TEACHER": args.dir / "teacher",
            "STUDENT": args.dir / "student",
            "SAVE": self.save,
            "DATA": args.dir / "data",
            "VALID_DATA": args.dir / "data",
            "PP": 2,
            "EP": 2,
            "NPROC_PER_NODE": RANKS,
            "MASTER_PORT": args.port,
            "SEQ_LENGTH": args.seq_length,
            "MICRO_BATCH_SIZE": 1,
            "GLOBAL_BATCH_SIZE": 4,
            "LR": 1e-3,
            "MIN_LR": 1e-4,
            "LR_WARMUP_ITERS": args.steps // 10,
            "TRAIN_ITERS": args.steps,
            "LOG_INTERVAL": 1,
            "SAVE_INTERVAL": args.save_interval,
            "EVAL_INTERVAL": 10 * args.steps,
            "EVAL_ITERS": 1,
            "PRECISION": "fp32",
            "OMP_NUM_THREADS": 1,
            "PYTHONUNBUFFERED": 1,
            "PYTHON": sys.executable,
        }
        # Random weights predict nothing. Tensorboard is to lose as little as it can. Optimizer state by parameter: by
        # bucket, Megatron saves the padding between parameters too, which is whatever was in memory.
        flags = ["--no-teacher-check", "--tensorboard-queue-size", "1", "--tensorboard-log-interval", "1"]
        end = shapes(args.model)[1].vocab_size - 1  # a token like others, which sets the loss mask at random
        flags += ["--eod-mask-loss", "--null-tokenizer-eod-id", str(end), "--dist-ckpt-optim-fully-reshardable"]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                ["bash", str(ROOT / "examples/slimqwen/pretrain_distill.sh"), *flags],
                env=os.environ | {key: str(value) for key, value in settings.items()},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def lines(self) -> Iterator[str]:
        """Complete lines that the log has got since the last call."""
        with self.log.open(errors="replace") as log:
            log.seek(self._read)
            text = log.read()
            self._read = log.tell()
        *complete, self._tail = (self._tail + text).split("\n")
        yield from complete

    def until(self, reached: Callable[[], bool]) -> None:
        """Wait, without sleeping long, for something in a job that must not end before."""
        while not reached():
            if self.process.poll() is not None:
                raise SlimError(f"training ended with code {self.process.returncode}", where=str(self.log))
            time.sleep(0.002)

    def step(self) -> int:
        """The last step among the new lines of the log, 0 without one."""
        return max((int(found[1]) for line in self.lines() if (found := LOGGED.search(line))), default=0)

    def kill(self, what: str) -> tuple[float, int]:
        """Kill one rank, or all processes at once; seconds until the launcher had ended, and its exit code."""
        processes = psutil.Process(self.process.pid).children(recursive=True)
        ranks = [each for each in processes if each.ppid() == self.process.pid]
        begin = time.monotonic()
        victims = [ranks[1]] if what == "rank" else [psutil.Process(self.process.pid), *processes]
        for victim in victims:
            with contextlib.suppress(psutil.NoSuchProcess):
                victim.send_signal(signal.SIGKILL)
        code = self.process.wait(timeout=END_SECONDS)
        _, alive = psutil.wait_procs(processes, timeout=END_SECONDS)
        if alive:
            raise SlimError(f"{len(alive)} processes outlive their job", where=str(self.log))
        return round(time.monotonic() - begin, 2), code


def plan_kills(args: argparse.Namespace) -> list[Kill]:
    """A rank in the second quarter of the run, everything in a save of the third, everything in the last."""
    rng, quarter = random.Random(args.seed), args.steps // 4
    in_save = rng.randrange(2 * quarter, 3 * quarter) // args.save_interval * args.save_interval + args.save_interval
    after = min(in_save + args.save_interval, args.steps - 2)
    return [
        Kill("rank", rng.randrange(args.save_interval + 1, 2 * quarter)),
        Kill("save", in_save),
        Kill("all", rng.randrange(after, args.steps - 1)),
    ]


def strike(args: argparse.Namespace, name: str, kill: Kill) -> None:
    """Start or resume, and kill when it is time."""
    job = Job(args, name)
    if kill.what == "save":
        directory = job.save / f"iter_{kill.step:07d}"
        job.until(directory.is_dir)
        job.until(lambda: any(directory.glob("*.distcp")))
    else:
        job.until(lambda: job.step() >= kill.step)
    kill.seconds, kill.exit_code = job.kill(kill.what)
    if kill.exit_code == 0:
        raise SlimError(f"the job that lost {kill.what} ended with exit code 0", where=str(job.log))
    if kill.what == "save" and (directory / METADATA).exists():
        raise SlimError("the checkpoint was complete before the kill", where=str(directory), fix="run again")
    kill.resumed_from = int((job.save / "latest_checkpointed_iteration.txt").read_text())


def finish(args: argparse.Namespace, name: str) -> float:
    """Start or resume, to the end; seconds."""
    begin = time.monotonic()
    job = Job(args, name)
    if code := job.process.wait():
        raise SlimError(f"training ended with code {code}", where=str(job.log))
    return time.monotonic() - begin


def run(args: argparse.Namespace) -> dict[str, Any]:
    """The whole benchmark; see `benchmarks.soak`."""
    prepare(args)
    seconds = finish(args, "whole")
    kills = plan_kills(args)
    for kill in kills:
        strike(args, "killed", kill)
    finish(args, "killed")
    return {
        **compare(args.dir, args.steps, averaged={kill.resumed_from + 2 for kill in kills}),
        "steps": args.steps,
        "kills": [asdict(kill) for kill in kills],
        "seconds": round(seconds, 1),
        "seconds_per_step": round(seconds / args.steps, 3),
        "model": args.model,
        "machine": machine(args.dir),
    }
