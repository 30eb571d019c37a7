"""Means over the tokens of samples that stream by, with standard errors."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Mean(NamedTuple):
    """A mean and its standard error, which one sample alone does not have."""

    value: float
    stderr: float | None


class SampleMeans:
    """Means of several figures over all tokens, in memory that does not grow with the samples.

    The independent units are samples: losses of tokens that follow one another are correlated, so an error computed
    over tokens would be too small. With y_i the sum of a figure over the n tokens of sample i, of N samples, the mean
    is m = sum(y_i) / (N n), and its standard error

        sqrt(N / (N - 1) * sum((y_i - n m)^2)) / (N n).

    That is the estimator of a ratio of totals (Cochran, Sampling Techniques, 3rd edition, section 2.11) for clusters of
    one size, without its correction for finite populations: samples stand for more text than they were drawn from. It
    is also the clustered standard error of Miller (arXiv:2411.00640, section 2.2), with N - 1 where that has N. The sum
    of squares is updated as samples come (Welford 1962), because a difference of two large sums would lose its digits.

    >>> means = SampleMeans()
    >>> means.add(torch.tensor([[[1.0, 3.0], [5.0, 7.0]]]))
    >>> means.result()
    [Mean(value=4.0, stderr=2.0)]
    """

    def __init__(self) -> None:
        """Of nothing yet."""
        self.samples = self.tokens = 0
        self.sums = self._means = self._squares = torch.zeros((), dtype=torch.float64)

    def add(self, figures: Tensor) -> None:
        """Add samples: [figures, samples, tokens], every sample with the same number of tokens, fp64."""
        self.tokens += figures.shape[1] * figures.shape[2]
        for total in figures.sum(-1).unbind(1):
            self.samples += 1
            self.sums = self.sums + total
            mean = total / figures.shape[2]
            before = mean - self._means
            self._means = self._means + before / self.samples
            self._squares = self._squares + before * (mean - self._means)

    def result(self) -> list[Mean]:
        """Mean and standard error of every figure."""
        return [Mean(*pair) for pair in zip((self.sums / self.tokens).tolist(), self._errors(), strict=True)]

    def _errors(self) -> list[float | None]:
        if self.samples < 2:
            return [None] * len(self.sums)
        return [math.sqrt(squares / (self.samples - 1) / self.samples) for squares in self._squares.tolist()]
