"""A run's place in a progressive schedule: the phases of a recipe share one schedule, of which a run trains a part.

Learning rate, lambda and beta move over the tokens of all phases, and no phase sees data of another (SlimQwen, section
3.3): a run counts its iterations from where the phase before it ended, and ends where its own tokens do.
"""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megatron_slim.checkpoint.records import PLAN, PLAN_ITEMS
from megatron_slim.checkpoint.torch_dist_names import RELEASE, TRACKER
from megatron_slim.errors import CheckpointError, SlimError
from megatron_slim.files import read_json
from megatron_slim.recipe import parse_recipe
from megatron_slim.recipe_sections import Phase

FLAG, WARMUP, RESHARDABLE = "--progressive-schedule", "--stage-warmup", "--dist-ckpt-optim-fully-reshardable"
WARMUP_FROM = 0.1  # of the schedule's learning rate
# With these an iteration has no fixed number of tokens, or its number is not what schedules go by.
_EXCLUDED = {
    "train_samples": "phases are counted in iterations",
    "rampup_batch_size": "all iterations must have equally many tokens",
    "step_batch_size_schedule": "all iterations must have equally many tokens",
    "phase_transition_iterations": "the recipe has phases of its own",
    "exit_interval": "a phase ends when its tokens are done",
    "finetune": "a run that is started again must resume",
    "override_ckpt_iteration": "the iteration says which phase it is",
}


def phase_of(checkpoint: str | None) -> Phase | None:
    """The phase of a progressive schedule whose pruning made the checkpoint that a run starts from."""
    plan = None if checkpoint is None else Path(checkpoint) / PLAN
    if plan is None or not plan.is_file():
        return None
    document = read_json(plan, max_items=PLAN_ITEMS)
    where = f"{plan}: recipe"
    return parse_recipe(document.get("recipe") if isinstance(document, dict) else None, where=where).phase


@dataclass(frozen=True)
class Place:
    """Which part of the whole schedule a phase is.

    Attributes:
        start: iterations of the phases before it.
        stop: the same with its own.
        total: iterations of all phases.
        tokens_before: of ``start`` iterations.
    """

    start: int
    stop: int
    total: int
    tokens_before: int

    @staticmethod
    def of(phase: Phase, tokens_per_iteration: int) -> Place:
        """Every phase ends with the iteration in which the tokens of all so far are reached.

        >>> Place.of(Phase(2, 2, "", 25, (10, 25)), 4)
        Place(start=3, stop=9, total=9, tokens_before=12)
        """
        before, upto = (sum(phase.schedule[:number]) for number in (phase.number - 1, phase.number))
        start, stop, total = (
            math.ceil(tokens / tokens_per_iteration) for tokens in (before, upto, sum(phase.schedule))
        )
        return Place(start, stop, total, start * tokens_per_iteration)

    def command_line(self, argv: list[str]) -> list[str]:
        """Megatron's arguments for it: all phases are one run, which all but the last leave when they are done.

        Those save the optimizer's state by the names of weights, which a pruning can carry over.
        """
        given = {word.split("=")[0] for word in argv}
        length = [] if "--train-iters" in given else [f"--train-iters={self.total}"]
        if self.leaves_at is None:
            return [*argv, *length]
        saved = [] if RESHARDABLE in given else [RESHARDABLE]
        return [*argv, *length, f"--exit-interval={self.leaves_at}", *saved]

    def warmup(self, iterations: int) -> Callable[[float], float]:
        """What the schedule's learning rate is multiplied by, as a function of the iterations that are done.

        >>> factor = Place(10, 50, 100, 0).warmup(4)
        >>> [round(factor(iteration), 3) for iteration in (10, 11, 12, 13, 14, 50)]
        [0.1, 0.325, 0.55, 0.775, 1.0, 1.0]
        """

        def factor(iteration: float) -> float:
            done = (iteration - self.start) / iterations
            return WARMUP_FROM + (1 - WARMUP_FROM) * done if 0 <= done < 1 else 1.0

        return factor

    @property
    def leaves_at(self) -> int | None:
        """The iteration at which it leaves a run that resumes; the last phase goes to the end, validation included."""
        return self.stop if self.stop < self.total else None


def find_place(phase: Phase | None, args: Namespace) -> Place | None:
    """A run's place, None without ``--progressive-schedule``; its iterations become those of ``args``.

    Args:
        phase: of the student that it starts from.
        args: Megatron's arguments as parsed; ``train_iters`` and ``exit_interval`` are set.

    Raises:
        SlimError: lists all that does not go with it.
    """
    if not args.progressive_schedule:
        if args.stage_warmup:
            raise SlimError(f"{WARMUP} without {FLAG}", fix="a run of its own has --lr-warmup-iters")
        return None
    if args.pretrained_checkpoint is None:
        raise SlimError(f"{FLAG} without --pretrained-checkpoint", fix="give the student of a phase (STUDENT)")
    if phase is None:
        fix, start = "start from what megatron-slim prune --phase K wrote", args.pretrained_checkpoint
        raise SlimError(f"{FLAG}: no {PLAN} of a phase next to --pretrained-checkpoint {start}", fix=fix)
    if not phase.schedule:
        fix = "give every phase of the recipe its tokens, and prune again"
        raise SlimError(
            f"{FLAG}: {PLAN} does not know the tokens of all phases", where=args.pretrained_checkpoint, fix=fix
        )
    found = [
        f"{FLAG} does not go with --{name.replace('_', '-')}: {why}"
        for name, why in _EXCLUDED.items()
        if getattr(args, name)
    ]
    if args.load is None:
        found.append(f"{FLAG} without --load: a run that is started again resumes from its own checkpoints")
    if args.global_batch_size is None or args.seq_length is None:
        found.append(f"{FLAG} without --global-batch-size and --seq-length: an iteration must have a number of tokens")
    if found:
        raise SlimError("; ".join(found))
    place = Place.of(phase, args.seq_length * args.global_batch_size)
    if args.train_iters not in (None, place.total):
        fix = f"leave it out: {FLAG} sets it"
        raise SlimError(
            f"--train-iters {args.train_iters}: the tokens of all phases are {place.total} iterations", fix=fix
        )
    if place.start == place.stop:
        raise SlimError(f"{FLAG}: phase {phase.number} has less than one iteration", fix="give it more tokens")
    if not 0 <= args.stage_warmup < place.stop - place.start:
        what = f"{WARMUP} {args.stage_warmup} is not from 0 to below the phase's {place.stop - place.start} iterations"
        raise SlimError(what, fix="give fewer")
    args.train_iters, args.exit_interval = place.total, place.leaves_at
    return place


def is_done(place: Place, load: str, step: int | None = None) -> bool:
    """Whether the checkpoint that a run would resume from is the phase's last.

    Args:
        place: of the phase.
        load: ``--load``.
        step: ``--ckpt-step``, which wins over what the tracker names.

    Raises:
        CheckpointError: it is of another phase.
    """
    tracker = Path(load) / TRACKER
    text = str(step) if step else tracker.read_text().strip() if tracker.is_file() else RELEASE
    if text == RELEASE:
        return False
    if not place.start < int(text) <= place.stop:
        fix = "give every phase a --load and --save of its own, and all the same sequence length and global batch"
        raise CheckpointError(
            f"holds iteration {text}, and the phase has {place.start + 1} to {place.stop}", where=load, fix=fix
        )
    return int(text) == place.stop
