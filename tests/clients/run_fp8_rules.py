"""SGLang or vLLM without their dependencies: which layers of an export in FP8 their own rules take to be in FP8.

Neither is imported, and nothing is computed. The functions that read ``quantization_config`` and decide about a layer
are taken out of the installed source files and run by themselves, for every linear layer of the export. Where a rule
and the files disagree, an engine would look for scales that are not there, or read FP8 as numbers.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import logging
import struct
from collections.abc import Collection, Mapping
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any

from common import DIFFERS, SAME_NAMES, Case, Result, main

# Of each package: the file of Fp8Config, that of the rule, the models' folder, and Qwen3-Next's name for "mtp".
SOURCES = {
    "sglang": ("srt/layers/quantization/fp8.py", "srt/layers/quantization/utils.py", "srt/models", "model"),
    "vllm": (
        "model_executor/layers/quantization/fp8.py",
        "model_executor/layers/quantization/utils/quant_utils.py",
        "model_executor/models",
        "mtp",
    ),
}
RULE = ("is_layer_skipped", "_module_path_match", "_FALLBACK_FUSED_SHARDS")
# model_type -> for each package: the models' file, and the class that says which layers it merges.
CLASSES = {
    "qwen3_next": dict.fromkeys(SOURCES, ("qwen3_next.py", "Qwen3NextForCausalLM")),
    "qwen3_moe": dict.fromkeys(SOURCES, ("qwen3_moe.py", "Qwen3MoeForCausalLM")),
    "qwen3_5_moe_text": {
        "sglang": ("qwen3_5.py", "Qwen3_5ForCausalLM"),
        "vllm": ("qwen3_5.py", "Qwen3_5ForCausalLMBase"),
    },
    "qwen3_5_moe": {
        "sglang": ("qwen3_5.py", "Qwen3_5ForCausalLM"),  # the class of the whole takes this one's
        "vllm": ("qwen3_5.py", "Qwen3_5ForConditionalGeneration"),
    },
}
# The class that this one of vLLM's adds to, and what names begin with there, in the list of layers that are not in FP8
# as well. SGLang keeps the names of the files.
BASE = ("qwen3_vl.py", "Qwen3VLForConditionalGeneration")
VLLM_NAMES = {"model.language_model.": "language_model.model.", "model.visual.": "visual."}
# Fused in fact where the rule has no such list: vLLM adds it to Qwen3-MoE for dense layers, which we have none of.
ALSO_FUSED = {"gate_up_proj": ["gate_proj", "up_proj"]}


class Config:
    """In place of their Fp8Config: keeps what its ``from_config`` gives."""

    def __init__(self, **values: Any) -> None:
        self.__dict__.update(values)

    @staticmethod
    def get_from_keys(config: Mapping[str, Any], keys: Collection[str]) -> Any:
        return next(config[key] for key in keys if key in config)

    @staticmethod
    def get_from_keys_or(config: Mapping[str, Any], keys: Collection[str], default: Any) -> Any:
        return next((config[key] for key in keys if key in config), default)


def pick(nodes: Collection[ast.AST], names: Collection[str], **known: Any) -> dict[str, Any]:
    """Functions and constants of these names, run by themselves; ``known`` is what they refer to."""
    found: list[ast.stmt] = []
    for node in nodes:
        targets = (
            [node.target] if isinstance(node, ast.AnnAssign) else node.targets if isinstance(node, ast.Assign) else []
        )
        if isinstance(node, ast.FunctionDef) and node.name in names:
            node.decorator_list = []
            found.append(node)
        elif any(isinstance(target, ast.Name) and target.id in names for target in targets):
            assert isinstance(node, ast.stmt)
            found.append(node)
    lazy = ast.ImportFrom("__future__", [ast.alias("annotations")], 0)
    module = ast.fix_missing_locations(ast.Module([lazy, *found], []))
    namespace: dict[str, Any] = {"MappingProxyType": MappingProxyType, "logger": logging.getLogger(), **known}
    exec(compile(module, "rules", "exec"), namespace)
    return namespace


def body_of(file: Path, name: str) -> list[ast.stmt]:
    """Statements of a class."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    return next(node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)


