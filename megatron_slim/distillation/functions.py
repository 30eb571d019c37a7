"""Terms that are functions of some tokens' logits: values, and gradients by autograd within these tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from megatron_slim.distillation.terms import LossTerm, TermInputs
from megatron_slim.distillation.vocabulary import VocabShard


def values_and_gradient(
    terms: Sequence[LossTerm], head: int, inputs: TermInputs, upstream: Tensor | None
) -> tuple[list[Tensor], Tensor | None]:
    """What the functions of terms give for n tokens of a head.

    Args:
        terms: those with a function.
        head: 0 is the main one.
        inputs: the tokens.
        upstream: gradients [terms, n] of the values; None if none is wanted.

    Returns:
        values [n] of every term, zeros where it is not of this head; the gradient [n, P] of the logits, None if none is
        wanted or nothing is minimised.
    """
    values, total = [torch.zeros_like(inputs.labels, dtype=torch.float32) for _ in terms], None
    for number, term in enumerate(terms):
        if term.mtp == (head > 0):
            given = None if upstream is None or term.weight is None else upstream[number]
            values[number], gradient = _of_one(term, inputs, given)
            if gradient is not None:
                total = gradient if total is None else total + gradient
    return values, total


def _of_one(term: LossTerm, inputs: TermInputs, upstream: Tensor | None) -> tuple[Tensor, Tensor | None]:
    assert term.function is not None
    if upstream is None:
        with torch.no_grad():
            return term.function(inputs), None
    with torch.enable_grad():
        logits = inputs.logits.detach().requires_grad_()
        values = term.function(replace(inputs, logits=logits))
    if not values.requires_grad:  # of a rank without a column
        return values, None
    (gradient,) = torch.autograd.grad(values, logits, upstream)
    return values.detach(), gradient


def function_violations(terms: Mapping[str, LossTerm], vocab_size: int) -> list[str]:
    """What is wrong with the functions of terms, in sentences, tried on three tokens."""
    found = []
    logits = torch.linspace(-1.0, 1.0, 3 * vocab_size).view(3, vocab_size)
    for term in terms.values():
        if term.function is None:
            continue
        teacher = logits.flip(0) if term.needs_teacher else None
        labels = torch.tensor([0, 1, 2]).clamp(max=vocab_size - 1)
        with torch.enable_grad():
            given = logits.clone().requires_grad_()
            values = term.function(TermInputs(given, labels, teacher, VocabShard(0, vocab_size, None)))
        if values.shape != labels.shape:
            found.append(f"the function of {term.name!r} gives {list(values.shape)} for 3 tokens; it must give [3]")
        elif term.weight is not None and not values.requires_grad:
            found.append(f"the function of {term.name!r} has no gradient; give the term no weight, to log it alone")
    return found
