"""The variables of a run, which are arguments of `megatron-slim distill`, as Megatron's arguments (no torch).

pretrain_distill.sh starts the processes of a run and passes on what is set; each of them makes Megatron's arguments of
it here. Planning does the same of a layout. The section ``train`` of a recipe is another source of variables: those of
processes have to be known before there are any, so `megatron-slim distill` reads it, and a rank that is started alone.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from megatron_slim.command_line import ToolParser, last_value, not_negative, positive
from megatron_slim.errors import SlimError
from megatron_slim.optimizers import OPTIMIZERS
from megatron_slim.packaged import find_recipe
from megatron_slim.recipe import load_recipe
from megatron_slim.recipe_budget import whole_number
from megatron_slim.sample_set import length_of_samples

# SlimQwen, 400B-token setting.
DEFAULTS = {
    "TP": "1",
    "PP": "1",
    "EP": "1",
    "SEQ_LENGTH": "4096",
    "MICRO_BATCH_SIZE": "1",
    "GLOBAL_BATCH_SIZE": "1024",
    "TRAIN_ITERS": "95368",
    "LR": "4e-4",
    "MIN_LR": "3e-5",
    "SAVE_INTERVAL": "1000",
    "EVAL_INTERVAL": "1000",
    "EVAL_ITERS": "10",
    "LOG_INTERVAL": "10",
}
DEFAULT_WARMUP, SPLIT = "2000", "990,5,5"
_D = DEFAULTS
# By group: kind of value, and help.
GROUPS: dict[str, dict[str, tuple[str, str]]] = {
    "models and data": {
        "STUDENT": ("DIR", "checkpoint to start from, either format"),
        "HF_CONFIG": ("DIR", "in place of --student: directory of a config.json, for random weights"),
        "TEACHER": ("DIR", "checkpoint of the teacher, either format; without it the run is LM + MTP-LM training"),
        "TEACHER_CACHE": ("DIR", "in place of --teacher: what megatron-slim record wrote, whose samples are the data"),
        "DATA": (
            "PREFIX ...",
            "training data: .bin/.idx prefixes or sample sets, weights in front or none",
        ),
        "VALID_DATA": ("PREFIX ...", "validation data; without it a part of --data is set aside"),
        "SAVE": ("DIR", "checkpoints and logs; a run found there is resumed"),
    },
    "processes": {
        "TP": ("N", f"tensor parallel size ({_D['TP']})"),
        "PP": ("N", f"pipeline parallel size ({_D['PP']})"),
        "EP": ("N", f"expert parallel size ({_D['EP']})"),
        "NPROC_PER_NODE": ("N", "processes of a machine (one for each GPU; without GPUs TP x PP x EP)"),
        "NNODES": ("N", "number of machines (1)"),
        "NODE_RANK": ("K", "number of this machine, from 0 (0)"),
        "MASTER_ADDR": ("HOST", "address of the first machine (127.0.0.1)"),
        "MASTER_PORT": ("PORT", "port of the first machine (29500)"),
        "LAUNCHER": ("NAME", "torchrun, or slurm to submit a job (torchrun)"),
        "PROGRAM": ("FILE", "Python program in place of ours: registers something of its own, and calls our main"),
        "SETTINGS": ("NAME", "layout and batch of h100_8, h100_64, h100_256, h200_8, h200_64 or h200_256; or a file"),
        "IMAGE": ("IMAGE", "container of a Slurm job: *.sif for apptainer, anything else for pyxis"),
        "MOUNTS": ("PATHS", "more paths for the container, comma-separated"),
    },
    "run": {
        "SEQ_LENGTH": ("N", f"tokens of a sample ({_D['SEQ_LENGTH']}; those of a sample set or cache have their own)"),
        "MICRO_BATCH_SIZE": ("N", f"samples of a forward pass ({_D['MICRO_BATCH_SIZE']})"),
        "GLOBAL_BATCH_SIZE": ("N", f"samples of a step ({_D['GLOBAL_BATCH_SIZE']})"),
        "TRAIN_ITERS": ("N", f"steps ({_D['TRAIN_ITERS']}: 400B tokens)"),
        "TOKENS": ("T", "in place of --train-iters: tokens of the run, such as 40B"),
        "LR": ("X", f"learning rate ({_D['LR']})"),
        "MIN_LR": ("X", f"learning rate at the end ({_D['MIN_LR']})"),
        "LR_WARMUP_ITERS": ("N", f"warm-up steps ({DEFAULT_WARMUP}, or a tenth of a short run)"),
        "SAVE_INTERVAL": ("N", f"steps between checkpoints ({_D['SAVE_INTERVAL']})"),
        "EVAL_INTERVAL": ("N", f"steps between validations ({_D['EVAL_INTERVAL']})"),
        "EVAL_ITERS": ("N", f"steps of a validation ({_D['EVAL_ITERS']})"),
        "LOG_INTERVAL": ("N", f"steps between lines of the log ({_D['LOG_INTERVAL']})"),
        "PRECISION": ("TYPE", "bf16 or fp32 (bf16 on GPUs, else fp32)"),
        "PROGRESSIVE": ("", "the student is that of one phase of a recipe: use one schedule for all phases"),
        "CARRY_OPTIMIZER": ("", "begin with the moments that megatron-slim prune --carry-optimizer put into --student"),
        "STAGE_WARMUP": ("N", "with --progressive: warm-up steps of the phase, from a tenth of the learning rate (0)"),
        "DRY_RUN": ("", "print the commands and do nothing"),
    },
}
VARIABLES = {name: value for group in GROUPS.values() for name, value in group.items()}
# Numbers that may be zero: no validation, no warm-up.
_OR_ZERO = ("EVAL_ITERS", "LR_WARMUP_ITERS")
# What Megatron, or our group of its arguments, calls otherwise; and what all runs have.
_NAMES = {
    "TP": "--tensor-model-parallel-size",
    "PP": "--pipeline-model-parallel-size",
    "EP": "--expert-model-parallel-size",
    "STUDENT": "--pretrained-checkpoint",
    "TEACHER": "--teacher-load",
}
_SAME_NAMES = (
    "HF_CONFIG TEACHER_CACHE SEQ_LENGTH MICRO_BATCH_SIZE GLOBAL_BATCH_SIZE TRAIN_ITERS LR MIN_LR LR_WARMUP_ITERS "
    "SAVE_INTERVAL EVAL_INTERVAL EVAL_ITERS LOG_INTERVAL STAGE_WARMUP"
).split()
_ALWAYS = "--use-distributed-optimizer --lr-decay-style cosine --clip-grad 1.0 --distributed-timeout-minutes 30".split()
RECIPE = "RECIPE"  # of the command alone, and not of the script
# Keys of ``train`` that are not variables: flags, and what becomes of an optimizer between phases.
_NOT_VARIABLES = ("flags", "carry_optimizer", "moments_of_merged", "record")
COUNTED = ("SEQ_LENGTH", "GLOBAL_BATCH_SIZE")  # whose product is the tokens of a step
BEHIND = "--"  # what stands behind it goes to Megatron as it is


def flag(variable: str) -> str:
    """The argument of a variable: ``--valid-data`` of ``VALID_DATA``."""
    return "--" + variable.lower().replace("_", "-")


def add_variables(parser: argparse.ArgumentParser, *, checked: bool = True) -> None:
    """Add an argument for each variable; what is not given is None.

    Args:
        parser: of a command.
        checked: numbers are; else they are left as they are, as those of an environment are.
    """
    help_text = "file, or a name that `megatron-slim recipes` lists: its section train says what is not given here"
    parser.add_argument(flag(RECIPE), dest=RECIPE, metavar="YAML", help=help_text)
    for title, variables in GROUPS.items():
        group = parser.add_argument_group(title)
        for name, (kind, text) in variables.items():
            if not kind:
                group.add_argument(flag(name), dest=name, action="store_const", const="1", help=text)
            elif kind.endswith("..."):
                word = kind.split()[0]
                group.add_argument(flag(name), dest=name, nargs="+", action="extend", metavar=word, help=text)
            else:
                number = (not_negative if name in _OR_ZERO else positive) if checked and kind == "N" else str
                number = tokens if kind == "T" else number
                group.add_argument(flag(name), dest=name, type=number, metavar=kind, help=text)


def tokens(text: str) -> int:
    """An argparse type: a number of tokens, such as 40B."""
    found = whole_number(text)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of tokens, such as 40B or 4e10")
    return found


def with_recipe(given: Mapping[str, str]) -> tuple[dict[str, str], list[str]]:
    """What is given and, for the rest, what the section ``train`` of the recipe says that ``RECIPE`` names.

    Args:
        given: values by the names of variables.

    Returns:
        values of variables, and the recipe's flags for Megatron, before which others take precedence.

    Raises:
        RecipeError: there is no such recipe, or it breaks the schema.
    """
    values = dict(given)
    if (recipe := values.pop(RECIPE, None)) is None:
        return values, []
    file = find_recipe(Path(recipe))
    train = load_recipe(file).run.get("train", {})
    said = {key.upper(): str(value) for key, value in train.items() if key not in _NOT_VARIABLES}
    if "TRAIN_ITERS" in values:
        said.pop("TOKENS", None)
    if "TEACHER" in values:
        said.pop("TEACHER_CACHE", None)
    elif "TEACHER_CACHE" in said:
        said["TEACHER_CACHE"] = str((file.parent / said["TEACHER_CACHE"]).absolute())
    return said | values, list(train.get("flags", ()))


def as_text(given: Mapping[str, object]) -> dict[str, str]:
    """Values of variables as a shell has them; without those that are None.

    Raises:
        SlimError: an element of a list has a space, which separates elements.
    """
    values = {name: value for name, value in given.items() if value is not None}
    for name, value in values.items():
        refuse_spaces(flag(name), map(str, value if isinstance(value, list) else ()))
    return {name: " ".join(value) if isinstance(value, list) else str(value) for name, value in values.items()}


def refuse_spaces(argument: str, words: Iterable[str]) -> None:
    """Refuse names of data that a variable, which holds them with spaces between, would have as several.

    Raises:
        SlimError: names the argument and the first of them.
    """
    for word in words:
        if len(word.split()) != 1:
            fix = "give it a name without, such as by a link"
            raise SlimError(f"{argument} {word!r} has a space, which separates data sets", fix=fix)


def megatron_arguments(given: Mapping[str, str], *, in_samples: bool = False) -> list[str]:
    """Megatron's arguments, and ours, for what is set; for the rest, `DEFAULTS`.

    Args:
        given: values by the names of variables; those of processes say nothing here, but for the parallel sizes.
        in_samples: how long the run is, flags of Megatron say in samples: there is no default in steps.

    >>> megatron_arguments({"TP": "2", "PRECISION": "bf16"})[-4:]
    ['--default-lr-warmup-iters', '2000', '--sequence-parallel', '--bf16']
    """
    without = "TRAIN_ITERS" if in_samples else None
    return [*_words(given, {name: value for name, value in DEFAULTS.items() if name != without})]


def _words(given: Mapping[str, str], defaults: Mapping[str, str]) -> Iterator[str]:
    own = [given["TEACHER_CACHE"]] if "TEACHER_CACHE" in given else []
    train, valid = (given.get(name, "").split() for name in ("DATA", "VALID_DATA"))
    length = None if "SEQ_LENGTH" in given else length_of_samples([*own, *train])
    values = {**defaults, **({} if length is None else {"SEQ_LENGTH": str(length)}), **given}
    if values.get("PROGRESSIVE") == "1" and "TRAIN_ITERS" not in given:
        values.pop("TRAIN_ITERS", None)  # the phases' tokens say
    if "TOKENS" in values:
        if "TRAIN_ITERS" in given or values.get("PROGRESSIVE") == "1":
            other = "--train-iters" if "TRAIN_ITERS" in given else "--progressive, where every phase has its own"
            raise SlimError(f"--tokens with {other}", fix="leave one of the two out")
        step = math.prod(_whole(values, name) for name in COUNTED)
        values["TRAIN_ITERS"] = str(math.ceil(int(values["TOKENS"]) / step))
    for name, theirs in (_NAMES | {name: flag(name) for name in _SAME_NAMES}).items():
        if name in values:
            yield from (theirs, values[name])
    yield from _ALWAYS
    if (save := values.get("SAVE")) is not None:
        yield from ("--save", save, "--load", save)
        yield from ("--tensorboard-dir", f"{save}/tensorboard", "--data-cache-path", f"{save}/data-cache")
    yield from _data(train, valid, own)
    if "LR_WARMUP_ITERS" not in values:
        yield from ("--default-lr-warmup-iters", DEFAULT_WARMUP)
    if _whole(values, "TP") > 1:
        yield "--sequence-parallel"
    if values.get("PRECISION") == "bf16":
        yield "--bf16"
    if values.get("PROGRESSIVE") == "1":
        yield "--progressive-schedule"
    if values.get("CARRY_OPTIMIZER") == "1":
        yield "--carry-optimizer"


def _whole(values: Mapping[str, str], name: str) -> int:
    """A number above zero of an environment, which nobody has checked."""
    if not values[name].isdecimal() or int(values[name]) == 0:
        raise SlimError(f"{name}={values[name]} is not a whole number above zero")
    return int(values[name])


def _data(train: Sequence[str], valid: Sequence[str], own: Sequence[str]) -> Iterator[str]:
    """Data, and how they are divided; ``own``: the cache that has some, where none are named."""
    if valid:
        yield from ("--train-data-path", *(train or own), "--valid-data-path", *valid, "--test-data-path", *valid)
    elif train:
        yield from ("--data-path", *train, "--split", SPLIT)
    elif own:
        yield from ("--split", SPLIT)


def expand(argv: Sequence[str], prog: str = "megatron-slim pretrain") -> list[str]:
    """A command line for Megatron: arguments of variables in front of `BEHIND` become Megatron's.

    Args:
        argv: without `BEHIND`, all is Megatron's already. In front of it ``--recipe`` may name a recipe. What stands
            behind comes last, and so takes precedence.
        prog: the command's name, for what is wrong with it.

    >>> expand(["--tp", "2", "--lr", "1", "--", "--lr", "3"], "")[-3:]
    ['--sequence-parallel', '--lr', '3']
    """
    if BEHIND not in argv:
        return list(argv)
    place = list(argv).index(BEHIND)
    parser = ToolParser(prog=prog, add_help=False, allow_abbrev=False)
    add_variables(parser, checked=False)  # by Megatron's parser
    values, flags = with_recipe(as_text(vars(parser.parse_args(argv[:place]))))
    behind = [*flags, *argv[place + 1 :]]
    if "TOKENS" in values:  # are counted in the steps that are trained
        said = {name: last_value(behind, flag(name)) for name in COUNTED}
        values |= {name: value for name, value in said.items() if value is not None}
    in_samples = last_value(behind, "--train-samples") is not None
    return without_shards_of_matrices([*megatron_arguments(values, in_samples=in_samples), *behind])


def without_shards_of_matrices(argv: Sequence[str]) -> list[str]:
    """A command line without what is always given, where its optimizer cannot have it: matrices in fp32.

    >>> without_shards_of_matrices([*_ALWAYS[:3], "--optimizer", "muon"])
    ['--lr-decay-style', 'cosine', '--optimizer', 'muon']
    """
    words = [*argv]
    optimizer = last_value(words, "--optimizer")
    if "--bf16" not in words and optimizer in OPTIMIZERS and OPTIMIZERS[optimizer].has_matrices:
        words = [word for word in words if word != _ALWAYS[0]]
    return words
