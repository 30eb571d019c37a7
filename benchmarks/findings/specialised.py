"""Whether a teacher's experts are specialised: what the choice of an expert says of the kind of text, in nats.

Validation text of each kind is taken in groups. Of every group the routers' frequencies are counted. The mutual
information of expert and kind, the mean over layers, is compared with that under shuffled kinds of the groups, which
is what chance and the size of a group give.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

GROUPS = 8  # of each kind
SHUFFLES = 200
Array = npt.NDArray[np.float64]


def information(shares: Array, kinds: npt.NDArray[np.int64]) -> Array:
    """Mutual information of expert and kind in every layer, all kinds equally frequent, in nats.

    Args:
        shares: of the choices, [groups, layers, experts], which sum to 1 over experts.
        kinds: of each group, from 0.

    Returns:
        [layers].
    """
    given = np.stack([shares[kinds == kind].mean(axis=0) for kind in np.unique(kinds)])
    alone = given.mean(axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = np.where(given > 0, given * np.log(given / alone), 0.0)
    return np.asarray(terms.sum(axis=2).mean(axis=0))


def entropy(shares: Array) -> float:
    """Of the choice of an expert, mean over layers, as a part of that of an even choice.

    Args:
        shares: [layers, experts].
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = np.where(shares > 0, -shares * np.log(shares), 0.0)
    return float(terms.sum(axis=1).mean() / np.log(shares.shape[1]))


def specialisation(shares: Array, kinds: npt.NDArray[np.int64], seed: int = 0) -> dict[str, float]:
    """Information of the kinds, and of kinds that are shuffled over groups.

    Args:
        shares: as of `information`.
        kinds: likewise.
        seed: of the shuffles.

    Returns:
        ``expert_information``, the shuffled mean and highest, and ``expert_p_value``: the share of all orders of the
        kinds, the true one among them, that say as much.
    """
    rng = np.random.default_rng(seed)
    found = float(information(shares, kinds).mean())
    shuffled = [float(information(shares, rng.permutation(kinds)).mean()) for _ in range(SHUFFLES)]
    return {
        "expert_information": found,
        "expert_information_shuffled": float(np.mean(shuffled)),
        "expert_information_shuffled_highest": max(shuffled),
        "expert_p_value": (1 + sum(each >= found for each in shuffled)) / (1 + SHUFFLES),
    }


def measure(teacher: str, text: str) -> dict[str, Any]:
    """`specialisation` of a checkpoint's experts, and the entropy of its routers by kind of text.

    Args:
        teacher: the checkpoint.
        text: directory of ``validation-KIND.npy``.
    """
    from benchmarks.findings.commands import TEXTS
    from megatron_slim.checkpoint.convert import open_checkpoint
    from megatron_slim.pruning.calibrate import calibrate
    from megatron_slim.pruning.statistics import importance_key

    source = open_checkpoint(Path(teacher))
    blocks = [f"model.layers.{layer}" for layer in range(source.shape.num_layers)]
    shares, kinds = list[Array](), list[int]()
    for number, kind in enumerate(TEXTS):
        windows = np.load(Path(text) / f"validation-{kind}.npy")
        for group in np.array_split(windows, min(GROUPS, len(windows))):
            stats = calibrate(source, group, micro_batch_size=len(group))
            counted = np.stack([stats.tensors[importance_key(block, "frequency")] for block in blocks])
            shares.append(np.asarray(counted / counted.sum(axis=1, keepdims=True), dtype=np.float64))
            kinds.append(number)
    found, labels = np.stack(shares), np.asarray(kinds)
    results = specialisation(found, labels)
    for number, kind in enumerate(TEXTS):
        results[f"routing_entropy_{kind}"] = entropy(found[labels == number].mean(axis=0))
    return results
