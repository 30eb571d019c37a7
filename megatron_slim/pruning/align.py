"""Matching the hidden neurons of experts before they are averaged.

The order of an expert's hidden neurons means nothing: rows of gate and up and columns of down may be permuted together
and the expert computes what it did. Two experts that compute the same thing hold it in different orders,
and the mean of neurons that have nothing to do with one another is neither. So each member of a group is permuted to
match its base first (Git Re-Basin's weight matching, arXiv 2209.04836, of one layer): the assignment of its neurons to
the base's that maximises the sum of their inner products over gate, up and down together, which is also the one whose
squared distance to the base is least.

Legend: F hidden neurons, K those of the base that survive, C weights of a neuron (three times the hidden size).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from megatron_slim.pruning.experts import ExpertGroup

Neurons = npt.NDArray[np.int64]
FLOAT64_BITS = 53


def matching_neurons(base_KC: Tensor, member_FC: Tensor) -> Neurons:
    """For every neuron of the base, the neuron of the member that it is averaged with.

    The same answer everywhere: the inner products are exact (`fixed_point`), so no number of threads and no library's
    order of summation can tip a choice, and the solver is sequential.

    Args:
        base_KC: weights of the base's neurons, K of them.
        member_FC: weights of all neurons of the member, F >= K.

    Returns:
        [K] neurons of the member, each at most once.

    >>> member = torch.tensor([[3.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    >>> matching_neurons(member[[2, 0, 1]], member).tolist()
    [2, 0, 1]
    """
    from scipy.optimize import linear_sum_assignment  # only pruning that aligns waits for this import

    scores_KF = fixed_point(base_KC) @ fixed_point(member_FC).T
    neurons: Neurons = linear_sum_assignment(scores_KF.numpy(), maximize=True)[1]
    return neurons


def fixed_point(weights_FC: Tensor) -> Tensor:
    """Weights as whole numbers of one unit, few enough bits that float64 holds every sum of C products exactly.

    The unit is the largest weight's power of two by 2^-b, b = 20 for the 6144 weights of a neuron at hidden size 2048:
    finer than bf16 (8 bits) for all weights within 1/4096 of the largest. A factor on one expert does not change which
    assignment is best. NaN and infinity, which a caller may have allowed, count as 0.

    >>> fixed_point(torch.tensor([[0.75, -0.5]])).tolist()  # b = 25
    [[25165824.0, -16777216.0]]
    """
    wide = torch.nan_to_num(weights_FC.double(), nan=0.0, posinf=0.0, neginf=0.0)
    bits = (FLOAT64_BITS - wide.shape[1].bit_length()) // 2
    largest = float(wide.abs().max())
    return torch.ldexp(wide, torch.tensor(bits - math.frexp(largest)[1])).round_()


class Alignment:
    """The matching neurons of all groups, found when first asked for and remembered: 4 bytes per neuron of a member.

    Gate, up and down of one expert are separate requests, far apart in a stream. Several threads may ask: two that ask
    for the same at the same time both find the same.
    """

    def __init__(self, read_neurons: Callable[[str, int, Neurons | None], Tensor]) -> None:
        """Nothing is read yet.

        Args:
            read_neurons: ``read_neurons(block, expert, neurons)`` gives the weights of some neurons of an expert of
                the source, None for all: [neurons, C].
        """
        self._read = read_neurons
        self._found: dict[tuple[str, int], dict[int, npt.NDArray[np.int32]]] = {}

    def neurons(self, block: str, group: ExpertGroup, member: int, kept: Neurons | None) -> Neurons | None:
        """Neurons of a member in the order of the base's; None for all as they are.

        Args:
            block: the group's block in the source.
            group: what is averaged.
            member: one of its members.
            kept: neurons of the base that survive, None for all.
        """
        if member == group.base:
            return kept
        if (block, group.base) not in self._found:
            base_KC = self._read(block, group.base, kept)
            others = [other for other in group.members if other != group.base]
            matches = {other: matching_neurons(base_KC, self._read(block, other, None)) for other in others}
            self._found[block, group.base] = {other: found.astype(np.int32) for other, found in matches.items()}
        return self._found[block, group.base][member].astype(np.int64)
