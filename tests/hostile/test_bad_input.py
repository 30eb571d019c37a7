"""What a person sees who gives a tool something wrong: one line, exit code 2, nothing left behind.

Errors of shards and index are in tests/checkpoint, of recipes in tests/test_recipe.py, of text in tests/tools.
"""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_slim.cli.calibration_run import CalibrationOptions, run_calibrate
from megatron_slim.cli.given_statistics import Given
from megatron_slim.cli.pruning_run import run_plan
from megatron_slim.testing import tiny_shape, write_tiny_checkpoint

PRUNE, CALIBRATE, PLAN = "tools/prune_checkpoint.py", "tools/calibrate.py", "tools/plan_pruning.py"
CONVERT, EVALUATE, PREPROCESS = "tools/convert_checkpoint.py", "tools/evaluate.py", "tools/preprocess_data.py"
SHAPE = tiny_shape(num_layers=2, layer_types=("linear_attention", "full_attention"), max_position_embeddings=32)
RECIPE = "version: 1\ntarget: {num_layers: 2, hidden_size: 48, num_moe_experts: 4, moe_router_topk: 2}\n"
MODEL, CONFIG, STATS = "hf/model.safetensors", "hf/config.json", "stats.safetensors"
O_PROJ = "model.layers.1.self_attn.o_proj.weight"
OPTIONS = {
    PRUNE: "--load hf --recipe recipe.yaml --calibration-data tokens.npy --save out",
    CALIBRATE: "--load hf --calibration-data tokens.npy --save out.safetensors",
    PLAN: "--load hf --stats stats.safetensors --recipe recipe.yaml --save out.json",
    CONVERT: "--load hf --save out",
    EVALUATE: "--load hf --data tokens.npy",
    PREPROCESS: "--input text.txt --tokenizer-model tokenizer --output-prefix out",
}
BY_PLAN = "--plan plan.json --recipe - --calibration-data -"
BIN = "--data d --seq-length 8"
Prepare = Callable[[Path], Any]


class Case(NamedTuple):
    """A tool, its options where they differ from `OPTIONS` ("-" drops one), what to break, what the error says."""

    tool: str
    options: str
    prepare: Prepare
    message: str


def untouched(work: Path) -> None:
    pass


def text(name: str, content: str | bytes) -> Prepare:
    return lambda work: (work / name).write_bytes(content.encode() if isinstance(content, str) else content)


def config(**changes: Any) -> Prepare:
    return lambda work: edit(work / CONFIG, **changes)


def plan(**changes: Any) -> Prepare:
    return lambda work: edit(work / "plan.json", **changes)


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def weights(change: Callable[[dict[str, torch.Tensor]], Any]) -> Prepare:
    def apply(work: Path) -> None:
        tensors = load_file(work / MODEL)
        change(tensors)
        save_file(tensors, work / MODEL)

    return apply


def drop(*prefixes: str) -> Prepare:
    return weights(lambda tensors: [tensors.pop(name) for name in list(tensors) if name.startswith(prefixes)])


def fill(name: str, value: float) -> Prepare:
    return weights(lambda tensors: tensors[name].fill_(value))


def nan(name: str) -> Prepare:
    return fill(name, float("nan"))


def header(change: Callable[[dict[str, Any]], Any], padding: bytes = b"") -> Prepare:
    """Change the header of the model's file, and put bytes between it and the tensors."""

    def apply(work: Path) -> None:
        content = (work / MODEL).read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        head = json.loads(content[8 : 8 + length])
        head.pop("__metadata__")
        change(head)
        payload = json.dumps(head).encode()
        (work / MODEL).write_bytes(struct.pack("<Q", len(payload)) + payload + padding + content[8 + length :])

    return apply


def overlap(head: dict[str, Any]) -> None:
    head["lm_head.weight"]["data_offsets"] = head["model.embed_tokens.weight"]["data_offsets"]


def shift(head: dict[str, Any]) -> None:
    for entry in head.values():
        entry["data_offsets"] = [offset + 8 for offset in entry["data_offsets"]]


