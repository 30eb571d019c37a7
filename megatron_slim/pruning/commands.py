"""What the pruning tools do: check everything, then measure, plan and apply."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_slim.cli import VERIFICATION, not_negative, positive, say
from megatron_slim.errors import SlimError
from megatron_slim.files import refuse_existing
from megatron_slim.recipe import Recipe, load_recipe, select_stage

if TYPE_CHECKING:
    from megatron_slim.checkpoint.convert import Checkpoint
    from megatron_slim.pruning.plan import Plan
    from megatron_slim.pruning.statistics import Statistics
    from megatron_slim.pruning.work_dir import WorkDir


@dataclass(frozen=True)
class CalibrationOptions:
    """Data for calibration and how to read it; see `samples.read_calibration_samples`."""

    data: Path
    num_samples: int | None
    seq_length: int | None
    seed: int
    micro_batch_size: int | None
    work_dir: Path | None = None


@dataclass(frozen=True)
class Measuring:
    """How the candidates of a budget are measured.

    Attributes:
        losses: of a source, what gives the loss of a plan's result; refuses bad data when it is called.
        top: how many candidates, the best first.
    """

    losses: Callable[[Checkpoint], Callable[[Plan], float]]
    top: int

    def options(self, recipe: Recipe, source: Checkpoint, *, where: str) -> dict[str, Any]:
        """Arguments of `plan.make_plan`.

        Raises:
            SlimError: there is nothing to choose between.
        """
        if recipe.budget is None:
            raise SlimError("--search-data, but the recipe has no budget", where=where, fix="leave it out")
        return {"measure": self.losses(source), "top": self.top}


def add_calibration_arguments(parser: argparse.ArgumentParser, *, required: bool) -> None:
    """The arguments of calibration, the same in every tool that calibrates."""
    group = parser.add_argument_group("calibration")
    group.add_argument(
        "--calibration-data",
        type=Path,
        required=required,
        metavar="DATA",
        help="prefix of a Megatron .bin/.idx pair, or a .npy integer matrix [samples, sequence] used as it is",
    )
    group.add_argument("--num-samples", type=positive, help="samples, drawn at random (.bin: 1024 if not given)")
    group.add_argument("--seq-length", type=positive, help="tokens per sample (.bin: at most 4096 if not given)")
    group.add_argument("--seed", type=not_negative, default=1234, help="seed of the draw")
    group.add_argument("--micro-batch-size", type=positive, help="samples in one forward pass (about 4096 tokens)")
    group.add_argument(
        "--work-dir",
        type=Path,
        metavar="DIR",
        help="keep hidden states here, not in memory, and progress: the same command goes on after a kill",
    )


def calibration_options(args: argparse.Namespace) -> CalibrationOptions:
    """The options that `add_calibration_arguments` gave."""
    return CalibrationOptions(
        args.calibration_data, args.num_samples, args.seq_length, args.seed, args.micro_batch_size, args.work_dir
    )


def run_calibrate(load: Path, save: Path, options: CalibrationOptions, **reading: Any) -> dict[str, Any]:
    """Measure statistics and write them to a new file; ``reading`` goes to `checkpoint.convert.open_checkpoint`."""
    refuse_existing(save)
    from megatron_slim.checkpoint.convert import open_checkpoint

    source = open_checkpoint(load, **reading)
    with _work_dir(options) as work:
        stats = _measure(source, options, work)
        stats.save(save)
    say(f"{save}: statistics of {stats.metadata['num_samples']} samples of {stats.metadata['seq_length']} tokens")
    return {"load": str(load), "save": str(save), "sha256": stats.sha256, **stats.metadata}


def add_stage_argument(parser: argparse.ArgumentParser) -> None:
    """``--stage``, the same in every tool that follows a recipe."""
    parser.add_argument("--stage", type=positive, metavar="K", help="stage of a recipe that has stages, from 1")


def run_plan(
    load: Path,
    stats_file: Path,
    recipe_file: Path,
    save: Path,
    *,
    stage: int | None = None,
    measuring: Measuring | None = None,
    **reading: Any,
) -> dict[str, Any]:
    """Make a plan of statistics, write it to a new file; ``reading`` goes to `checkpoint.convert.open_checkpoint`."""
    refuse_existing(save)
    recipe = select_stage(load_recipe(recipe_file), stage, where=str(recipe_file))
    from megatron_slim.checkpoint.convert import open_checkpoint
    from megatron_slim.pruning.apply import PrunedCheckpoint
    from megatron_slim.pruning.pipeline import comparison, print_comparison
    from megatron_slim.pruning.plan import check_recipe, make_plan

    source = open_checkpoint(load, **reading)
    check_recipe(recipe, source.shape, where=str(recipe_file))
    options = measuring.options(recipe, source, where=str(recipe_file)) if measuring else {}
    plan = make_plan(recipe, _load_stats(stats_file, source), source.shape, **options)
    pruned = PrunedCheckpoint(plan, source, check_source=False)
    plan.save(save)
    print_comparison(pruned)
    say(f"{save}: the plan; tools/show_plan.py shows it")
    return {"load": str(load), "save": str(save), "plan_sha256": plan.sha256, **comparison(pruned)}


def run_prune(
    load: Path,
    save: Path | None,
    *,
    to: str,
    recipe_file: Path | None = None,
    stage: int | None = None,
    plan_file: Path | None = None,
    stats_file: Path | None = None,
    calibration: CalibrationOptions | None = None,
    dry_run: bool = False,
    measuring: Measuring | None = None,
    reading: Mapping[str, Any] | None = None,
    writing: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Calibrate, plan, apply and verify; what is given already (statistics, a plan) is not made again.

    Args:
        load: checkpoint to prune, in either format.
        save: new directory for the result; not needed for a dry run.
        to: ``hf`` or ``torch_dist``.
        recipe_file: what is wanted; needed unless there is a plan.
        stage: which of the recipe's stages, where it has some.
        plan_file: a plan made before; then nothing is measured.
        stats_file: statistics made before; then nothing is measured.
        calibration: data to measure on.
        dry_run: stop at the plan and write nothing.
        measuring: how the candidates of a budget are measured; None: they are not.
        reading: how to read ``load``, as `checkpoint.convert.open_checkpoint`.
        writing: how to write, as `checkpoint.convert.write_checkpoint`.
    """
    if save is not None and not dry_run:
        refuse_existing(save)
    recipe = select_stage(load_recipe(recipe_file), stage, where=str(recipe_file)) if recipe_file else None
    from megatron_slim.checkpoint.convert import open_checkpoint
    from megatron_slim.pruning.apply import PrunedCheckpoint
    from megatron_slim.pruning.pipeline import comparison, print_comparison, write_pruned
    from megatron_slim.pruning.plan_reader import load_plan

    source = open_checkpoint(load, **(reading or {}))
    with _work_dir(calibration) as work:
        if plan_file is not None:
            plan, stats = load_plan(plan_file), None
        else:
            assert recipe is not None
            if save is not None and not dry_run:
                _check_space(recipe, source, save, where=str(recipe_file))
            where = str(recipe_file)
            plan, stats = _decide(recipe, source, stats_file, calibration, work, measuring, where=where)
        pruned = PrunedCheckpoint(plan, source, check_source=plan_file is not None)
        print_comparison(pruned)
        results = {"load": str(load), "plan_sha256": plan.sha256, "dry_run": dry_run, **comparison(pruned)}
        if dry_run:
            return results
        assert save is not None
        written = write_pruned(pruned, save, to=to, stats=stats, **(writing or {}))
        say(f"{save}: {len(pruned.names)} tensors as {to}, {VERIFICATION[written['verified']]}")
        return results | {"save": str(save), **written}


