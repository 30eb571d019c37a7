"""`megatron-slim run` with a recorded teacher: the step that records it, the cache that is there, what is refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from megatron_slim.checkpoint.convert import open_checkpoint
from megatron_slim.compression import checks, steps
from megatron_slim.compression.checks import check_disk
from megatron_slim.compression.recordings import recordings
from megatron_slim.compression.report import write_report
from megatron_slim.errors import SlimError
from megatron_slim.teacher_cache.cache import TeacherCache, open_cache
from megatron_slim.teacher_cache.names import CACHE
from megatron_slim.teacher_cache.record import RecordOptions, record
from megatron_slim.teacher_cache.recording_pass import Recorded
from megatron_slim.testing import reserved_port, tiny_shape, write_tiny_checkpoint
from tests.compression.test_run import arguments, place, quick, settings

__all__ = ["place", "quick"]  # fixtures
RECORD = ("--record", "bf16")


def of_kind(found: list[steps.Step], kind: str) -> list[steps.Step]:
    return [step for step in found if step.kind == kind]


@pytest.fixture(scope="module")
def cache(place: Path) -> TeacherCache:
    """Of the data of training, 20 samples in fp32."""
    tokens = np.random.default_rng(3).integers(0, 96, (20, 33))
    options = RecordOptions(kind="fp32", check_teacher=False)
    found = record(open_checkpoint(place / "teacher"), Recorded.whole(tokens, {}), place / "cache", options)
    assert found is not None
    return found


def with_cache(place: Path, save: Path, *more: str) -> list[str]:
    words = arguments(place, save, "one.yaml", "--teacher-cache", str(place / "cache"), *more)
    at = words.index("--data")
    return [*words[:at], *words[at + 2 :], "--calibration-data", str(place / "train")]


def test_the_step_records_what_training_reads(place: Path, tmp_path: Path, tool: Any) -> None:
    save = tmp_path / "r"
    done = tool("tools/run.py", *arguments(place, save, "two.yaml", *RECORD, "--dry-run", "--json"))
    assert done.code == 0, done.stderr
    found = {step["name"]: step for step in done.json["steps"]}
    names = list(found)
    assert names.index("teacher/record") == names.index("phase-1/train") - 1
    assert "teacher/record-validation" not in found
    # Two phases of 3 steps of 2 samples, and what --split sets aside, of 60.
    assert found["teacher/record"]["tokens"] == 13 * 32
    assert found["teacher/record"]["bytes"] == 13 * 32 * 2 * tiny_shape().hidden_size * 2
    words = f"record --teacher {place}/teacher --data {place}/train --save {save}/teacher-cache --states bf16"
    expected = [*words.split(), "--seq-length", "32", "--num-samples", "13", "--no-teacher-check", "--json"]
    assert found["teacher/record"]["command"] == ["megatron-slim", *expected]
    for phase in (1, 2):
        words = found[f"phase-{phase}/train"]["command"]
        assert words[2:4] == ["--teacher-cache", f"{save}/teacher-cache"]
        assert not {"--teacher", "--data", "--valid-data", "--record"} & set(words)
    assert f"--teacher {place}/teacher" in " ".join(found["phase-1/evaluate"]["command"])
    assert not save.exists()


def test_training_is_quicker_without_the_teachers_layers(place: Path, tmp_path: Path, tool: Any) -> None:
    """On a machine whose rate is not measured."""
    seconds = []
    for more in ((), RECORD):
        words = (*more, "--settings", "h100_8", "--dry-run", "--json")
        done = tool("tools/run.py", *arguments(place, tmp_path / "r", "two.yaml", *words))
        seconds += [step["seconds"] for step in done.json["steps"] if step["name"] == "phase-1/train"]
    assert 0 < seconds[1] < seconds[0]


def test_validation_has_a_cache_of_its_own(place: Path, tmp_path: Path) -> None:
    asked = {"replaced": ["train.eval_iters=4"], "train": {"record": "fp8"}}
    found = steps.steps(settings(place, tmp_path, **asked))
    (train,), (first,), (second,) = (of_kind(found, each) for each in ("train", "record", "record-validation"))
    assert first.command[-5:-1] == ("32", "--num-samples", "6", "--no-teacher-check")
    assert f"--data {place}/validation --save {tmp_path}/teacher-cache-validation" in " ".join(second.command)
    assert "--num-samples 8" in " ".join(second.command) and "fp8" in second.command
    assert f"--teacher-cache {tmp_path}/teacher-cache --valid-data {second.output}" in " ".join(train.command)


def test_all_of_data_with_fewer_samples(place: Path, tmp_path: Path) -> None:
    (found,) = recordings(settings(place, tmp_path, train={"record": "bf16", "tokens": "1M"}))
    assert (found.samples, found.drawn, found.is_set) == (60, False, False)
    (step,) = of_kind(steps.steps(settings(place, tmp_path, train={"record": "bf16", "tokens": "1M"})), "record")
    assert "--num-samples" not in step.command


def test_a_sample_set_is_recorded_whole(place: Path, tmp_path: Path, cache: TeacherCache) -> None:
    given = {"data": [str(cache.path)], "calibration_data": place / "train", "train": {"record": "bf16"}}
    (step,) = of_kind(steps.steps(settings(place, tmp_path, **given)), "record")
    assert not {"--seq-length", "--num-samples"} & set(step.command)


def test_flags_win_over_the_recipe(place: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text((place / "one.yaml").read_text().replace(" lr: ", " teacher_cache: of, lr: "))
    recipe = tmp_path / "recipe.yaml"
    asked = {"data": [str(place / "train")]}
    assert settings(place, tmp_path, str(recipe), **asked).section("train")["teacher_cache"] == str(tmp_path / "of")
    other = settings(place, tmp_path, str(recipe), **asked, train={"teacher_cache": "/else"})
    assert other.section("train")["teacher_cache"] == "/else"
    recorded = settings(place, tmp_path, str(recipe), **asked, train={"record": "fp8"}).section("train")
    assert recorded["record"] == "fp8" and "teacher_cache" not in recorded
    with pytest.raises(SlimError, match=r"train.record and train.teacher_cache exclude one another"):
        settings(place, tmp_path, str(recipe), **asked, replaced=["train.record=bf16"])


def test_a_run_from_a_cache_has_its_length(place: Path, tmp_path: Path, tool: Any, cache: TeacherCache) -> None:
    """Where the recipe does not say: in the run's own recipe, which training reads, and in its number of steps."""
    text = (place / "one.yaml").read_text()
    assert text.count("{seq_length: 32, ") == 1
    (tmp_path / "recipe.yaml").write_text(text.replace("{seq_length: 32, ", "{"))
    words = [str(tmp_path / "recipe.yaml"), *with_cache(place, tmp_path / "r", "--prepare", "--json")[1:]]
    done = tool("tools/run.py", *words)
    assert done.code == 0, done.stderr
    assert yaml.safe_load((tmp_path / "r/recipe.yaml").read_text())["train"]["seq_length"] == 32
    (command,) = (step["command"] for step in done.json["steps"] if step["name"] == "phase-1/train")
    assert command[command.index("--train-iters") + 1] == "3"


