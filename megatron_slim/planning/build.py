"""Parameter memory of every distinct rank of a layout, from the modules that training itself builds.

A process of its own parses the flags as training does, joins a world of any size whose communication is fake (torch's
``fake`` backend), and builds each pipeline rank's modules on the meta device, by training's `build_stage`. Megatron's
own rules then put their parameters into buffers. Ranks that differ in tensor, expert or data-parallel rank alone hold
equally much.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import sys
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_slim.aliases import Function, JsonObject, Keywords
from megatron_slim.architecture.hf_config import shape_to_hf_config
from megatron_slim.architecture.pipeline_layout import Stages
from megatron_slim.architecture.shape import ModelShape
from megatron_slim.garbage import without_collection
from megatron_slim.planning.buffers import buffer_memory
from megatron_slim.planning.flags import megatron_arguments
from megatron_slim.planning.layouts import Settings, TrainLayout
from megatron_slim.planning.memory import Memory
from megatron_slim.planning.parameters import Count

if TYPE_CHECKING:
    from megatron.core.distributed import DistributedDataParallel
    from torch import Tensor


@dataclass(frozen=True)
class BuiltRank:
    """What one pipeline rank holds.

    Attributes:
        memory: static memory; of the data-parallel rank with most of the optimizer's state.
        student: elements of parameters.
        teacher: likewise.
    """

    memory: Memory
    student: Count
    teacher: Count


@dataclass(frozen=True)
class Request:
    """What to build: models, their layout and stages, and the run."""

    student: ModelShape
    teacher: ModelShape | None
    layout: TrainLayout
    stages: Stages
    settings: Settings


def prepare() -> None:
    """Import what building needs, which takes seconds, before processes fork."""
    if "torch" not in sys.modules:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # nothing is to be allocated, and a fork must find CUDA untouched
    import megatron_slim.mcore

    import megatron_slim.training.build  # noqa: F401


def build_ranks(request: Request, *, processes: int | None = None) -> list[BuiltRank]:
    """Build every pipeline rank of a layout on the meta device; `prepare` comes first.

    Args:
        request: a layout that is allowed.
        processes: to build in; default, one per core, at most four.
    """
    ranks = range(request.layout.pp)
    wanted = processes or min(4, os.cpu_count() or 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # a fork with threads, which hold no locks
        pool = multiprocessing.get_context("fork").Pool(min(wanted, len(ranks)), _start, (request,))
    with pool:
        return pool.map(_build_rank, ranks, chunksize=1)


_state: JsonObject = {}


def _start(request: Request) -> None:
    """Parse the flags; once per process."""
    quiet = os.open(os.devnull, os.O_WRONLY)  # Megatron prints all arguments, and more
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    from megatron.training.arguments import validate_args
    from megatron.training.global_vars import set_global_variables

    from megatron_slim.training.arguments import parse
    from megatron_slim.training.spec import resolve
    from megatron_slim.training.stage_layout import layout_string

    layout, stages = request.layout, request.stages
    os.environ.update(WORLD_SIZE=str(layout.gpus), RANK="0", LOCAL_RANK="0")
    with tempfile.TemporaryDirectory() as folder:
        config = shape_to_hf_config(request.student, {})
        Path(folder, "config.json").write_text(json.dumps(config), encoding="utf-8")
        argv = ["--hf-config", folder, "--mock-data"]
        argv += megatron_arguments(layout, request.settings, tokens=1)
        argv += ["--use-cpu-initialization"]  # which leaves it to the default device where weights are
        if layout.pp > 1:
            # The stages themselves: "auto" counts with the kernels of the machine it runs on.
            argv = _without(argv, {"--pipeline-layout": 1, "--num-virtual-stages-per-pipeline-rank": 1})
            own = layout_string(stages.student_layers, request.student.mtp_num_layers)
            argv.append(f"--pipeline-model-parallel-layout={own}")
            if request.teacher is not None:
                other = layout_string(stages.teacher_layers, request.teacher.mtp_num_layers)
                argv.append(f"--teacher-pipeline-layout={other}")
        spec = resolve(argv, request.teacher)
        args = parse(spec.megatron_argv)
        validate_args(args)
    set_global_variables(args, build_tokenizer=False)  # whose libraries take a second to import
    args.perform_initialization = False
    _state.update(request=request, spec=spec, args=args)


def _without(argv: list[str], flags: dict[str, int]) -> list[str]:
    """Arguments without some flags, each with so many values."""
    found, skip = [], 0
    for word in argv:
        if word in flags:
            skip = 1 + flags[word]
        if skip:
            skip -= 1
        else:
            found.append(word)
    return found


@contextlib.contextmanager
def _on_meta() -> Iterator[None]:
    """Whatever is made, wherever it is asked for, has no memory."""
    import torch
    from torch.overrides import TorchFunctionMode

    class _Meta(TorchFunctionMode):
        def __torch_function__(
            self, func: Function, types: object, args: tuple[object, ...] = (), kwargs: Keywords | None = None
        ) -> object:
            kwargs = dict(kwargs or {})
            if kwargs.get("device") is not None:
                kwargs["device"] = "meta"
            return func(*args, **kwargs)

    with _Meta(), torch.device("meta"):
        yield


@contextlib.contextmanager
def _world(layout: TrainLayout, rank: int) -> Iterator[None]:
    """Megatron's parallel state as a rank of the whole world sees it."""
    import torch
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=layout.gpus)
    try:
        parallel_state.initialize_model_parallel(
            layout.tp,
            layout.pp,
            layout.vpp if layout.vpp > 1 else None,
            expert_model_parallel_size=layout.ep,
            expert_tensor_parallel_size=1,
            create_gloo_process_groups=False,
        )
        model_parallel_cuda_manual_seed(1)
        yield
    finally:
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()


