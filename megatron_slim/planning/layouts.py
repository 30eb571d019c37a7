"""Parallel layouts of a training run: which there are, what they need, and why one is not allowed (no torch)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import product

from megatron_slim.architecture.flops import FUSED, Kernels, Recompute
from megatron_slim.architecture.parallelism import layout_violations, padded_vocab_size
from megatron_slim.architecture.parts import TrainOnly
from megatron_slim.architecture.shape import ModelShape
from megatron_slim.distillation.loss_options import DEFAULTS as LOSSES
from megatron_slim.optimizers import ADAM, OPTIMIZERS
from megatron_slim.planning.storage import FULL, STORAGES, Storage
from megatron_slim.training.train_only import TRAIN_ONLY
from megatron_slim.training.variables import DEFAULTS

RECOMPUTE = {
    "none": Recompute(),
    "moe": Recompute("selective", modules=("moe",)),
    "full": Recompute("full", "uniform", 1),
}
MAX_VIRTUAL, MAX_PIPELINE = 2, 16
_parts = cache(TrainOnly.of)


@dataclass(frozen=True)
class Settings:
    """What a run is, whatever its layout; defaults are those of `megatron-slim distill`.

    Attributes:
        seq_length: tokens of a sample.
        global_batch: samples of a step.
        precision: bf16, or fp32.
        kd_loss: as ``--kd-loss``.
        loss_chunk: tokens whose logits are in memory at once.
        kernels: how attention and delta rule are computed.
        progressive: whether it is a phase's part in a schedule whose length the student's plan knows.
        optimizer: as ``--optimizer``.
        without_mtp: whether the student's MTP block is left out when its checkpoint is read.
        teacher_without_mtp: the same of the teacher.
        train_only: as ``--train-only``; "": everything is trained.
        states: where the optimizer has its states, a key of `STORAGES`.
        teacher_head_only: whether the teacher's hidden states come from a cache: of its weights, only those of its
            output layer are in memory.
    """

    seq_length: int = int(DEFAULTS["SEQ_LENGTH"])
    global_batch: int = int(DEFAULTS["GLOBAL_BATCH_SIZE"])
    precision: str = "bf16"
    kd_loss: str = LOSSES.kd_loss
    loss_chunk: int = 1024
    kernels: Kernels = FUSED
    progressive: bool = False
    optimizer: str = ADAM
    without_mtp: bool = False
    teacher_without_mtp: bool = False
    train_only: str = ""
    states: str = FULL
    teacher_head_only: bool = False

    @property
    def only(self) -> TrainOnly | None:
        """The parts that are trained; None: all."""
        return _parts(self.train_only) if self.train_only else None

    @property
    def storage(self) -> Storage:
        """Where the optimizer has its states."""
        return STORAGES[self.states]

    def violations(self, student: ModelShape) -> list[str]:
        """What does not go with the parts that are trained and with the optimizer, in sentences."""
        found = [] if self.only is None else [f"{TRAIN_ONLY} {sentence}" for sentence in self.only.violations(student)]
        return found + self.storage.violations(self.optimizer, self.precision)

    @property
    def width(self) -> int:
        """Bytes of a weight or an activation."""
        return 2 if self.precision == "bf16" else 4

    @property
    def shards_optimizer(self) -> bool:
        """Whether data-parallel ranks have parts of the optimizer's state; of matrices, in bf16 alone."""
        return self.precision == "bf16" or not OPTIMIZERS[self.optimizer].has_matrices