def test_calibration_on_samples_of_the_cache(place: Path, tmp_path: Path, tool: Any, cache: TeacherCache) -> None:
    asked = with_cache(place, tmp_path / "r", "--dry-run", "--json")
    asked = asked[: asked.index("--calibration-data")]
    message = f"{cache.path}: has samples of 32, --seq-length is 16"
    assert message in tool("tools/run.py", *asked).error
    length = ("--set", "calibrate.seq_length=32")
    fewer = f"{cache.path}: 99 samples asked for, {len(cache.samples)} there"
    assert fewer in tool("tools/run.py", *asked, *length, "calibrate.num_samples=99").error
    done = tool("tools/run.py", *asked, *length)
    assert done.code == 0, done.stderr
    (words,) = (step["command"] for step in done.json["steps"] if step["name"] == "phase-1/prune")
    assert words[words.index("--calibration-data") + 1] == str(cache.path)
    (need,) = (step["tokens"] for step in done.json["steps"] if step["name"] == "phase-1/prune")
    assert need == 4 * 32


def test_a_cache_that_is_there(place: Path, tmp_path: Path, tool: Any, cache: TeacherCache) -> None:
    done = tool("tools/run.py", *with_cache(place, tmp_path / "r", "--dry-run", "--json"))
    assert done.code == 0, done.stderr
    found = {step["name"]: step for step in done.json["steps"]}
    assert "teacher/record" not in found and str(cache.path) in done.json["paths"]
    words = found["phase-1/train"]["command"]
    assert words[2:4] == ["--teacher-cache", str(cache.path)] and "--data" not in words and "--valid-data" not in words


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--set", "train.record=int8"], "train.record 'int8' is unknown (known: fp32, bf16, fp8)"),
        ([*RECORD, "--hidden-kd-layers", "1:1"], "--hidden-kd-layers does not go with --teacher-cache"),
        ([*RECORD, "--teacher-ahead", "2"], "--teacher-ahead does not go with --teacher-cache"),
        ([*RECORD, "--eod-mask-loss"], "--eod-mask-loss does not go with a sample set"),
        ([*RECORD, "--mock-data"], "data are given twice: by"),
        ([*RECORD, "--teacher-dtype", "fp8"], "--teacher-dtype fp8 has no effect on a teacher that was recorded"),
        ([*RECORD, "--split", "1,999,1"], "--split 1,999,1 leaves none of its 7 samples for the training part"),
        ([*RECORD, "--data", "a"], "train.record records one data set, and --data has 2"),
        ([*RECORD, "--teacher-cache", "/none"], "train.record and train.teacher_cache exclude one another"),
        (["--teacher-cache", "/none"], "/none: not a teacher's cache"),
        (["--before-recording", "3"], "--before-recording needs --check-arguments and --teacher-cache"),
    ],
)
def test_what_cannot_work_is_refused_before_anything(
    place: Path, tmp_path: Path, tool: Any, words: list[str], message: str
) -> None:
    given = arguments(place, tmp_path / "r", "one.yaml", "--calibration-data", str(place / "train"), *words)
    assert message in tool("tools/run.py", *given).error
    assert not (tmp_path / "r").exists()


