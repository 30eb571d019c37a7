"""What can be wrong with a teacher's cache and the data of a run, found before anything is built."""

from __future__ import annotations

import os
from argparse import Namespace
from pathlib import Path

from megatron_slim.architecture.shape import ModelShape
from megatron_slim.distillation.options import TEACHER_MTP
from megatron_slim.errors import DataError
from megatron_slim.sample_set import is_sample_set, open_samples
from megatron_slim.teacher_cache.cache import TeacherCache, open_cache
from megatron_slim.teacher_cache.names import is_cache
from megatron_slim.training.document_checks import mark_violations, open_once, prefixes_of

# Flags of a teacher that computes, and why one that was recorded has no use for them.
_ALREADY = "that was decided when it was recorded"
_OF_A_TEACHER = {
    "teacher_without_mtp": _ALREADY,
    "teacher_fp8_recipe": _ALREADY,
    "teacher_pipeline_layout": "it has no layers in this run",
    "teacher_ahead": "its hidden states are there already",
    "teacher_offload": "its layers are not in memory",
    "hidden_kd_layers": "hidden states of its last layer alone were recorded",
}


def cache_violations(shape: ModelShape, cache: TeacherCache | None, args: Namespace) -> list[str]:
    """What is wrong with the arguments of a teacher that was recorded, in sentences.

    Args:
        shape: sizes of the student.
        cache: what was recorded, if the run has it.
        args: Megatron's arguments and ours, as parsed.
    """
    if args.before_recording and not (args.check_arguments and args.teacher_cache):
        return ["--before-recording needs --check-arguments and --teacher-cache"]
    if args.teacher_cache is None:
        return ["--teacher-head-offload needs --teacher-cache"] if args.teacher_head_offload else []
    if args.teacher_load is not None:
        return ["--teacher-load and --teacher-cache are two teachers; give one of them"]
    found = [
        f"--{name.replace('_', '-')} does not go with --teacher-cache: {why}"
        for name, why in _OF_A_TEACHER.items()
        if getattr(args, name)
    ]
    if args.teacher_dtype == "fp8":
        found.append("--teacher-dtype fp8 has no effect on a teacher that was recorded; its output layer is in 16 bits")
    if cache is None:  # before recording
        return found + mark_violations(args)
    if cache.vocab_size != shape.vocab_size:
        found.append(f"teacher: vocabulary {cache.vocab_size}, the student has {shape.vocab_size}")
    if args.mtp_kd_target == TEACHER_MTP and cache.heads - 1 < shape.mtp_num_layers:
        found.append("teacher: no MTP head was recorded for --mtp-kd-target teacher-mtp; use teacher-main")
    return found


def cache_of(data: Path, cache: TeacherCache) -> TeacherCache:
    """The states that were recorded for a data set: its own, or those of the cache of the same samples.

    Raises:
        DataError: there are none, or they are another teacher's or of another kind.
    """
    if is_cache(data):
        found = cache if data == cache.path else open_once(open_cache, data)
        differing = [
            name for name in ("head_sha256", "teacher", "kind") if getattr(found, name) != getattr(cache, name)
        ]
        if differing:
            raise DataError(
                f"is not of the teacher, and of the type, that {cache.path} is of ({differing[0]})",
                where=str(data),
                fix="record both alike",
            )
        return found
    fix = "record the teacher on them: megatron-slim record"
    if not is_sample_set(data):
        raise DataError(
            f"no states of the teacher were recorded for these data in {cache.path}", where=str(data), fix=fix
        )
    if open_once(open_samples, data).digests != cache.samples.digests:
        raise DataError(f"its token ids are not those of {cache.path}", where=str(data), fix=fix)
    return cache


def check_caches(args: Namespace, cache: TeacherCache | None) -> None:
    """See that the states of all data of a run were recorded, by the teacher that its head is of.

    Raises:
        DataError: they were not.
    """
    if cache is None:
        return
    if args.mock_data:
        raise DataError(
            "--mock-data are not what a teacher was recorded on", fix="leave it out: the cache has the data"
        )
    # Reading files whole is for one rank of a machine: its launcher ends the others where it leaves.
    reads = os.environ.get("LOCAL_RANK", "0") == "0"
    if reads:
        cache.verify_head()
    for prefix in prefixes_of(args):
        cache_of(Path(prefix), cache)
        if reads:  # small: states are thousands of bytes a token
            open_once(open_samples, Path(prefix)).verify(cache.vocab_size)
