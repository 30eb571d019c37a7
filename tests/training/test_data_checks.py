"""Data that a run cannot be trained on: blends that are none, and parts too small to build an index of.

No part without tokens is handed to Megatron here: what is tested is that it is refused, or not asked for.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import megatron_slim.mcore

import numpy as np
import pytest

from megatron_slim.errors import DataError, SlimError
from megatron_slim.testing import write_tokens
from megatron_slim.training.blends import Blend, parse_blend
from megatron_slim.training.data_checks import check_data

MIXED = "weights and data sets do not alternate in "
BLENDS = {
    "10 da db": MIXED,
    "da 10 db 20": MIXED,
    "da 10 db": MIXED,
    "1 da db 2": MIXED,
    "1 da db dc": MIXED,
    "da db 1 dc": MIXED,
    "1 da 2": MIXED,
    "1 2 da db": MIXED,
    "1 2": MIXED,
    "1 da -1 db": "weight -1 is not positive and finite; leave out what has no share",
    "0 da 1 db": "weight 0 is not positive",
    "1 da nan db": "weight nan is not positive",
    "inf da 1 db": "weight inf is not positive",
    "1e308 da 1e308 db": "weight 1e308 is not positive and finite",
    "1e-300 da 1e300 db": "weight 1e-300 is not positive and finite",
    "1e999 da": "weight 1e999 is not positive and finite",
    "": "names no data set",
}


@pytest.mark.parametrize("words", BLENDS)
def test_what_is_not_a_blend(words: str) -> None:
    with pytest.raises(DataError) as caught:
        parse_blend(words.split(), "--data-path")
    assert str(caught.value).startswith("--data-path: ") and BLENDS[words] in str(caught.value)


@pytest.mark.parametrize(
    ("words", "blend"),
    [
        ("da", Blend(("da",))),
        ("7", Blend(("7",))),
        ("da db", Blend(("da", "db"))),
        ("da ./7 db", Blend(("da", "./7", "db"))),
        ("2 da", Blend(("da",), (2.0,))),
        ("30 da .7 db", Blend(("da", "db"), (30.0, 0.7))),
        ("1e-3 da 1e3 da", Blend(("da", "da"), (0.001, 1000.0))),
    ],
)
def test_blends(words: str, blend: Blend) -> None:
    assert parse_blend(words.split(), "") == blend


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data sets of documents of so many tokens, and files that name them."""
    root = tmp_path_factory.mktemp("sets")
    documents = {
        "many": [20] * 100,
        "few": [40] * 3,
        "one": [400],
        "short": [1] * 100,  # 10 and 10 tokens for validation and test: fewer than a sample of 17
        "hollow": [40] * 80 + [0] * 20,  # no tokens for validation and test
        "tiny": [16],
        "exact": [17],
    }
    for name, lengths in documents.items():
        write_tokens(root / name, [np.full(length, 3) for length in lengths])
    (root / "empty").write_text("")
    (root / "mixed").write_text("many\n10\nfew")
    (root / "bytes").write_bytes(b"\xff\xfe")
    (root / "words").write_text("1 many\n2 many\n")
    files = {
        "parts": {"train": "1 many 2 many", "valid": ["exact"]},
        "no-valid": {"train": ["many"], "valid": None, "test": None},
        "mixed-parts": {"train": "many", "valid": ["many", 10, "few"]},
        "typo": {"train": "many", "validation": "many"},
        "number": {"train": 3},
        "list": ["many"],
    }
    for name, content in files.items():
        (root / f"{name}.json").write_text(json.dumps(content))
    return root


