"""Several sizes of one student trained together: each is what its slice would be, and the largest is the checkpoint."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_slim.architecture.flops import TORCH, student_flops
from megatron_slim.architecture.shape import FAMILIES, ModelShape
from megatron_slim.checkpoint.convert import open_checkpoint
from megatron_slim.checkpoint.records import ELASTIC
from megatron_slim.distillation.elastic import ElasticModel
from megatron_slim.pruning.apply import PrunedCheckpoint
from megatron_slim.pruning.elastic import Elastic, find_elastic
from megatron_slim.pruning.pipeline import write_pruned
from megatron_slim.testing import make_elastic, run_distributed, tiny_shape, write_tiny_checkpoint
from megatron_slim.training.elastic import ElasticRun
from megatron_slim.training.run_plots import picture
from megatron_slim.training.run_view import in_nats, read_run, summary
from megatron_slim.training.turns import Turns
from tests.engine import run_with_engine
from tests.training.conftest import SIZES, Workplace, read_scalars, refusal, train
from tests.training.test_packed_data import make

# Every axis, layers too.
BUDGETS: dict[str, dict[str, int]] = {
    "large": {},
    "middle": {"hidden_size": 48, "num_moe_experts": 6, "moe_ffn_hidden_size": 24, "num_attention_heads": 2},
    "small": {
        "num_layers": 2,
        "hidden_size": 32,
        "num_moe_experts": 4,
        "moe_ffn_hidden_size": 16,
        "num_attention_heads": 2,
    },
}
SHARED = "moe_shared_expert_intermediate_size"
OF_KIND = {
    "shared": {"middle": {SHARED: 24}, "small": {SHARED: 16}},
    "gdn": {"middle": {"linear_num_value_heads": 2}, "small": {"linear_num_value_heads": 2}},
    "dense": {"middle": {"ffn_hidden_size": 32, SHARED: 24}, "small": {"ffn_hidden_size": 24, SHARED: 16}},
}
KINDS = {
    "qwen3_next": ("shared", "gdn"),
    "qwen3_moe": (),
    "qwen3_5_moe_text": ("shared", "gdn"),
    "glm4_moe": ("dense",),
}
TERMS = ("lm loss", "logits distillation loss", "mtp lm loss", "mtp distillation loss")


def write_elastic(directory: Path, shape: ModelShape, **of_small: int) -> Path:
    """A checkpoint with three budgets, chosen by random statistics; further sizes of the smallest by keyword."""
    targets = dict(BUDGETS)
    for kind in KINDS[shape.model_type]:
        targets |= {name: targets[name] | more for name, more in OF_KIND[kind].items()}
    targets["small"] = targets["small"] | of_small
    depth = "last" if shape.num_dense_layers else "block_influence"
    return make_elastic(write_tiny_checkpoint(directory, shape, dtype=torch.float32), targets, depth=depth)


def pruned(checkpoint: Path, name: str) -> PrunedCheckpoint:
    elastic = find_elastic(checkpoint)
    assert elastic is not None
    return PrunedCheckpoint(elastic.named(name).plan, open_checkpoint(checkpoint), check_source=False)


def slice_to(directory: Path, parent: Path, name: str) -> Path:
    write_pruned(pruned(parent, name), directory, stats=None, to="hf")
    return directory


def only(name: str) -> tuple[str, ...]:
    """Flags of a run all of whose iterations are of one budget."""
    return "--elastic", "in-turn", "--elastic-shares", ",".join(str(int(name == each)) for each in BUDGETS)


def assert_same_weights(found: PrunedCheckpoint, expected: Path) -> None:
    other = open_checkpoint(expected)
    assert set(found.names) == set(other.names)
    for tensor in other.names:
        assert torch.equal(found.read(tensor), other.read(tensor)), tensor


@pytest.fixture(scope="module")
def place(workplace: Workplace, tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    root = tmp_path_factory.mktemp("elastic")
    student = write_elastic(root / "student", tiny_shape(**SIZES))
    return Workplace(root, workplace.teacher, student)


# Two micro-batches; without clipping, whose norm is a sum in another order.
EXACT = ("--clip-grad", "0", "--micro-batch-size", "2")
FULL = ("--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", "1")
CASES = [
    pytest.param("middle", (), id="middle"),
    pytest.param("small", (), id="small"),
    pytest.param("small", ("--bf16",), id="small-bf16"),
    pytest.param("middle", (*FULL, "--bf16"), marks=pytest.mark.slow, id="middle-bf16-full"),
]


@pytest.mark.one_case
@pytest.mark.parametrize(("name", "flags"), CASES)
def test_training_one_budget_is_training_its_slice(
    place: Workplace, name: str, flags: tuple[str, ...], request: pytest.FixtureRequest
) -> None:
    """Bit for bit: the losses of every step, so all gradients; and the weights at the end."""
    run = re.sub(r"\W+", "-", request.node.name)
    save, alone = place.root / f"elastic-{run}", place.root / f"alone-{run}"
    elastic = place.train(f"{run}-elastic", 1, *EXACT, *flags, *only(name), "--save", str(save))
    sliced = dataclasses.replace(place, student=slice_to(place.root / f"slice-{run}", place.student, name))
    plain = sliced.train(f"{run}-alone", 1, *EXACT, *flags, "--save", str(alone))
    for term in TERMS:
        assert elastic[f"{name}/{term}"] == plain[term], term
    # A mean over other numbers of layers, in fp32.
    assert elastic["global_load_balancing_loss"] == pytest.approx(plain["global_load_balancing_loss"], rel=1e-6)
    assert_same_weights(pruned(save, name), alone)
    before, after = open_checkpoint(place.student), open_checkpoint(save)
    moved = [each for each in before.names if not torch.equal(before.read(each).float(), after.read(each).float())]
    assert moved, "nothing was trained"


@pytest.mark.slow
def test_documents_apart(place: Workplace, tmp_path: Path) -> None:
    """The same on samples whose documents do not see each other; and that they do not has an effect."""
    runs = {}
    small = dataclasses.replace(place, student=slice_to(tmp_path / "slice", place.student, "small"))
    for kind, documents in (("apart", True), ("together", False)):
        data = ("--micro-batch-size", "1", "--clip-grad", "0", "--eval-iters", "0", "--train-data-path")
        data += (str(make(tmp_path / kind, documents=documents)),)
        elastic = place.train(f"documents-{kind}", 1, *data, *only("small"))
        plain = small.train(f"documents-alone-{kind}", 1, *data)
        for term in TERMS:
            assert elastic[f"small/{term}"] == plain[term], term
        runs[kind] = plain
    assert runs["apart"]["lm loss"] != runs["together"]["lm loss"]


@pytest.mark.slow
@pytest.mark.parametrize("family", [each for each in FAMILIES if each != "qwen3_next"])
def test_families(place: Workplace, family: str, tmp_path: Path) -> None:
    """The same of every family, without a teacher; of GLM's with a dense layer and routers with a bias."""
    shape = tiny_shape(family, vocab_size=120, num_layers=4)
    student = write_elastic(tmp_path / "student", shape)
    here = dataclasses.replace(place, root=tmp_path, student=student)
    small = dataclasses.replace(here, student=slice_to(tmp_path / "slice", student, "small"))
    flags = (*EXACT, "--moe-router-bias-update-rate", "1e-2") if family == "glm4_moe" else EXACT
    elastic = here.train("elastic", 1, *flags, *only("small"), "--save", str(tmp_path / "e"), distil=False)
    plain = small.train("alone", 1, *flags, "--save", str(tmp_path / "a"), distil=False)
    assert elastic["small/lm loss"] == plain["lm loss"]
    assert_same_weights(pruned(tmp_path / "e", "small"), tmp_path / "a")


