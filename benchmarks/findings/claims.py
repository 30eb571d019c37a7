"""What the paper claims, with its numbers, and which two arms of which question are compared for it (data)."""

from __future__ import annotations

from dataclasses import dataclass

ABOVE, BELOW, SAME = "above", "below", "same"


@dataclass(frozen=True)
class Claim:
    """One sentence that may hold here or not.

    Attributes:
        question: its letter.
        text: the sentence.
        paper: its numbers there; "" where the paper has none.
        metric: what is compared here.
        first: label of an arm of the question.
        relation: of the first arm to the second: `ABOVE`, `BELOW` or `SAME`.
        second: label of the other.
    """

    question: str
    text: str
    paper: str
    metric: str
    first: str
    relation: str
    second: str


_KEEP = "partial preservation"
_MMLU = "MMLU"
CLAIMS = (
    Claim(
        "a",
        "A pruned student is better than a random one, both distilled",
        "73.45 against 61.66 (mean of 8 benchmarks)",
        "loss",
        "pruned, four losses",
        BELOW,
        "random, four losses",
    ),
    Claim(
        "a",
        "Distillation is better than LM training after pruning",
        "73.45 against 69.96 (mean of 8 benchmarks)",
        "loss",
        "pruned, four losses",
        BELOW,
        "pruned, LM",
    ),
    Claim(
        "a",
        "Distillation is better than LM training from random weights",
        "",
        "loss",
        "random, four losses",
        BELOW,
        "random, LM",
    ),
    *(
        Claim(
            "b",
            f"{label.capitalize()} is the same as {_KEEP} after training",
            "all within 1 to 3 points",
            "loss",
            f"{label}, soft logits",
            SAME,
            f"{_KEEP}, soft logits",
        )
        for label in ("prune", "merge", "aligned")
    ),
    *(
        Claim(
            "b",
            f"Importance by {importance} is the same as by soft logits after training",
            "all within 1 to 3 points",
            "loss",
            f"{_KEEP}, {importance}",
            SAME,
            f"{_KEEP}, soft logits",
        )
        for importance in ("frequency", "reap")
    ),
    Claim(
        "b",
        "Partial preservation is better than merging all after training",
        "44.05 against 42.62 (MMLU-Pro)",
        "loss",
        f"{_KEEP}, soft logits",
        BELOW,
        "merge, soft logits",
    ),
    Claim(
        "b",
        "Partial preservation is better than pruning in one shot",
        "",
        "one_shot_loss",
        f"{_KEEP}, soft logits",
        BELOW,
        "prune, soft logits",
    ),
    Claim(
        "b",
        "Aligned merging is better than merging in one shot",
        "",
        "one_shot_loss",
        "aligned, soft logits",
        BELOW,
        "merge, soft logits",
    ),
    Claim("c", "LM with KD is better than KD alone", f"74.93 against 74.16 ({_MMLU})", "loss", "KD, LM", BELOW, "KD"),
    Claim(
        "c",
        "MTP-KD with KD is better than KD alone",
        f"75.13 against 74.16 ({_MMLU})",
        "loss",
        "KD, MTP-KD",
        BELOW,
        "KD",
    ),
    Claim(
        "c",
        "All four losses are better than KD alone",
        f"75.67 against 74.16 ({_MMLU})",
        "loss",
        "four losses",
        BELOW,
        "KD",
    ),
    Claim(
        "c",
        "KD, LM and MTP-LM are better than KD alone",
        f"75.29 against 74.16 ({_MMLU})",
        "loss",
        "KD, LM, MTP-LM",
        BELOW,
        "KD",
    ),
    Claim(
        "c",
        "MTP-KD accepts the first draft as often as MTP-LM",
        "95.50 against 95.90 % (acc_0)",
        "acc_0",
        "KD, MTP-KD",
        SAME,
        "KD, MTP-LM",
    ),
    *(
        Claim(
            "c",
            f"MTP-KD accepts {k + 1} drafts more often than MTP-LM",
            f"{ours} against {theirs} % (acc_{k})",
            f"acc_{k}",
            "KD, MTP-KD",
            ABOVE,
            "KD, MTP-LM",
        )
        for k, ours, theirs in (
            (1, "75.18", "57.62"),
            (2, "45.67", "23.64"),
            (3, "22.43", "8.02"),
            (4, "10.37", "2.37"),
        )
    ),
    Claim(
        "c",
        "The teacher's own MTP head gives longer drafts than its main head",
        "",
        "mean_accepted_length",
        "four losses",
        ABOVE,
        "four losses, teacher's main head",
    ),
    *(
        Claim(
            "d",
            f"{name.capitalize()} is better than one stage",
            f"{theirs} against 75.86 ({_MMLU})",
            "loss",
            f"{name}, moments reset",
            BELOW,
            "one stage",
        )
        for name, theirs in (("depth-first", "77.39"), ("width-first", "77.14"), ("joint", "76.30"))
    ),
    *(
        Claim(
            "d",
            f"Carried moments are better than reset ones, {name}",
            "",
            "loss",
            f"{name}, moments carried",
            BELOW,
            f"{name}, moments reset",
        )
        for name in ("depth-first", "width-first", "joint")
    ),
    Claim(
        "e",
        "The last layers are the ones to remove in one shot, compared with similar ones",
        f"73.86 against 41.95 ({_MMLU})",
        "one_shot_loss",
        "last",
        BELOW,
        "adjacent cosine",
    ),
    Claim(
        "e",
        "The last layers are the ones to remove after training, compared with similar ones",
        "",
        "loss",
        "last",
        BELOW,
        "adjacent cosine",
    ),
    Claim(
        "e",
        "The last layers are the ones to remove after training, compared with block influence",
        "",
        "loss",
        "last",
        BELOW,
        "block influence",
    ),
    Claim(
        "f",
        "Budgets by loss are better than uniform ones in one shot",
        "",
        "one_shot_loss",
        "by loss",
        BELOW,
        "uniform",
    ),
    Claim("f", "Budgets by loss are better than uniform ones after training", "", "loss", "by loss", BELOW, "uniform"),
    # Each of both rates, with Adam at the better of its own two: all that were tried are here.
    Claim("g", "Muon at 0.005 is better than Adam at 0.002", "", "loss", "Muon, 0.005", BELOW, "Adam, 0.002"),
    Claim("g", "Muon at 0.01 is better than Adam at 0.002", "", "loss", "Muon, 0.01", BELOW, "Adam, 0.002"),
    Claim("g", "Aurora at 0.005 is better than Adam at 0.002", "", "loss", "Aurora, 0.005", BELOW, "Adam, 0.002"),
    Claim("g", "Aurora at 0.01 is better than Adam at 0.002", "", "loss", "Aurora, 0.01", BELOW, "Adam, 0.002"),
    *(
        Claim(
            "h",
            f"The {name} budget of an elastic student is as good as one trained alone",
            "",
            "loss",
            f"{name}, elastic",
            SAME,
            f"{name}, separate",
        )
        for name in ("large", "middle", "small")
    ),
    *(
        Claim(
            "s",
            f"A pruned student is better than a random one, {size} teacher",
            "73.45 against 61.66 (mean of 8 benchmarks)" if size == "base" else "",
            "loss",
            f"{size}, pruned, four losses",
            BELOW,
            f"{size}, random, four losses",
        )
        for size in ("small", "base", "large")
    ),
    *(
        Claim(
            "s",
            f"MTP losses give longer drafts than KD alone, {size} teacher",
            "",
            "mean_accepted_length",
            f"{size}, pruned, four losses",
            ABOVE,
            f"{size}, pruned, KD",
        )
        for size in ("small", "base", "large")
    ),
)
