"""What every client's script has: it runs in that client's environment, so it imports numpy alone.

A script is called with the directory of a case (``model/``, ``expected.npz``), a scratch directory and the name of a
check. It ends with one line of JSON: ``result`` and ``note``. What it raises is why the client does not work.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

SAME_LOGITS, SAME_TOKENS, LOADS, DIFFERS = "same logits", "same tokens", "loads", "other results"
SAME_NAMES = "same names"
# Logits of the tiny models are about 1. Sums of another order differ by some 1e-6 in fp32, and in bf16 by up to 0.1
# among 30,000 logits. One expert less in one layer changes them by 0.26 or more, a layer without its attention by 1.
FP32, BF16 = 1e-4, 0.2
Result = tuple[str, str]


class Case:
    """Files and expected arrays of a case."""

    def __init__(self, directory: Path, scratch: Path) -> None:
        self.name = directory.name
        self.model = directory / "model"
        self.scratch = scratch
        self.config: dict[str, Any] = json.loads((self.model / "config.json").read_text())
        with np.load(directory / "expected.npz") as arrays:
            self.expected = dict(arrays)

    @property
    def text(self) -> dict[str, Any]:
        """What config.json says of the language model, which may be all of it."""
        found: dict[str, Any] = self.config.get("text_config", self.config)
        return found

    @property
    def hybrid(self) -> bool:
        """It has layers of Gated DeltaNet."""
        return "linear_attention" in self.text.get("layer_types", ())

    @property
    def prompts(self) -> list[list[int]]:
        """Token ids of every prompt."""
        return self.expected["prompts"].tolist()

    @property
    def new_tokens(self) -> int:
        """Tokens that follow every prompt."""
        return self.expected["tokens"].shape[1]

    def compare_logits(self, logits: Any, tolerance: float = FP32) -> Result:
        """Logits of the prompts, [prompts, tokens, vocabulary]."""
        largest = float(np.abs(np.asarray(logits, dtype=np.float32) - self.expected["logits"]).max())
        note = f"logits differ by at most {largest:.1g}"
        return (SAME_LOGITS if largest <= tolerance else DIFFERS), note

    def compare_tokens(self, tokens: Any, tolerance: float = FP32) -> Result:
        """Greedy continuations, [prompts][new tokens]; a row counts up to a tie, a margin below twice the tolerance."""
        same = total = ties = 0
        rows = zip(tokens, self.expected["tokens"].tolist(), self.expected["margins"].tolist(), strict=True)
        for found, expected, margins in rows:
            first = next((i for i, pair in enumerate(zip(found, expected, strict=True)) if pair[0] != pair[1]), None)
            tie = first is not None and margins[first] < 2 * tolerance
            ties += tie
            same += len(expected) if first is None else first
            total += first if tie and first is not None else len(expected)
        note = f"{same} of {total} tokens" + (f", {ties} texts up to a tie" if ties else "")
        return (SAME_TOKENS if same == total else DIFFERS), note

    def compare_margins(self, margins: Any, tolerance: float = FP32) -> Result:
        """Logit of each greedy token less that of the second best one, where a client gives no more."""
        largest = float(np.abs(np.asarray(margins, dtype=np.float32) - self.expected["margins"]).max())
        note = f"margins of tokens differ by at most {largest:.1g}"
        return (SAME_LOGITS if largest <= tolerance else DIFFERS), note

    def compare_drafts(self, rounds: int, accepted: int, after_rejection: int = 1) -> Result:
        """Counts of speculative decoding with one draft a round.

        The last round of a text may have a draft that the text is too short for: engines count it or not. A client
        that decodes ``after_rejection`` tokens without a draft after each that is rejected says so.
        """
        expected_rounds = expected_accepted = 0
        for row in self.expected["agrees"].tolist():
            position = len(self.prompts[0]) - 1
            while position < len(row):
                expected_rounds, expected_accepted = expected_rounds + 1, expected_accepted + row[position]
                position += 2 if row[position] else after_rejection
        note = f"{accepted} of {rounds} drafts accepted, expected {expected_accepted} of {expected_rounds}"
        allowed = len(self.prompts)
        near = abs(rounds - expected_rounds) <= allowed and abs(accepted - expected_accepted) <= allowed
        return (SAME_TOKENS if near else DIFFERS), note


def both(*results: Result) -> Result:
    """One result of several: the first, unless a later one differs."""
    wrong = [result for result, _ in results if result == DIFFERS]
    return (wrong or [results[0][0]])[0], "; ".join(note for _, note in results)


def main(checks: Mapping[str, Callable[[Case], Result]]) -> None:
    """Run the check that the command line names, and print its result."""
    directory, scratch, check = sys.argv[1:]
    result, note = checks[check](Case(Path(directory), Path(scratch)))
    sys.stdout.flush()
    print("\n" + json.dumps({"result": result, "note": note}), flush=True)
    os._exit(0)  # engines leave processes and threads that would keep this one alive
