"""The optimizer's state through a pruning: the same slices as of the weights, and two ways to merge moments."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import megatron_slim.mcore

import numpy as np
import pytest
import torch
from torch import Tensor

import megatron_slim as slim
from megatron_slim.architecture.shape import FAMILIES, ModelShape
from megatron_slim.checkpoint import optimizer_state
from megatron_slim.checkpoint.convert import open_checkpoint, same_bytes, write_checkpoint
from megatron_slim.checkpoint.huggingface import HFCheckpoint
from megatron_slim.checkpoint.metadata_pickle import Metadata, dumps
from megatron_slim.checkpoint.optimizer_state import OptimizerState, open_optimizer_state
from megatron_slim.checkpoint.torch_dist_files import read_metadata
from megatron_slim.errors import CheckpointError, SlimError
from megatron_slim.pruning.experts import ExpertGroup
from megatron_slim.pruning.plan import Plan, make_plan
from megatron_slim.pruning.plan_reader import load_plan
from megatron_slim.pruning.statistics import Statistics
from megatron_slim.recipe import parse_recipe
from megatron_slim.recipe_run import DEFAULT_MOMENT_RULE, MOMENT_RULES
from megatron_slim.testing import tiny_shape, write_tiny_checkpoint
from tests.pruning import test_apply, test_inner_axes

PRUNE = "tools/prune_checkpoint.py"
STATES = ("param", "exp_avg", "exp_avg_sq")
MATRICES = ("gate_proj", "up_proj", "down_proj")
Stats = Callable[..., Statistics]


def trained(root: Path, shape: ModelShape) -> tuple[Path, dict[str, HFCheckpoint]]:
    """A torch_dist checkpoint with optimizer state after 7 steps, and what is in it by state; weights are ""."""
    made = {"": HFCheckpoint.open(write_tiny_checkpoint(root / "weights", shape))}
    for seed, state in enumerate(STATES, 11):
        path = write_tiny_checkpoint(root / state, shape, seed=seed, dtype=torch.float32)
        made[state] = HFCheckpoint.open(path)
    state = OptimizerState(7, {name: made[name] for name in STATES})
    write_checkpoint(made[""], root / "run", to="torch_dist", optimizer=state)
    return root / "run", made


@pytest.fixture(scope="module", params=FAMILIES)
def deep(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Of the sizes of ``source``."""
    return trained(tmp_path_factory.mktemp("deep"), tiny_shape(request.param, num_layers=8))


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """With groups of heads, as in the tests of inner axes."""
    groups, heads = test_inner_axes.GROUPS, test_inner_axes.GROUPS * test_inner_axes.PER_GROUP
    sizes = {"num_attention_heads": heads, "num_query_groups": groups}
    sizes |= {"linear_num_value_heads": heads, "linear_num_key_heads": groups}
    return trained(tmp_path_factory.mktemp("wide"), tiny_shape("qwen3_next", **sizes))


def same_state(found: OptimizerState, expected: OptimizerState) -> None:
    assert (found.step, list(found.tensors)) == (expected.step, list(expected.tensors))
    for name, tensors in expected.tensors.items():
        names = [key for key in tensors.names if not key.endswith(test_apply.NOT_TRAINED)]
        assert all(same_bytes(found.tensors[name].read(key), tensors.read(key)) for key in names), name


