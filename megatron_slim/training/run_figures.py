"""Metrics of a run, computed from what its ranks have measured over a logging interval (no torch).

Times and rates are means over the interval; losses and experts are of its last iteration. Tags are those of
tensorboard; docs/training.md says what each of them means.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from megatron_slim.distillation.terms import LOSS_TERMS, weights_of
from megatron_slim.reporting import duration

Floats = NDArray[np.float64]
Figures = dict[str, float]

# What a stage computes. The student's forward pass is what of a stage's is neither the teacher's nor the losses', which
# are the output layers of both models, the loss terms and their gradients (`distillation/fused.py`).
STUDENT, TEACHER, LOSSES, BACKWARD = KINDS = ("student forward", "teacher forward", "losses", "backward")


@dataclass(frozen=True)
class RunConstants:
    """What stays the same over a run.

    Attributes:
        ranks: processes, one per GPU.
        pipeline: pipeline stages, each of ``chunks`` virtual ones.
        chunks: virtual stages of a rank.
        layers: decoder layers of the student, before the MTP blocks in what is counted per layer.
        seq_length: tokens of a sample.
        iterations: number of the run's last.
        flops: operations per token of a training step by model, ``student`` and ``teacher``, without recomputation.
        peaks: operations per second of a GPU by model; without an entry there is no utilisation.
        phase: the phase of a progressive schedule that the run is, in words.
        phase_tokens: its tokens, where a recipe gives them.
        start: iterations of the phases before it, where they are counted on.
        tokens_before: their tokens.
        budgets: names of the sizes that are trained, each of which has rows of its own in what is counted per layer.
    """

    ranks: int
    pipeline: int
    chunks: int
    layers: int
    seq_length: int
    iterations: int
    flops: Mapping[str, float]
    peaks: Mapping[str, float] = field(default_factory=dict)
    phase: str = ""
    phase_tokens: int | None = None
    start: int = 0
    tokens_before: int = 0
    budgets: tuple[str, ...] = ("",)


@dataclass(frozen=True)
class Interval:
    """What all ranks measured over the iterations since the last log.

    Attributes:
        iterations: how many.
        samples: of the global batches.
        seconds: without validation and saving.
        pipeline_rank: of every rank, [ranks].
        peak_bytes: of every rank's memory, [ranks].
        computing: seconds of every rank, [ranks, chunks, kinds].
        losses: of the last iteration: sum, number of tokens and sum times weight of every term, [terms, 3].
        tokens_per_expert: likewise, [layers and MTP blocks of all budgets, experts]; NaN where a layer has no such
            expert.
        weights: likewise, of the losses, those at work by `LossWeight.key`.
        work: operations of the student relative to those that ``RunConstants.flops`` says, mean over the iterations.
    """

    iterations: int
    samples: int
    seconds: float
    pipeline_rank: Floats
    peak_bytes: Floats
    computing: Floats
    losses: Floats
    tokens_per_expert: Floats
    weights: Mapping[str, float] = field(default_factory=dict)
    work: float = 1.0


@dataclass(frozen=True)
class Progress:
    """How far a run is.

    Attributes:
        iteration: that has just been done.
        samples: of all iterations so far, those of earlier starts too.
        elapsed: seconds since this process began to train.
        per_iteration: seconds of an iteration since then, validation and saving included; None while there is only one.
    """

    iteration: int
    samples: int
    elapsed: float
    per_iteration: float | None

    def remaining(self, iterations: int) -> float | None:
        """Seconds until all ``iterations`` are done."""
        return None if self.per_iteration is None else (iterations - self.iteration) * self.per_iteration


def throughput(run: RunConstants, interval: Interval) -> Figures:
    """Tokens and operations per second and GPU; of the peak, the part that each model uses (MFU, arXiv 2204.02311)."""
    rate = interval.samples * run.seq_length / interval.seconds / run.ranks
    found = {
        "throughput/tokens_per_second_per_gpu": rate,
        "throughput/seconds_per_iteration": interval.seconds / interval.iterations,
    }
    for model, of_one in run.flops.items():
        flops = of_one * (interval.work if model == "student" else 1.0)
        found[f"throughput/{model}_tflops_per_gpu"] = rate * flops / 1e12
        if model in run.peaks:
            found[f"mfu/{model}"] = rate * flops / run.peaks[model]
    if run.peaks:
        found["mfu/total"] = sum(value for tag, value in found.items() if tag.startswith("mfu/"))
    return found


def _of_stage(interval: Interval, rank: int) -> NDArray[np.intp]:
    """Which processes a pipeline rank consists of: every tensor and data parallel one has a part of it."""
    return np.flatnonzero(interval.pipeline_rank == rank)


def stages(run: RunConstants, interval: Interval) -> Figures:
    """Seconds per iteration that a stage computes (mean over its ranks), and how even the pipeline is."""
    found: Figures = {}
    loads = []
    for rank in range(run.pipeline):
        computing = interval.computing[_of_stage(interval, rank)] / interval.iterations
        loads.append(computing.sum(axis=(1, 2)).mean())
        for chunk in range(run.chunks):
            stage = f"stage_{chunk * run.pipeline + rank + 1}"
            for kind, seconds in zip(KINDS, computing[:, chunk].mean(axis=0), strict=True):
                if seconds or kind == BACKWARD:
                    found[f"stage_seconds/{kind.replace(' ', '_')}/{stage}"] = float(seconds)
            found[f"stage_seconds/total/{stage}"] = float(computing[:, chunk].sum(axis=1).mean())
    found["pipeline/slowest_over_mean"] = float(max(loads) / np.mean(loads))
    found["pipeline/slowest_rank"] = 1.0 + int(np.argmax(loads))
    found["pipeline/computing"] = float(np.mean(loads)) * interval.iterations / interval.seconds
    slowest = interval.computing.sum(axis=(1, 2)).max() / interval.iterations
    found["pipeline/slowest_process_over_mean"] = float(slowest / np.mean(loads))
    return found


def memory(run: RunConstants, interval: Interval) -> Figures:
    """Peak memory of the rank of each pipeline stage that has the most, in GB."""
    return {
        f"memory_gb/pipeline_rank_{rank + 1}": float(interval.peak_bytes[_of_stage(interval, rank)].max()) / 1e9
        for rank in range(run.pipeline)
    }


def layer_name(run: RunConstants, layer: int) -> str:
    """A layer's name in tags, counted from 1; MTP blocks apart."""
    return f"layer_{layer + 1:02d}" if layer < run.layers else f"mtp_{layer - run.layers + 1}"