def cut(name: str, count: int) -> Prepare:
    return lambda work: (work / name).write_bytes((work / name).read_bytes()[:-count])


def array(value: Any) -> Prepare:
    return lambda work: np.save(work / "x.npy", value, allow_pickle=True)


def ids(largest: int, length: int = 12) -> Any:
    return np.full((2, length), largest)


def dataset(largest: int = 5, tokens: int = 40) -> Prepare:
    return lambda work: write_dataset(work / "d", largest, tokens)


def write_dataset(prefix: Path, largest: int, tokens: int) -> None:
    """A Megatron data set of one document, or none."""
    Path(f"{prefix}.bin").write_bytes(np.full(tokens, largest, np.int32).tobytes())
    count = int(tokens > 0)
    parts = [np.full(count, tokens, np.int32), np.zeros(count, np.int64), np.arange(count + 1, dtype=np.int64)]
    head = struct.pack("<9sQBQQ", b"MMIDIDX\x00\x00", 1, 4, count, count + 1)
    Path(f"{prefix}.idx").write_bytes(head + b"".join(part.tobytes() for part in parts))


def lose_documents(work: Path) -> None:
    """Document boundaries 0, 0 where there is one sequence."""
    write_dataset(work / "d", 5, 40)
    (work / "d.idx").write_bytes((work / "d.idx").read_bytes()[:-8] + bytes(8))


def tracker(content: str) -> Prepare:
    return steps(lambda work: (work / "dist").mkdir(), text("dist/latest_checkpointed_iteration.txt", content))


def steps(*actions: Prepare) -> Prepare:
    return lambda work: [action(work) for action in actions]


def link(name: str) -> Prepare:
    return lambda work: (work / name).symlink_to("nowhere")


