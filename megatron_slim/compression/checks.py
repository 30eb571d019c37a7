"""What a step would refuse after hours of others, refused before the first."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_slim.architecture.hf_config import shape_to_hf_config
from megatron_slim.architecture.shape import ModelShape
from megatron_slim.compression.estimate import first_student, recording_bytes
from megatron_slim.compression.recordings import cache_of, recordings
from megatron_slim.compression.settings import RunSettings
from megatron_slim.compression.steps import (
    RECIPE_FILE,
    TRAIN,
    carries_optimizer,
    command_line,
    is_trained,
    measures,
    steps,
)
from megatron_slim.data import data_prefix, exact_prefix, open_stream
from megatron_slim.errors import EXIT_USER_ERROR, DataError, RecipeError, SlimError, last_error
from megatron_slim.extras import require
from megatron_slim.files import check_space, to_json
from megatron_slim.pruning.recipe_checks import check_later_phases, check_recipe
from megatron_slim.sample_set import is_sample_set, open_samples
from megatron_slim.training.blends import parse_blend

if TYPE_CHECKING:
    from megatron_slim.checkpoint.convert import Checkpoint


def check(settings: RunSettings) -> ModelShape:
    """Open the teacher and all data, and look whether every phase can be met; gives the teacher's sizes.

    Raises:
        SlimError: what would fail.
    """
    from megatron_slim.checkpoint.convert import open_checkpoint

    teacher = open_checkpoint(settings.teacher)
    shape = teacher.shape
    where = str(settings.file)
    check_recipe(settings.phases[0], shape, where=where)
    check_later_phases(settings.recipe, 1, shape, where=where)
    _check_measuring(settings)
    _check_cache(settings, teacher)
    _check_data(settings, shape.vocab_size)
    evaluate = settings.section("evaluate")
    if "acceptance" in evaluate and not shape.mtp_num_layers:
        raise RecipeError("evaluate.acceptance, and the teacher has no MTP block", where=where, fix="leave it out")
    if "acceptance" in evaluate and not (prompts := settings.file_of("acceptance")).is_file():
        raise DataError("no such file", where=f"evaluate.acceptance {prompts}", fix="give a file of prompts")
    if "tasks" in evaluate:
        require("eval", "lm_eval", "evaluate.tasks")
    _check_training(settings, teacher)
    return shape


def _check_data(settings: RunSettings, vocab_size: int) -> None:
    for flag, words in (("--data", settings.data), ("--valid-data", settings.valid_data)):
        for prefix in map(Path, parse_blend(words, flag).prefixes if words else ()):
            if is_sample_set(prefix):
                open_samples(prefix).largest_id(vocab_size)
            else:
                open_stream(exact_prefix(prefix), vocab_size)
    for section, data in (("calibrate", settings.calibration_data), ("evaluate", settings.evaluation_data)):
        if data is None or (data.suffix == ".npy" and data.is_file()):  # a matrix is looked at when it is used
            continue
        if is_sample_set(data):
            samples, asked = open_samples(data), settings.section(section)
            samples.largest_id(vocab_size)
            samples.draw(seq_length=asked.get("seq_length"), num_samples=asked.get("num_samples"), seed=0)
        else:
            open_stream(data_prefix(data, or_matrix=True), vocab_size)


def _check_measuring(settings: RunSettings) -> None:
    """Layers are measured on what a phase calibrates on."""
    for number, phase in enumerate(settings.phases, 1):
        if phase.experts.allocation == "loss" and not measures(settings, number):
            raise SlimError(
                f"experts.allocation loss in phase {number}, which calibrate.carry_statistics leaves without data",
                where=str(settings.file),
                fix="leave one of the two out",
            )


def _check_cache(settings: RunSettings, teacher: Checkpoint) -> None:
    """See that a cache that is there is of this teacher.

    Raises:
        DataError: it is not, or is not whole.
    """
    path = cache_of(settings)
    if path is None or recordings(settings) or is_trained(settings):
        return
    from megatron_slim.checkpoint.convert import open_checkpoint
    from megatron_slim.streaming.fingerprint import fingerprint_like
    from megatron_slim.teacher_cache.cache import open_cache

    cache = open_cache(path)
    if teacher.shape.mtp_num_layers and cache.heads == 1:  # recorded without
        teacher = open_checkpoint(settings.teacher, without_mtp=True)
    if cache.teacher != fingerprint_like(teacher, cache.teacher):
        fix = "give the --teacher that was recorded, or its --teacher-cache"
        raise DataError(f"is not of the teacher {settings.teacher}", where=str(path), fix=fix)


def check_disk(settings: RunSettings, teacher: ModelShape) -> None:
    """See that there is space for what is to be recorded, unless that has begun: then the step itself looks.

    After training nothing is.

    Raises:
        SlimError: there is not.
    """
    new = [] if is_trained(settings) else [each for each in recordings(settings) if not each.cache.exists()]
    nbytes = sum(recording_bytes(settings, each, teacher) for each in new)
    there = next(each for each in (settings.save, *settings.save.parents) if each.is_dir())
    if nbytes:
        check_space(there, nbytes)


def _check_training(settings: RunSettings, teacher: Checkpoint) -> None:
    """Have training check its arguments with a student of the first phase's sizes, as far as they are known.

    Data that are to be recorded stand for their caches. Not on a machine without GPUs where settings are those of one
    with GPUs: there is less that it would accept.
    """
    student = first_student(settings, teacher.shape)
    train = next(step for step in steps(settings) if step.kind == TRAIN)
    if student is None or train.output.exists() or (settings.cluster and not _has_gpus()):
        return
    config = shape_to_hf_config(student, teacher.config)
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(to_json(config))
        recipe = Path(folder, RECIPE_FILE)  # that of the run may not be there yet
        recipe.write_text(settings.text)
        asked = _with_data(command_line(train), settings)
        asked += ["--recipe", str(recipe), "--launcher", "torchrun", "--dry-run"]
        shown = subprocess.run(asked, capture_output=True, text=True, check=False)
        text = shown.stdout.replace(str(train.output), f"{folder}/run")
        words = shlex.split(text) if shown.returncode == 0 else []
        if words:
            world = str(int(_after(words, "--nproc-per-node")) * int(_after(words, "--nnodes")))
            program, arguments = _program(words[words.index("--master-port") + 2 :])
            arguments = _of_one_run(arguments, folder, settings.stops[-1])
            if any(carries_optimizer(settings, phase) for phase in range(1, len(settings.phases) + 1)):
                arguments = ["--carry-optimizer", *arguments]
            one = {"WORLD_SIZE": world, "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
            shown = subprocess.run(
                [sys.executable, *program, *arguments, "--check-arguments"],
                env=os.environ | one,
                capture_output=True,
                text=True,
                check=False,
            )
    if shown.returncode == EXIT_USER_ERROR and (found := last_error(shown.stderr)):
        raise SlimError(f"training would refuse: {found}")
    if shown.returncode:
        raise RuntimeError(shown.stderr)


def _with_data(words: Sequence[str], settings: RunSettings) -> list[str]:
    """A command of training with data in the place of caches that are to be recorded of them."""
    found = recordings(settings)
    if not found:
        return [*words]
    data = {str(each.cache): str(each.data) for each in found[1:]}
    known, place = [data.get(word, word) for word in words], words.index("distill") + 1
    more = ["--data", str(found[0].data), "--before-recording", str(found[0].samples)]
    return [*known[:place], *more, *known[place:]]


def _has_gpus() -> bool:
    import torch

    return torch.cuda.is_available()


def _after(words: Sequence[str], flag: str) -> str:
    return words[words.index(flag) + 1]


def _program(job: Sequence[str]) -> tuple[list[str], Sequence[str]]:
    """What a rank runs, as Python is told of it, and its arguments: our module, or a file that ``PROGRAM`` names."""
    return (["-m", job[1]], job[2:]) if job[0] == "--module" else ([job[0]], job[1:])


def _of_one_run(arguments: Sequence[str], config: str, iterations: int) -> list[str]:
    """The arguments of a run that begins with random weights and has one phase."""
    place = arguments.index("--student")
    kept = [*arguments[:place], "--hf-config", config, *arguments[place + 2 :]]
    alone = [word for word in kept if word != "--progressive"]
    if "--stage-warmup" in alone:
        place = alone.index("--stage-warmup")
        del alone[place : place + 2]
    return alone if "--train-iters" in alone else [*alone, "--train-iters", str(iterations)]
