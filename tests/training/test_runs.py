"""A run stops, resumes, starts from either format, and refuses a teacher that is no better than guessing."""

from __future__ import annotations

import logging
import math
import shutil
from pathlib import Path
from typing import Any

import megatron_slim.mcore

import numpy as np
import pytest
import torch

from megatron_slim.checkpoint.convert import (
    hf_to_torch_dist,
    open_checkpoint,
    same_bytes,
    torch_dist_to_hf,
    write_checkpoint,
)
from megatron_slim.checkpoint.huggingface import HFCheckpoint
from megatron_slim.checkpoint.torch_dist_files import read_metadata
from megatron_slim.errors import CheckpointError
from megatron_slim.pruning.statistics import FORMAT, Statistics, expected_shapes
from megatron_slim.streaming.fingerprint import fingerprint
from megatron_slim.testing import random_tensors, run_distributed, tiny_hf_config, tiny_shape, write_tokens
from megatron_slim.training.teacher_check import judge_teacher
from tests.training.conftest import read_scalars, train

TERMS = ("lm loss", "logits distillation loss", "mtp lm loss", "mtp distillation loss", "grad-norm", "kd lambda")
SCHEDULES = ("kd lambda", "mtp beta", "learning-rate")
MBS = ("--micro-batch-size", "2")
PP2 = "--pipeline-model-parallel-size 2"


def keep_only(save: Path, iteration: int) -> None:
    """Make a checkpoint directory look as it did when that iteration had just been saved."""
    for directory in save.glob("iter_*"):
        if directory.name != f"iter_{iteration:07d}":
            shutil.rmtree(directory)
    (save / "latest_checkpointed_iteration.txt").write_text(str(iteration))


@pytest.fixture(scope="module")
def saved(workplace, tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]
    """A run of five steps that saved at the third, and what it logged."""
    save = tmp_path_factory.mktemp("saved") / "run"
    logged = workplace.train("saved", 1, *MBS, "--save", str(save), "--load", str(save), "--save-interval", "3")
    keep_only(save, 3)
    return save, logged


LAYOUTS = {
    "one": (1, ""),
    "pp2": (2, "--pipeline-model-parallel-size 2"),
    "dp2": (2, "--micro-batch-size 1"),
    "ep2": (2, "--micro-batch-size 1 --expert-model-parallel-size 2"),
    "tp2-sp": (2, "--tensor-model-parallel-size 2 --sequence-parallel"),
    "vpp2": (2, "--pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2"),
    "pp2-reshardable": (2, "--pipeline-model-parallel-size 2 --dist-ckpt-optim-fully-reshardable"),
    "ep2-bf16": (2, "--micro-batch-size 1 --expert-model-parallel-size 2 --bf16"),
}


@pytest.mark.one_case
@pytest.mark.parametrize(
    "layout",
    ["one", "pp2", *(pytest.param(name, marks=pytest.mark.slow) for name in LAYOUTS if name not in ("one", "pp2"))],
)
def test_a_resumed_run_is_the_same_run(workplace, tmp_path: Path, layout: str) -> None:  # type: ignore[no-untyped-def]
    ranks, flags = LAYOUTS[layout]
    save = tmp_path / "run"
    argv = [*MBS, *flags.split(), "--save", str(save), "--load", str(save), "--save-interval", "3"]
    whole = workplace.train(f"whole-{layout}", ranks, *argv)
    keep_only(save, 3)
    resumed = workplace.train(f"resumed-{layout}", ranks, *argv)
    for term in (*TERMS, *SCHEDULES):
        assert resumed[term] == whole[term][3:], term


def test_samples_in_place_of_iterations_are_the_same_run(workplace, reference: Any) -> None:  # type: ignore[no-untyped-def]
    """The schedule of the learning rate too; Megatron counts their iterations when the log is there already."""
    argv = workplace.argv("samples", *MBS)
    place = argv.index("--train-iters")
    argv[place : place + 2] = ["--train-samples", "20"]
    run_distributed(1, train, argv, str(workplace.new_log("samples")), initialise=False)
    found = read_scalars(workplace.root / "tensorboard/samples")
    for term in (*TERMS, *SCHEDULES):
        assert found[term] == reference[term], term
    assert found["slim/progress/fraction"] == reference["slim/progress/fraction"]


