"""The terms of the loss, and their weights: one dictionary that everybody reads (imports no torch).

SlimQwen eq. 12 is its first five entries, those of heads; the sixth is of layers. A further term is another entry, from
this package or from outside, made before arguments are parsed: flags, checks, sum, log, figures and pictures follow.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_slim.distillation.schedule import Schedule
from megatron_slim.errors import SlimError

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_slim.distillation.vocabulary import VocabShard

SUFFIX = " loss"  # of a term's name, by which a log that is read back shows what its terms are


@dataclass(frozen=True)
class TermInputs:
    """Some tokens of one head of the student, as the function of a term sees them.

    Shapes: n tokens, P = this tensor-parallel rank's columns of the vocabulary, padding left out.

    Attributes:
        logits: [n, P] in fp32, for which there is a gradient. Not to be written to.
        labels: token ids [n].
        teacher: the teacher's logits [n, P] in fp32; None if the term does not need them.
        shard: which columns these are; has sums over all columns through which gradients go.
    """

    logits: Tensor
    labels: Tensor
    teacher: Tensor | None
    shard: VocabShard


TokenLoss = Callable[[TermInputs], "Tensor"]
"""Losses [n] of some tokens. The gradient is autograd's, within these tokens."""


@dataclass(frozen=True)
class LossWeight:
    """What terms are multiplied by, on a schedule over the run.

    Attributes:
        name: in the log, such as ``kd lambda``; flags are then ``--kd-lambda-schedule``, ``-start`` and ``-end``.
        default: where the flags say nothing.
        about: what it is, for the help.
        least: that it may be; what is below zero is not minimised.
        most: that it may be.
    """

    name: str
    default: Schedule
    about: str
    least: float = 0.0
    most: float = math.inf

    @property
    def key(self) -> str:
        """The name as an identifier: in parsed arguments, and in tags of the figures."""
        return self.name.replace(" ", "_")

    @property
    def flag(self) -> str:
        """What its flags begin with."""
        return f"--{self.name.replace(' ', '-')}"


# What `fused` computes of every head in closed form, from one softmax.
CROSS_ENTROPY, DIVERGENCE, TEACHER_CROSS_ENTROPY = "cross entropy", "divergence", "teacher's cross entropy"
HIDDEN_STATES = "distance of hidden states"  # what `hidden` computes of pairs of layers, where the layers are
HIDDEN = "hidden"  # the one entry that is of layers and not of heads


@dataclass(frozen=True)
class LossTerm:
    """One term of the sum.

    Attributes:
        name: in the log; ends in `SUFFIX`.
        of: a function, or one of those in closed form: `CROSS_ENTROPY` with the label, `DIVERGENCE` from the teacher
            (``--kd-loss``), `TEACHER_CROSS_ENTROPY`; or `HIDDEN_STATES`.
        weight: None for what is logged and not minimised.
        rest: the term is multiplied by 1 - weight, where another term of the run is multiplied by the weight.
        mtp: of the MTP heads, the mean over depths, and multiplied by `MTP_BETA` as well; else of the main head.
        needs_teacher: without one the term is left out.
    """

    name: str
    of: str | TokenLoss
    weight: LossWeight | None = None
    rest: bool = False
    mtp: bool = False
    needs_teacher: bool = False

    @property
    def function(self) -> TokenLoss | None:
        """What computes the term, if that is not in closed form."""
        return None if isinstance(self.of, str) else self.of

    @property
    def of_layers(self) -> bool:
        """Whether it is of layers, which are named by ``--hidden-kd-layers``, and not of heads."""
        return self.of == HIDDEN_STATES

    @property
    def in_nats(self) -> bool:
        """Whether it is in nats per token, as all that heads have in closed form; else it has a scale of its own."""
        return self.function is None and not self.of_layers


KD_LAMBDA = LossWeight(
    "kd lambda", Schedule("linear", 1.0, 0.75), "lambda, the weight of KD against LM (SlimQwen section 3.3)", most=1.0
)
MTP_BETA = LossWeight(
    "mtp beta", Schedule("cosine", 0.3, 0.1), "beta, the weight of the MTP losses (SlimQwen section 3.3)"
)
HIDDEN_KD_WEIGHT = LossWeight(
    "hidden kd weight", Schedule("constant", 1.0, 1.0), "the weight of the loss of hidden states"
)