def _check_space(recipe: Recipe, source: Checkpoint, save: Path, *, where: str) -> None:
    """Refuse a disk without room for the result before hours of calibration; writing looks again, at exact sizes."""
    from megatron_slim.architecture.table import count_parameters
    from megatron_slim.files import check_space
    from megatron_slim.pruning.plan import check_recipe, space_before_statistics, target_shape

    check_recipe(recipe, source.shape, where=where)
    if recipe.budget is not None:  # which one is not known yet
        space = space_before_statistics(recipe, source.shape)
        shapes = [space.model(candidate.sizes) for candidate in space.candidates()]
    else:
        layers = range(recipe.target.num_layers or source.shape.num_layers)
        shapes = [target_shape(recipe, source.shape, tuple(layers))]
    itemsize = min(dtype.itemsize for dtype in source.dtypes.values())
    check_space(save, min(count_parameters(shape).total for shape in shapes) * itemsize)


def _decide(
    recipe: Recipe,
    source: Checkpoint,
    stats_file: Path | None,
    calibration: CalibrationOptions | None,
    work: WorkDir | None,
    measuring: Measuring | None,
    *,
    where: str,
) -> tuple[Plan, Statistics]:
    from megatron_slim.pruning.plan import check_recipe, make_plan

    check_recipe(recipe, source.shape, where=where)
    options = measuring.options(recipe, source, where=where) if measuring else {}
    if stats_file is not None:
        stats = _load_stats(stats_file, source)
    else:
        assert calibration is not None
        stats = _measure(source, calibration, work)
    return make_plan(recipe, stats, source.shape, **options), stats


