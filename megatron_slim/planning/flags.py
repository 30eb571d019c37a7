"""A layout as what is pasted in front of and behind ``megatron-slim distill`` (no torch)."""

from __future__ import annotations

import math
import shlex
from dataclasses import replace

from megatron_slim.planning.layouts import RECOMPUTE, Settings, TrainLayout
from megatron_slim.training import variables as run_variables

SCRIPT = "examples/slimqwen/pretrain_distill.sh"
COMMAND = "megatron-slim distill"  # runs the script, also where no checkout is
CACHE_FLAG = "--teacher-cache"
TO_FILL_IN = {"TEACHER": "teacher", "STUDENT": "pruned", "SAVE": "run", "DATA": "corpus_text_document"}


def iterations(settings: Settings, tokens: int) -> int:
    """Steps that see at least so many tokens."""
    return math.ceil(tokens / (settings.global_batch * settings.seq_length))


def variables(layout: TrainLayout, settings: Settings, tokens: int, per_node: int) -> dict[str, str]:
    """Variables of the run, as the script has them in its environment."""
    nodes = max(1, layout.gpus // per_node)
    found = {
        "NNODES": nodes,
        "NPROC_PER_NODE": layout.gpus // nodes,
        "TP": layout.tp,
        "PP": layout.pp,
        "EP": layout.ep,
        "SEQ_LENGTH": settings.seq_length,
        "MICRO_BATCH_SIZE": layout.micro_batch,
        "GLOBAL_BATCH_SIZE": settings.global_batch,
        **({"PROGRESSIVE": 1} if settings.progressive else {"TRAIN_ITERS": iterations(settings, tokens)}),
        "PRECISION": settings.precision,
    }
    return {name: str(value) for name, value in found.items()}


def arguments(layout: TrainLayout, settings: Settings) -> list[str]:
    """Arguments behind the script's name."""
    found = ["--expert-tensor-parallel-size", "1"]
    if layout.pp > 1:
        found += ["--pipeline-layout", "auto"]
    if layout.vpp > 1:
        found += ["--num-virtual-stages-per-pipeline-rank", str(layout.vpp)]
    recompute = RECOMPUTE[layout.recompute]
    if recompute.granularity is not None:
        found += ["--recompute-granularity", recompute.granularity]
    if recompute.modules:
        found += ["--recompute-modules", *recompute.modules]
    if recompute.method is not None:
        found += ["--recompute-method", recompute.method, "--recompute-num-layers", str(recompute.num_layers)]
    if settings.kd_loss != Settings.kd_loss:
        found += ["--kd-loss", settings.kd_loss]
    if settings.loss_chunk != Settings.loss_chunk:
        found += ["--loss-chunk-size", str(settings.loss_chunk)]
    if settings.optimizer != Settings.optimizer:
        found += ["--optimizer", settings.optimizer]
    found += ["--train-only", settings.train_only] if settings.train_only else []
    found += settings.storage.flags
    found += ["--without-mtp"] if settings.without_mtp else []
    found += ["--teacher-without-mtp"] if settings.teacher_without_mtp else []
    return found


def megatron_arguments(layout: TrainLayout, settings: Settings, tokens: int) -> list[str]:
    """What a run makes of both for Megatron; its models and data are to be added."""
    given = variables(layout, replace(settings, progressive=False), tokens, per_node=layout.gpus)
    return run_variables.without_shards_of_matrices(
        run_variables.megatron_arguments(given) + arguments(layout, settings)
    )


def command(layout: TrainLayout, settings: Settings, tokens: int, per_node: int, *, has_teacher: bool = True) -> str:
    """The whole, to paste into a shell; models and data are to be filled in.

    On several nodes it is a Slurm job that asks for so many GPUs: a login node has none that could be counted.
    """
    given = variables(layout, settings, tokens, per_node)
    words = [f"{name}={value}" for name, value in given.items()]
    cache = [CACHE_FLAG, "cache"] if has_teacher and settings.teacher_head_only else []
    left_out = {"TEACHER", "DATA"} if cache else set() if has_teacher else {"TEACHER"}  # a cache has the data
    fill = [f"{name}={value}" for name, value in TO_FILL_IN.items() if name not in left_out]
    if given["NNODES"] != "1":
        fill += ["LAUNCHER=slurm", f"SBATCH_GPUS_PER_NODE={given['NPROC_PER_NODE']}"]
    first, second = words[:5], words[5:]
    lines = [" ".join(fill), " ".join(first), " ".join(second)]
    return " \\\n  ".join([*lines, f"{COMMAND} {shlex.join([*arguments(layout, settings), *cache])}"])