@pytest.mark.slow
def test_whole_groups_of_heads_may_go(place: Workplace, tmp_path: Path) -> None:
    """With their keys and values, of both kinds of attention."""
    groups = {"num_query_groups": 1, "num_attention_heads": 1, "linear_num_key_heads": 1, "linear_num_value_heads": 1}
    student = write_elastic(tmp_path / "student", tiny_shape(**SIZES), **groups)
    here = dataclasses.replace(place, root=tmp_path, student=student)
    small = dataclasses.replace(here, student=slice_to(tmp_path / "slice", student, "small"))
    elastic = here.train("elastic", 1, *EXACT, *only("small"), "--save", str(tmp_path / "e"))
    plain = small.train("alone", 1, *EXACT, "--save", str(tmp_path / "a"))
    assert elastic["small/lm loss"] == plain["lm loss"]
    assert_same_weights(pruned(tmp_path / "e", "small"), tmp_path / "a")


def test_what_a_budget_does_not_have_only_decays(place: Workplace, tmp_path: Path) -> None:
    """Its gradients are zero, and so are its moments where it was never trained: AdamW multiplies it by 1 - lr wd."""
    flags = ("--weight-decay", "0.5", "--lr", "1e-2", "--min-lr", "1e-2", "--lr-decay-style", "constant")
    place.train("decay", 1, *EXACT, *flags, *only("small"), "--save", str(tmp_path / "saved"))
    before, after = open_checkpoint(place.student), open_checkpoint(tmp_path / "saved")
    elastic = find_elastic(place.student)
    assert elastic is not None
    plan = elastic.named("small").plan
    gone = next(layer for layer in range(4) if layer not in plan.kept_layers)
    experts = {group.base for group in plan.experts[f"model.layers.{plan.kept_layers[0]}"]}
    expert = next(number for number in range(8) if number not in experts)
    names = [
        f"model.layers.{gone}.mlp.gate.weight",
        f"model.layers.{plan.kept_layers[0]}.mlp.experts.{expert}.up_proj.weight",
    ]
    for name in names:
        old, new = before.read(name), after.read(name)
        torch.testing.assert_close(new, old * (1 - 0.5e-2) ** 5, rtol=1e-6, atol=0)
    embedding = "model.embed_tokens.weight"
    outside = [each for each in range(64) if each not in plan.kept_hidden]
    old, new = before.read(embedding)[:, outside], after.read(embedding)[:, outside]
    torch.testing.assert_close(new, old * (1 - 0.5e-2) ** 5, rtol=1e-6, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["in-turn", "together"])
