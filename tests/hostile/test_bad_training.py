"""A training run that cannot work says so before anything is built: every violation, of student and teacher."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import megatron_slim.mcore

import numpy as np
import pytest

from megatron_slim.architecture.parallelism import layout_violations
from megatron_slim.errors import SlimError
from megatron_slim.sample_set import write_samples
from megatron_slim.testing import tiny_shape, write_tiny_checkpoint, write_tokens
from megatron_slim.training.pretrain import main

ROOT = Path(__file__).resolve().parents[2]
SIZES = {"num_layers": 4, "vocab_size": 120, "max_position_embeddings": 64}
BASE = "--seq-length 32 --micro-batch-size 1 --global-batch-size 2 --train-iters 2 --lr 1e-3 --eval-iters 0"
GIVEN = f"{BASE} --pretrained-checkpoint student --data-path d"
PP4 = "--pipeline-model-parallel-size 4"
CASES = {
    "shape by hand": ("--num-layers 3 --vocab-size=5", "--num-layers, --vocab-size cannot be given"),
    "another vocabulary": ("--teacher-load odd", "teacher: vocabulary 130, the student has 120"),
    "pipeline": (
        "--teacher-load odd --pipeline-model-parallel-size 4 --num-virtual-stages-per-pipeline-rank 3",
        "student: num_layers 4 does not divide into 4 x 3 virtual pipeline stages (--pipeline-layout auto needs no "
        "division); teacher: num_layers 3 does not divide into 4 x 3 virtual pipeline stages",
    ),
    "auto and few layers": (
        f"--pipeline-layout auto {PP4} --num-virtual-stages-per-pipeline-rank 2",
        "student: num_layers 4 is fewer than the 6 inner ones of 4 x 2 virtual pipeline stages",
    ),
    "auto and explicit": (
        f"--pipeline-layout auto {PP4} --pipeline-model-parallel-layout Et|t|t|tmL",
        "--pipeline-layout auto chooses the stages itself",
    ),
    "virtual stages by layers": (
        f"--pipeline-layout auto {PP4} --num-layers-per-virtual-pipeline-stage 1",
        "needs --num-virtual-stages-per-pipeline-rank, not",
    ),
    "stages of one model": (
        f"{PP4} --decoder-first-pipeline-num-layers 1",
        "--decoder-first-pipeline-num-layers does not say what the teacher's stages hold; use --pipeline-layout auto",
    ),
    "layout in other words": (f"{PP4} --pipeline-model-parallel-layout Ex|t|t|mL", "'Ex|t|t|mL' is not of E, t, m, L"),
    "stages of a layout": (
        f"{PP4} --pipeline-model-parallel-layout Etttt|mL",
        "student: layout 'Etttt|mL' has 2 stages",
    ),
    "layers of a layout": (
        f"{PP4} --pipeline-model-parallel-layout Et|t|t|mL",
        "student: layout 'Et|t|t|mL' has 3 layers, the model 4",
    ),
    "MTP block apart": (
        f"{PP4} --pipeline-model-parallel-layout Ett|tt|m|L",
        "student: layout 'Ett|tt|m|L' does not begin with E and end with mL: heads and MTP blocks share a stage",
    ),
    "nothing to train": (
        f"{PP4} --pipeline-model-parallel-layout Etttt|||mL",
        "student: layout 'Etttt|||mL' has a stage without a layer",
    ),
    "the teacher's layout": (
        f"--teacher-load odd {PP4} --teacher-pipeline-layout Ett|||mL",
        "teacher: layout 'Ett|||mL' has 2 layers, the model 3",
    ),
    "a teacher's layout without a teacher": (
        f"{PP4} --teacher-pipeline-layout Etttt|||mL",
        "--teacher-pipeline-layout without a teacher",
    ),
    "tensor": (
        "--teacher-load teacher --tensor-model-parallel-size 3",
        "teacher: num_attention_heads 4 does not divide by tensor parallel size 3",
    ),
    "experts": (
        "--teacher-load odd --expert-model-parallel-size 4",
        "teacher: num_moe_experts 6 does not divide by expert parallel size 4",
    ),
    "processes": ("--pipeline-model-parallel-size 2", "1 processes do not divide into groups of tp 1 x pp 2"),
    "optimizer": ("--optimizer sgd", "--optimizer sgd has no second moment, which the planner and carried"),
    "size 0": ("--tensor-model-parallel-size 0", "tp parallel size 0 is not positive"),
    "context parallel": (
        "--context-parallel-size 4 --seq-length 36 --hybrid-context-parallel",
        "1 processes do not divide into groups of tp 1 x cp 4 x pp 1; --seq-length 36 does not divide by 8 (context "
        "parallel size 4); --hybrid-context-parallel is not supported: samples are whole sequences of one length; "
        "student: linear_num_key_heads 2 does not divide by tensor times context parallel size 4",
    ),
    "experts without sequence parallelism": (
        "--tensor-model-parallel-size 2",
        "tensor parallelism of MoE layers needs --sequence-parallel",
    ),
    "experts in parts on gloo": (
        "--tensor-model-parallel-size 2 --sequence-parallel --expert-model-parallel-size 2",
        "expert tensor parallel size 2 with expert parallel size 2 gathers unequal numbers of tokens, which gloo "
        "cannot; give --expert-tensor-parallel-size 1",
    ),
    "an expert bias": (
        "--moe-router-enable-expert-bias --bf16",
        "--moe-router-enable-expert-bias cannot be given",
    ),
    "no interval": ("--eval-interval 0", "--eval-interval 0 is not positive"),
    "no rows": ("--make-vocab-size-divisible-by 0", "--make-vocab-size-divisible-by 0 is not positive"),
    "odd rows": (
        "--make-vocab-size-divisible-by 1 --tensor-model-parallel-size 7",
        "student: 120 rows of the padded vocabulary do not divide by tensor parallel size 7",
    ),
    "Megatron's own, later": (
        "--recompute-granularity selective --recompute-modules moe_act",
        "Megatron refuses the arguments: moe_act in recompute_modules is only supported with moe_grouped_gemm",
    ),
    "long": (
        "--teacher-load odd --seq-length 65",
        "student: --seq-length 65 is above max_position_embeddings 64; "
        "teacher: --seq-length 65 is above max_position_embeddings 32",
    ),
    "kd flags": (
        "--kd-loss jsd --kd-temperature 0 --kd-top-k 121 --loss-chunk-size 0",
        "--kd-temperature 0 is not positive; --kd-top-k has no effect on --kd-loss jsd; use --kd-loss top-k; "
        "--kd-top-k 121 is not between 1 and the vocabulary's 120; --kd-loss and --kd-temperature need a teacher; "
        "give --teacher-load or --teacher-cache; --loss-chunk-size 0 is not positive",
    ),
    "weights without a teacher": (
        "--kd-lambda-end 0.5 --mtp-beta-start 0.3",
        "--kd-lambda-* needs a teacher; give --teacher-load or --teacher-cache",
    ),
    "hidden states without a teacher": (
        "--hidden-kd-layers 0:1",
        "--hidden-kd-layers needs a teacher; give --teacher-load",
    ),
    "hidden states of no layer": (
        "--hidden-kd-loss mse",
        "--hidden-kd-* has no effect without --hidden-kd-layers",
    ),
    "layers that are not there": (
        "--teacher-load teacher --hidden-kd-layers 4:1,1:4,1:9,0:0,0:0 --cuda-graph-impl local",
        "--cuda-graph-impl cannot be "
        "combined with --hidden-kd-layers; --hidden-kd-layers names 0:0 2 times; --hidden-kd-layers: the student has "
        "layers 0 to 3, not 4; --hidden-kd-layers: the teacher has layers 0 to 3, not 4, 9",
    ),
    "weights": (
        "--teacher-load teacher --kd-lambda-end 75 --mtp-beta-start -1 --hidden-kd-layers 0:1 "
        "--hidden-kd-weight-end -2",
        "--kd-lambda-end 75 is above 1; --mtp-beta-start -1 is below 0; --hidden-kd-weight-end -2 is below 0",
    ),
    "saving below a file": (
        "--save student/config.json/run",
        "student/config.json: is not a directory; choose another name",
    ),
    "saving in another process": (
        "--async-save",
        "--async-save needs --use-persistent-ckpt-worker, without which Megatron ignores it; --async-save needs a GPU: "
        "the process that writes ends without one, and the run waits for it; --async-save needs "
        "nvidia-resiliency-ext, which is not installed, or --async-strategy mcore",
    ),
    "without effect": (
        "--fim-data --mtp-detach-heads",
        "--mtp-detach-heads is not supported: all heads train the output layer; --fim-data is not supported: samples "
        "are those of a GPT dataset",
    ),
    "teacher ahead": (
        "--teacher-ahead 2 --phase-transition-iterations 1",
        "--teacher-ahead without a teacher; give --teacher-load; --teacher-ahead does not go with "
        "--phase-transition-iterations: batches are found by the number of samples consumed since the start",
    ),
    "fp8 without its library": ("--fp8-format hybrid --bf16", "FP8 needs Transformer Engine, which is not installed"),
    "a teacher in fp8 without it": ("--teacher-load teacher --teacher-dtype fp8", "FP8 needs Transformer Engine"),
    "a teacher's FP8 recipe without a teacher": (
        "--teacher-load teacher --teacher-dtype bf16 --teacher-fp8-recipe mxfp8",
        "--teacher-fp8-recipe needs a teacher in FP8; give --teacher-load and --teacher-dtype fp8",
    ),
    "fp8 output layer": ("--fp8-output-proj", "--fp8-output-proj is not supported: the output layer is part of the"),
    "buffers of one model": (
        "--teacher-load teacher --tp-comm-overlap",
        "--tp-comm-overlap has buffers of",
    ),
    "document ends": (
        "--eod-mask-loss",
        "--eod-mask-loss and --reset-position-ids need the id that ends a document; give --null-tokenizer-eod-id",
    ),
    "documents apart": (
        "--reset-attention-mask --micro-batch-size 2 --context-parallel-size 2 --deterministic-mode",
        "--reset-attention-mask needs --reset-position-ids, which say where documents begin; --micro-batch-size 2: "
        "documents that do not see each other go through layers one sample at a time; give --micro-batch-size 1, and "
        "longer samples for as many tokens; --context-parallel-size 2 is not possible with documents that do not see "
        "each other; --deterministic-mode is not possible",
    ),
    "documents marked twice": (
        "--data-path set --eod-mask-loss --reset-position-ids --reset-attention-mask --null-tokenizer-eod-id 1",
        "--eod-mask-loss does not go with a sample set: samples say themselves which tokens count; "
        "--reset-position-ids does not go with a sample set: samples say themselves where documents begin; "
        "--reset-attention-mask does not go with a sample set: samples say themselves whether documents see each other",
    ),
    "samples in pairs": ("--data-path set --eval-micro-batch-size 2", "--eval-micro-batch-size 2: documents that do"),
    "two kinds of data": (
        "--data-path 1 d 2 set",
        "set: is a sample set, which does not go with documents such as d; give data of one kind",
    ),
    "samples of two kinds": (
        "--train-data-path set --valid-data-path together",
        "set: has documents that do not see each other, together has others; train on samples of one kind",
    ),
    "samples of another length": (
        "--data-path set --seq-length 16",
        "set: has samples of 32, --seq-length is 16; give --seq-length 32, or make the samples again",
    ),
    "samples of another vocabulary": ("--data-path beyond", "beyond: token id 120 is beyond the vocabulary of 120"),
    "no samples for validation": (
        "--data-path set --eval-iters 1 --split 9,0.1,1",
        "set: --split 9,0.1,1 leaves none of its 3 samples for the validation part; give --train-data-path, "
        "--valid-data-path and --test-data-path, another --split, or more samples, or --eval-iters 0",
    ),
    "damaged samples": ("--data-path torn-set", "torn-set/loss_mask.npy: not readable as a .npy matrix"),
    "no data there": ("--data-path nowhere", "nowhere: no such data"),
    "one of many": ("--data-path 1 d 2 nowhere", "nowhere: no such data"),
    "a file": ("--data-path d.bin", "d.bin: is a file of a data set; name its prefix, d"),
    "ids": ("--data-path big", "big.bin: token id 120 is beyond the vocabulary of 120"),
    "ids below 0": ("--data-path minus", "minus.bin: token id -100 is below 0"),
    "padding in the data": ("--data-path padded --null-tokenizer-pad-id -1", "padded.bin: token id -1 is below 0"),
    "ids below 0 in a part": (
        "--train-data-path d --valid-data-path d minus --test-data-path d",
        "minus.bin: token id -100 is below 0",
    ),
    "ids that wrapped": (
        "--data-path bytes --pretrained-checkpoint wide",
        "bytes.bin: uint8 holds ids up to 255, the vocabulary",
    ),
    "torn data": ("--data-path torn", "torn.bin: truncated: 1596 bytes, the index says 1600"),
    "torn data, no mmap": ("--data-path torn --no-mmap-bin-files", "torn.bin: truncated"),
    "torn data of a part": (
        "--train-data-path d --valid-data-path torn --test-data-path d --no-mmap-bin-files",
        "torn.bin: truncated",
    ),
    "torn data of a list": ("--data-args-path list --no-mmap-bin-files", "torn.bin: truncated"),
    "torn data of lists": ("--per-split-data-args-path lists.json", "torn.bin: truncated"),
    "lost documents": ("--data-path merged", "merged.idx: its documents are sequences 0 to 2, there are 4"),
    "no validation part": (
        "--eval-iters 1 --split 90,5,5 --data-path few",
        "few: --split 90,5,5 leaves none of its 3 documents for the validation part; give --train-data-path",
    ),
    "no data for validation": (
        "--eval-iters 1 --split 1,0,0",
        "there are no data for the validation part; give it a share",
    ),
    "too little for validation": (
        "--eval-iters 1 --split 2,1,0.1 --data-path short",
        "short: has 20 tokens in 1 documents for the validation part, one sample takes 33; give --train-data-path,",
    ),
    "weights and none": ("--data-path 10 d few", "--data-path: weights and data sets do not alternate in '10 d few'"),
    "weights behind": (
        "--data-path d 10 few 20",
        "do not alternate in 'd 10 few 20'; give a weight before every data set",
    ),
    "a negative weight": ("--data-path 1 d -1 few", "--data-path: weight -1 is not positive and finite"),
    "one of two without weights": ("--data-path d nowhere", "nowhere: no such data"),
    "data twice": ("--mock-data", "data are given twice: by --data-path and by --mock-data"),
    "all of the validation": ("--full-validation", "--full-validation is not supported: some samples would count more"),
    "no training part": ("--split 0.1,9,9 --data-path few", "none of its 3 documents for the training part"),
    "a student's declared block": ("--pretrained-checkpoint declared", ": config.json declares an MTP block (1), but"),
    "a teacher's declared block": (
        "--teacher-load declared",
        "or leave MTP out with --without-mtp (a teacher's with",
    ),
    "declared blocks that are left out": (
        "--pretrained-checkpoint declared --teacher-load declared --without-mtp --teacher-without-mtp --data-path none",
        "none: no such data",
    ),
    "no teacher": ("--teacher-load nowhere", "nowhere: no such directory"),
    "no student": ("--pretrained-checkpoint nowhere", "nowhere: no such directory"),
    "another student": (
        "--hf-config teacher",
        "student: not of the student's shape: hidden 48, not 64; expert 4, not 8",
    ),
    "torn load": ("--load run-x", "run-x/latest_checkpointed_iteration.txt: holds 'x'"),
    "empty save": ("--save run-", "run-/latest_checkpointed_iteration.txt: holds ''"),
    "lost iteration": ("--load run-7", "names iter_0000007, which does not exist"),
    "no steps": ("--train-iters 0", "nothing to train"),
    "Megatron's own": ("--global-batch-size 3 --micro-batch-size 2", "Megatron refuses the arguments: "),
    "no torchrun": ("", "not started by torchrun"),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("training")
    write_tiny_checkpoint(root / "teacher", tiny_shape(**SIZES))
    write_tiny_checkpoint(root / "student", tiny_shape(**SIZES, hidden_size=48, num_moe_experts=4))
    write_tiny_checkpoint(root / "declared", tiny_shape(**SIZES, mtp_num_layers=0))
    shutil.copyfile(root / "teacher" / "config.json", root / "declared" / "config.json")
    kinds = ("linear_attention", "full_attention", "full_attention")
    odd = {"layer_types": kinds, "vocab_size": 130, "max_position_embeddings": 32, "num_moe_experts": 6}
    write_tiny_checkpoint(root / "odd", tiny_shape(**odd))
    for name, largest in {"d": 119, "torn": 5, "big": 120}.items():
        write_tokens(root / name, np.full((1, 400), largest))
    for name, largest, documents in (("set", 119, True), ("together", 5, False), ("beyond", 120, True)):
        (root / name).mkdir()
        ones = np.ones((3, 32))
        write_samples(root / name, np.full((3, 33), largest), ones, ones * 0, documents=documents, about={})
    shutil.copytree(root / "set", root / "torn-set")
    (root / "torn-set" / "loss_mask.npy").write_bytes(b"")
    write_tokens(root / "few", np.full((3, 40), 1))
    write_tiny_checkpoint(root / "wide", tiny_shape(**SIZES | {"vocab_size": 257}))
    write_tokens(root / "bytes", np.full((1, 400), 1), "uint8")
    for name, last in {"minus": -100, "padded": -1}.items():
        write_tokens(root / name, [*np.ones((30, 32)), np.full(10, last)])
    write_tokens(root / "merged", np.full((4, 40), 1))
    index = (root / "merged.idx").read_bytes()
    (root / "merged.idx").write_bytes(index[:26] + np.int64(3).tobytes() + index[34:-16])  # boundaries 0, 1, 2
    (root / "list").write_text("3 d\n1 torn\n")
    (root / "lists.json").write_text('{"train": ["d"], "valid": "1 d 1 torn", "test": null}')
    write_tokens(root / "short", np.full((3, 20), 1))
    (root / "torn.bin").write_bytes((root / "torn.bin").read_bytes()[:-4])
    for content in ("x", "", "7"):
        (root / f"run-{content}").mkdir()
        (root / f"run-{content}" / "latest_checkpointed_iteration.txt").write_text(content)
    return root


@pytest.mark.parametrize("name", CASES)
def test_refused(files: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options, message = CASES[name]
    monkeypatch.chdir(files)
    if name != "no torchrun":
        monkeypatch.setenv("MASTER_ADDR", "localhost")
    given = GIVEN.removesuffix(" --data-path d") if "-data-" in options else GIVEN
    argv = f"{given} {options}".split()
    before = sorted(files.rglob("*"))
    with pytest.raises(SlimError) as caught:
        main(argv)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert sorted(files.rglob("*")) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            "--hidden-kd-layers 0:1,1:3",
            "--hidden-kd-layers: layers of a pair are in different pipeline stages: 1:3 (stages 1 and 2 of 2; stage 1 "
            "has layers 0-1 of the student, 0-1 of the teacher); choose layers of one stage, or other stages by",
        ),
        (
            "--hidden-kd-layers 0:2 --num-virtual-stages-per-pipeline-rank 2",
            "0:2 (stages 1 and 3 of 4; stage 1 has layers 0-0 of the student, 0-0 of the teacher)",
        ),
    ],
)
def test_layers_of_two_stages(files: Path, options: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(files)
    for name, value in {"MASTER_ADDR": "localhost", "WORLD_SIZE": "2", "RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    argv = f"{GIVEN} --teacher-load teacher --pipeline-model-parallel-size 2 {options}".split()
    with pytest.raises(SlimError) as caught:
        main(argv)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--data-path d", "no model shape; give --hf-config"),
        ("--pretrained-checkpoint student", "no training data; give --data-path"),
    ],
)
def test_left_out(files: Path, options: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(files)
    argv = f"{BASE} {options}".split()
    with pytest.raises(SlimError, match=message):
        main(argv)


@pytest.mark.parametrize(
    ("options", "message"), [("--seq-length 65", "is above max_position_embeddings"), ("--sequence-lenght 3", "--help")]
)
def test_the_command_prints_one_line(files: Path, options: str, message: str) -> None:
    command = [sys.executable, str(ROOT / "tools/pretrain.py"), *f"{GIVEN} {options}".split()]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=files, capture_output=True, text=True, timeout=120, env=environment, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ") and message in line


def test_every_violation_of_a_layout() -> None:
    shape = tiny_shape()
    assert layout_violations(shape, tp=2, pp=2, ep=8, etp=4) == []
    found = layout_violations(shape, tp=3, pp=3, ep=3, etp=5)
    assert [sentence.split()[0] for sentence in found] == [
        "num_layers",
        "num_attention_heads",
        "linear_num_key_heads",
        "linear_num_value_heads",
        "num_moe_experts",
        "moe_ffn_hidden_size",
        "moe_shared_expert_intermediate_size",
        "num_query_groups",
    ]
    assert layout_violations(tiny_shape(num_query_groups=1), tp=2) == []
