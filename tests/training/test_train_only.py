"""Training some parts: their gradients are those of full training, the rest stays as it is to the byte."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import megatron_slim.mcore

import pytest
import torch

from megatron_slim.architecture.backward import step_flops
from megatron_slim.architecture.flops import TORCH
from megatron_slim.architecture.parts import TrainOnly, rows_by_place
from megatron_slim.checkpoint.convert import open_checkpoint
from megatron_slim.testing import run_distributed, tiny_shape
from megatron_slim.training.train_only import train_only, train_only_violations
from tests.training.conftest import Workplace, read_console, refusal, train

NO_BALANCE = ("--moe-aux-loss-coeff", "0")


def first_gradients(argv: list[str], log: str, into: str) -> None:
    """Body of one rank: what each trained parameter's gradient is in the first step."""
    from megatron_slim.training.finite import FiniteWatch

    found: dict[str, torch.Tensor] = {}
    finalize = FiniteWatch.finalize_grads

    def remember(self: Any, model: list[Any], *args: Any, **kwargs: Any) -> None:
        finalize(self, model, *args, **kwargs)
        for chunk in model if not found else ():
            for name, parameter in chunk.named_parameters():
                if parameter.requires_grad:
                    found[name] = parameter.main_grad.clone()
                else:
                    assert not hasattr(parameter, "main_grad") and parameter.grad is None, name

    FiniteWatch.finalize_grads = remember  # type: ignore[method-assign]
    train(argv, log)
    torch.save(found, into)


def gradients(place: Workplace, name: str, *flags: str) -> dict[str, torch.Tensor]:
    into = place.root / f"{name}.pt"
    argv = place.argv(name, "--micro-batch-size", "2", "--train-iters", "2", *flags)
    run_distributed(1, first_gradients, argv, str(place.new_log(name)), str(into), initialise=False)
    found: dict[str, torch.Tensor] = torch.load(into)
    return found


FULL = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1".split()
MOE = "--recompute-granularity selective --recompute-modules moe layernorm".split()
WORDS = {
    "experts": ("experts", ()),
    "some layers": ("experts@2-3,router@3,norms@1", NO_BALANCE),
    "the rest": ("embedding,attention,delta-net,shared-experts", ()),
    "output": ("output", ()),
    "mtp": ("mtp", NO_BALANCE),
    "experts, recomputed": ("experts", tuple(FULL)),
    "mtp, recomputed": ("mtp", (*FULL, *NO_BALANCE)),
    "experts and norms, recomputed": ("experts,norms", tuple(MOE)),
}


@pytest.fixture(scope="module")
def whole(workplace: Workplace) -> dict[str, torch.Tensor]:
    return gradients(workplace, "all-parts", *NO_BALANCE)


@pytest.mark.one_case
@pytest.mark.parametrize("name", WORDS)
def test_gradients_are_those_of_full_training(workplace: Workplace, whole: dict[str, torch.Tensor], name: str) -> None:
    """Bit for bit; nothing else has one."""
    words, flags = WORDS[name]
    found = gradients(workplace, f"parts-{name}".replace(" ", "-"), "--train-only", words, *flags)
    assert found and found.keys() < whole.keys()
    for key, gradient in found.items():
        assert torch.equal(gradient, whole[key]), key
        assert gradient.abs().max() > 0, key


def weights(directory: Path) -> dict[str, torch.Tensor]:
    checkpoint = open_checkpoint(directory)
    return {name: checkpoint.read(name) for name in checkpoint.names}


def run(place: Workplace, name: str, ranks: int, *flags: str) -> tuple[dict[str, list[float]], dict[str, torch.Tensor]]:
    """What a run of five steps logged, and the weights that it ended with."""
    save = place.root / "saved" / name
    logged = place.train(name, ranks, *CALM, "--save", str(save), *flags)
    return logged, weights(save)


