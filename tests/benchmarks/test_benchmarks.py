"""The benchmarks run, tiny, and what they measure with measures what it says."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from benchmarks import layout_run, models, peer_step, processes, storage
from benchmarks.convert_80b import PUBLISHED_COUNTS
from benchmarks.holes import BLOCK, MARGIN, HoleDigger
from benchmarks.report import machine
from megatron_slim.architecture.table import hf_tensors
from megatron_slim.checkpoint.convert import same_bytes
from megatron_slim.checkpoint.distributed import DistCheckpoint
from megatron_slim.checkpoint.huggingface import HFCheckpoint
from megatron_slim.errors import SlimError

Tool = Callable[..., Any]
ALL = (
    "hf_to_torch_dist torch_dist_to_hf hf_to_pruned_hf hf_to_pruned_torch_dist torch_dist_to_pruned_torch_dist".split()
)
TINY = ("--size-gb", 0.005, "--hidden-size", 64, "--layers", 8, "--repeats", 1, "--json")
TINY_80B = ("--layers", 8, "--set", "num_experts=16", "vocab_size=512", "hidden_size=256", "--json")


def disk_bytes(file: Path) -> int:
    os.sync()
    return file.stat().st_blocks * 512


def test_the_published_layout() -> None:
    shards = models.plan_shards(models.shape_of(models.PUBLISHED))
    names = [name for shard in shards for name in shard]
    assert len(shards) == PUBLISHED_COUNTS["shards"] == 41
    assert len(names) == len(set(names)) == PUBLISHED_COUNTS["tensors"] == 75_944
    assert {name for name in names if name.startswith("mtp.")} == set(shards[-1])
    assert len(shards[-1]) == PUBLISHED_COUNTS["mtp_tensors"] == 1_553
    assert not {"layer_types", "num_nextn_predict_layers", "mtp_num_layers"} & models.PUBLISHED.keys()
    experts = [name.split("experts.")[1] for name in shards[0] if "model.layers.0.mlp.experts" in name]
    assert experts[:4] == ["0.gate_proj.weight", "0.up_proj.weight", "0.down_proj.weight", "1.gate_proj.weight"]


@pytest.mark.parametrize(("layers", "hidden", "gigabytes"), [(24, 2048, 6), (24, 1024, 2), (8, 64, 0.005)])
def test_models_of_a_wanted_size(layers: int, hidden: int, gigabytes: float) -> None:
    shape = models.shape_of(models.scaled_config(layers, hidden, gigabytes * 1e9))
    assert gigabytes * 0.9e9 < models.model_bytes(shape) <= gigabytes * 1e9
    assert (shape.num_layers, shape.hidden_size) == (layers, hidden)


def test_a_model_that_cannot_be_that_small() -> None:
    with pytest.raises(SlimError, match=r"24 layers of hidden size 2048 are at least 3\.34 GB"):
        models.scaled_config(24, 2048, 1e9)


def test_dense_weights_are_finite_and_do_not_compress(tmp_path: Path) -> None:
    config = models.scaled_config(4, 64, 0.003e9)
    models.write_model(tmp_path / "hf", config, sparse=False)
    tensors = {k: v for file in (tmp_path / "hf").glob("*.safetensors") for k, v in load_file(file).items()}
    assert tensors.keys() == set(hf_tensors(models.shape_of(config)))
    assert all(tensor.isfinite().all() and tensor.dtype == torch.bfloat16 for tensor in tensors.values())
    content = tensors["model.embed_tokens.weight"].view(torch.uint8).numpy().tobytes()
    assert len(zlib.compress(content)) > 0.85 * len(content)
    assert HFCheckpoint.open(tmp_path / "hf").shape.mtp_num_layers == 1


def test_sparse_weights_take_no_place_and_read_as_zeros(tmp_path: Path) -> None:
    models.write_model(tmp_path / "hf", models.scaled_config(4, 256, 0.05e9), sparse=True)
    files = sorted((tmp_path / "hf").glob("*.safetensors"))
    assert sum(file.stat().st_size for file in files) > 40e6
    assert sum(disk_bytes(file) for file in files) < 1e6
    checkpoint = HFCheckpoint.open(tmp_path / "hf")
    assert not checkpoint.read("lm_head.weight").any()
    assert layout_run.layout_counts(tmp_path / "hf") == {
        "shards": 2,
        "tensors": len(checkpoint.names),
        "mtp_tensors": sum(name.startswith("mtp.") for name in checkpoint.names),
        "parameters": models.model_bytes(checkpoint.shape) // 2,
    }


def test_holes_do_not_change_what_is_read(tmp_path: Path) -> None:
    directory = tmp_path / ".out.partial"
    directory.mkdir()
    file = directory / "weights"
    content = bytearray(MARGIN + 3 * BLOCK + 12345)
    for position in (0, 4095, 70_000, BLOCK - 1, BLOCK, 2 * BLOCK + 500_000, MARGIN + 2 * BLOCK, len(content) - 1):
        content[position] = 7
    file.write_bytes(content)
    before = disk_bytes(file)
    digger = HoleDigger(tmp_path, "out")
    digger.dig()
    assert disk_bytes(file) == before, "dug what was new at the first pass"
    digger.dig()
    assert MARGIN <= disk_bytes(file) < before - 2 * BLOCK, "the end of a file that may still grow stays"
    assert hashlib.sha256(file.read_bytes()).digest() == hashlib.sha256(content).digest()
    digger.dig(final=True)
    assert disk_bytes(file) < 100 * storage.PAGE
    assert hashlib.sha256(file.read_bytes()).digest() == hashlib.sha256(content).digest()
    assert digger.peak_disk == before


def test_a_tool_runs_as_if_there_were_space(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("import shutil, sys; print(shutil.disk_usage('.').free, sys.argv[1:])")
    found = processes.run(processes.python(processes.ROOT / "benchmarks" / "roomy.py", script, "--a", "b"))
    assert found.stdout == f"{1 << 50} ['--a', 'b']\n"


FORKS = """
import os, sys
shared = bytearray(b'x') * 200_000_000
pipes = [os.pipe() for _ in range(2)]
for _, ready in pipes:
    if os.fork() == 0:
        own = bytearray(b'y') * 50_000_000
        open('/dev/zero', 'rb').read(30_000_000)
        os.write(ready, b'.')
        sys.stdin.read()
        os._exit(0)
