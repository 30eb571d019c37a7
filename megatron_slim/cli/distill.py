"""Train or distil: start the processes of a run, here (torchrun), on several machines, or as a Slurm job.

Runs pretrain_distill.sh, whose variables are the arguments below: TEACHER is --teacher. What is not given, the section
train of --recipe says, and then a variable of the environment. All other arguments, and all behind --, go to Megatron
and take precedence; `megatron-slim pretrain --help` lists those of distillation. With --json the last line of standard
output is what `megatron-slim show-run SAVE --json` gives when the run has ended, and save, its directory.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_slim.aliases import JsonObject
from megatron_slim.cli.tool import run_tool
from megatron_slim.command_line import tool_parser
from megatron_slim.errors import EXIT_USER_ERROR, SlimError
from megatron_slim.extras import require
from megatron_slim.packaged import directory
from megatron_slim.processes import run_to_end
from megatron_slim.training.run_view import read_run, summary
from megatron_slim.training.variables import BEHIND, add_variables, as_text, flag, with_recipe

SCRIPT = "pretrain_distill.sh"


def parser(prog: str) -> argparse.ArgumentParser:
    """The command's parser; what it does not know is Megatron's."""
    found = tool_parser(__doc__ or "")
    found.prog = prog
    found.formatter_class = argparse.RawDescriptionHelpFormatter
    add_variables(found)
    return found


def environment(given: Mapping[str, str], before: Mapping[str, str]) -> dict[str, str]:
    """The environment of the script: what was given, and before that the caller's own, without another length.

    Nodes run this Python; a container has its own.
    """
    length = {"TRAIN_ITERS", "TOKENS"}
    own = {name: value for name, value in before.items() if not (name in length and length & given.keys())}
    found = {**own, **given}
    return found if found.get("IMAGE") else {"PYTHON": sys.executable, **found}


def train(command: Sequence[str], env: Mapping[str, str]) -> JsonObject:
    """Run the script to its end and read what the run has logged.

    Returns:
        `run_view.summary`, and ``save``; nothing on other machines than the first.

    Raises:
        SlimError: nothing is run, or the run cannot be read.
        SystemExit: the script has failed, and has printed why.
    """
    for name, value in (("LAUNCHER", "slurm"), ("DRY_RUN", "1")):
        if env.get(name) == value:
            raise SlimError(f"--json with {flag(name)}: there is no run to show", fix="leave one of the two out")
    require("plots", "tensorboard", "--json")
    if code := run_to_end(command, env=dict(env)):
        raise SystemExit(code)
    return {"save": env["SAVE"], **summary(read_run(Path(env["SAVE"])))} if _is_first(env) else {}


def _is_first(env: Mapping[str, str]) -> bool:
    return env.get("NODE_RANK", "0") == "0"


def main(argv: Sequence[str], prog: str) -> None:
    """Replace this process by the script; with ``--json``, run it and print the results."""
    given, others = parser(prog).parse_known_args(argv)
    if BEHIND in others:  # in front of Megatron's own, which it is not one of
        others.remove(BEHIND)
    values = vars(given)
    as_json = values.pop("json")
    try:
        said, flags = with_recipe(as_text(values))
    except SlimError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(EXIT_USER_ERROR) from None
    command, env = ["bash", str(directory() / SCRIPT), *flags, *others], environment(said, os.environ)
    if as_json:
        run_tool(lambda: train(command, env), as_json=_is_first(env))
        return
    sys.stdout.flush()
    os.execvpe("bash", command, env)