def test_a_cache_of_another_teacher_or_other_data(place: Path, tmp_path: Path, tool: Any, cache: TeacherCache) -> None:
    shape = tiny_shape(num_layers=8, num_moe_experts=8, vocab_size=96)
    other = write_tiny_checkpoint(tmp_path / "other", shape, seed=2)
    words = with_cache(place, tmp_path / "r")
    words[words.index("--teacher") + 1] = str(other)
    assert f"{cache.path}: is not of the teacher {other}" in tool("tools/run.py", *words).error
    data = [*with_cache(place, tmp_path / "r"), "--data", str(place / "train")]
    assert "no states of the teacher were recorded for these data" in tool("tools/run.py", *data).error
    longer = tool("tools/run.py", *with_cache(place, tmp_path / "r", "--seq-length", "16"))
    assert "has samples of 32, --seq-length is 16" in longer.error
    words = with_cache(place, tmp_path / "r")[:-2]
    at = words.index("--teacher-cache")
    assert "no training data" in tool("tools/run.py", *words[:at], *words[at + 2 :]).error
    assert not (tmp_path / "r").exists()


def test_too_little_space_is_found_first(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = settings(place, tmp_path / "a/b", train={"record": "fp32"})
    seen: list[tuple[Path, int]] = []
    monkeypatch.setattr(checks, "check_space", lambda *given: seen.append(given))
    check_disk(asked, tiny_shape(num_layers=8, num_moe_experts=8, vocab_size=96))
    assert seen == [(tmp_path, 7 * 32 * 2 * tiny_shape().hidden_size * 4)]
    check_disk(replace(asked, save=place), tiny_shape())
    (place / "teacher-cache").mkdir()
    seen.clear()
    check_disk(replace(asked, save=place), tiny_shape())  # the step itself looks
    (place / "teacher-cache").rmdir()
    assert seen == []


def test_values_that_recording_depends_on(place: Path, tmp_path: Path, tool: Any, quick: dict[str, Any]) -> None:
    words = arguments(place, tmp_path / "r", "one.yaml", *RECORD)
    quick["code"]["teacher/record"] = "raise SystemExit(1)"
    assert tool("tools/run.py", *words).code == 1
    (tmp_path / "r/teacher-cache" / CACHE).unlink()
    changed = tool("tools/run.py", *words, "--tokens", "320", "--record", "fp8").error
    assert "train.record is 'fp8', and the run began with 'bf16'" in changed
    assert "train.tokens is 320, and the run began with 192" in changed
    without = tool("tools/run.py", *[word for word in words if word not in RECORD]).error
    assert "train.record is 'left out', and the run began with 'bf16'" in without
    quick["code"].clear()
    quick["ran"].clear()
    assert tool("tools/run.py", *words, "--lr", "0.5").code == 0  # of training, which has not begun
    assert quick["ran"][0] == "teacher/record"
    quick["ran"].clear()
    assert tool("tools/run.py", *words, "--lr", "0.5").code == 0 and quick["ran"] == []


def test_a_cache_that_was_read_may_be_removed(place: Path, tmp_path: Path, tool: Any, quick: dict[str, Any]) -> None:
    words = arguments(place, tmp_path / "r", "one.yaml", *RECORD)
    figures = dict.fromkeys(("teacher_loss", "kl_of_rounding", "largest_kl_of_rounding"), 0.5)
    summary = {"states": "bf16", "heads": 2, "samples": 7, "tokens": 224, "bytes": 9, **figures}
    quick["code"]["teacher/record"] = f"print({json.dumps(json.dumps(summary))})"
    assert tool("tools/run.py", *words).code == 0
    shutil.rmtree(tmp_path / "r/teacher-cache")
    quick["ran"].clear()
    assert tool("tools/run.py", *words, "--set", "export.quantize=fp8").code == 0
    assert quick["ran"] == ["phase-1/quantize", "phase-1/evaluate-fp8"]
    assert json.loads((tmp_path / "r/report.json").read_text())["recorded"] == summary


@pytest.mark.slow
def test_a_run_from_end_to_end(place: Path, tmp_path: Path, tool: Any) -> None:
    """Recorded, with validation; every phase reads the cache, and the report and the card say it."""
    save = tmp_path / "r"
    with reserved_port() as port:
        more = ("--set", "train.eval_iters=1", "train.eval_interval=2", "--record", "fp8", "--master-port", str(port))
        done = tool("tools/run.py", *arguments(place, save, "two.yaml", *more))
    assert done.code == 0, done.stderr
    caches = [open_cache(save / name) for name in ("teacher-cache", "teacher-cache-validation")]
    assert [len(each.samples) for each in caches] == [12, 2] and {each.kind for each in caches} == {"fp8"}
    for phase in (1, 2):
        log = (save / f"logs/phase-{phase}-train.out").read_text()
        assert "logits distillation loss" in log and "validation loss" in log
    page = write_report(save).read_text()
    numbers = json.loads((save / "report.json").read_text())["recorded"]
    assert (numbers["states"], numbers["tokens"], numbers["samples"]) == ("fp8", 12 * 32, 12)
    assert numbers["bytes"] == caches[0].summary()["bytes"]
    assert numbers["kl_of_rounding"] == caches[0].figures["kl_of_rounding"] > 0
    assert "Recorded teacher" in page and "teacher/record" in page
    assert "- teacher: hidden states recorded once, of 384 tokens in fp8;" in (save / "model/README.md").read_text()
