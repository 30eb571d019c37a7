"""Tokenizers from local files: Hugging Face directories and SentencePiece models. No network, no remote code."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from megatron_slim.errors import DataError
from megatron_slim.extras import require

VOCABULARIES = ("tokenizer.json", "vocab.*", "*.model", "*.tiktoken")  # one of them holds what a tokenizer knows
TOKENIZER_TYPES = ("HuggingFaceTokenizer", "SentencePieceTokenizer")


class Tokenizer(Protocol):
    """What preprocessing needs of a tokenizer.

    Attributes:
        vocab_size: one more than the largest id.
        eod: id that ends a document, None where the tokenizer has none.
    """

    vocab_size: int
    eod: int | None

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, without special tokens around it."""
        ...


class HuggingFaceTokenizer:
    """A tokenizer directory as `transformers` saves it, a model's own directory included; its eos ends a document.

    Attributes:
        library: the tokenizer of `transformers`.
    """

    def __init__(self, path: Path) -> None:
        require("text", "transformers", "a Hugging Face tokenizer")
        from transformers import AutoTokenizer

        if not path.is_dir():
            raise DataError("no such tokenizer directory", where=str(path), fix="names of a hub are not looked up")
        # In a model's directory without them transformers makes up a tokenizer that knows no text.
        if not any(file.is_file() for pattern in VOCABULARIES for file in path.glob(pattern)):
            raise DataError("no tokenizer files in this directory", where=str(path), fix="it needs a tokenizer.json")
        try:
            tokenizer: Any = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        except Exception as error:
            # transformers raises whatever the first of its many loaders ran into.
            raise DataError(f"not a tokenizer directory ({error})", where=str(path)) from None
        if not tokenizer.get_vocab():
            raise DataError("no tokenizer files in this directory", where=str(path), fix="it needs a tokenizer.json")
        self.library: Any = tokenizer
        self.vocab_size = max(tokenizer.get_vocab().values()) + 1
        self.eod: int | None = tokenizer.eos_token_id

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text; ``verbose=False`` because a document may be longer than any context."""
        encoded = self.library(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)
        ids: list[list[int]] = encoded["input_ids"]
        return ids


class SentencePieceTokenizer:
    """A SentencePiece ``.model`` file; its eos ends a document."""

    def __init__(self, path: Path) -> None:
        require("text", "sentencepiece", "a SentencePiece tokenizer")
        from sentencepiece import SentencePieceProcessor

        if not path.is_file():
            raise DataError("no such SentencePiece model", where=str(path))
        try:
            self._processor: Any = SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError) as error:
            raise DataError(f"not a SentencePiece model ({error})", where=str(path)) from None
        self.vocab_size = int(self._processor.get_piece_size())
        eos = int(self._processor.eos_id())
        self.eod: int | None = eos if eos >= 0 else None

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text."""
        ids: list[list[int]] = self._processor.encode(list(texts))
        return ids


def load_tokenizer(tokenizer_type: str, path: Path) -> Tokenizer:
    """Load a tokenizer under Megatron's name for its type.

    Raises:
        DataError: the files are missing or are not such a tokenizer.
    """
    if tokenizer_type == "HuggingFaceTokenizer":
        return HuggingFaceTokenizer(path)
    assert tokenizer_type == "SentencePieceTokenizer", tokenizer_type
    return SentencePieceTokenizer(path)
