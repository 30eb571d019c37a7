"""Compress a model: prune, train, export and evaluate, phase by phase, as a recipe says.

Started again after anything, the same command resumes; nothing that is done is done again. Values of the
recipe are replaced by --set, and those of its section train by the arguments of `megatron-slim distill` below. All
other arguments go to Megatron.
"""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Sequence
from pathlib import Path

from megatron_slim.aliases import Document, JsonObject
from megatron_slim.cli.tool import run_tool
from megatron_slim.command_line import RECIPE_HELP, not_negative, tool_parser
from megatron_slim.compression import estimate
from megatron_slim.compression.checks import check, check_disk
from megatron_slim.compression.queue import refuse_queued
from megatron_slim.compression.report import write_report
from megatron_slim.compression.runner import run_steps
from megatron_slim.compression.settings import read_settings
from megatron_slim.compression.state import RunState
from megatron_slim.compression.steps import Step, steps
from megatron_slim.errors import SlimError
from megatron_slim.files import sole_writer
from megatron_slim.recipe_run import SECTIONS, STATES
from megatron_slim.training.variables import BEHIND, GROUPS, flag

logger = logging.getLogger(__name__)


def parser(prog: str) -> argparse.ArgumentParser:
    """The command's parser; what it does not know is Megatron's."""
    found = tool_parser(__doc__ or "")
    found.prog = prog
    found.formatter_class = argparse.RawDescriptionHelpFormatter
    found.add_argument("recipe", type=Path, metavar="RECIPE", help=RECIPE_HELP)
    found.add_argument("--teacher", type=Path, required=True, metavar="DIR", help="model to compress, either format")
    found.add_argument("--save", type=Path, required=True, metavar="DIR", help="directory of the run")
    found.add_argument(
        "--data",
        nargs="+",
        action="extend",
        default=[],
        metavar="PREFIX",
        help="training data: .bin/.idx prefixes or sample sets; needed but for --teacher-cache",
    )
    found.add_argument(
        "--valid-data", nargs="+", action="extend", default=[], metavar="PREFIX", help="validation data of training"
    )
    found.add_argument(
        "--calibration-data", type=Path, metavar="DATA", help="data of calibration (default: the prefix of --data)"
    )
    found.add_argument(
        "--evaluation-data",
        type=Path,
        metavar="DATA",
        help="data of evaluation (default: the prefix of --valid-data; without both nothing is evaluated)",
    )
    found.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="SECTION.KEY=VALUE",
        help="replace values of the recipe, such as evaluate.num_samples=64",
    )
    found.add_argument("--step", metavar="NAME", help="run this step alone, such as phase-1/train, as jobs of Slurm do")
    shown = found.add_mutually_exclusive_group()
    shown.add_argument("--dry-run", action="store_true", help="show the steps, what they need, and do nothing")
    help_text = "the same, and write the recipe and the state of the run, which jobs of Slurm read when submitted"
    shown.add_argument("--prepare", action="store_true", help=help_text)
    _add_training(found)
    return found


def _add_training(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("training")
    group.add_argument(
        "--record",
        choices=STATES,
        help="record the teacher's hidden states in this type before the first training, once; every phase trains from "
        "them, without the teacher in memory",
    )
    group.add_argument(
        "--teacher-cache",
        metavar="DIR",
        help="train from this, which megatron-slim record wrote; --data are then sample sets or caches, by default its "
        "own samples",
    )
    for title in ("processes", "run"):
        for name, (kind, text) in GROUPS[title].items():
            if name.lower() in SECTIONS["train"] and kind:
                kept = not_negative if kind in ("N", "K", "PORT") else str  # the schema of the recipe says the rest
                group.add_argument(flag(name), dest=name.lower(), type=kept, metavar=kind, help=text)


def run(args: argparse.Namespace, megatron: Sequence[str]) -> JsonObject:
    """Run what is not done.

    Returns:
        ``save``, ``report`` and ``steps`` (state, attempts, seconds); of what is not run, what every step needs.
    """
    train = {key: getattr(args, key) for key in SECTIONS["train"] if getattr(args, key, None) is not None}
    settings = read_settings(
        args.recipe,
        args.teacher,
        args.save,
        data=args.data,
        valid_data=args.valid_data,
        calibration_data=args.calibration_data,
        evaluation_data=args.evaluation_data,
        replaced=args.set,
        train=train,
        megatron=megatron,
    )
    if args.prepare:
        refuse_queued(settings.save)
    found = steps(settings)
    state = RunState(settings, found)
    chosen = _chosen(found, args.step)
    only_shown = args.dry_run or args.prepare
    if not only_shown:
        _refuse_slurm(train)
    teacher = check(settings)
    needs = estimate.show(settings, found, teacher, as_json=args.json) if only_shown else {}
    if args.dry_run:
        return needs
    check_disk(settings, teacher)
    settings.save.mkdir(parents=True, exist_ok=True)
    with sole_writer(settings.save / "run"):
        state.write()
        if args.prepare:
            return needs
        run_steps(chosen, state, settings.save)
        page = write_report(settings.save)
    return {"save": str(settings.save), "report": str(page), "steps": state.steps}


def _refuse_slurm(train: Document) -> None:
    if train.get("launcher", os.environ.get("LAUNCHER")) == "slurm" and "SLURM_JOB_ID" not in os.environ:
        fix = "run examples/slimqwen/compress.sh with LAUNCHER=slurm, which chains jobs"
        raise SlimError("--launcher slurm would submit training and not wait for it", fix=fix)


def _chosen(found: list[Step], name: str | None) -> list[Step]:
    """All steps, or one of which those before are done."""
    if name is None:
        return found
    names = [step.name for step in found]
    if name not in names:
        raise SlimError(f"--step {name}: there is no such step", fix=f"known: {', '.join(names)}")
    place = names.index(name)
    missing = [step.name for step in found[:place] if not step.done()]
    if missing:
        raise SlimError(f"--step {name}: {missing[0]} is not done", fix="run that first")
    return found[place : place + 1]


def main(argv: Sequence[str], prog: str) -> None:
    """Run the command."""
    args, megatron = parser(prog).parse_known_args(argv)
    if BEHIND in megatron:  # in front of Megatron's own, which it is not one of
        megatron.remove(BEHIND)
    run_tool(lambda: run(args, megatron), as_json=args.json)
