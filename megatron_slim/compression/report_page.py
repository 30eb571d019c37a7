"""The report of a compression run as one page: sizes, what was kept, losses, evaluations, cost, how to repeat it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from megatron_slim.compression import report_curves
from megatron_slim.compression.report_facts import Gathered
from megatron_slim.compression.report_quantization import quantization_section
from megatron_slim.compression.report_recorded import recorded_section
from megatron_slim.compression.report_tables import (
    NOT_MEASURED,
    cost_section,
    evaluation_sections,
    headline,
    loss_section,
    size_section,
    step_section,
    unknown,
)
from megatron_slim.errors import SlimError
from megatron_slim.page import (
    Section,
    code_html,
    document,
    fact_html,
    link_html,
    picture_html,
    section_html,
    text_html,
)

_WIDTH = "44em"


def page(gathered: Gathered) -> str:
    """The whole page."""
    facts = gathered.facts
    parts = [
        *_summary(facts),
        section_html(size_section(facts["sizes"])),
        *_kept(gathered),
        _curves(gathered),
        *map(section_html, evaluation_sections(facts["evaluations"])),
        *([] if facts["recorded"] is None else [section_html(recorded_section(facts["recorded"]))]),
        *([] if facts["quantization"] is None else [section_html(quantization_section(facts["quantization"]))]),
        section_html(cost_section(facts["cost"])),
        section_html(step_section(facts["cost"]["steps"])),
        *_repeat(facts),
    ]
    return document(title(facts), parts)


def title(facts: Mapping[str, Any]) -> str:
    """Of the page."""
    return f"Compression of {facts['model'] or 'a model'}"


def _summary(facts: Mapping[str, Any]) -> Iterator[str]:
    """Where the run is, and its result in two sentences."""
    progress = facts["progress"]
    state = "The run is finished." if progress["finished"] else f"{progress['done']} of {progress['steps']} steps done."
    if progress["now"]:
        state += f" {progress['now'][0]}: {progress['now'][1]}."
    yield text_html(state)
    sentences = [*headline(facts)]
    if sentences:
        yield text_html(" ".join(sentences))


def _kept(gathered: Gathered) -> Iterator[str]:
    """What each phase kept, and the way to the plan's own page."""
    if not gathered.plans:
        yield section_html(unknown("Kept by pruning"))
    for entry in gathered.facts["kept"]:
        phase = entry["phase"]
        for section in gathered.plans[phase]:
            heading = f"{section.title}, phase {phase}"
            yield section_html(Section(heading, section.columns, section.rows, section.note))
        yield fact_html("plan", entry["plan_sha256"])
        if entry["page"]:
            yield link_html("The plan's own page", entry["page"])


def _curves(gathered: Gathered) -> str:
    heading, why = "Losses over the tokens of training", gathered.facts["training_not_read"]
    if not gathered.curves:
        return section_html(Section(heading, (), (), f"{NOT_MEASURED.capitalize()}. {why}".strip()))
    try:
        drawn = picture_html(heading, report_curves.picture(gathered.curves), width=_WIDTH)
    except SlimError as error:
        drawn = section_html(Section(heading, (), (), str(error)))
    return drawn + (text_html(why) if why else "") + section_html(loss_section(gathered.facts["training"]))


def recipe_yaml(facts: Mapping[str, Any]) -> str:
    """The recipe as a file to run again."""
    recipe = facts["recipe"]
    first = {"version": recipe["version"]} if "version" in recipe else {}
    return str(yaml.safe_dump(first | recipe, sort_keys=False, allow_unicode=True))


def _repeat(facts: Mapping[str, Any]) -> Iterator[str]:
    """Everything that the run can be repeated from."""
    yield code_html("Recipe", recipe_yaml(facts))
    yield code_html("Settings", str(yaml.safe_dump(facts["settings"], sort_keys=False, allow_unicode=True)))
    commands = "\n\n".join(f"# {name}\n{command}" for name, command in facts["commands"].items())
    yield code_html("Commands", commands or NOT_MEASURED)
    pairs = [*facts["versions"].items()]
    yield section_html(
        Section("Versions", ("package", "version"), tuple(pairs), "" if pairs else NOT_MEASURED, text=True)
    )
    seeds = tuple((name, str(value)) for name, value in facts["seeds"].items())
    yield section_html(
        Section("Seeds", ("where", "seed"), seeds, "" if seeds else "The defaults of the commands.", text=True)
    )
    yield "<h2>Inputs and licence</h2>\n"
    for name, value in facts["inputs"].items():
        words = value if isinstance(value, list) else [] if value is None else [value]
        yield fact_html(name.replace("_", " "), " ".join(map(str, words)) or "not given")
    stated = facts["license"]
    yield fact_html("licence of the teacher", ", ".join(stated.values()) or "not stated")
