"""`megatron-slim run`: what it asks for, what it runs, and that a run that was killed ends as one that was not."""

from __future__ import annotations

import json
import os
import random
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from megatron_slim.checkpoint.convert import open_checkpoint
from megatron_slim.cli.run import parser
from megatron_slim.compression import runner, steps
from megatron_slim.compression.settings import read_settings
from megatron_slim.errors import SlimError
from megatron_slim.pruning.statistics import Statistics
from megatron_slim.recipe_run import SECTIONS
from megatron_slim.sample_set import SAMPLES
from megatron_slim.teacher_cache.names import CACHE
from megatron_slim.testing import reserved_port, tiny_shape, write_tiny_checkpoint, write_tokens
from megatron_slim.training.variables import VARIABLES, as_text, expand, with_recipe

ROOT = Path(__file__).resolve().parents[2]
SECTIONS_TEXT = """
calibrate: {num_samples: 4, seq_length: 16, micro_batch_size: 2}
train: {seq_length: 32, micro_batch_size: 1, global_batch_size: 2, lr: 1e-3, min_lr: 1e-4, lr_warmup_iters: 1,
        save_interval: 1, eval_iters: 0, log_interval: 1, flags: [--no-teacher-check]%s}
evaluate: {num_samples: 8, micro_batch_size: 4}
"""
ONE = "version: 1\ntarget: {num_layers: 4, num_moe_experts: 4}" + SECTIONS_TEXT % ", tokens: 192"
TWO = (
    "version: 1\nphases:\n- {tokens: 192, target: {num_layers: 6}}\n"
    "- {tokens: 192, target: {num_layers: 4, num_moe_experts: 4}}" + SECTIONS_TEXT % ""
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher and data; to be read alone."""
    folder = tmp_path_factory.mktemp("run")
    shape = tiny_shape(num_layers=8, num_moe_experts=8, vocab_size=96)
    write_tiny_checkpoint(folder / "teacher", shape, seed=1)
    rng = np.random.default_rng(0)
    for name in ("train", "validation"):
        write_tokens(folder / name, rng.integers(0, 96, (60, 33)))
    (folder / "one.yaml").write_text(ONE)
    (folder / "two.yaml").write_text(TWO)
    return folder


def arguments(place: Path, save: Path, recipe: str = "one.yaml", *more: str) -> list[str]:
    words = [str(place / recipe), "--teacher", str(place / "teacher"), "--save", str(save)]
    return [*words, "--data", str(place / "train"), "--valid-data", str(place / "validation"), *more]


def settings(place: Path, save: Path, recipe: str = "one.yaml", **more: Any) -> Any:
    data = {"data": [str(place / "train")], "valid_data": [str(place / "validation")]}
    return read_settings(place / recipe, place / "teacher", save, **{**data, **more})


def test_keys_of_train_are_arguments_of_distill() -> None:
    own = {"FLAGS", "MOMENTS_OF_MERGED", "RECORD"}
    assert {key.upper() for key in SECTIONS["train"]} - set(VARIABLES) == own


def test_a_dry_run_says_what_every_step_needs_and_makes_nothing(place: Path, tmp_path: Path, tool: Any) -> None:
    done = tool("tools/run.py", *arguments(place, tmp_path / "r", "two.yaml", "--dry-run", "--json"))
    assert done.code == 0, done.stderr
    found = {step["name"]: step for step in done.json["steps"]}
    kinds = ("prune", "show-plan", "evaluate-pruned", "train", "export", "evaluate")
    assert list(found) == ["teacher/evaluate", *(f"phase-{phase}/{kind}" for phase in (1, 2) for kind in kinds)]
    assert found["phase-1/train"]["tokens"] == 192 and found["phase-2/train"]["tokens"] == 192
    assert found["phase-1/prune"]["tokens"] == 4 * 16 and found["teacher/evaluate"]["tokens"] == 8 * 32
    # Three checkpoints with a main copy and two moments in fp32 next to the weights.
    assert found["phase-1/train"]["bytes"] == 3 * 4 * found["phase-1/export"]["bytes"]
    words = ("--set", "train.carry_optimizer=true", "--dry-run", "--json")
    carried = tool("tools/run.py", *arguments(place, tmp_path / "r", "two.yaml", *words)).json["steps"]
    nbytes = {step["name"]: step["bytes"] for step in carried}
    assert nbytes["phase-2/prune"] == 4 * nbytes["phase-2/export"]
    assert nbytes["phase-1/prune"] == nbytes["phase-1/export"]
    for words in (["--set", "train.flags=[--optimizer, muon]"], ["--", "--optimizer=muon"]):  # it has one moment
        muon = tool("tools/run.py", *arguments(place, tmp_path / "r", "two.yaml", "--dry-run", "--json", *words))
        nbytes = {step["name"]: step["bytes"] for step in muon.json["steps"]}
        assert nbytes["phase-1/train"] == 3 * 3 * nbytes["phase-1/export"]
    assert all(step["seconds"] > 0 for step in done.json["steps"] if step["tokens"])
    assert not (tmp_path / "r").exists()
    before = found["phase-2/prune"]["command"]
    assert before[-3:] == ["--to", "hf", "--json"]
    assert before[before.index("--load") + 1] == f"{tmp_path}/r/phase-1/training"
    assert "--progressive" in found["phase-1/train"]["command"]


def test_tokens_of_data_with_fewer_samples_than_the_default(place: Path, tmp_path: Path, tool: Any) -> None:
    (tmp_path / "recipe.yaml").write_text(ONE.replace("num_samples: 4, seq_length: 16, ", ""))
    words = arguments(place, tmp_path / "r", "one.yaml", "--dry-run", "--json")
    done = tool("tools/run.py", tmp_path / "recipe.yaml", *words[1:])
    (prune,) = [step for step in done.json["steps"] if step["name"] == "phase-1/prune"]
    assert prune["tokens"] == 60 * 33 // 32 * 32 and "--num-samples" not in prune["command"]


def test_names_with_spaces_are_refused_where_they_would_be_several(place: Path, tmp_path: Path, tool: Any) -> None:
    for more, message in (
        ({"data": [str(tmp_path / "my data")]}, "--data '.*my data' has a space, which separates data sets; give it"),
        ({"valid_data": [str(tmp_path / "my data")], "evaluation_data": place / "train"}, "--valid-data '.*my data'"),
        ({"train": {"record": "fp8"}}, "--save '.*my run' has a space"),
    ):
        with pytest.raises(SlimError, match=message):
            settings(place, tmp_path / "my run", **more)
    assert settings(place, tmp_path / "my run").save == tmp_path / "my run"
    with pytest.raises(SlimError, match="--data 'my data' has a space, which separates data sets"):
        as_text({"DATA": ["0.5", "my data"]})


def test_what_is_given_twice_is_given_together(place: Path, tmp_path: Path, tool: Any) -> None:
    words = arguments(place, tmp_path / "r", "one.yaml", "--dry-run", "--json")
    found = tool("tools/run.py", *words, "--set", "train.global_batch_size=3", "--set", "train.tokens=960").json
    (train,) = [step["command"] for step in found["steps"] if step["name"] == "phase-1/train"]
    assert train[train.index("--train-iters") + 1] == "10" and train[train.index("--global-batch-size") + 1] == "3"
    twice = parser("megatron-slim run").parse_args([*words, "--data", "0.5", "more"])
    assert twice.data == [str(place / "train"), "0.5", "more"]


def test_arguments_of_megatron_may_stand_behind_dashes(place: Path, tmp_path: Path, tool: Any) -> None:
    """As in `megatron-slim distill`; they are checked in the same way."""
    words = arguments(place, tmp_path / "r", "one.yaml", "--dry-run", "--json")
    found = [
        tool("tools/run.py", *words, *more).json["steps"]
        for more in (["--adam-eps", "1e-6"], ["--", "--adam-eps", "1e-6"])
    ]
    commands = [[step["command"] for step in each] for each in found]
    assert commands[0] == commands[1] and ["--adam-eps", "1e-6"] in [command[-2:] for command in commands[0]]
    assert (
        "training would refuse: argument --adam-eps: expected one argument"
        in tool("tools/run.py", *words, "--", "--adam-eps").error
    )


def test_settings_of_a_cluster_are_known_from_anywhere(
    place: Path, tmp_path: Path, tool: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What submits jobs asks for GPUs by them; training is not checked by a machine without."""
    words = arguments(place, tmp_path / "r", "one.yaml", "--dry-run", "--json")

    def found(*more: str) -> object:
        return tool("tools/run.py", *words, *more).json["settings"]

    assert found() is None and found("--settings=h100_8") == "h100_8" == found("--set", "train.settings=h100_8")
    monkeypatch.setenv("SETTINGS", "h100_64")
    assert found() == "h100_64" and found("--settings", "h100_8") == "h100_8"


def test_the_table_of_a_dry_run(place: Path, tmp_path: Path, tool: Any) -> None:
    done = tool("tools/run.py", *arguments(place, tmp_path / "r", "one.yaml", "--dry-run"))
    assert "phase-1/train" in done.stdout and "megatron-slim distill --teacher" in done.stdout


def test_a_recipe_of_sizes_alone_has_samples_of_one_length(place: Path, tmp_path: Path) -> None:
    """Calibration, evaluation and training, as long as training's default; a matrix has its own."""
    (tmp_path / "recipe.yaml").write_text("version: 1\ntarget: {num_layers: 4}\ntrain: {tokens: 40M}\n")
    np.save(tmp_path / "tokens.npy", np.zeros((4, 16), dtype=np.int64))

    def lengths(**data: Any) -> dict[str, str | None]:
        words = {"data": [str(place / "train")], "valid_data": [str(place / "validation")], **data}
        found = steps.steps(read_settings(tmp_path / "recipe.yaml", place / "teacher", tmp_path / "r", **words))
        commands = {step.kind: step.command for step in found if {"--data", "--calibration-data"} & {*step.command}}
        return {
            kind: command[command.index("--seq-length") + 1] if "--seq-length" in command else None
            for kind, command in commands.items()
        }

    kinds = (steps.EVALUATE_TEACHER, steps.PRUNE, steps.EVALUATE_PRUNED, steps.TRAIN, steps.EVALUATE)
    assert lengths() == dict.fromkeys(kinds, "4096")
    matrices = {"calibration_data": tmp_path / "tokens.npy", "evaluation_data": tmp_path / "tokens.npy"}
    assert lengths(**matrices) == dict.fromkeys(kinds) | {steps.TRAIN: "4096"}
    assert lengths(train={"seq_length": 32}, **matrices) == dict.fromkeys(kinds) | {steps.TRAIN: "32"}
    assert lengths(megatron=["--seq-length=32"]) == dict.fromkeys(kinds, "32")


def test_training_takes_the_sizes_that_tokens_are_counted_by(place: Path, tmp_path: Path) -> None:
    """And not those of the environment or of a file of settings, which win over a recipe's."""
    found = settings(place, tmp_path / "r")
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "recipe.yaml").write_text(found.text)
    (tmp_path / "mine.sh").write_text(': "${GLOBAL_BATCH_SIZE:=7}" "${SEQ_LENGTH:=16}"\nsettings_args=()\n')
    (train,) = [step for step in steps.steps(found) if step.kind == steps.TRAIN]
    command = [*steps.command_line(train), "--settings", str(tmp_path / "mine.sh"), "--dry-run"]
    environment = os.environ | {"GLOBAL_BATCH_SIZE": "9", "SEQ_LENGTH": "8"}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=True)
    words = shlex.split(done.stdout)
    arguments = expand(words[words.index("--tp") :] if "--tp" in words else words[words.index("--student") :])
    sizes = {flag: arguments[arguments.index(flag) + 1] for flag in ("--seq-length", "--global-batch-size")}
    assert sizes == {"--seq-length": "32", "--global-batch-size": "2"}
    # Megatron's flags win over both.
    replaced = ["train.flags=[--global-batch-size, 4]"]
    found = settings(place, tmp_path / "r", replaced=replaced, megatron=["--seq-length", "16"])
    assert (found.samples_per_iteration, found.seq_length, found.stops) == (4, 16, (3,))


