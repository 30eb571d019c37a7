"""A distillation run gives the same losses and gradient norms under every parallel layout."""

from __future__ import annotations

import pytest

# Ranks, micro-batch size and flags. Micro-batch size times data-parallel size is two everywhere: the global-batch
# load-balancing loss counts routed tokens micro-batch by micro-batch, so what it has seen depends on that product.
PP2 = "--pipeline-model-parallel-size 2"
EP2 = "--expert-model-parallel-size 2"
LAYOUTS = {
    "pp2": (2, 2, PP2),
    "tp2-sp": (2, 2, "--tensor-model-parallel-size 2 --sequence-parallel"),
    "ep2": (2, 1, EP2),
    "dp2": (2, 1, ""),
    "pp2-ep2": (4, 1, f"{PP2} {EP2}"),
    "vpp2": (2, 2, f"{PP2} --num-virtual-stages-per-pipeline-rank 2"),
    # Buckets so small that the output layer has one of its own, gathered while earlier layers compute.
    "dp2-overlap": (2, 1, "--overlap-grad-reduce --overlap-param-gather --ddp-bucket-size 5000"),
    "per-token": (2, 1, "--calculate-per-token-loss"),
}
TERMS = (
    "lm loss",
    "logits distillation loss",
    "teacher lm loss",
    "mtp lm loss",
    "mtp distillation loss",
    "kd lambda",
    "mtp beta",
    "global_load_balancing_loss",
    "grad-norm",
)


def worst(found: list[float], expected: list[float]) -> float:
    """Largest relative difference over the steps."""
    assert len(found) == len(expected) == 5
    return max(abs(a - b) / abs(b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_same_losses_and_gradient_norms(workplace, reference, layout: str) -> None:  # type: ignore[no-untyped-def]
    ranks, micro_batch, flags = LAYOUTS[layout]
    found = workplace.train(layout, ranks, "--micro-batch-size", str(micro_batch), *flags.split())
    differences = {term: worst(found[term], reference[term]) for term in TERMS}
    assert max(differences.values()) <= 1e-5, differences
    assert reference["kd lambda"][0] == 1.0 and reference["kd lambda"][-1] == 0.75
    assert found["lm loss validation"] == pytest.approx(reference["lm loss validation"], rel=1e-5)


def test_lm_only_is_the_same_run_without_its_teacher(workplace) -> None:  # type: ignore[no-untyped-def]
    one = workplace.train("lm-one", 1, "--micro-batch-size", "2", distil=False)
    two = workplace.train("lm-pp2", 2, "--micro-batch-size", "2", *PP2.split(), distil=False)
    for term in ("lm loss", "mtp lm loss", "grad-norm"):
        assert worst(two[term], one[term]) <= 1e-5
    assert "logits distillation loss" not in one
