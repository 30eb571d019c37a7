"""The runs of `moments`: two phases for every seed, the second once for every way to begin it."""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.processes import ROOT, free_port, python, run
from benchmarks.report import machine
from megatron_slim.distillation.terms import LOSS_TERMS
from megatron_slim.recipe_run import MOMENT_RULES

SCRIPT = ROOT / "examples" / "slimqwen" / "pretrain_distill.sh"
BATCH, EVERY = 8, 10  # samples of a step, steps between validations
PHASES = [
    {"target": {"num_layers": 6}},
    {"target": {"hidden_size": 144, "num_moe_experts": 8, "moe_router_topk": 3}},
]
LOSS = f"{LOSS_TERMS['lm'].name} validation"


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Train everything; losses by variant, number of steps and seed."""
    started, found = time.monotonic(), dict[str, list[dict[int, float]]]()
    args.dir.mkdir()
    recipe = _recipe(args)
    _prune(args, args.teacher, recipe, 1, args.dir / "student_1")
    for seed in range(1, args.seeds + 1):
        work = args.dir / f"seed_{seed}"
        work.mkdir()
        _train(args, args.dir / "student_1", work / "phase_1", seed)
        for rule in MOMENT_RULES:  # the second with the statistics of the first
            _prune(args, work / "phase_1", recipe, 2, work / rule, rule=rule, stats=work / MOMENT_RULES[0])
        for variant, (rule, settings) in _variants(args).items():
            losses = _train(args, work / rule, work / variant.replace(" ", "_"), seed, **settings)
            found.setdefault(variant, []).append({step: losses[args.steps_before + step] for step in args.after})
    return {
        "losses": {
            variant: [{str(k): loss for k, loss in each.items()} for each in of] for variant, of in found.items()
        },
        "after": args.after,
        "seeds": args.seeds,
        "steps_before": args.steps_before,
        "adam_beta2": args.adam_beta2,
        "seconds": round(time.monotonic() - started),
        "machine": machine(args.dir),
    }


def _variants(args: argparse.Namespace) -> dict[str, tuple[str, dict[str, object]]]:
    """Ways to begin phase 2: which checkpoint, and settings of the script. All have the same weights."""
    carried = {f"carried, {rule}": (rule, {"CARRY_OPTIMIZER": 1}) for rule in MOMENT_RULES}
    return {"new": (MOMENT_RULES[0], {}), "new, warm-up": (MOMENT_RULES[0], {"STAGE_WARMUP": args.warmup}), **carried}


def _recipe(args: argparse.Namespace) -> Path:
    """The recipe with the tokens of both phases."""
    import yaml

    phases = yaml.safe_load(args.recipe.read_text())["phases"] if args.recipe else PHASES
    tokens = [steps * BATCH * args.seq_length for steps in (args.steps_before, args.steps)]
    document = {"version": 1, "phases": [{**phase, "tokens": n} for phase, n in zip(phases, tokens, strict=True)]}
    file: Path = args.dir / "recipe.yaml"
    file.write_text(yaml.safe_dump(document))
    return file


def _prune(
    args: argparse.Namespace,
    load: Path,
    recipe: Path,
    phase: int,
    save: Path,
    *,
    rule: str | None = None,
    stats: Path | None = None,
) -> None:
    command = python(
        "-m", "megatron_slim", "prune", "--load", load, "--recipe", recipe, "--phase", phase, "--save", save
    )
    if stats is not None and stats.exists():
        command += ["--stats", str(stats)]
    else:
        data = ("--calibration-data", args.data, "--num-samples", 64, "--seq-length", args.seq_length)
        command += map(str, data)
    if rule is not None:
        command += ["--carry-optimizer", "--moments-of-merged", rule]
    run([*command, "--to", "torch_dist"])


def _train(args: argparse.Namespace, student: Path, save: Path, seed: int, **settings: object) -> dict[int, float]:
    """Train a phase; validation loss by step."""
    variables: Mapping[str, object] = {
        "STUDENT": student,
        "SAVE": save,
        "DATA": args.data,
        "VALID_DATA": args.validation_data,
        "PROGRESSIVE": 1,
        "NPROC_PER_NODE": args.ranks,
        "MASTER_PORT": free_port(),
        "SEQ_LENGTH": args.seq_length,
        "MICRO_BATCH_SIZE": BATCH // args.ranks,
        "GLOBAL_BATCH_SIZE": BATCH,
        "LR": args.lr,
        "MIN_LR": float(args.lr) / 10,
        "LR_WARMUP_ITERS": args.steps_before // 5,
        "SAVE_INTERVAL": 10**6,
        "EVAL_INTERVAL": EVERY,
        "EVAL_ITERS": 8,
        "PRECISION": "fp32",
        "OMP_NUM_THREADS": 1,
        "PYTHON": python()[0],
        **settings,
    }
    words = [f"{name}={value}" for name, value in variables.items()]
    run(["env", *words, "bash", str(SCRIPT), "--seed", str(seed), "--adam-beta2", args.adam_beta2])
    return _validation(save / "tensorboard")


def _validation(directory: Path) -> dict[int, float]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(os.fspath(directory))
    events.Reload()
    found: dict[int, float] = {}
    for point in events.Scalars(LOSS):
        found.setdefault(point.step, float(point.value))  # Megatron's validation at the end is of other samples
    return found


def markdown(results: Mapping[str, Any]) -> str:
    """Means over the seeds, and of the difference to a new optimizer mean and standard deviation."""
    after = [str(step) for step in results["after"]]
    header = [f"loss after {step} | - new" for step in after]
    lines = [f"| optimizer | {' | '.join(header)} |", "|---|" + "---:|" * 2 * len(after)]
    new = results["losses"]["new"]
    for variant, losses in results["losses"].items():
        cells = []
        for step in after:
            gains = [each[step] - base[step] for each, base in zip(losses, new, strict=True)]
            spread = statistics.stdev(gains) if len(gains) > 1 else 0.0
            difference = "" if variant == "new" else f"{statistics.mean(gains):+.4f} ± {spread:.4f}"
            cells += [f"{statistics.mean(each[step] for each in losses):.4f}", difference]
        lines.append(f"| {variant} | {' | '.join(cells)} |")
    return "\n".join(lines)