def _load_stats(path: Path, source: Checkpoint) -> Statistics:
    from megatron_slim.pruning.fingerprint import fingerprint
    from megatron_slim.pruning.statistics import Statistics

    stats = Statistics.load(path)
    stats.check(source.shape, fingerprint(source), where=str(path))
    return stats


def _work_dir(options: CalibrationOptions | None) -> AbstractContextManager[WorkDir | None]:
    """The work directory of a calibration, if it has one."""
    if options is None or options.work_dir is None:
        return contextlib.nullcontext()
    from megatron_slim.pruning.work_dir import open_work_dir

    return open_work_dir(options.work_dir)


def _measure(source: Checkpoint, options: CalibrationOptions, work: WorkDir | None) -> Statistics:
    from megatron_slim import device
    from megatron_slim.pruning.samples import read_calibration_samples

    samples = read_calibration_samples(
        options.data,
        source.shape,
        num_samples=options.num_samples,
        seq_length=options.seq_length,
        seed=options.seed,
    )
    device.install()
    from megatron_slim.pruning.calibrate import calibrate

    say(f"calibrating on {samples.shape[0]} samples of {samples.shape[1]} tokens")
    return calibrate(source, samples, micro_batch_size=options.micro_batch_size, work=work)


def refuse_conflicts(args: argparse.Namespace) -> None:
    """Refuse arguments of tools/prune_checkpoint.py that say too much or too little.

    Raises:
        SlimError: says which.
    """
    given = [
        option
        for option, value in (
            ("--calibration-data", args.calibration_data),
            ("--stats", args.stats),
            ("--plan", args.plan),
        )
        if value is not None
    ]
    if len(given) != 1:
        what = " and ".join(given) + " exclude one another" if given else "nothing to plan from"
        raise SlimError(what, fix="give one of --calibration-data, --stats and --plan")
    if args.work_dir is not None and args.calibration_data is None:
        raise SlimError("--work-dir without a calibration", fix="leave it out")
    if (args.recipe is None) == (args.plan is None):
        raise SlimError("a plan holds its recipe" if args.plan else "no recipe", fix="give --recipe or --plan")
    if args.plan is not None and args.stage is not None:
        raise SlimError("a plan holds its recipe's stage", fix="leave --stage out")
    if args.plan is not None and args.search_data is not None:
        raise SlimError("a plan holds its sizes", fix="leave --search-data out")
    if args.save is None and not args.dry_run:
        raise SlimError("no output directory", fix="give --save, or --dry-run")
