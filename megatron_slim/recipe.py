"""The recipe: what a person wants a model to become, as a short YAML file (version 1).

A recipe names target sizes under Megatron's names and the method for each axis. It knows nothing of a particular
model: where the source's shape is known, `pruning.recipe_checks` decides whether its target can be met.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from megatron_slim import recipe_run
from megatron_slim.aliases import Document, JsonObject, YamlMapping
from megatron_slim.errors import RecipeError
from megatron_slim.packaged import find_recipe
from megatron_slim.recipe_budget import (
    BOUNDS,
    Budget,
    Search,
    parse_budget,
    parse_search,
    unknown_keys,
    whole_number,
)
from megatron_slim.recipe_elastic import BUDGETS, RecipeBudget, budgets_violations, read_budgets, refuse_budgets
from megatron_slim.recipe_phases import bounded_search_violations, phases_violations, schedule_violations
from megatron_slim.recipe_sections import (
    BOUND_KEYS,
    SECTIONS,
    Depth,
    Experts,
    Phase,
    Target,
    Width,
    section_violations,
)

VERSION = 1
_STAGES = "stages"  # what the list of phases was called
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Recipe:
    """A recipe; every section but ``target`` has defaults.

    Attributes:
        phase: of a schedule, where it is one.
        phases: the recipes of a progressive schedule; then `select_phase` gives the one to follow, and ``target`` is
            empty.
        budgets: the sizes of an elastic checkpoint, largest first; then ``target`` is empty too, and each is planned
            by its own recipe (`pruning.elastic_plans`).
        budget: bounds, given in ``target``, that the sizes it leaves out are searched under.
        search: how they are searched.
        source: the model it was written for, for planning without one: a name in `architecture.published.MODELS`, or
            a directory with a config.json, relative to the recipe; "" where it says none. Pruning takes any model.
        run: sections of `recipe_run` by name, of a recipe as a whole; no plan records them.
    """

    target: Target
    depth: Depth = field(default_factory=Depth)
    width: Width = field(default_factory=Width)
    experts: Experts = field(default_factory=Experts)
    phase: Phase | None = None
    phases: tuple[Recipe, ...] = ()
    budgets: tuple[RecipeBudget, ...] = ()
    budget: Budget | None = None
    search: Search = field(default_factory=Search)
    source: str = ""
    run: Mapping[str, Document] = field(default_factory=dict)

    def to_dict(self) -> JsonObject:
        """As a version 1 document, all defaults filled in; of a recipe to follow, not of a schedule."""
        assert not self.phases and not self.budgets, "a plan follows one phase, or one budget"
        sections = {name: dataclasses.asdict(getattr(self, name)) for name in SECTIONS}
        sections["target"] = _given(sections["target"])
        if self.experts.allocation == Experts.allocation:  # as before there was another
            del sections["experts"]["allocation"], sections["experts"]["multiple"]
        if self.depth.pattern == Depth.pattern:
            del sections["depth"]["pattern"]
        if self.budget is not None:
            sections["target"] |= _given(dataclasses.asdict(self.budget))
            sections["search"] = self.search.to_dict()
        # Plans keep the key they have always had, so that earlier releases read them too.
        phase = {} if self.phase is None else {"stage": self.phase.to_dict()}
        source = {"source": self.source} if self.source else {}
        return {"version": VERSION, **source, **sections, **phase}


def load_recipe(path: Path) -> Recipe:
    """Read a recipe from a YAML file, or by the name of one that comes with the package.

    Raises:
        RecipeError: the file is missing, is not YAML, or breaks the schema; lists every violation.
    """
    path = find_recipe(path)
    return parse_recipe(read_document(path), where=str(path))


def read_document(path: Path) -> Any:
    """The YAML of a file, not checked against the schema.

    Raises:
        RecipeError: the file is missing or is not YAML.
    """
    try:
        return yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError, ValueError) as error:
        raise RecipeError(f"not readable as YAML ({error})", where=str(path)) from None


def parse_recipe(document: object, *, where: str = "recipe") -> Recipe:
    """Check a parsed recipe against the schema.

    Raises:
        RecipeError: lists every violation.
    """
    if not isinstance(document, Mapping):
        kind = type(document).__name__
        raise RecipeError(f"a recipe is a mapping, not {kind}", where=where, fix="start it with 'version: 1'")
    document = _with_phases(document, where)
    found = _version_violations(document)
    keys = {key: None for key in document if key != _STAGES}
    known = ["version", *SECTIONS, "search", "phases", BUDGETS, "stage", "source", *recipe_run.SECTIONS]
    found += unknown_keys(keys, known, "")
    if "source" in document and (not isinstance(document["source"], str) or not document["source"].strip()):
        found.append(f"source {document['source']!r} is neither a model's name nor a directory")
    if not {"target", "phases", BUDGETS} & document.keys():
        found.append("target is missing (or phases, or budgets)")
    for section, schema in SECTIONS.items():
        if section in document:
            found += section_violations(section, schema, document[section])
    if "stage" in document:
        found += section_violations("stage", Phase, document["stage"])
        if isinstance(document["stage"], Mapping):
            found += [f"stage.{key} is missing" for key in ("number", "count") if key not in document["stage"]]
            found += [] if found else schedule_violations(document["stage"])
    if BUDGETS in document:
        found += budgets_violations(document)
    elif "phases" in document:
        found += [f"{key} and phases exclude one another" for key in ("target", "stage", _STAGES) if key in document]
        found += phases_violations(document["phases"], document.get("search"), document.get("experts"))
        if "search" in document and not (found or any(parse_budget(phase["target"]) for phase in document["phases"])):
            found.append(f"search without a bound ({', '.join(BOUNDS)}) in the target of any phase")
    elif "search" in document:
        found += bounded_search_violations(document["search"], document.get("target"))
    found += recipe_run.violations(document)
    if found:
        raise RecipeError("; ".join(found), where=where)
    phases = document.get("phases", [])
    return dataclasses.replace(
        _recipe(document),
        phases=tuple(_phase(document, k, len(phases), phase) for k, phase in enumerate(phases, 1)),
        budgets=read_budgets(document, _recipe),
        run=recipe_run.sections(document),
    )


def _with_phases(document: YamlMapping, where: str) -> YamlMapping:
    """The document with its phases under today's key; one with both keys stays as it is, to be refused."""
    if _STAGES not in document or "phases" in document:
        return document
    logger.warning("%s: the key 'stages' is now called 'phases'; both are read", where)
    return {"phases" if key == _STAGES else key: value for key, value in document.items()}