def test_the_largest_budget_alone_is_an_ordinary_run(place: Workplace, schedule: str, tmp_path: Path) -> None:
    """Bit for bit, clipping included: its parameters are the student's own."""
    student = write_elastic(tmp_path / "student", tiny_shape(**SIZES))
    elastic = find_elastic(student)
    assert elastic is not None
    dataclasses.replace(elastic, budgets=elastic.budgets[:1]).save(student / ELASTIC)
    here = dataclasses.replace(place, root=tmp_path, student=student)
    run = ("--micro-batch-size", "2", "--save")
    found = here.train("elastic", 1, *run, str(tmp_path / "elastic"), "--elastic", schedule)
    plain = here.train("plain", 1, *run, str(tmp_path / "plain"))
    for term in TERMS:
        assert found[f"large/{term}"] == plain[term], term
    assert found["grad-norm"] == plain["grad-norm"]
    assert found["global_load_balancing_loss"] == plain["global_load_balancing_loss"]
    assert_same_weights(pruned(tmp_path / "elastic", "large"), tmp_path / "plain")


def test_a_step_of_all_budgets_adds_up_what_each_alone_moves(place: Workplace, tmp_path: Path) -> None:
    """One step in which Adam, by an epsilon beyond all gradients, moves every weight by its gradient."""
    flags = "--train-iters 1 --clip-grad 0 --micro-batch-size 2 --weight-decay 0 --adam-beta1 0 --adam-beta2 0"
    flags += " --adam-eps 1e8 --lr 1e9 --min-lr 1e9"
    before, moved = open_checkpoint(place.student), {}
    for name in [*BUDGETS, "together"]:
        schedule = ("--elastic", "together") if name == "together" else only(name)
        place.train(f"sum-{name}", 1, *flags.split(), *schedule, "--save", str(tmp_path / name))
        after = open_checkpoint(tmp_path / name)
        moved[name] = {each: after.read(each) - before.read(each) for each in before.names}
    for tensor, found in moved["together"].items():
        expected = sum(moved[name][tensor] for name in BUDGETS)
        # Sums of gradients in fp32, and what is lost where they are added to weights, four times.
        tolerance = 1e-5 * found.abs().max() + 4 * 2.0**-24 * before.read(tensor).abs().max()
        assert (found - expected).abs().max() <= tolerance, tensor
    assert max(float(each.abs().max()) for each in moved["together"].values()) > 0.1


