"""Metrics, divergences and a family from outside the package: measured, planned with, converted, pruned."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import megatron_slim.mcore

import numpy as np
import pytest
import torch
from torch import Tensor

import megatron_slim as slim
from megatron_slim.architecture.qwen3_moe import QWEN3_MOE
from megatron_slim.architecture.shape import FAMILIES
from megatron_slim.architecture.weight import HFTensor, Weight
from megatron_slim.checkpoint.convert import same_bytes
from megatron_slim.checkpoint.huggingface import HFCheckpoint
from megatron_slim.command_line import tool_parser
from megatron_slim.distillation.divergences import DIVERGENCES, KDLoss
from megatron_slim.distillation.loss_options import KD_LOSSES
from megatron_slim.distillation.vocabulary import VocabShard
from megatron_slim.expert_metrics import EXPERT_IMPORTANCES, EXPERT_SIMILARITIES, ExpertMetric, cosine_matrix
from megatron_slim.streaming.fingerprint import fingerprint
from megatron_slim.testing import tiny_shape, write_tiny_checkpoint
from tests.pruning.conftest import Reference

ENERGY = ExpertMetric(
    "mean 1[i in A(x)] ||E_i(x)||^2",
    lambda sums: sums["experts.energy"] / sums["tokens"],
    {"energy": lambda pairs: pairs.lengths.square()},
)
TARGET = {"num_moe_experts": 4}


class WithEnergy(Reference):
    """The reference with one more importance."""

    def experts(self, block: str, hf: str, x: Tensor) -> dict[str, np.ndarray]:
        _, chosen, _, _ = self._routing(hf, x)
        energy = torch.zeros(self.shape.num_moe_experts).double()
        for expert in range(len(energy)):
            prefix = f"{hf}.mlp.experts.{expert}"
            output = self._gate_up(x[chosen[:, expert]], prefix) @ self.weight(f"{prefix}.down_proj.weight").T
            energy[expert] = output.square().sum() / len(x)
        return super().experts(block, hf, x) | {f"{block}.mlp.experts.output_energy": energy.numpy()}


def test_a_metric_from_outside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, assert_close: Callable[..., None]
) -> None:
    source = HFCheckpoint.open(write_tiny_checkpoint(tmp_path / "hf", tiny_shape(), dtype=torch.float32))
    samples = np.random.default_rng(1).integers(0, 128, (4, 20))
    before = slim.calibrate(source, samples)
    asked = {"version": 1, "target": TARGET, "experts": {"method": "prune", "importance": "output_energy"}}
    with pytest.raises(slim.SlimError, match=r"experts.importance 'output_energy' is unknown"):
        slim.read_recipe(asked)

    monkeypatch.setitem(EXPERT_IMPORTANCES, "output_energy", ENERGY)
    recipe = slim.read_recipe(asked)
    after = slim.calibrate(source, samples)
    assert_close(after.tensors, WithEnergy(source, samples).all())
    plan = slim.make_plan(recipe, source, after)
    for block, groups in plan.experts.items():
        values = after.tensors[f"{block}.mlp.experts.output_energy"]
        assert [group.base for group in groups] == sorted(np.argsort(-values, kind="stable")[:4].tolist())
    assert "output_energy" in str(plan) or plan.recipe.experts.importance == "output_energy"

    # What was measured before serves every recipe that does not name it.
    before.check(source.shape, fingerprint(source))
    with pytest.raises(slim.SlimError, match=r"no model.layers.0.mlp.experts.output_energy, which this recipe needs"):
        slim.make_plan(recipe, source, before)
    known = slim.read_recipe({"version": 1, "target": TARGET})
    assert slim.make_plan(known, source, before).experts == slim.make_plan(known, source, after).experts
    # And what has it is read where nobody knows it.
    after.save(tmp_path / "stats")
    monkeypatch.delitem(EXPERT_IMPORTANCES, "output_energy")
    slim.make_plan(known, source, slim.read_statistics(tmp_path / "stats"))


def test_a_similarity_from_outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the experts' outputs without their mean over experts."""

    def centred(sums: dict[str, Tensor]) -> Tensor:
        outputs = sums["experts.output"] / sums["experts.count"].clamp(min=1)[:, None]
        return cosine_matrix(outputs - outputs.mean(0))

    monkeypatch.setitem(EXPERT_SIMILARITIES, "centred", ExpertMetric("centred cosine", centred))
    source = HFCheckpoint.open(write_tiny_checkpoint(tmp_path / "hf", tiny_shape()))
    stats = slim.calibrate(source, np.random.default_rng(1).integers(0, 128, (4, 20)))
    recipe = slim.read_recipe({"version": 1, "target": TARGET, "experts": {"method": "merge", "similarity": "centred"}})
    plan = slim.make_plan(recipe, source, stats)
    found = stats.tensors["model.layers.0.mlp.experts.similarity.centred"]
    assert found.shape == (8, 8) and np.allclose(found.diagonal(), 1)
    assert sum(len(group.members) for group in plan.experts["model.layers.0"]) == 8


