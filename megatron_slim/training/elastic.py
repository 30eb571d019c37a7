"""Which budgets of an elastic student a step trains, and what a run of several budgets cannot do."""

from __future__ import annotations

import itertools
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from megatron_slim.architecture.flops import student_flops
from megatron_slim.checkpoint.elastic_record import elastic_file
from megatron_slim.checkpoint.iterations import has_saved
from megatron_slim.checkpoint.torch_dist_names import HF_DIR
from megatron_slim.errors import SlimError
from megatron_slim.optimizers import ADAM, OPTIMIZERS
from megatron_slim.pruning.elastic import Elastic, ElasticBudget, read_elastic
from megatron_slim.training.slim_arguments import ELASTIC_FLAG, IN_TURN, TOGETHER
from megatron_slim.training.stage_layout import StageLayout, kernels_of, layout_string

# Left out, since settings for GPUs have them: gradients of the smaller budgets come when a step is done, and their
# weights are copied before it.
OVERLAP = ("--overlap-grad-reduce", "--overlap-param-gather", "--overlap-param-gather-with-optimizer-step")
# Flags that need what a smaller budget does not have.
_EXCLUDED = {
    "teacher_ahead": "the teacher computes for all budgets of a micro-batch at once already",
    "hidden_kd_layers": "projections are of one size",
    "fp8": "copies of weights in FP8 are of one size",
    "fp4": "copies of weights in FP4 are of one size",
    "enable_cuda_graph": "steps are not all alike",
    "external_cuda_graph": "steps are not all alike",
    "overlap_moe_expert_parallel_comm": "it runs layers of the largest budget alone",
    "rampup_batch_size": "budgets have their shares of iterations, which must have equally many tokens",
    "step_batch_size_schedule": "budgets have their shares of iterations, which must have equally many tokens",
}


@dataclass(frozen=True)
class ElasticRun:
    """Budgets of a student, and when each is trained; budgets are counted from 0, which is the student itself.

    Attributes:
        document: the student's ``elastic.json``.
        together: every step trains all of them, on every micro-batch.
        shares: otherwise, how many of the iterations are of each, relative to each other.
        late_shares: the same from iteration ``late_from`` on, counted from 0; None: there is no such change.
        late_from: that iteration.
        seed: of the order.
    """

    document: Elastic
    together: bool
    shares: tuple[int, ...]
    late_shares: tuple[int, ...] | None = None
    late_from: int = 0
    seed: int = 0

    @property
    def budgets(self) -> tuple[ElasticBudget, ...]:
        """From the largest."""
        return self.document.budgets

    @property
    def names(self) -> tuple[str, ...]:
        """Of all budgets."""
        return tuple(budget.name for budget in self.budgets)

    def of_iteration(self, iteration: int) -> tuple[int, ...]:
        """The budgets that an iteration, counted from 0, trains: a function of it and the seed alone.

        As many iterations as the shares add up to have each budget as often as its share says, in drawn order.
        """
        if self.together:
            return tuple(range(len(self.budgets)))
        late = self.late_shares is not None and iteration >= self.late_from
        shares, start = (self.late_shares or (), self.late_from) if late else (self.shares, 0)
        window, place = divmod(iteration - start, sum(shares))
        order = np.random.default_rng((self.seed, start, window)).permutation(np.repeat(range(len(shares)), shares))
        return (int(order[place]),)