def experts(run: RunConstants, interval: Interval) -> Figures:
    """Of every layer with experts: tokens of the busiest over the mean, and the fraction of them without a token.

    Of several budgets those that the iteration has trained, each under its name.
    """
    found: Figures = {}
    for name, rows in zip(run.budgets, np.split(interval.tokens_per_expert, len(run.budgets)), strict=True):
        if not name or np.nansum(rows):
            found |= {f"{name and f'{name}/'}{tag}": value for tag, value in _experts_of(run, rows).items()}
    return found


def _experts_of(run: RunConstants, rows: Floats) -> Figures:
    found: Figures = {}
    by_layer = {layer: row[~np.isnan(row)] for layer, row in enumerate(rows)}
    by_layer = {layer: counts for layer, counts in by_layer.items() if counts.size}
    uneven = {layer: float(counts.max() / max(counts.mean(), 1e-300)) for layer, counts in by_layer.items()}
    idle = {layer: float((counts == 0).mean()) for layer, counts in by_layer.items()}
    for layer in by_layer:
        found[f"experts/max_over_mean/{layer_name(run, layer)}"] = uneven[layer]
        found[f"experts/without_tokens/{layer_name(run, layer)}"] = idle[layer]
    found["experts/max_over_mean"] = float(np.mean([*uneven.values()]))
    found["experts/without_tokens"] = float(np.mean([*idle.values()]))
    return found


def losses(interval: Interval) -> Figures:
    """KD over LM, what each term contributes to the loss, and the weights."""
    means, shares = {}, {}
    for (key, term), (total, count, weighted) in zip(LOSS_TERMS.items(), interval.losses, strict=True):
        if count > 0:
            means[key] = float(total / count)
            if term.weight is not None:
                shares[key] = float(weighted / count)
    whole = sum(shares.values())
    found = {f"loss/share_{key}": share / whole for key, share in shares.items() if whole > 0}
    found |= {f"loss/{key}": value for key, value in interval.weights.items()}
    for kd, lm in (("kd", "lm"), ("mtp_kd", "mtp_lm")):
        if kd in means and means[lm] > 0:
            found[f"loss/{kd}_over_{lm}"] = means[kd] / means[lm]
    return found


