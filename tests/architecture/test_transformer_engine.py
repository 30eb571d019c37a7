"""Models of Transformer Engine's modules: the same function as ours, and FP8 where it belongs."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_slim.architecture.fp8_sizes import RECIPES, size_violations
from megatron_slim.architecture.shape import FULL_ATTENTION, LINEAR_ATTENTION, ModelShape
from megatron_slim.testing import tiny_shape, write_tiny_checkpoint
from tests.engine import run_with_engine

# All of whose sizes every recipe takes: in_proj has 2 x 32 + 2 x 256 + 2 x 16 = 19 x 32 outputs.
SHAPE = tiny_shape(
    num_layers=2,
    layer_types=(LINEAR_ATTENTION, FULL_ATTENTION),
    linear_num_value_heads=16,
    num_moe_experts=4,
)
LOCAL: dict[str, Any] = {"transformer_impl": "local"}
ENGINE = {"transformer_impl": "transformer_engine", "gradient_accumulation_fusion": False}
GROUPED = ENGINE | {"moe_grouped_gemm": True}


def _model(shape: ModelShape, *, is_teacher: bool = False, teacher: Any = None, **fields: Any) -> Any:
    """A student, with ``teacher`` if there is one; or a model that is to be a teacher."""
    from megatron_slim.architecture.hidden_states import HiddenStatesModel
    from megatron_slim.architecture.layer_specs import build_model, transformer_config
    from megatron_slim.distillation.model import DistillationModel
    from megatron_slim.distillation.options import DistillationOptions

    config = transformer_config(shape, **fields)
    if is_teacher:
        return build_model(shape, config, model_class=HiddenStatesModel)
    options = DistillationOptions(shape.vocab_size)
    return build_model(shape, config, model_class=DistillationModel, options=options, teacher=teacher)


def _loaded(shape: ModelShape, directory: Path, **fields: Any) -> Any:
    from megatron_slim.checkpoint.convert import open_checkpoint
    from megatron_slim.checkpoint.loading import load_hf_weights

    model = _model(shape, **fields)
    load_hf_weights(model, open_checkpoint(directory))
    return model


def _packed_losses(model: Any) -> Tensor:
    """All terms on 32 tokens of four documents, summed; of MTP heads also those that look across, which both have."""
    tokens = torch.randint(0, SHAPE.vocab_size, (1, 33), generator=torch.Generator().manual_seed(0))
    positions = torch.cat([torch.arange(n) for n in (9, 1, 15, 7)])[None]
    total: Tensor = model(tokens[:, :-1], positions, None, tokens[:, 1:]).sum()
    return total


def _losses(model: Any) -> Tensor:
    """All terms of the loss on the same 2 x 32 tokens, summed."""
    tokens = torch.randint(0, SHAPE.vocab_size, (2, 33), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(32).expand(2, 32)
    total: Tensor = model(tokens[:, :-1], positions, None, tokens[:, 1:]).sum()
    return total


def _by_table(model: Any) -> dict[str, Tensor]:
    """Gradients under names that do not distinguish grouped experts from single ones."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

    for parameter in model.parameters():
        parameter.data = parameter.grad
    state = model.sharded_state_dict()
    apply_factories(state)
    tensors = (value for value in nested_values(state) if isinstance(value, ShardedTensor))
    return {f"{value.key} {value.global_offset}": value.data for value in tensors}


def check_specs(work: Path) -> None:
    """Losses and gradients of single and grouped experts of Transformer Engine, against Megatron's own modules.

    Of two samples, and of one whose documents do not see each other.
    """
    shapes = (SHAPE, tiny_shape("qwen3_moe", num_layers=2))
    for shape, apart in itertools.product(shapes, (False, True)):
        directory = write_tiny_checkpoint(work / f"{shape.model_type}-{apart}", shape, dtype=torch.float32)
        expected = None
        for fields in (LOCAL, ENGINE, GROUPED):
            model = _loaded(shape, directory, **fields)
            model.apart = apart
            loss = _packed_losses(model) if apart else _losses(model)
            loss.backward()
            found = loss.detach(), _by_table(model)
            expected = expected or found
            # fp32, sums in another order.
            assert torch.allclose(found[0], expected[0], rtol=1e-6), (found[0], expected[0])
            assert found[1].keys() == expected[1].keys()
            for name, gradient in expected[1].items():
                error = (found[1][name] - gradient).norm() / gradient.norm().clamp(min=1e-6)
                assert error < 2e-5, (fields, name, error)


