"""Our torch_dist, loaded and verified by Megatron, starts the run that the Hugging Face directory does."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import megatron_slim.mcore

import pytest

from megatron_slim.checkpoint.convert import hf_to_torch_dist, open_checkpoint, torch_dist_to_hf
from megatron_slim.errors import CheckpointError, SlimError
from megatron_slim.training.pretrain import main

TERMS = ("lm loss", "logits distillation loss", "teacher lm loss", "mtp lm loss", "mtp distillation loss", "grad-norm")
VERIFY = ("--verify-integrity",)
STRICT = (*VERIFY, "--dist-ckpt-strictness", "raise_all")
PP2, TP2 = "--pipeline-model-parallel-size 2", "--tensor-model-parallel-size 2 --sequence-parallel"
EP2 = "--expert-model-parallel-size 2 --expert-tensor-parallel-size 1"
# Micro-batch size, flags of the layout, and the flag by which the run starts from ours.
STARTS = {
    "pp2-vpp2": (2, f"{PP2} --num-virtual-stages-per-pipeline-rank 2", "--load"),
    "tp2-sp-ep2": (2, f"{TP2} {EP2}", "--pretrained-checkpoint"),
    "dp2-bf16": (1, "--bf16 --ckpt-fully-parallel-load", "--load"),
}


@pytest.fixture(scope="module")
def ours(workplace, tmp_path_factory: pytest.TempPathFactory) -> Path:  # type: ignore[no-untyped-def]
    """Student and teacher as torch_dist."""
    root = tmp_path_factory.mktemp("ours")
    hf_to_torch_dist(workplace.student, root / "student")
    hf_to_torch_dist(workplace.teacher, root / "teacher")
    return root


@pytest.mark.slow
@pytest.mark.parametrize("layout", STARTS)
def test_the_same_run_from_either_format(workplace, ours: Path, layout: str) -> None:  # type: ignore[no-untyped-def]
    """Bit for bit: the same weights under the same layout. The third step sees what the optimizer made of them."""
    micro_batch, words, flag = STARTS[layout]
    flags = ["--micro-batch-size", str(micro_batch), "--train-iters", "3", *words.split()]
    expected = workplace.train(f"{layout}-hf", 2, *flags)
    start = [flag, str(ours / "student"), "--teacher-load", str(ours / "teacher")]
    found = workplace.train(f"{layout}-torch-dist", 2, *flags, *start, *STRICT, start=False)
    assert len(expected["lm loss"]) == 3
    rounds = [
        line for line in workplace.log(f"{layout}-hf").read_text().splitlines() if ": rounds to bfloat16 " in line
    ]
    assert len(rounds) == (2 if "bf16" in layout else 0), rounds  # of student and teacher, once
    for term in TERMS:
        assert found[term] == expected[term], term


FLIPPED = "failed for 1 file(s) in {}/release: __0_0.distcp: hash mismatch"


def copy_with_a_flipped_bit(source: Path, target: Path) -> Path:
    """A checkpoint that lost one bit of a weight on the way: every size is right, and every archive opens."""
    shutil.copytree(source, target)
    checkpoint = open_checkpoint(target)
    piece = checkpoint.pieces["output_layer.weight"][0]
    with piece.file.open("r+b") as file:
        file.seek(piece.position + piece.length // 2)
        (byte,) = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte ^ 1]))
    with pytest.raises(CheckpointError, match="damaged data"):  # as we read it; Megatron does not look at that
        checkpoint.read("lm_head.weight")
    return target


def test_a_flipped_bit_of_the_student(workplace, ours: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """Megatron finds it, on all ranks."""
    start = ["--load", str(copy_with_a_flipped_bit(ours / "student", tmp_path / "student"))]
    flags = f"--micro-batch-size 2 {PP2}".split()
    with pytest.raises(RuntimeError) as caught:
        workplace.train("flipped", 2, *flags, *start, *VERIFY, start=False, distil=False)
    error = str(caught.value).splitlines()[-1]
    assert error.startswith("megatron_slim.errors.CheckpointError: refused by Megatron: ")
    assert FLIPPED.format(tmp_path / "student") in error


@pytest.mark.slow
def test_a_verified_run_resumes_converts_and_is_tuned(workplace, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """What Megatron saved with hashes and a distributed optimizer: resumed strictly, as Hugging Face, as a start."""
    save = tmp_path / "run"
    flags = f"--micro-batch-size 2 --train-iters 4 --save-interval 2 {TP2} {EP2}".split()
    # The state of its rerun machine Megatron saves and mostly does not load: raise_all takes exception to that.
    argv = [*flags, "--save", str(save), "--load", str(save), *STRICT, "--rerun-mode", "disabled"]
    whole = workplace.train("verified", 2, *argv)
    (save / "latest_checkpointed_iteration.txt").write_text("2")
    resumed = workplace.train("verified-resumed", 2, *argv)
    for term in TERMS:
        assert resumed[term] == whole[term][2:], term
    (save / "latest_checkpointed_iteration.txt").write_text("2")
    torch_dist_to_hf(save, tmp_path / "hf")
    one = ["--micro-batch-size", "2", "--train-iters", "2"]
    expected = workplace.train("from-hf", 1, *one, "--pretrained-checkpoint", str(tmp_path / "hf"), start=False)
    tuned = workplace.train("tuned", 1, *one, "--finetune", "--load", str(save), *VERIFY, start=False)
    for term in TERMS:
        assert tuned[term] == expected[term], term


def rewrite(manifest: Path, change: Callable[[dict[str, str]], object]) -> None:
    content = json.loads(manifest.read_text())
    change(content["files"])
    manifest.write_text(json.dumps(content))


MANIFESTS = {
    "none": ("--load", Path.unlink, "release: no integrity.json; only what was saved with --verify-integrity"),
    "none of the teacher": ("--teacher-load", Path.unlink, "release: no integrity.json"),
    "no table": ("--load", lambda path: path.write_text('{"files": 3}'), "integrity.json: is not a manifest of hashes"),
    "no JSON": ("--load", lambda path: path.write_text("{"), "integrity.json: not readable as JSON"),
    "one left out": (
        "--load",
        lambda path: rewrite(path, lambda files: files.pop("__0_0.distcp")),
        "integrity.json: does not name __0_0.distcp",
    ),
    "one elsewhere": (
        "--teacher-load",
        lambda path: rewrite(path, lambda files: files.update({"../../x": ""})),
        "integrity.json: names files that are not there: ../../x",
    ),
}


def refusal(monkeypatch: pytest.MonkeyPatch, *argv: str) -> str:
    """What `main` says to a command line, in this process and before anything is started."""
    words = [
        *"--mock-data --seq-length 32 --micro-batch-size 1 --global-batch-size 2 --train-iters 2 --lr 1e-3".split(),
        *argv,
    ]
    with pytest.raises(SlimError) as caught:
        main(words)
    return str(caught.value)


@pytest.mark.parametrize("case", MANIFESTS)
def test_a_manifest_that_would_hide_damage(  # type: ignore[no-untyped-def]
    workplace, ours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    flag, harm, message = MANIFESTS[case]
    shutil.copytree(ours / "student", tmp_path / "copy")
    harm(tmp_path / "copy" / "release" / "integrity.json")
    argv = ["--pretrained-checkpoint", str(workplace.student), flag, str(tmp_path / "copy")]
    assert message in refusal(monkeypatch, *argv, *VERIFY)


def test_a_flipped_bit_of_the_teacher(workplace, ours: Path, tmp_path: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    """The teacher does not pass through Megatron's loader: we look ourselves, on request."""
    copy_with_a_flipped_bit(ours / "teacher", tmp_path / "teacher")
    argv = ["--load", str(ours / "student"), "--teacher-load", str(tmp_path / "teacher")]
    assert FLIPPED.format(tmp_path / "teacher") in refusal(monkeypatch, *argv, *VERIFY)
    assert "not started by torchrun" in refusal(monkeypatch, *argv)
    assert "not started by torchrun" in refusal(monkeypatch, *argv[:-1], str(ours / "teacher"), *VERIFY)


def test_where_megatron_would_exit_with_status_0(workplace, ours: Path, tmp_path: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    flags = ["--load", str(tmp_path), "--exit-on-missing-checkpoint"]
    found = refusal(monkeypatch, *flags, "--hf-config", str(workplace.student))
    assert found == f"{tmp_path}: holds no checkpoint; check --load"
    assert "not started by torchrun" in refusal(monkeypatch, *flags, "--pretrained-checkpoint", str(workplace.student))


def test_the_iteration_that_is_asked_for_is_the_one_that_is_checked(ours: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    found = refusal(monkeypatch, "--load", str(ours / "student"), "--ckpt-step", "7")
    assert found == f"{ours}/student/iter_0000007: no such directory; check --ckpt-step"