@dataclass(frozen=True)
class Numbers:
    """Numbers of layers in what is recorded by layer, a run of them for each budget, from 1 as Megatron counts.

    Layers are those of the student itself, from 0, its MTP blocks last.
    """

    run: ElasticRun

    @property
    def trunk(self) -> int:
        """Layers of the student before its MTP blocks."""
        return self.run.budgets[0].plan.source_shape.num_layers

    @property
    def mtp(self) -> int:
        """Its MTP blocks."""
        return self.run.budgets[0].plan.source_shape.mtp_num_layers

    @property
    def total(self) -> int:
        """How many numbers there are."""
        return (self.trunk + self.mtp) * len(self.run.budgets)

    def of(self, budget: int, layer: int) -> int:
        """The number of a layer of a budget."""
        return budget * (self.trunk + self.mtp) + layer + 1

    def experts(self) -> list[int]:
        """Number of experts under every number, 0 where a budget has no such layer or a dense one."""
        found = [0] * self.total
        for budget, each in enumerate(self.run.budgets):
            shape, layers = each.plan.target_shape, [*each.plan.kept_layers, *range(self.trunk, self.trunk + self.mtp)]
            for layer, block in zip(layers, shape.blocks, strict=True):
                found[self.of(budget, layer) - 1] = shape.expert_counts.get(block, 0)
        return found

    def folded(self, values: Tensor, budgets: Sequence[int]) -> Tensor:
        """The mean over budgets of what was recorded under all numbers, by layer of the student.

        Megatron divides the sum of it by the layers of the student that have experts: a budget of fewer counts as many
        times more.

        Args:
            values: [total].
            budgets: which have recorded something.

        Returns:
            [layers].
        """
        counts = [len([*budget.plan.target_shape.routed_blocks]) for budget in self.run.budgets]
        rows = values.view(len(counts), -1)
        return sum(rows[budget] * (counts[0] / counts[budget]) for budget in budgets) / len(budgets)  # type: ignore[return-value]


def elastic_run(args: Namespace, source: Path) -> ElasticRun | None:
    """What the flags say about budgets; None where all training is of the student as it is.

    Args:
        args: Megatron's arguments and ours, as parsed.
        source: directory whose config.json describes the student.

    Raises:
        SlimError: the student's checkpoint has no budgets, or the shares are not of as many.
        PlanError: its document is damaged.
    """
    if args.elastic is None:
        return None
    if (document := budgets_of(source)) is None:
        fix = "prune by a recipe with budgets, or leave --elastic out"
        raise SlimError(f"{ELASTIC_FLAG}, but the student has no budgets", where=str(source), fix=fix)
    count, names = len(document.budgets), ", ".join(budget.name for budget in document.budgets)
    for key in ("elastic_shares", "elastic_late_shares"):
        if (shares := getattr(args, key)) is not None and len(shares) != count:
            what = f"--{key.replace('_', '-')} has {len(shares)} numbers for {count} budgets"
            raise SlimError(what, fix=f"give one for each of {names}")
    if args.without_mtp and document.shape.mtp_num_layers:
        document = document.without_mtp()
    return ElasticRun(
        document,
        together=args.elastic == TOGETHER,
        shares=args.elastic_shares or (1,) * count,
        late_shares=args.elastic_late_shares,
        late_from=args.elastic_late_from or 0,
        seed=args.seed,
    )


def check_kept_budgets(save: Path, elastic: ElasticRun | None) -> None:
    """See that checkpoints that a run adds to a directory have the budgets of those that are there.

    Raises:
        SlimError: they have others, or none.
    """
    if not (save / HF_DIR).is_dir() or not has_saved(save):
        return
    there, ours = budgets_of(save / HF_DIR), None if elastic is None else elastic.document
    another = "give another --save"
    if there is not None and ours is None:
        fix = f"give {ELASTIC_FLAG}, or another --save"
        raise SlimError("its checkpoints have budgets, which this run does not train", where=str(save), fix=fix)
    if there is None and ours is not None:
        raise SlimError("its checkpoints have no budgets, this run has some", where=str(save), fix=another)
    if there is not None and ours is not None and there.sha256 != ours.sha256:
        raise SlimError("its checkpoints have other budgets than this run", where=str(save), fix=another)


def without_overlap(words: Sequence[str]) -> list[str]:
    """A command line, of an elastic run without `OVERLAP`."""
    if not any(word.split("=")[0] == ELASTIC_FLAG for word in words):
        return list(words)
    return [word for word in words if word not in OVERLAP]


def elastic_note(given: Sequence[str], elastic: ElasticRun | None, source: Path) -> str | None:
    """What a run of this command line does with budgets that its flags do not say, if anything."""
    if elastic is None:
        if _file_of(source) is None:
            return None
        return (
            f"{source}: holds budgets, of which this run trains the largest alone: the smaller ones are then no longer "
            f"what they were, and its checkpoints have none; {ELASTIC_FLAG} trains all"
        )
    left_out = [word for word in OVERLAP if word in given]
    return f"{ELASTIC_FLAG}: without {', '.join(left_out)}" if left_out else None