def select_phase(recipe: Recipe, number: int | None, *, where: str = "recipe") -> Recipe:
    """The recipe to follow: a phase of a schedule, or the recipe itself where it is none.

    Raises:
        RecipeError: a schedule and no number, a number and no schedule, or no such phase; or budgets, of which there is
            not one to follow.
    """
    refuse_budgets(recipe, where=where)
    count = len(recipe.phases)
    if number is None and not count:
        return recipe
    if not count:
        raise RecipeError(f"--phase {number}, but the recipe has no phases", where=where, fix="leave --phase out")
    if number is None or not 1 <= number <= count:
        what = f"the recipe has {count} phases" if number is None else f"no phase {number}: the recipe has {count}"
        raise RecipeError(what, where=where, fix=f"give --phase 1 to {count} (in Python phase)")
    return recipe.phases[number - 1]


def _recipe(sections: Document) -> Recipe:
    kinds = {**SECTIONS, "stage": Phase}
    parts = {
        name: kind(**{key: value for key, value in sections[name].items() if (name, key) not in BOUND_KEYS})
        for name, kind in kinds.items()
        if name in sections
    }
    if phase := parts.pop("stage", None):
        tokens = None if phase.tokens is None else whole_number(phase.tokens)
        parts["phase"] = dataclasses.replace(phase, tokens=tokens, schedule=tuple(phase.schedule))
    target = sections.get("target", {})
    budget = parse_budget(target)
    search = parse_search(sections.get("search", {}), target) if budget else Search()
    source = sections.get("source", "")
    return Recipe(**{"target": Target(), **parts}, budget=budget, search=search, source=source)


def _phase(document: Document, number: int, count: int, phase: Document) -> Recipe:
    """A phase with what it leaves out taken from the recipe's own sections, key by key."""
    sections = {name: {**document.get(name, {}), **phase.get(name, {})} for name in (*SECTIONS, "search")}
    own = {key: phase[key] for key in ("name", "tokens") if key in phase}
    tokens = [whole_number(each["tokens"]) for each in document["phases"] if "tokens" in each]
    schedule = {"schedule": tokens} if len(tokens) == count else {}
    source = {"source": document["source"]} if "source" in document else {}
    return _recipe({**sections, **source, "stage": {"number": number, "count": count, **own, **schedule}})


def _given(values: Document) -> JsonObject:
    return {key: value for key, value in values.items() if value is not None}


def _version_violations(document: YamlMapping) -> list[str]:
    if "version" not in document:
        return [f"version is missing (this release reads version {VERSION})"]
    version = document["version"]
    supported = type(version) is int and version == VERSION
    return [] if supported else [f"version {version!r} is not supported (this release reads version {VERSION})"]


class _Loader(yaml.SafeLoader):
    """A safe loader that refuses a key given twice, which YAML's own lets the last one win."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = key_node.value
            if isinstance(key, str) and key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"duplicate key {key!r}", key_node.start_mark)
            if isinstance(key, str):
                seen.add(key)
        return super().construct_mapping(node, deep)
