"""What a run keeps next to its checkpoints, so that they can be exported and pruned again."""

from __future__ import annotations

import shutil
from pathlib import Path

from megatron_slim.architecture.hf_config import shape_to_hf_config
from megatron_slim.architecture.shape import ModelShape
from megatron_slim.checkpoint.described import config_and_carried, storage_of
from megatron_slim.checkpoint.expert_storage import write_storage
from megatron_slim.checkpoint.huggingface_files import has_tensors
from megatron_slim.checkpoint.iterations import has_saved
from megatron_slim.checkpoint.records import ELASTIC, PLAN
from megatron_slim.checkpoint.side_files import carry_files, log_left_behind
from megatron_slim.checkpoint.torch_dist_names import HF_DIR
from megatron_slim.errors import CheckpointError
from megatron_slim.files import new_directory, remove, to_json, write_atomic
from megatron_slim.pruning.elastic import Elastic


def keep_plan(source: Path, directory: Path) -> None:
    """Copy the plan that gave a student, by which a later pruning knows it; of torch_dist it is next to ``hf/``."""
    places = (source, source.parent) if source.name == HF_DIR else (source,)
    if (file := next((place / PLAN for place in places if (place / PLAN).is_file()), None)) is not None:
        shutil.copyfile(file, directory / PLAN)


def check_place(save: Path) -> None:
    """Refuse a directory in which ``hf/``, which training makes, is a model with weights.

    Raises:
        CheckpointError: it is; it may be the student or the teacher.
    """
    if not has_saved(save) and has_tensors(save / HF_DIR):
        fix = f"give another --save: a run keeps a config.json and a tokenizer of its own in {HF_DIR}/"
        raise CheckpointError("holds a model", where=str(save / HF_DIR), fix=fix)


def keep_hf_files(source: Path, save: Path, shape: ModelShape, elastic: Elastic | None = None) -> None:
    """Put config.json, the tokenizer and the like next to the checkpoints of this run, so that they can be exported.

    How files hold the experts is among it, and what a larger model has but for its language model. Of an elastic
    run so are the student's budgets, ``elastic``; training that knows nothing of them ruins the smaller ones. What a
    start that has saved nothing has left may be of another student, and is made anew.

    Raises:
        CheckpointError: as of `check_place`.
    """
    kept, made = save / HF_DIR, save / f"{HF_DIR}.new"
    if kept.is_dir() and has_saved(save):
        return
    check_place(save)
    save.mkdir(parents=True, exist_ok=True)
    remove(made)
    with new_directory(made) as directory:
        without_mtp = not shape.mtp_num_layers
        config, carried = config_and_carried(source, without_mtp=without_mtp)
        write_atomic(directory / "config.json", to_json(shape_to_hf_config(shape, config)))
        carried.save(directory, verify=True)
        carry_files(source, directory)
        keep_plan(source, directory)
        if elastic is not None:
            elastic.save(directory / ELASTIC)
        write_storage(directory, storage_of(source, without_mtp=without_mtp))
    remove(kept)  # only now: it may be the source
    made.rename(kept)
    log_left_behind(source)
