"""Plan a training run: which parallel layouts fit on how many GPUs, how fast each should be, and the flags to paste."""

from __future__ import annotations

import argparse
import dataclasses
import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from megatron_slim.aliases import JsonObject
from megatron_slim.cli.pruning_run import PhaseAction
from megatron_slim.cli.tool import run_command
from megatron_slim.command_line import RECIPE_HELP, positive
from megatron_slim.distillation.loss_options import KD_LOSSES
from megatron_slim.errors import SlimError
from megatron_slim.optimizers import OPTIMIZERS
from megatron_slim.planning import report, report_parts
from megatron_slim.planning.flags import CACHE_FLAG
from megatron_slim.planning.hardware import GPUS, parse_assumptions
from megatron_slim.planning.layouts import RECOMPUTE, Settings, Wanted
from megatron_slim.planning.memory import rank_counts, rank_memory, static_of_head
from megatron_slim.planning.search import TOO_LARGE, Candidate, Found, Job, Rejected, Search, why_too_large
from megatron_slim.planning.sources import Asked, Models, find_models
from megatron_slim.planning.storage import FULL, STORAGES
from megatron_slim.planning.subsets import subsets
from megatron_slim.recipe_budget import whole_number
from megatron_slim.reporting import progress
from megatron_slim.training.train_only import TRAIN_ONLY, train_only

logger = logging.getLogger(__name__)

