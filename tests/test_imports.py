"""Imports run one way, tools start at once, and importing the package changes nothing."""

from __future__ import annotations

import ast
import graphlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megatron_slim.architecture.shape import FAMILIES
from megatron_slim.architecture.table import hf_tensors, weights
from megatron_slim.testing import tiny_shape

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "megatron_slim"

# A module may import from its own layer and from those before it.
LAYERS = (
    (
        "aliases",
        "errors",
        "files",
        "reporting",
        "processes",
        "command_line",
        "products",
        "weight_gradient",
        "compat",
        "mcore",
        "extras",
        "optimizers",
        "garbage",
        "page",
        "data",
        "data_index",
        "sample_set",
        "documents",
        "tokenizers",
        "encoding",
        "preprocessing",
        "chat_template",
        "sample_packing",
        "chats",
    ),
    (
        "packaged",
        "expert_metrics",
        "recipe_budget",
        "recipe_sections",
        "recipe_elastic",
        "recipe_phases",
        "recipe_run",
        "recipe",
        "architecture",
    ),
    ("checkpoint",),
    ("streaming",),
    ("generation",),
    ("evaluation",),
    ("teacher_cache",),
    ("pruning",),
    ("distillation",),
    ("training",),
    ("planning",),
    ("doctor",),
    ("compression",),
    ("api", "api_elastic", "api_inputs", "api_measures", "api_record"),
    ("cli", "__main__"),
    ("testing", "testing_preload"),
)
RANK = {part: rank for rank, layer in enumerate(LAYERS) for part in layer}
INSTANT = (
    "megatron_slim.errors",
    "megatron_slim.files",
    "megatron_slim",
    "megatron_slim.cli.main",
    "megatron_slim.reporting",
    "megatron_slim.data",
    "megatron_slim.documents",
    "megatron_slim.doctor.machine",
    "megatron_slim.doctor.preflight",
    "megatron_slim.tokenizers",
    "megatron_slim.recipe",
    "megatron_slim.expert_metrics",
    "megatron_slim.optimizers",
    "megatron_slim.recipe_budget",
    "megatron_slim.recipe_elastic",
    "megatron_slim.recipe_phases",
    "megatron_slim.distillation.loss_options",
    "megatron_slim.distillation.terms",
    "megatron_slim.architecture.axes",
    "megatron_slim.architecture.flops",
    "megatron_slim.architecture.gpus",
    "megatron_slim.architecture.pipeline_layout",
    "megatron_slim.architecture.qwen3_next",
    "megatron_slim.architecture.qwen3_5_moe",
    "megatron_slim.architecture.wrapper",
    "megatron_slim.architecture.hf_config",
    "megatron_slim.architecture.table",
    "megatron_slim.architecture.shape",
    "megatron_slim.pruning.elastic",
    "megatron_slim.pruning.plan",
    "megatron_slim.pruning.plan_tables",
    "megatron_slim.pruning.plan_view",
    "megatron_slim.pruning.carried_statistics",
    "megatron_slim.pruning.plan_plots",
    "megatron_slim.pruning.plan_page",
    "megatron_slim.training.run_figures",
    "megatron_slim.training.run_plots",
    "megatron_slim.training.run_view",
    "megatron_slim.training.slim_arguments",
    "megatron_slim.training.optimizer_flags",
    "megatron_slim.training.optimizer_table",
    "megatron_slim.architecture.matrices",
    "megatron_slim.architecture.parallelism",
    "megatron_slim.architecture.published",
    "megatron_slim.planning.build",
    "megatron_slim.cli.plan_parallelism",
    "megatron_slim.planning.sources",
    "megatron_slim.page",
    "megatron_slim.compression.card",
    "megatron_slim.compression.report",
)
HEAVY = ("torch", "transformers", "megatron", "nltk", "sentencepiece", "matplotlib")
MODULES = sorted(PACKAGE.rglob("*.py"))
TOOLS = sorted((ROOT / "tools").glob("*.py")) + sorted((ROOT / "examples").rglob("*.py"))
TOOLS += [
    ROOT / "benchmarks" / f"{name}.py"
    for name in (
        "convert convert_80b gated_delta_rule gpu/run_all load_all one_shot pipeline_schedules plan_parallelism startup"
    ).split()
]


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_modules(path: Path, *, types: bool = True) -> Iterator[tuple[int, str]]:
    """Line and name in the package of every import in a file, those inside functions included; for types, if asked."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for_types = [node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)]
    left_out = {id(part) for node in for_types for part in ast.walk(node)} if not types else set()
    for node in ast.walk(tree):
        if id(node) in left_out:
            continue
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            head, _, rest = name.partition(".")
            if head == "megatron_slim" and rest != "__version__":
                yield node.lineno, rest


def imported_parts(path: Path) -> Iterator[tuple[int, str]]:
    """Line and part of the package."""
    for line, name in imported_modules(path):
        yield line, name.split(".")[0]


def test_every_module_has_a_layer() -> None:
    parts = {part_of(path) for path in MODULES} - {"__init__"}
    assert parts == RANK.keys()


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_one_way(path: Path) -> None:
    part = part_of(path)
    wrong = [
        f"line {line}: {part} imports {other}"
        for line, other in imported_parts(path)
        if part != "__init__" and RANK[other] > RANK[part]
    ]
    assert not wrong


def test_there_is_no_circle() -> None:
    """Nor one that an import inside a function hides."""
    names = {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in MODULES}
    graph = {
        name: {
            found if found in names else found.rpartition(".")[0] for _, found in imported_modules(path, types=False)
        }
        & names.keys()
        for name, path in names.items()
    }
    assert "pruning.plan_tables" in graph["pruning.plan"]  # inside a function
    order = [*graphlib.TopologicalSorter(graph).static_order()]  # raises CycleError, which names it
    assert order.index("errors") < order.index("training.pretrain")


# What may be changed, and where. Tasks are read offline, by settings of two libraries.
CHANGES = {
    ("compat/cpu_tensors.py", "torch"),
    ("compat/cpu_device.py", "torch"),
    ("evaluation/tasks.py", "datasets"),
    ("evaluation/tasks.py", "huggingface_hub"),
}


def changed_libraries(path: Path) -> Iterator[tuple[int, str]]:
    """Line and library of every assignment to an attribute of something that is imported from another library."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    libraries: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            for alias in node.names:
                module = alias.name if isinstance(node, ast.Import) else node.module or ""
                libraries[(alias.asname or alias.name).split(".")[0]] = module.split(".")[0]
    for node in ast.walk(tree):
        changed: list[ast.expr] = []
        if isinstance(node, ast.Assign | ast.AugAssign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            targets = [part for each in targets for part in (each.elts if isinstance(each, ast.Tuple) else [each])]
            changed = [each.value for each in targets if isinstance(each, ast.Attribute)]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "setattr":
            changed = node.args[:1]
        for owner in changed:
            while isinstance(owner, ast.Attribute):
                owner = owner.value
            library = libraries.get(owner.id, "") if isinstance(owner, ast.Name) else ""
            if library not in ("", "megatron_slim") and library not in sys.stdlib_module_names:
                yield node.lineno, library


def test_nothing_but_the_compatibility_layer_changes_a_library() -> None:
    """And within it Megatron is changed by rows of the table alone, in `patch.py`, which is given what it changes."""
    found = {(str(path.relative_to(PACKAGE)), library) for path in MODULES for _, library in changed_libraries(path)}
    assert found == CHANGES
    texts = {path.name: path.read_text(encoding="utf-8") for path in (PACKAGE / "compat").glob("*.py")}
    assert [name for name, text in texts.items() if "setattr(owner," in text] == ["patch.py"]


def test_there_is_one_door_to_the_changes() -> None:
    doors = [path for path in MODULES if "compat.install.install" in {name for _, name in imported_modules(path)}]
    assert doors == [PACKAGE / "mcore.py"]


def modules_after(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(*sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(found.stdout.split())


def loaded_after(statement: str) -> list[str]:
    modules = modules_after(statement)
    return [name for name in HEAVY if name in modules]


def test_a_conversion_imports_little_beside_torch() -> None:
    """torch.distributed.checkpoint would bring sympy, FSDP and DTensor: as much as half of torch again."""
    modules = modules_after("import megatron_slim.checkpoint.convert")
    assert not modules & {"torch.distributed.checkpoint", "torch._dynamo", "sympy", "transformers", "megatron"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU Megatron's functions are compiled")
def test_an_evaluation_imports_no_compiler_and_no_tokenizers() -> None:
    modules = modules_after("import megatron_slim.evaluation.perplexity, megatron_slim.evaluation.losses")
    assert "megatron.core" in modules
    assert not modules & {"torch._dynamo", "torch._inductor", "transformers", "matplotlib"}


def test_instant_modules_load_nothing_heavy() -> None:
    assert loaded_after(f"import {', '.join(INSTANT)}") == []


@pytest.mark.parametrize("path", TOOLS, ids=lambda path: str(path.relative_to(ROOT)))
def test_tools_load_nothing_heavy_before_they_run(path: Path) -> None:
    assert loaded_after(f"import runpy; runpy.run_path({str(path)!r})") == []


@pytest.mark.parametrize(
    "path",
    TOOLS,
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_help_works_from_any_directory(path: Path, tmp_path: Path) -> None:
    found = subprocess.run([sys.executable, path, "--help"], cwd=tmp_path, env={}, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert found.stdout.startswith("usage:") and found.stderr == ""


# Where names of Hugging Face's modules may stand: the families, and the sublayers that they are made of.
NAMING = {
    "rows",
    "weight",
    "full_attention",
    "delta_net",
    "feed_forward",
    "glm4_moe",
    *(path.stem for path in (PACKAGE / "architecture").glob("qwen*.py")),
}
OWN_NAMES = {("statistics", "shared_expert")}  # our name of a statistic


def _hugging_face_parts() -> set[str]:
    """Parts of the names of tensors that Megatron has no parameter of, such as ``q_proj``."""
    shapes = [tiny_shape(name) for name in FAMILIES]
    theirs = {part for shape in shapes for name in hf_tensors(shape) for part in name.split(".")}
    ours = {part for shape in shapes for row in weights(shape) for part in row.key.split(".")}
    return {part for part in theirs - ours if "_" in part}


def test_names_of_hugging_face_are_in_families_and_sublayers_alone() -> None:
    parts, found = _hugging_face_parts(), []
    assert {"q_proj", "self_attn", "embed_tokens", "lm_head", "in_proj_qkv"} <= parts
    for path in sorted(PACKAGE.rglob("*.py")):
        if path.parent.name == "architecture" and path.stem in NAMING:
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        documented = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documented:
                named = parts & set(re.split(r"[^\w]", node.value))
                found += [(path.stem, name) for name in named if (path.stem, name) not in OWN_NAMES]
    assert found == []


def test_only_layers_that_are_dropped_are_compared_by_kind() -> None:
    """Elsewhere a kind is asked what it is (`architecture.kinds`), or looked up."""
    kinds = r"\b(?:FULL_ATTENTION|LINEAR_ATTENTION|MOE|DENSE)\b"
    compared = re.compile(rf"[!=]= {kinds}|{kinds} [!=]=|{kinds} in ")
    found = {
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        if compared.search(path.read_text(encoding="utf-8")) and path.parent.name != "architecture"
    }
    assert found == {"pruning/depth.py"}  # clients need a layer of full attention


def test_no_module_is_longer_than_300_lines() -> None:
    """One that grows has a second purpose."""
    assert not [str(path) for path in MODULES if len(path.read_text(encoding="utf-8").splitlines()) > 300]