def progress(run: RunConstants, done: Progress) -> Figures:
    """Part of the run, tokens, elapsed and remaining time."""
    tokens = done.samples * run.seq_length
    fraction = (done.iteration - run.start) / (run.iterations - run.start)
    found = {"progress/fraction": fraction, "progress/tokens": float(tokens)}
    found["progress/elapsed_seconds"] = done.elapsed
    remaining = done.remaining(run.iterations)
    if remaining is not None:
        found["progress/remaining_seconds"] = remaining
    if run.phase_tokens:
        found["progress/fraction_of_stage_tokens"] = (tokens - run.tokens_before) / run.phase_tokens
    return found


def figures(run: RunConstants, interval: Interval, done: Progress) -> Figures:
    """All of it, by tag."""
    found = throughput(run, interval) | stages(run, interval) | memory(run, interval) | experts(run, interval)
    return {f"slim/{tag}": value for tag, value in (found | losses(interval) | progress(run, done)).items()}


def amount(number: float) -> str:
    """A number with a unit of thousands.

    >>> amount(1_234), amount(4.0e10)
    ('1.23K', '40.0B')
    """
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if number >= size:
            return f"{number / size:#.3g}".rstrip(".") + unit
    return f"{number:.4g}"


def line(run: RunConstants, found: Mapping[str, float], done: Progress) -> str:
    """The figures that a person looks at, on one line."""
    return " | ".join(_parts(run, {tag.removeprefix("slim/"): value for tag, value in found.items()}, done))


def _parts(run: RunConstants, found: Mapping[str, float], done: Progress) -> Iterator[str]:
    tokens = amount(done.samples * run.seq_length - run.tokens_before)
    of = "" if run.phase_tokens is None else f" of {amount(run.phase_tokens)}"
    name = f" ({run.phase})" if run.phase else ""
    yield f"slim {done.iteration}/{run.iterations} ({found['progress/fraction']:.1%}){name}"
    yield f"{tokens}{of} tokens, {amount(found['throughput/tokens_per_second_per_gpu'])} tokens/s/GPU"
    if run.peaks:
        used = " + ".join(f"{model} {found[f'mfu/{model}']:.1%}" for model in run.flops if model in run.peaks)
        yield f"MFU {used}"
    else:
        rates = (f"{model} {found[f'throughput/{model}_tflops_per_gpu']:.3g}" for model in run.flops)
        yield f"TFLOP/s/GPU {' + '.join(rates)}"
    if run.pipeline > 1:
        slowest = f"{found['pipeline/slowest_over_mean']:.2f} (rank {found['pipeline/slowest_rank']:.0f})"
        yield f"stages: slowest/mean {slowest}, computing {found['pipeline/computing']:.0%}"
    largest = max(range(1, run.pipeline + 1), key=lambda rank: found[f"memory_gb/pipeline_rank_{rank}"])
    where = f" (stage {largest})" if run.pipeline > 1 else ""
    yield f"memory {found[f'memory_gb/pipeline_rank_{largest}']:.3g} GB{where}"
    layers = {tag: value for tag, value in found.items() if "experts/max_over_mean/" in tag}
    worst = max(layers, key=lambda tag: layers[tag])
    place = worst.replace("experts/max_over_mean/", "").replace("/", " ").replace("layer_", "layer ")
    idle = np.mean([value for tag, value in found.items() if tag.endswith("experts/without_tokens")])
    yield f"experts: max/mean {layers[worst]:.2f} ({place.replace('mtp_', 'mtp ')}), {idle:.1%} without tokens"
    shares = {name: value for name, value in found.items() if name.startswith("loss/share_")}
    if len(shares) > 1:
        ratio = f"KD/LM {found['loss/kd_over_lm']:.3f}, " if "loss/kd_over_lm" in found else ""
        text = ", ".join(f"{name.removeprefix('loss/share_')} {value:.0%}" for name, value in shares.items())
        yield f"{ratio}of the loss {text}"
    weights = [weight.key for weight in weights_of(LOSS_TERMS.values()) if f"loss/{weight.key}" in found]
    if text := ", ".join(f"{name} {found[f'loss/{name}']:#.3g}" for name in weights):
        yield text
    remaining = done.remaining(run.iterations)
    yield f"elapsed {duration(done.elapsed)}, left {'?' if remaining is None else duration(remaining)}"
