"""Stages of unequal size, other ones for the teacher than for the student, and a teacher of another dtype."""

from __future__ import annotations

from pathlib import Path

import megatron_slim.mcore

import pytest

from megatron_slim.checkpoint.convert import open_checkpoint, torch_dist_to_hf
from megatron_slim.checkpoint.huggingface import HFCheckpoint
from megatron_slim.training.stage_layout import layout_string

TERMS = ("lm loss", "logits distillation loss", "teacher lm loss", "mtp lm loss", "mtp distillation loss", "grad-norm")
PP2 = "--pipeline-model-parallel-size 2"
MBS = ("--micro-batch-size", "2")
AUTO = (*PP2.split(), "--pipeline-layout", "auto")
SAVING = "--save-interval 3 --dist-ckpt-optim-fully-reshardable".split()
# Embedding alone, heads alone, and stages without a layer of the teacher.
ENDS = "--pipeline-model-parallel-layout E|tt|ttt|mL --teacher-pipeline-layout Ett||ttttt|mL"


@pytest.fixture(scope="module")
def alone(uneven) -> dict[str, list[float]]:  # type: ignore[no-untyped-def]
    return uneven.train("one", 1, *MBS)


@pytest.fixture(scope="module")
def balanced(uneven) -> tuple[Path, dict[str, list[float]]]:  # type: ignore[no-untyped-def]
    """A run on two balanced stages, saved at its third step."""
    save = uneven.root / "run"
    return save, uneven.train("pp2", 2, *MBS, *AUTO, "--save", str(save), *SAVING)


@pytest.fixture(scope="module")
def interleaved(uneven) -> tuple[Path, dict[str, list[float]]]:  # type: ignore[no-untyped-def]
    """The same in an interleaved pipeline, saved as Megatron does by default."""
    save, virtual = uneven.root / "interleaved", ("--num-virtual-stages-per-pipeline-rank", "2")
    return save, uneven.train("vpp2", 2, *MBS, *AUTO, *virtual, "--save", str(save))


def test_balanced_stages_train_as_one_rank(uneven, alone, balanced, interleaved) -> None:  # type: ignore[no-untyped-def]
    for _, found in (balanced, interleaved):
        for term in (*TERMS, "global_load_balancing_loss"):
            assert found[term] == pytest.approx(alone[term], rel=1e-5), term
    table = (uneven.root / "vpp2.log").read_text().partition("pipeline stages (")[2].splitlines()
    assert [line.split()[0] for line in table[2:6]] == ["0.0", "1.0", "0.1", "1.1"]
    assert [sum(int(line.split()[model]) for line in table[2:6]) for model in (1, 2)] == [5, 7]
    assert float(table[6].split()[-1]) <= 1.05


@pytest.mark.slow
def test_a_run_resumes_in_other_stages(uneven, alone, balanced, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """With its optimizer, into an interleaved pipeline of which no stage is as it was."""
    save, _ = balanced
    (save / "latest_checkpointed_iteration.txt").write_text("3")
    found = uneven.train("ends", 2, *MBS, *PP2.split(), *ENDS.split(), "--load", str(save), *SAVING[2:])
    for term in TERMS:
        assert found[term] == pytest.approx(alone[term][3:], rel=1e-5), term
    torch_dist_to_hf(save, tmp_path / "hf")
    assert HFCheckpoint.open(tmp_path / "hf").shape == open_checkpoint(uneven.student).shape


def test_an_optimizer_that_belongs_to_other_stages_is_refused(uneven, interleaved) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(RuntimeError, match=r"saved with .*pipeline layout .*--dist-ckpt-optim-fully-reshardable"):
        uneven.train("refused", 2, *MBS, *AUTO, "--load", str(interleaved[0]))


@pytest.mark.slow
def test_the_dtype_of_the_teacher_is_its_own(uneven, alone) -> None:  # type: ignore[no-untyped-def]
    """Its own loss shows how it was computed: as alone in that dtype, across stages, whatever the student's is."""
    short, term = (*MBS, "--train-iters", "2"), "teacher lm loss"
    narrow = uneven.train("bf16", 1, *short, "--bf16")
    with_fp32 = uneven.train("teacher-bf16", 2, *short, *AUTO, "--teacher-dtype", "bf16")
    with_bf16 = uneven.train("teacher-fp32", 2, *short, *AUTO, "--bf16", "--teacher-dtype", "fp32")
    assert with_fp32[term] == narrow[term] != alone[term][:2]
    assert with_fp32["lm loss"][0] == pytest.approx(alone["lm loss"][0], rel=1e-6)
    assert with_bf16[term] == pytest.approx(alone[term][:2], rel=1e-6)
    assert with_bf16["lm loss"][0] == pytest.approx(narrow["lm loss"][0], rel=1e-6) != alone["lm loss"][0]


def test_layouts_in_megatrons_words() -> None:
    assert layout_string((0, 2, 0), 1) == "E|tt|mL" and layout_string((1,), 0) == "EtL"