CALM = "--global-batch-size 8 --lr 1e-4 --min-lr 1e-5 --adam-eps 1e-3".split()
PARTS = "experts,norms@2-3,router"
MARKS = (".mlp.experts.", "layernorm.weight", ".norm.weight", ".mlp.gate.weight", "q_norm", "k_norm")
TP2 = "--tensor-model-parallel-size 2 --sequence-parallel --expert-tensor-parallel-size 1"
PP2 = "--pipeline-model-parallel-size 2"
EP2 = "--expert-model-parallel-size 2"
VPP = f"{PP2} --num-virtual-stages-per-pipeline-rank 2 --pipeline-layout auto"
LAYOUTS = {
    "dp2": (2, 2, "--overlap-grad-reduce --overlap-param-gather --ddp-bucket-size 5000"),
    "tp2": (2, 4, TP2),
    "pp2": (2, 4, PP2),
    "ep2": (2, 2, EP2),
    "tp2-ep2-full": (2, 4, f"{TP2} {EP2} {' '.join(FULL)}"),
    "vpp2": (2, 4, VPP),
    "cp2": (2, 4, "--context-parallel-size 2"),
}
# The second and third leave a stage, or all but experts, with nothing to train.
CHOICES = {"several": PARTS, "last stage": "experts@3,output", "first stage": "attention@1", "experts": "experts"}


@pytest.fixture(scope="module")
def alone(workplace: Workplace) -> Any:
    """A choice's run on one rank."""
    found: dict[str, Any] = {}

    def of(choice: str) -> Any:
        if choice not in found:
            flags = ("--micro-batch-size", "4", "--train-only", CHOICES[choice])
            found[choice] = run(workplace, f"one-{choice}".replace(" ", "-"), 1, *flags)
        return found[choice]

    return of


CASES = [
    *(("several", layout) for layout in LAYOUTS),
    *(("last stage", "pp2"), ("first stage", "pp2"), ("first stage", "vpp2"), ("experts", "ep2")),
]


@pytest.mark.slow
@pytest.mark.parametrize(("choice", "layout"), CASES)
def test_a_run_is_the_same_in_every_layout(workplace: Workplace, alone: Any, choice: str, layout: str) -> None:
    """Losses, gradient norm and weights; what is frozen has its bytes, also where a stage has nothing to train."""
    ranks, micro_batch, flags = LAYOUTS[layout]
    name = f"{layout}-{choice}".replace(" ", "-")
    chosen = ("--micro-batch-size", str(micro_batch), "--train-only", CHOICES[choice])
    logged, ended = run(workplace, name, ranks, *chosen, *flags.split())
    expected, wanted = alone(choice)
    for term in ("lm loss", "logits distillation loss", "mtp lm loss", "grad-norm"):
        assert logged[term] == pytest.approx(expected[term], rel=1e-5), term
    start = weights(workplace.student)
    changed = {key for key in start if not torch.equal(wanted[key], start[key])}
    assert changed and changed == {key for key in start if not torch.equal(ended[key], start[key])}
    for key in changed:
        moved = (wanted[key] - start[key]).norm()
        assert (ended[key] - wanted[key]).norm() <= 1e-3 * moved + 5 * 2.0**-24 * wanted[key].norm(), key


def test_what_is_frozen_keeps_its_bytes(workplace: Workplace, alone: Any) -> None:
    """And all that is trained moves."""
    _, ended = alone("several")
    start, shape = weights(workplace.student), open_checkpoint(workplace.student).shape
    only = TrainOnly.of(PARTS)
    trained = {
        tensor.name for row, place in rows_by_place(shape) if only.trains(place) for tensor, _ in row.hf_tensors(shape)
    }
    assert trained == {key for key in start if not torch.equal(start[key], ended[key])}
    assert 0 < len(trained) < len(start)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_run_resumes_bit_for_bit(workplace: Workplace, tmp_path: Path, precision: str) -> None:
    from tests.training.test_runs import keep_only

    flags = ["--micro-batch-size", "4", *CALM, "--train-only", PARTS, "--no-load-rng"]
    flags += [] if precision == "fp32" else [f"--{precision}"]
    flags += ["--initial-loss-scale", "16"] if precision == "fp16" else []
    save = tmp_path / "run"
    saving = ("--save", str(save), "--load", str(save), "--save-interval", "3")
    whole = workplace.train(f"before-{precision}", 1, *flags, *saving)
    ended = weights(save)
    keep_only(save, 3)
    resumed = workplace.train(f"after-{precision}", 1, *flags, *saving)
    for term in ("lm loss", "mtp distillation loss", "grad-norm"):
        assert resumed[term] == whole[term][3:], term
    for key, tensor in weights(save).items():
        assert torch.equal(tensor, ended[key]), key


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["aurora", "muon"])
def test_matrices_of_trained_parts_alone(workplace: Workplace, optimizer: str) -> None:
    """In an optimizer of matrices, whether or not there are others for AdamW; the rest has its bytes."""
    for words, mark in (("attention@1", ".1.self_attn."), ("output,norms", "norm")):
        flags = ("--micro-batch-size", "4", "--optimizer", optimizer, "--lr", "1e-2", "--bf16", "--train-only", words)
        _, ended = run(workplace, f"{optimizer}-{words}", 1, *flags)
        start = weights(workplace.student)
        changed = {key for key in start if not torch.equal(start[key].bfloat16(), ended[key].bfloat16())}
        assert changed and all(mark in key or key == "lm_head.weight" for key in changed), changed


