"""The Python API: names, laziness, order of imports, and the same results as the commands."""

from __future__ import annotations

import ast
import json
import logging
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import megatron_slim as slim
from megatron_slim import api
from megatron_slim.testing import tiny_shape, write_tiny_checkpoint, write_tokens

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "megatron_slim"
RECIPE = {
    "version": 1,
    "target": {"hidden_size": 32, "num_moe_experts": 4, "moe_router_topk": 2},
    "experts": {"method": "merge", "importance": "reap"},
}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("api") / "teacher"
    write_tiny_checkpoint(path, tiny_shape())
    return path


@pytest.fixture(scope="module")
def samples() -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).integers(0, tiny_shape().vocab_size, (4, 16))


class Recorded:
    """A progress reporter that keeps what it is told."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def items(self, items: Sequence[Any], description: str) -> Iterator[Any]:
        self.told.append(f"{description}: {len(items)}")
        yield from items

    @contextmanager
    def amount(
        self, description: str, total: int | None, show: Callable[[float], str]
    ) -> Iterator[Callable[[int], None]]:
        done: list[int] = []
        yield done.append
        self.told.append(f"{description}: {sum(done)} of {total}")


def test_names() -> None:
    assert slim.__all__ == sorted(slim.__all__) == sorted(api.__all__)
    assert set(slim.__all__) <= set(dir(slim))
    for name in slim.__all__:
        assert getattr(slim, name) is getattr(api, name)
        if callable(getattr(slim, name)):
            assert getattr(slim, name).__doc__
    with pytest.raises(AttributeError, match="no attribute 'quantize'"):
        slim.quantize  # noqa: B018


def content(directory: Path) -> dict[str, bytes]:
    """Every tensor of a Hugging Face directory as the bytes that the files hold."""
    found = {}
    for path in directory.glob("*.safetensors"):
        found |= {name: tensor.view(torch.uint8).numpy().tobytes() for name, tensor in load_file(path).items()}
    return found


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)


def test_import_is_light() -> None:
    done = run("import sys, megatron_slim as s; dir(s); print({'torch', 'numpy', 'yaml'} & set(sys.modules))")
    assert (done.stdout, done.stderr) == ("set()\n", "")


def test_from_checkpoint_to_pruned_model(
    teacher: Path, samples: np.ndarray[Any, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], tool: Any
) -> None:
    source, shown = slim.open_checkpoint(teacher), Recorded()
    statistics = slim.calibrate(source, samples, progress=shown)
    assert shown.told == [f"calibrating: {len(list(source.shape.blocks)) + 1}"] or shown.told
    statistics.save(tmp_path / "s.stats")
    plan = slim.make_plan(slim.read_recipe(RECIPE), source, slim.read_statistics(tmp_path / "s.stats"))
    assert "hidden" in str(plan) and str(plan.target_shape.hidden_size) in str(plan)
    plan.save(tmp_path / "plan.json")
    assert slim.read_plan(tmp_path / "plan.json") == plan
    written = slim.prune(source, plan, tmp_path / "student", statistics=statistics, progress=shown)
    assert any(str(written["bytes"]) in line for line in shown.told)
    assert written["parameters"] == slim.count_parameters(plan.target_shape).total
    assert set(slim.figures(plan, statistics)) == {"importances.png", "experts.png"}
    assert capsys.readouterr() == ("", "")  # a library does not print

    # The commands give the same bytes.
    np.save(tmp_path / "samples.npy", samples)
    (tmp_path / "recipe.yaml").write_text(json.dumps(RECIPE))
    paths = ["--recipe", tmp_path / "recipe.yaml", "--calibration-data", tmp_path / "samples.npy"]
    outcome = tool("tools/prune_checkpoint.py", "--load", teacher, *paths, "--save", tmp_path / "by_command")
    assert outcome.code == 0, outcome.stderr
    for name in ("model.safetensors", "config.json", "plan.json", "calibration.stats"):
        assert (tmp_path / "student" / name).read_bytes() == (tmp_path / "by_command" / name).read_bytes(), name


def test_convert_and_evaluate(teacher: Path, samples: np.ndarray[Any, Any], tmp_path: Path) -> None:
    there = slim.convert(teacher, tmp_path / "dist", to="torch_dist")
    back = slim.convert(tmp_path / "dist", str(tmp_path / "back"), to="hf")
    assert there["verified"] and back["tensors"] == there["tensors"]
    assert content(tmp_path / "back") == content(teacher)
    one, other = slim.evaluate(teacher, samples), slim.evaluate(tmp_path / "dist", samples)
    assert one == other and one.loss == pytest.approx(np.log(tiny_shape().vocab_size), rel=0.2)
    assert len(one.mtp_loss) == tiny_shape().mtp_num_layers and one.perplexity > 1


def examples() -> list[tuple[str, str]]:
    """Page and code of every example that goes from a checkpoint to a pruned one."""
    text = str(slim.__doc__)
    indented = text[text.index("    import") : text.rindex("The names")]
    blocks = [("megatron_slim", textwrap.dedent(indented))]
    for page in ("README.md", "docs/python_api.md"):
        text = (ROOT / page).read_text(encoding="utf-8")
        codes = re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)
        blocks += [(page, code) for code in codes if "calibrate(" in code]
    return blocks


@pytest.mark.parametrize("page_and_code", examples(), ids=lambda example: example[0])
def test_examples_of_the_docs_run(
    page_and_code: tuple[str, str], teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a tiny model and a tiny recipe under the published names: a file comes before a name."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "Qwen3-Next-80B-A3B").symlink_to(teacher)
    (tmp_path / "qwen3_next_80a3b_to_23a2b").write_text(json.dumps(RECIPE))
    for name in ("corpus_text_document", "validation_text_document"):
        write_tokens(tmp_path / name, [np.arange(64) % 100])
    code = re.sub(r"num_samples=\d+", "num_samples=2", page_and_code[1].replace("seq_length=4096", "seq_length=16"))
    code = code.replace('"corpus_text_document")', '"corpus_text_document", num_samples=2, seq_length=16)')
    exec(code, {})
    (student,) = re.findall(r'slim.prune\(teacher, plan, "([^"]+)"', code)
    assert slim.open_checkpoint(student).shape.hidden_size == RECIPE["target"]["hidden_size"]  # type: ignore[index]


def test_what_a_caller_can_fix_is_a_slim_error(teacher: Path, samples: np.ndarray[Any, Any], tmp_path: Path) -> None:
    with pytest.raises(slim.SlimError, match="seq_length"):
        slim.evaluate(teacher, samples, seq_length=7)
    with pytest.raises(slim.SlimError, match="not an integer matrix"):
        slim.calibrate(teacher, samples[0])
    with pytest.raises(slim.SlimError, match="did you mean qwen3_next_80a3b_to_23a2b"):
        slim.read_recipe("qwen3_next_80a3b_to_23b2b")
    with pytest.raises(slim.SlimError, match="exists"):
        slim.convert(teacher, tmp_path, to="torch_dist")
    with pytest.raises(slim.SlimError, match="'gguf' is not a format of checkpoints; give hf or torch_dist"):
        slim.convert(teacher, tmp_path / "new", to="gguf")  # type: ignore[arg-type]
    for call, message in (
        (
            lambda: slim.evaluate(teacher, samples, micro_batch_size=0),
            "micro_batch_size: 0 is not a whole number above",
        ),
        (lambda: slim.calibrate(teacher, samples, micro_batch_size=-1), "micro_batch_size: -1 is not a whole number"),
        (lambda: slim.record(teacher, samples, tmp_path / "new", num_samples=0), "num_samples: 0 is not a whole"),
        (
            lambda: slim.record(teacher, samples, tmp_path / "new", states="int8"),
            "states: 'int8' is not one of fp32, b",
        ),
        (lambda: slim.evaluate(teacher, samples, micro_batch_size=True), "micro_batch_size: True is not a whole"),
        (
            lambda: slim.evaluate(teacher, samples.tolist()),
            "data: is of type list, not a path or an array; give a path",
        ),
        (lambda: slim.acceptance(teacher, []), "prompts: no prompts"),
        (lambda: slim.acceptance(teacher, [[1], []]), "prompts: a prompt is empty"),
    ):
        with pytest.raises(slim.SlimError, match=message):
            call()
    assert not (tmp_path / "new").exists()


def test_numbers_and_ids_of_numpy(teacher: Path, samples: np.ndarray[Any, Any], tmp_path: Path) -> None:
    """Are those of Python; ids of another type, or in a file, give the same plan."""
    statistics = slim.calibrate(teacher, samples, num_samples=np.int64(2), micro_batch_size=np.int32(2))  # type: ignore[type-var]
    statistics.save(tmp_path / "statistics")
    slim.calibrate(teacher, samples, num_samples=2, micro_batch_size=2).save(tmp_path / "expected")
    assert (tmp_path / "statistics").read_bytes() == (tmp_path / "expected").read_bytes()
    recipe = slim.read_recipe({"version": 1, "target": {"num_moe_experts": 2}, "experts": {"allocation": "loss"}})
    np.save(tmp_path / "ids.npy", samples)
    plans = [
        slim.make_plan(recipe, teacher, statistics, samples=each)
        for each in (samples, samples.astype(np.int32), tmp_path / "ids.npy")
    ]
    assert plans[0].to_dict() == plans[1].to_dict() == plans[2].to_dict()


def test_a_name_where_its_content_is_expected(teacher: Path, samples: np.ndarray[Any, Any], tmp_path: Path) -> None:
    plan: Any = tmp_path / "plan.json"
    with pytest.raises(slim.SlimError, match="recipe: is of type str, not Recipe; read it with read_recipe"):
        slim.make_plan("qwen3_next_80a3b_to_23a2b", teacher, slim.calibrate(teacher, samples))  # type: ignore[arg-type]
    with pytest.raises(slim.SlimError, match="statistics: is of type PosixPath, not Statistics"):
        slim.make_plan(slim.read_recipe(RECIPE), teacher, plan)
    with pytest.raises(slim.SlimError, match="plan: is of type PosixPath, not Plan; read it with read_plan"):
        slim.prune(teacher, plan, tmp_path / "new")


def test_parameters_of_sizes_and_of_checkpoints(teacher: Path) -> None:
    counted = slim.count_parameters(tiny_shape())
    assert counted == slim.count_parameters(teacher) == slim.count_parameters(slim.open_checkpoint(str(teacher)))
    files = teacher.glob("*.safetensors")
    assert counted.total == sum(tensor.numel() for file in files for tensor in load_file(file).values())
    trunk = slim.count_parameters(teacher, include_mtp=False)
    assert trunk.total < counted.total and trunk.active < trunk.total
    with pytest.raises(slim.SlimError, match="checkpoint: is of type dict, not a checkpoint; give its path, or open"):
        slim.count_parameters({"hidden_size": 8})  # type: ignore[arg-type]
    with pytest.raises(slim.SlimError, match="no such directory"):
        slim.count_parameters(teacher / "none")


def test_recipes_of_the_package_have_names() -> None:
    recipe = slim.read_recipe("qwen3_next_80a3b_to_23a2b")
    assert recipe == slim.read_recipe(ROOT / "examples/slimqwen/recipes/qwen3_next_80a3b_to_23a2b.yaml")


def test_messages_go_to_the_logger(
    teacher: Path, samples: np.ndarray[Any, Any], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "megatron_slim"):
        slim.calibrate(teacher, samples)
    assert "calibrating on 4 samples of 16 tokens" in caplog.messages


def lines_that_import_megatron(tree: ast.AST) -> list[int]:
    for_types = [node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)]
    never_run = {each for node in for_types for each in ast.walk(node)}
    found = []
    for node in (node for node in ast.walk(tree) if node not in never_run):
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        found += [node.lineno for name in names if name.split(".")[0] == "megatron"]
    return found


def test_every_module_prepares_the_process_before_it_imports_megatron() -> None:
    checked = 0
    for path in sorted(PACKAGE.rglob("*.py")):
        if path.parent.name == "compat" or path.name == "mcore.py":
            continue  # what prepares it
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if lines := lines_that_import_megatron(tree):
            text = path.read_text(encoding="utf-8").splitlines()
            prepared = [number for number, line in enumerate(text, 1) if "import megatron_slim.mcore" in line]
            assert prepared and min(prepared) < min(lines), path
            checked += 1
    assert checked > 20


@pytest.mark.slow
def test_modules_can_be_imported_in_any_order() -> None:
    """Backwards by name: the modules of training first, those of the architecture last."""
    names = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts) for path in sorted(PACKAGE.rglob("*.py"), reverse=True)
    ]
    names = [name for name in names if not name.endswith(("__init__", "__main__", "testing_preload", "cli.torchrun"))]
    done = run(f"import importlib; [importlib.import_module(name) for name in {names}]")
    assert (done.returncode, done.stderr) == (0, "")


def test_megatron_first_is_one_line() -> None:
    code = """
import megatron.core.transformer.enums
from megatron_slim.errors import SlimError
try:
    import megatron_slim.pruning.calibrate
except SlimError as error:
    print(error)
"""
    done = run(code)
    assert done.stdout == (
        "megatron was imported first, and can no longer be prepared for a machine without CUDA; "
        "import megatron_slim.mcore before megatron\n"
    ), done.stderr
