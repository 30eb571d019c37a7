"""Installed versions against those that the package declares (pyproject.toml, the one place that says them)."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

from megatron_slim.doctor.findings import NOTE, OK, PROBLEM, Finding, good_or
from megatron_slim.extras import EXTRAS

PYPROJECT = Path(__file__).resolve().parents[2] / "pyproject.toml"
PACKAGE = "megatron_slim"
KERNELS = {"flash-linear-attention": "fla", "transformer-engine": "transformer_engine", "apex": "apex"}


def declared() -> dict[str, list[str]]:
    """Requirements of this checkout or, installed from a wheel, of that: "" for all machines, else by extra."""
    if PYPROJECT.is_file():
        project = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]
        if project["name"] == PACKAGE:  # others install a file of that name next to the packages
            return {"": project["dependencies"]} | project["optional-dependencies"]
    from packaging.requirements import Requirement

    extras = importlib.metadata.metadata(PACKAGE).get_all("Provides-Extra") or []
    found: dict[str, list[str]] = {name: [] for name in ("", *extras)}
    for line in importlib.metadata.requires(PACKAGE) or []:
        marker = Requirement(line).marker
        for name in ("", *extras):
            if marker is None or marker.evaluate({"extra": name}):
                found[name].append(line.partition(";")[0].strip())
                break
    return found


def packages() -> Iterator[Finding]:
    """Python, the packages that every machine needs, and those that some commands need."""
    version = platform.python_version()
    yield good_or(PROBLEM, "python", sys.version_info >= (3, 12), version, "megatron-core needs 3.12")
    try:
        from packaging.requirements import Requirement
    except ModuleNotFoundError:
        yield Finding("packaging", PROBLEM, "not installed", "make venv, or pip install -e .")
        return
    lines = declared()
    missing = dict.fromkeys(lines[""], (PROBLEM, "not installed", "make venv, or pip install -e ."))
    for extra, (purpose, _) in EXTRAS.items():
        finding = (NOTE, f"not installed; for {purpose}", f"pip install 'megatron_slim[{extra}]'")
        missing |= {line: finding for line in lines[extra] if line not in missing}
    for line, absent in missing.items():
        requirement = Requirement(line)
        try:
            found = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            yield Finding(requirement.name, *absent)
            continue
        # NVIDIA's builds are called 2.13.0a0+hash.nv26.06: before the release that they are built from.
        tested = requirement.specifier.contains(found.split("+")[0].split("a0")[0], prereleases=True)
        fix = f"tested with {requirement.specifier}; pip install -e ., unless it belongs to NVIDIA's image"
        yield good_or(NOTE, requirement.name, tested, found, fix)


def kernels(cuda: bool) -> Iterator[Finding]:
    """The packages that belong on a GPU machine, and only there."""
    for name, module in KERNELS.items():
        present = importlib.util.find_spec(module) is not None
        if not cuda and present and module == "fla":
            fix = "pip uninstall flash-linear-attention fla-core"
            yield Finding(name, PROBLEM, "installed without a GPU: transformers' Qwen3-Next crashes on it", fix)
        elif not cuda:
            yield Finding(name, OK, "installed" if present else "not installed, not needed without a GPU")
        elif not present:
            fix = "use NVIDIA's image" if name == "apex" else "use NVIDIA's image, or pip install -e '.[gpu]'"
            yield Finding(name, NOTE, "not installed: slower layers are used", fix)
        else:
            yield _imports(name, module)


def _imports(name: str, module: str) -> Finding:
    """A kernel package that is there may still be built for another torch, or be another package."""
    if module == "apex" and importlib.util.find_spec("apex.optimizers") is None:
        return Finding(name, PROBLEM, "another package of that name, of PyPI", "pip uninstall apex; use NVIDIA's image")
    wanted = {"transformer_engine": "transformer_engine.pytorch", "fla": "fla.ops"}.get(module, module)
    try:
        importlib.import_module(wanted)
    except Exception as error:  # whatever a package that was built for something else raises
        lines = str(error).splitlines() or [type(error).__name__]
        fix = "it belongs to another torch or CUDA: use NVIDIA's image as it is, and replace nothing in it"
        return Finding(name, PROBLEM, f"does not import: {lines[0][:200]}", fix)
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        version = "installed"
    return Finding(name, OK, version)