def test_the_command_line_wins(place: Path, tmp_path: Path) -> None:
    found = settings(
        place,
        tmp_path / "r",
        replaced=["evaluate.num_samples=2", "train.lr=0.5", "target.num_layers=5"],
        train={"lr": "0.25", "tokens": "320"},
        megatron=["--adam-beta2", "0.95"],
    )
    assert found.section("evaluate")["num_samples"] == 2 and found.section("train")["lr"] == 0.25
    assert found.recipe.target.num_layers == 5 and found.stops == (5,)
    (train,) = [step for step in steps.steps(found) if step.kind == steps.TRAIN]
    counted = ("--seq-length", "32", "--global-batch-size", "2")
    assert train.command[-8:] == ("--train-iters", "5", *counted, "--adam-beta2", "0.95")
    (tmp_path / "recipe.yaml").write_text(found.text)
    assert train.command[train.command.index("--recipe") + 1] == str(found.save / "recipe.yaml")
    said, flags = with_recipe({"RECIPE": str(tmp_path / "recipe.yaml")})
    assert (said["LR"], said["TOKENS"], flags[-1]) == ("0.25", "320", "--no-teacher-check")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--set", "train.lrs=1"], "unknown key train.lrs (did you mean 'lr'?)"),
        (["--set", "train"], "'train' is not SECTION.KEY=VALUE"),
        (["--set", "train.tokens=none"], "train.tokens 'none' is not a number of tokens"),
        (["--set", "target.num_layers=9"], "num_layers 9 is larger than the source's 8"),
        (["--step", "phase-1/trane"], "--step phase-1/trane: there is no such step"),
        (["--step", "phase-1/train"], "--step phase-1/train: teacher/evaluate is not done"),
        (["--evaluation-data", "/nowhere"], "/nowhere: no such data"),
        (["--set", "train.carry_optimizer=true"], "train.carry_optimizer is for recipes with phases"),
        (["--set", "evaluate.acceptance=none.jsonl"], "none.jsonl: no such file"),
        (["--adam-beta", "1"], "training would refuse: unrecognized arguments: --adam-beta 1"),
        (["--tp", "3"], "training would refuse: "),
        (
            ["--", "--train-iters", "7"],
            "--train-iters among the flags for Megatron, which a run gives by itself; leave",
        ),
        (["--set", "train.flags=[--data, a]"], "--data among the flags for Megatron"),
        (
            ["--set", "train.moments_of_merged=sum"],
            "train.moments_of_merged without train.carry_optimizer has no effect",
        ),
        (["--launcher", "slurm"], "--launcher slurm would submit training and not wait for it"),
    ],
)
def test_what_cannot_work_is_refused_before_anything(
    place: Path, tmp_path: Path, tool: Any, words: list[str], message: str
) -> None:
    assert message in tool("tools/run.py", *arguments(place, tmp_path / "r", "one.yaml", *words)).error
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("[--optimizer, muon]", "--carry-optimizer does not go with --optimizer muon, "),
        ("[--train-only, blocks]", "--train-only"),
    ],
)
def test_an_optimizer_that_cannot_be_carried_is_refused_before_the_first_phase(
    place: Path, tmp_path: Path, tool: Any, flags: str, message: str
) -> None:
    words = ["--set", "train.carry_optimizer=true", f"train.flags={flags}", "--dry-run"]
    error = tool("tools/run.py", *arguments(place, tmp_path / "r", "two.yaml", *words)).error
    assert error.startswith("training would refuse: ") and message in error


