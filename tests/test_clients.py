"""The parts of `make test-clients` that need no client: what it compares, and what it makes of failures."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from megatron_slim import convert
from megatron_slim.compression.report_inputs import _EVALUATION
from megatron_slim.testing import tiny_shape, write_tiny_checkpoint
from tests.clients import main as clients
from tests.clients.clients import CLIENTS, KNOWN, NOT_RUN
from tests.clients.models import CASES
from tests.vlm import write_vlm

FOLDER = Path(clients.__file__).parent


@pytest.fixture(scope="module")
def common() -> ModuleType:
    """It is on the path of the scripts alone."""
    spec = importlib.util.spec_from_file_location("clients_common", FOLDER / "common.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def case(common: ModuleType, directory: Path, **arrays: object) -> object:
    (directory / "model").mkdir()
    (directory / "model/config.json").write_text("{}")
    np.savez(directory / "expected.npz", **{name: np.array(array) for name, array in arrays.items()})
    return common.Case(directory, directory)


def test_tokens_count_up_to_a_tie(common: ModuleType, tmp_path: Path) -> None:
    tried = case(common, tmp_path, tokens=[[1, 2, 3], [4, 5, 6]], margins=[[1, 1, 1], [1, 1e-5, 1]])
    assert tried.compare_tokens([[1, 2, 3], [4, 5, 6]])[0] == common.SAME_TOKENS
    assert tried.compare_tokens([[1, 2, 3], [4, 9, 9]]) == (common.SAME_TOKENS, "4 of 4 tokens, 1 texts up to a tie")
    assert tried.compare_tokens([[1, 9, 3], [4, 5, 6]]) == (common.DIFFERS, "4 of 6 tokens")


def test_logits_and_several_results(common: ModuleType, tmp_path: Path) -> None:
    tried = case(common, tmp_path, logits=np.zeros((1, 2, 3)))
    right, wrong = (tried.compare_logits(np.full((1, 2, 3), value)) for value in (1e-5, 1e-3))
    assert right[0] == common.SAME_LOGITS and wrong[0] == common.DIFFERS
    assert common.both(right, right)[0] == common.SAME_LOGITS and common.both(right, wrong)[0] == common.DIFFERS


def test_rounds_of_drafts(common: ModuleType, tmp_path: Path) -> None:
    """The first draft is at the prompt's last position, 1; an accepted one leads two positions further."""
    tried = case(common, tmp_path, prompts=[[7, 7]], agrees=[[False, *[True, False, False, True] * 5]])
    # Positions of rounds: 1 3 4 6 7 8 10 11 12 14 15 16 18 19 20, of which 1 4 8 12 16 20 are right.
    assert tried.compare_drafts(15, 6) == (common.SAME_TOKENS, "6 of 15 drafts accepted, expected 6 of 15")
    # Every other position: 1 3 5 7 9 11 13 15 17 19.
    assert tried.compare_drafts(10, 5, 2)[1].endswith("expected 5 of 10")
    assert tried.compare_drafts(14, 6)[0] == common.SAME_TOKENS
    assert tried.compare_drafts(15, 4)[0] == tried.compare_drafts(17, 6)[0] == common.DIFFERS


def test_reason_of_a_failure() -> None:
    trace = 'Traceback (most recent call last):\n  File "x"\nValueError: no such layer\nsome later line\n'
    assert clients.reason(1, trace) == "ValueError: no such layer"
    assert clients.reason(124, trace) == "out of time"
    assert clients.reason(-11, "") == "exit code -11"


def test_time_limit_ends_the_command() -> None:
    assert clients.output([sys.executable, "-c", "print(1)"], 1) == (0, "1\n", "")
    assert clients.output([sys.executable, "-c", "import time; time.sleep(60)"], 1 / 600)[0] == 124


def test_summary_fits_the_report_of_a_run() -> None:
    rows = [
        clients.Row("a", "1.0", "depth-7", "generate", "same logits", "note"),
        clients.Row("a", "1.0", "fused", "generate", clients.FAILS, "note"),
        clients.Row("b", "", "", "", clients.NOT_INSTALLED, "no wheel"),
    ]
    found = clients.summary(rows)
    assert _EVALUATION["clients"](found)
    assert found["a"] == {
        "version": "1.0",
        "loads": True,
        "note": "1 of 2 checks of tiny models; fused generate: does not load",
    }
    assert found["b"]["loads"] is False
    assert clients.summary([clients.Row("vllm-fp8", "1.0", "depth-7", "names", "same names", "note")]) == {}