def refused(place: Workplace, name: str, *flags: str) -> str:
    (found,) = run_distributed(1, refusal, place.argv(name, *flags), str(place.new_log(name)), initialise=False)
    return str(found)


@pytest.mark.slow
def test_another_choice_does_not_resume(workplace: Workplace, tmp_path: Path) -> None:
    """Its optimizer has states of other parts: refused, or begun anew."""
    place = ("--micro-batch-size", "4", "--save", str(tmp_path), "--load", str(tmp_path))
    workplace.train("some", 1, *place, "--train-only", "norms", "--train-iters", "2")
    for words in (("--train-only", "norms,router"), ()):
        found = refused(workplace, "other", *place, *words)
        other = words[1] if words else "none"
        assert f"saved with --train-only norms, not {other}" in found and "--no-load-optim" in found
    new = (*place, "--no-load-optim", "--train-iters", "3", "--override-opt_param-scheduler")
    assert len(workplace.train("anew", 1, *new, "--train-only", "router,norms")["lm loss"]) == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--train-only experts@2-9", "--train-only experts@2-9: the last of 4 layers is 3"),
        ("--train-only mlp", "--train-only mlp: the model has none (it has embedding, norms, "),
        ("--train-only attention@0", "--train-only attention@0: the model has none"),
        ("--train-only experts --moe-aux-loss-coeff 0.01", "trains no router, which --moe-aux-loss-coeff is for"),
        ("--train-only experts --carry-optimizer", "--train-only does not go with --carry-optimizer: what is carried"),
    ],
)
def test_what_makes_no_sense_is_refused(workplace: Workplace, flags: str, message: str) -> None:
    found = refused(workplace, "refused", "--micro-batch-size", "4", *flags.split())
    assert message in found


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("expert", "'expert' is not a part of a model: embedding, norms, "),
        ("experts,", "'' is not a part"),
        ("mtp@1", "'mtp@1': mtp is not in the layers, which @ names"),
        ("experts@3-1", "'experts@3-1': give layers as experts@12-23 or experts@12"),
        ("experts@x", "'experts@x': give layers"),
    ],
)
def test_words_that_are_no_parts(words: str, message: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError) as error:
        train_only(words)
    assert message in str(error.value)


def test_budgets_are_trained_whole() -> None:
    args = argparse.Namespace(train_only="experts", elastic="together", moe_aux_loss_coeff=0.0)
    assert any("--elastic: the gradients" in each for each in train_only_violations(tiny_shape(), args, ()))


def test_the_log_counts_what_is_computed(workplace: Workplace, alone: Any) -> None:
    """No gradients of weights that are frozen."""
    logged, shape = alone("experts")[0], open_checkpoint(workplace.student).shape
    found = [
        1e12 * rate / tokens
        for rate, tokens in zip(
            logged["slim/throughput/student_tflops_per_gpu"],
            logged["slim/throughput/tokens_per_second_per_gpu"],
            strict=True,
        )
    ]
    wanted = step_flops(shape, 32, TORCH, only=TrainOnly.of("experts")).total
    assert found == pytest.approx([wanted] * 5, rel=1e-6)
    assert wanted < 0.9 * step_flops(shape, 32, TORCH).total