def test_acceptance_needs_a_teacher_with_an_mtp_block(place: Path, tmp_path: Path, tool: Any) -> None:
    (tmp_path / "prompts.jsonl").write_text('{"tokens": [1, 2]}\n')
    shape = tiny_shape(num_layers=8, num_moe_experts=8, vocab_size=96, mtp_num_layers=0)
    write_tiny_checkpoint(tmp_path / "silent", shape, seed=1)
    words = arguments(place, tmp_path / "r", "one.yaml", "--set", f"evaluate.acceptance={tmp_path}/prompts.jsonl")
    words[words.index("--teacher") + 1] = str(tmp_path / "silent")
    assert "evaluate.acceptance, and the teacher has no MTP block; leave it out" in tool("tools/run.py", *words).error


def test_the_optimizer_is_carried_from_phase_to_phase(place: Path, tmp_path: Path) -> None:
    words = ["train.carry_optimizer=true", "train.moments_of_merged=sum"]
    found = {step.name: step.command for step in steps.steps(settings(place, tmp_path, "two.yaml", replaced=words))}
    assert not {"--carry-optimizer"} & {*found["phase-1/prune"], *found["phase-1/train"]}
    assert "--to torch_dist --carry-optimizer --moments-of-merged sum" in " ".join(found["phase-2/prune"])
    assert "--carry-optimizer" in found["phase-2/train"] and "--moments-of-merged" not in found["phase-2/train"]


