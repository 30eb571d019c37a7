"""Train or distil: start the processes of a run, here (torchrun), on several machines, or as a Slurm job.

Runs pretrain_distill.sh, whose variables are the arguments below: TEACHER is --teacher. A variable of the environment
is used where its argument is not given. All other arguments go to Megatron unchanged and take precedence;
`megatron-slim pretrain --help` lists those of distillation. With --json the last line of standard output is what
`megatron-slim show-run SAVE --json` gives when the run has ended, and save, its directory.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_slim.cli.tool import run_tool
from megatron_slim.command_line import not_negative, positive, tool_parser
from megatron_slim.errors import SlimError
from megatron_slim.extras import require
from megatron_slim.packaged import directory
from megatron_slim.processes import run_to_end
from megatron_slim.training.run_view import read_run, summary

SCRIPT = "pretrain_distill.sh"
# Variables of the script by group: kind of value, and help.
GROUPS: dict[str, dict[str, tuple[str, str]]] = {
    "models and data": {
        "STUDENT": ("DIR", "checkpoint to start from, either format"),
        "HF_CONFIG": ("DIR", "in place of --student: directory of a config.json, for random weights"),
        "TEACHER": ("DIR", "checkpoint of the teacher, either format; without it the run is LM + MTP-LM training"),
        "DATA": ("PREFIX ...", "training data: .bin/.idx prefixes, or weights and prefixes"),
        "VALID_DATA": ("PREFIX ...", "validation data; without it a part of --data is set aside"),
        "SAVE": ("DIR", "checkpoints and logs; a run found there is resumed"),
    },
    "processes": {
        "TP": ("N", "tensor parallel size (1)"),
        "PP": ("N", "pipeline parallel size (1)"),
        "EP": ("N", "expert parallel size (1)"),
        "NPROC_PER_NODE": ("N", "processes of a machine (one for each GPU; without GPUs TP x PP x EP)"),
        "NNODES": ("N", "number of machines (1)"),
        "NODE_RANK": ("K", "number of this machine, from 0 (0)"),
        "MASTER_ADDR": ("HOST", "address of the first machine (127.0.0.1)"),
        "MASTER_PORT": ("PORT", "port of the first machine (29500)"),
        "LAUNCHER": ("NAME", "torchrun, or slurm to submit a job (torchrun)"),
        "SETTINGS": ("NAME", "layout and batch of h100_8, h100_64, h100_256, h200_8, h200_64 or h200_256; or a file"),
        "IMAGE": ("IMAGE", "container of a Slurm job: *.sif for apptainer, anything else for pyxis"),
        "MOUNTS": ("PATHS", "more paths for the container, comma-separated"),
    },
    "run": {
        "SEQ_LENGTH": ("N", "tokens of a sample (4096)"),
        "MICRO_BATCH_SIZE": ("N", "samples of a forward pass (1)"),
        "GLOBAL_BATCH_SIZE": ("N", "samples of a step (1024)"),
        "TRAIN_ITERS": ("N", "steps (95368: 400B tokens)"),
        "LR": ("X", "learning rate (4e-4)"),
        "MIN_LR": ("X", "learning rate at the end (3e-5)"),
        "LR_WARMUP_ITERS": ("N", "warm-up steps (2000, or a tenth of a short run)"),
        "SAVE_INTERVAL": ("N", "steps between checkpoints (1000)"),
        "EVAL_INTERVAL": ("N", "steps between validations (1000)"),
        "EVAL_ITERS": ("N", "steps of a validation (10)"),
        "LOG_INTERVAL": ("N", "steps between lines of the log (10)"),
        "PRECISION": ("TYPE", "bf16 or fp32 (bf16 on GPUs, else fp32)"),
        "PROGRESSIVE": ("", "the student is that of one phase of a recipe: use one schedule for all phases"),
        "CARRY_OPTIMIZER": ("", "begin with the moments that megatron-slim prune --carry-optimizer put into --student"),
        "STAGE_WARMUP": ("N", "with --progressive: warm-up steps of the phase, from a tenth of the learning rate (0)"),
        "DRY_RUN": ("", "print the commands and do nothing"),
    },
}
# Numbers that may be zero: no validation, no warm-up.
_OR_ZERO = ("EVAL_ITERS", "LR_WARMUP_ITERS")
VARIABLES = {name: value for group in GROUPS.values() for name, value in group.items()}


def flag(variable: str) -> str:
    """The argument of a variable: ``--valid-data`` of ``VALID_DATA``."""
    return "--" + variable.lower().replace("_", "-")


def parser(prog: str) -> argparse.ArgumentParser:
    """The command's parser; what it does not know is Megatron's."""
    found = tool_parser(__doc__ or "")
    found.prog = prog
    found.formatter_class = argparse.RawDescriptionHelpFormatter
    for title, variables in GROUPS.items():
        group = found.add_argument_group(title)
        for name, (kind, text) in variables.items():
            if not kind:
                group.add_argument(flag(name), dest=name, action="store_const", const="1", help=text)
            elif kind.endswith("..."):
                group.add_argument(flag(name), dest=name, nargs="+", metavar=kind.split()[0], help=text)
            else:
                number = not_negative if name in _OR_ZERO else positive
                group.add_argument(flag(name), dest=name, type=number if kind == "N" else str, metavar=kind, help=text)
    return found


def environment(given: Mapping[str, object], before: Mapping[str, str]) -> dict[str, str]:
    """The environment of the script: what was given, and before that the caller's own."""
    values = {name: value for name, value in given.items() if value is not None}
    words = {name: " ".join(value) if isinstance(value, list) else str(value) for name, value in values.items()}
    return {"PYTHON": sys.executable, **before, **words}


def train(command: Sequence[str], env: Mapping[str, str]) -> dict[str, Any]:
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
    values = vars(given)
    as_json, command = values.pop("json"), ["bash", str(directory() / SCRIPT), *others]
    env = environment(values, os.environ)
    if as_json:
        run_tool(lambda: train(command, env), as_json=_is_first(env))
        return
    sys.stdout.flush()
    os.execvpe("bash", command, env)