@pytest.fixture
def pruned(tool: Any, random_stats: Stats, tmp_path: Path) -> Callable[..., tuple[Plan, Any, OptimizerState]]:
    """Prunes with the command: plan, weights and optimizer state of the result."""

    def run(load: Path, target: dict[str, int], *flags: object, depth: str = "last", **experts: Any) -> Any:
        source = open_checkpoint(load)
        document = {"version": 1, "target": target, "depth": {"method": depth}, "experts": experts}
        plan = make_plan(parse_recipe(document), random_stats(source), source.shape)
        plan.save(tmp_path / "plan.json")
        command = (PRUNE, "--load", load, "--plan", tmp_path / "plan.json", "--to", "torch_dist", "--carry-optimizer")
        save = tmp_path / "pruned"
        done = tool(*command, "--save", save, *flags, "--json")
        assert done.code == 0, done
        written = open_checkpoint(save)
        found = open_optimizer_state(written)
        assert done.json["optimizer"] == {"step": 7, "states": list(STATES), "bytes": found.nbytes}
        assert found.step == 7 and tuple(found.tensors) == STATES
        rule = flags[flags.index("--moments-of-merged") + 1] if "--moments-of-merged" in flags else None
        carried: Any = {"carry_optimizer": True, "moments_of_merged": rule}
        from_python = slim.prune(load, plan, tmp_path / "from_python", to="torch_dist", **carried)
        assert from_python["content"] == done.json["content"]
        same_state(open_optimizer_state(open_checkpoint(tmp_path / "from_python")), found)
        return plan, written, found

    return run


@pytest.mark.one_case
@pytest.mark.parametrize("processes", [1, 3])
def test_kept_layers_channels_and_experts_are_the_sources_bytes(deep: Any, pruned: Any, processes: int) -> None:
    run, made = deep
    plan, written, state = pruned(
        run, test_apply.TARGET, "--processes", processes, depth="adjacent_cosine", method="prune"
    )
    for name, found in {"": written, **state.tensors}.items():
        for tensor in found.names:
            assert same_bytes(found.read(tensor), test_apply.expected_tensor(tensor, plan, made[name].read)), tensor


@pytest.mark.slow
def test_kept_neurons_and_heads_are_the_sources_bytes(wide: Any, pruned: Any) -> None:
    run, made = wide
    plan, written, state = pruned(run, test_inner_axes.NEXT_TARGET, method="prune")
    for name, found in {"": written, **state.tensors}.items():
        for tensor in found.names:
            assert same_bytes(found.read(tensor), test_inner_axes.by_hand(tensor, plan, made[name].read)), tensor


def members_of(tensors: HFCheckpoint, name: Callable[[int], str], group: ExpertGroup, hidden: Any) -> list[Any]:
    """What survives of the members of a group, in float64."""
    parts = [tensors.read(name(member)).double().numpy() for member in group.members]
    return [part[hidden] if "down_proj" in name(0) else part[:, hidden] for part in parts]


@pytest.mark.one_case
@pytest.mark.parametrize("rule", [*MOMENT_RULES, None])
def test_moments_of_merged_experts(deep: Any, pruned: Any, rule: str | None) -> None:
    """Main weights in fp32 and with the plan's shares; moments by the rule, in numpy."""
    run, made = deep
    flags = () if rule is None else ("--moments-of-merged", rule)
    plan, _, state = pruned(
        run, {"num_moe_experts": 3, "moe_router_topk": 2, "hidden_size": 40}, *flags, method="merge"
    )
    hidden, merged = np.array(plan.kept_hidden), 0
    for block, groups in plan.experts.items():
        for new, group in enumerate(groups):
            merged += len(group.members) > 1
            for matrix in MATRICES:
                name = f"{plan.source_shape.hf_prefix(block)}.mlp.experts.{{}}.{matrix}.weight".format
                shares = np.array(group.weights)
                mean = sum(
                    share * part
                    for share, part in zip(shares, members_of(made["param"], name, group, hidden), strict=True)
                )
                np.testing.assert_allclose(state.tensors["param"].read(name(new)).numpy(), mean, rtol=0, atol=1e-7)
                for moment in ("exp_avg", "exp_avg_sq"):
                    found = state.tensors[moment].read(name(new)).numpy()
                    parts = members_of(made[moment], name, group, hidden)
                    if (rule or DEFAULT_MOMENT_RULE) == "base":
                        assert np.array_equal(found, parts[group.members.index(group.base)].astype(np.float32))
                    else:
                        np.testing.assert_allclose(found, sum(parts), rtol=0, atol=1e-6)
    assert merged and DEFAULT_MOMENT_RULE in MOMENT_RULES