def test_statistics_are_carried_from_phase_to_phase(place: Path, tmp_path: Path, tool: Any) -> None:
    words = ("--set", "calibrate.carry_statistics=true", "--dry-run", "--json")
    found = tool("tools/run.py", *arguments(place, tmp_path / "r", "two.yaml", *words)).json["steps"]
    tokens = {step["name"]: step["tokens"] for step in found if step["name"].endswith("/prune")}
    assert tokens == {"phase-1/prune": 4 * 16, "phase-2/prune": 0}
    one = tool("tools/run.py", *arguments(place, tmp_path / "r", "one.yaml", *words))
    assert "calibrate.carry_statistics is for recipes with phases" in one.error
    by_loss = TWO.replace("num_moe_experts: 4}}", "num_moe_experts: 4}, experts: {allocation: loss}}")
    (tmp_path / "last.yaml").write_text(by_loss)
    words = arguments(place, tmp_path / "r", "two.yaml", *words)
    data = tool("tools/run.py", tmp_path / "last.yaml", *words[1:])
    assert "experts.allocation loss in phase 2, which calibrate.carry_statistics leaves without data" in data.error


def test_acceptance_is_a_step_of_its_own(place: Path, tmp_path: Path) -> None:
    words = ["evaluate.acceptance=prompts.jsonl", "evaluate.max_new_tokens=8"]
    found = {step.name: step.command for step in steps.steps(settings(place, tmp_path, replaced=words))}
    assert [name for name in found if "acceptance" in name] == ["teacher/acceptance", "phase-1/acceptance"]
    expected = f"--acceptance {place}/prompts.jsonl --max-new-tokens 8"
    assert expected in " ".join(found["phase-1/acceptance"]) and "--data" not in found["phase-1/acceptance"]
    assert "--max-new-tokens" not in found["phase-1/evaluate"]
    assert f"--teacher {place}/teacher" in " ".join(found["phase-1/evaluate"])
    assert "--teacher" not in found["teacher/evaluate"] and "--teacher" not in found["phase-1/acceptance"]


