"""Hidden states of chosen layers of the student are supervised by the teacher's, through a trained projection.

What a layer of the student gives, its part of the residual stream, goes through a linear map to the teacher's width and
is compared with what a layer of the teacher gives (FitNets, arXiv 1412.6550; TinyBERT, arXiv 1909.10351). Both layers
are in the same pipeline stage, so nothing is sent for it; the gradient joins the one that comes back through the layer.

Shapes: S sequence, s that of this rank (under sequence and context parallelism), b batch, H and Ht widths of student
and teacher.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import megatron_slim.mcore

import torch
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from torch import Tensor, nn

from megatron_slim.architecture.context_parallel import local_positions, local_slice
from megatron_slim.distillation.layer_pairs import LayerPair, name_of
from megatron_slim.distillation.loss_options import COSINE


@dataclass(frozen=True)
class HiddenInputs:
    """What the loss of a micro-batch needs: the loss mask [b, S], and what the loss is multiplied by."""

    mask: Tensor
    weight: float


@dataclass
class _MicroBatch:
    """A micro-batch on its way: mask [s, b] of this rank's tokens, and the teacher's hidden states [s, b, Ht]."""

    mask: Tensor
    weight: float
    targets: dict[int, Tensor] = field(default_factory=dict)
    done: set[LayerPair] = field(default_factory=set)


def token_losses(projected: Tensor, target: Tensor, kind: str) -> Tensor:
    """Loss of every token, in fp32.

    Args:
        projected: the student's hidden states in the teacher's width, [s, b, Ht].
        target: the teacher's, [s, b, Ht].
        kind: `COSINE`, 1 - cos of the angle between the two; `MSE`, the mean over Ht of squared differences.

    Returns:
        [s, b].
    """
    projected, target = projected.float(), target.float()
    if kind == COSINE:
        return 1.0 - F.cosine_similarity(projected, target, dim=-1)
    return (projected - target).square().mean(-1)


class Projection(nn.Module):
    """A linear map [Ht, H] from the student's width to the teacher's, whole on every tensor-parallel rank.

    It starts as the identity where the widths are the same, as after pruning in depth alone, where both models write to
    one residual stream; else with random numbers that keep the length of a vector. They come from a generator of their
    own on the CPU, so that they are the same on all ranks and under every layout.
    """

    def __init__(self, student: GPTModel, teacher: GPTModel, seed: int) -> None:
        super().__init__()
        width, wanted = (model.decoder.config.hidden_size for model in (student, teacher))
        generator = torch.Generator().manual_seed(seed)
        start = torch.eye(width) if width == wanted else torch.randn(wanted, width, generator=generator) * wanted**-0.5
        like = next(student.decoder.parameters())
        self.weight = nn.Parameter(start.to(device=like.device, dtype=student.config.params_dtype))
        # Each rank sees a part of the tokens then, and Megatron sums such gradients as those of its norms.
        self.weight.sequence_parallel = student.config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., H] -> [..., Ht]."""
        return F.linear(hidden.to(self.weight.dtype), self.weight)


class HiddenDistillation(nn.Module):
    """The pairs of layers of one pipeline stage: projections, and hooks on the layers of both models.

    Attributes:
        pairs: those of this stage.
        sums: loss of each over the tokens that count, added up until it is taken.
    """

    def __init__(
        self, student: GPTModel, teacher: GPTModel, pairs: Sequence[LayerPair], *, kind: str, seed: int, share: float
    ) -> None:
        """Watch the layers; ``share`` is that of one pair in the loss."""
        super().__init__()
        self.pairs, self.kind, self.share = tuple(pairs), kind, share
        self.sums: dict[LayerPair, Tensor] = {}
        config = student.config
        self.cp = student.pg_collection.cp
        self.tp = student.pg_collection.tp if config.sequence_parallel else None
        # A seed for each pair that is the same whichever stage it is in.
        seeds = {pair: seed + pair[0] + pair[1] * config.num_layers for pair in self.pairs}
        self.projections = nn.ModuleDict({_key(pair): Projection(student, teacher, seeds[pair]) for pair in self.pairs})
        self._now: _MicroBatch | None = None
        # Full recomputation runs a layer first without graph and again in backward, by when other micro-batches have
        # come in. Schedules go back through micro-batches in the order in which they came.
        self._recomputed: dict[LayerPair, deque[_MicroBatch]] = {pair: deque() for pair in self.pairs}
        own, others = layers_of(student), layers_of(teacher)
        for pair in self.pairs:
            own[pair[0]].register_forward_hook(partial(self._add_loss, pair))
        for layer in {layer for _, layer in self.pairs}:
            others[layer].register_forward_hook(partial(self._keep, layer))

    @contextlib.contextmanager
    def distilling(self, inputs: HiddenInputs | None) -> Iterator[None]:
        """Forward passes within, of the teacher and then of the student, are those of a training step, if of any."""
        if inputs is None:
            yield
            return
        mask = local_slice(inputs.mask, local_positions(self.cp, inputs.mask.shape[-1])).float().transpose(0, 1)
        if self.tp is not None:
            mask = mask.chunk(self.tp.size())[self.tp.rank()]
        now = self._now = _MicroBatch(mask, inputs.weight * self.share)
        yield
        assert now.done == set(self.pairs), f"layers were passed over: {now.done} of {self.pairs}"
        self._now = None

    def _keep(self, layer: int, module: nn.Module, inputs: object, output: tuple[Tensor, object]) -> None:
        if self._now is not None:
            self._now.targets[layer] = output[0].detach()

    def _add_loss(
        self, pair: LayerPair, module: nn.Module, inputs: object, output: tuple[Tensor, object]
    ) -> tuple[Tensor, object] | None:
        """Put the loss into the graph, whose value changes nothing; its gradient comes as Megatron's auxiliary ones do.

        Megatron's schedules set by how much: by the loss scale, and not by the number of tokens, by which all gradients
        are divided in the end (``--calculate-per-token-loss``).
        """
        now, waiting = self._now, self._recomputed[pair]
        if waiting and torch.is_grad_enabled():
            now = waiting.popleft()
        elif now is not None:
            now.done.add(pair)
            if not torch.is_grad_enabled():
                waiting.append(now)
        if now is None or not torch.is_grad_enabled():
            return None
        hidden, context = output
        losses = token_losses(self.projections[_key(pair)](hidden), now.targets[pair[1]], self.kind)
        total = (losses * now.mask).sum()
        self.sums[pair] = self.sums[pair] + total.detach() if pair in self.sums else total.detach()
        return MoEAuxLossAutoScaler.apply(hidden, total * now.weight), context


def layers_of(model: GPTModel) -> dict[int, nn.Module]:
    """Transformer layers of this stage by their number, from 0 and over the whole model."""
    return {layer.layer_number - 1: layer for layer in model.decoder.layers}


def _key(pair: LayerPair) -> str:
    return name_of(pair).replace(":", "-")
