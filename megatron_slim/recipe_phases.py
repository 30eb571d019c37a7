"""What is wrong with the phases of a recipe, as they were written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_slim.aliases import Document
from megatron_slim.recipe_budget import BOUNDS, search_violations, unknown_keys, whole_number
from megatron_slim.recipe_sections import SECTIONS, Experts, section_violations, value_violation


def bounded_search_violations(search: object, target: object) -> list[str]:
    """As `search_violations`, and whether the target has a bound to search under."""
    bounded = isinstance(target, Mapping) and any(bound in target for bound in BOUNDS)
    found = [] if bounded else [f"search without a bound ({', '.join(BOUNDS)}) in target"]
    return found + search_violations(search, target)


def _phase_search_violations(phase: Document, search: object) -> list[str]:
    """What is wrong with how a phase searches; that of the whole schedule is for those of its phases with a bound."""
    own, whole, target = phase.get("search", {}), search if search is not None else {}, phase.get("target")
    if not isinstance(own, Mapping) or not isinstance(whole, Mapping):
        return search_violations(whole if isinstance(own, Mapping) else own, target)
    bounded = isinstance(target, Mapping) and any(bound in target for bound in BOUNDS)
    return bounded_search_violations({**whole, **own}, target) if bounded or "search" in phase else []


def phases_violations(phases: object, search: object, experts: object) -> list[str]:
    """What is wrong with each phase, and sizes that grow from one to the next.

    Args:
        phases: as written.
        search: of the whole schedule.
        experts: of the whole schedule, too.
    """
    if not isinstance(phases, list) or not phases:
        return [f"phases {phases!r} is not a list of phases"]
    found: list[str] = []
    least: dict[str, tuple[int, int]] = {}  # size -> the smallest so far, and whose it is
    for number, phase in enumerate(phases, 1):
        if not isinstance(phase, Mapping):
            found.append(f"phase {number}: {phase!r} is not a mapping")
            continue
        violations = unknown_keys(phase, ["name", "tokens", *SECTIONS, "search"], "")
        violations += [] if "target" in phase else ["target is missing"]
        for name, kind in SECTIONS.items():
            violations += section_violations(name, kind, phase[name]) if name in phase else []
        violations += _merged_violations(phase, experts) if not violations else []
        for key in ("name", "tokens"):
            if key in phase and (sentence := value_violation(f"stage.{key}", phase[key])):
                violations.append(sentence.removeprefix("stage."))
        if "search" in phase or search is not None:
            violations += _phase_search_violations(phase, search)
        target = phase.get("target") if not violations else {}
        for key, value in (target or {}).items():
            size: Any = whole_number(value) if key in ("params", "active_params") else value
            if key in least and size > least[key][0]:
                violations.append(f"target.{key} {size} is larger than the {least[key][0]} of phase {least[key][1]}")
            least[key] = min(least.get(key, (size, number)), (size, number))
        found += [f"phase {number}: {violation}" for violation in violations]
    return found


def _merged_violations(phase: Document, experts: object) -> list[str]:
    """What does not fit together of a phase's own choices for experts and those of the whole schedule."""
    if "experts" not in phase or not isinstance(experts, Mapping) or section_violations("experts", Experts, experts):
        return []
    return section_violations("experts", Experts, {**experts, **phase["experts"]})


def schedule_violations(phase: Document) -> list[str]:
    """What does not fit together in the phase that a plan records."""
    number, count, schedule = phase["number"], phase["count"], phase.get("schedule", [])
    if number > count:
        return [f"stage.number {number} is larger than stage.count {count}"]
    if schedule and (len(schedule) != count or schedule[number - 1] != whole_number(phase.get("tokens"))):
        return [
            f"stage.schedule {schedule!r} is not that of {count} phases with {phase.get('tokens')} tokens in this one"
        ]
    return []