def check_types(work: Path) -> None:
    """What stays in fp32 in bf16 training: losses and gradients of Megatron's own modules, to rounding."""
    from megatron_slim.checkpoint.convert import open_checkpoint
    from megatron_slim.checkpoint.loading import load_hf_weights
    from megatron_slim.checkpoint.precision import keep_types

    kept = ("A_log", "dt_bias", "out_norm.weight")
    directory = write_tiny_checkpoint(work / "mixed", SHAPE, float32=("A_log", "dt_bias", "linear_attn.norm.weight"))
    found = []
    for fields in (LOCAL, GROUPED):
        model = _model(SHAPE, **fields, params_dtype=torch.bfloat16, bf16=True)
        keep_types([model], open_checkpoint(directory))
        load_hf_weights(model, open_checkpoint(directory))
        loss = _losses(model.bfloat16())
        loss.backward()
        named = dict(model.named_parameters())
        assert {name for name in named if named[name].dtype == torch.float32} == {
            f"decoder.layers.0.self_attention.{name}" for name in kept
        }
        found.append((loss.detach(), {name: named[f"decoder.layers.0.self_attention.{name}"].grad for name in kept}))
    (expected, gradients), (loss, others) = found
    assert torch.allclose(loss, expected, rtol=1e-3)
    for name in kept:
        assert others[name].dtype == torch.float32
        assert (others[name] - gradients[name]).norm() < 0.1 * gradients[name].norm(), name


def _engine_calls() -> list[Any]:
    from transformer_engine.pytorch import fp8  # type: ignore[import-not-found]

    calls = list(fp8.calls)
    fp8.calls.clear()
    return calls


def _names(model: Any) -> dict[int, str]:
    return {id(module): name for name, module in model.named_modules()}


def _quantisable(model: Any) -> Iterator[str]:
    kinds = ("in_proj", "out_proj", "linear_qkv", "linear_proj", "linear_fc1", "linear_fc2", "eh_proj")
    yield from (name for name, _ in model.named_modules() if name.endswith(kinds))


def check_regions() -> None:
    """Every projection of every layer, the MTP block's too, in the recipe's region; router, heads and norms in none."""
    for recipe in RECIPES:
        model = _model(SHAPE, **GROUPED, fp8="hybrid", fp8_recipe=recipe)
        _losses(model).backward()
        names, calls = _names(model), _engine_calls()
        assert sorted(names[id(call.module)] for call in calls) == sorted(_quantisable(model))
        assert {(call.recipe, call.with_gradient) for call in calls} == {(recipe, True)}
    assert len(list(_quantisable(model))) == 3 * 6 + 1
    ends = {"first_last_layers_bf16": True, "num_layers_at_start_in_bf16": 1, "num_layers_at_end_in_bf16": 0}
    model = _model(SHAPE, **GROUPED, fp8="hybrid", fp8_recipe="tensorwise", **ends)
    _losses(model)
    names = _names(model)
    found = sorted(names[id(call.module)] for call in _engine_calls())
    assert found == sorted(name for name in _quantisable(model) if not name.startswith("decoder.layers.0."))
    _losses(_model(SHAPE, **GROUPED))
    assert not _engine_calls()


WRONG: list[dict[str, int]] = [
    {"hidden_size": 72},
    {"hidden_size": 80},
    {"kv_channels": 6},
    {"linear_num_value_heads": 4},
    {"linear_value_head_dim": 15},
    {"moe_ffn_hidden_size": 40},
    {"moe_ffn_hidden_size": 48},
    {"moe_shared_expert_intermediate_size": 24},
]


