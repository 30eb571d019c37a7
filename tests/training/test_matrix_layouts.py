"""Muon and Aurora in training: the same run under every layout, resumed in any, and stopped where it should be."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import megatron_slim.mcore

import pytest
import torch

from megatron_slim.checkpoint.convert import open_checkpoint
from megatron_slim.checkpoint.iterations import iteration_directory
from megatron_slim.checkpoint.optimizer_state import open_optimizer_state
from megatron_slim.errors import SlimError
from megatron_slim.testing import run_distributed, tiny_shape
from megatron_slim.training import matrix_optimizer
from tests.training.conftest import Workplace, assert_same_run, read_scalars, refusal, train

TP2 = "--tensor-model-parallel-size 2 --sequence-parallel"
EP2, ETP1 = "--expert-model-parallel-size 2", "--expert-tensor-parallel-size 1"
PP2 = "--pipeline-model-parallel-size 2"
# Ranks and flags; micro-batch size times data-parallel size is four, of a batch of eight.
LAYOUTS = {
    "one": (1, "--micro-batch-size 4"),
    "tp2": (2, f"{TP2} --micro-batch-size 4"),
    "tp2-ep2": (2, f"{TP2} {EP2} {ETP1} --micro-batch-size 4"),
    "pp2": (2, f"{PP2} --micro-batch-size 4"),
    "vpp2": (2, f"{PP2} --num-virtual-stages-per-pipeline-rank 2 --micro-batch-size 4"),
    "dp2": (2, "--micro-batch-size 2"),
    "ep2": (2, f"{EP2} --micro-batch-size 2"),
    "cp2": (2, "--context-parallel-size 2 --micro-batch-size 4"),
    "tp2-pp2-ep2": (4, f"{TP2} {PP2} {EP2} {ETP1} --micro-batch-size 4"),
}
QUICK = ("tp2", "vpp2", "ep2")
# Rates at which five steps move the loss by a tenth. Gradients near zero are AdamW's amplifier, hence its epsilon.
RATES = "--global-batch-size 8 --lr 0.01 --min-lr 0.001 --adam-eps 1e-3".split()
SHARDED = "--use-distributed-optimizer"
RESHARDABLE = "--dist-ckpt-optim-fully-reshardable"
LM, KD, MTP_LM, MTP_KD = "lm loss", "logits distillation loss", "mtp lm loss", "mtp distillation loss"
TERMS = (LM, KD, MTP_LM, MTP_KD)
Logged = dict[str, list[float]]


def argv(workplace: Workplace, name: str, optimizer: str, *flags: str) -> list[str]:
    """Without shards of the optimizer, which other tests have, unless these flags ask for them."""
    words = workplace.argv(name, "--optimizer", optimizer, *RATES, *flags)
    first = words.index(SHARDED)
    return words[:first] + words[first + 1 :]


def run(workplace: Workplace, layout: str, optimizer: str, *flags: str, name: str = "") -> Logged:
    """Train in a layout; what tensorboard got."""
    ranks, words = LAYOUTS[layout]
    name = name or "-".join((optimizer, layout, *(flag.strip("-") for flag in flags)))
    given = argv(workplace, name, optimizer, *words.split(), *flags)
    run_distributed(ranks, train, given, str(workplace.new_log(name)), initialise=False)
    return read_scalars(workplace.root / "tensorboard" / name)


def cases(names: Iterable[str], quick: tuple[str, ...] = ()) -> list[object]:
    return [pytest.param(name, marks=() if name in quick else pytest.mark.slow) for name in names]


@pytest.fixture(scope="module")
def one(workplace: Workplace) -> dict[str, Logged]:
    return {name: run(workplace, "one", name) for name in ("muon", "aurora")}


@pytest.mark.one_case
@pytest.mark.parametrize("layout", cases([name for name in LAYOUTS if name != "one"], QUICK))
@pytest.mark.parametrize("optimizer", ["muon", "aurora"])
def test_every_layout_trains_the_same(
    workplace: Workplace, one: dict[str, Logged], optimizer: str, layout: str
) -> None:
    """Each loss of five steps within 1e-5: sums in another order. Megatron's Muon is off by 3e-3 after one step."""
    assert_same_run(run(workplace, layout, optimizer), one[optimizer], TERMS)


def test_they_are_three_optimizers(workplace: Workplace, one: dict[str, Logged]) -> None:
    """Which all train: of every one the loss falls, and each to another value."""
    ends = [one[name][LM] for name in ("muon", "aurora")] + [run(workplace, "one", "adam", "--lr", "1e-3")[LM]]
    assert all(losses[-1] < losses[0] - 0.1 for losses in ends)
    assert len({round(losses[-1], 3) for losses in ends}) == 3