def test_tasks_of_a_directory_next_to_the_recipe(place: Path, tmp_path: Path) -> None:
    words = ["evaluate.tasks=[a, b]", "evaluate.tasks_dir=tasks"]
    found = {step.name: step.command for step in steps.steps(settings(place, tmp_path, replaced=words))}
    assert f"--tasks a,b --tasks-dir {place}/tasks" in " ".join(found["phase-1/evaluate"])


def test_the_last_export_is_quantized_and_evaluated(place: Path, tmp_path: Path, tool: Any) -> None:
    save, quantize = tmp_path / "r", ["--set", "export.quantize=fp8"]
    done = tool("tools/run.py", *arguments(place, save, "two.yaml", *quantize, "--dry-run", "--json"))
    found = {step["name"]: step for step in done.json["steps"]}
    assert list(found)[-2:] == ["phase-2/quantize", "phase-2/evaluate-fp8"] and "phase-1/quantize" not in found
    words = f"convert --load {save}/model --save {save}/model-fp8 --to hf --quantize fp8 --json"
    assert found["phase-2/quantize"]["command"] == ["megatron-slim", *words.split()]
    before, after = found["phase-2/evaluate"]["command"], found["phase-2/evaluate-fp8"]["command"]
    words = [f"{save}/model-fp8" if word == f"{save}/model" else word for word in before]
    assert after == [*words, "--dequantize-fp8"]
    wrong = tool("tools/run.py", *arguments(place, save, "two.yaml", "--set", "export.quantize=int4"))
    assert "export.quantize 'int4' is unknown (known: fp8)" in wrong.error