def check_errors() -> None:
    """What we refuse is what stops at the first step; the recipes of 16 take one more than mxfp8 now and then."""
    for sizes in WRONG:
        shape = SHAPE.replace(**sizes, rotary_percent=1.0, num_moe_experts=2)
        for recipe in ("blockwise", "mxfp8"):
            for trained in (False, True):
                stopped = False
                try:
                    model = _model(shape, **GROUPED, fp8="hybrid", fp8_recipe=recipe).requires_grad_(trained)
                    _losses(model)
                except (ValueError, AssertionError) as error:
                    assert "FP8" in str(error), error
                    stopped = True
                refused = bool(size_violations(shape, recipe, trained=trained))
                assert refused >= stopped and (refused == stopped or not trained), (sizes, recipe, trained, stopped)
    _engine_calls()


def check_teacher_apart(work: Path) -> None:
    """Each model in its own recipe; the teacher without gradients, its weights quantised once and for all."""
    from megatron_slim.architecture.layer_specs import transformer_config
    from megatron_slim.training.teacher_config import teacher_config

    directory = write_tiny_checkpoint(work / "apart", SHAPE, dtype=torch.float32)
    of_student = GROUPED | {"fp8": "hybrid", "fp8_recipe": "delayed"}
    config = teacher_config(SHAPE, transformer_config(SHAPE, **of_student), fp8_recipe="blockwise")
    fields = {name: getattr(config, name) for name in (*GROUPED, "fp8", "fp8_recipe")}
    teacher = _loaded(SHAPE, directory, is_teacher=True, **fields)
    student = _loaded(SHAPE, directory, teacher=teacher, **of_student)
    before = _losses(student)
    calls = _engine_calls()
    models = {id(module): name for name, model in (("s", student), ("t", teacher)) for module in model.modules()}
    ran = [(models[id(call.module)], call.recipe, call.with_gradient) for call in calls]
    assert set(ran) == {("s", "delayed", True), ("t", "blockwise", False)}
    assert ran.count(("s", "delayed", True)) == ran.count(("t", "blockwise", False)) == len(list(_quantisable(teacher)))
    kept = [module.__dict__["_quantised"] for module in teacher.modules() if "_quantised" in module.__dict__]
    copies = [copy for each in kept for copy in each.values()]
    with torch.no_grad():
        for model in (student, teacher):
            for name, parameter in model.named_parameters():
                if "linear_fc1" in name:
                    parameter.mul_(2)
    assert torch.equal(_losses(student), before)  # within a step, weights stay quantised as they are
    student.set_is_first_microbatch()  # what Megatron's schedules do at the first micro-batch of a step
    assert not torch.allclose(_losses(student), before)
    assert [id(copy) for each in kept for copy in each.values()] == [id(copy) for copy in copies]
    _engine_calls()


def check_state_of_delayed_scaling() -> None:
    """Modules have a state by now, of which our checkpoints hold nothing, and which loading leaves as it is."""
    from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject, ShardedObject

    model = _model(SHAPE, **GROUPED, fp8="hybrid", fp8_recipe="delayed")
    _losses(model)
    state = model.sharded_state_dict()
    extra = {key: value for key, value in state.items() if "_extra_state" in key}
    assert not [key for key, value in state.items() if isinstance(value, ShardedObject)]
    assert {type(value) for value in extra.values()} == {LocalNonpersistentObject}
    full = [value.obj for value in extra.values() if torch.is_tensor(value.obj) and value.obj.numel()]
    assert len(full) > len(list(_quantisable(model)))  # grouped experts have one for each
    plain = {key: getattr(value, "obj", getattr(value, "data", None)) for key, value in state.items()}
    model.load_state_dict({key: plain[key] for key in plain if torch.is_tensor(plain[key])}, strict=False)
    _losses(model)
    _engine_calls()


def check_all(work: Path) -> None:
    from megatron_slim.compat import runtime

    runtime.init_single_process()
    check_specs(work)
    check_types(work)
    check_regions()
    check_errors()
    check_teacher_apart(work)
    check_state_of_delayed_scaling()


def test_models_of_transformer_engine(tmp_path: Path) -> None:
    run_with_engine(__name__, "check_all", tmp_path)
