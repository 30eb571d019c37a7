"""The questions, and the arms that each compares: which cell, pruned how and trained how (data)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from benchmarks.findings.sizes import BASE, SIZES
from megatron_slim.distillation.terms import KD_LAMBDA, MTP_BETA

RANDOM = "random"
MTP_LM_ALONE = ("kd_mtp_lm", "kd_lm_mtp_lm")  # losses whose MTP block is trained on the text alone
FOUR = "four"  # the four terms of SlimQwen, equation 12, with its weights
KD_ALONE, WITHOUT_MTP = (f"{KD_LAMBDA.flag}-end", "1"), (f"{MTP_BETA.flag}-start", "0", f"{MTP_BETA.flag}-end", "0")
# Name of a loss -> its weights, as flags; `terms` has what no flag says. LM is without a teacher.
LOSSES: Mapping[str, tuple[str, ...]] = {
    FOUR: (),
    "lm": (),
    "kd": (*KD_ALONE, *WITHOUT_MTP),
    "kd_lm": WITHOUT_MTP,
    "kd_mtp_kd": KD_ALONE,
    "kd_mtp_lm": KD_ALONE,
    "kd_lm_mtp_lm": (),
    "four_teacher_main": ("--mtp-kd-target", "teacher-main"),
}
ALL_AXES = ("num_layers", "hidden_size", "num_moe_experts", "moe_router_topk")
EXPERT_AXES, DEPTH_AXES = ALL_AXES[2:], ALL_AXES[:1]


@dataclass(frozen=True)
class Pruning:
    """What becomes of the teacher.

    Attributes:
        axes: sizes of the target that it takes, of those of `Size.student`.
        sections: of the recipe, besides the target.
        budgets: an elastic student in place of one size.
        slice: the budget of that elastic student that is cut out; "" for none.
    """

    axes: tuple[str, ...] = ALL_AXES
    sections: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    budgets: bool = False
    slice: str = ""


@dataclass(frozen=True)
class Cell:
    """One training run and what is measured after it; with a seed it is a step.

    Attributes:
        name: unique.
        pruning: name of what it starts from in `PRUNINGS`, or `RANDOM` for the sizes of `FIRST` with random weights.
        loss: one of `LOSSES`.
        size: one of `SIZES`.
        optimizer: as ``--optimizer``.
        lr: highest learning rate; None for that of the settings.
        first_phase: axes of a first phase that go halfway; () for one phase.
        carried: whether the second phase begins with the moments of the first.
        elastic: all budgets in every step.
        acceptance: whether that is measured.
    """

    name: str
    pruning: str
    loss: str = FOUR
    size: str = BASE
    optimizer: str = "adam"
    lr: float | None = None
    first_phase: tuple[str, ...] = ()
    carried: bool = False
    elastic: bool = False
    acceptance: bool = True


def _experts(method: str, importance: str) -> dict[str, dict[str, Any]]:
    if method == "aligned":
        return {"experts": {"method": "merge", "importance": importance, "align": "weights"}}
    return {"experts": {"method": method, "importance": importance}}


FIRST = "partial_preservation"  # the paper's, of all axes, by soft logits
IMPORTANCES = ("soft_logits", "frequency", "reap")
METHODS = ("prune", "merge", FIRST, "aligned")
DEPTHS = ("last", "adjacent_cosine", "block_influence")
PRUNINGS: dict[str, Pruning] = {
    FIRST: Pruning(sections=_experts(FIRST, IMPORTANCES[0])),
    **{
        f"experts_{method}_{importance}": Pruning(EXPERT_AXES, _experts(method, importance))
        for importance in IMPORTANCES
        for method in METHODS
    },
    **{f"depth_{method}": Pruning(DEPTH_AXES, {"depth": {"method": method}}) for method in DEPTHS},
    "experts_by_loss": Pruning(
        EXPERT_AXES, {"experts": {"method": FIRST, "importance": IMPORTANCES[0], "allocation": "loss"}}
    ),
    "elastic": Pruning(budgets=True),
    **{f"slice_{name}": Pruning(budgets=True, slice=name) for name in SIZES[BASE].budgets},
}

MAIN = "pruned_four"
_PHASES = {
    "depth_first": DEPTH_AXES,
    "width_first": ALL_AXES[1:],
    "joint": ALL_AXES,
}
_RATES = {"adam": (2e-3,), "muon": (5e-3, 1e-2), "aurora": (5e-3, 1e-2)}
_CELLS = (
    Cell(MAIN, FIRST),
    Cell("pruned_lm", FIRST, "lm"),
    Cell("random_four", RANDOM),
    Cell("random_lm", RANDOM, "lm"),
    *(Cell(name, name) for name in PRUNINGS if name.startswith("experts_")),
    *(Cell(f"pruned_{loss}", FIRST, loss) for loss in LOSSES if loss not in (FOUR, "lm")),
    *(
        Cell(f"{name}_{'carried' if carried else 'reset'}", FIRST, first_phase=axes, carried=carried)
        for name, axes in _PHASES.items()
        for carried in (True, False)
    ),
    *(Cell(f"depth_{method}", f"depth_{method}") for method in DEPTHS),
    *(
        Cell(f"{optimizer}_{rate:g}", FIRST, optimizer=optimizer, lr=rate)
        for optimizer, rates in _RATES.items()
        for rate in rates
    ),
    Cell("elastic", "elastic", elastic=True, acceptance=False),
    *(Cell(name, name, acceptance=False) for name in PRUNINGS if name.startswith("slice_")),
    *(
        Cell(f"{name}_{size}", pruning, loss, size)
        for size in SIZES
        if size != BASE
        for name, pruning, loss in ((MAIN, FIRST, FOUR), ("random_four", RANDOM, FOUR), ("pruned_kd", FIRST, "kd"))
    ),
)
CELLS: dict[str, Cell] = {cell.name: cell for cell in _CELLS}


@dataclass(frozen=True)
class Arm:
    """One side of a comparison.

    Attributes:
        label: for people.
        cell: whose figures.
        part: of an elastic cell, the budget.
    """

    label: str
    cell: str
    part: str = ""


@dataclass(frozen=True)
class Question:
    """What is asked, and of what.

    Attributes:
        key: a letter.
        title: for people.
        arms: what is compared.
        metrics: shown, the first in the picture.
    """

    key: str
    title: str
    arms: tuple[Arm, ...]
    metrics: tuple[str, ...]


def _sized(name: str, size: str) -> str:
    return name if size == BASE else f"{name}_{size}"


_LOSS, _ACC = ("loss", "kl", "top1_agreement", "mtp_loss"), tuple(f"acc_{k}" for k in range(5))
_ONE_SHOT = ("loss", "kl", "one_shot_loss", "one_shot_kl")
QUESTIONS: dict[str, Question] = {
    question.key: question
    for question in (
        Question(
            "a",
            "Initialisation and distillation",
            (
                Arm("pruned, four losses", MAIN),
                Arm("pruned, LM", "pruned_lm"),
                Arm("random, four losses", "random_four"),
                Arm("random, LM", "random_lm"),
            ),
            (*_LOSS, "mean_accepted_length"),
        ),
        Question(
            "b",
            "Importance and merging of experts",
            tuple(
                Arm(f"{method.replace('_', ' ')}, {importance.replace('_', ' ')}", f"experts_{method}_{importance}")
                for importance in IMPORTANCES
                for method in METHODS
            ),
            _ONE_SHOT,
        ),
        Question(
            "c",
            "Losses and acceptance of MTP drafts",
            (
                Arm("KD", "pruned_kd"),
                Arm("KD, LM", "pruned_kd_lm"),
                Arm("KD, MTP-KD", "pruned_kd_mtp_kd"),
                Arm("KD, MTP-LM", "pruned_kd_mtp_lm"),
                Arm("KD, LM, MTP-LM", "pruned_kd_lm_mtp_lm"),
                Arm("four losses", MAIN),
                Arm("four losses, teacher's main head", "pruned_four_teacher_main"),
            ),
            ("mean_accepted_length", "loss", "kl", "mtp_loss", *_ACC),
        ),
        Question(
            "d",
            "Progressive schedules and moments",
            (
                Arm("one stage", MAIN),
                *(
                    Arm(f"{name.replace('_', '-')}, moments {moments}", f"{name}_{moments}")
                    for name in _PHASES
                    for moments in ("carried", "reset")
                ),
            ),
            _LOSS,
        ),
        Question(
            "e",
            "Layers to remove",
            tuple(Arm(method.replace("_", " "), f"depth_{method}") for method in DEPTHS),
            _ONE_SHOT,
        ),
        Question(
            "f",
            "Expert budgets of layers",
            (
                Arm("uniform", f"experts_{FIRST}_{IMPORTANCES[0]}"),
                Arm("by loss", "experts_by_loss"),
            ),
            _ONE_SHOT,
        ),
        Question(
            "g",
            "Optimizers",
            (
                Arm("Adam, 0.001", MAIN),
                *(
                    Arm(f"{optimizer.title()}, {rate:g}", f"{optimizer}_{rate:g}")
                    for optimizer, rates in _RATES.items()
                    for rate in rates
                ),
            ),
            (*_LOSS, "mean_accepted_length"),
        ),
        Question(
            "h",
            "Elastic or separate",
            tuple(
                arm
                for name in SIZES[BASE].budgets
                for arm in (Arm(f"{name}, elastic", "elastic", name), Arm(f"{name}, separate", f"slice_{name}"))
            ),
            _LOSS,
        ),
        Question(
            "s",
            "Sizes of the teacher",
            tuple(
                Arm(f"{size}, {label}", _sized(name, size))
                for size in SIZES
                for label, name in (
                    ("pruned, four losses", MAIN),
                    ("random, four losses", "random_four"),
                    ("pruned, KD", "pruned_kd"),
                )
            ),
            ("loss", "kl", "mean_accepted_length"),
        ),
    )
}


def cells_of(keys: str | tuple[str, ...]) -> Iterator[Cell]:
    """The cells of questions, each once, in order."""
    yield from {arm.cell: CELLS[arm.cell] for key in keys for arm in QUESTIONS[key].arms}.values()
