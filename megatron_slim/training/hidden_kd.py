"""Hidden-state distillation in a run: checks before the start, and its way into the log, from whatever stage."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass, field

import megatron_slim.mcore

import torch
from megatron.core import parallel_state
from torch import Tensor

from megatron_slim.architecture.pipeline_layout import Stages
from megatron_slim.architecture.shape import ModelShape
from megatron_slim.checkpoint.convert import Checkpoint
from megatron_slim.checkpoint.distributed import DistCheckpoint
from megatron_slim.checkpoint.torch_dist_names import HIDDEN_KD
from megatron_slim.distillation.hidden import HiddenInputs
from megatron_slim.distillation.layer_pairs import FLAG, LayerPair, name_of, pair_violations, stage_violations
from megatron_slim.distillation.loss_options import DEFAULTS
from megatron_slim.distillation.losses import LossWeights
from megatron_slim.distillation.model import DistillationModel
from megatron_slim.distillation.terms import HIDDEN, LOSS_TERMS, hidden_weight
from megatron_slim.errors import CheckpointError, SlimError
from megatron_slim.training.finite import FiniteWatch
from megatron_slim.training.slim_arguments import schedule_of

# Flags with which Megatron runs layers by another way than calling them, where no hook sees them.
_PAST_LAYERS = ("enable_cuda_graph", "external_cuda_graph", "overlap_moe_expert_parallel_comm")


def hidden_violations(shape: ModelShape, teacher: ModelShape | None, args: Namespace) -> list[str]:
    """What is wrong with the arguments of hidden-state distillation, in sentences.

    Args:
        shape: sizes of the student.
        teacher: sizes of the teacher, None without one.
        args: Megatron's arguments and ours, as parsed.
    """
    weight, pairs = hidden_weight(), args.hidden_kd_layers
    schedule = schedule_of(weight, args)
    given = (args.hidden_kd_loss, schedule) != (DEFAULTS.hidden_kd_loss, weight.default)
    if not pairs:
        return [f"--hidden-kd-* has no effect without {FLAG}"] if given else []
    found = []
    graphs = getattr(args, "cuda_graph_impl", "none") != "none"
    found += ["--cuda-graph-impl cannot be combined with " + FLAG] if graphs else []
    for name in _PAST_LAYERS:
        if getattr(args, name, False):
            found.append(f"--{name.replace('_', '-')} cannot be combined with {FLAG}")
    if teacher is None:
        return [*found, f"{FLAG} needs a teacher; give --teacher-load"]
    return found + pair_violations(pairs, shape.num_layers, teacher.num_layers)


def check_stages(pairs: Sequence[LayerPair], stages: Stages) -> None:
    """See that the two layers of a pair are in the same (virtual) pipeline stage.

    Raises:
        SlimError: names the pairs of which they do not.
    """
    if found := list(stage_violations(pairs, stages.student_layers, stages.teacher_layers)):
        raise SlimError(
            f"{FLAG}: layers of a pair are in different pipeline stages: {'; '.join(found)}",
            fix="choose layers of one stage, or other stages by --pipeline-layout, --pipeline-model-parallel-layout or "
            "--teacher-pipeline-layout",
        )


def check_projections(found: Checkpoint, args: Namespace) -> None:
    """See that a run which resumes by ``--load`` finds the projections that it needs.

    Args:
        found: the checkpoint that it resumes from.
        args: Megatron's arguments and ours, as parsed.

    Raises:
        CheckpointError: it has others, or none; or it has some and the run uses none.
    """
    left_out = found.left_out if isinstance(found, DistCheckpoint) else ()
    there = {key for key in left_out if key.startswith(HIDDEN_KD)}  # an MTP block that is not wanted is none
    wanted = {f"{HIDDEN_KD}projections.{own}-{other}.weight" for own, other in args.hidden_kd_layers}
    # Without its optimizer's state, which Megatron reads by position, a run can leave out what it does not use.
    if wanted - there or (there - wanted and not (args.no_load_optim or args.finetune)):
        names = sorted(key.split(".")[-2].replace("-", ":") for key in there)
        saved = f"with {FLAG} {','.join(names)}" if names else f"without {FLAG}"
        asked = ",".join(map(name_of, args.hidden_kd_layers)) or "none"
        raise CheckpointError(
            f"was saved {saved}, this run asks for {asked}",
            where=str(found.path),
            fix="give the same, or start a new run from it: --pretrained-checkpoint in place of --load, another --save",
        )


def hidden_inputs(chunk: DistillationModel, loss_mask: Tensor | None, weights: LossWeights) -> HiddenInputs | None:
    """What the hidden-state loss of a stage's layers needs; None where there are none, and in validation."""
    if chunk.hidden_kd is None or not chunk.training:
        return None
    assert loss_mask is not None
    return HiddenInputs(loss_mask, weights[hidden_weight().key])


@dataclass
class HiddenLog:
    """What the pairs of all stages add to the losses that the last stage reports.

    Megatron's loop logs what the loss function returned for the micro-batches, on the last stage. The loss is known
    there only when all stages have finished, so the entries of the last micro-batch are filled in at the end.
    """

    pairs: tuple[LayerPair, ...]
    entries: dict[str, Tensor] = field(default_factory=dict)

    def report(self, tokens: Tensor, weights: LossWeights) -> dict[str, Tensor]:
        """Entries (sum, count) of one more micro-batch of a training step; called on the last stage."""
        loss, weight = LOSS_TERMS[HIDDEN].name, hidden_weight()
        names = [loss, *(f"{loss} {name_of(pair)}" for pair in self.pairs)]
        self.entries = {name: torch.stack([torch.zeros_like(tokens), tokens]) for name in names}
        one = torch.ones_like(tokens)
        return {**self.entries, weight.name: torch.stack([one * weights[weight.key], one])}

    def finish(self, chunks: Sequence[DistillationModel], watch: FiniteWatch) -> None:
        """Bring the sums of an iteration to the last stage; all ranks must call it.

        Args:
            chunks: this rank's virtual pipeline stages.
            watch: is shown the sums where they arose.
        """
        if not self.pairs:
            return
        sums = torch.zeros(len(self.pairs), dtype=torch.float32, device=torch.cuda.current_device())
        for chunk in chunks:
            if chunk.hidden_kd is None:
                continue
            for pair, value in chunk.hidden_kd.sums.items():
                watch.add("loss", f"{LOSS_TERMS[HIDDEN].name} {name_of(pair)}", chunk.vp_stage, value)
                sums[self.pairs.index(pair)] = value
            chunk.hidden_kd.sums.clear()
        torch.distributed.all_reduce(sums, group=parallel_state.get_pipeline_model_parallel_group())
        if chunks[0].config.sequence_parallel:  # each rank has seen a part of the tokens
            torch.distributed.all_reduce(sums, group=parallel_state.get_tensor_model_parallel_group())
        for entry, value in zip(self.entries.values(), (sums.mean(), *sums), strict=False):
            entry[0] = value
        self.entries = {}