def header(file: Path) -> dict[str, Any]:
    """Tensors of a safetensors file with type and shape."""
    with file.open("rb") as stream:
        (size,) = struct.unpack("<Q", stream.read(8))
        found: dict[str, Any] = json.loads(stream.read(size))
    return {name: entry for name, entry in found.items() if name != "__metadata__"}


def merged_layers(folder: Path, package: str, model_type: str) -> dict[str, list[str]]:
    """Layers that an engine makes of several in the files, and of which."""
    file, name = CLASSES[model_type][package]
    known, wanted = {}, "packed_modules_mapping"
    if package == "vllm" and model_type == "qwen3_5_moe":
        known = {BASE[1]: SimpleNamespace(**pick(body_of(folder / BASE[0], BASE[1]), [wanted]))}
    return ALSO_FUSED | pick(body_of(folder / file, name), [wanted], **known)[wanted]


def renamed(name: str, names: Mapping[str, str]) -> str:
    """A name that begins with one of ``names`` with what that is in an engine."""
    before = next((begin for begin in names if name.startswith(begin)), "")
    return names.get(before, "") + name.removeprefix(before)


def linear_layers(tensors: Mapping[str, Any], merged: Mapping[str, list[str]]) -> dict[str, set[bool]]:
    """Linear layers of an engine by the names in the files, and whether the weights they are made of are in FP8."""
    whole = {part: name for name, parts in merged.items() for part in parts}
    found: dict[str, set[bool]] = {}
    for name, entry in tensors.items():
        parent, _, leaf = name.removesuffix(".weight").rpartition(".")
        in_layers = ".layers." in name or ".visual." in name or name == "mtp.fc.weight"
        # Patches are cut by a convolution, and positions are an embedding.
        if not name.endswith(".weight") or len(entry["shape"]) != 2 or not in_layers or leaf == "pos_embed":
            continue
        module = f"{parent}.{whole.get(leaf, leaf)}"
        if ".mlp.experts." in name:
            module = name.partition(".experts.")[0] + ".experts"
        found.setdefault(module, set()).add(entry["dtype"] == "F8_E4M3")
    return found


def names(case: Case) -> Result:
    package = next(name for name in SOURCES if importlib.util.find_spec(name))
    spec = importlib.util.find_spec(package)
    assert spec is not None and spec.submodule_search_locations
    root = Path(next(iter(spec.submodule_search_locations)))
    config_file, rule_file, models, mtp = SOURCES[package]
    export = case.model.parent / "fp8"
    config = json.loads((export / "config.json").read_text())
    mapping = merged_layers(root / models, package, config["model_type"])
    own = VLLM_NAMES if package == "vllm" and "text_config" in config else {}
    if config["model_type"] == "qwen3_next":
        own = {"mtp.": f"{mtp}."}
    from_config = pick(body_of(root / config_file, "Fp8Config"), ["from_config"])["from_config"]
    ignored = from_config(Config, config["quantization_config"]).ignored_layers
    if own is VLLM_NAMES:
        ignored = [renamed(name, own) for name in ignored]
    skipped = pick(ast.parse((root / rule_file).read_text(encoding="utf-8")).body, RULE)["is_layer_skipped"]
    tensors = {name: entry for file in export.glob("*.safetensors") for name, entry in header(file).items()}
    layers = linear_layers(tensors, mapping)
    if package == "sglang":  # there, layers of torch in these two, which no rule is asked about
        layers = {name: fp8 for name, fp8 in layers.items() if name != "mtp.fc" and ".visual." not in name}
    layers = {renamed(name, own): fp8 for name, fp8 in layers.items()}
    wrong = [module for module, fp8 in layers.items() if fp8 != {not skipped(module, ignored, mapping)}]
    note = f"{package}: {len(layers) - len(wrong)} of {len(layers)} linear layers as in the files"
    in_fp8 = sum(True in fp8 for fp8 in layers.values())
    return (DIFFERS if wrong else SAME_NAMES), f"{note}, {in_fp8} in FP8{': not ' + wrong[0] if wrong else ''}"


main({"names": names})