for end, _ in pipes:
    os.read(end, 1)
print('ready', flush=True)
sys.stdin.read()
for _ in range(2):
    os.wait()
"""


def test_pages_that_a_fork_shares_count_once() -> None:
    command = [sys.executable, "-S", "-c", FORKS]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        found = processes.tree_anonymous(process.pid)
        assert 300e6 < found < 340e6
        assert processes.tree_anonymous(process.pid, above=10**10) == 0
        process.communicate()


def test_memory_and_bytes_read_of_a_command() -> None:
    """The bytes are those of its children too, once they have ended."""
    found = processes.run([sys.executable, "-S", "-c", FORKS])
    assert 60e6 < found.read_bytes < 70e6 and found.peak_anonymous == 0 and found.stdout == "ready\n"
    hold = "import time; content = bytearray(b'x') * 100_000_000; time.sleep(1); del content; time.sleep(0.2)"
    found = processes.run([sys.executable, "-S", "-c", hold], sample_seconds=0.02)
    assert 100e6 < found.peak_anonymous < 120e6 and found.seconds > 1.2


def test_a_command_that_fails_is_an_error() -> None:
    with pytest.raises(SlimError, match=r"exit code 3 .*: why"):
        processes.run([sys.executable, "-c", "import sys; print('why', file=sys.stderr); sys.exit(3)"])


def test_a_failure_during_a_command_ends_it() -> None:
    def full() -> None:
        raise SlimError("disk full")

    with pytest.raises(SlimError, match="disk full"):
        processes.run([sys.executable, "-c", "import time; time.sleep(600)"], meanwhile=full)


def test_the_page_cache_is_what_was_asked_for(tmp_path: Path) -> None:
    if machine(tmp_path)["file_system"] == "tmpfs":
        pytest.skip("files on tmpfs are memory")
    (tmp_path / "file").write_bytes(os.urandom(3_000_000))
    assert storage.drop_cache(tmp_path) == 0
    assert storage.fill_cache(tmp_path) == 1


@pytest.mark.parametrize("threads", [1, 2])
def test_raw_reads_and_writes_move_the_bytes_they_say(tmp_path: Path, threads: int) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(bytes(5 << 20))
    for size in (6 << 20, 10 << 20):
        before = processes.counters(os.getpid())
        assert storage.raw_read(sorted(tmp_path.iterdir()), size, threads=threads) > 0
        assert size <= processes.counters(os.getpid())["rchar"] - before["rchar"] < size + 100_000
    before = processes.counters(os.getpid())
    assert storage.raw_write(tmp_path / "raw", 9_000_001, threads=threads) > 0
    assert processes.counters(os.getpid())["wchar"] - before["wchar"] == 9_000_001
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a", "b"]


def check_convert(results: dict[str, Any], directions: list[str]) -> None:
    assert list(results["directions"]) == directions
    model = results["model"]
    experts = model["num_moe_experts"]
    # Eight layers, six of them linear, MTP, and the three outside the blocks.
    assert model["tensors"] == 6 * (14 + 3 * experts) + 2 * (13 + 3 * experts) + 17 + 3 * experts + 3
    assert model["largest_layer_group_bytes"] < model["bytes"] < 5e6
    for name, entry in results["directions"].items():
        assert entry["raw_io_seconds"] == max(entry["raw_read"]["seconds"], entry["raw_write"]["seconds"]) > 0
        assert entry["verified"]["bytes_read"] > entry["bytes_that_must_be_read"]
        assert 50e6 < entry["peak_anonymous_bytes"] < 4e9
        whole = entry["bytes_of_result"] == entry["bytes_that_must_be_read"] == model["bytes"]
        smaller = 0 < entry["bytes_of_result"] < entry["bytes_that_must_be_read"] < model["bytes"]
        assert smaller if "pruned" in name else whole
    worst = max(entry["verified"]["over_raw_io"] for entry in results["directions"].values())
    assert results["wall_over_raw_io"] == worst
    peaks = [entry["peak_anonymous_bytes"] for entry in results["directions"].values()]
    assert results["peak_memory_fraction"] == max(peaks) / model["bytes"]


@pytest.mark.slow
def test_convert(tmp_path: Path, tool: Tool) -> None:
    outcome = tool("benchmarks/convert.py", "--dir", tmp_path / "b", "--only", ALL[0], "--no-load-all", "--keep", *TINY)
    assert outcome.code == 0, outcome.stderr
    check_convert(outcome.json, [ALL[0]])
    (kept,) = (tmp_path / "b").iterdir()
    assert HFCheckpoint.open(kept).shape.num_layers == 8


@pytest.mark.slow
def test_convert_in_every_direction_and_load_everything(tmp_path: Path, tool: Tool) -> None:
    outcome = tool("benchmarks/convert.py", "--dir", tmp_path / "b", "--cache", "warm", *TINY)
    assert outcome.code == 0, outcome.stderr
    check_convert(outcome.json, ALL)
    assert outcome.json["source_in_page_cache"] == {"least": 1.0, "most": 1.0}
    other, ours = outcome.json["load_all"], outcome.json["directions"][ALL[0]]["verified"]
    assert outcome.json["speedup_over_load_all"] == other["seconds"] / ours["seconds"]
    assert not list((tmp_path / "b").iterdir())


@pytest.mark.slow
def test_loading_everything_gives_the_same_checkpoint(tmp_path: Path) -> None:
    config = models.scaled_config(4, 64, 0.003e9)
    models.write_model(tmp_path / "hf", config, sparse=False)
    script = processes.ROOT / "benchmarks" / "load_all.py"
    processes.run(processes.python(script, "--load", tmp_path / "hf", "--save", tmp_path / "out", "--threads", 2))
    source, saved = HFCheckpoint.open(tmp_path / "hf"), DistCheckpoint.open(tmp_path / "out", tmp_path / "hf")
    assert all(same_bytes(source.read(name), saved.read(name)) for name in source.names)


def check_80b(results: dict[str, Any], directions: list[str]) -> None:
    assert list(results["directions"]) == directions and results["complete"]
    assert results["model"]["tensors"] == 6 * (14 + 3 * 16) + 2 * (13 + 3 * 16) + 17 + 3 * 16 + 3
    for name, entry in results["directions"].items():
        assert (entry["missing_tensors"], entry["extra_tensors"]) == (0, 0)
        assert entry["bytes_of_result"] >= 2 * entry["parameters"] and entry["bytes_read"] > 1e6
        if name == "hf_to_pruned_hf":
            # Six of eight layers, five of these linear; eight of 16 experts.
            assert entry["tensors"] == 5 * (14 + 3 * 8) + (13 + 3 * 8) + 17 + 3 * 8 + 3
        if "pruned" not in name:
            assert entry["parameters"] == results["model"]["parameters"]
        assert entry["parameters"] <= results["model"]["parameters"]


@pytest.mark.slow
def test_convert_80b(tmp_path: Path, tool: Tool) -> None:
    outcome = tool("benchmarks/convert_80b.py", "--dir", tmp_path / "b", "--only", "hf_to_pruned_hf", *TINY_80B)
    assert outcome.code == 0, outcome.stderr
    check_80b(outcome.json, ["hf_to_pruned_hf"])
    assert not (tmp_path / "b").exists()


@pytest.mark.slow
def test_convert_80b_in_every_direction(tmp_path: Path, tool: Tool) -> None:
    outcome = tool("benchmarks/convert_80b.py", "--dir", tmp_path / "b", "--only", *reversed(ALL), *TINY_80B)
    assert outcome.code == 0, outcome.stderr
    check_80b(outcome.json, ALL)


def test_user_errors_are_one_line(tmp_path: Path, tool: Tool) -> None:
    (tmp_path / "mine").write_text("")
    assert "is not empty" in tool("benchmarks/convert_80b.py", "--dir", tmp_path).error
    assert (tmp_path / "mine").exists()
    new = ("--dir", tmp_path / "new")
    assert "'hidden=1' is not KEY=N" in tool("benchmarks/convert_80b.py", *new, "--set", "hidden=1").error
    assert "GB free" in tool("benchmarks/convert.py", *new, "--size-gb", 1e6).error
    assert "at least" in tool("benchmarks/convert.py", *new, "--size-gb", 0.1).error


TINY_CALIBRATION = (
    "--experts 16 --topk 4 --hidden-size 64 --ffn-size 32 --tokens 64 --logit-tokens 64 --vector-size 64 --repeats 1"
)


def test_calibration(tool: Tool) -> None:
    """It compares what both sides give by itself; how long they take says nothing at these sizes."""
    outcome = tool("benchmarks/calibration.py", *TINY_CALIBRATION.split(), "--json")
    assert outcome.code == 0, outcome.stderr
    results = outcome.json
    for ratio in ("speedup_over_all_experts", "similarity_over_gemm", "speedup_over_pair_loop"):
        assert results[ratio] > 0
    # 3 B active parameters without embedding and head: 2 FLOPs each for every token.
    flops = results["estimate_80b"]["flops"]
    tokens = 1024 * 4096
    assert 2 * 2.9e9 < sum(flops[key] for key in ("projections", "routed", "shared_and_router")) / tokens < 2 * 4e9
    assert flops["routed"] / tokens == 2 * 49 * 10 * 3 * 2048 * 512
    assert results["estimate_80b"]["host_gib"]["hidden_states"] == 16


def test_published_layers_are_timed(tool: Tool, monkeypatch: pytest.MonkeyPatch) -> None:
    """At sizes that are not the published ones: twice as many blocks of a kind take twice as long."""
    sizes = {"hidden_size": 64, "num_experts": 16, "moe_intermediate_size": 16, "num_hidden_layers": 4}
    monkeypatch.setattr(models, "PUBLISHED", models.PUBLISHED | sizes)
    command = ("benchmarks/calibration.py", "--published-layers", "--layer-tokens", 64, "--repeats", 1, "--json")
    outcome = tool(*command)
    assert outcome.code == 0, outcome.stderr
    seconds, passes = outcome.json["layer_seconds"], 1024 * 4096 / 64
    computing = passes * (3 * seconds["linear_attention/moe"] + 2 * seconds["full_attention/moe"]) / 60
    assert computing < outcome.json["measured_80b_minutes"] < computing + 1


def test_the_reference_for_expert_statistics_must_be_there(tool: Tool, tmp_path: Path) -> None:
    outcome = tool("benchmarks/reference_reap.py", "--reap-source", tmp_path)
    assert outcome.code == 2
    assert "--reap-source: No module named 'reap'; give the src folder of a checkout of reap" in outcome.error


def test_pipeline_layout(tool: Tool) -> None:
    outcome = tool("benchmarks/pipeline_layout.py", "--json")
    assert outcome.code == 0, outcome.stderr
    assert outcome.json["slowest_over_mean"] <= 1.05
    four = outcome.json["layouts"]["23A2B PP4"]
    assert four["even"] > 1.5 and sum(four["student_layers"]) == 36 and sum(four["teacher_layers"]) == 48


@pytest.mark.slow
def test_a_step_of_distillation(tool: Tool) -> None:
    command = (
        "--seq-length 32 --micro-batch-size 1 --vocab-size 256 --iterations 1 --repeats 1 --json --teacher-ahead 2"
    )
    outcome = tool("benchmarks/kd_step.py", *command.split())
    assert outcome.code == 0, outcome.stderr
    results = outcome.json
    assert len(results["samples"]["kd"]) == len(results["samples"]["lm"]) == 1
    assert results["ahead_over_kd"] == results["seconds"]["ahead"] / results["seconds"]["kd"]
    assert results["kd_over_lm"] == results["seconds"]["kd"] / results["seconds"]["lm"]
    assert results["flop_floor"] == 1 + results["teacher_over_student_forward"] / 3 > 1.4


@pytest.mark.slow
def test_a_step_beside_transformers(tool: Tool) -> None:
    """Both train the same model on the same tokens: the benchmark compares their losses, and fails if they differ."""
    outcome = tool("benchmarks/peer_step.py", *"--sizes demo --threads 2 --repeats 1 --steps 1 --json".split())
    assert outcome.code == 0, outcome.stderr
    results = outcome.json["demo, threads 2"]
    assert {kind: len(samples) for kind, samples in results["samples"].items()} == dict.fromkeys(results["seconds"], 1)
    seconds = results["seconds"]
    assert results["peer_over_ours_kd"] == seconds["peer_kd"] / seconds["kd"]
    assert results["peer_over_ours_lm"] == seconds["peer_lm"] / seconds["lm"]
    assert results["four_terms_over_peer_kd"] == seconds["four_terms"] / seconds["peer_kd"]


def test_losses_that_differ_end_the_comparison() -> None:
    same = [(1.0, 2.0, 0.0)] * 3
    peer_step.check_losses({"lm": same, "peer_lm": [(9.0, 2.0, 0.0)] * 3})
    with pytest.raises(SlimError, match=r"step 1 of lm: a loss of 2\.0 here and 2\.0001 of transformers"):
        peer_step.check_losses({"lm": same, "peer_lm": [same[0], (1.0, 2.0001, 0.0)]})
    with pytest.raises(SlimError, match="step 2 of lm"):
        peer_step.check_losses({"lm": same, "peer_lm": [*same[:2], (1.0, 2.01, 0.0)]})


@pytest.mark.slow
def test_cost_of_the_log(tool: Tool) -> None:
    command = "--seq-length 32 --micro-batches 2 --vocab-size 256 --iterations 2 --json"
    outcome = tool("benchmarks/run_log.py", *command.split())
    assert outcome.code == 0, outcome.stderr
    results, parts = outcome.json, outcome.json["parts_seconds_per_step"]
    assert parts.keys() == {"_now", "_add_part", "watch_backward", "count experts", "add", "end_iteration"}
    assert results["log_seconds_per_step"] == pytest.approx(sum(parts.values()), rel=1e-12)
    assert 0 < results["log_over_step"] == results["log_seconds_per_step"] / results["step_seconds"]


@pytest.mark.slow
def test_a_step_that_cannot_be_is_an_error(tool: Tool) -> None:
    outcome = tool("benchmarks/kd_step.py", "--repeats", 1, "--extra=--no-such-flag")
    assert outcome.code == 2 and "a run ended with exit code 2: " in outcome.error and "no-such-flag" in outcome.error


@pytest.mark.slow
def test_time_to_start(tool: Tool) -> None:
    outcome = tool("benchmarks/startup.py", "--only", "import", "convert", "--repeats", 1, "--json")
    assert outcome.code == 0, outcome.stderr
    results, wall = outcome.json, outcome.json["wall_seconds"]
    assert results["import_seconds"] == wall["import megatron_slim"] > 0
    slower = max(wall["hf_to_torch_dist"], wall["torch_dist_to_hf"])
    assert results["convert_over_torch_import"] == slower / wall["import torch"]
    assert "plan_256_seconds" not in results and results["cpu_ratios"].keys() == {"convert_over_torch_import"}


@pytest.mark.slow
def test_time_to_start_of_all_commands(tool: Tool) -> None:
    outcome = tool("benchmarks/startup.py", "--only", "help", "evaluate", "plan", "--repeats", 1, "--json")
    assert outcome.code == 0, outcome.stderr
    results, wall = outcome.json, outcome.json["wall_seconds"]
    assert results["help_seconds"] == wall[results["slowest_help"]] and "pretrain --help" in wall
    assert results["evaluate_over_imports"] == wall["evaluate"] / wall["imports of evaluate"]
    assert results["plan_256_seconds"] == wall["plan for 256 GPUs"]