def test_quantization_may_be_asked_for_later(place: Path, tmp_path: Path, tool: Any, quick: dict[str, Any]) -> None:
    words = arguments(place, tmp_path / "r")
    assert tool("tools/run.py", *words).code == 0
    quick["ran"].clear()
    assert tool("tools/run.py", *words, "--set", "export.quantize=fp8").code == 0
    assert quick["ran"] == ["phase-1/quantize", "phase-1/evaluate-fp8"]


def test_phases_have_their_own_tokens(place: Path, tmp_path: Path, tool: Any) -> None:
    done = tool("tools/run.py", *arguments(place, tmp_path / "r", "two.yaml", "--tokens", "1K"))
    assert "train.tokens and phases exclude one another" in done.error


def test_tokens_are_needed(place: Path, tmp_path: Path, tool: Any) -> None:
    (tmp_path / "recipe.yaml").write_text("version: 1\ntarget: {num_layers: 2}\n")
    words = arguments(place, tmp_path / "r")[1:]
    assert "no tokens to train on" in tool("tools/run.py", str(tmp_path / "recipe.yaml"), *words).error


def test_a_blend_needs_to_say_what_calibration_reads(place: Path, tmp_path: Path) -> None:
    with pytest.raises(SlimError, match="calibration reads one data set, and --data has 4 words"):
        settings(place, tmp_path / "r", data=["0.5", str(place / "train"), "0.5", str(place / "validation")])


# What stands in for a step in the tests of the runner: writes its output and one line of JSON.
STAND_IN = "import json, pathlib, sys; pathlib.Path(sys.argv[1]).mkdir(parents=True); print(json.dumps({'a': 1}))"


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """Steps that are quick; what runs is listed, and may be given other code."""
    found: dict[str, Any] = {"ran": [], "code": {}}

    def command(step: steps.Step) -> list[str]:
        found["ran"].append(step.name)
        output = (
            step.output
            if step.kind in (steps.PRUNE, steps.SHOW_PLAN, steps.EXPORT, steps.QUANTIZE)
            else step.result.with_suffix(f".made{len(found['ran'])}")
        )
        if step.kind in (steps.RECORD, steps.RECORD_VALIDATION):
            step.output.mkdir(parents=True, exist_ok=True)
            figures = dict.fromkeys(("teacher_loss", "kl_of_rounding", "largest_kl_of_rounding"), 0.5)
            (step.output / CACHE).write_text(json.dumps({"kind": "bf16", "heads": 2, "figures": figures}))
            (step.output / SAMPLES).write_text(json.dumps({"samples": 7, "seq_length": 32}))
        code = found["code"].get(step.name, STAND_IN)
        if step.kind == steps.TRAIN:
            step.output.mkdir(parents=True, exist_ok=True)
            (step.output / steps.TRACKER).write_text(str(found.get("iteration", 3)))
        return [sys.executable, "-c", code, str(output)]

    monkeypatch.setattr(runner, "command_line", command)
    yield found


