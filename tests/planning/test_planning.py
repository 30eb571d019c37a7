"""The planner: models from recipes, what is allowed, what fits, and the tool."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.pipeline_simulator import Pipeline, simulate
from megatron_slim.architecture.published import MODELS
from megatron_slim.architecture.table import count_parameters
from megatron_slim.errors import RecipeError, SlimError
from megatron_slim.planning.flags import COMMAND, SCRIPT, command
from megatron_slim.planning.hardware import GPUS, Assumptions, parse_assumptions
from megatron_slim.planning.layouts import Settings, TrainLayout, Wanted
from megatron_slim.planning.memory import Memory, rank_counts
from megatron_slim.planning.schedule import most_held, step_seconds
from megatron_slim.planning.search import Candidate, Job, Rejected, Search, why_too_large
from megatron_slim.planning.sources import Asked, find_models
from megatron_slim.testing import tiny_hf_config, tiny_shape
from megatron_slim.training.variables import DEFAULTS

ROOT = Path(__file__).resolve().parents[2]
RECIPES = ROOT / "examples" / "slimqwen" / "recipes"
TOOL = "tools/plan_parallelism.py"
BEST = RECIPES / "qwen3_next_80a3b_to_23a2b.yaml"
# One combination, so that it takes no time.
NARROW = "--tp 2 --pp 2 --vpp 1 --ep 8 --micro-batch-size 1 --recompute none --build 0".split()


def phases_of(recipe: Path) -> list[int | None]:
    count = len(re.findall(r"^  - name:", recipe.read_text(), re.MULTILINE))
    return list(range(1, count + 1)) if count else [None]


ONE_MODEL = [path for path in sorted(RECIPES.glob("*.yaml")) if "\nbudgets:" not in path.read_text()]


@pytest.mark.parametrize("recipe", ONE_MODEL, ids=lambda path: path.stem)
def test_every_recipe_says_what_it_trains(recipe: Path) -> None:
    for phase in phases_of(recipe):
        found = find_models(Asked(recipe=recipe, phase=phase))
        assert found.teacher is not None and found.source is not None
        params = [count_parameters(each).total for each in (found.student, found.source, found.teacher)]
        assert params == sorted(params) and params[0] < params[2]
        assert (found.tokens is None) == (phase is None)


def test_published_sizes() -> None:
    counts = {name: count_parameters(model.shape).total for name, model in MODELS.items()}
    assert counts["Qwen3-Next-80B-A3B"] == 81_324_862_720
    assert counts["Qwen3-30B-A3B"] == 30_532_122_624
    assert round(count_parameters(MODELS["SlimQwen-24A2B"].shape, include_mtp=False).total / 1e9) == 24


def test_a_phase_prunes_what_the_one_before_left(tmp_path: Path) -> None:
    found = find_models(Asked(recipe=RECIPES / "qwen3_next_80a3b_to_23a2b_depth_first.yaml", phase=2))
    assert found.source is not None and found.teacher is not None
    assert (found.student.num_layers, found.source.num_layers, found.teacher.num_layers) == (36, 42, 48)


def test_a_phase_is_pasted_as_its_part_of_the_whole_schedule(tool: Any) -> None:
    recipe = RECIPES / "qwen3_next_80a3b_to_23a2b_depth_first.yaml"
    given = (TOOL, "--recipe", recipe, "--phase", 2, "--gpus", 256, *NARROW, "--json")
    for more, expected in (((), {"PROGRESSIVE": "1"}), (("--tokens", "1B"), {"TRAIN_ITERS": "239"})):
        (entry,) = tool(*given, *more).json["ranked"]
        names = ("PROGRESSIVE", "TRAIN_ITERS")
        assert {name: entry["variables"][name] for name in names if name in entry["variables"]} == expected


def test_a_recipe_without_a_source(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("version: 1\ntarget: {num_layers: 2}\n")
    with pytest.raises(RecipeError, match=r"says nothing of the model.*add 'source: NAME'.*--teacher-config"):
        find_models(Asked(recipe=recipe))
    (tmp_path / "config.json").write_text(json.dumps(tiny_hf_config(tiny_shape(layer_types=("full_attention",) * 4))))
    assert find_models(Asked(recipe=recipe, teacher_config=tmp_path)).student.num_layers == 2
    recipe.write_text("version: 1\nsource: .\ntarget: {num_layers: 3}\n")
    assert find_models(Asked(recipe=recipe)).student.num_layers == 3
    recipe.write_text("version: 1\nsource: Qwen4\ntarget: {num_layers: 3}\n")
    with pytest.raises(RecipeError, match="source 'Qwen4' is not a directory here and not one of Qwen3-Next-80B-A3B"):
        find_models(Asked(recipe=recipe))
    recipe.write_text("version: 1\nsource: 3\ntarget: {num_layers: 3}\n")
    with pytest.raises(RecipeError, match="source 3 is neither a model's name nor a directory"):
        find_models(Asked(recipe=recipe))


def job(**settings: Any) -> Job:
    models = find_models(Asked(recipe=BEST))
    return Job(models.student, models.teacher, Settings(**settings), 256, GPUS["h100"])


@pytest.mark.parametrize(
    ("layout", "why"),
    [
        (TrainLayout(256, tp=3), "256 GPUs do not divide into groups of TP 3 x PP 1"),
        (TrainLayout(256, pp=8, ep=64), "256 GPUs do not divide into groups of EP 64 x PP 8"),
        (TrainLayout(256, tp=16), "TP 16 is more than the 8 GPUs that NVLink connects"),
        (TrainLayout(256, vpp=2), "virtual stages need a pipeline"),
        (TrainLayout(256, pp=16, vpp=4), "36 layers of the student do not fill 64 stages"),
        (
            TrainLayout(256, pp=8, vpp=2, tp=2, micro_batch=16),
            "interleaving needs micro-batches (4) in multiples of PP 8",
        ),
        (TrainLayout(256, micro_batch=8), "a global batch of 1024 does not divide by 8 a micro-batch x DP 256"),
        (TrainLayout(1024, ep=512), "student: num_moe_experts 256 does not divide by expert parallel size 512"),
    ],
)
def test_what_is_not_allowed(layout: TrainLayout, why: str) -> None:
    found = Search(job()).look_at(layout)
    assert isinstance(found, Rejected) and found.kind == "not allowed" and why in found.why


def test_what_does_not_fit_names_the_largest_part() -> None:
    found = Search(job()).look_at(TrainLayout(256, tp=2, pp=2, ep=8, micro_batch=4))
    assert isinstance(found, Rejected) and re.match(r"pipeline rank 0 of 2 needs \d+\.\d GB \(static \d", found.why)
    found = Search(job()).look_at(TrainLayout(256))
    assert isinstance(found, Rejected) and "weights, gradients and optimizer alone are" in found.why


def test_memory_goes_where_it_should() -> None:
    """More of each kind of parallelism, less memory of the kind that it divides."""
    base = TrainLayout(256, tp=2, pp=4, ep=8)
    search = Search(job())

    def memory(layout: TrainLayout) -> Any:
        found = search.look_at(layout)
        assert isinstance(found, Candidate), found
        return max(found.memory, key=lambda each: each.activations), found

    one, candidate = memory(base)
    assert one.activations > 1.9 * memory(replace(base, tp=4))[0].activations
    assert memory(replace(base, ep=16))[0].teacher < 0.7 * one.teacher
    assert memory(replace(base, recompute="full"))[0].activations < 0.1 * one.activations
    ranks = candidate.memory
    assert ranks[0].activations > ranks[2].activations and ranks[3].loss > 0 == ranks[0].loss
    counts = rank_counts(search.job.teacher, candidate.stages.teacher_layers, base)
    assert sum(each.total for each in counts) * 2 == sum(each.teacher for each in ranks)


@pytest.mark.parametrize(("p", "m", "v"), [(1, 3, 1), (4, 8, 1), (4, 3, 1), (4, 8, 2), (8, 64, 2), (3, 50, 1)])
def test_steps_are_as_long_as_simulated(p: int, m: int, v: int) -> None:
    """Against the simulator of the benchmarks, uneven stages included; many micro-batches are extrapolated."""
    forward = [1.0 + stage % 3 for stage in range(p * v)]
    backward = [2.0 * each for each in forward]
    expected = simulate(Pipeline(p, m, forward, backward, [0.0] * (p * v), virtual=v), 1).seconds
    assert step_seconds(p, m, v, forward, backward) == pytest.approx(expected)


def test_sending_delays() -> None:
    assert step_seconds(2, 1, 1, [1, 1], [2, 2], send=0.25) == pytest.approx(6 + 0.25 * 6)
    assert step_seconds(1, 4, 1, [1], [2], send=9.0) == 12
    assert most_held(4, 2, 1, [1.0] * 4) == [2, 2, 2, 1]


def test_faster_networks_and_gpus_are_faster() -> None:
    layout = TrainLayout(256, tp=2, pp=4, ep=16)
    first = Search(job()).look_at(layout)
    better = Search(replace(job(), assumed=Assumptions(network=1.0, imbalance=1.0))).look_at(layout)
    other = Search(replace(job(), gpu=GPUS["b200"])).look_at(layout)
    assert isinstance(first, Candidate) and isinstance(better, Candidate) and isinstance(other, Candidate)
    assert first.step.seconds > better.step.seconds and first.step.seconds > other.step.seconds
    assert better.step.busy.all_to_all < 0.8 * first.step.busy.all_to_all
    step = first.step
    parts = step.busy.total + step.bubble * step.seconds + step.data_parallel + step.optimizer
    assert parts == pytest.approx(step.seconds)


def test_assumptions() -> None:
    assert parse_assumptions(["gemm=0.5", "overhead_gib=2"]) == replace(Assumptions(), gemm=0.5, overhead_gib=2.0)
    for word, message in (("gem=0.5", "did you mean 'gemm'"), ("gemm=2", "from 0 to 1"), ("gemm=x", "not a number")):
        with pytest.raises(SlimError, match=message):
            parse_assumptions([word])


def test_less_recomputation_is_enough() -> None:
    found = Search(job()).run(Wanted(tp=[2], pp=[4], ep=[8], vpp=[1], micro_batch=[1]))
    assert [each.layout.recompute for each in found.ranked] == ["none"] and found.spared == 2


def test_tool_plans_the_paper(tool: Any) -> None:
    outcome = tool(TOOL, "--recipe", BEST, "--gpus", 256, "--gpu-type", "h100", *NARROW, "--json")
    assert outcome.code == 0, outcome.stderr
    (entry,) = outcome.json["ranked"]
    assert entry["name"] == "TP2 PP2 EP8 DP64 MBS1" and not entry["built"]
    assert outcome.json["tokens"] == 400e9 and entry["variables"]["TRAIN_ITERS"] == "95368"
    assert 20 < outcome.json["student"]["params"] / 1e9 < 24
    assert entry["memory"][0]["total"] < 80e9 and 0 < entry["step"]["mfu"] < 1
    assert sum(entry["step"]["shares"].values()) == pytest.approx(1)
    assert entry["days"] == pytest.approx(95368 * entry["step"]["seconds"] / 86400)
    assert 3 < outcome.json["preparation"]["calibration"]["minutes"] < 5


def test_defaults_are_those_of_a_run() -> None:
    tokens = Settings().global_batch * Settings().seq_length
    assert int(DEFAULTS["TRAIN_ITERS"]) * tokens == pytest.approx(400e9, rel=1e-4)
    for name in ("TP", "PP", "EP"):  # the script counts processes by them
        assert f"{name}=${{{name}:-{DEFAULTS[name]}}}" in (ROOT / SCRIPT).read_text()


def test_what_is_just_too_large_does_not_read_as_fitting() -> None:
    assert "needs 80.1 GB" in why_too_large([Memory(weights=80.01e9)])


def test_layouts_with_little_memory_left_are_named(tool: Any) -> None:
    given = (TOOL, "--recipe", BEST, "--gpus", 64, "--build", 0, "--tp", 1, "--pp", 2, "--ep", 8, "--vpp", 1)
    outcome = tool(*given, "--micro-batch-size", 1)
    assert "Less than 5% of memory is left in layout 1: uneven routing" in outcome.stdout
    assert "memory is left" not in tool(*given, "--micro-batch-size", 1, "--gpu-type", "h200").stdout


def test_several_nodes_are_a_job(tool: Any) -> None:
    several = tool(TOOL, "--recipe", BEST, "--gpus", 256, *NARROW).stdout
    assert (
        "DATA; submits a Slurm job:" in several and "LAUNCHER=slurm SBATCH_GPUS_PER_NODE=8 \\\n  NNODES=32" in several
    )
    alone = tool(TOOL, "--recipe", BEST, "--gpus", 8, "--gpu-type", "b200", "--build", 0, "--pp", 1).stdout
    assert "to paste" in alone and "LAUNCHER" not in alone and "Slurm" not in alone


@pytest.mark.parametrize("columns", [80, 120])
def test_tables_fit_the_terminal(tool: Any, monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    outcome = tool(TOOL, "--recipe", BEST, "--gpus", 256, *NARROW)
    assert outcome.code == 0, outcome.stderr
    table, _, command = outcome.stdout.partition("to paste")
    assert max(len(line) for line in table.splitlines()) <= columns
    assert "…" not in table and "tok/s/GPU" in table and "0 more fit" in table
    assert f"{COMMAND} --expert-tensor-parallel-size 1 --pipeline-layout auto" in command
    assert ("static" in table.split("GB:")[0]) == (columns == 120)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpus", "0"], "'0' is not a positive integer"),
        (["--gpus", "-8"], "'-8' is not a positive integer"),
        (["--gpus", "12"], "--gpus 12 is not a multiple of 8 GPUs per node"),
        (["--gpus", "8", "--tokens", "many"], "--tokens 'many' is not a number of tokens"),
        (["--gpus", "8", "--assume", "gem=1"], "did you mean 'gemm'"),
        (["--gpus", "8", "--phase", "2"], "the recipe has no phases"),
        (["--gpus", "8", "--build", "-1"], "--build -1 is negative"),
        (["--gpus", "1"], "no layout fits on 1 x H100 SXM of 80 GB; the nearest miss is TP1 PP1 EP1 DP1 MBS1"),
        (["--gpus", "8", "--tp", "3"], "no layout is allowed on 8 x H100 SXM"),
        (["--gpus", "256", "--global-batch-size", "7"], "a global batch of 7 does not divide"),
    ],
)
def test_errors(tool: Any, arguments: list[str], message: str) -> None:
    assert message in tool(TOOL, "--recipe", BEST, *arguments).error


def test_models_to_choose_from(tool: Any, tmp_path: Path) -> None:
    assert "one of the arguments --recipe --plan --hf-config is required" in tool(TOOL, "--gpus", 8).error
    (tmp_path / "config.json").write_text(json.dumps(tiny_hf_config(tiny_shape())))
    assert "nothing says what the teacher is" in tool(TOOL, "--hf-config", tmp_path, "--gpus", 8).error
    alone = tool(TOOL, "--hf-config", tmp_path, "--no-teacher", "--gpus", 1, "--build", 0, "--json")
    assert alone.code == 0 and alone.json["teacher"] is None and alone.json["preparation"] is None
    assert "TEACHER" not in alone.json["ranked"][0]["command"]
    assert (
        alone.json["settings"]["seq_length"] == 512 and "as many as the model has positions" in alone.json["notes"][0]
    )
    with_teacher = tool(TOOL, "--hf-config", tmp_path, "--teacher-config", tmp_path, "--gpus", 1, "--build", 0)
    assert with_teacher.code == 0 and "TEACHER=teacher" in with_teacher.stdout


def test_help_is_instant_and_search_imports_no_torch() -> None:
    code = (
        "import sys; from pathlib import Path; from megatron_slim.cli.plan_parallelism import *; "
        "from megatron_slim.planning.sources import *; "
        f"m = find_models(Asked(recipe=Path({str(BEST)!r}))); "
        "Search(Job(m.student, m.teacher, Settings(), 256, GPUS['h100'])).run(Wanted([2], [2], [1], [8], [1])); "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True)


def test_a_plan_knows_both_models(tmp_path: Path) -> None:
    from benchmarks.models import write_statistics
    from megatron_slim.pruning.plan import make_plan
    from megatron_slim.pruning.statistics import Statistics
    from megatron_slim.recipe import parse_recipe
    from megatron_slim.testing import write_tiny_checkpoint

    shape = tiny_shape()
    write_tiny_checkpoint(tmp_path / "teacher", shape)
    write_statistics(tmp_path / "teacher", tmp_path / "stats")
    recipe = parse_recipe({"version": 1, "source": "teacher", "target": {"num_moe_experts": 4}})
    make_plan(recipe, Statistics.load(tmp_path / "stats"), shape).save(tmp_path / "plan.json")
    found = find_models(Asked(plan=tmp_path / "plan.json"))
    assert found.teacher == found.source == shape and found.student.num_moe_experts == 4


def test_models_without_mtp_are_planned_without() -> None:
    """From a recipe and a plan as from a config.json, which is asked for otherwise."""
    recipe = Path("qwen3_next_80a3b_to_23a2b")
    for student, teacher in ((False, False), (True, False), (False, True)):
        found = find_models(Asked(recipe=recipe, without_mtp=student, teacher_without_mtp=teacher))
        assert found.teacher is not None
        assert (found.student.mtp_num_layers, found.teacher.mtp_num_layers) == (int(not student), int(not teacher))


def test_a_command_without_mtp_says_so() -> None:
    """Else the pasted command trains another model than the planned one, or is refused."""
    for given, words in (
        ("without_mtp", " --without-mtp"),
        ("teacher_without_mtp", " --teacher-without-mtp"),
        ("", ""),
    ):
        settings = replace(Settings(), **{given: True} if given else {})
        assert command(TrainLayout(1), settings, 1000, 8).endswith(f"--expert-tensor-parallel-size 1{words}")