def _build_rank(rank: int) -> BuiltRank:
    """Build one pipeline rank, all its virtual stages."""
    from megatron.core import parallel_state as state
    from megatron.training.argument_utils import core_transformer_config_from_args

    from megatron_slim.training.build import build_stage

    request: Request = _state["request"]
    layout, chunks = request.layout, []
    with _world(layout, rank * (layout.gpus // layout.pp)):
        with _on_meta(), without_collection():
            for chunk in range(layout.vpp):
                at = chunk if layout.vpp > 1 else None
                first, last = (
                    ask(ignore_virtual=False, vp_stage=at)
                    for ask in (state.is_pipeline_first_stage, state.is_pipeline_last_stage)
                )
                config = core_transformer_config_from_args(_state["args"])
                chunks.append(build_stage(_state["spec"], config, pre_process=first, post_process=last, vp_stage=at))
        return _summed(chunks, layout)


def _summed(chunks: list[DistributedDataParallel], layout: TrainLayout) -> BuiltRank:
    """Memory of built chunks, in buffers as Megatron's DDP and distributed optimizer would."""
    student, teacher, memory, request = Count(), Count(), Memory(), _state["request"]
    states = [0] * (layout.gpus // layout.pp)
    for chunk in chunks:
        in_buffers, of_ranks = buffer_memory(chunk, request.student, layout, request.settings, _state["args"])
        memory, states = _added(memory, in_buffers), [sum(both) for both in zip(states, of_ranks, strict=True)]
        student += _count(chunk.parameters())
        other = sum(each.nbytes for each in chunk.buffers())
        teacher_bytes = 0
        if chunk.teacher is not None:
            teacher += _count(chunk.teacher.parameters())
            teacher_bytes = sum(each.nbytes for each in (*chunk.teacher.parameters(), *chunk.teacher.buffers()))
        memory = _added(memory, Memory(weights=other, teacher=teacher_bytes))
    return BuiltRank(replace(memory, optimizer=max(states)), student, teacher)


def _count(parameters: Iterable[Tensor]) -> Count:
    found = Count()
    for each in parameters:
        dense = getattr(each, "allreduce", True)
        found += Count(each.numel(), 0) if dense else Count(0, each.numel())
    return found


def _added(one: Memory, other: Memory) -> Memory:
    fields = ("weights", "gradients", "optimizer", "teacher")
    return Memory(**{name: getattr(one, name) + getattr(other, name) for name in fields})