def check(words: str, **more: Any) -> None:
    """The check with Megatron's arguments of these words."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    for name in ("data-path", "train-data-path", "valid-data-path", "test-data-path"):
        parser.add_argument(f"--{name}", nargs="*")
    for name in ("data-args-path", "per-split-data-args-path", "split"):
        parser.add_argument(f"--{name}")
    parser.add_argument("--mock-data", action="store_true")
    parser.add_argument("--eval-iters", type=int, default=1)
    parser.add_argument("--seq-length", type=int, default=16)
    parser.add_argument("--teacher-cache")
    parser.add_argument("--before-recording", type=int)
    check_data(argparse.Namespace(**{**vars(parser.parse_args(words.split())), **more}), 128)


NONE = "leaves none of its "
OWN = "give --train-data-path, --valid-data-path and --test-data-path, another --split, "
REFUSED = {
    # Parts without documents.
    "--data-path one": f"one: --split 969, 30, 1 {NONE}1 documents for the validation part; {OWN}more documents, or "
    "--eval-iters 0",
    "--data-path many": f"--split 969, 30, 1 {NONE}100 documents for the test part",
    "--data-path few --split 90,5,5": f"few: --split 90,5,5 {NONE}3 documents for the validation part",
    "--data-path few --split 2,1,0.1": f"few: --split 2,1,0.1 {NONE}3 documents for the test part",
    "--data-path few --split .1,9,9 --eval-iters 0": f"{NONE}3 documents for the training part; {OWN}or more documents",
    "--data-path 1 many 1 few --split 80,10,10": f"few: --split 80,10,10 {NONE}3 documents for the test",
    "--data-path many few --split 80,10,10": f"few: --split 80,10,10 {NONE}3 documents for the test",
    "--data-args-path words": f"many: --split 969, 30, 1 {NONE}100 documents for the test part",
    # Documents without tokens, or with fewer than a sample's.
    "--data-path hollow --split 8,1,1": "hollow: has 0 tokens in 10 documents for the validation part, one sample "
    f"takes 17; {OWN}more documents, or --eval-iters 0",
    "--data-path hollow --split 79,11,10": "hollow: has 0 tokens in 10 documents for the test part",
    "--data-path short --split 8,1,1": "short: has 10 tokens in 10 documents for the validation part, one sample takes "
    f"17; {OWN}more documents, a shorter --seq-length, or --eval-iters 0",
    "--data-path short --split 8,2,0.1": "short: has 1 tokens in 1 documents for the test part",
    "--data-path tiny --split 1,0,0 --eval-iters 0": "tiny: has 16 tokens in 1 documents for the training part, one "
    f"sample takes 17; {OWN}more documents, or a shorter --seq-length",
    "--data-path many --split 6,2,2 --seq-length 400": "many: has 400 tokens in 20 documents for the validation part",
    "--train-data-path tiny --eval-iters 0": "tiny: has 16 tokens in 1 documents for the training part, one sample "
    "takes 17; give more documents, or a shorter --seq-length",
    "--train-data-path many --valid-data-path tiny": "tiny: has 16 tokens in 1 documents for the validation part, one "
    "sample takes 17; give more documents, a shorter --seq-length, or --eval-iters 0",
    "--train-data-path many --valid-data-path many --test-data-path 1 many 1 tiny": "for the test part",
    # Parts without a data set, for which Megatron would ask an iterator that is not there.
    "--train-data-path many": "there are no data for the validation part; give --valid-data-path, or --eval-iters 0",
    "--valid-data-path many": "there are no data for the training part; give --train-data-path",
    "--data-path many --split 1,0,0": "no data for the validation part; give it a share in --split, or --eval-iters 0",
    "--data-path many --split 9,0,1": "no data for the validation part",
    "--data-path many --split 0,1,1": "no data for the training part; give it a share in --split",
    "--per-split-data-args-path no-valid.json": "no data for the validation part",
    # Splits that are none.
    "--data-path many --split 0,0,0": "--split 0,0,0 is not three numbers that are not negative",
    "--data-path many --split=-5,3,2": "--split -5,3,2 is not three",
    "--data-path many --split 90,5,-5": "--split 90,5,-5 is not three",
    "--data-path many --split 1e3,5,5": "--split 1e3,5,5 is not three",
    "--data-path many --split 90,5,3,2": "--split 90,5,3,2 is not three",
    "--data-path many --split 1.2.3,1,1": "--split 1.2.3,1,1 is not three",
    "--data-path many --split .,1,1": "--split .,1,1 is not three",
    "--data-path many --split all": "--split all is not three",
    f"--data-path many --split {'9' * 400},1": "is not three",
    "--train-data-path many --valid-data-path many --split 9,1": "--split 9,1 has nothing to split; leave it out",
    # Where they are given.
    "": "no training data; give --data-path",
    "--data-path": "--data-path: names no data set",
    "--train-data-path many --valid-data-path": "--valid-data-path: names no data set",
    "--valid-data-path 1 many -1 few": "--valid-data-path: weight -1 is not positive",
    "--data-path many --mock-data": "data are given twice: by --data-path and by --mock-data; give them in one way",
    "--data-path many --train-data-path many": "twice: by --data-path and by --train-data-path, --valid-data-path and",
    "--data-args-path words --per-split-data-args-path parts.json": "data are given twice: by --data-args-path and by",
    "--data-args-path nowhere": "nowhere: not readable (No such file or directory)",
    "--data-args-path bytes": "bytes: holds no text in UTF-8",
    "--data-args-path empty": "empty: names no data set",
    "--data-args-path mixed": f"mixed: {MIXED}'many 10 few'",
    "--per-split-data-args-path nowhere": "nowhere: no such file",
    "--per-split-data-args-path mixed": "mixed: not readable as JSON",
    "--per-split-data-args-path mixed-parts.json": f"mixed-parts.json: valid: {MIXED}'many 10 few'",
    "--per-split-data-args-path typo.json": "typo.json: has key validation, not train, valid and test",
    "--per-split-data-args-path number.json": "number.json: train is neither a string nor a list",
    "--per-split-data-args-path list.json": "list.json: is not a JSON object, not train, valid and test",
    "--train-data-path many --valid-data-path nowhere --eval-iters 0": "nowhere: no such data",
}
FINE = (
    "--mock-data",
    "--mock-data --eval-iters 0",
    "--data-path one --eval-iters 0",
    "--data-path few --split 90,5,5 --eval-iters 0",
    "--data-path hollow --split 8,1,1 --eval-iters 0",
    "--data-path short --split 8,1,1 --eval-iters 0",
    "--data-path many --split 1,0,0 --eval-iters 0",
    "--data-path many --split 9/1",
    "--data-path few --split 1,1,1",
    "--data-path 0.3 many 0.7 many --split 8,1,1",
    "--data-path many many --split 8,1,1",
    "--data-args-path words --split 98,1,1",
    "--train-data-path many --eval-iters 0",
    "--train-data-path many --valid-data-path exact",
    "--train-data-path exact --valid-data-path exact --test-data-path one few",
    "--per-split-data-args-path parts.json",
    "--per-split-data-args-path no-valid.json --eval-iters 0",
)


@pytest.mark.parametrize("words", REFUSED)
def test_refused(sets: Path, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(sets)
    with pytest.raises(SlimError) as caught:
        check(words)
    assert REFUSED[words] in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("words", FINE)
def test_not_refused(sets: Path, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(sets)
    check(words)