def test_a_client_that_cannot_be_installed_fails_where_it_was_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(clients, "prepare", lambda *_: None)
    monkeypatch.setattr(clients, "install", lambda *_: "ERROR: No matching distribution found for mlx")
    for names, code in ((["mlx-lm"], 1), ([], 0)):
        monkeypatch.setattr(sys, "argv", ["main", *names, "--work", str(tmp_path)])
        assert clients.main() == code
        line = "not installed, so not tried: mlx-lm: ERROR: No matching distribution found for mlx (it needs a package"
        assert line in capsys.readouterr().out


def test_known_failures_are_of_checks_that_are_run() -> None:
    cases = {case.name: case for case in CASES}
    for client, check, name in KNOWN:
        assert CLIENTS[client].checks[check](cases[name])
    assert all((FOLDER / client.script).is_file() for client in CLIENTS.values()) and not NOT_RUN.keys() & CLIENTS


RULE = """
def is_layer_skipped(prefix: str, ignored: list[str], fused: Mapping[str, list[str]] = MappingProxyType({})) -> bool:
    parent, _, last = prefix.rpartition(".")
    return {f"{parent}.{shard}" in ignored for shard in fused.get(last, [last])} == {True}
"""
CONFIG = """
class Fp8Config(Base):
    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Fp8Config:
        return cls(ignored_layers=cls.get_from_keys_or(config, ["ignored", "modules_to_not_convert"], None))
"""
MODEL = """
class Qwen3NextForCausalLM(Base):
    packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
"""


PICTURES = """
class Qwen3VLForConditionalGeneration(Base):
    packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
"""
WHOLE = """
class Qwen3_5ForConditionalGeneration(Qwen3VLForConditionalGeneration):
    packed_modules_mapping = Qwen3VLForConditionalGeneration.packed_modules_mapping | {
        "in_proj_qkvz": ["in_proj_qkv", "in_proj_z"], "in_proj_ba": ["in_proj_b", "in_proj_a"]
    }
"""


def rules(directory: Path, **models: str) -> Callable[[], dict[str, str]]:
    """Sources in the layout of vLLM's, without what they would import; gives what its rules make of ``case``."""
    engine = directory / "site/vllm/model_executor"
    files = {"layers/quantization/fp8.py": CONFIG, "layers/quantization/utils/quant_utils.py": RULE}
    for name, text in (files | {f"models/{name}.py": text for name, text in models.items()}).items():
        (engine / name).parent.mkdir(parents=True, exist_ok=True)
        (engine / name).write_text(f"import none_of_this\n{text}")
    np.savez(directory / "case/expected.npz", prompts=[[1]])
    convert(directory / "case/model", directory / "case/fp8", to="hf", quantize="fp8")
    command = [sys.executable, FOLDER / "run_fp8_rules.py", directory / "case", directory, "names"]

    def found() -> dict[str, str]:
        code, stdout, stderr = clients.output(command, 1, {"PYTHONPATH": str(directory / "site")})
        assert code == 0, stderr
        return dict(json.loads(stdout.splitlines()[-1]))

    return found


def take_out(name: str, export: Path) -> None:
    """Of the list of modules that are not in FP8."""
    config = json.loads((export / "config.json").read_text())
    config["quantization_config"]["modules_to_not_convert"].remove(name)
    (export / "config.json").write_text(json.dumps(config))


def test_rules_of_an_engine_are_run_on_an_export_in_fp8(tmp_path: Path) -> None:
    (tmp_path / "case").mkdir()
    write_tiny_checkpoint(tmp_path / "case/model", tiny_shape())
    found = rules(tmp_path, qwen3_next=MODEL)
    # 3 layers of Gated DeltaNet with 3 (2 in FP8), one of attention and the MTP block with 2 (2), every MLP with 5 (3);
    # and mtp.fc.
    assert found() == {"result": "same names", "note": "vllm: 39 of 39 linear layers as in the files, 25 in FP8"}
    take_out("mtp.fc", tmp_path / "case/fp8")
    assert found()["note"].endswith("38 of 39 linear layers as in the files, 25 in FP8: not mtp.fc")
    assert found()["result"] == "other results"


def test_rules_of_an_engine_that_renames_what_sees_pictures(tmp_path: Path) -> None:
    write_vlm(tmp_path / "case/model")
    found = rules(tmp_path, qwen3_vl=PICTURES, qwen3_5=WHOLE)
    # The same layers, and the vision tower's: 4 in each of 2 blocks, and 2 that merge patches.
    assert found() == {"result": "same names", "note": "vllm: 49 of 49 linear layers as in the files, 25 in FP8"}
    take_out("model.visual.merger.linear_fc2", tmp_path / "case/fp8")
    assert found()["note"].endswith("48 of 49 linear layers as in the files, 25 in FP8: not visual.merger.linear_fc2")