@pytest.mark.slow
@pytest.mark.parametrize("flags", [(), ("--overlap-grad-reduce", "--overlap-param-gather")], ids=["", "overlapped"])
def test_shards_of_the_optimizer_change_nothing(workplace: Workplace, flags: tuple[str, ...]) -> None:
    """In bf16, whole parameters on each of two ranks: digit for digit the run without."""
    plain, sharded = (run(workplace, "dp2", "aurora", "--bf16", *words) for words in ((), (SHARDED, *flags)))
    assert [sharded[term] for term in TERMS] == [plain[term] for term in TERMS]
    assert sharded["grad-norm"] == pytest.approx(plain["grad-norm"], rel=1e-6)  # summed in another order


def interrupted(workplace: Workplace, layout: str, save: Path, *flags: str) -> Path:
    """A run that ended after three of its steps."""
    run(
        workplace,
        layout,
        "aurora",
        "--save",
        str(save),
        "--save-interval",
        "3",
        "--exit-interval",
        "3",
        *flags,
        name=save.name,
    )
    return save


def resumed(workplace: Workplace, layout: str, save: Path, *flags: str) -> Logged:
    name = f"{save.name}-resumed-{layout}"
    return run(workplace, layout, "aurora", "--load", str(save), *flags, name=name)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "flags"),
    [("one", ()), ("dp2", ("--bf16", SHARDED))],
    ids=["fp32", "bf16-sharded"],
)
def test_it_resumes_bit_for_bit(workplace: Workplace, tmp_path: Path, layout: str, flags: tuple[str, ...]) -> None:
    whole = run(workplace, layout, "aurora", *flags)
    found = resumed(workplace, layout, interrupted(workplace, layout, tmp_path / f"cut-{layout}", *flags), *flags)
    assert [found[term] for term in (*TERMS, "grad-norm")] == [whole[term][3:] for term in (*TERMS, "grad-norm")]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "after"), [("one", "ep2"), ("ep2", "one"), ("tp2", "pp2"), ("pp2", "tp2-ep2"), ("ep2", "vpp2")]
)
def test_it_resumes_in_another_layout(
    workplace: Workplace, one: dict[str, Logged], tmp_path: Path, before: str, after: str
) -> None:
    """One optimizer has all matrices with expert parallel size 1, two above."""
    found = resumed(workplace, after, interrupted(workplace, before, tmp_path / f"{before}-{after}"))
    for term in TERMS:
        assert found[term] == pytest.approx(one["aurora"][term][3:], rel=1e-5), term


@pytest.mark.slow
def test_shards_resume_in_another_layout(workplace: Workplace, tmp_path: Path) -> None:
    """Where they were saved for it; else all ranks leave with one line. Rounding of bf16 differs with layouts."""
    flags = ("--bf16", SHARDED)
    whole = run(workplace, "dp2", "aurora", *flags)
    save = interrupted(workplace, "dp2", tmp_path / "shards", *flags, RESHARDABLE)
    copy = shutil.copytree(save, tmp_path / "shards-copy")
    for layout, where in (("ep2", save), ("pp2", copy)):
        found = resumed(workplace, layout, where, *flags, RESHARDABLE)
        assert found[LM] == pytest.approx(whole[LM][3:], rel=2e-3)
    bound = interrupted(workplace, "dp2", tmp_path / "bound", *flags)
    ranks, words = LAYOUTS["ep2"]
    given = argv(workplace, "bound-ep2", "aurora", *words.split(), *flags, "--load", str(bound))
    (error, other) = run_distributed(ranks, refusal, given, str(tmp_path / "log"), initialise=False)
    assert error == other and "saved with expert parallel size 1, not 2" in error


REFUSED = {
    "--use-distributed-optimizer": "does not go with --use-distributed-optimizer",
    "--fp16": "does not go with --fp16",
    "--muon-tp-mode blockwise": "does not take --muon-tp-mode: every matrix is gathered whole",
    "--muon-num-ns-steps 0": "--muon-num-ns-steps 0 is not positive",
    "--aurora-beta 0.4": "--aurora-beta goes with --optimizer aurora alone",
    "--adamw-lr -1": "--adamw-lr -1 is not positive",
    "--decoupled-lr 1e-3": "does not take --decoupled-lr: give --adamw-lr",
    "--muon-coefficient-type x": "--muon-coefficient-type x is not one of simple",
    "--optimizer lion": "--optimizer lion was not tried on recovery: give adam, muon, aurora",
    "--optimizer adam --optimizer-idle step": "--optimizer-idle goes with --optimizer muon or aurora alone",
    "--carry-optimizer": "--carry-optimizer does not go with --optimizer muon, whose momentum is new again",
}


def refusals(lines: list[list[str]], log: str) -> list[str]:
    """Body of one rank."""
    return [refusal(line, log) for line in lines]


def test_what_does_not_go_with_matrices_is_refused(workplace: Workplace, tmp_path: Path) -> None:
    lines = [argv(workplace, "refused", "muon", "--micro-batch-size", "2", *words.split()) for words in REFUSED]
    (found,) = run_distributed(1, refusals, lines, str(tmp_path / "log"), initialise=False)
    assert [(words, error) for words, error in zip(REFUSED, found, strict=True) if REFUSED[words] not in error] == []