@dataclass(frozen=True)
class TrainLayout:
    """A way to split training across GPUs; experts are not split (expert tensor parallel size 1).

    Attributes:
        gpus: all of them.
        tp: tensor parallel size, with sequence parallelism where it is above 1.
        pp: pipeline parallel size.
        vpp: virtual pipeline stages of a rank.
        ep: expert parallel size.
        micro_batch: samples of a forward pass.
        recompute: a key of `RECOMPUTE`.
    """

    gpus: int
    tp: int = 1
    pp: int = 1
    vpp: int = 1
    ep: int = 1
    micro_batch: int = 1
    recompute: str = "none"

    @property
    def dp(self) -> int:
        """Copies of everything but the experts."""
        return self.gpus // (self.tp * self.pp)

    @property
    def expert_dp(self) -> int:
        """Copies of an expert."""
        return self.gpus // (self.ep * self.pp)

    def micro_batches(self, settings: Settings) -> int:
        """Forward passes of a stage in one step."""
        return settings.global_batch // (self.micro_batch * self.dp)

    @property
    def name(self) -> str:
        """Short, as in reports."""
        virtual = f" VPP{self.vpp}" if self.vpp > 1 else ""
        recompute = "" if self.recompute == "none" else f" {self.recompute} recompute"
        return f"TP{self.tp} PP{self.pp}{virtual} EP{self.ep} DP{self.dp} MBS{self.micro_batch}{recompute}"

    def violations(
        self, student: ModelShape, teacher: ModelShape | None, settings: Settings, per_node: int = 8
    ) -> list[str]:
        """Everything that rules this layout out for the run, as training would refuse it."""
        found = [
            f"{self.gpus} GPUs do not divide into groups of {name} {size} x PP {self.pp}"
            for name, size in (("TP", self.tp), ("EP", self.ep))
            if self.gpus % (size * self.pp)
        ]
        if found:
            return found
        if self.tp > per_node:
            found.append(f"TP {self.tp} is more than the {per_node} GPUs that NVLink connects")
        if settings.seq_length % self.tp:
            found.append(f"sequences of {settings.seq_length} tokens do not divide by TP {self.tp}")
        if settings.global_batch % (self.micro_batch * self.dp):
            batch = f"{self.micro_batch} a micro-batch x DP {self.dp}"
            found.append(f"a global batch of {settings.global_batch} does not divide by {batch}")
        elif self.vpp > 1 and self.micro_batches(settings) % self.pp:
            found.append(
                f"interleaving needs micro-batches ({self.micro_batches(settings)}) in multiples of PP {self.pp}"
            )
        if self.vpp > 1 and self.pp == 1:
            found.append("virtual stages need a pipeline")
        if student.num_layers < self.pp * self.vpp - 2:
            found.append(f"{student.num_layers} layers of the student do not fill {self.pp * self.vpp} stages")
        for name, shape in (("student", student), ("teacher", teacher)):
            if shape is not None:
                found += [f"{name}: {each}" for each in self._model_violations(shape, settings)]
        return found

    def _model_violations(self, shape: ModelShape, settings: Settings) -> list[str]:
        found = layout_violations(shape, tp=self.tp, ep=self.ep)
        if padded_vocab_size(shape) % self.tp:
            found.append(f"{padded_vocab_size(shape)} rows of the padded vocabulary do not divide by TP {self.tp}")
        if settings.seq_length > shape.max_position_embeddings:
            found.append(f"sequences of {settings.seq_length} tokens, at most {shape.max_position_embeddings}")
        return found


def powers_of_two(most: int) -> list[int]:
    """1, 2, 4, ... up to ``most``."""
    return [2**power for power in range(most.bit_length()) if 2**power <= most]


@dataclass(frozen=True)
class Wanted:
    """Values to try of each size; an empty tuple: the usual ones."""

    tp: Sequence[int] = ()
    pp: Sequence[int] = ()
    vpp: Sequence[int] = ()
    ep: Sequence[int] = ()
    micro_batch: Sequence[int] = ()
    recompute: Sequence[str] = field(default_factory=tuple)

    def layouts(self, gpus: int, experts: int, per_node: int) -> Iterator[TrainLayout]:
        """Every combination, allowed or not.

        The usual ones: powers of two, TP within a node, PP up to `MAX_PIPELINE`, EP up to 64 and the experts there are.
        """
        usual_ep = [ep for ep in powers_of_two(min(gpus, experts, 64)) if gpus % ep == 0]
        axes = (
            self.tp or [tp for tp in powers_of_two(min(gpus, per_node)) if gpus % tp == 0],
            self.pp or [pp for pp in powers_of_two(min(gpus, MAX_PIPELINE)) if gpus % pp == 0],
            self.vpp or range(1, MAX_VIRTUAL + 1),
            self.ep or usual_ep,
            self.micro_batch or (1, 2, 4),
            self.recompute or tuple(RECOMPUTE),
        )
        for tp, pp, vpp, ep, micro_batch, recompute in product(*axes):
            if vpp == 1 or pp > 1 or self.vpp:
                yield replace(
                    TrainLayout(gpus), tp=tp, pp=pp, vpp=vpp, ep=ep, micro_batch=micro_batch, recompute=recompute
                )