# Processes, micro-batch size, flags. Experts, shared neurons and halves of eh_proj are divided unevenly over ranks.
LAYOUTS = {
    "pp2": (2, 2, "--pipeline-model-parallel-size 2"),
    "vpp2": (2, 2, "--pipeline-model-parallel-size 2 --pipeline-model-parallel-layout E|t|t|ttmL"),
    "tp2-sp": (2, 2, "--tensor-model-parallel-size 2 --sequence-parallel"),
    "ep2": (2, 1, "--expert-model-parallel-size 2"),
    "dp2": (2, 1, ""),
    "tp2-sp-ep2-etp1": (
        2,
        2,
        "--tensor-model-parallel-size 2 --sequence-parallel --expert-model-parallel-size 2 "
        "--expert-tensor-parallel-size 1",
    ),
    "cp2": (2, 2, "--context-parallel-size 2"),
    "pp2-ep2-full": (
        4,
        1,
        "--pipeline-model-parallel-size 2 --expert-model-parallel-size 2 --recompute-granularity full "
        "--recompute-method uniform --recompute-num-layers 1",
    ),
}
QUICK = {("vpp2", "together"), ("tp2-sp-ep2-etp1", "in-turn")}


@pytest.mark.one_case
@pytest.mark.parametrize(
    ("layout", "schedule"),
    [
        pytest.param(layout, schedule, marks=() if (layout, schedule) in QUICK else pytest.mark.slow)
        for layout in LAYOUTS
        for schedule in ("in-turn", "together")
    ],
)
def test_a_run_is_the_same_under_every_layout(place: Workplace, schedule: str, layout: str) -> None:
    """Each loss of each budget, gradient norm and load balancing, in training and validation, every step."""
    ranks, size, flags = LAYOUTS[layout]
    common = ("--elastic", schedule, "--adam-eps", "1e-3", "--lr", "1e-4", "--min-lr", "1e-5", "--eval-interval", "2")
    one = place.train(f"one-{schedule}", 1, "--micro-batch-size", "2", *common)
    found = place.train(f"{layout}-{schedule}", ranks, "--micro-batch-size", str(size), *flags.split(), *common)
    tags = [tag for tag in one if tag.endswith((*TERMS, "grad-norm", "global_load_balancing_loss"))]
    for name in BUDGETS:
        for term in TERMS:
            assert f"{name}/{term}" in tags and f"{name}/{term} validation" in one
    for tag in tags:
        # fp32 sums in another order, over five steps, as in test_parallel_layouts.py.
        assert found[tag] == pytest.approx(one[tag], rel=1e-5), tag
    for tag in (tag for tag in one if tag.endswith(" validation")):
        assert found[tag] == pytest.approx(one[tag], rel=1e-5), tag


