"""Calibration: what pruning decides by, measured as samples stream through the model; fp32 on a CPU, bf16 on a GPU."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import megatron_slim.mcore

import torch
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from megatron_slim import __version__
from megatron_slim.architecture.shape import ModelShape
from megatron_slim.architecture.table import names_of, router_of
from megatron_slim.checkpoint.convert import Checkpoint
from megatron_slim.checkpoint.dtype_names import dtype_name
from megatron_slim.compat.runtime import default_dtype, init_single_process
from megatron_slim.data import Tokens
from megatron_slim.errors import CheckpointError, summarise
from megatron_slim.files import sha256
from megatron_slim.pruning.importance import HiddenImportance, block_statistics
from megatron_slim.pruning.recorder import BlockRecorder, NormRecorder
from megatron_slim.pruning.statistics import FORMAT, Array, Statistics, importance_key
from megatron_slim.streaming.fingerprint import fingerprint
from megatron_slim.streaming.forward import FINAL_NORM, KEYS, StreamingForward
from megatron_slim.streaming.model_input import Samples
from megatron_slim.streaming.samples import check_samples
from megatron_slim.streaming.work_dir import WorkDir

logger = logging.getLogger(__name__)

# On a CPU, tokens in one forward pass so that an expert multiplies more than a few at a time: 5x faster than 256.
FORWARD_TOKENS = 4096
_TENSORS, _HIDDEN = "tensors.", "hidden."  # in the state of a calibration: finished entries, and running sums


def calibrate(
    checkpoint: Checkpoint,
    samples: Tokens | Samples,
    *,
    micro_batch_size: int | None = None,
    work: WorkDir | None = None,
) -> Statistics:
    """Measure the statistics of a checkpoint.

    Args:
        checkpoint: the model.
        samples: samples, or token ids [samples, sequence], all below the vocabulary's size.
        micro_batch_size: samples in one forward pass, None for about `FORWARD_TOKENS`; changes speed, memory and
            rounding, not the definition of any number.
        work: where hidden states and progress are kept, see `work_dir.open_work_dir`; None keeps them in memory.

    Raises:
        DataError: the samples do not fit the model.
        CheckpointError: an activation is not finite; names its block.
        SlimError: what is in the work directory does not belong to these inputs, or there is too little space.
    """
    given = Samples.of(samples)
    check_samples(given.read, checkpoint.shape)
    init_single_process()
    if micro_batch_size is None:
        micro_batch_size = max(1, FORWARD_TOKENS // given.read.shape[1])
    with torch.no_grad():
        run = _Calibration(checkpoint, given, micro_batch_size=micro_batch_size, dtype=default_dtype(), work=work)
        return run.result()


class _Calibration(StreamingForward):
    """A pass that measures every block and every norm of the trunk."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        samples: Samples,
        *,
        micro_batch_size: int,
        dtype: torch.dtype,
        work: WorkDir | None,
    ) -> None:
        super().__init__(
            checkpoint,
            samples.read,
            micro_batch_size=micro_batch_size,
            dtype=dtype,
            work=work,
            position_ids=samples.documents,
        )
        self._given, self._tokens = samples, samples.number_measured()
        self._counted = {ahead: self._counts(ahead) for ahead in (0, 1)}
        self.importance = HiddenImportance(self.shape)
        self.final_norm = NormRecorder(self.shape)
        self.tensors: dict[str, Array] = {}

    def result(self) -> Statistics:
        """Pass everything through and collect what was measured."""
        self.run("calibrating")
        log_unrouted(self.tensors, self.shape)
        self.tensors.update(self.importance.results())
        return Statistics(self.tensors, metadata(self.checkpoint, self._given, self.dtype))

    def enter(self, block: str, layer: TransformerLayer) -> None:
        """Listen to the block."""
        self._recorder = BlockRecorder(block, self.shape, layer)

    def begin(self, module: str, number: int) -> None:
        """Tell the recorders what of a micro-batch counts."""
        if module == FINAL_NORM:
            self.final_norm.count_only(self._counted[0][number])
        elif module in self.shape.blocks:
            in_one = 1 if self.positions is None else len(self._micro_batches[number].tokens)
            self._recorder.count_only(self._counted[int(module.startswith("mtp."))][number], in_one)

    def _counts(self, ahead: int) -> Sequence[Tensor | None]:
        """Of every micro-batch, what counts [positions, samples] in a module that is given tokens so far ahead, too."""
        found = self._given.measured(ahead)
        if found is None:
            return [None] * len(self._micro_batches)
        return [part.T for part in found[:, : found.shape[1] - ahead].split(self.micro_batch_size)]

    def observe(self, module: str, inputs: Tensor, output: Tensor) -> None:
        """Refuse what is not finite, and measure the trunk's final norm; the block's recorder measures by itself."""
        if not torch.isfinite(output).all():
            raise not_finite(module, self.checkpoint)
        if module == FINAL_NORM:
            self.final_norm.add(output.transpose(0, 1))

    def leave(self, module: str) -> None:
        """Collect what was measured of a module."""
        if module == FINAL_NORM:
            self.importance.add(self.final_norm.sums, self._tokens)
        if module in self.shape.blocks:
            sums = self._recorder.sums
            self.importance.add(sums, self._tokens)
            router = router_weight(self.checkpoint, module)
            self.tensors.update(block_statistics(module, self.shape, sums, router))

    def inputs(self) -> dict[str, str]:
        """And which tokens count."""
        counted = self._given.measured()
        which = {} if counted is None else {"tokens that count": sha256(counted.numpy().tobytes())}
        return super().inputs() | which

    def state(self) -> Mapping[str, Tensor]:
        """All tensors so far, and the sums that continue over the blocks."""
        tensors = {f"{_TENSORS}{name}": torch.from_numpy(value) for name, value in self.tensors.items()}
        return tensors | {f"{_HIDDEN}{kind}": values for kind, values in self.importance.sums.items()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take up what `state` gave."""
        self.tensors = {k.removeprefix(_TENSORS): v.numpy() for k, v in state.items() if k.startswith(_TENSORS)}
        for kind, values in self.importance.sums.items():
            values.copy_(state[f"{_HIDDEN}{kind}"])


def router_weight(checkpoint: Checkpoint, block: str) -> Tensor | None:
    """Weight [E, H] of a block's router; None where it has no experts."""
    routed = block in checkpoint.shape.routed_blocks
    return checkpoint.read(router_of(checkpoint.shape, block)) if routed else None


def log_unrouted(tensors: Mapping[str, Array], shape: ModelShape) -> None:
    """Log how many experts no token visited, by block."""
    counts = {block: int((tensors[importance_key(block, "frequency")] == 0).sum()) for block in shape.routed_blocks}
    if found := [f"{count} of {block}" for block, count in counts.items() if count]:
        logger.info(f"experts without a token, whose importances are 0: {summarise(found)}")


def not_finite(module: str, checkpoint: Checkpoint) -> CheckpointError:
    """What to raise where an activation is not finite; the module by its Hugging Face name."""
    if module in KEYS:
        module = names_of(checkpoint.shape)[KEYS[module]].removesuffix(".weight")
    return CheckpointError(
        f"output of {module} is not finite",
        where=str(checkpoint.path),
        fix="the checkpoint's weights are broken there or before",
    )


def metadata(checkpoint: Checkpoint, samples: Samples, dtype: torch.dtype) -> dict[str, str]:
    """What the statistics file says of itself."""
    return {
        "format": FORMAT,
        "source_sha256": fingerprint(checkpoint),
        "num_samples": str(samples.read.shape[0]),
        "seq_length": str(samples.read.shape[1]),
        "dtype": dtype_name(dtype),
        "megatron_slim": __version__,
        "torch": torch.__version__,
    }
