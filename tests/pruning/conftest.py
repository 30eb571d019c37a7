"""A small model, statistics drawn at random for it, and plans made of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_slim.architecture.feed_forward import EXPERT_NEURONS
from megatron_slim.architecture.kinds import KINDS
from megatron_slim.architecture.shape import FULL_ATTENTION, ModelShape
from megatron_slim.checkpoint.huggingface import HFCheckpoint
from megatron_slim.pruning import statistics
from megatron_slim.pruning.plan import Plan, make_plan
from megatron_slim.pruning.statistics import FORMAT, Statistics, expected_shapes
from megatron_slim.recipe import parse_recipe
from megatron_slim.streaming.fingerprint import fingerprint
from megatron_slim.testing import tiny_shape, write_tiny_checkpoint
from tests.mtp_oracle import load_mtp, mtp_hidden


@pytest.fixture(scope="session")
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> HFCheckpoint:
    """Eight layers, eight experts, hidden size 64, one MTP block, bf16; or, by parametrisation, of another family."""
    shape = tiny_shape(getattr(request, "param", "qwen3_next"), num_layers=8)
    path = write_tiny_checkpoint(tmp_path_factory.mktemp("model") / "hf", shape)
    (path / "tokenizer.json").write_text("{}")
    return HFCheckpoint.open(path)


def rewritten(source: HFCheckpoint, tensors: Mapping[str, Tensor], path: Path) -> HFCheckpoint:
    """The same files in a new directory, with these tensors."""
    path.mkdir()
    for file in source.path.iterdir():
        if file.suffix == ".safetensors":
            save_file({name: tensors[name] for name in load_file(file)}, path / file.name)
        else:
            (path / file.name).write_bytes(file.read_bytes())
    return HFCheckpoint.open(path)


@pytest.fixture(scope="session")
def random_stats() -> Callable[..., Statistics]:
    """Makes statistics for a checkpoint: ``random_stats(source, seed=0)``."""

    def make(source: Any, seed: int = 0) -> Statistics:
        rng = np.random.default_rng(seed)
        shape: ModelShape = source.shape
        tensors = {key: np.asarray(rng.random(size), dtype=np.float32) for key, size in expected_shapes(shape)}
        return Statistics(tensors, {"format": FORMAT, "source_sha256": fingerprint(source)})

    return make


@pytest.fixture(scope="session")
def plan_for(source: HFCheckpoint, random_stats: Callable[..., Statistics]) -> Callable[..., Plan]:
    """Makes a plan for ``source``: ``plan_for({"num_layers": 4}, method="merge")``."""

    def make(target: dict[str, int], seed: int = 0, depth: str = "last", **experts: Any) -> Plan:
        document = {"version": 1, "target": target, "depth": {"method": depth}, "experts": experts}
        return make_plan(parse_recipe(document), random_stats(source, seed), source.shape)

    return make


class Reference:
    """All statistics, from transformers' fp32 hidden states, in fp64 and without Megatron."""

    def __init__(self, checkpoint: HFCheckpoint, samples: np.ndarray) -> None:
        from transformers import AutoModelForCausalLM

        self.checkpoint, self.shape = checkpoint, checkpoint.shape
        self.tokens = torch.from_numpy(samples)
        self.model = AutoModelForCausalLM.from_pretrained(
            checkpoint.path, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        self.seen: dict[str, Tensor] = {}
        for index, layer in enumerate(self.model.model.layers):
            for name in ("input_layernorm", "post_attention_layernorm"):
                self._watch(f"{index}.{name}", getattr(layer, name))
            self._watch(f"{index}.output", layer)
            mixer = layer.self_attn.o_proj if hasattr(layer, "self_attn") else layer.linear_attn.out_proj
            self._watch_input(f"{index}.heads", mixer)
        self._watch("norm", self.model.model.norm)
        self._watch("embedding", self.model.model.embed_tokens)
        with torch.no_grad():
            self.model(self.tokens, use_cache=False)
            self.trunk = dict(self.seen)
            if self.shape.mtp_num_layers:
                self._run_mtp_block()

    def _watch(self, name: str, module: torch.nn.Module) -> None:
        def keep(module: Any, args: Any, output: Any) -> None:
            self.seen[name] = (output[0] if isinstance(output, tuple) else output).detach().double()

        module.register_forward_hook(keep)

    def _watch_input(self, name: str, module: torch.nn.Module) -> None:
        def keep(module: Any, args: Any) -> None:
            self.seen[name] = args[0].detach().double()

        module.register_forward_pre_hook(keep)

    def weight(self, name: str) -> Tensor:
        return self.checkpoint.read(name).double()

    def _run_mtp_block(self) -> None:
        """transformers' own, watched as the trunk's layers are."""
        mtp = load_mtp(self.model)
        layer = mtp.layers[0].mtp_block
        self._watch("mtp.before", mtp.layers[0].eh_proj)
        self._watch("mtp.moe", layer.post_attention_layernorm)
        self._watch("mtp.after", layer)
        self._watch_input("mtp.heads", layer.self_attn.o_proj)
        mtp_hidden(mtp, self.seen["norm"].float(), self.tokens)
        self.mtp = {name: self.seen[f"mtp.{name}"] for name in ("before", "after", "moe", "heads")}

    def _gate_up(self, x: Tensor, prefix: str) -> Tensor:
        gate, up = (x @ self.weight(f"{prefix}.{name}_proj.weight").T for name in ("gate", "up"))
        return torch.nn.functional.silu(gate) * up

    def _routing(self, block: str, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        logits = x @ self.weight(f"{block}.mlp.gate.weight").T
        probabilities = ranked = logits.softmax(-1)
        if f"{block}.mlp.gate.e_score_correction_bias" in self.checkpoint.names:
            probabilities = logits.sigmoid()
            ranked = probabilities + self.weight(f"{block}.mlp.gate.e_score_correction_bias")
        chosen = torch.zeros_like(logits, dtype=torch.bool)
        chosen.scatter_(1, ranked.topk(self.shape.moe_router_topk).indices, True)
        shares = probabilities * chosen / (probabilities * chosen).sum(-1, keepdim=True)
        gates = shares if self.shape.norm_topk_prob else probabilities * chosen
        return logits, chosen, shares, gates * self.shape.moe_router_topk_scaling_factor

    def network(self, block: str, inputs: Tensor) -> dict[str, np.ndarray]:
        x, hf = inputs.flatten(0, 1), self.shape.hf_prefix(block)
        if f"{hf}.mlp.gate_proj.weight" in self.checkpoint.names:
            return {f"{block}.mlp.ffn": self._gate_up(x, f"{hf}.mlp").abs().mean(0).numpy()}
        return self.experts(block, hf, x)

    def experts(self, block: str, hf: str, x: Tensor) -> dict[str, np.ndarray]:
        logits, chosen, shares, gates = self._routing(hf, x)
        count, ffn = self.shape.num_moe_experts, self.shape.moe_ffn_hidden_size
        reap, norms = torch.zeros(count).double(), torch.zeros(count).double()
        vectors, neurons = torch.zeros(count, x.shape[1]).double(), torch.zeros(count, ffn).double()
        for expert in range(count):
            prefix = f"{hf}.mlp.experts.{expert}"
            inner = self._gate_up(x[chosen[:, expert]], prefix)
            output = inner @ self.weight(f"{prefix}.down_proj.weight").T
            if len(inner):
                lengths = output.square().sum(-1).sqrt()
                reap[expert] = (gates[chosen[:, expert], expert] * lengths).mean()
                norms[expert] = lengths.sum() / len(x)
                vectors[expert], neurons[expert] = output.mean(0), inner.abs().mean(0)
        found = {
            statistics.importance_key(block, "frequency"): chosen.double().mean(0).numpy(),
            statistics.importance_key(block, "soft_logits"): shares.mean(0).numpy(),
            statistics.importance_key(block, "reap"): reap.numpy(),
            statistics.importance_key(block, "output_norm"): norms.numpy(),
            statistics.similarity_key(block, "router_weights"): cosines(self.weight(f"{hf}.mlp.gate.weight")),
            statistics.similarity_key(block, "router_logits"): cosines(logits.T),
            statistics.similarity_key(block, "expert_vectors"): cosines(vectors),
            statistics.axis_key(block, EXPERT_NEURONS): neurons.numpy(),
        }
        if self.shape.moe_shared_expert_intermediate_size:
            is_glm = f"{hf}.mlp.shared_experts.up_proj.weight" in self.checkpoint.names
            shared = "shared_experts" if is_glm else "shared_expert"
            activations = self._gate_up(x, f"{hf}.mlp.{shared}")
            found[f"{block}.mlp.shared_expert.ffn"] = activations.abs().mean(0).numpy()
        return found

    def block(self, block: str, before: Tensor, after: Tensor, moe: Tensor, heads: Tensor) -> dict[str, np.ndarray]:
        kind = self.shape.layer_type(block)
        dim = self.shape.kv_channels if kind == FULL_ATTENTION else self.shape.linear_value_head_dim
        lengths = heads.unflatten(-1, (-1, dim)).square().sum(-1).sqrt()
        pooled, made = before.mean((0, 1)), after.mean((0, 1))
        each = (before * after).sum(-1) / before.square().sum(-1).sqrt() / after.square().sum(-1).sqrt()
        return self.network(block, moe) | {
            statistics.layer_key(block, "cosine"): (pooled @ made / pooled.norm() / made.norm()).numpy(),
            statistics.layer_key(block, "block_influence"): (1 - each.mean()).numpy(),
            statistics.axis_key(block, KINDS[kind].heads): lengths.mean((0, 1)).numpy(),
        }

    def all(self) -> dict[str, np.ndarray]:
        found: dict[str, np.ndarray] = {}
        sites, seen = ["norm"], self.trunk
        for layer in range(self.shape.num_layers):
            before = seen["embedding" if layer == 0 else f"{layer - 1}.output"]
            moe = seen[f"{layer}.post_attention_layernorm"]
            found |= self.block(f"model.layers.{layer}", before, seen[f"{layer}.output"], moe, seen[f"{layer}.heads"])
            sites += [f"{layer}.input_layernorm", f"{layer}.post_attention_layernorm"]
        means = [seen[site].abs().mean(1) for site in sites]
        first = sum(mean.mean(0) for mean in means) / self.shape.num_layers
        second = sum(mean.square().sum(0).sqrt() for mean in means) / self.shape.num_layers
        found[statistics.hidden_key("norm_activation")] = first.numpy()
        found[statistics.hidden_key("norm_activation_l2")] = second.numpy()
        if self.shape.mtp_num_layers:
            found |= self.block("mtp.layers.0", **self.mtp)
        return found


def cosines(rows: Tensor) -> np.ndarray:
    lengths = rows.norm(dim=-1, keepdim=True)
    unit = torch.where(lengths > 0, rows / lengths, torch.zeros_like(rows))
    return (unit @ unit.T).numpy()


def tolerance(key: str, values: np.ndarray) -> float:
    """Absolute tolerance: what passes through zero is compared on its scale.

    That is cosines of random vectors, of scale 1, and the activation of a neuron of an expert that few tokens visit.
    """
    if "similarity" in key:
        return 1e-5
    return 1e-5 * float(np.abs(values).max()) if key.endswith("experts.ffn") else 0


@pytest.fixture(scope="session")
def fp64_statistics() -> Callable[[HFCheckpoint, np.ndarray], dict[str, np.ndarray]]:
    """All statistics of a checkpoint on samples, computed without Megatron."""
    return lambda source, samples: Reference(source, samples).all()


@pytest.fixture(scope="session")
def assert_close() -> Callable[..., None]:
    """Compares complete sets of statistics to 1e-5."""

    def check(found: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray], what: str = "") -> None:
        assert found.keys() == expected.keys()
        for key, values in expected.items():
            np.testing.assert_allclose(
                found[key], values, rtol=1e-5, atol=tolerance(key, values), err_msg=f"{what} {key}"
            )

    return check
