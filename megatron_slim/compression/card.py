"""The model card of an export: front matter for the hub, the numbers of the report in short, how to load it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import yaml

from megatron_slim.aliases import Document, JsonObject
from megatron_slim.architecture.hf_config import wrapper_of
from megatron_slim.checkpoint.records import QUANTIZATION_REPORT
from megatron_slim.compression.report_page import recipe_yaml
from megatron_slim.compression.report_quantization import (
    description,
    loading,
    quantization_of,
    quantization_section,
)
from megatron_slim.compression.report_recorded import sentence
from megatron_slim.compression.report_tables import (
    CLIENTS,
    NOT_MEASURED,
    count,
    evaluation_sections,
    headline,
    size_section,
)
from megatron_slim.errors import SlimError
from megatron_slim.files import read_json, write_atomic
from megatron_slim.page import Section
from megatron_slim.reporting import duration
from megatron_slim.training.run_figures import amount

README, OTHER = "README.md", "MODEL_CARD.md"
# A card with it is ours, and replaced when the report is written again.
MARKER = "<!-- Written by megatron_slim from report.json. Remove this line to keep the file as it is. -->"
PAPER = "https://arxiv.org/abs/2605.08738"
BASE_NOTE = "# base_model: the run's name, to be replaced by the repository of the export that is not quantized."
CARRIED = (
    "Pruned and trained is the language model, on text. All else of the larger model that holds it is unchanged, but "
    "for rows that are hidden dimensions of the language model. Measure tasks with pictures before you rely on them."
)
CITATION = """```bibtex
@article{slimqwen2026,
  title = {SlimQwen: Exploring the Pruning and Distillation in Large MoE Model Pre-training},
  author = {Tang, Shengkun and Wang, Zekun and Zheng, Bo and Wang, Liangyu and Men, Rui and Zhang, Siqi and
            Yuan, Xiulong and Qiu, Zihan and Shen, Zhiqiang and Liu, Dayiheng},
  journal = {arXiv preprint arXiv:2605.08738},
  year = {2026}
}
```
"""


def write_card(text: str, model: Path) -> Path:
    """Write a card into an export, next to a README.md that somebody else wrote.

    Raises:
        SlimError: both names are taken by files of somebody else.
    """
    for name in (README, OTHER):
        if not (model / name).exists() or _is_ours(model / name):
            write_atomic(model / name, text)
            return model / name
    raise SlimError("is not a card of ours, and would be replaced", where=str(model / OTHER), fix="rename it")


def _is_ours(file: Path) -> bool:
    return file.is_file() and MARKER.encode() in file.read_bytes()


def card(facts: Document, model: Path) -> str:
    """The card as Markdown.

    Args:
        facts: `report_facts.Gathered.facts`.
        model: the export, which the card says how to load; its config.json says whether it is quantized.
    """
    quantization = quantization_of(model)
    matter = front_matter(facts, model, quantized=quantization is not None)
    return "\n".join(["---", matter + "---", MARKER, "", *_body(facts, model, quantization)]) + "\n"


def front_matter(facts: Document, model: Path, *, quantized: bool = False) -> str:
    """What the hub reads; without a licence where none is stated.

    A quantized export is one of the export next to it, not of the larger model that was pruned: the hub lists it by
    these two keys. The former's name on the hub is not known here, so the run's stands for it.
    """
    config = _config(model)
    kind = config.get("model_type")
    base = {"base_model": model.absolute().parent.name, "base_model_relation": "quantized"}
    tags = ["megatron_slim", "mixture-of-experts", "pruning", "distillation", *(["fp8"] if quantized else [])]
    entries = {
        **(base if quantized else {"base_model": facts["model"]}),
        **facts["license"],
        "library_name": "transformers",
        "pipeline_tag": "text-generation" if wrapper_of(config) is None else "image-text-to-text",
        "tags": tags + ([kind] if isinstance(kind, str) else []),
    }
    text = str(yaml.safe_dump({key: value for key, value in entries.items() if value}, sort_keys=False))
    return f"{BASE_NOTE}\n{text}" if quantized else text


def _config(model: Path) -> JsonObject:
    """config.json of an export, empty where it has none."""
    from megatron_slim.checkpoint.huggingface_files import CONFIG

    found = read_json(model / CONFIG) if (model / CONFIG).is_file() else {}
    return found if isinstance(found, dict) else {}


def _body(facts: Document, model: Path, quantization: Document | None) -> Iterator[str]:
    name, sizes = escaped(facts["model"] or "a model"), facts["sizes"]
    small = f" with {count(sizes[-1]['parameters'])} parameters" if len(sizes) > 1 else ""
    yield f"# {name}, compressed{small}{', in FP8' if quantization else ''}"
    yield ""
    yield f"Pruned and distilled from {name} by megatron_slim, with the method of [SlimQwen]({PAPER})."
    if wrapper_of(_config(model)) is not None:
        yield CARRIED
    if quantization:
        errors = f"[{QUANTIZATION_REPORT}]({QUANTIZATION_REPORT}) has the error of every tensor."
        yield f"{description(quantization)} {errors}"
    yield from (" ".join(headline(facts)), "")
    sections = [size_section(sizes), *evaluation_sections(facts["evaluations"])]
    if quantization:  # clients were tried with the other export
        sections = [section for section in sections if section.title != CLIENTS]
        sections.insert(1, quantization_section(facts["quantization"] or {}))
    for section in sections:
        yield from _markdown(section) if section.rows else ()
    if missing := [section.title for section in sections if not section.rows]:
        yield from (f"{NOT_MEASURED.capitalize()}: {', '.join(missing)}.", "")
    yield from _training(facts["cost"], facts["recorded"])
    yield from _loading(model)
    yield from loading(quantization) if quantization else ()
    yield from ("## Recipe", "", "```yaml", recipe_yaml(facts).replace("```", "'''") + "```", "")
    yield from ("## Citation", "", CITATION)
    yield from (
        "## Licence",
        "",
        f"Licence of {name}: {escaped(', '.join(facts['license'].values())) or 'not stated'}.",
    )


def escaped(text: str) -> str:
    r"""Text that Markdown and HTML show as it is, on one line.

    >>> escaped("a|b <i> [x](y)")
    'a\\|b &lt;i&gt; \\[x\\](y)'
    """
    line = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*\[\]|])", r"\\\1", line)


def _markdown(section: Section) -> Iterator[str]:
    yield from (f"## {escaped(section.title)}", "")
    others = len(section.columns) - 1
    yield _row(section.columns)
    yield "|---" + ("|---" if section.text else "|---:") * others + "|"
    yield from map(_row, section.rows)
    yield ""
    if section.note:
        yield from (escaped(section.note), "")


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(map(escaped, cells))} |"


def _training(cost: Document, recorded: Document | None) -> Iterator[str]:
    yield from ("## Training", "")
    tokens, flops, seconds = cost["tokens"], cost["flops"], cost["seconds"]
    yield f"- tokens: {NOT_MEASURED if tokens is None else amount(tokens)}"
    yield f"- FLOPs of teacher and student: {f'{flops:.3g}' if flops else NOT_MEASURED}"
    yield f"- time of all steps: {NOT_MEASURED if seconds is None else duration(seconds)}"
    if recorded is not None:
        yield f"- teacher: {sentence(recorded)}"
    yield f"- device: {escaped(str(cost['device'] or NOT_MEASURED))}"
    yield ""


def _loading(model: Path) -> Iterator[str]:
    """With transformers and vLLM; a tokenizer only where the export has one."""
    loader, reader = "AutoModelForCausalLM", ("tokenizer", "AutoTokenizer")
    if wrapper_of(_config(model)) is not None:
        loader, reader = "AutoModelForImageTextToText", ("processor", "AutoProcessor")
    readers = [reader] if any(model.glob("tokenizer*")) else []
    yield from ("## Loading", "", "```python")
    yield from (f"from transformers import {', '.join([loader, *(kind for _, kind in readers)])}", "")
    yield f'model = {loader}.from_pretrained("path/to/this/model", dtype="auto", device_map="auto")'
    yield from (f'{name} = {kind}.from_pretrained("path/to/this/model")' for name, kind in readers)
    yield from ("```", "", "```bash", "vllm serve path/to/this/model", "```", "")