def test_what_is_done_is_not_done_again(place: Path, tmp_path: Path, tool: Any, quick: dict[str, Any]) -> None:
    words = arguments(place, tmp_path / "r")
    quick["code"]["phase-1/export"] = "import sys; print('error: no space', file=sys.stderr); sys.exit(2)"
    assert tool("tools/run.py", *words).error == "step phase-1/export: no space"
    state = json.loads((tmp_path / "r/run.json").read_text())
    states = {step["name"]: step["state"] for step in state["steps"]}
    assert states["phase-1/train"] == "done" and states["phase-1/export"] == "failed"
    assert states["phase-1/evaluate"] == "waiting"
    quick["code"].clear()
    quick["ran"].clear()
    assert tool("tools/run.py", *words).code == 0
    assert [name for name in quick["ran"] if "result" not in name] == ["phase-1/export", "phase-1/evaluate"]
    assert json.loads((tmp_path / "r/results/phase-1-evaluate.json").read_text()) == {"a": 1}
    quick["ran"].clear()
    assert tool("tools/run.py", *words).code == 0 and quick["ran"] == []


def test_training_by_a_job_of_its_own_has_begun(place: Path, tmp_path: Path, tool: Any) -> None:
    """It leaves checkpoints, and says nothing to run.json."""
    words = arguments(place, tmp_path / "r")
    assert tool("tools/run.py", *words, "--prepare").code == 0
    (tmp_path / "r/phase-1/training").mkdir(parents=True)
    assert tool("tools/run.py", *words, "--prepare", "--lr", "0.5").code == 0
    (tmp_path / "r/phase-1/training/latest_checkpointed_iteration.txt").write_text("1")
    assert "train.lr is 0.001, and the run began with 0.5" in tool("tools/run.py", *words, "--prepare").error


def test_other_values_are_refused_once_a_step_depends_on_them(
    place: Path, tmp_path: Path, tool: Any, quick: dict[str, Any]
) -> None:
    words = arguments(place, tmp_path / "r")
    quick["code"]["phase-1/train"] = "raise SystemExit(1)"
    failed = tool("tools/run.py", *words)
    assert failed.code == 1
    other = tool("tools/run.py", *words, "--set", "calibrate.num_samples=8")
    assert "calibrate.num_samples is 8, and the run began with 4" in other.error
    assert "num_layers" in tool("tools/run.py", *words, "--set", "target.num_layers=5").error
    (tmp_path / "r/phase-1/training").mkdir(exist_ok=True)
    (tmp_path / "r/phase-1/training/latest_checkpointed_iteration.txt").write_text("1")
    assert "train.lr is 0.5, and the run began with 0.001" in tool("tools/run.py", *words, "--lr", "0.5").error
    error = tool("tools/run.py", *words, "--kd-loss=jsd", "--adam-beta2", "0.9").error
    assert "--adam-beta2 is '0.9', and the run began with 'none'; --kd-loss is 'jsd', and the run" in error
    quick["code"].clear()
    # These change nothing that counts, wherever they are.
    flags = ["--set", "train.flags=[--recompute-granularity, selective]", "--micro-batch-size", "2", "--no-load-rng"]
    assert tool("tools/run.py", *words, "--log-interval", "2", *flags).code == 0


def test_what_a_failed_step_needed_may_be_changed(
    place: Path, tmp_path: Path, tool: Any, quick: dict[str, Any]
) -> None:
    """It has left nothing."""
    words = arguments(place, tmp_path / "r")
    quick["code"]["teacher/evaluate"] = "raise SystemExit(1)"
    assert tool("tools/run.py", *words).code == 1
    quick["code"].clear()
    assert tool("tools/run.py", *words, "--set", "evaluate.num_samples=4").code == 0
    changed = tool("tools/run.py", *words, "--set", "evaluate.num_samples=8").error
    assert "evaluate.num_samples is 8, and the run began with 4" in changed


