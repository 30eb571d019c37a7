"""Settings for a number of GPUs: that Megatron knows their flags, models allow their layout, and memory may hold it."""

from __future__ import annotations

import argparse
import dataclasses
import os
import shlex
import subprocess
from pathlib import Path

import pytest

from megatron_slim.planning.hardware import GPUS
from megatron_slim.planning.layouts import Settings, TrainLayout
from megatron_slim.planning.memory import Memory, rank_memory
from megatron_slim.planning.search import Job, Search
from megatron_slim.planning.sources import Asked, find_models
from megatron_slim.testing import run_distributed

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = sorted(path.stem for path in (ROOT / "examples/slimqwen/settings").glob("*.sh"))
MODELS = find_models(Asked(ROOT / "examples/slimqwen/recipes/qwen3_next_80a3b_to_23a2b.yaml"))
STUDENT, TEACHER = MODELS.student, MODELS.teacher
assert TEACHER is not None


def settings(name: str, **variables: str) -> tuple[dict[str, str], list[str]]:
    """The variables that a file sets, and its flags."""
    script = f"set -eu; source examples/slimqwen/settings/{name}.sh; printf '%s ' \"${{settings_args[@]}}\"; set"
    clean = {"PATH": os.environ["PATH"]} | variables
    done = subprocess.run(["bash", "-c", script], cwd=ROOT, env=clean, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    first = lines[0].split("BASH=")[0]
    return dict(line.split("=", 1) for line in lines if "=" in line), shlex.split(first)


def planned(layout: TrainLayout, flags: list[str], gpu: str, run: Settings) -> Memory:
    """Memory of the fullest rank, as tools/plan_parallelism.py counts it."""
    search = Search(Job(STUDENT, TEACHER, run, layout.gpus, GPUS[gpu]))
    stages = search.stages(layout)
    assert stages is not None
    ranks = rank_memory(STUDENT, TEACHER, layout, stages, run, search.job.assumed)
    if "--optimizer-cpu-offload" in flags:
        ranks = [dataclasses.replace(rank, optimizer=0.0) for rank in ranks]
    return max(ranks, key=lambda rank: rank.total)


@pytest.mark.parametrize("name", SETTINGS)
def test_they_fit(name: str) -> None:
    values, flags = settings(name)
    gpu, gpus = name.split("_")
    sizes = {key: int(values[key.upper()]) for key in ("tp", "pp", "ep")}
    recompute = "moe" if "moe" in flags else "none"
    layout = TrainLayout(int(gpus), **sizes, micro_batch=int(values["MICRO_BATCH_SIZE"]), recompute=recompute)
    run = Settings(seq_length=int(values["SEQ_LENGTH"]), global_batch=int(values["GLOBAL_BATCH_SIZE"]))
    assert int(values["SETTINGS_NODES"]) * int(values["NPROC_PER_NODE"]) == layout.gpus
    assert layout.ep <= 8, "experts are exchanged over the network"
    assert (layout.tp == 1) or "--expert-tensor-parallel-size" in flags, "Megatron would divide experts by TP, too"
    assert not layout.violations(STUDENT, TEACHER, run, GPUS[gpu].per_node)
    used = planned(layout, flags, gpu, run).total / GPUS[gpu].memory
    # On top of what the planner adds: routing is uneven.
    assert used < 0.92, f"{used:.2f} of the memory"
    # And is not left idle by a factor of two: then there is a faster layout.
    assert used > 0.5, f"{used:.2f} of the memory"


def parse(argv: list[str]) -> bool:
    """Body of a rank: Megatron's parser ends the process at a flag that it does not know."""
    from megatron.training.arguments import add_megatron_arguments

    from megatron_slim.training.slim_arguments import add_slim_arguments

    parser = add_slim_arguments(add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False)))
    return parser.parse_args(argv) is not None


def test_megatron_knows_the_flags() -> None:
    flags = [flag for name in SETTINGS for flag in settings(name)[1]]
    assert run_distributed(1, parse, flags, initialise=False) == [True]


def test_the_environment_wins() -> None:
    assert settings("h100_64", TP="2", GLOBAL_BATCH_SIZE="512")[0]["TP"] == "2"