TOKENS = "400B"  # SlimQwen section 3.2
SCRIPT = Settings()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the tool."""
    models = parser.add_argument_group("models")
    student = models.add_mutually_exclusive_group(required=True)
    student.add_argument("--recipe", type=Path, metavar="RECIPE", help=RECIPE_HELP)
    student.add_argument("--plan", type=Path, metavar="FILE", help="plan.json of a pruning, for both models")
    student.add_argument("--hf-config", type=Path, metavar="DIR", help="directory of the student's config.json")
    what = "phase of a recipe with phases, from 1"
    models.add_argument("--phase", "--stage", type=positive, metavar="K", action=PhaseAction, help=what)
    models.add_argument("--teacher-config", type=Path, metavar="DIR", help="directory of the teacher's config.json")
    models.add_argument(
        CACHE_FLAG,
        type=Path,
        nargs="?",
        const=Path(),
        metavar="DIR",
        help="the teacher's hidden states come from a cache, and of its weights those of its output layer alone are in "
        "memory; DIR has its config.json: the cache, or the teacher (default: that of the recipe or plan)",
    )
    models.add_argument("--no-teacher", action="store_true", help="plan training without a teacher")
    models.add_argument("--without-mtp", action="store_true", help="leave the student's MTP block out, as in training")
    models.add_argument(
        "--teacher-without-mtp", action="store_true", help="the same for the teacher, or the source of a recipe"
    )

    hardware = parser.add_argument_group("hardware")
    hardware.add_argument("--gpus", type=positive, required=True, metavar="N", help="number of GPUs")
    hardware.add_argument("--gpu-type", choices=sorted(GPUS), default="h100", help="type of GPU")
    hardware.add_argument("--gpus-per-node", type=positive, metavar="N", help="GPUs that NVLink connects (default: 8)")
    hardware.add_argument(
        "--assume",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME=VALUE",
        help="replace an assumption, such as gemm=0.5; docs/planning.md lists them",
    )

    run = parser.add_argument_group("the run")
    run.add_argument(
        "--tokens", metavar="T", help=f"training tokens, such as 4e10 (default: the phase's, else {TOKENS})"
    )
    run.add_argument(
        "--seq-length", type=positive, metavar="S", help=f"tokens of a sample (default: {SCRIPT.seq_length})"
    )
    run.add_argument(
        "--global-batch-size", type=positive, default=SCRIPT.global_batch, metavar="N", help="samples per step"
    )
    run.add_argument("--precision", choices=("bf16", "fp32"), default=SCRIPT.precision, help="type of the weights")
    run.add_argument("--optimizer", choices=tuple(OPTIMIZERS), default=SCRIPT.optimizer, help="optimizer")
    run.add_argument(TRAIN_ONLY, type=train_only, metavar="PART,...", help="parts that are trained (default: all)")
    run.add_argument(
        "--optimizer-states",
        choices=tuple(STORAGES),
        help="where and how the optimizer has its states: "
        + "; ".join(f"{each.name}: {each.about}" for each in STORAGES.values())
        + f" (default: {FULL}, and where not all can be trained, each)",
    )
    run.add_argument("--kd-loss", choices=KD_LOSSES, default=SCRIPT.kd_loss, help="distillation loss")
    run.add_argument(
        "--loss-chunk-size", type=positive, default=SCRIPT.loss_chunk, metavar="N", help="tokens per chunk of logits"
    )

    search = parser.add_argument_group(
        "layouts to try", "each takes several values; default: powers of two, and the least recomputation that fits"
    )
    for flag, what in (
        ("--tp", "tensor parallel sizes"),
        ("--pp", "pipeline parallel sizes"),
        ("--vpp", "virtual stages of a pipeline rank"),
        ("--ep", "expert parallel sizes"),
        ("--micro-batch-size", "samples of a forward pass"),
    ):
        search.add_argument(flag, type=positive, nargs="+", action="extend", default=[], metavar="N", help=what)
    kinds, what = tuple(RECOMPUTE), "what is recomputed"
    search.add_argument("--recompute", choices=kinds, nargs="+", action="extend", default=[], help=what)

    parser.add_argument("--top", type=positive, default=10, metavar="N", help="number of layouts to show")
    parser.add_argument(
        "--build", type=int, default=1, metavar="N", help="how many of these to check by building modules"
    )


def run_plan(args: argparse.Namespace) -> JsonObject:
    """Plan, print unless ``--json`` is given, and return everything.

    Raises:
        SlimError: nothing fits, or what is asked for makes no sense.
    """
    if args.build < 0:
        raise SlimError(f"--build {args.build} is negative")
    models, job, tokens, notes = _job(args)
    wanted = Wanted(args.tp, args.pp, args.vpp, args.ep, args.micro_batch_size, args.recompute)
    found = Search(job).run(wanted, lambda layouts: progress(list(layouts), "layouts"))
    built = _build(found, job, min(args.build, args.top))
    if not found.ranked:
        return _some(args, found, job, tokens, wanted, notes)
    if not args.json:
        from rich.console import Console

        report.show_plan(Console(highlight=False), found, job, tokens, args.top, built, notes, models.source)
    entries = [
        report.candidate_entry(each, job, tokens, built=each.layout.name in built) for each in found.ranked[: args.top]
    ]
    return {
        **report.asked_entry(job, tokens),
        "settings": {key: value for key, value in dataclasses.asdict(job.settings).items() if key != "kernels"},
        "assumed": dataclasses.asdict(job.assumed),
        "notes": list(notes),
        "fit": len(found.ranked),
        "ranked": entries,
        "rejected": report.rejected_entry(found),
        "build_seconds": built,
        "preparation": report.preparation_entry(models.source, job) if models.source is not None else None,
    }


def _some(
    args: argparse.Namespace, found: Found, job: Job, tokens: int, wanted: Wanted, notes: list[str]
) -> JsonObject:
    """What can be trained where not all can, printed unless ``--json`` is given.

    Raises:
        SlimError: nothing can; or parts were asked for, or so many GPUs that it is not for want of them.
    """
    if args.train_only or found.nearest is None or job.gpus > job.gpu.per_node:
        raise _nothing(found, job)
    storages = (args.optimizer_states,) if args.optimizer_states else ()
    if not (parts := subsets(job, wanted, storages, lambda names: progress(list(names), "parts that fit"))):
        raise _nothing(found, job)
    if not args.json:
        from rich.console import Console

        report_parts.show(Console(highlight=False), parts[: args.top], found, job, tokens, notes)
    return {
        **report.asked_entry(job, tokens),
        "notes": list(notes),
        "fit": 0,
        "ranked": [],
        "rejected": report.rejected_entry(found),
        "missing_bytes": found.nearest.needed - job.gpu.memory,
        "parts": [report_parts.entry(each, tokens) for each in parts[: args.top]],
    }


def _job(args: argparse.Namespace) -> tuple[Models, Job, int, list[str]]:
    gpu, notes = GPUS[args.gpu_type], list[str]()
    if args.gpus_per_node is not None:
        gpu = replace(gpu, per_node=args.gpus_per_node)
    if args.gpus > gpu.per_node and args.gpus % gpu.per_node:
        fix = "give a multiple, or --gpus-per-node"
        raise SlimError(f"--gpus {args.gpus} is not a multiple of {gpu.per_node} GPUs per node", fix=fix)
    assumed = parse_assumptions(args.assume)
    if args.tokens is not None and whole_number(args.tokens) is None:
        raise SlimError(f"--tokens {args.tokens!r} is not a number of tokens (such as 40B, 2.5e9, 1000)")
    cache = args.teacher_cache
    if cache is not None and (args.no_teacher or args.teacher_config is not None):
        other = "--no-teacher" if args.no_teacher else "--teacher-config"
        raise SlimError(f"{CACHE_FLAG} and {other} both say what the teacher is", fix="leave one out")
    asked = Asked(
        args.recipe,
        args.phase,
        args.plan,
        args.hf_config,
        args.teacher_config if cache in (None, Path()) else cache,
        args.no_teacher,
        args.without_mtp,
        args.teacher_without_mtp,
    )
    models = find_models(asked)
    notes += models.notes
    tokens = whole_number(args.tokens or "") or models.tokens or whole_number(TOKENS)
    assert tokens is not None
    shapes = [each for each in (models.student, models.teacher) if each is not None]
    longest = min(each.max_position_embeddings for each in shapes)
    if args.seq_length is None and longest < SCRIPT.seq_length:
        notes.append(f"samples of {longest} tokens, as many as the model has positions")
    settings = Settings(
        seq_length=args.seq_length or min(SCRIPT.seq_length, longest),
        global_batch=args.global_batch_size,
        precision=args.precision,
        kd_loss=args.kd_loss,
        loss_chunk=args.loss_chunk_size,
        optimizer=args.optimizer,
        progressive=models.progressive and args.tokens is None,
        without_mtp=args.without_mtp,
        teacher_without_mtp=args.teacher_without_mtp and models.teacher is not None,
        train_only=args.train_only or "",
        states=args.optimizer_states or FULL,
        teacher_head_only=cache is not None,
    )
    if wrong := settings.violations(models.student):
        raise SlimError("; ".join(wrong))
    return models, Job(models.student, models.teacher, settings, args.gpus, gpu, assumed), tokens, notes


def _build(found: Found, job: Job, count: int) -> dict[str, float]:
    """Put the static memory of the modules themselves in place of the table's, for the best layouts.

    Returns:
        Seconds that building took, by the layout's name.
    """
    if not count or not found.ranked:
        return {}
    from megatron_slim.planning.build import Request, build_ranks, prepare

    logger.info(f"building the modules of {'the best layout' if count == 1 else f'the best {count} layouts'}")
    prepare()
    seconds: dict[str, float] = {}
    position = 0
    while position < min(count, len(found.ranked)):
        candidate = found.ranked[position]
        layout, stages = candidate.layout, candidate.stages
        started = time.monotonic()
        teacher = None if job.settings.teacher_head_only else job.teacher
        ranks = build_ranks(Request(job.student, teacher, layout, stages, job.settings))
        seconds[layout.name] = time.monotonic() - started
        counted = [rank_counts(job.student, stages.student_layers, layout)]
        counted += [rank_counts(teacher, stages.teacher_layers, layout)]
        for rank, own, theirs in zip(ranks, *counted, strict=True):
            assert (rank.student.total, rank.teacher.total) == (own.total, theirs.total), (
                "the table and the modules differ"
            )
        heads = static_of_head(job.teacher, layout, job.settings)
        static = [
            replace(rank.memory, teacher=rank.memory.teacher + head) for rank, head in zip(ranks, heads, strict=True)
        ]
        memory = rank_memory(job.student, job.teacher, layout, stages, job.settings, job.assumed, static)
        if max(each.total for each in memory) > job.gpu.memory:  # by the padding of its buffers
            worst = max(each.total for each in memory)
            found.rejected.append(Rejected(layout, why_too_large(memory), TOO_LARGE, worst))
            del found.ranked[position]
            continue
        found.ranked[position] = Candidate(layout, stages, memory, candidate.step)
        position += 1
    return seconds


def _nothing(found: Found, job: Job) -> SlimError:
    """Why nothing fits, with what comes nearest."""
    where = f"{job.gpus} x {job.gpu.name} of {job.gpu.memory / 1e9:.0f} GB"
    nearest = found.nearest
    if nearest is not None:
        over = (nearest.needed - job.gpu.memory) / 1e9
        fix = "take more or larger GPUs, shorter samples, or try other sizes (--tp, --pp, --ep)"
        if job.teacher is not None and not job.settings.teacher_head_only:
            fix += f"; {CACHE_FLAG} leaves the teacher's layers out of memory"
        miss = f"the nearest miss is {nearest.layout.name}, {over:.1f} GB too much: {nearest.why}"
        return SlimError(f"no layout fits on {where}; {miss}", fix=fix)
    reasons = [f"{reason} ({count})" for reason, count in found.reasons()[:3]]
    return SlimError(f"no layout is allowed on {where}: {'; '.join(reasons)}", fix="try other sizes")


def main(argv: Sequence[str], prog: str) -> None:
    """Run the command."""
    run_command(__doc__ or "", add_arguments, run_plan, argv, prog)