def permuted(tensors: HFCheckpoint, seed: int) -> HFCheckpoint:
    """Every expert the first one of its block, with its neurons in another order; the same orders for the same seed."""
    from safetensors.torch import save_file

    rng = torch.Generator().manual_seed(seed)
    found: dict[str, Tensor] = {name: tensors.read(name) for name in tensors.names}
    for block in tensors.shape.blocks:
        for expert in range(1, tensors.shape.num_moe_experts):
            order = torch.randperm(tensors.shape.moe_ffn_hidden_size, generator=rng)
            for matrix in MATRICES:
                first = found[f"{block}.mlp.experts.0.{matrix}.weight"]
                part = first[:, order] if matrix == "down_proj" else first[order]
                found[f"{block}.mlp.experts.{expert}.{matrix}.weight"] = part.contiguous()
    target = tensors.path.with_name(f"{tensors.path.name}-permuted")
    target.mkdir()
    save_file(found, target / "model.safetensors")
    shutil.copy(tensors.path / "config.json", target)
    return HFCheckpoint.open(target)


@pytest.mark.slow
def test_neurons_of_moments_follow_those_of_aligned_weights(pruned: Any, tmp_path: Path) -> None:
    """Copies of one expert whose neurons were shuffled: the sum is as many times the base's, neuron by neuron."""
    _, made = trained(tmp_path, tiny_shape(num_layers=4))
    copies = {name: permuted(tensors, seed=3) for name, tensors in made.items()}
    state = OptimizerState(7, {name: copies[name] for name in STATES})
    write_checkpoint(copies[""], tmp_path / "copies", to="torch_dist", optimizer=state)
    target = {"num_moe_experts": 3, "moe_router_topk": 2}
    flags = ("--moments-of-merged", "sum")
    plan, _, found = pruned(tmp_path / "copies", target, *flags, method="merge", align="weights")
    for block, groups in plan.experts.items():
        for new, group in enumerate(groups):
            for matrix in MATRICES:
                name = f"{plan.source_shape.hf_prefix(block)}.mlp.experts.{{}}.{matrix}.weight".format
                for moment, times in (
                    ("param", 1),
                    ("exp_avg", len(group.members)),
                    ("exp_avg_sq", len(group.members)),
                ):
                    expected = times * copies[moment].read(name(group.base))
                    torch.testing.assert_close(found.tensors[moment].read(name(new)), expected, rtol=1e-6, atol=1e-8)


@contextlib.contextmanager
def edited_metadata(directory: Path) -> Iterator[Metadata]:
    """The metadata of a checkpoint, written back without what would show that they were changed."""
    metadata = read_metadata(directory)
    yield metadata
    (directory / ".metadata").write_bytes(dumps(metadata))
    (directory / "integrity.json").unlink()