def test_training_that_was_stopped_is_not_done(place: Path, tmp_path: Path, tool: Any, quick: dict[str, Any]) -> None:
    quick["iteration"] = 2
    done = tool("tools/run.py", *arguments(place, tmp_path / "r"))
    assert "step phase-1/train was stopped before its end" in done.error


def test_a_failure_that_is_no_user_error_shows_its_log(
    place: Path, tmp_path: Path, tool: Any, quick: dict[str, Any]
) -> None:
    quick["code"]["phase-1/prune"] = "raise ValueError('strange')"
    done = tool("tools/run.py", *arguments(place, tmp_path / "r"))
    assert done.code == 1 and "ValueError: strange" in done.stderr
    assert "phase-1-prune.err: step phase-1/prune ended with exit code 1; run again" in done.stderr


def test_steps_one_by_one(place: Path, tmp_path: Path, tool: Any, quick: dict[str, Any]) -> None:
    words = arguments(place, tmp_path / "r")
    names = [step.name for step in steps.steps(settings(place, tmp_path / "r"))]
    for name in names:
        assert tool("tools/run.py", *words, "--step", name).code == 0
        assert set(quick["ran"]) == {name}
        quick["ran"].clear()
    assert tool("tools/run.py", *words, "--json").json["steps"][names[-1]]["state"] == "done"


def finish(command: list[str], save: Path, environment: dict[str, str]) -> dict[str, np.ndarray[Any, Any]]:
    """Run to the end; gives the weights of the model."""
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr
    checkpoint = open_checkpoint(save / "model")
    return {name: checkpoint.read(name).numpy() for name in checkpoint.names}


def kill(process: subprocess.Popen[Any]) -> None:
    """Kill it alone, as the kernel would; what it started must end with it."""
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGKILL)
    process.wait()
    _, alive = psutil.wait_procs(children, timeout=30)
    assert not alive


@pytest.mark.slow
@pytest.mark.parametrize("record", [(), ("--record", "fp32")])
def test_a_run_that_was_killed_ten_times_ends_as_one_that_was_not(
    place: Path, tmp_path: Path, record: tuple[str, ...]
) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    drawn = random.Random(4)
    with reserved_port() as port:
        whole, killed = tmp_path / "whole", tmp_path / "killed"

        def command(save: Path) -> list[str]:
            words = arguments(place, save, "two.yaml", "--master-port", str(port))
            words += ["--set", "calibrate.carry_statistics=true", *record]
            return [sys.executable, "-m", "megatron_slim", "run", *words]

        begin = time.monotonic()
        expected = finish(command(whole), whole, environment)
        took = time.monotonic() - begin
        kills = 0
        for _ in range(10):
            # Some starts end before they come further. Where other programs slowed only the run that was timed, the
            # killed one may be over before all ten.
            with subprocess.Popen(command(killed), env=environment, stderr=subprocess.DEVNULL) as process:
                try:
                    process.wait(timeout=drawn.uniform(0.03, 0.2) * took)
                except subprocess.TimeoutExpired:
                    kill(process)
                    kills += 1
        found = finish(command(killed), killed, environment)
    assert kills >= 4, f"{kills} kills of a run that took {took:.0f} s"
    assert expected.keys() == found.keys()
    assert all(np.array_equal(expected[name], found[name]) for name in expected)
    assert "carried_from" in Statistics.load(whole / "phase-2/pruned").metadata
    states = json.loads((killed / "run.json").read_text())["steps"]
    assert {step["state"] for step in states} == {"done"} and max(step["attempts"] for step in states) > 1
    for name in ("phase-1-evaluate", "phase-2-evaluate", "teacher-evaluate"):
        one, other = (json.loads((save / f"results/{name}.json").read_text()) for save in (whole, killed))
        assert one["loss"] == other["loss"]