CHECKPOINTS = {
    "missing tensor": Case(PRUNE, "", drop("lm_head"), "1 missing tensors: lm_head.weight"),
    "extra tensor": Case(EVALUATE, "", weights(lambda t: t.update(x=torch.zeros(2))), "1 extra tensors: x"),
    "wrong shape": Case(
        CONVERT,
        "",
        weights(lambda t: t.update({"model.norm.weight": torch.zeros(3)})),
        "model.norm.weight [3], config.json says [64]",
    ),
    "half an MTP block": Case(CALIBRATE, "", drop("mtp.fc"), "1 missing tensors: mtp.fc.weight"),
    "MTP without its layer": Case(CALIBRATE, "", drop("mtp.layers.0"), "37 missing tensors: mtp.layers.0."),
    "two MTP blocks": Case(
        CALIBRATE,
        "",
        weights(lambda t: t.update({"mtp.layers.1.x": torch.zeros(2)})),
        "says 1 MTP blocks, the tensors 2",
    ),
    "bytes behind": Case(CONVERT, "", header(lambda head: head.pop("lm_head.weight")), "bytes of no tensor"),
    "garbage behind": Case(
        CONVERT,
        "",
        lambda work: (work / MODEL).write_bytes((work / MODEL).read_bytes() + b"garbage"),
        "7 bytes after the last tensor",
    ),
    "overlap": Case(CONVERT, "", header(overlap), "overlaps the tensor before it"),
    "gap": Case(CONVERT, "", header(shift, bytes(8)), "follows 8 bytes of no tensor"),
    "null entry": Case(CONVERT, "", header(lambda head: head.update(x=None)), "malformed header entry of x"),
    "deep header": Case(CONVERT, "", text(MODEL, struct.pack("<Q", 200000) + b"[" * 200000), "its header is not JSON"),
    "dead link to weights": Case(
        CONVERT, "", steps(lambda work: (work / MODEL).unlink(), link(MODEL)), "nor model.safetensors"
    ),
    "dead link to load": Case(CONVERT, "--load dead", link("dead"), "dead: no such directory"),
    "pickles": Case(
        CONVERT, "", lambda work: (work / MODEL).rename(work / "hf/pytorch_model.bin"), "which are never loaded"
    ),
    "load a file": Case(PRUNE, "--load recipe.yaml", untouched, "recipe.yaml: is a file"),
    "load nothing": Case(EVALUATE, "--load nowhere", untouched, "nowhere: no such directory"),
    "plan for nothing": Case(PLAN, "--load nowhere", untouched, "nowhere: no such directory"),
    "torn tracker": Case(CONVERT, "--load dist", tracker(""), "latest_checkpointed_iteration.txt: holds ''"),
    "lost iteration": Case(EVALUATE, "--load dist", tracker("7"), "names iter_0000007, which does not exist"),
    "interrupted": Case(
        CONVERT,
        "--load dist",
        steps(tracker("release"), lambda work: (work / "dist/release").mkdir()),
        "no .metadata in this directory",
    ),
    "NaN in calibration": Case(CALIBRATE, "", nan("mtp.fc.weight"), "mtp.fc.weight: 8192 of 8192 values are NaN or"),
    "NaN in pruning": Case(PRUNE, "", nan(O_PROJ), f"{O_PROJ}: 4096 of 4096 values are NaN or infinite; repair"),
    "NaN in conversion": Case(CONVERT, "", nan(O_PROJ), f"{O_PROJ}: 4096 of 4096 values are NaN or infinite; repair"),
    "NaN in evaluation": Case(EVALUATE, "", nan("model.norm.weight"), "model.norm.weight: 64 of 64 values are NaN or"),
    "overflow in a layer": Case(CALIBRATE, "", fill(O_PROJ, 3e38), "model.layers.1 is not finite"),
    "overflow in a router": Case(
        PRUNE, "", fill("model.layers.0.mlp.gate.weight", 3e38), "model.layers.0 is not finite"
    ),
    "overflow in MTP": Case(CALIBRATE, "", fill("mtp.fc.weight", 3e38), "mtp.fc is not finite"),
    "overflow in evaluation": Case(EVALUATE, "", fill("model.norm.weight", 3e38), "not finite"),
}
CONFIGS = {
    "unknown layer type": (config(layer_types=["mamba", "full_attention"]), "unknown layer type 'mamba'"),
    "layer_types a string": (config(layer_types="full_attention"), "layer_types 'full_attention' is not a list"),
    "layer_types of lists": (config(layer_types=[["a"], None]), "are not all strings"),
    "interval 0": (config(layer_types=None, full_attention_interval=0), "full_attention_interval 0 is not a positive"),
    "interval x": (config(layer_types=None, full_attention_interval="x"), "full_attention_interval 'x' is not"),
    "wrong types": (
        config(hidden_size="64", num_experts=None, vocab_size=1.5, rms_norm_eps="1e-6", norm_topk_prob="yes"),
        "hidden_size '64' is not a positive integer below 2**31; vocab_size 1.5 is not a positive integer below 2**31; "
        "num_experts None is not a positive integer below 2**31; rms_norm_eps '1e-6' is not a finite number of zero or "
        "more; norm_topk_prob 'yes' is neither true nor false",
    ),
    "impossible sizes": (
        config(num_attention_heads=5, linear_num_key_heads=3, num_experts_per_tok=9),
        "num_attention_heads 5 is not a multiple of num_query_groups 2; linear_num_value_heads 4 is not a multiple of "
        "linear_num_key_heads 3; moe_router_topk 9 is larger than num_moe_experts 8",
    ),
    "NaN": (config(partial_rotary_factor=float("nan")), "not readable as JSON (NaN is not a finite number)"),
    "no number": (config(router_aux_loss_coef=None), "router_aux_loss_coef None is not a finite number"),
    "theta 0": (config(rope_theta=0), "rotary_base 0.0 is not above zero"),
    "rope_parameters a list": (config(rope_parameters=[1]), "rope_parameters [1] is not an object"),
    "another model": (config(model_type="llama"), "model_type 'llama' is not supported"),
    "many layers": (config(num_hidden_layers=100_000, layer_types=None), "need more than 800000"),
    "too many layers": (config(num_hidden_layers=10**12, layer_types=None), "is more than 100000"),
    "too many experts": (config(num_experts=10**30), "is not a positive integer below 2**31"),
    "not UTF-8": (text(CONFIG, b"\xff{}"), "config.json: not readable as JSON"),
    "deep": (text(CONFIG, "[" * 100_000), "config.json: not readable as JSON"),
}
DATA = {
    "ids in calibration": Case(
        CALIBRATE,
        "--calibration-data x.npy",
        array(ids(128)),
        "x.npy, sample 0: token id 128 is beyond the vocabulary of 128",
    ),
    "ids in evaluation": Case(EVALUATE, "--data x.npy", array(ids(500)), "token id 500 is beyond the vocabulary"),
    "ids in a .bin": Case(EVALUATE, BIN, dataset(500), "d, sample 0: token id 500 is beyond the vocabulary"),
    "negative ids": Case(EVALUATE, "--data x.npy", array(ids(-1)), "x.npy, sample 0: token id -1 is below 0"),
    "padding in a .bin": Case(EVALUATE, f"{BIN} --record", dataset(-1), "d, sample 0: token id -1 is below 0"),
    "ignored ids in calibration": Case(
        CALIBRATE,
        "--calibration-data d --seq-length 8 --num-samples 5",
        dataset(-100),
        "d, sample 0: token id -100 is below 0; an id overflowed, or stands for 'ignore' or padding",
    ),
    "lost documents": Case(EVALUATE, BIN, lose_documents, "d.idx: its documents are sequences 0 to 0, there are 1"),
    "lost documents in calibration": Case(
        CALIBRATE, "--calibration-data d --seq-length 8 --num-samples 1", lose_documents, "d.idx: its documents are"
    ),
    "uint64": Case(EVALUATE, "--data x.npy", array(np.full((2, 12), 2**64 - 1, np.uint64)), "beyond the vocabulary"),
    "floats": Case(CALIBRATE, "--calibration-data x.npy", array(np.zeros((2, 3))), "is float64 [2, 3], not an integer"),
    "booleans": Case(EVALUATE, "--data x.npy", array(np.ones((2, 12), bool)), "is bool [2, 12], not an integer"),
    "one dimension": Case(EVALUATE, "--data x.npy", array(np.zeros(3, int)), "is int64 [3], not an integer matrix"),
    "no samples": Case(
        EVALUATE, "--data x.npy", array(np.zeros((0, 9), int)), "is int64 [0, 9], not an integer matrix"
    ),
    "objects": Case(EVALUATE, "--data x.npy", array(np.array([[1], "a"], object)), "x.npy: not readable as a .npy"),
    "torn matrix": Case(EVALUATE, "", cut("tokens.npy", 5), "tokens.npy: not readable as a .npy matrix"),
    "directory": Case(EVALUATE, "--data x.npy", lambda work: (work / "x.npy").mkdir(), "not readable as a .npy matrix"),
    "text": Case(CALIBRATE, "--calibration-data text.txt", untouched, "tokenize text with megatron-slim preprocess"),
    "nothing": Case(CALIBRATE, "--calibration-data nowhere", untouched, "nowhere: no such data"),
    "torn .bin": Case(EVALUATE, BIN, steps(dataset(), cut("d.bin", 2)), "d.bin: truncated: 158 bytes"),
    "empty .bin": Case(EVALUATE, BIN, dataset(tokens=0), "d.bin: holds no tokens"),
    "no .idx": Case(
        CALIBRATE,
        "--calibration-data d",
        steps(dataset(), lambda work: (work / "d.idx").unlink()),
        "d.idx: its other half is missing",
    ),
    "too long": Case(
        EVALUATE, "--data x.npy", array(ids(1, 33)), "of 33 tokens, the model's max_position_embeddings is"
    ),
    "too long .bin": Case(CALIBRATE, "--calibration-data d --seq-length 33 --num-samples 1", dataset(), "is 32; use"),
    "too short": Case(CALIBRATE, "--calibration-data x.npy", array(ids(1, 1)), "too short for the MTP block"),
    "too few": Case(
        CALIBRATE,
        "--calibration-data d --num-samples 2",
        dataset(),
        "2 samples asked for, 1 there; ask for 1 or fewer (num_samples), or for shorter ones (seq_length)",
    ),
    "too few to evaluate on": Case(
        EVALUATE,
        "--data d --seq-length 8 --num-samples 6",
        dataset(),
        "6 samples asked for, 5 there; ask for 5 or fewer",
    ),
    "not one sample": Case(CALIBRATE, "--calibration-data d", dataset(tokens=31), "one sample of 32; ask for shorter"),
}
FILES = {
    "output exists": Case(CONVERT, "", lambda work: (work / "out").mkdir(), "out: output already exists"),
    "output is a file": Case(PRUNE, "", text("out", ""), "out: output already exists"),
    "output is a dead link": Case(CONVERT, "", link("out"), "out: output already exists"),
    "statistics are a dead link": Case(CALIBRATE, "", link("out.safetensors"), "output already exists"),
    "no parent": Case(PLAN, "--save no/out", untouched, "parent directory of the output does not exist"),
    "no parent of a prefix": Case(PREPROCESS, "--output-prefix no/out", untouched, "parent directory of the output"),
    "parent is a file": Case(CONVERT, "--save text.txt/out", untouched, "parent directory of the output"),
    "long name": Case(CONVERT, "--save " + "o" * 300, untouched, "cannot be written (File name too long)"),
    "other statistics": Case(PLAN, "", fill("model.norm.weight", 7), "measured on another checkpoint"),
    "another plan": Case(PRUNE, BY_PLAN, fill("model.norm.weight", 7), "made for another checkpoint"),
    "torn statistics": Case(PLAN, "", cut(STATS, 50), "stats.safetensors: not readable as safetensors"),
    "weights for statistics": Case(PLAN, "--stats " + MODEL, untouched, "not a file of calibration statistics"),
    "torn plan": Case(PRUNE, BY_PLAN, cut("plan.json", 50), "plan.json: not readable as JSON"),
    "no plan": Case(PRUNE, BY_PLAN, text("plan.json", "[]"), "not a plan of version 2"),
    "edited recipe": Case(PRUNE, BY_PLAN, plan(recipe={"version": 1, "target": {}}), "target.shape is not what"),
    "edited target": Case(PRUNE, BY_PLAN, plan(target={"shape": {}}), "shape is not an object with all sizes"),
    "edited experts": Case(PRUNE, BY_PLAN, plan(experts={}), "experts are not given for exactly the blocks"),
    "recipe typo": Case(
        PRUNE, "", text("recipe.yaml", "version: 1\ntarget: {num_layer: 2}\n"), "(did you mean 'num_layers'?)"
    ),
    "recipe no YAML": Case(PRUNE, "", text("recipe.yaml", "a: [b\n c: }"), "recipe.yaml: not readable as YAML"),
    "recipe binary": Case(PRUNE, "", text("recipe.yaml", b"\0\xff"), "recipe.yaml: not readable as YAML"),
    "recipe empty": Case(PLAN, "", text("recipe.yaml", ""), "a recipe is a mapping, not NoneType"),
    "impossible target": Case(
        PRUNE,
        "",
        text("recipe.yaml", "version: 1\ntarget: {num_layers: 9, hidden_size: 63, num_moe_experts: 9}\n"),
        "num_layers 9 is larger than the source's 2; target.num_moe_experts 9 is larger than the source's 8; "
        "target.hidden_size 63 is not a multiple of 8",
    ),
    "no tokenizer": Case(PREPROCESS, "", untouched, "no such tokenizer directory"),
    "no tokenizer files": Case(PREPROCESS, "--tokenizer-model hf", untouched, "hf: no tokenizer files"),
    "broken tokenizer": Case(
        PREPROCESS, "--tokenizer-model hf", text("hf/tokenizer.json", "{}"), "hf: not a tokenizer directory"
    ),
}
FLAGS = {
    "num-samples": Case(
        CALIBRATE, "--num-samples 0", untouched, "argument --num-samples: '0' is not a positive integer"
    ),
    "seq-length": Case(PRUNE, "--seq-length -1", untouched, "argument --seq-length: '-1' is not a positive integer"),
    "micro-batch-size": Case(EVALUATE, "--micro-batch-size 0", untouched, "--micro-batch-size: '0' is not a positive"),
    "seed": Case(EVALUATE, "--seed -1", untouched, "argument --seed: '-1' is not an integer that is zero or more"),
    "workers": Case(PREPROCESS, "--workers 0", untouched, "argument --workers: '0' is not a positive integer"),
    "log-interval": Case(PREPROCESS, "--log-interval x", untouched, "--log-interval: 'x' is not a positive integer"),
    "unknown": Case(EVALUATE, "--dta x", untouched, "unrecognized arguments: --dta x"),
    "missing": Case(EVALUATE, "--data -", untouched, "nothing to evaluate on"),
    "same format": Case(CONVERT, "--to hf", untouched, "is a hf checkpoint already"),
    "hf-config": Case(CONVERT, "--hf-config hf", untouched, "leave --hf-config out"),
    "hf-config of evaluation": Case(EVALUATE, "--hf-config hf", untouched, "leave --hf-config out"),
}
CASES = {
    **CHECKPOINTS,
    **{f"config: {name}": Case(CONVERT, "", *each) for name, each in CONFIGS.items()},
    **{f"data: {name}": case for name, case in DATA.items()},
    **FILES,
    **{f"flag: {name}": case for name, case in FLAGS.items()},
}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with everything that the tools need; no tokenizer."""
    root = tmp_path_factory.mktemp("good")
    write_tiny_checkpoint(root / "hf", SHAPE, shards=1)
    np.save(root / "tokens.npy", np.random.default_rng(0).integers(0, SHAPE.vocab_size, (4, 12)))
    (root / "recipe.yaml").write_text(RECIPE)
    (root / "text.txt").write_text("Some text.\n")
    run_calibrate(root / "hf", root / STATS, CalibrationOptions(root / "tokens.npy", None, None, 0, None))
    run_plan(root / "hf", Given(root / STATS), root / "recipe.yaml", root / "plan.json")
    return root


@pytest.fixture
def work(good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, the working directory."""
    directory = shutil.copytree(good, tmp_path / "work")
    monkeypatch.chdir(directory)
    return Path(directory)


