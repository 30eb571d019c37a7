"""A forward pass that holds one block of weights at a time: what calibration and evaluation run.

The hidden states of all samples wait in memory, or in a work directory; a block is loaded, every sample goes through
it, the block is dropped: a model far larger than the machine can be run. The blocks are Megatron-Core's own layers. The
MTP block goes last: its input is made of the trunk's final hidden state and the embedding of the next token.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import megatron_slim.mcore

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from megatron_slim import __version__
from megatron_slim.aliases import Array
from megatron_slim.architecture.local_modules import rms_norm
from megatron_slim.architecture.packing import by_sample, in_one_sequence, packed_documents
from megatron_slim.architecture.table import count_parameters, names_of
from megatron_slim.checkpoint.convert import Checkpoint
from megatron_slim.checkpoint.dtype_names import dtype_name
from megatron_slim.checkpoint.raw_files import as_bytes
from megatron_slim.compat.cpu_memory import STREAMING, keep_freed_memory
from megatron_slim.files import sha256
from megatron_slim.products import linear, threads_for
from megatron_slim.reporting import progress
from megatron_slim.streaming.block import block_config, build_block, rotary_embedding
from megatron_slim.streaming.fingerprint import fingerprint
from megatron_slim.streaming.hidden_states import HiddenStates, InFiles, InMemory
from megatron_slim.streaming.work_dir import WorkDir

logger = logging.getLogger(__name__)

# What a pass goes through around the blocks, and Megatron's key of its weight.
EMBEDDING, FINAL_NORM, MTP_INPUT, MTP_NORM = "embedding", "final_norm", "mtp_input", "mtp_norm"
KEYS = {
    EMBEDDING: "embedding.word_embeddings.weight",
    FINAL_NORM: "decoder.final_layernorm.weight",
    MTP_INPUT: "mtp.layers.0.eh_proj.weight",
    MTP_NORM: "mtp.layers.0.final_layernorm.weight",
}
MTP_INPUT_NORMS = ("mtp.layers.0.enorm.weight", "mtp.layers.0.hnorm.weight")


@dataclass(frozen=True)
class MicroBatch:
    """Samples that go through a module at once.

    Attributes:
        tokens: ids [samples, sequence].
        positions: position ids [samples, sequence] that are 0 where a document begins; None: a sample is one document.
    """

    tokens: Tensor
    positions: Tensor | None = None


# What a module does to hidden states [samples, positions, hidden], given the micro-batch that they are of.
Step = Callable[[Tensor, MicroBatch], Tensor]


class StreamingForward:
    """All samples on their way through a model.

    A subclass overrides what it wants to look at: `enter`, `begin`, `observe` and `leave`, which do nothing here; and,
    to be taken up after a kill, `state`, `restore` and, where there are more, `inputs`. Blocks go by their Hugging Face
    names, the rest by those in `KEYS`.

    Attributes:
        checkpoint: the model.
        samples: token ids [samples, sequence].
        config: Megatron's configuration of the blocks.
        streams: how many times as many hidden states there are at once as of the samples.
        whole_mtp: whether the MTP block is given every position; the last one, after which no token comes, then gets
            that of token 0, as in Megatron's training.
    """

    streams = 1
    whole_mtp = False

    def __init__(
        self,
        checkpoint: Checkpoint,
        samples: npt.NDArray[np.int64],
        *,
        micro_batch_size: int,
        dtype: torch.dtype,
        work: WorkDir | None = None,
        position_ids: Array | None = None,
    ) -> None:
        """Prepare a pass; nothing is computed yet.

        Args:
            checkpoint: the model.
            samples: token ids [samples, sequence], all below the vocabulary's size.
            micro_batch_size: samples in one forward pass.
            dtype: of weights and activations.
            work: where hidden states and progress are kept; None is in memory, and nowhere.
            position_ids: [samples, sequence], 0 where a document begins that sees nothing of those before it; None:
                every sample is one document.
        """
        self.checkpoint, self.shape, self.dtype = checkpoint, checkpoint.shape, dtype
        self.samples = torch.from_numpy(samples)
        self.micro_batch_size = micro_batch_size
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.config = block_config(self.shape, dtype)
        self.positions = None if position_ids is None else torch.from_numpy(np.array(position_ids, np.int64))
        self._micro_batches = [*map(MicroBatch, self.samples.split(micro_batch_size))]
        if self.positions is not None:
            assert self.positions.shape == self.samples.shape
            parts = zip(self._micro_batches, self.positions.split(micro_batch_size), strict=True)
            self._micro_batches = [MicroBatch(each.tokens, positions) for each, positions in parts]
        self._work = work

    def enter(self, block: str, layer: TransformerLayer) -> None:
        """A block has been loaded; nothing has gone through it."""

    def begin(self, module: str, number: int) -> None:
        """A micro-batch, counted from 0, is about to go through a module."""

    def observe(self, module: str, inputs: Tensor, output: Tensor) -> None:
        """A micro-batch has gone through a module; [positions, samples, hidden] of a block, else the other way."""

    def leave(self, module: str) -> None:
        """Everything has gone through a module; `hidden` is its output."""

    def state(self) -> Mapping[str, Tensor]:
        """Everything measured so far, after a module has been left; asked for only where there is a work directory."""
        return {}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take up what `state` gave in the run that was killed."""

    def batches(self) -> Iterator[Tensor]:
        """The hidden states [samples, positions, hidden] of every micro-batch, in `leave` the output of the module."""
        return (self._hidden.load(batch) for batch in range(len(self._micro_batches)))

    def run(self, description: str) -> None:
        """Pass everything through every module, the MTP block's last; ``description`` is the progress bar's."""
        keep_freed_memory(STREAMING)
        nbytes = self.samples.numel() * self.shape.hidden_size * self.dtype.itemsize
        finished = 0
        self._hidden: HiddenStates = InMemory(nbytes * self.streams, self.device)
        if self._work is not None:
            if saved := self._work.begin(self.inputs(), nbytes):
                finished = saved.finished
                self.restore(saved.measured)
                logger.info(f"{self._work.path}: resuming after {finished} of {len(list(self._modules()))} modules")
            self._hidden = InFiles(
                self._work, self.shape.hidden_size, self.micro_batch_size, len(self.samples), self.dtype
            )
        flops = 2 * self.micro_batch_size * self.samples.shape[1] * count_parameters(self.shape).active
        with self.checkpoint.reading_once(), threads_for(flops):
            for number, module in enumerate(progress(list(self._modules()), description)):
                if number >= finished:
                    self._pass(module)

    def weight(self, key: str) -> Tensor:
        """A weight by Megatron's key, on the device."""
        return self._read(key).to(self.device, self.dtype)

    def _read(self, key: str) -> Tensor:
        return self.checkpoint.read(names_of(self.shape)[key])

    def inputs(self) -> dict[str, str]:
        """Everything that decides what is measured, by name; what was begun with others is not taken up."""
        documents = {} if self.positions is None else {"documents": sha256(bytes(as_bytes(self.positions)))}
        return documents | {
            "a pass of": type(self).__name__,
            "checkpoint": fingerprint(self.checkpoint),
            "samples": f"{list(self.samples.shape)} {sha256(bytes(as_bytes(self.samples)))}",
            "micro-batch size": str(self.micro_batch_size),
            "dtype": dtype_name(self.dtype),
            "device": self.device.type,
            "megatron_slim": __version__,
            "torch": torch.__version__,
        }

    def _modules(self) -> Iterator[str]:
        """All modules in the order of the pass."""
        yield EMBEDDING
        for block in self.shape.blocks:
            if block.startswith("mtp."):
                yield MTP_INPUT
            yield block
            if block == f"model.layers.{self.shape.num_layers - 1}":
                yield FINAL_NORM
            elif block.startswith("mtp."):
                yield MTP_NORM

    def _pass(self, module: str) -> None:
        step = self._step(module)
        for number, batch in enumerate(self._micro_batches):
            self.begin(module, number)
            hidden = batch.tokens if module == EMBEDDING else self._hidden.load(number).to(self.device)
            self._hidden.store(step(hidden, batch))
        self._hidden.turn()
        self.leave(module)
        self._hidden.commit(self.state() if self._work is not None else {})

    def _step(self, module: str) -> Step:
        if module == EMBEDDING:
            return self._embed()
        if module == MTP_INPUT:
            return self._join_next_tokens()
        return self._norm(module) if module in (FINAL_NORM, MTP_NORM) else self._block(module)

    def _embed(self) -> Step:
        embedding = self._read(KEYS[EMBEDDING])

        def step(_: Tensor, batch: MicroBatch) -> Tensor:
            output = embedding[batch.tokens].to(self.dtype)
            self.observe(EMBEDDING, batch.tokens, output)
            return output

        return step

    def _block(self, block: str) -> Step:
        layer = build_block(self.checkpoint, block, self.config)
        self.enter(block, layer)
        return self._through(layer, block, lambda inputs, output: self.observe(block, inputs, output))

    def _through(self, layer: TransformerLayer, block: str, observe: Callable[[Tensor, Tensor], None]) -> Step:
        """What a layer does in the place of a block."""
        length = self.samples.shape[1] - (block.startswith("mtp.") and not self.whole_mtp)
        rotary = rotary_embedding(self.shape, length)

        def step(hidden: Tensor, batch: MicroBatch) -> Tensor:
            hidden = hidden.transpose(0, 1).contiguous()
            if batch.positions is None:
                output, _ = layer(hidden, attention_mask=None, rotary_pos_emb=rotary)
            else:
                output = _documents_apart(layer, hidden, rotary, batch.positions[:, :length].to(self.device))
            observe(hidden, output)
            found: Tensor = output.transpose(0, 1)
            return found

        return step

    def _norm(self, module: str) -> Step:
        weight = self.weight(KEYS[module])

        def step(hidden: Tensor, _: MicroBatch) -> Tensor:
            output = self._normed(hidden, weight)
            self.observe(module, hidden, output)
            return output

        return step

    def _normed(self, hidden: Tensor, weight: Tensor) -> Tensor:
        centered = self.shape.family.zero_centered_norms
        return rms_norm(hidden, weight, self.shape.layernorm_epsilon, zero_centered=centered)

    def _join_next_tokens(self) -> Step:
        """Join the trunk's output at position i with the embedding of token i + 1; the last position has none.

        Where token i + 1 is of another document Megatron takes token 0 in its place, and so do we.
        """
        projection, (enorm, hnorm) = self.weight(KEYS[MTP_INPUT]), map(self.weight, MTP_INPUT_NORMS)
        embedding = self._read(KEYS[EMBEDDING])

        def step(hidden: Tensor, batch: MicroBatch) -> Tensor:
            following = batch.tokens[:, 1:]
            if batch.positions is not None:
                following = following.masked_fill(batch.positions[:, 1:] == 0, 0)
            following = F.pad(following, (0, int(self.whole_mtp)))
            embedded = embedding[following].to(self.device, self.dtype)
            own = hidden[:, : following.shape[1]]
            pair = torch.cat((self._normed(embedded, enorm), self._normed(own, hnorm)), dim=-1)
            output = linear(pair.flatten(0, 1), projection).unflatten(0, pair.shape[:2])
            self.observe(MTP_INPUT, pair, output)
            return output

        return step


def _documents_apart(layer: TransformerLayer, hidden: Tensor, rotary: Tensor, positions: Tensor) -> Tensor:
    """What a layer makes of hidden states [positions, samples, hidden] in which documents do not see each other."""
    packed: PackedSeqParams = packed_documents(positions)
    output, _ = layer(
        in_one_sequence(hidden),
        attention_mask=None,
        rotary_pos_emb=rotary[: packed.max_seqlen_q],
        packed_seq_params=packed,
    )
    return by_sample(output, len(positions))
