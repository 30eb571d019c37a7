"""What quantization has changed: errors of single tensors, for ``--json`` and as a table next to the weights."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor

from megatron_slim.aliases import JsonObject

_LAYER = re.compile(r"^(model|mtp)\.layers\.\d+\.")
_EXPERT = re.compile(r"(?<=\.experts\.)\d+(?=\.)")


@dataclass(frozen=True, order=True)
class TensorError:
    """How far a tensor, or some rows of it, are from what they were.

    Attributes:
        name: of the tensor.
        first: its first row here.
        largest: the largest difference of one number.
        squares: sum of the squares of all differences.
        norm: sum of the squares of what it was.
    """

    name: str
    first: int
    largest: float
    squares: float
    norm: float

    @staticmethod
    def of(name: str, first: int, exact: Tensor, rounded: Tensor) -> TensorError:
        """Compare a tensor with what it has become, of the same shape."""
        before = exact.float()
        difference = rounded.float().sub_(before)
        # Squares of fp32 norms, not sums of squares: those of small weights would be subnormal.
        squares, norm = (float(tensor.norm().double().square()) for tensor in (difference, before))
        return TensorError(name, first, float(difference.abs().max()), squares, norm)

    @property
    def relative(self) -> float:
        """Root of the mean square of the differences, divided by that of the tensor; 0 of a tensor of zeros."""
        return math.sqrt(self.squares / self.norm) if self.norm else 0.0


def merged(parts: Iterable[TensorError], names: Iterable[str]) -> list[TensorError]:
    """One for every tensor, in the order of ``names``."""
    of_tensors = _grouped(sorted(parts), lambda name: name)
    found = []
    for name in names:
        if of_one := of_tensors.get(name):
            squares, norm = math.fsum(part.squares for part in of_one), math.fsum(part.norm for part in of_one)
            found.append(TensorError(name, 0, max(part.largest for part in of_one), squares, norm))
    return found


def summary(errors: Sequence[TensorError]) -> JsonObject:
    """The worst tensor, and the mean of every kind of tensor."""
    worst = max(errors, key=lambda error: error.relative)
    return {
        "tensors": len(errors),
        "worst": {"tensor": worst.name, "relative_rms": _short(worst.relative), "max": _short(worst.largest)},
        "relative_rms": {kind: _short(_mean(group)) for kind, group in _grouped(errors, _kind).items()},
    }


def markdown(errors: Sequence[TensorError]) -> str:
    """A table of kinds of tensors, and one of all tensors; experts of a projection share a line."""
    lines = [
        "# Quantization report",
        "",
        "Block-scaled FP8 (E4M3, one scale for 128 x 128 weights). RMS of the error, relative to that of the tensor;",
        "max: the largest error of one weight. Both compare the dequantized weights in bf16 with the source.",
    ]
    for title, key in (("Kinds", _kind), ("Tensors", _line)):
        lines += ["", f"## {title}", "", "| | tensors | mean RMS | worst RMS | max |", "|---|---:|---:|---:|---:|"]
        for name, group in _grouped(errors, key).items():
            figures = (_mean(group), max(e.relative for e in group), max(e.largest for e in group))
            lines.append(f"| {name} | {len(group)} | {' | '.join(f'{figure:.3e}' for figure in figures)} |")
    return "\n".join(lines) + "\n"


def _grouped(errors: Iterable[TensorError], key: Callable[[str], str]) -> dict[str, list[TensorError]]:
    found: dict[str, list[TensorError]] = {}
    for error in errors:
        found.setdefault(key(error.name), []).append(error)
    return found


def _kind(name: str) -> str:
    """Such as ``mlp.experts.*.up_proj``, in any layer.

    >>> _kind("model.layers.3.mlp.experts.7.up_proj.weight"), _kind("mtp.layers.0.self_attn.q_proj.weight")
    ('mlp.experts.*.up_proj', 'self_attn.q_proj')
    """
    return _LAYER.sub("", _line(name))


def _line(name: str) -> str:
    """A tensor without its ``.weight``, of an expert that of all experts."""
    return _EXPERT.sub("*", name).removesuffix(".weight")


def _mean(errors: Sequence[TensorError]) -> float:
    return math.fsum(error.relative for error in errors) / len(errors)


def _short(number: float) -> float:
    """Four digits, which do not depend on the order of sums."""
    return float(f"{number:.4g}")