def bytes_after_steps(argv: list[str], log: str) -> list[int]:
    """Body of one rank: bytes that the models of the smaller budgets hold after each schedule."""
    around, found = Turns.around, list[int]()

    def watched(turns: Turns, *args: Any, **kwargs: Any) -> Any:
        results = around(turns, *args, **kwargs)
        others = [other for chunk in turns.chunks if isinstance(chunk, ElasticModel) for other in chunk.students[1:]]
        found.append(sum(each.untyped_storage().nbytes() for other in others for each in other.parameters()))
        return results

    Turns.around = watched  # type: ignore[method-assign]
    train(argv, log)
    return found


def test_smaller_budgets_take_memory_in_their_steps_alone(place: Workplace) -> None:
    """Also before the first of them, which what models are built with would wait for."""
    argv = place.argv("memory", "--micro-batch-size", "2", "--elastic", "in-turn", "--elastic-shares", "3,1,1")
    (found,) = run_distributed(1, bytes_after_steps, argv, str(place.new_log("memory")), initialise=False)
    assert found == [0] * 7, "five steps, and two validations at the end"


def test_a_run_that_is_resumed_is_the_run(place: Workplace, tmp_path: Path) -> None:
    """Bit for bit: which budget an iteration trains follows from its number."""
    flags = ("--micro-batch-size", "2", "--elastic", "in-turn", "--elastic-shares", "2,1,1")
    place.train("whole", 1, *flags, "--save", str(tmp_path / "whole"))
    place.train("first", 1, *flags, "--save", str(tmp_path / "parts"), "--exit-interval", "3", "--save-interval", "3")
    second = place.train("second", 1, *flags, "--save", str(tmp_path / "parts"), "--load", str(tmp_path / "parts"))
    assert len(second["grad-norm"]) == 2
    assert_same_weights(pruned(tmp_path / "parts", "large"), tmp_path / "whole")


@pytest.mark.slow
def test_a_sorted_student_gathers_no_experts(place: Workplace, tmp_path: Path, tool: Any) -> None:
    """Each rank has equally many survivors of each budget; otherwise the log says what that costs."""
    flags = "--micro-batch-size 1 --elastic together --train-iters 1 --expert-model-parallel-size 2".split()
    place.train("unsorted", 2, *flags)
    assert re.search(
        r"gathered .*, \d+ of them experts; megatron-slim sort --expert-parallel 2", read(place, "unsorted")
    )
    done = tool(
        "tools/sort_checkpoint.py", "--load", place.student, "--save", tmp_path / "sorted", "--expert-parallel", 2
    )
    assert done.code == 0, done
    dataclasses.replace(place, student=tmp_path / "sorted").train("sorted", 2, *flags)
    assert "of them experts" not in read(place, "sorted")


def read(place: Workplace, name: str) -> str:
    return place.log(name).read_text()


def run_of(shares: tuple[int, ...], **more: object) -> ElasticRun:
    return ElasticRun(Elastic(()), together=False, shares=shares, **more)  # type: ignore[arg-type]


def test_budgets_have_exactly_their_shares() -> None:
    run = run_of((5, 3, 2), seed=7)
    turns = [run.of_iteration(iteration)[0] for iteration in range(1000)]
    for start in range(0, 1000, 10):
        assert Counter(turns[start : start + 10]) == {0: 5, 1: 3, 2: 2}
    assert len({tuple(turns[start : start + 10]) for start in range(0, 1000, 10)}) > 50, "the order is drawn"
    assert turns == [run_of((5, 3, 2), seed=7).of_iteration(iteration)[0] for iteration in range(1000)]
    assert turns != [run_of((5, 3, 2), seed=8).of_iteration(iteration)[0] for iteration in range(1000)]


def test_shares_change_in_a_second_stage() -> None:
    run = run_of((1, 1), late_shares=(3, 1), late_from=5)
    turns = [run.of_iteration(iteration)[0] for iteration in range(405)]
    assert Counter(turns[:4]) == {0: 2, 1: 2}
    for start in range(5, 405, 4):
        assert Counter(turns[start : start + 4]) == {0: 3, 1: 1}


