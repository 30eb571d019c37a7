"""What all commands share: the argument parser, its types, and the arguments of reading and writing checkpoints."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from megatron_slim import __version__
from megatron_slim.aliases import ArgumentGroup, ReadOptions, WriteOptions
from megatron_slim.errors import EXIT_USER_ERROR

CUT, DROP = "cut", "drop"
TOO_LONG = (CUT, DROP)  # what becomes of a conversation longer than a sample
RECIPE_HELP = "sizes and methods: a YAML file, or a name that `megatron-slim recipes` lists"


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the defaults that say something: not those of flags, not None, not an empty list."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return super()._get_help_string(action) if action.default not in (None, False, (), []) else action.help


class ToolParser(argparse.ArgumentParser):
    """An argument parser whose error is one line, as every other error of a tool is."""

    def error(self, message: str) -> NoReturn:
        """End the tool."""
        self.exit(EXIT_USER_ERROR, f"error: {message}; see {self.prog} --help\n")


def positive(text: str) -> int:
    """An argparse type: an integer above zero."""
    return _integer(text, 1, "a positive integer")


def not_negative(text: str) -> int:
    """An argparse type: an integer that is not below zero."""
    return _integer(text, 0, "an integer that is zero or more")


def _integer(text: str, least: int, wanted: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if value < least:
        raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")
    return value


def last_value(words: Sequence[str], flag: str) -> str | None:
    """What a command line says last with a flag, as ``FLAG VALUE`` or ``FLAG=VALUE``; None where it has none.

    >>> last_value(["--lr", "1", "--lr=2", "--bf16"], "--lr")
    '2'
    """
    found = None
    for at, word in enumerate(words):
        name, equals, value = word.partition("=")
        if name == flag and (equals or at + 1 < len(words)):
            found = value if equals else words[at + 1]
    return found


def tool_parser(description: str, *, as_json: bool = True) -> argparse.ArgumentParser:
    """An argument parser with the arguments that every command has; ``as_json``: it can give its results as JSON."""
    parser = ToolParser(description=description, formatter_class=HelpFormatter, allow_abbrev=False)
    if as_json:
        parser.add_argument("--json", action="store_true", help="make the last line of standard output one JSON object")
    parser.add_argument("--version", action="version", version=f"megatron_slim {__version__}")
    return parser


def add_load_arguments(parser: argparse.ArgumentParser, purpose: str, flag: str = "--load") -> None:
    """``--load`` and how to read it, the same in every tool that reads a checkpoint; ``purpose`` is a verb."""
    parser.add_argument(
        flag,
        dest="load",
        type=Path,
        required=True,
        metavar="DIR",
        help=f"checkpoint to {purpose}, Hugging Face or torch_dist: the format is detected",
    )
    parser.add_argument(
        "--hf-config",
        type=Path,
        metavar="DIR",
        help="directory with config.json and tokenizer of a torch_dist checkpoint, where they are not in its hf/",
    )
    parser.add_argument(
        "--dequantize-fp8", action="store_true", help="read a Hugging Face checkpoint in block-scaled FP8 as bfloat16"
    )
    parser.add_argument(
        "--verify-integrity", action="store_true", help="compare all files of a torch_dist checkpoint with their hashes"
    )
    parser.add_argument(
        "--without-mtp",
        action="store_true",
        help="read the checkpoint as a model without MTP, whether it has the tensors or not",
    )


def load_options(args: argparse.Namespace) -> ReadOptions:
    """The options of `checkpoint.convert.open_checkpoint` that these arguments gave."""
    return {
        "hf_config": args.hf_config,
        "dequantize_fp8": args.dequantize_fp8,
        "without_mtp": args.without_mtp,
        "verify_integrity": args.verify_integrity,
        "allow_nonfinite": getattr(args, "allow_nonfinite", False),  # of the tools that write checkpoints
    }


# What a tool says of a checkpoint that it has written, by whether it was verified.
VERIFICATION = {True: "read back and verified", False: "NOT verified (--no-verify)"}


def add_write_arguments(parser: argparse.ArgumentParser) -> None:
    """What the tools that write checkpoints share: what they accept of the source, and how they write."""
    group = parser.add_argument_group("reading and writing")
    group.add_argument("--allow-nonfinite", action="store_true", help="accept NaN and infinite weights")
    group.add_argument("--no-verify", action="store_true", help="do not read the result back and compare it")
    group.add_argument(
        "--expert-storage",
        choices=("fused", "separate"),
        help="experts in Hugging Face files: one tensor for all experts of a layer, or separate ones (default: as in "
        "the source); a torch_dist checkpoint records it",
    )
    group.add_argument(
        "--processes", type=positive, metavar="N", help="write with N processes (default: chosen by size and cores)"
    )


def write_options(args: argparse.Namespace) -> WriteOptions:
    """The options of `checkpoint.convert.write_checkpoint` that `add_write_arguments` gave."""
    return {
        "verify": not args.no_verify,
        "processes": args.processes,
        "expert_storage": args.expert_storage,
        "arguments": vars(args),
    }


def add_chat_arguments(parser: ArgumentGroup) -> None:
    """What becomes of conversations that do not fit into a sample, or whose history changes, with Megatron too."""
    parser.add_argument(
        "--too-long",
        choices=TOO_LONG,
        default=CUT,
        help="cut a conversation that is longer than a sample at the sample's end, or drop it; both are counted",
    )
    parser.add_argument(
        "--unroll",
        action="store_true",
        help="make several documents of a conversation whose earlier turns the template writes in another way once "
        "later ones follow; without it such a line is a bad one",
    )