def budgets_of(source: Path) -> Elastic | None:
    """The document next to a config.json, which of torch_dist is in ``hf/``."""
    file = _file_of(source)
    return None if file is None else read_elastic(file)


def _file_of(source: Path) -> Path | None:
    places = (source, source.parent) if source.name == HF_DIR else (source,)
    return next((file for place in places if (file := elastic_file(place)) is not None), None)


def elastic_violations(args: Namespace) -> list[str]:
    """What is wrong with the arguments of several budgets, in sentences."""
    late = args.elastic_late_shares, args.elastic_late_from
    if args.elastic is None:
        alone = args.elastic_shares is not None or any(each is not None for each in late)
        return [f"shares of budgets need {ELASTIC_FLAG}"] if alone else []
    found = []
    if args.elastic == TOGETHER and (args.elastic_shares is not None or any(each is not None for each in late)):
        found.append(f"{ELASTIC_FLAG} {TOGETHER} trains every budget in every step: shares have no effect")
    if (late[0] is None) != (late[1] is None):
        found.append("--elastic-late-shares and --elastic-late-from need one another")
    optimizer = OPTIMIZERS.get(args.optimizer)  # others are refused for what they are
    if args.elastic == IN_TURN and optimizer is not None and optimizer.is_scale_invariant:
        found.append(
            f"{ELASTIC_FLAG} {IN_TURN} does not go with --optimizer {args.optimizer}: it would move by full steps what "
            f"an iteration does not train; give {TOGETHER}, whose steps have the largest budget, or --optimizer {ADAM}"
        )
    if late[1] is not None and late[1] < 0:
        found.append(f"--elastic-late-from {late[1]} is negative")
    if getattr(args, "cuda_graph_impl", "none") != "none":
        found.append(f"{ELASTIC_FLAG} does not go with --cuda-graph-impl: steps are not all alike")
    for name, why in _EXCLUDED.items():
        if getattr(args, name, None):
            found.append(f"{ELASTIC_FLAG} does not go with --{name.replace('_', '-')}: {why}")
    return found


def stage_of(layer: int, stages: StageLayout) -> int:
    """The (virtual) pipeline stage of a layer of the student, from 0."""
    ends = itertools.accumulate(stages.stages.student_layers)
    return next(stage for stage, end in enumerate(ends) if layer < end)


def depth_violations(run: ElasticRun, stages: StageLayout) -> list[str]:
    """Budgets whose last layer is not in the stage of the student's last, in sentences.

    Before MTP blocks Megatron has the final norm in the stage of the last layer. The last stage, which logs, must have
    a router, or it would not know over which ranks load balancing is to be added up.
    """
    shape, found = run.budgets[0].plan.source_shape, []
    last = stage_of(shape.num_layers - 1, stages)
    for budget in run.budgets:
        if (stage := stage_of(layer := budget.plan.kept_layers[-1], stages)) != last:
            found.append(
                f"budget {budget.name}: its last layer, model.layers.{layer} of the student, is in pipeline "
                f"stage {stage + 1}, the student's last in stage {last + 1}; give a --pipeline-model-parallel-layout "
                "that has both in one stage"
            )
    return found


def layout_of(budget: ElasticBudget, stages: StageLayout, args: Namespace) -> str | None:
    """The pipeline stages of a budget: every layer is where the largest model has it. None: there is one stage.

    Args:
        budget: which.
        stages: of the largest model.
        args: Megatron's arguments, as parsed.
    """
    if args.pipeline_model_parallel_size == 1:
        return None
    counts, first = [], 0
    for layers in stages.stages.student_layers:
        counts.append(sum(first <= layer < first + layers for layer in budget.plan.kept_layers))
        first += layers
    return layout_string(tuple(counts), budget.plan.target_shape.mtp_num_layers)


def flops_of_budgets(run: ElasticRun, args: Namespace) -> list[float]:
    """Operations per token of a training step of each budget, without recomputation; ``args`` are Megatron's."""
    kernels = kernels_of(args)
    return [student_flops(each.plan.target_shape, args.seq_length, kernels).total for each in run.budgets]