def command_line(tool: str, more: str) -> list[str]:
    """`OPTIONS` of a tool, changed."""
    options: dict[str, list[str]] = {}
    for word in f"{OPTIONS[tool]} {more}".split():
        if word.startswith("--"):
            options[word] = values = []
        else:
            values.append(word)
    return [word for flag, values in options.items() if values != ["-"] for word in (flag, *values)]


def snapshot(directory: Path) -> dict[str, int]:
    return {str(path.relative_to(directory)): path.lstat().st_size for path in directory.rglob("*")}


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_one_line(tool: Callable[..., Any], work: Path, name: str) -> None:
    script, options, prepare, message = CASES[name]
    prepare(work)
    before = snapshot(work)
    outcome = tool(script, *command_line(script, options))
    assert message in outcome.error
    noise = [line for line in outcome.stderr.splitlines()[:-1] if not line.startswith("calibrating on ")]
    assert noise == [] and outcome.stdout == ""
    assert snapshot(work) == before


def test_checkpoints_without_tokenizer_work_on_token_ids(tool: Callable[..., Any], work: Path) -> None:
    """Every tool that reads token ids, on either format."""
    for script in (CONVERT, CALIBRATE, PLAN, EVALUATE):
        outcome = tool(script, *command_line(script, "--save dist" if script == CONVERT else ""))
        assert outcome.code == 0, outcome.stderr
    for load in ("hf", "dist"):
        outcome = tool(PRUNE, *command_line(PRUNE, f"--load {load} --save pruned-{load} --to torch_dist"))
        assert outcome.code == 0, outcome.stderr
        assert tool(EVALUATE, *command_line(EVALUATE, f"--load pruned-{load}")).code == 0
        assert tool(CONVERT, *command_line(CONVERT, f"--load pruned-{load} --save {load}-back")).code == 0
