"""Tokenize text into Megatron's .bin/.idx: PREFIX_{key}_document, or PREFIX_{key}_sentence with --split-sentences."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_slim.cli.tool import run_command
from megatron_slim.command_line import positive
from megatron_slim.tokenizers import TOKENIZER_TYPES

logger = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    data = parser.add_argument_group("input and output")
    data.add_argument(
        "--input",
        type=Path,
        nargs="+",
        required=True,
        metavar="FILE",
        help=".jsonl or .json (one JSON object a line) or .txt (one document a file), each also as .gz",
    )
    data.add_argument("--json-keys", nargs="+", default=["text"], metavar="KEY", help="keys of a line to tokenize")
    data.add_argument(
        "--output-prefix", type=Path, metavar="PREFIX", required=True, help="path of the outputs without suffix"
    )
    data.add_argument(
        "--skip-bad-lines",
        action="store_true",
        help="leave out lines (and .txt files) that are not UTF-8 or not JSON, lack a text, or that the tokenizer "
        "fails on, and say how many; without it the first ends the tool",
    )
    tokens = parser.add_argument_group("tokens")
    tokens.add_argument(
        "--tokenizer-type", choices=TOKENIZER_TYPES, default=TOKENIZER_TYPES[0], help="kind of tokenizer"
    )
    tokens.add_argument(
        "--tokenizer-model", type=Path, metavar="PATH", required=True, help="local directory (Hugging Face) or file"
    )
    tokens.add_argument("--append-eod", action="store_true", help="end every document with the tokenizer's eos")
    tokens.add_argument("--split-sentences", action="store_true", help="one sequence per sentence (nltk's Punkt)")
    tokens.add_argument("--lang", help="language of an installed nltk punkt_tab model; without it Punkt is untrained")
    runtime = parser.add_argument_group("runtime")
    runtime.add_argument(
        "--workers",
        type=positive,
        metavar="N",
        default=1,
        help="processes that tokenize; they do not change the output",
    )
    runtime.add_argument("--log-interval", type=positive, metavar="N", help="log a line every N documents")


def preprocess(args: argparse.Namespace) -> dict[str, Any]:
    """Tokenize, say what was written."""
    from megatron_slim import preprocessing
    from megatron_slim.encoding import Options

    options = Options(
        tokenizer_type=args.tokenizer_type,
        tokenizer_model=args.tokenizer_model,
        json_keys=tuple(dict.fromkeys(args.json_keys)),
        append_eod=args.append_eod,
        split_sentences=args.split_sentences,
        lang=args.lang,
        skip_bad_lines=args.skip_bad_lines,
    )
    results = preprocessing.preprocess(
        args.input, args.output_prefix, options, workers=args.workers, log_interval=args.log_interval
    )
    if results["bad_lines"]:
        logger.info(f"left out lines: {results['bad_lines']}, the first: {results['first_bad_line']}")
    if results["replaced_documents"]:
        found = f"{results['replaced_documents']} documents had halves of surrogate pairs, now U+FFFD"
        logger.info(f"{found}, the first: {results['first_replaced']}")
    logger.info(f"{results['documents']} documents, {results['tokens']} tokens -> {results['prefix']}.bin/.idx")
    return results


def main(argv: Sequence[str], prog: str) -> None:
    """Run the command."""
    run_command(__doc__ or "", add_arguments, preprocess, argv, prog)
