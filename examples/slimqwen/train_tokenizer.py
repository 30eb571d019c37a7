#!/usr/bin/env python3
"""Train a byte-level BPE tokenizer and save it as a Hugging Face tokenizer directory."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_slim.cli.terminal import say
from megatron_slim.cli.tool import run_tool
from megatron_slim.command_line import tool_parser
from megatron_slim.documents import check_inputs, read_sources
from megatron_slim.errors import SlimError
from megatron_slim.files import new_directory, read_json, to_json

END_OF_TEXT = "<|endoftext|>"


def train_tokenizer(inputs: Sequence[Path], output: Path, *, vocab_size: int, key: str = "text") -> dict[str, Any]:
    """Train on text files and save to the new directory ``output``; `END_OF_TEXT` is its eos and pad.

    Returns:
        ``vocab_size`` and ``eod``.

    Raises:
        DataError: bad input.
        SlimError: the output exists, or the text is too small for that vocabulary.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    check_inputs(inputs)
    if vocab_size <= 257:
        raise SlimError(f"--vocab-size {vocab_size} is too small for 256 bytes and {END_OF_TEXT}")
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )

    def texts() -> Iterator[str]:
        return (source.texts((key,)).by_key[key] for source in read_sources(inputs))

    with new_directory(output) as temporary:
        bpe.train_from_iterator(texts(), trainer)
        if bpe.get_vocab_size() != vocab_size:
            raise SlimError(
                f"the text yields {bpe.get_vocab_size()} tokens, --vocab-size asks for {vocab_size}",
                where=", ".join(map(str, inputs)),
                fix="give more text or ask for fewer tokens",
            )
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT)
        tokenizer.save_pretrained(temporary)
        # transformers 5 writes a class name that only it knows.
        config = temporary / "tokenizer_config.json"
        config.write_text(to_json({**read_json(config), "tokenizer_class": "PreTrainedTokenizerFast"}))
    return {"vocab_size": vocab_size, "eod": tokenizer.eos_token_id}


def main() -> None:
    """Parse the command line and run `train_tokenizer`."""
    parser = tool_parser(__doc__)
    parser.add_argument("--input", type=Path, nargs="+", required=True, metavar="FILE", help=".jsonl or .txt files")
    parser.add_argument("--json-key", default="text", help="key of a line that holds the text")
    parser.add_argument("--vocab-size", type=int, default=4096, help="number of tokens, the end of text included")
    parser.add_argument("--output", type=Path, required=True, help="new directory for the tokenizer")
    arguments = parser.parse_args()

    def run() -> dict[str, Any]:
        results = train_tokenizer(
            arguments.input, arguments.output, vocab_size=arguments.vocab_size, key=arguments.json_key
        )
        say(f"{results['vocab_size']} tokens -> {arguments.output}")
        return results

    run_tool(run, as_json=arguments.json)


if __name__ == "__main__":
    main()