REFUSED = {
    "aurora": ("--optimizer aurora --lr 0.01", "--elastic in-turn does not go with --optimizer aurora"),
    "ahead": ("--teacher-ahead 2", "--elastic does not go with --teacher-ahead"),
    "hidden": ("--hidden-kd-layers 0:0", "--elastic does not go with --hidden-kd-layers"),
    "shares": (
        "--elastic-shares 1,1",
        "--elastic-shares has 2 numbers for 3 budgets",
    ),
    "graphs": ("--cuda-graph-impl local", "--elastic does not go with --cuda-graph-impl"),
    "negative": ("--elastic-late-shares 1,1,1 --elastic-late-from -5", "--elastic-late-from -5 is negative"),
    "late": ("--elastic-late-shares 1,1,1", "--elastic-late-shares and --elastic-late-from need one another"),
    "experts": (
        "--expert-model-parallel-size 4",
        "budget middle: num_moe_experts 6 does not divide by expert parallel size 4",
    ),
    "depth": (
        "--pipeline-model-parallel-size 4 --pipeline-model-parallel-layout Et|t|t|tmL",
        "its last layer, model.layers.2 of the student, is in pipeline stage 3, the student's last in stage 4",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_done_is_refused_at_the_start(place: Workplace, case: str) -> None:
    flags, sentence = REFUSED[case]
    ranks = 4 if case in ("experts", "depth") else 1
    argv = place.argv(case, "--micro-batch-size", "1", "--elastic", "in-turn", *flags.split())
    found = run_distributed(ranks, refusal, argv, str(place.new_log(case)), initialise=False)
    assert all(sentence in each for each in found), found


def test_a_student_without_budgets_is_refused(workplace: Workplace) -> None:
    argv = workplace.argv("none", "--micro-batch-size", "1", "--elastic", "together")
    (found,) = run_distributed(1, refusal, argv, str(workplace.new_log("none")), initialise=False)
    assert "--elastic, but the student has no budgets; prune by a recipe with budgets" in found


@pytest.mark.slow
def test_a_directory_of_checkpoints_has_one_document(place: Workplace, tmp_path: Path) -> None:
    """Slices of its older iterations, and of its newer ones, are all what it says."""
    elastic, plain = tmp_path / "elastic", tmp_path / "plain"
    common = ("--micro-batch-size", "2", "--train-iters", "1", "--save")
    place.train("with", 1, *common, str(elastic), "--elastic", "together")
    place.train("without", 1, *common, str(plain))
    for number, (flags, sentence) in enumerate(
        (
            ((*common, str(elastic)), "its checkpoints have budgets, which this run does not train; give --elastic"),
            ((*common, str(plain), "--elastic", "together"), "its checkpoints have no budgets, this run has some"),
        )
    ):
        argv = place.argv(f"one-{number}", *flags)
        (found,) = run_distributed(1, refusal, argv, str(place.new_log(f"one-{number}")), initialise=False)
        assert sentence in found


@pytest.mark.slow
def test_a_student_without_its_mtp_block_has_budgets_without(place: Workplace, tmp_path: Path) -> None:
    flags = ("--micro-batch-size", "2", "--train-iters", "2", "--elastic", "together", "--without-mtp")
    found = place.train("nomtp", 1, *flags, "--teacher-without-mtp", "--save", str(tmp_path / "saved"))
    assert "small/lm loss" in found and "small/mtp lm loss" not in found
    assert pruned(tmp_path / "saved", "small").shape.mtp_num_layers == 0


@pytest.mark.slow
def test_weights_of_budgets_multiply_all_that_moves_routers(place: Workplace, tmp_path: Path) -> None:
    """A step in which Adam moves weights by their gradients, most of which are of the losses of routers."""
    moved = {}
    for weight in (1.0, 0.5):
        student = write_elastic(tmp_path / f"student-{weight}", tiny_shape(**SIZES))
        elastic = find_elastic(student)
        assert elastic is not None
        budgets = tuple(dataclasses.replace(each, weight=weight) for each in elastic.budgets)
        dataclasses.replace(elastic, budgets=budgets).save(student / ELASTIC)
        flags = "--train-iters 1 --clip-grad 0 --micro-batch-size 4 --weight-decay 0 --adam-beta1 0 --adam-beta2 0"
        flags += " --adam-eps 1e8 --lr 1e8 --min-lr 1e8 --moe-z-loss-coeff 1 --moe-aux-loss-coeff 1"
        here, save = dataclasses.replace(place, student=student), tmp_path / f"saved-{weight}"
        here.train(f"weight-{weight}", 1, *flags.split(), *only("small"), "--save", str(save))
        before, after = open_checkpoint(student), open_checkpoint(save)
        moved[weight] = {each: after.read(each) - before.read(each) for each in before.names if "gate" in each}
    for name, full in moved[1.0].items():
        # Rounding of the weights that are moved.
        torch.testing.assert_close(moved[0.5][name], full / 2, rtol=1e-4, atol=1e-6)
    assert max(float(each.abs().max()) for each in moved[1.0].values()) > 1e-2


@pytest.mark.slow
def test_overlap_is_left_out_and_said(place: Workplace) -> None:
    flags = ("--micro-batch-size", "2", "--overlap-grad-reduce", "--overlap-param-gather", "--elastic", "together")
    found = place.train("overlap", 1, *flags, "--train-iters", "2")
    assert len(found["small/lm loss"]) == 2
    assert "--elastic: without --overlap-grad-reduce, --overlap-param-gather" in place.log("overlap").read_text()


@pytest.mark.slow
def test_a_run_of_the_largest_alone_says_what_it_does(place: Workplace, tmp_path: Path) -> None:
    flags = ("--micro-batch-size", "2", "--train-iters", "1", "--save", str(tmp_path / "saved"))
    place.train("largest", 1, *flags)
    assert "holds budgets, of which this run trains the largest alone" in place.log("largest").read_text()
    assert find_elastic(tmp_path / "saved") is None


@pytest.mark.slow
def test_optimizers_of_matrices_train_all_budgets_together(place: Workplace) -> None:
    """Their steps have the largest budget, so that no weight is left to its momentum."""
    flags = (
        "--micro-batch-size",
        "2",
        "--elastic",
        "together",
        "--optimizer",
        "muon",
        "--lr",
        "1e-2",
        "--min-lr",
        "1e-3",
    )
    plain = [flag for flag in place.argv("muon", *flags) if flag != "--use-distributed-optimizer"]
    run_distributed(1, train, plain, str(place.new_log("muon")), initialise=False)
    losses = read_scalars(place.root / "tensorboard" / "muon")["small/lm loss"]
    assert len(losses) == 5 and losses[-1] < losses[0]


def test_shares_without_budgets_are_refused(workplace: Workplace) -> None:
    argv = workplace.argv("alone", "--micro-batch-size", "1", "--elastic-shares", "1,1")
    (found,) = run_distributed(1, refusal, argv, str(workplace.new_log("alone")), initialise=False)
    assert "shares of budgets need --elastic" in found


@pytest.mark.slow
def test_a_run_of_several_budgets_is_shown(place: Workplace) -> None:
    """Losses and experts of each budget, in the log, in what show-run prints, and in its picture."""
    place.train("shown", 1, "--micro-batch-size", "2", "--elastic", "together", "--train-iters", "3")
    text = place.log("shown").read_text()
    assert re.search(r"experts: max/mean [\d.]+ \((large|middle|small) (layer|mtp) \d+\)", text)
    run = read_run(place.root / "tensorboard" / "shown")
    found = summary(run)
    assert {"small/lm loss", "large/mtp distillation loss", "small/experts/max_over_mean"} <= found["curves"].keys()
    rows = found["experts"]["max_over_mean"]
    assert [name for name in rows if name.startswith("small")][-1] == "small mtp_1" and "large layer_04" in rows
    assert sum(name.startswith("small") for name in rows) == 3, "two layers and the MTP block"
    assert in_nats("small/lm loss") and picture(run)[:4] == b"\x89PNG"
    shapes = {name: pruned(place.student, name).shape for name in BUDGETS}
    flops = {name: student_flops(shape, 32, TORCH).total for name, shape in shapes.items()}
    rate = run["slim/throughput/student_tflops_per_gpu"][3] / run["slim/throughput/tokens_per_second_per_gpu"][3]
    assert rate * 1e12 == pytest.approx(sum(flops.values()), rel=1e-5)


def test_the_teacher_is_checked_as_in_other_runs(place: Workplace) -> None:
    """One of random weights is worse than guessing, by the same number as without budgets."""
    sentences = set()
    for name, flags in (("checked", ("--elastic", "together")), ("checked-plain", ())):
        argv = place.argv(name, "--micro-batch-size", "2", *flags, check_teacher=True)
        sentences |= set(run_distributed(1, refusal, argv, str(place.new_log(name)), initialise=False))
    (sentence,) = sentences
    assert "the teacher's cross entropy on the first batch is" in sentence


def test_slices_of_what_was_saved(place: Workplace, tmp_path: Path, tool: Any) -> None:
    """As a user continues: both formats are sliced, and a slice has the budgets below it."""
    save = tmp_path / "run"
    flags = ("--micro-batch-size", "2", "--elastic", "together", "--train-iters", "2", "--save", str(save))
    place.train("saved", 1, *flags)
    done = tool("tools/convert_checkpoint.py", "--load", save, "--save", tmp_path / "hf", "--to", "hf")
    assert done.code == 0, done
    for source, to in ((save, "hf"), (tmp_path / "hf", "torch_dist")):
        target = tmp_path / f"middle-{to}"
        done = tool("tools/slice_checkpoint.py", "--load", source, "--budget", "middle", "--save", target, "--to", to)
        assert done.code == 0, done
        assert_same_weights(pruned(save, "middle"), target)
        assert_same_weights(pruned(target, "small"), slice_to(tmp_path / f"small-{to}", save, "small"))


def check_engine(root: Path) -> None:
    """Body of a process in which Transformer Engine seems to be installed."""
    shape = tiny_shape(**SIZES, linear_num_value_heads=16)
    targets = {"large": {}, "small": {"num_layers": 2, "hidden_size": 32, "num_moe_experts": 4, SHARED: 16}}
    student = make_elastic(write_tiny_checkpoint(root / "student", shape), targets, depth="block_influence")
    place = Workplace(root, write_tiny_checkpoint(root / "teacher", shape, seed=1), student)
    flags = "--transformer-impl transformer_engine --moe-grouped-gemm --bf16 --tensor-model-parallel-size 2".split()
    flags += ["--sequence-parallel", "--micro-batch-size", "2", "--clip-grad", "0"]
    elastic = place.train("elastic", 2, *flags, "--elastic", "in-turn", "--elastic-shares", "0,1")
    sliced = dataclasses.replace(place, student=slice_to(root / "slice", student, "small"))
    plain = sliced.train("plain", 2, *flags)
    for term in TERMS:
        assert elastic[f"small/{term}"] == plain[term], term
    together = place.train("together", 2, *flags, "--elastic", "together")
    assert together["small/lm loss"][0] == plain["lm loss"][0]
    assert together["small/lm loss"][-1] < together["small/lm loss"][0]


@pytest.mark.slow
def test_students_of_transformer_engine(tmp_path: Path) -> None:
    """Grouped experts and fused norms have parameters of the same names; bit for bit, in bf16."""
    run_with_engine(__name__, "check_engine", tmp_path)
