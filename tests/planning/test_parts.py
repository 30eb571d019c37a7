"""Plans of runs that train some parts, with a teacher's cache, and with other states of the optimizer."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import megatron_slim.mcore

import pytest
from megatron.training.arguments import add_megatron_arguments

from megatron_slim.architecture.flops import head_flops
from megatron_slim.architecture.parts import TrainOnly, rows_by_place
from megatron_slim.architecture.published import MODELS
from megatron_slim.architecture.shape import FAMILIES, ModelShape
from megatron_slim.architecture.table import count_parameters
from megatron_slim.planning.cost import Cost
from megatron_slim.planning.hardware import GPUS, Assumptions
from megatron_slim.planning.layouts import Settings, TrainLayout, Wanted
from megatron_slim.planning.memory import host_bytes, rank_counts, teacher_counts
from megatron_slim.planning.search import Candidate, Job, Search
from megatron_slim.planning.storage import STORAGES
from megatron_slim.planning.subsets import SPARE, choices, subsets
from megatron_slim.testing import tiny_hf_config, tiny_shape

TOOL = "tools/plan_parallelism.py"
RECIPE = "examples/slimqwen/recipes/qwen3_next_80a3b_to_23a2b.yaml"
TEACHER = MODELS["Qwen3-Next-80B-A3B"].shape
STUDENT = TEACHER.replace(num_layers=12, layer_types=TEACHER.layer_types[:12], num_moe_experts=128)
ONE = TrainLayout(1)


def planned(settings: Settings, layout: TrainLayout = ONE, teacher: ModelShape | None = None) -> Candidate:
    """On GPUs with enough memory for anything."""
    gpu = replace(GPUS["h200"], memory=1e13)
    found = Search(Job(STUDENT, teacher, settings, layout.gpus, gpu)).look_at(layout)
    assert isinstance(found, Candidate), found
    return found


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("words", ["experts", "norms,attention@1", "embedding,output", "blocks@0-1"])
def test_trained_parameters_are_those_of_the_table(family: str, words: str) -> None:
    shape, only = tiny_shape(family, vocab_size=128, num_layers=4), TrainOnly.of(words)
    wanted = sum(row.numel(shape) for row, place in rows_by_place(shape) if only.trains(place) and not row.buffer)
    for layout in (ONE, TrainLayout(2, pp=2)):
        counts = rank_counts(shape, [4] if layout.pp == 1 else [2, 2], layout, only)
        copies = shape.vocab_size * shape.hidden_size if "embedding" in words and shape.mtp_num_layers else 0
        assert sum(count.total for count in counts) == wanted + (copies if layout.pp == 2 else 0)


def test_what_is_frozen_has_weights_alone() -> None:
    """16 bytes less for each of its parameters in bf16; two data-parallel ranks share the states of what is trained."""
    full, some = planned(Settings()).memory[0], planned(Settings(train_only="experts")).memory[0]
    trained, whole = rank_counts(STUDENT, [12], ONE, TrainOnly.of("experts"))[0].total, count_parameters(STUDENT).total
    assert full.weights == some.weights and full.gradients == 4 * whole and full.optimizer == 12 * whole
    assert some.gradients == 4 * trained and some.optimizer == 12 * trained and trained < whole
    shared = planned(Settings(train_only="experts"), TrainLayout(2)).memory[0]
    assert (shared.gradients, shared.optimizer) == (4 * trained, 6 * trained)


def test_layers_before_what_is_trained_keep_nothing() -> None:
    kept = {
        words: planned(Settings(train_only=words)).memory[0].activations
        for words in ("blocks", "blocks@4-11", "blocks@11", "output")
    }
    layers = kept["blocks"] - kept["output"]
    assert kept["output"] > 0 and kept["blocks@4-11"] - kept["output"] == pytest.approx(layers * 2 / 3)
    assert 0 < kept["blocks@11"] - kept["output"] < layers / 6
    recomputed = replace(ONE, recompute="full")
    found, wanted = (planned(Settings(train_only=words), recomputed).memory[0] for words in ("blocks@11", "blocks"))
    assert found.activations == wanted.activations


def test_speed_of_all_parts_is_that_of_full_training() -> None:
    cost = Cost(STUDENT, ONE, Settings(train_only="blocks"), GPUS["h200"], Assumptions())
    for layer in (0, 3):
        found, wanted = cost.backward_of(layer, passes_on=True), cost.backward(STUDENT.sublayers[layer])
        assert found.total == pytest.approx(wanted.total, rel=1e-9)
        assert found.traffic == pytest.approx(wanted.traffic, rel=1e-9)
    parts = "blocks,embedding,norms,output" + (",mtp" if STUDENT.mtp_num_layers else "")
    whole, all_parts = planned(Settings()).step, planned(Settings(train_only=parts)).step
    assert all_parts.seconds == pytest.approx(whole.seconds, rel=1e-9)
    assert all_parts.mfu == pytest.approx(whole.mfu, rel=1e-9)


def test_a_step_that_trains_less_is_quicker() -> None:
    words = ["blocks,embedding,norms,output", "experts", "experts@6-11", "norms@11", "output"]
    steps = [planned(Settings(train_only=each)).step for each in words]
    assert [each.seconds for each in steps] == sorted((each.seconds for each in steps), reverse=True)
    assert len({each.seconds for each in steps}) == len(words)
    assert steps[1].optimizer < steps[0].optimizer


@pytest.mark.parametrize("layout", [ONE, TrainLayout(2, tp=2), TrainLayout(2, pp=2)], ids=lambda each: each.name)
def test_a_teachers_cache_leaves_its_output_layer(layout: TrainLayout) -> None:
    """Rows of the vocabulary x hidden size x 2 bytes on the last stage; its head alone computes, nothing travels."""
    settings = Settings(teacher_head_only=True)
    alone, cached = planned(Settings(), layout), planned(settings, layout, TEACHER)
    rows = 151936 // layout.tp  # a multiple of 128
    assert [each.teacher for each in cached.memory] == [0.0] * (layout.pp - 1) + [rows * 2048 * 2.0]
    assert teacher_counts(TEACHER, (), layout, settings)[-1].total == rows * 2048
    for one, other in zip(cached.memory, alone.memory, strict=True):
        assert (one.weights, one.working, one.activations) == (other.weights, other.working, other.activations)
    rate = layout.gpus * GPUS["h200"].bf16 / (settings.global_batch * settings.seq_length)
    operations = rate * (cached.step.mfu * cached.step.seconds - alone.step.mfu * alone.step.seconds)
    runs_mtp = TEACHER.mtp_num_layers >= STUDENT.mtp_num_layers > 0
    heads = 1 + (TEACHER.mtp_num_layers if runs_mtp else 0)
    assert operations == pytest.approx(heads * head_flops(TEACHER), rel=1e-6)
    assert cached.step.seconds < planned(Settings(), layout, TEACHER).step.seconds


def test_states_of_the_optimizer() -> None:
    """Bytes of a trained parameter."""
    whole = count_parameters(STUDENT).total
    found = {name: planned(Settings(states=name)) for name in STORAGES}
    each = {name: (plan.memory[0].gradients / whole, plan.memory[0].optimizer / whole) for name, plan in found.items()}
    assert each == {"full": (4, 12), "bf16": (2, 6), "host": (2, 0)}
    on_host = {name: host_bytes(STUDENT, ONE, plan.stages, Settings(states=name)) for name, plan in found.items()}
    assert on_host == {"full": 0, "bf16": 0, "host": 16 * whole}
    assert found["host"].step.optimizer > found["full"].step.optimizer > found["bf16"].step.optimizer


@pytest.mark.parametrize("name", STORAGES)
def test_megatron_knows_what_it_is_asked_for(name: str) -> None:
    """By its own parser."""
    parser, storage = add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False)), STORAGES[name]
    args = parser.parse_args(list(storage.flags))
    assert args.use_precision_aware_optimizer == (name != "full")
    assert args.main_grads_dtype == ("bf16" if storage.gradient == 2 else "fp32")
    assert args.exp_avg_dtype == args.exp_avg_sq_dtype == ("bf16" if name == "bf16" else "fp32")
    assert args.optimizer_cpu_offload == bool(storage.host) and args.optimizer_offload_fraction == 1.0


@pytest.mark.parametrize("family", FAMILIES)
def test_choices_grow(family: str) -> None:
    """With more layers, more is trained; each is one that training takes."""
    shape = tiny_shape(family, num_layers=4)
    for choice in choices(shape):
        counts = []
        for layers in range(5):
            only = TrainOnly.of(words) if (words := choice(layers)) else None
            assert only is None or not only.violations(shape), words
            counts.append(rank_counts(shape, [4], ONE, only)[0].total)
        assert counts == sorted(counts) and counts[0] < counts[-1]


@pytest.fixture(scope="module")
def job() -> Job:
    return Job(STUDENT, None, Settings(global_batch=64), 1, replace(GPUS["h100"], memory=40e9))


def test_subsets_fit_and_one_layer_more_does_not(job: Job) -> None:
    found = subsets(job, Wanted())
    assert found and [each.trained for each in found] == sorted((each.trained for each in found), reverse=True)
    for each in found:
        assert each.candidate.needed <= (1 - SPARE) * job.gpu.memory
        assert each.trained == rank_counts(STUDENT, [12], ONE, each.job.settings.only)[0].total
    (experts,) = (each for each in found if each.name.startswith("experts@") and each.job.settings.states == "full")
    first = int(experts.name.removeprefix("experts@").split("-")[0])
    more = replace(experts.job.settings, train_only=f"experts@{first - 1}-11")
    smaller = replace(job.gpu, memory=(1 - SPARE) * job.gpu.memory)
    assert first > 0 and not Search(replace(job, settings=more, gpu=smaller)).run(Wanted()).ranked
    assert {each.job.settings.states for each in subsets(job, Wanted(), ["bf16"])} == {"bf16"}


def test_matrices_have_no_other_states(job: Job) -> None:
    found = subsets(replace(job, settings=replace(job.settings, optimizer="aurora")), Wanted())
    assert {each.job.settings.states for each in found} == {"full"}


def test_one_gpu_says_what_fits(tool: Any) -> None:
    given = ("--recipe", RECIPE, "--gpus", 1, "--tokens", "100M", "--global-batch-size", 64)
    outcome = tool(TOOL, *given, "--teacher-cache", "--json")
    assert outcome.code == 0, outcome.stderr
    plan = outcome.json
    assert plan["fit"] == 0 and plan["missing_bytes"] > 100e9 and plan["parts"]
    for part in plan["parts"]:
        assert part["bytes"] + part["bytes_left"] == 80e9 and part["bytes_left"] >= 4e9
        assert bool(part["host_bytes"]) == (part["optimizer_states"] == "host")
        words = part["command"].split()
        assert words[words.index("--train-only") + 1] == part["train_only"]
        assert "TEACHER_CACHE=cache" in words and not {"TEACHER=teacher", "DATA=corpus_text_document"} & set(words)
    shown = tool(TOOL, *given, "--teacher-cache").stdout
    assert "Not all of the student can be trained on 1 x H100 SXM of 80 GB" in shown and "to paste" in shown
    first = plan["parts"][0]
    chosen = ("--train-only", first["train_only"], "--optimizer-states", first["optimizer_states"])
    again = tool(TOOL, *given, "--teacher-cache", *chosen, "--build", 0, "--json")
    assert first["bytes"] in [each["memory"][0]["total"] for each in again.json["ranked"]]
    nothing = tool(TOOL, *given)
    assert nothing.code == 2 and "--teacher-cache leaves the teacher's layers out of memory" in nothing.error


def test_modules_are_built_with_a_cache_and_parts(tool: Any, tmp_path: Path) -> None:
    """The teacher's directory in place of a cache that is not there yet; a cache has the teacher's config.json too."""
    for name, shape in (("teacher", tiny_shape(num_layers=8)), ("student", tiny_shape())):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(tiny_hf_config(shape)))
    given = ("--hf-config", tmp_path / "student", "--teacher-cache", tmp_path / "teacher", "--gpus", 1, "--build", 0)
    plan = tool(TOOL, *given, "--train-only", "experts", "--json").json
    memory, shape = plan["ranked"][0]["memory"][0], tiny_shape()
    assert memory["teacher"] == 2 * -(-shape.vocab_size // 128) * 128 * shape.hidden_size
    assert plan["settings"]["train_only"] == "experts" and plan["settings"]["teacher_head_only"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--train-only", "experts@2-99"], "--train-only experts@2-99: the last of 36 layers is 35"),
        (["--train-only", "expert"], "'expert' is not a part of a model"),
        (["--optimizer-states", "bf16", "--optimizer", "muon"], "--optimizer-states bf16 is of adam's states"),
        (["--optimizer-states", "host", "--precision", "fp32"], "--optimizer-states host needs bf16, not fp32"),
        (["--teacher-cache", "x", "--no-teacher"], "--teacher-cache and --no-teacher both say what the teacher is"),
        (["--teacher-cache", "x", "--teacher-config", "y"], "--teacher-cache and --teacher-config both say"),
    ],
)
def test_errors(tool: Any, arguments: list[str], message: str) -> None:
    assert message in tool(TOOL, "--recipe", RECIPE, "--gpus", 8, *arguments).error


def test_a_phase_without_a_recipe_is_refused(tool: Any) -> None:
    for given in ("--plan", "--hf-config"):
        assert "--phase without --recipe" in tool(TOOL, given, "x", "--gpus", 8, "--phase", 2).error


def test_layers_count_their_own_experts() -> None:
    """All parameters of a model whose layers have different numbers of experts, and the experts of some of them."""
    shape = tiny_shape(vocab_size=128, experts_per_layer=(8, 2, 6, 4))
    (count,) = rank_counts(shape, [4], ONE)
    assert count.total == count_parameters(shape).total
    one_expert = 3 * shape.hidden_size * shape.moe_ffn_hidden_size
    for words, experts in (("experts@0", 8), ("experts@1-2", 2 + 6), ("experts", 8 + 2 + 6 + 4)):
        (count,) = rank_counts(shape, [4], ONE, TrainOnly.of(words))
        assert count.total == count.expert == experts * one_expert
