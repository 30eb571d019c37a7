"""The measurements of benchmarks/one_shot.py, and their table."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from functools import partial
from typing import Any, cast

from benchmarks.one_shot_variants import Variant, variants
from megatron_slim.aliases import ReadOptions
from megatron_slim.architecture.table import count_parameters
from megatron_slim.checkpoint.convert import Checkpoint, open_checkpoint
from megatron_slim.cli.terminal import say
from megatron_slim.data import Tokens
from megatron_slim.errors import SlimError
from megatron_slim.evaluation.perplexity import evaluate
from megatron_slim.evaluation.samples import read_evaluation_data
from megatron_slim.pruning.apply import PrunedCheckpoint
from megatron_slim.pruning.candidates import MOST_SAMPLES
from megatron_slim.pruning.plan import Plan, make_plan
from megatron_slim.pruning.recipe_checks import check_recipe
from megatron_slim.pruning.sensitivity import expert_sensitivity
from megatron_slim.pruning.statistics import Statistics
from megatron_slim.recipe import load_recipe
from megatron_slim.streaming.fingerprint import fingerprint
from megatron_slim.streaming.model_input import Samples, read_calibration_samples
from megatron_slim.streaming.samples import SEQ_LENGTH

FORWARD_TOKENS = 4096  # in one forward pass, unless --micro-batch-size says how many samples


def measure(args: argparse.Namespace, reading: ReadOptions) -> dict[str, Any]:
    """Losses of the source and of every variant; ``reading`` goes to `open_checkpoint`.

    Raises:
        SlimError: an invalid input; all of them are looked at before anything is measured.
    """
    recipe, source = load_recipe(args.recipe), open_checkpoint(args.load, **reading)
    chosen = [variant for variant in variants(recipe) if variant.axis in args.only]
    if args.stats is not None:
        measured = [variant for variant in chosen if variant.recipe.experts.allocation == "loss"]
        chosen = [variant for variant in chosen if variant not in measured]
        if measured:
            say(f"{len(measured)} variants allocate experts by loss, which needs --calibration-data: left out")
    if not chosen:
        raise SlimError(f"prunes nothing of {', '.join(args.only)}", where=str(args.recipe), fix="name other axes")
    for variant in chosen:
        check_recipe(variant.recipe, source.shape, where=f"{args.recipe}: {variant.axis}")
    validation = _validation(args, source)
    samples = None if args.stats is not None else _samples(args, source)
    stats = _statistics(args, source, samples)
    sensitivity = None if samples is None else partial(expert_sensitivity, source, samples=samples.first(MOST_SAMPLES))
    plans = [make_plan(variant.recipe, stats, source.shape, sensitivity=sensitivity) for variant in chosen]
    return {
        "load": str(args.load),
        "recipe": recipe.to_dict(),
        "stats_sha256": stats.sha256,
        "calibration": dict(stats.metadata),
        "validation_samples": validation.shape[0],
        "seq_length": validation.shape[1],
        **_evaluate_all(args, source, validation, chosen, plans),
    }


def _validation(args: argparse.Namespace, source: Checkpoint) -> Tokens:
    length = args.seq_length
    if length is None and args.validation_data.suffix != ".npy":
        length = min(SEQ_LENGTH, source.shape.max_position_embeddings)
    return read_evaluation_data(
        args.validation_data, source.shape, seq_length=length, num_samples=args.validation_samples, seed=args.seed
    )


def _statistics(args: argparse.Namespace, source: Checkpoint, samples: Samples | None) -> Statistics:
    """Read or, once for all variants, measured."""
    if samples is None:
        stats = Statistics.load(args.stats)
        stats.check(source.shape, fingerprint(source), where=str(args.stats))
        return stats
    import megatron_slim.mcore

    from megatron_slim.pruning.calibrate import calibrate

    say(f"calibrating on {samples.read.shape[0]} samples of {samples.read.shape[1]} tokens")
    return calibrate(source, samples, micro_batch_size=args.micro_batch_size)


def _samples(args: argparse.Namespace, source: Checkpoint) -> Samples:
    """Of calibration."""
    return read_calibration_samples(
        args.calibration_data,
        source.shape,
        num_samples=args.num_samples,
        seq_length=args.seq_length,
        seed=args.seed,
    )


def _evaluate_all(
    args: argparse.Namespace,
    source: Checkpoint,
    validation: Tokens,
    chosen: Sequence[Variant],
    plans: Sequence[Plan],
) -> dict[str, Any]:
    """The source first; each line of progress says how long those that are left will take at the same pace."""
    batch, started, total = _batch(args, validation), time.monotonic(), 1 + len(chosen)
    baseline = _row("source", "", source, validation, batch)
    _tell(1, total, baseline, baseline, started)
    rows = []
    for variant, plan in zip(chosen, plans, strict=True):
        # Evaluation reads sizes and tensors, which a pruned checkpoint gives without being on disk.
        pruned = cast(Checkpoint, PrunedCheckpoint(plan, source, check_source=False))
        row = _row(variant.axis, variant.name, pruned, validation, batch) | {"plan_sha256": plan.sha256}
        rows.append(row | {"recipe": variant.recipe.to_dict()})
        _tell(1 + len(rows), total, row, baseline, started)
    return {"source": baseline, "variants": rows, "seconds": time.monotonic() - started}


def _batch(args: argparse.Namespace, validation: Tokens) -> int:
    given: int | None = args.micro_batch_size
    return given or max(1, FORWARD_TOKENS // validation.shape[1])


def _row(axis: str, name: str, checkpoint: Checkpoint, validation: Tokens, batch: int) -> dict[str, Any]:
    result = evaluate(checkpoint, validation, micro_batch_size=batch)
    return {
        "axis": axis,
        "variant": name,
        "parameters": count_parameters(checkpoint.shape).total,
        "loss": result.loss,
        "perplexity": result.perplexity,
        "mtp_loss": list(result.mtp_loss),
    }


def _tell(done: int, total: int, row: dict[str, Any], baseline: dict[str, Any], started: float) -> None:
    spent = time.monotonic() - started
    cost = f" ({row['loss'] - baseline['loss']:+.4f})" if row is not baseline else ""
    left = f", about {spent / done * (total - done):.0f} s left" if done < total else ""
    say(
        f"[{done}/{total}] {row['axis']} {row['variant']}".strip()
        + f": loss {row['loss']:.4f}{cost}, {spent:.0f} s{left}"
    )


def markdown(results: dict[str, Any]) -> str:
    """The results as a table; costs are what was added to the source's losses, in nats per token."""
    source = results["source"]
    mtp = bool(source["mtp_loss"])
    heads = ["axis", "variant", "parameters", "left", "loss", "cost", "perplexity", *(["MTP loss", "MTP cost"] * mtp)]
    lines = [
        f"One-shot pruning, no training after it: {results['validation_samples']} validation samples of "
        f"{results['seq_length']} tokens.",
        "",
        f"| {' | '.join(heads)} |",
        f"|---|---|{'---:|' * (len(heads) - 2)}",
    ]
    lines += [f"| {' | '.join(_cells(row, source))} |" for row in (source, *results["variants"])]
    return "\n".join(lines) + "\n"


def _cells(row: dict[str, Any], source: dict[str, Any]) -> list[str]:
    first = row is source
    cells = [row["axis"], row["variant"], f"{row['parameters']:,}", f"{row['parameters'] / source['parameters']:.1%}"]
    cells += [f"{row['loss']:.4f}", "" if first else f"{row['loss'] - source['loss']:+.4f}", f"{row['perplexity']:.2f}"]
    for loss, before in zip(row["mtp_loss"], source["mtp_loss"], strict=True):
        cells += [f"{loss:.4f}", "" if first else f"{loss - before:+.4f}"]
    return cells