# By short names, which are in tags and in the line of the log. The order is that of the log, tables and pictures.
LOSS_TERMS = {
    "lm": LossTerm("lm loss", CROSS_ENTROPY, KD_LAMBDA, rest=True),
    "kd": LossTerm("logits distillation loss", DIVERGENCE, KD_LAMBDA, needs_teacher=True),
    "teacher_lm": LossTerm("teacher lm loss", TEACHER_CROSS_ENTROPY, needs_teacher=True),
    "mtp_lm": LossTerm("mtp lm loss", CROSS_ENTROPY, KD_LAMBDA, rest=True, mtp=True),
    "mtp_kd": LossTerm("mtp distillation loss", DIVERGENCE, KD_LAMBDA, mtp=True, needs_teacher=True),
    HIDDEN: LossTerm("hidden distillation loss", HIDDEN_STATES, HIDDEN_KD_WEIGHT, needs_teacher=True),
}


def terms_of(*, has_teacher: bool, has_mtp: bool) -> dict[str, LossTerm]:
    """The terms of the heads of a run, in order."""
    return {
        key: term
        for key, term in LOSS_TERMS.items()
        if (has_teacher or not term.needs_teacher) and (has_mtp or not term.mtp) and not term.of_layers
    }


def hidden_weight() -> LossWeight:
    """What the loss of hidden states is multiplied by."""
    weight = LOSS_TERMS[HIDDEN].weight
    assert weight is not None  # `check_terms`
    return weight


def weights_of(terms: Iterable[LossTerm]) -> tuple[LossWeight, ...]:
    """Weights that are at work in terms, in order.

    >>> [weight.name for weight in weights_of(terms_of(has_teacher=False, has_mtp=True).values())]
    ['mtp beta']
    """
    found = ((None if term.rest else term.weight, MTP_BETA if term.mtp else None) for term in terms)
    return tuple(dict.fromkeys(weight for pair in found for weight in pair if weight is not None))


def factors(terms: Mapping[str, LossTerm], values: Mapping[str, float]) -> dict[str, float]:
    """What each term that is minimised is multiplied by; those of MTP heads by `MTP_BETA` besides.

    >>> factors(terms_of(has_teacher=False, has_mtp=False), {"kd_lambda": 0.75})
    {'lm': 1.0}

    Args:
        terms: of the run, by short name.
        values: of the weights in this iteration, by `LossWeight.key`.
    """
    at_work = {weight: values[weight.key] for weight in weights_of(terms.values())}
    found = {}
    for key, term in terms.items():
        if term.weight is not None:
            value = at_work.get(term.weight, 0.0)
            found[key] = 1.0 - value if term.rest else value
    return found


def check_terms() -> None:
    """See that the entries of `LOSS_TERMS` can be told apart.

    Raises:
        SlimError: names those that cannot.
    """
    names: set[str] = set()
    for key, term in LOSS_TERMS.items():
        where = f"LOSS_TERMS[{key!r}]"
        if not key.isidentifier():
            raise SlimError("a short name is made of letters, digits and _", where=where, fix="choose another")
        if not term.name.endswith(SUFFIX) or "/" in term.name:
            raise SlimError(f"the name {term.name!r} must end in {SUFFIX!r} and have no /", where=where, fix="rename")
        if term.name in names:
            raise SlimError(f"two terms are called {term.name!r}", where=where, fix="choose another name")
        if term.function is None and term.of not in (CROSS_ENTROPY, DIVERGENCE, TEACHER_CROSS_ENTROPY, HIDDEN_STATES):
            raise SlimError(f"nothing is known to compute {term.of!r}", where=where, fix="give a function")
        if term.of in (DIVERGENCE, TEACHER_CROSS_ENTROPY, HIDDEN_STATES) and not term.needs_teacher:
            raise SlimError(f"the {term.of} needs a teacher", where=where, fix="say needs_teacher=True")
        if term.of_layers != (key == HIDDEN):
            fix = "choose another short name"
            raise SlimError(f"the {HIDDEN_STATES} is what {HIDDEN!r} is of, and no other term", where=where, fix=fix)
        if term.of_layers and (term.weight is None or term.rest or term.mtp):
            raise SlimError(
                f"the {HIDDEN_STATES} has a weight of its own and no heads",
                where=where,
                fix="give a weight, and leave rest and mtp out",
            )
        if term.of == TEACHER_CROSS_ENTROPY and term.mtp:
            raise SlimError(f"the {term.of} is of its main head alone", where=where, fix="leave mtp out")
        names.add(term.name)
    weights = weights_of(LOSS_TERMS.values())
    for weight in weights:
        if [each.key for each in weights].count(weight.key) > 1:
            raise SlimError(f"two weights of losses are called {weight.name!r}", fix="choose another name")
