"""What training adds to Megatron's loop in places where it calls nobody, and what its log says."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch

from megatron_slim.aliases import Document, Function, JsonObject, ParamGroup
from megatron_slim.compat.chained_groups import save_groups_in_one_list
from megatron_slim.compat.patch import BUG, HOOK, NOT_REPORTED, Patch

if TYPE_CHECKING:
    from argparse import ArgumentParser

    from megatron.core.optimizer import MegatronOptimizer
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
    from megatron.core.transformer import MegatronModule

_LOOP = "megatron.training.training"

PIPELINE = Patch(
    name="pipeline schedules",
    kind=HOOK,
    why="Nothing that the loop calls is reached by all ranks right before the schedule of a training step: within a "
    "schedule later stages are waiting already. Nor can a step have more micro-batches than its batch.",
    upstream=NOT_REPORTED,
    targets=(f"{_LOOP}:get_forward_backward_func",),
)


def around_schedules(run: Function) -> None:
    """Have Megatron's loop call ``run(schedule, **arguments)`` in place of a pipeline schedule, on every rank."""

    def change(choose: Function) -> Function:
        @functools.wraps(choose)
        def chosen(*args: object, **kwargs: object) -> Function:
            schedule = choose(*args, **kwargs)
            return functools.wraps(schedule)(functools.partial(run, schedule))

        return chosen

    PIPELINE.apply(change)


SCHEDULE = Patch(
    name="place in the schedule",
    kind=BUG,
    why="With --no-load-optim Megatron resumes at the checkpoint's iteration, but with the learning rate of the first. "
    "Nor can a run begin at an iteration that it has no checkpoint of, as the second phase of a student does.",
    upstream="https://github.com/NVIDIA/Megatron-LM/issues/1533",
    targets=(f"{_LOOP}:load_checkpoint",),
)


def keep_schedule_with_iterations(
    start: int, at_start: Callable[[list[MegatronModule], MegatronOptimizer], None] | None = None
) -> None:
    """Have Megatron's schedules be where the iteration is, whatever was loaded.

    A run that finds no checkpoint of its own begins at ``start``, its data too, and with what ``at_start(model chunks,
    optimizer)`` does when the weights are loaded and the schedule is there.
    """

    def change(load: Function) -> Function:
        @functools.wraps(load)
        def load_and_keep(
            model: list[MegatronModule],
            optimizer: MegatronOptimizer,
            scheduler: OptimizerParamScheduler | None,
            *args: object,
            **kwargs: object,
        ) -> tuple[object, ...]:
            from megatron.training import get_args

            found, *rest = load(model, optimizer, scheduler, *args, **kwargs)
            iteration, given = found or start, get_args()
            if iteration and scheduler is not None and scheduler.num_steps == 0:  # without one: --skip-train
                scheduler.step((found and given.consumed_train_samples) or iteration * given.global_batch_size)
            if at_start is not None and not found:
                at_start(model, optimizer)
            return iteration, *rest

        return load_and_keep

    SCHEDULE.apply(change)


LEARNING_RATES = Patch(
    name="scaled learning rates",
    kind=HOOK,
    why="Megatron's schedules have no second warm-up, which a phase of a student begins with.",
    upstream=NOT_REPORTED,
    targets=("megatron.core.optimizer_param_scheduler:OptimizerParamScheduler.get_lr",),
)


def scale_learning_rate(factor: Callable[[float], float]) -> None:
    """Have Megatron's scheduler multiply every learning rate by ``factor(iteration)``, iterations that are done."""

    def change(get: Callable[..., float]) -> Callable[..., float]:
        @functools.wraps(get)
        def scaled(self: OptimizerParamScheduler, param_group: ParamGroup) -> float:
            from megatron.training import get_args

            return float(get(self, param_group) * factor(self.num_steps / get_args().global_batch_size))

        return scaled

    LEARNING_RATES.apply(change)


OPTIMIZER_NAMES = Patch(
    name="names of optimizers",
    kind=HOOK,
    why="Megatron's parser takes the names of its own optimizers alone, also where it parses the command line again "
    "before it starts.",
    upstream=NOT_REPORTED,
    targets=("megatron.training.arguments:_add_training_args",),
)


def take_optimizers(names: Iterable[str]) -> None:
    """Have Megatron's parser take these names of optimizers in addition to its own."""

    def change(add: Function) -> Function:
        @functools.wraps(add)
        def add_with_names(parser: ArgumentParser) -> ArgumentParser:
            found = add(parser)
            (action,) = (each for each in found._actions if each.dest == "optimizer")
            action.choices = [*action.choices, *(name for name in names if name not in action.choices)]
            return found

        return add_with_names

    OPTIMIZER_NAMES.apply(change)


OPTIMIZERS = Patch(
    name="other optimizers",
    kind=HOOK,
    why="Megatron splits fused matrices other than queries, keys and values at no label, orthogonalizes the part of a "
    "rank alone, and looks at no update before it saves.",
    upstream=NOT_REPORTED,
    targets=(
        "megatron.core.optimizer.emerging_optimizers:_EMERGING_OPTIMIZERS",
        "megatron.core.optimizer:_EMERGING_OPTIMIZERS",
        f"{_LOOP}:get_megatron_optimizer",
    ),
)


def use_optimizers(entries: Document, after_step: Callable[[], None]) -> None:
    """Have Megatron build these optimizers by their names, and every rank call ``after_step`` after each step."""

    def registry(theirs: Document) -> JsonObject:
        return {**theirs, **entries}

    def change(build: Function) -> Function:
        @functools.wraps(build)
        def build_watched(*args: object, **kwargs: object) -> MegatronOptimizer:
            optimizer = build(*args, **kwargs)
            save_groups_in_one_list(optimizer)
            step = optimizer.step

            @functools.wraps(step)
            def watched() -> object:
                found = step()
                after_step()
                return found

            optimizer.step = watched
            return optimizer

        return build_watched

    OPTIMIZERS.apply(registry, registry, change)


_LOG_COUNTERS = ("advanced iterations", "skipped iterations", "nan iterations")


class _LastIteration(dict[str, Any]):
    """Megatron's sums of losses, of one iteration alone: read to be divided by the iterations since the last line."""

    def __getitem__(self, key: str) -> Any:
        value = super().__getitem__(key)
        return value.double() * max(1, self["advanced iterations"]) if torch.is_tensor(value) else value


def _of_one_iteration(log: Function) -> Function:
    """Losses and schedules are those of the iteration; counts and times stay those since the last line."""
    sums = _LastIteration()

    @functools.wraps(log)
    def log_one(
        losses: object, _: object, rate: object, iteration: int, *args: object, is_first_iteration: bool, **more: object
    ) -> object:
        from megatron.training import get_args

        for name in sums.keys() - _LOG_COUNTERS:
            del sums[name]
        # Otherwise a first line that ends an interval would not begin the next.
        first = is_first_iteration and iteration % get_args().log_interval != 0
        return log(losses, sums, rate, iteration, *args, is_first_iteration=first, **more)

    return log_one


TRAINING_LOG = Patch(
    name="lines of the log",
    kind=BUG,
    why="Megatron logs means since the last line, and since the start in the line after the first of a start: what a "
    "line says then depends on where a run was interrupted.",
    upstream="https://github.com/NVIDIA/Megatron-LM/issues/6237",
    targets=(f"{_LOOP}:training_log",),
    changes=(_of_one_iteration,),
)