def test_a_frozen_router_is_left_alone(workplace: Workplace, alone: Any) -> None:
    """No load-balancing loss is counted for it, and the run says so."""
    alone("experts")
    log = workplace.log("one-experts").read_text()
    assert "train-only: experts: " in log and "nothing balances the load of experts" in log
    assert "router_aux_loss_coef as it is" not in log
    logged = read_console(workplace.log("one-experts"))
    assert logged and not any(float(line.get("global_load_balancing_loss", 0.0)) for line in logged.values())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "flags"),
    [
        ("experts", EP2),
        ("attention@1", ""),
        ("output,norms", EP2),
        ("experts@3", PP2),
        ("router,embedding", TP2),
    ],
)
def test_matrices_on_two_ranks_resume(workplace: Workplace, tmp_path: Path, words: str, flags: str) -> None:
    """Where one kind of optimizer, or a stage, has nothing; the last steps are those of the whole run."""
    from tests.training.test_runs import keep_only

    ranks, save = "4" if PP2 in flags or TP2 in flags else "2", tmp_path / "run"
    saving = ("--save", str(save), "--load", str(save), "--save-interval", "3", "--no-load-rng")
    given = ("--micro-batch-size", ranks, *CALM, "--optimizer", "aurora", "--bf16", "--train-only", words)
    name = f"matrices-{words}"
    whole = workplace.train(name, 2, *given, *flags.split(), *saving)
    ended = weights(save)
    keep_only(save, 3)
    resumed = workplace.train(f"{name}-resumed", 2, *given, *flags.split(), *saving)
    assert resumed["lm loss"] == whole["lm loss"][3:] and resumed["grad-norm"] == whole["grad-norm"][3:]
    start = weights(workplace.student)
    shape, only = open_checkpoint(workplace.student).shape, TrainOnly.of(words)
    for row, place in rows_by_place(shape):
        for tensor, _ in row.hf_tensors(shape):
            frozen = torch.equal(ended[tensor.name], start[tensor.name].to(ended[tensor.name].dtype))
            assert only.trains(place) or frozen, tensor.name


@pytest.mark.slow
def test_projections_of_hidden_states_are_trained_always(workplace: Workplace) -> None:
    """Layer 1 of both; what is frozen of the student passes their gradient on."""
    flags = ("--micro-batch-size", "4", "--hidden-kd-layers", "1:1,3:3", "--train-only", "norms")
    logged, ended = run(workplace, "projections", 1, *flags)
    losses = logged["hidden distillation loss"]
    assert losses[-1] < losses[0]
    start = weights(workplace.student)
    moved = {key for key in start if not torch.equal(start[key], ended[key])}
    assert moved and all("norm" in key for key in moved)


def test_losses_of_routers_are_those_of_trained_ones() -> None:
    """Of each router by itself: a frozen one has no load-balancing loss, no z-loss, and a bias that stays."""
    (found,) = run_distributed(1, coefficients_of_routers, initialise=False)
    assert found == [(0, None, True), (0.5, 0.25, False), (0, None, True)]


def coefficients_of_routers() -> list[tuple[float, float | None, bool]]:
    """Body of a process: of two layers and the MTP block, of which the second layer's router is trained."""
    from megatron.core.transformer.moe.router import TopKRouter

    from megatron_slim.architecture.layer_specs import build_model, transformer_config
    from megatron_slim.compat import runtime
    from megatron_slim.distillation.model import DistillationModel, DistillationOptions
    from megatron_slim.training.frozen import freeze

    runtime.init_single_process()
    shape = tiny_shape(num_layers=2, layer_types=("linear_attention", "full_attention"))
    losses = {"moe_aux_loss_coeff": 0.5, "moe_z_loss_coeff": 0.25, "moe_router_load_balancing_type": "aux_loss"}
    options = DistillationOptions(shape.vocab_size)
    config = transformer_config(shape, **losses)
    model = build_model(shape, config, model_class=DistillationModel, options=options)
    assert isinstance(model, DistillationModel)
    freeze(model, shape, TrainOnly.of("experts,router@1"))
    routers = [module for module in model.modules() if isinstance(module, TopKRouter)]
    return [
        (each.get_aux_loss_coeff("aux_loss"), each.config.moe_z_loss_coeff, each.frozen_expert_bias) for each in routers
    ]
