"""Loss masks: of each sample its own, and one token is one token, whichever micro-batch and rank it falls to."""

from __future__ import annotations

import shutil
from pathlib import Path

import megatron_slim.mcore

import numpy as np
import pytest

from megatron_slim.testing import write_tokens

TERMS = ("lm loss", "logits distillation loss", "teacher lm loss", "mtp lm loss", "mtp distillation loss", "grad-norm")
END = 119  # ends a document
PAD = 0
PADDED = ["--null-tokenizer-pad-id", str(PAD), "--micro-batch-size", "2", "--eval-interval", "3"]
# Megatron keeps no masks where it resets positions, which it does nowhere: no document of `padded` has an end.
MASKS_MADE_AFRESH = ["--reset-position-ids", "--null-tokenizer-eod-id", str(END)]
# No load-balancing loss: which tokens it has counted depends on the micro-batches, by design.
COMMON = "--moe-router-load-balancing-type none --moe-aux-loss-coeff 0 --eod-mask-loss".split()
COMMON += ["--null-tokenizer-eod-id", str(END)]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents of which some are nothing but ends, so that nearly all of some samples is masked."""
    prefix, rng = tmp_path_factory.mktemp("masks") / "data", np.random.default_rng(0)
    documents = rng.integers(0, END, (60, 33))
    for number, document in enumerate(documents):
        document[: (0, 30, 12, 25)[number % 4]] = END
    write_tokens(prefix, documents)
    return prefix


@pytest.fixture(scope="module")
def whole(workplace, data: Path) -> dict[str, list[float]]:  # type: ignore[no-untyped-def]
    """The global batch as one micro-batch on one rank: the mean over its tokens, plainly."""
    return workplace.train("masks-one", 1, *COMMON, "--micro-batch-size", "4", *paths(data))


@pytest.fixture(scope="module")
def padded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents with padding at a place of their own, so that whichever sample is served first has some."""
    prefix, rng = tmp_path_factory.mktemp("padding") / "data", np.random.default_rng(0)
    documents = rng.integers(1, END, (40, 32))
    for document in documents:
        start, length = rng.integers(0, 24), rng.integers(1, 24)
        document[start : start + length] = PAD
    write_tokens(prefix, documents)
    return prefix


def paths(data: Path) -> list[str]:
    return [word for part in ("train", "valid", "test") for word in (f"--{part}-data-path", str(data))]


LAYOUTS = {
    "accumulated": (1, "--micro-batch-size 1"),
    "dp2": (2, "--micro-batch-size 1"),
    "cp2": (2, "--micro-batch-size 1 --context-parallel-size 2"),
    "pp2": (2, "--micro-batch-size 1 --pipeline-model-parallel-size 2"),
    "pp2-dp2": (4, "--micro-batch-size 1 --pipeline-model-parallel-size 2"),
}


@pytest.mark.one_case
@pytest.mark.parametrize(
    "layout", [pytest.param(name, marks=[pytest.mark.slow] if "pp2" in name else []) for name in LAYOUTS]
)
def test_means_are_over_tokens(workplace, whole, data: Path, layout: str) -> None:  # type: ignore[no-untyped-def]
    ranks, flags = LAYOUTS[layout]
    found = workplace.train(f"masks-{layout}", ranks, *COMMON, *flags.split(), *paths(data))
    for term in TERMS:  # fp32 sums in another order, amplified by four steps of Adam
        assert found[term] == pytest.approx(whole[term], rel=1e-5), term
    assert found["lm loss validation"] == pytest.approx(whole["lm loss validation"], rel=1e-5)


@pytest.mark.slow
def test_padding_masks_its_own_sample_alone(workplace, padded: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """On one rank, on two, in validation and where a run was resumed: the losses of a run without masks kept."""
    save = ["--save", str(tmp_path / "run"), "--load", str(tmp_path / "run"), "--save-interval", "3"]
    argv = [*PADDED, *paths(padded), "--moe-router-load-balancing-type", "none", "--moe-aux-loss-coeff", "0"]
    expected = workplace.train("padding-afresh", 1, *argv, *MASKS_MADE_AFRESH)
    whole = workplace.train("padding-one", 1, *argv, *save)
    shutil.rmtree(tmp_path / "run/iter_0000005")
    (tmp_path / "run/latest_checkpointed_iteration.txt").write_text("3")
    resumed = workplace.train("padding-resumed", 1, *argv, *save)
    halves = workplace.train("padding-dp2", 2, *argv)
    for term in (*TERMS, *(f"{term} validation" for term in TERMS if term != "grad-norm")):
        done = 1 if "validation" in term else 3  # before the resumed run
        assert whole[term] == expected[term] and resumed[term] == expected[term][done:], term
        assert halves[term] == pytest.approx(expected[term], rel=1e-5), term