def test_more_ranks_than_groups_of_keys_are_refused(workplace: Workplace, tmp_path: Path) -> None:
    """Two groups of keys and values on four tensor-parallel ranks, each of which has half a matrix."""
    flags = "--tensor-model-parallel-size 4 --sequence-parallel --micro-batch-size 2"
    found = run_distributed(
        4, refusal, argv(workplace, "groups", "aurora", *flags.split()), str(tmp_path / "log"), initialise=False
    )
    assert len(set(found)) == 1 and "needs a tensor parallel size that divides num_query_groups 2" in found[0]


def without_package(line: list[str], log: str) -> str:
    """Body of one rank, where nothing is found."""
    from megatron_slim import extras
    from megatron_slim.training import optimizer_flags

    for module in (extras, optimizer_flags):
        module.importlib.util.find_spec = lambda name: None  # type: ignore[attr-defined]
    return refusal(line, log)


def test_without_the_package_one_line_names_the_extra(workplace: Workplace, tmp_path: Path) -> None:
    line = argv(workplace, "missing", "muon", "--micro-batch-size", "2")
    (found,) = run_distributed(1, without_package, line, str(tmp_path / "log"), initialise=False)
    wanted = (
        "--optimizer muon needs emerging_optimizers, which is not installed; pip install 'megatron_slim[optimizers]'"
    )
    assert wanted in found


def broken(line: list[str], log: str) -> str:
    """Body of one rank: in the third step the update of one matrix is not finite, on the first rank."""
    aurora, step, done = matrix_optimizer.aurora, matrix_optimizer.MatrixOptimizer.step, [0]

    def changed(*settings: Any) -> matrix_optimizer.Update:
        update = aurora(*settings)

        def with_nan(stack: torch.Tensor) -> torch.Tensor:
            found = update(stack)
            if done[0] == 3 and torch.distributed.get_rank() == 0 and stack.shape[-2:] == (48, 32):
                found[0, 0, 0] = torch.nan
            return found

        return with_nan

    def counted(self: matrix_optimizer.MatrixOptimizer) -> None:
        done[0] += 1
        step(self)

    matrix_optimizer.aurora = changed
    matrix_optimizer.MatrixOptimizer.step = counted  # type: ignore[method-assign, assignment]
    return refusal(line, log)


def test_an_update_that_is_not_finite_stops_all_ranks(workplace: Workplace, tmp_path: Path) -> None:
    """Before the step is saved, with the name of the Hugging Face tensor."""
    ranks, words = LAYOUTS["dp2"]
    save = tmp_path / "saved"
    given = argv(workplace, "broken", "aurora", *words.split(), "--save", str(save), "--save-interval", "1")
    found = run_distributed(ranks, broken, given, str(tmp_path / "log"), initialise=False)
    assert len(set(found)) == 1
    assert (
        "iteration 3: the optimizer's update is not finite, of model.layers.0.mlp.experts.0.down_proj.weight;"
        in found[0]
    )
    assert iteration_directory(save).name == "iter_0000002"


def test_rates_of_adamw_are_warned_about(workplace: Workplace) -> None:
    """With the one that moves weights as far: 0.2 sqrt(48) times as much."""
    run(workplace, "one", "aurora", "--lr", "4.5e-4", "--min-lr", "1e-5", "--train-iters", "1", name="slow")
    text = workplace.log("slow").read_text()
    assert "warning: --lr 0.00045 looks like a learning rate of AdamW" in text and "--lr 0.00062" in text
    run(workplace, "one", "aurora", "--train-iters", "1", name="fitting")
    assert "looks like" not in workplace.log("fitting").read_text()


def test_momentum_is_not_carried(workplace: Workplace, tmp_path: Path) -> None:
    """A pruning says why."""
    save = interrupted(workplace, "one", tmp_path / "uncarried")
    with pytest.raises(SlimError, match="has the state of Muon or Aurora, whose momentum is new again"):
        open_optimizer_state(open_checkpoint(save))


def test_all_matrices_are_updated_where_asked_for(workplace: Workplace, one: dict[str, Logged]) -> None:
    """Routers, too: another run."""
    found = run(workplace, "one", "aurora", "--optimizer-matrices", "all")
    assert found[LM][0] == one["aurora"][LM][0] and found[LM][-1] != one["aurora"][LM][-1]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen3_moe", "glm4_moe"])
def test_other_families_and_projections(workplace: Workplace, tmp_path: Path, family: str) -> None:
    """Dense blocks, biases of routers and of attention; and what is trained next to the model has AdamW."""
    shapes = [tiny_shape(family, vocab_size=120, num_moe_experts=count) for count in (4, 8)]
    place, flags = workplace.with_models(tmp_path, *shapes), ("--hidden-kd-layers", "1:1")
    found, expected = (run(place, layout, "muon", *flags, name=f"{family}-{layout}") for layout in ("tp2-ep2", "one"))
    assert_same_run(found, expected, [term for term in TERMS if term in expected])
