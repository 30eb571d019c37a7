"""An optimizer's state in a torch_dist checkpoint: tensors of the weights' names and shapes, read as weights are.

Megatron saves it so without the distributed optimizer, and with it under ``--dist-ckpt-optim-fully-reshardable``. Its
keys are ``optimizer.state.NAME.KEY``: NAME is ``exp_avg``, ``exp_avg_sq``, and for main weights ``param`` or, without
the distributed optimizer, ``fp32_param`` (of a model in fp32 it has none); KEY is that of the weight.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_slim.architecture.shape import ModelShape
from megatron_slim.architecture.table import weights
from megatron_slim.checkpoint.distributed import DistCheckpoint
from megatron_slim.checkpoint.layout import fits, stored_shapes
from megatron_slim.checkpoint.metadata_pickle import Metadata, MetadataIndex, TensorStorageMetadata
from megatron_slim.checkpoint.plain_state import read_plain_state
from megatron_slim.checkpoint.torch_dist_files import read_metadata
from megatron_slim.checkpoint.torch_dist_names import CARRIED, STATE
from megatron_slim.checkpoint.units import Checkpoint, units
from megatron_slim.errors import CheckpointError, summarise
from megatron_slim.optimizers import ADAM, MOMENTUM, OPTIMIZERS

MOMENTS = OPTIMIZERS[ADAM].states
MAIN = ("param", "fp32_param")
NOT_CARRIED = "whose momentum is new again after some twenty steps: there is nothing to carry"
RESHARDABLE = "resume the run once with --dist-ckpt-optim-fully-reshardable, and prune what it then saves"
UNREADABLE = "prune another iteration: --load RUN/iter_..."


@dataclass(frozen=True)
class OptimizerState:
    """State of Adam, complete for a model.

    Attributes:
        step: how many steps it has made, which its bias correction goes by.
        tensors: by the name of a state, what gives that of every weight under the weight's Hugging Face name.
    """

    step: int
    tensors: Mapping[str, Checkpoint]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        states = self.tensors.values()
        return sum(unit.nbytes for state in states for unit in units(state.shape, state.dtypes, trained_only=True))


def open_optimizer_state(source: Checkpoint) -> OptimizerState:
    """Open the optimizer's state next to a checkpoint's weights, and check all of it but the values.

    Raises:
        CheckpointError: there is none, or in a format that is bound to the layout of the run, or it is incomplete.
    """
    where = str(source.path)
    if not isinstance(source, DistCheckpoint):
        fix = "give the torch_dist checkpoint of the training run, or leave --carry-optimizer out"
        raise CheckpointError("is a Hugging Face checkpoint, which has no optimizer state", where=where, fix=fix)
    metadata = read_metadata(source.path)
    if any(
        key.startswith((f"{STATE}{MOMENTUM}.", f"chained_0.{STATE}{MOMENTUM}.")) for key in metadata.state_dict_metadata
    ):
        fix = "leave --carry-optimizer out"
        raise CheckpointError(f"has the state of Muon or Aurora, {NOT_CARRIED}", where=where, fix=fix)
    if source.optimizer_by_buckets:
        raise CheckpointError(
            "its optimizer state has the layout of the run's buffers, not of the weights", where=where, fix=RESHARDABLE
        )
    names = [*MAIN, *MOMENTS] if source.optimizer_by_names else []
    views = {name: view for name in names if (view := _metadata_of(name, metadata)).state_dict_metadata}
    if not set(MOMENTS) <= set(views):
        fix = "give an iteration of a run that saves it (without --no-save-optim), or leave --carry-optimizer out"
        raise CheckpointError("has no optimizer state by the names of weights", where=where, fix=fix)
    if violations := [line for name, view in views.items() for line in _violations(name, source.shape, view)]:
        raise CheckpointError(
            f"its optimizer state does not fit the weights: {summarise(violations)}", where=where, fix=UNREADABLE
        )
    return OptimizerState(_step(source, metadata), {name: _view(name, source, view) for name, view in views.items()})


def _metadata_of(name: str, metadata: Metadata) -> Metadata:
    """What the metadata say of one state, under the keys of the weights."""
    prefix = f"{STATE}{name}."
    entries = {
        key.removeprefix(prefix): entry
        for key, entry in metadata.state_dict_metadata.items()
        if key.startswith(prefix) and isinstance(entry, TensorStorageMetadata)
    }
    storage = {
        MetadataIndex(index.fqn.removeprefix(prefix), offset=index.offset): info
        for index, info in metadata.storage_data.items()
        if index.fqn.startswith(prefix)
    }
    return Metadata(dict(entries), storage_data=storage)


def _violations(name: str, shape: ModelShape, metadata: Metadata) -> Iterator[str]:
    for weight in (weight for weight in weights(shape) if not weight.buffer):
        for key, extents in stored_shapes(weight, shape):
            entry = metadata.state_dict_metadata.get(key)
            if not isinstance(entry, TensorStorageMetadata):
                yield f"{name} of {key} is missing"
            elif not fits(weight, tuple(entry.size), extents):
                yield f"{name} of {key} has shape {list(entry.size)}, not {list(extents)}"


def _view(name: str, source: DistCheckpoint, metadata: Metadata) -> DistCheckpoint:
    return DistCheckpoint(
        source.path,
        source.config_path,
        source.config,
        source.shape,
        metadata,
        allow_nonfinite=source.allow_nonfinite,
        label=f"{name} of ",
        trained_only=True,
    )


def _step(source: DistCheckpoint, metadata: Metadata) -> int:
    """The one number of steps that all groups of parameters have."""
    steps = steps_in(read_plain_state(source.path, metadata))
    if not steps or not all(type(step) is int for step in steps):  # as another Megatron saves it, or damaged
        from megatron_slim.checkpoint.common_state import read_common_state  # with Megatron, which takes long

        steps = steps_in([read_common_state(source.path, fix=UNREADABLE)])
    if len(steps) != 1:
        found = ", ".join(map(str, sorted(steps))) or "none"
        raise CheckpointError(
            f"its optimizer has no one number of steps ({found})", where=str(source.path), fix=UNREADABLE
        )
    return int(steps.pop())


def steps_in(found: object) -> set[Any]:
    """All numbers of steps in a common state, which Megatron saves as a list of one."""
    common = found[0] if isinstance(found, list) and found and isinstance(found[0], dict) else {}
    return set(_values("step", [common.get(CARRIED), common.get("optimizer")]))


def _values(name: str, part: object) -> Iterator[Any]:
    """Whatever has a name, however deep in dictionaries and lists."""
    if isinstance(part, dict):
        for key, value in part.items():
            if key == name:
                yield value
            else:
                yield from _values(name, value)
    elif isinstance(part, list):
        for value in part:
            yield from _values(name, value)
