"""Tokenize text into Megatron's .bin/.idx, PREFIX_{key}_document, or conversations into packed samples, with --chat."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

from megatron_slim.aliases import JsonObject, Keywords
from megatron_slim.cli.tool import run_command
from megatron_slim.command_line import CUT, add_chat_arguments, positive
from megatron_slim.errors import SlimError
from megatron_slim.tokenizers import TOKENIZER_TYPES

logger = logging.getLogger(__name__)

JSON_KEY = "text"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    data = parser.add_argument_group("input and output")
    data.add_argument(
        "--input",
        type=Path,
        nargs="+",
        action="extend",
        required=True,
        metavar="FILE",
        help=".jsonl or .json (one JSON object a line) or .txt (one document a file), each also as .gz",
    )
    data.add_argument(
        "--json-keys",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY",
        help=f"keys of a line to tokenize (default: {JSON_KEY})",
    )
    data.add_argument(
        "--output-prefix",
        type=Path,
        metavar="PREFIX",
        required=True,
        help="path of the outputs without suffix; with --chat the directory of the samples",
    )
    data.add_argument(
        "--skip-bad-lines",
        action="store_true",
        help="leave out lines (and .txt files) that are not UTF-8 or not JSON, lack a text, or that the tokenizer "
        "or chat template fails on, and say how many; without it the first ends the tool",
    )
    chat = parser.add_argument_group("conversations")
    chat.add_argument(
        "--chat",
        action="store_true",
        help="lines have messages, which the tokenizer's chat template writes; the loss is on the assistant's tokens",
    )
    chat.add_argument("--seq-length", type=positive, metavar="N", help="positions of a sample, that of the training")
    add_chat_arguments(chat)
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


def pack(args: argparse.Namespace) -> JsonObject:
    """Pack conversations."""
    from megatron_slim.chats import ChatOptions, make_samples

    _refuse(args, _OF_TEXT, "does not go with --chat")
    if args.seq_length is None:
        raise SlimError("--chat needs the length of samples", fix="give --seq-length, that of the training")
    options = ChatOptions(args.tokenizer_model, args.seq_length, args.too_long, args.unroll, args.skip_bad_lines)
    found = make_samples(args.input, args.output_prefix, options, workers=args.workers)
    if found["bad_lines"]:
        logger.info(f"left out lines: {found['bad_lines']}, the first: {found['first_bad_line']}")
    return found


# Options of the one kind of data that the other would not heed, and what they are without being given.
_OF_TEXT = {"json_keys": [], "append_eod": False, "split_sentences": False, "lang": None, "log_interval": None}
_OF_TEXT |= {"tokenizer_type": TOKENIZER_TYPES[0]}
_OF_CHATS = {"seq_length": None, "too_long": CUT, "unroll": False}


def _refuse(args: argparse.Namespace, options: Keywords, why: str) -> None:
    for name, default in options.items():
        if getattr(args, name) != default:
            raise SlimError(f"--{name.replace('_', '-')} {why}", fix="leave it out")


def preprocess(args: argparse.Namespace) -> JsonObject:
    """Tokenize, say what was written."""
    if args.chat:
        return pack(args)
    _refuse(args, _OF_CHATS, "is for conversations, with --chat")
    if not args.split_sentences:
        _refuse(args, {"lang": None}, "is of --split-sentences")
    from megatron_slim import preprocessing
    from megatron_slim.encoding import Options

    options = Options(
        tokenizer_type=args.tokenizer_type,
        tokenizer_model=args.tokenizer_model,
        json_keys=tuple(dict.fromkeys(args.json_keys or [JSON_KEY])),
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
