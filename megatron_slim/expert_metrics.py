"""Metrics of experts: importances, which say what goes, and similarities, which say what is merged (imports no torch).

One dictionary for each. Calibration measures what is in them, recipes may name it, docs list it. Another metric is
another entry, from this package or from outside, before recipes are read:

    EXPERT_IMPORTANCES["output_energy"] = ExpertMetric(
        "mean 1[i in A(x)] ||E_i(x)||^2", lambda sums: sums["experts.energy"] / sums["tokens"], {"energy": energy}
    )

With X_i the tokens routed to expert i, A(x) the top-k experts of token x, p the router's softmax, g the gate by which
the network multiplies an expert's output E_i(x) (p, renormalised over A(x) where ``norm_topk_prob``), means over all
calibration tokens unless stated otherwise. A mean over X_i is 0 where X_i is empty.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from megatron_slim.errors import SlimError

if TYPE_CHECKING:
    from torch import Tensor

# Float64 sums of one block by name, [E] and [E, ...] for ``experts.*``; `pruning.recorder` says what each is a sum of.
# Also ``router``, the router's weight [E, H].
Sums = Mapping[str, "Tensor"]


@dataclass(frozen=True)
class RoutedPairs:
    """What experts made of the tokens that were routed to them, P pairs of token and expert.

    Attributes:
        outputs: E_i(x), [P, H].
        gates: g_i(x), [P].
        lengths: ||E_i(x)||_2, [P], float32.
    """

    outputs: Tensor
    gates: Tensor
    lengths: Tensor


@dataclass(frozen=True)
class ExpertMetric:
    """One metric.

    Attributes:
        definition: in a line, with its source.
        of: the metric from a block's sums: [E], or [E, E] of a similarity.
        pair_sums: sums over routed pairs that it needs, by name: what of each pair is added up, [P]. In ``of`` they
            are ``experts.NAME``, [E].
    """

    definition: str
    of: Callable[[Sums], Tensor]
    pair_sums: Mapping[str, Callable[[RoutedPairs], Tensor]] = field(default_factory=dict)


# Other statistics and sums of experts have these names.
_TAKEN_NAMES = ("ffn", "similarity")
_TAKEN_SUMS = ("count", "share", "output", "ffn", "logits")


def visits(sums: Sums) -> Tensor:
    """Number of tokens of every expert, at least one: what a sum over X_i is divided by."""
    return sums["experts.count"].clamp(min=1)


def cosine_matrix(rows: Tensor) -> Tensor:
    """Cosine of every pair of rows; of a zero row with anything, 0."""
    return cosine_from_gram(rows @ rows.T)


def cosine_from_gram(gram: Tensor) -> Tensor:
    """Cosines of vectors from their inner products; of a zero vector with anything, 0."""
    norms = gram.diagonal().sqrt()
    scale = (1 / norms).nan_to_num(posinf=0.0)
    return gram * scale[:, None] * scale[None, :]


_LENGTHS = {"norm": lambda pairs: pairs.lengths}
_SALIENCY = {"saliency": lambda pairs: pairs.gates * pairs.lengths}
EXPERT_IMPORTANCES: dict[str, ExpertMetric] = {
    "frequency": ExpertMetric("mean 1[i in A(x)] (SlimQwen 3.2)", lambda sums: sums["experts.count"] / sums["tokens"]),
    "soft_logits": ExpertMetric(
        "mean 1[i in A(x)] p_i(x) / sum of p over A(x) (SlimQwen 3.2)",
        lambda sums: sums["experts.share"] / sums["tokens"],
    ),
    "reap": ExpertMetric(
        "mean over X_i of g_i(x) ||E_i(x)||_2 (REAP, arXiv 2510.13999)",
        lambda sums: sums["experts.saliency"] / visits(sums),
        _SALIENCY,
    ),
    "output_norm": ExpertMetric(
        "mean 1[i in A(x)] ||E_i(x)||_2 (EAN of arXiv 2510.13999)",
        lambda sums: sums["experts.norm"] / sums["tokens"],
        _LENGTHS,
    ),
}
EXPERT_SIMILARITIES: dict[str, ExpertMetric] = {
    "router_weights": ExpertMetric("cosine of the router's rows", lambda sums: cosine_matrix(sums["router"].double())),
    "router_logits": ExpertMetric(
        "cosine of the router's logits as vectors over all tokens",
        lambda sums: cosine_from_gram(sums["experts.logits"]),
    ),
    "expert_vectors": ExpertMetric(
        "cosine of the mean outputs over X_i",
        lambda sums: cosine_matrix(sums["experts.output"] / visits(sums)[:, None]),
    ),
}


def pair_sums() -> dict[str, Callable[[RoutedPairs], Tensor]]:
    """All sums over routed pairs that the metrics need, each once.

    Raises:
        SlimError: a name that is taken: of a metric by another statistic, of a sum by another sum.
    """
    for name in (*EXPERT_IMPORTANCES, *EXPERT_SIMILARITIES):
        if name in _TAKEN_NAMES:
            raise SlimError(f"a metric of experts may not be called {name!r}", fix="give it another name")
    found: dict[str, Callable[[RoutedPairs], Tensor]] = {}
    for metric in (*EXPERT_IMPORTANCES.values(), *EXPERT_SIMILARITIES.values()):
        for name, value in metric.pair_sums.items():
            if name in _TAKEN_SUMS or found.setdefault(name, value) is not value:
                raise SlimError(f"two sums of experts are called {name!r}", fix="give one of them another name")
    return found
