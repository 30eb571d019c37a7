"""Means over the tokens of samples that stream by, with standard errors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Mean(NamedTuple):
    """A mean and its standard error, which one sample alone does not have."""

    value: float
    stderr: float | None


class SampleMeans:
    """Means of several figures over all tokens.

    The independent units are samples: losses of tokens that follow one another are correlated, so an error computed
    over tokens would be too small. With y_i the sum of a figure over the n_i tokens of sample i, of N samples, the mean
    is m = sum(y_i) / sum(n_i), and its standard error

        sqrt(N / (N - 1) * sum((y_i - n_i m)^2)) / sum(n_i).

    That is the estimator of a ratio of totals (Cochran, Sampling Techniques, 3rd edition, section 2.11), without its
    correction for finite populations: samples stand for more text than they were drawn from. It is also the clustered
    standard error of Miller (arXiv:2411.00640, section 2.2), with N - 1 where that has N. The sums of every sample are
    kept, some numbers for thousands of tokens. A difference of two large sums of squares would lose its digits.

    >>> means = SampleMeans()
    >>> means.add(torch.tensor([[1.0, 3.0, 5.0, 7.0]]), [2, 2])
    >>> means.result()
    [Mean(value=4.0, stderr=2.0)]
    """

    def __init__(self) -> None:
        """Of nothing yet."""
        self._sums = list[Tensor]()
        self._counts = list[int]()

    def add(self, figures: Tensor, counts: Sequence[int]) -> None:
        """Add samples: fp64 [figures, tokens], those of one sample after those of another, and how many each has."""
        self._sums += [part.sum(1) for part in figures.split(list(counts), dim=1)]
        self._counts += counts

    @property
    def sums(self) -> Tensor:
        """Of every figure over all tokens."""
        return torch.stack(self._sums).sum(0)

    def result(self) -> list[Mean]:
        """Mean and standard error of every figure."""
        means = self.sums / sum(self._counts)
        return [Mean(*pair) for pair in zip(means.tolist(), self._errors(means), strict=True)]

    def _errors(self, means: Tensor) -> list[float | None]:
        samples, counts = len(self._counts), torch.tensor(self._counts, dtype=torch.float64)
        if samples < 2:
            return [None] * len(means)
        residuals = torch.stack(self._sums) - counts[:, None] * means
        variances = residuals.square().sum(0) * (samples / (samples - 1))
        errors: list[float | None] = (variances.sqrt() / counts.sum()).tolist()
        return errors