@pytest.mark.parametrize(
    ("name", "sums", "message"),
    [
        ("energy", {"norm": lambda pairs: pairs.lengths.square()}, "two sums of experts are called 'norm'"),
        ("energy", {"count": lambda pairs: pairs.lengths}, "two sums of experts are called 'count'"),
        ("ffn", {}, "a metric of experts may not be called 'ffn'"),
    ],
)
def test_names_that_are_taken(
    name: str, sums: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(EXPERT_IMPORTANCES, name, ExpertMetric("x", lambda sums: sums["tokens"], sums))
    source = write_tiny_checkpoint(tmp_path / "hf", tiny_shape())
    with pytest.raises(slim.SlimError, match=message):
        slim.calibrate(source, np.zeros((1, 4), dtype=np.int64))


def total_variation(log_q: Tensor, log_p: Tensor, shard: VocabShard, q: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    """Half the sum of |q - p|; its gradient is q (s - sum of q s) with s = sign(q - p) / 2."""
    difference = torch.sub(q, p, out=log_q)
    half_sign = difference.sign().mul_(0.5)
    value, mean = shard.reduce(torch.stack([difference.abs().sum(-1) / 2, (q * half_sign).sum(-1)]))
    return value, half_sign.sub_(mean[:, None]).mul_(q)


def test_a_divergence_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_slim.training.slim_arguments import add_slim_arguments

    monkeypatch.setitem(KD_LOSSES, "total-variation", "half the sum of |q - p|")
    monkeypatch.setitem(DIVERGENCES, "total-variation", total_variation)
    parser = tool_parser("")
    add_slim_arguments(parser)
    assert parser.parse_args(["--kd-loss", "total-variation"]).kd_loss == "total-variation"
    logits = torch.randn(5, 30, dtype=torch.float64, requires_grad=True)
    log_q, log_p = logits.log_softmax(-1), torch.randn(5, 30, dtype=torch.float64).log_softmax(-1)
    expected = (log_q.exp() - log_p.exp()).abs().sum(-1) / 2
    expected.sum().backward()
    with torch.no_grad():
        parts = log_q.clone(), log_p, VocabShard(0, 30, None), log_q.exp(), log_p.exp()
        value, gradient = KDLoss("total-variation").divergence(*parts)
    torch.testing.assert_close(value, expected.detach())
    assert logits.grad is not None
    torch.testing.assert_close(gradient, logits.grad)


def _renamed(row: Weight) -> Weight:
    """Qwen3-MoE's row with Mixtral's names."""
    names = {"mlp.gate": "block_sparse_moe.gate", "mlp.experts": "block_sparse_moe.experts"}
    names |= {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}

    def name(text: str) -> str:
        for theirs, ours in names.items():
            text = text.replace(theirs, ours)
        return text

    return replace(row, sources=tuple(HFTensor(name(t.name), t.dims) for t in row.sources), fused=None)


def test_a_family_from_outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It converts byte for byte, is measured, pruned and evaluated; the model is Qwen3-MoE under other names."""
    rows = {kind: tuple(map(_renamed, rows)) for kind, rows in QWEN3_MOE.rows.items()}
    toy = replace(QWEN3_MOE, model_type="toy_moe", architecture="ToyMoeForCausalLM", rows=rows)
    monkeypatch.setitem(FAMILIES, "toy_moe", toy)
    write_tiny_checkpoint(tmp_path / "toy", tiny_shape("toy_moe"), dtype=torch.float32)
    write_tiny_checkpoint(tmp_path / "known", tiny_shape("qwen3_moe"), dtype=torch.float32)
    source, known = slim.open_checkpoint(tmp_path / "toy"), slim.open_checkpoint(tmp_path / "known")
    assert "model.layers.0.block_sparse_moe.experts.3.w1.weight" in source.names
    slim.convert(source, tmp_path / "dist", to="torch_dist")
    slim.convert(tmp_path / "dist", tmp_path / "back", to="hf")
    back = slim.open_checkpoint(tmp_path / "back")
    assert all(same_bytes(source.read(name), back.read(name)) for name in source.names)

    samples = np.random.default_rng(1).integers(0, 128, (4, 20))
    recipe = slim.read_recipe({"version": 1, "target": {**TARGET, "hidden_size": 48}})
    losses = []
    for checkpoint, save in ((source, "small"), (known, "known-small")):
        stats = slim.calibrate(checkpoint, samples)
        slim.prune(checkpoint, slim.make_plan(recipe, checkpoint, stats), tmp_path / save)
        losses += [slim.evaluate(each, samples).loss for each in (checkpoint, tmp_path / save)]
    assert losses[:2] == losses[2:]