@pytest.mark.slow
def test_schedules_and_data_go_on_from_anywhere(workplace, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """In the warm-up, behind it, and what was resumed once more; data are read twice, in another order each time."""
    write_tokens(tmp_path / "data", np.random.default_rng(0).integers(0, 119, (9, 40)))
    data = [word for part in ("train", "valid", "test") for word in (f"--{part}-data-path", str(tmp_path / "data"))]
    argv = [*MBS, *data, "--train-iters", "7", "--lr-warmup-iters", "3", "--eod-mask-loss"]
    argv += ["--null-tokenizer-eod-id", "119"]

    def resume(name: str, save: Path, *more: str) -> dict[str, list[float]]:
        return workplace.train(name, 1, *argv, "--save", str(save), "--load", str(save), *more)

    whole = resume("from-0", tmp_path / "run", "--save-interval", "1")
    assert all(len(set(whole[term])) == 7 for term in (*TERMS, *SCHEDULES))
    assert (whole["kd lambda"][-1], whole["mtp beta"][-1]) == pytest.approx((0.75, 0.1))
    for stop in (2, 4):
        keep = tmp_path / f"run-{stop}"
        shutil.copytree(tmp_path / "run", keep)
        keep_only(keep, stop)
        more = ["--save-interval", "1", "--exit-interval", "5"] if stop == 4 else ["--save-interval", "1000"]
        resumed = resume(f"from-{stop}", keep, *more)
        if stop == 4:
            assert len(resumed["lm loss"]) == 1
            again = resume("from-5", keep)
            resumed = {term: values + again[term] for term, values in resumed.items() if term in again}
        for term in (*TERMS, *SCHEDULES):
            assert resumed[term] == whole[term][stop:], (stop, term)


@pytest.mark.slow
def test_the_weights_go_on_under_another_layout(workplace, saved) -> None:  # type: ignore[no-untyped-def]
    """The fourth step's losses are those of the weights alone; the optimizer starts afresh, the schedules do not."""
    save, logged = saved
    flags = "--tensor-model-parallel-size 2 --sequence-parallel --no-load-optim --no-load-rng".split()
    found = workplace.train("other-layout", 2, *MBS, *flags, "--load", str(save))
    for term in TERMS:
        assert found[term][0] == pytest.approx(logged[term][3], rel=1e-5), term
    for name in SCHEDULES:
        assert found[name] == logged[name][3:], name


def refusal(argv: list[str], log: str) -> str:
    from tests.training.conftest import refusal

    return refusal(argv, log)


OTHERWISE = {
    "--lr 5e-4": "saved with another schedule: --lr 0.001, not 0.0005; give what it was saved with, or --override-opt",
    "--min-lr 0 --lr-warmup-iters 1": "saved with another schedule: --min-lr 0.0001, not 0.0, warm-up in iters 0, not",
    "--train-iters 9": "saved with another schedule: --train-iters 5, not 9, --lr-decay-iters 5, not 9; give",
    "--train-iters 9 --lr-decay-iters 5": "saved with another schedule: --train-iters 5, not 9; give",
    "--global-batch-size 8": "saved with another schedule: --global-batch-size 4, not 8, --train-iters 2.5, not 5,",
    "--lr-decay-style linear --weight-decay 0.1": "saved with another schedule: --lr-decay-style cosine, not linear, i",
    "--bf16": "saved with type of parameters torch.float32, not torch.bfloat16, gradients in fp32 False, not True; r",
    PP2: "saved with pipeline parallel size 1, not 2; resume in the layout it was saved in; in any other after one sav",
    "--expert-model-parallel-size 2 --micro-batch-size 1": "saved with expert parallel size 1, not 2; resume in the la",
    "--tensor-model-parallel-size 2 --sequence-parallel": "saved with tensor parallel size 1, not 2, expert tensor par",
}


def refusals(all_argv: list[list[str]], log: str) -> list[str]:
    """Body of one rank: what ends each of several runs before anything is built, so that the next can be tried."""
    from megatron.core.num_microbatches_calculator import destroy_num_microbatches_calculator
    from megatron.training.global_vars import destroy_global_vars

    found = []
    for argv in all_argv:
        found.append(refusal(argv, log))
        destroy_global_vars()
        destroy_num_microbatches_calculator()
    return found


@pytest.mark.parametrize("ranks", [1, 2])
def test_resuming_otherwise_is_refused(workplace, saved, ranks: int) -> None:  # type: ignore[no-untyped-def]
    cases = {flags: text for flags, text in OTHERWISE.items() if ("parallel" in flags) == (ranks == 2)}
    argv = [workplace.argv("otherwise", *MBS, "--load", str(saved[0]), *flags.split()) for flags in cases]
    log = workplace.log("otherwise")
    for found in run_distributed(ranks, refusals, argv, str(log), initialise=False):
        for message, (flags, text) in zip(found, cases.items(), strict=True):
            assert f"iter_0000003: {text}" in message, (flags, message)
    assert "building" not in log.read_text() and "initialized" not in log.read_text()


@pytest.mark.slow
def test_resuming_with_another_learning_rate_and_length(workplace, saved) -> None:  # type: ignore[no-untyped-def]
    save, logged = saved
    flags = "--lr 5e-4 --train-iters 9 --override-opt_param-scheduler".split()
    found = workplace.train("override", 1, *MBS, "--load", str(save), *flags)
    rates = [1e-4 + 4e-4 * (1 + math.cos(math.pi * number / 9)) / 2 for number in range(4, 10)]
    assert found["learning-rate"] == pytest.approx(rates) and found["lm loss"][0] == logged["lm loss"][3]


def test_what_training_saved_becomes_a_hugging_face_model(workplace, saved, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    save, _ = saved
    torch_dist_to_hf(save, tmp_path / "hf")
    exported, source = HFCheckpoint.open(tmp_path / "hf"), open_checkpoint(save)
    assert exported.shape == source.shape == HFCheckpoint.open(workplace.student).shape
    trained = [not torch.equal(exported.read(n), HFCheckpoint.open(workplace.student).read(n)) for n in exported.names]
    assert all(trained)
    hf_to_torch_dist(tmp_path / "hf", tmp_path / "again")
    again = open_checkpoint(tmp_path / "again")
    assert all(same_bytes(again.read(name), exported.read(name)) for name in exported.names)


@pytest.mark.slow
def test_a_run_is_pruned_as_it_is(workplace, saved, tmp_path: Path, tool: Any) -> None:  # type: ignore[no-untyped-def]
    """With its optimizer state next to the weights, by the plan and to the bytes of the model that it exports."""
    save, _ = saved
    torch_dist_to_hf(save, tmp_path / "hf")
    live, exported = open_checkpoint(save), HFCheckpoint.open(tmp_path / "hf")
    metadata = read_metadata(live.path).state_dict_metadata
    assert any("exp_avg_sq" in key for key in metadata)
    rng = np.random.default_rng(0)
    tensors = {key: np.asarray(rng.random(size), dtype=np.float32) for key, size in expected_shapes(live.shape)}
    Statistics(tensors, {"format": FORMAT, "source_sha256": fingerprint(live)}).save(tmp_path / "stats")
    target = "{hidden_size: 40, num_moe_experts: 3, moe_ffn_hidden_size: 16, num_attention_heads: 2}"
    (tmp_path / "recipe.yaml").write_text(f"version: 1\ntarget: {target}\n")
    plan = ("--recipe", tmp_path / "recipe.yaml", "--stats", tmp_path / "stats")
    assert tool("tools/plan_pruning.py", "--load", save, "--save", tmp_path / "plan.json", *plan).code == 0
    contents = set()
    for name, load in (("live", save), ("exported", tmp_path / "hf")):
        for to in ("hf", "torch_dist"):
            out = tmp_path / f"{name}-{to}"
            outcome = tool(
                "tools/prune_checkpoint.py",
                "--load",
                load,
                "--save",
                out,
                "--plan",
                tmp_path / "plan.json",
                "--to",
                to,
                "--json",
            )
            assert outcome.code == 0, outcome.stderr
            contents.add(outcome.json["content"])
    assert len(contents) == 1 and exported.shape == live.shape
    start = ["--pretrained-checkpoint", str(tmp_path / "live-torch_dist"), "--dist-ckpt-strictness", "raise_all"]
    assert all(np.isfinite(workplace.train("pruned", 1, *MBS, *start)["lm loss"]))


def test_both_formats_start_the_same_run(workplace, reference, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    hf_to_torch_dist(workplace.student, tmp_path / "student")
    hf_to_torch_dist(workplace.teacher, tmp_path / "teacher")
    strict = ["--dist-ckpt-strictness", "raise_all"]
    start = ["--pretrained-checkpoint", str(tmp_path / "student"), "--teacher-load", str(tmp_path / "teacher")]
    found = workplace.train("torch-dist-start", 1, *MBS, *start, *strict)
    for term in TERMS:
        assert found[term] == reference[term], term


def test_bf16_follows_fp32(workplace, reference) -> None:  # type: ignore[no-untyped-def]
    """bf16 keeps 8 bits: losses near 5 are good to 2**-8 of that."""
    found = workplace.train("bf16", 2, "--micro-batch-size", "1", "--bf16")
    for term in TERMS[:4]:
        assert found[term] == pytest.approx(reference[term], rel=2**-8), term


@pytest.mark.slow
def test_fp16_follows_fp32(workplace, reference) -> None:  # type: ignore[no-untyped-def]
    """The loss scale reaches the output layer's gradient, which is made before backward, under interleaving too."""
    # Gradients are of sums over 64 tokens until they are divided, so that a scale of 1024 would overflow.
    flags = "--fp16 --initial-loss-scale 16 --pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2"
    found = workplace.train("fp16", 2, *MBS, *flags.split())
    for term in TERMS[:4]:
        assert found[term] == pytest.approx(reference[term], rel=2**-10), term
    assert found["grad-norm"][0] == pytest.approx(reference["grad-norm"][0], rel=2**-8)


@pytest.mark.slow
def test_other_distillation_losses_are_layout_free(workplace, reference) -> None:  # type: ignore[no-untyped-def]
    # Smaller steps, as below: on processors without AVX-512 tensor parallelism sums in another order, too.
    flags = "--kd-loss top-k --kd-top-k 8 --kd-temperature 2 --mtp-kd-target teacher-main --loss-chunk-size 7"
    flags += " --lr 1e-4 --min-lr 1e-5 --adam-eps 1e-3"
    one = workplace.train("top-k", 1, *MBS, *flags.split())
    tp2 = "--tensor-model-parallel-size 2 --sequence-parallel"
    two = workplace.train("top-k-tp2", 2, *MBS, *flags.split(), *tp2.split())
    assert one["lm loss"][0] == reference["lm loss"][0]
    assert one["logits distillation loss"][0] != reference["logits distillation loss"][0]
    for term in TERMS:
        assert two[term] == pytest.approx(one[term], rel=1e-5), term


@pytest.mark.slow
def test_the_teachers_main_head_can_supervise_mtp(workplace, reference) -> None:  # type: ignore[no-untyped-def]
    # Smaller steps than elsewhere: context parallelism sums in another order, which Adam would make 1e-5 of.
    argv = [*MBS, "--mtp-kd-target", "teacher-main", "--lr", "1e-4", "--min-lr", "1e-5", "--adam-eps", "1e-3"]
    one = workplace.train("teacher-main", 1, *argv)
    several = [
        workplace.train(f"teacher-main-{kind}", 2, *argv, f"--{kind}-parallel-size", "2")
        for kind in ("pipeline-model", "context")
    ]
    assert one["logits distillation loss"][0] == reference["logits distillation loss"][0]
    assert one["mtp distillation loss"][0] != reference["mtp distillation loss"][0]
    for term in TERMS:
        for found in several:
            assert found[term] == pytest.approx(one[term], rel=1e-5), term


@pytest.mark.slow
def test_without_mtp_it_is_the_run_of_a_model_that_has_none(workplace, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """Of student and teacher; what is saved declares none."""
    size, save = ("--micro-batch-size", "2", "--train-iters", "3"), ("--save", str(tmp_path / "run"))
    logged = workplace.train("without-mtp", 1, *size, "--without-mtp", "--teacher-without-mtp", *save)
    bare = {}
    for name in ("student", "teacher"):
        source = open_checkpoint(getattr(workplace, name), without_mtp=True)
        write_checkpoint(source, tmp_path / name, to="torch_dist")
        bare[name] = str(tmp_path / name)
    start = ("--pretrained-checkpoint", bare["student"], "--teacher-load", bare["teacher"])
    expected = workplace.train("never-mtp", 1, *size, *start, start=False, distil=False)
    for term in ("lm loss", "logits distillation loss"):
        assert len(logged[term]) == 3 and logged[term] == expected[term]
    assert not [tag for tag in logged if "mtp" in tag and "loss" in tag]
    torch_dist_to_hf(tmp_path / "run", tmp_path / "hf")
    assert HFCheckpoint.open(tmp_path / "hf").shape.mtp_num_layers == 0


@pytest.mark.slow
def test_full_recomputation_changes_nothing(workplace, reference) -> None:  # type: ignore[no-untyped-def]
    flags = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1".split()
    found = workplace.train("recompute", 1, *MBS, *flags)
    for term in TERMS:
        assert found[term] == pytest.approx(reference[term], rel=1e-6), term


def write_zero_teacher(workplace, path: Path) -> Path:  # type: ignore[no-untyped-def]
    """A teacher whose output layer is zero: it gives every token the same probability."""
    from megatron_slim.checkpoint.huggingface_writer import specs_of, write_hf_checkpoint

    shape = HFCheckpoint.open(workplace.teacher).shape
    tensors = random_tensors(shape, 1, torch.float32)
    tensors["lm_head.weight"].zero_()
    path.mkdir()
    write_hf_checkpoint(path, tiny_hf_config(shape), specs_of(shape, torch.float32), tensors.items())
    return path


@pytest.mark.parametrize("flags", ["", "--pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2"])
def test_a_teacher_that_guesses_is_refused(workplace, tmp_path: Path, flags: str) -> None:  # type: ignore[no-untyped-def]
    teacher = write_zero_teacher(workplace, tmp_path / "zero")
    ranks = 2 if flags else 1
    with pytest.raises(RuntimeError, match=r"cross entropy on the first batch is 4\.78.*guessing gives 4\.787"):
        workplace.train("zero", ranks, *MBS, *flags.split(), "--teacher-load", str(teacher), check_teacher=True)


def test_the_verdict_on_a_teacher(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    judge_teacher(4.0, 1000, Path("teacher"))
    assert "4.0" in caplog.text
    for loss in (6.9, float("inf"), float("nan")):
        with pytest.raises(CheckpointError, match="teacher"):
            judge_teacher(loss, 1000, Path("teacher"))


def test_the_shape_of_a_student_may_stand_alone(workplace, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """Random weights from a config.json alone; the teacher's layers, widths and experts differ from the student's."""
    from megatron_slim.files import to_json

    shape = tiny_shape(num_layers=2, layer_types=("linear_attention", "full_attention"), vocab_size=120)
    (tmp_path / "config.json").write_text(to_json(tiny_hf_config(shape)))
    found = workplace.train("random-init", 1, *MBS, "--hf-config", str(tmp_path), start=False)
    assert len(found["mtp distillation loss"]) == 5