def test_steps_that_differ_are_refused(deep: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As groups of parameters would have them that began at different times."""
    source = open_checkpoint(deep[0])
    groups = {"optimizer": {0: {"optimizer": {"param_groups": [{"step": 3}, {"step": 5}]}}, 1: {}}}
    monkeypatch.setattr(optimizer_state, "read_plain_state", lambda *_: [groups])
    with pytest.raises(CheckpointError, match=r"its optimizer has no one number of steps \(3, 5\); prune another"):
        open_optimizer_state(source)
    groups["optimizer"][0]["optimizer"]["param_groups"][0]["step"] = 5
    assert open_optimizer_state(source).step == 5


def test_what_is_not_an_optimizers_state_is_refused_before_work_starts(
    tool: Any, deep: Any, random_stats: Stats, tmp_path: Path
) -> None:
    run, made = deep
    source = open_checkpoint(run)
    make_plan(parse_recipe({"version": 1, "target": {"num_layers": 4}}), random_stats(source), source.shape).save(
        tmp_path / "plan.json"
    )
    write_checkpoint(made[""], tmp_path / "bare", to="torch_dist")
    partly = OptimizerState(7, {name: made[name] for name in ("exp_avg", "exp_avg_sq")})
    write_checkpoint(made[""], tmp_path / "partly", to="torch_dist", optimizer=partly)

    def refused(load: Path, *flags: object, to: str = "torch_dist") -> str:
        command = (PRUNE, "--load", load, "--plan", tmp_path / "plan.json", "--save", tmp_path / "out", "--to", to)
        done = tool(*command, *flags)
        assert done.code == 2 and not (tmp_path / "out").exists()
        return str(done.error)

    with edited_metadata(shutil.copytree(run, tmp_path / "damaged") / "release") as metadata:
        key = "optimizer.state.exp_avg.decoder.final_layernorm.weight"
        del metadata.state_dict_metadata[key]
    flag = "--carry-optimizer"
    assert (
        "its optimizer state does not fit the weights: exp_avg of decoder.final_layernorm.weight is missing; prune "
        "another iteration" in refused(tmp_path / "damaged", flag)
    )
    assert "is a Hugging Face checkpoint, which has no optimizer state; give the torch_dist" in refused(
        made[""].path, flag
    )
    assert "has no optimizer state by the names of weights; give an iteration" in refused(tmp_path / "bare", flag)
    assert "--carry-optimizer with --to hf, which holds no optimizer state; give --to torch_dist" in refused(
        run, flag, to="hf"
    )
    assert "--moments-of-merged without --carry-optimizer" in refused(run, "--moments-of-merged", "sum")
    for wrong, message in (
        ({"carry_optimizer": True}, "--carry-optimizer with --to hf, which holds no optimizer state"),
        ({"moments_of_merged": "sum"}, "--moments-of-merged without --carry-optimizer"),
        (
            {"carry_optimizer": True, "moments_of_merged": "mean"},
            "moments_of_merged 'mean' is unknown; give sum or base",
        ),
    ):
        with pytest.raises(SlimError, match=message):
            slim.prune(run, load_plan(tmp_path / "plan.json"), tmp_path / "out", **wrong)  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match="the format hf holds no optimizer state; write torch_dist"):
        write_checkpoint(made[""], tmp_path / "out", to="hf", optimizer=partly)
    assert tuple(open_optimizer_state(open_checkpoint(tmp_path / "partly")).tensors) == ("exp_avg", "exp_avg_sq")


def test_values_that_are_not_finite_are_named_with_their_state(tool: Any, random_stats: Stats, tmp_path: Path) -> None:
    shape = tiny_shape(num_layers=4)
    _, made = trained(tmp_path, shape)
    broken = HFCheckpoint.open(made["exp_avg"].path, allow_nonfinite=True)
    name = "model.layers.1.input_layernorm.weight"
    read = broken.read_rows
    broken.read_rows = lambda key, *index: read(key, *index).fill_(float("nan")) if key == name else read(key, *index)  # type: ignore[method-assign]
    state = OptimizerState(7, {"exp_avg": broken, "exp_avg_sq": made["exp_avg_sq"]})
    write_checkpoint(made[""], tmp_path / "broken", to="torch_dist", optimizer=state, verify=False)
    source = open_checkpoint(tmp_path / "broken")
    make_plan(parse_recipe({"version": 1, "target": {"hidden_size": 40}}), random_stats(source), shape).save(
        tmp_path / "plan"
    )
    command = (PRUNE, "--load", source.path.parent, "--plan", tmp_path / "plan", "--save", tmp_path / "out")
    done = tool(*command, "--to", "torch_dist", "--carry-optimizer")
    assert done.code == 2 and f"exp_avg of {name}: 40 of 40 values are NaN or infinite" in done.error
    assert not (tmp_path / "out").exists()
