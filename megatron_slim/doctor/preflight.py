"""What a run will be given - data, student, teacher, place to save in - looked at before it is started."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_slim.data import count_documents, exact_prefix, open_stream
from megatron_slim.doctor.findings import NOTE, OK, PROBLEM, Finding, good_or, parameters, refused, size
from megatron_slim.doctor.machine import storage
from megatron_slim.errors import DataError, SlimError
from megatron_slim.optimizers import ADAM, OPTIMIZERS
from megatron_slim.sample_set import is_sample_set, open_samples
from megatron_slim.training.blends import parse_blend

if TYPE_CHECKING:
    from megatron_slim.architecture.shape import ModelShape

BYTES_PER_PARAMETER = OPTIMIZERS[ADAM].checkpoint_bytes(2)  # of training in bf16


def preflight(
    data: Sequence[str],
    checkpoint: Path | None,
    teacher: Path | None,
    save: Path | None,
    *,
    nodes: int,
    without_mtp: Mapping[str, bool],
) -> Iterator[Finding]:
    """Look at what was given, in this order; a checkpoint may be one to start from or the directory of a run.

    Args:
        data: prefixes of .bin/.idx pairs and sample sets, or weights and prefixes in turn.
        checkpoint: of the student.
        teacher: its checkpoint.
        save: where the run will save.
        nodes: on how many machines it will run.
        without_mtp: whether MTP is left out of "checkpoint" and "teacher".
    """
    shapes: dict[str, ModelShape] = {}
    for name, path in (("checkpoint", checkpoint), ("teacher", teacher)):
        if path is not None:
            yield from _model(name, path, shapes, without_mtp=without_mtp[name])
            if path.exists():
                yield storage(name, path, nodes=nodes)
    if len(shapes) == 2:
        yield from _pair(shapes["checkpoint"], shapes["teacher"])
    vocabulary = min((shape.vocab_size for shape in shapes.values()), default=None)
    if data:
        yield from _blend(data, vocabulary, nodes)
    if save is not None:
        yield from _save(save, shapes.get("checkpoint"), nodes)


def _model(name: str, path: Path, shapes: dict[str, ModelShape], *, without_mtp: bool) -> Iterator[Finding]:
    """Open it as training does: names, sizes and types of all tensors, not their values."""
    from megatron_slim.architecture.table import count_parameters
    from megatron_slim.checkpoint.convert import open_checkpoint
    from megatron_slim.checkpoint.records import REFERENCE
    from megatron_slim.checkpoint.tracker import missing_in_tracker

    try:
        number = missing_in_tracker(path)
        if number is not None:
            yield Finding(
                name, NOTE, f"its tracker is torn; {number} is the last complete checkpoint", "training repairs it"
            )
            return
        shape = open_checkpoint(path, without_mtp=without_mtp).shape
    except SlimError as error:
        yield refused(name, error)
        return
    shapes[name] = shape
    count = count_parameters(shape, include_mtp=False)
    found = f"{shape.model_type}, {shape.num_layers} layers, {parameters(count.total)} parameters, "
    yield Finding(name, OK, found + f"{parameters(count.active)} active, vocabulary {shape.vocab_size}: complete")
    if name == "teacher":
        there = (path / REFERENCE).is_file()
        fix = "megatron-slim evaluate --record, so that training recognises the teacher by its losses"
        yield good_or(NOTE, "teacher's losses", there, "recorded" if there else "not recorded", fix)


def _pair(student: ModelShape, teacher: ModelShape) -> Iterator[Finding]:
    if student.vocab_size != teacher.vocab_size:
        found = f"teacher {teacher.vocab_size}, student {student.vocab_size}"
        yield Finding(
            "vocabularies", PROBLEM, found, "logits are compared token by token: prune the student from its teacher"
        )
    if teacher.mtp_num_layers < student.mtp_num_layers:
        found = f"teacher {teacher.mtp_num_layers}, student {student.mtp_num_layers}"
        yield Finding("MTP heads", NOTE, found, "the student's is supervised by the teacher's main head")


def _blend(words: Sequence[str], vocabulary: int | None, nodes: int) -> Iterator[Finding]:
    """Every data set of a blend, read from the words as training reads them."""
    try:
        blend = parse_blend(words, "--data")
    except DataError as error:
        yield refused("data", error)
        return
    for prefix in map(Path, blend.prefixes):
        yield _data(prefix, vocabulary)
        if Path(f"{prefix}.bin").exists() or is_sample_set(prefix):
            yield storage(f"data {prefix.name}", prefix.parent, nodes=nodes)


def _data(prefix: Path, vocabulary: int | None) -> Finding:
    name = f"data {prefix.name}"
    try:
        if is_sample_set(prefix):
            samples = open_samples(prefix)
            largest = samples.largest_id(vocabulary)
            looked_at = f"{len(samples):,} samples of {samples.seq_length:,} tokens, largest id seen {largest}"
            return Finding(name, OK, looked_at)
        found = exact_prefix(prefix)
        stream, largest = open_stream(found, vocabulary)
    except SlimError as error:
        return refused(name, error)
    return Finding(
        name, OK, f"{len(stream):,} tokens in {count_documents(found):,} documents, largest id seen {largest}"
    )


def _save(save: Path, shape: ModelShape | None, nodes: int) -> Iterator[Finding]:
    """Whether it can be written, what a run would resume from, and whether a checkpoint will fit."""
    from megatron_slim.checkpoint.torch_dist_names import TRACKER
    from megatron_slim.checkpoint.tracker import missing_in_tracker

    existing = next(each for each in (save.absolute(), *save.absolute().parents) if each.exists())
    if not save.absolute().parent.exists():
        found = f"{save.absolute().parent} does not exist, and would be created in {existing}"
        fix = "training does so; if the path is wrong, correct it, or mount what is missing"
        yield Finding("path of save", NOTE, found, fix)
    yield _writable(existing, save)
    yield storage("save", existing, nodes=nodes)
    try:
        number = missing_in_tracker(save)
        tracker = save / TRACKER
        if number is not None:
            yield Finding("resume", NOTE, f"torn tracker: training will resume from {number}", "")
        elif tracker.is_file():
            yield Finding("resume", OK, f"a run will resume from iteration {tracker.read_text().strip()}")
        else:
            yield Finding("resume", OK, "nothing saved yet: a run will start")
    except SlimError as error:
        yield refused("resume", error)
    if shape is not None:
        from megatron_slim.architecture.table import count_parameters

        need = count_parameters(shape).total * BYTES_PER_PARAMETER
        free = shutil.disk_usage(existing).free
        found = f"a checkpoint takes {size(need)}, {size(free)} are free"
        fix = "make space: all checkpoints of a run are kept"
        yield (
            Finding("free space", PROBLEM if free < need else NOTE, found, fix)
            if free < 3 * need
            else Finding("free space", OK, found)
        )


def _writable(directory: Path, save: Path) -> Finding:
    """Write, flush and rename a small file, as a checkpoint is, in ``save`` or where that would be created."""
    try:
        descriptor, name = tempfile.mkstemp(prefix=".doctor", dir=directory)
        try:
            os.write(descriptor, b"x")
            os.fsync(descriptor)
            os.rename(name, f"{name}.2")
            name = f"{name}.2"
        finally:
            os.close(descriptor)
            os.unlink(name)
    except OSError as error:
        fix = "give another directory, or ask for the right to write"
        return Finding("save", PROBLEM, f"{directory}: {(error.strerror or str(error)).lower()}", fix)
    created = "" if directory == save.absolute() else f"{save} would be created: "
    return Finding("save", OK, f"{created}{directory} can be written")
