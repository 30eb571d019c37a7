"""What ``plan`` and ``prune`` do: check everything, then calibrate, plan and apply."""

from __future__ import annotations

import argparse
import dataclasses
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

from megatron_slim.aliases import JsonObject, ReadOptions, WriteOptions
from megatron_slim.cli.calibration_run import CalibrationOptions, opened_work_dir
from megatron_slim.cli.decision_run import decide, decide_budgets, first_recipe, search_options
from megatron_slim.cli.given_statistics import FLAG as CARRY_STATISTICS
from megatron_slim.cli.given_statistics import Given
from megatron_slim.command_line import VERIFICATION, positive
from megatron_slim.errors import RecipeError, SlimError
from megatron_slim.files import refuse_existing
from megatron_slim.optimizers import ADAM, OPTIMIZERS
from megatron_slim.recipe import Recipe, load_recipe, select_phase

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    from megatron_slim.checkpoint.convert import Checkpoint
    from megatron_slim.pruning.candidates import Measuring
    from megatron_slim.pruning.elastic import ElasticBudget


class PhaseAction(argparse.Action):
    """Store the value of ``--phase``, also under its old name ``--stage``, with a note then."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: object, option: str | None = None
    ) -> None:
        """As argparse calls it."""
        if option == "--stage":
            logging.getLogger(__name__).warning("--stage is now called --phase; both are read")
        setattr(namespace, self.dest, values)


def add_phase_argument(parser: argparse.ArgumentParser) -> None:
    """``--phase``, the same in every tool that follows a recipe."""
    what = "phase of a recipe with phases, from 1"
    parser.add_argument("--phase", "--stage", type=positive, metavar="K", action=PhaseAction, help=what)


def run_plan(
    load: Path,
    given: Given,
    recipe_file: Path,
    save: Path,
    *,
    phase: int | None = None,
    measuring: Measuring | None = None,
    **reading: Unpack[ReadOptions],
) -> JsonObject:
    """Make a plan of statistics, write it to a new file; ``reading`` goes to `checkpoint.convert.open_checkpoint`."""
    refuse_existing(save)
    schedule = load_recipe(recipe_file)
    recipe = select_phase(schedule, phase, where=str(recipe_file))
    from rich.console import Console

    from megatron_slim.checkpoint.convert import log_left_out, open_checkpoint
    from megatron_slim.pruning.apply import PrunedCheckpoint
    from megatron_slim.pruning.pipeline import comparison, comparison_table
    from megatron_slim.pruning.plan import make_plan
    from megatron_slim.pruning.recipe_checks import check_recipe

    source = open_checkpoint(load, **reading)
    log_left_out(source)
    _check_phase(schedule, phase, source, where=str(recipe_file))
    check_recipe(recipe, source.shape, where=str(recipe_file))
    options = search_options(measuring, recipe, source, where=str(recipe_file))
    plan = make_plan(recipe, given.read(source), source.shape, **options)
    pruned = PrunedCheckpoint(plan, source, check_source=False)
    plan.save(save)
    Console().print(comparison_table(pruned))
    logger.info(f"{save}: the plan; megatron-slim show-plan shows it")
    return {"load": str(load), "save": str(save), "plan_sha256": plan.sha256, **comparison(pruned)}


def run_prune(
    load: Path,
    save: Path | None,
    *,
    to: str,
    recipe_file: Path | None = None,
    phase: int | None = None,
    plan_file: Path | None = None,
    given: Given | None = None,
    calibration: CalibrationOptions | None = None,
    dry_run: bool = False,
    measuring: Measuring | None = None,
    moments_of_merged: str | None = None,
    reading: ReadOptions | None = None,
    writing: WriteOptions | None = None,
) -> JsonObject:
    """Calibrate, plan, apply and verify; what is given already (statistics, a plan) is not made again.

    Args:
        load: checkpoint to prune, in either format.
        save: new directory for the result; not needed for a dry run.
        to: ``hf`` or ``torch_dist``.
        recipe_file: what is wanted; needed unless there is a plan.
        phase: which of the recipe's phases, where it has some.
        plan_file: a plan made before; then nothing is measured.
        given: statistics made before; then nothing is measured.
        calibration: data to measure on.
        dry_run: stop at the plan and write nothing.
        measuring: how the candidates of a budget are measured; None: they are not.
        moments_of_merged: one of `recipe_run.MOMENT_RULES`, with which the optimizer's state is pruned as well;
            None: it is not.
        reading: how to read ``load``, as `checkpoint.convert.open_checkpoint`.
        writing: how to write, as `checkpoint.convert.write_checkpoint`.
    """
    if save is not None and not dry_run:
        refuse_existing(save)
    schedule = load_recipe(recipe_file) if recipe_file else None
    recipe = first_recipe(schedule, phase, where=str(recipe_file)) if schedule else None
    from rich.console import Console

    from megatron_slim.checkpoint.convert import log_left_out, open_checkpoint
    from megatron_slim.checkpoint.optimizer_state import open_optimizer_state
    from megatron_slim.pruning.apply import PrunedCheckpoint
    from megatron_slim.pruning.elastic_plans import budgets_table, summaries
    from megatron_slim.pruning.pipeline import comparison, comparison_table, write_pruned
    from megatron_slim.pruning.plan_reader import load_plan

    source = open_checkpoint(load, **(reading or {}))
    log_left_out(source)
    optimizer = open_optimizer_state(source) if moments_of_merged is not None else None
    if schedule is not None:
        _check_phase(schedule, phase, source, where=str(recipe_file))
    budgets: tuple[ElasticBudget, ...] = ()
    with opened_work_dir(calibration, save) as work:
        if plan_file is not None:
            plan, stats = load_plan(plan_file), None
        else:
            assert recipe is not None and schedule is not None
            if save is not None and not dry_run:
                _check_space(recipe, source, save, with_optimizer=optimizer is not None, where=str(recipe_file))
            how = (source, given, calibration, work, measuring)
            if schedule.budgets:
                budgets, stats = decide_budgets(schedule.budgets, *how, where=str(recipe_file))
                plan = budgets[0].plan
            else:
                plan, stats = decide(recipe, *how, where=str(recipe_file))
        pruned = PrunedCheckpoint(plan, source, check_source=plan_file is not None)
        Console().print(comparison_table(pruned))
        results = {"load": str(load), "plan_sha256": plan.sha256, "dry_run": dry_run, **comparison(pruned)}
        if budgets:
            Console().print(budgets_table(budgets))
            results["budgets"] = summaries(budgets)
        if dry_run:
            return results
        assert save is not None
        state = pruned.optimizer_state(optimizer, moments_of_merged) if optimizer and moments_of_merged else None
        written = write_pruned(pruned, save, to=to, stats=stats, budgets=budgets, optimizer=state, **(writing or {}))
        logger.info(f"{save}: {len(pruned.names)} tensors as {to}, {VERIFICATION[written['verified']]}")
        if state is not None:
            logger.info(f"{save}: with the optimizer's {', '.join(state.tensors)} after {state.step} steps")
        return results | {"save": str(save), **written}


def _check_phase(schedule: Recipe, number: int | None, source: Checkpoint, *, where: str) -> None:
    """Refuse a source that the phase before cannot have given, and phases to come that this one cannot lead to.

    Sizes that a phase leaves to a budget are not known.
    """
    from megatron_slim.pruning.recipe_checks import check_later_phases

    named: dict[str, int] = {}
    for earlier in schedule.phases[: (number or 1) - 1]:
        named |= {key: size for key, size in dataclasses.asdict(earlier.target).items() if size is not None}
    found = [
        f"{key} {getattr(source.shape, key)}, not {size}"
        for key, size in named.items()
        if getattr(source.shape, key) != size
    ]
    if found:
        raise RecipeError(
            f"phase {number} continues phase {(number or 1) - 1}, but this has {', '.join(found)}",
            where=str(source.path),
            fix="give the trained model of the phase before",
        )
    check_later_phases(schedule, number or 1, source.shape, where=where)


def _check_space(recipe: Recipe, source: Checkpoint, save: Path, *, with_optimizer: bool, where: str) -> None:
    """Refuse a disk without space for the result before hours of calibration; writing looks again, at exact sizes."""
    from megatron_slim.architecture.table import count_parameters
    from megatron_slim.files import check_space
    from megatron_slim.pruning.depth import layers_before_statistics
    from megatron_slim.pruning.recipe_checks import check_recipe, space_before_statistics
    from megatron_slim.pruning.target import target_shape

    check_recipe(recipe, source.shape, where=where)
    if recipe.budget is not None:  # which one is not known yet
        space = space_before_statistics(recipe, source.shape)
        shapes = [space.model(candidate.sizes) for candidate in space.candidates()]
    else:
        layers = layers_before_statistics(source.shape, recipe.target.num_layers or source.shape.num_layers)
        shapes = [target_shape(recipe, source.shape, layers)]
    itemsize = min(dtype.itemsize for dtype in source.dtypes.values()) + (
        OPTIMIZERS[ADAM].state_bytes if with_optimizer else 0
    )
    check_space(save, min(count_parameters(shape).total for shape in shapes) * itemsize)


def refuse_conflicts(args: argparse.Namespace) -> None:
    """Refuse arguments of megatron-slim prune that say too much or too little.

    Raises:
        SlimError: says which.
    """
    given = [
        option
        for option, value in (
            ("--calibration-data", args.calibration_data),
            ("--stats", args.stats),
            (CARRY_STATISTICS, args.carry_statistics),
            ("--plan", args.plan),
        )
        if value is not None
    ]
    if len(given) != 1:
        what = " and ".join(given) + " exclude one another" if given else "nothing to plan from"
        raise SlimError(what, fix=f"give one of --calibration-data, --stats, {CARRY_STATISTICS} and --plan")
    for name in ("work_dir", "num_samples", "seq_length", "micro_batch_size"):
        if getattr(args, name) is not None and args.calibration_data is None:
            raise SlimError(f"--{name.replace('_', '-')} without a calibration", fix="leave it out")
    if (args.recipe is None) == (args.plan is None):
        raise SlimError("a plan holds its recipe" if args.plan else "no recipe", fix="give --recipe or --plan")
    if args.plan is not None and args.phase is not None:
        raise SlimError("a plan holds its recipe's phase", fix="leave --phase out")
    if args.plan is not None and args.search_data is not None:
        raise SlimError("a plan holds its sizes", fix="leave --search-data out")
    if args.save is None and not args.dry_run:
        raise SlimError("no output directory", fix="give --save, or --dry-run")
