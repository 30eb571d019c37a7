"""``megatron-slim COMMAND ...``: all commands, each in a module of its own that is imported when it is called."""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Sequence

from megatron_slim import __version__
from megatron_slim.errors import EXIT_USER_ERROR

PROG = "megatron-slim"
# In the order of use. The name of a module is that of its command, with underscores.
COMMANDS = {
    "run": "compress a model: prune, train, export and evaluate, as a recipe says",
    "doctor": "check this machine, and the data and checkpoints of a run",
    "recipes": "list the recipes that come with the package",
    "preprocess": "tokenize text into Megatron's .bin/.idx",
    "convert": "convert between Hugging Face and torch_dist, bit for bit",
    "calibrate": "measure the importances that pruning is based on",
    "plan": "make a pruning plan from a recipe and statistics",
    "show-plan": "show a plan as tables, and as a page with pictures",
    "prune": "calibrate, plan, prune and verify in one command",
    "slice": "write one budget of an elastic checkpoint as a checkpoint of its own",
    "sort": "sort an elastic checkpoint so that each budget is the first part of every axis",
    "record": "record a teacher's hidden states, to train without the teacher",
    "plan-parallelism": "find the parallel layouts that fit a number of GPUs",
    "show-optimizer": "show which optimizer updates what of a model",
    "distill": "train or distil: start the processes of a run",
    "show-run": "show a training run as tables and as a picture",
    "evaluate": "measure losses of a checkpoint, distance from a teacher, and tasks",
    "pretrain": "one process of a training run, started by distill",
    "torchrun": "torchrun with exit codes that distinguish errors",
}


def overview() -> str:
    """What ``megatron-slim --help`` prints."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {what}" for name, what in COMMANDS.items()]
    return "\n".join(
        [
            f"usage: {PROG} COMMAND [arguments]",
            "",
            "Compress Mixture-of-Experts language models on Megatron-Core.",
            "",
            "commands:",
            *lines,
            "",
            f"{PROG} COMMAND --help lists the arguments of a command, {PROG} --version prints the version.",
        ]
    )


def run(command: str, argv: Sequence[str], prog: str) -> None:
    """Run one command; ``prog`` is the name under which it was called."""
    importlib.import_module(f"megatron_slim.cli.{command.replace('-', '_')}").main(argv, prog)


def main() -> None:
    """The console script."""
    command, *argv = sys.argv[1:] or ["--help"]
    if command in ("-h", "--help"):
        print(overview())
    elif command == "--version":
        print(f"megatron_slim {__version__}")
    elif command in COMMANDS:
        run(command, argv, f"{PROG} {command}")
    else:
        close = difflib.get_close_matches(command, COMMANDS, n=1)
        hint = f"did you mean {close[0]}?" if close else f"see {PROG} --help"
        print(f"error: there is no command {command!r}; {hint}", file=sys.stderr)
        raise SystemExit(EXIT_USER_ERROR)
