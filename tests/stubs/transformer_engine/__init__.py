"""Stands in for Transformer Engine, which a CPU cannot have.

With this directory on PYTHONPATH Megatron-Core takes its Transformer Engine path. The modules in `pytorch` have the
parameters, arguments and results of the real ones, computed in full precision by torch; an FP8 region (`pytorch.fp8`)
refuses the dimensions that the real one refuses, uses weights as they were when they were last quantised, and notes
what ran in it. Every other name exists and means nothing.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
import types
from collections.abc import Sequence
from typing import Any

__version__ = "2.13.0"


class Nothing(type):
    """A class of any name, with classes of any name as its attributes."""

    def __getattr__(cls, name: str) -> Any:
        return anything(name)


def anything(name: str) -> Any:
    if name.startswith("_"):
        raise AttributeError(name)
    return Nothing(name, (), {})


class _Package(types.ModuleType):
    __path__: Sequence[str] = ()

    def __getattr__(self, name: str) -> Any:
        return anything(name)


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Comes last, so a file of this directory is taken where there is one."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if not fullname.startswith(f"{__name__}."):
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _Package(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def __getattr__(name: str) -> Any:
    return anything(name)


sys.meta_path.append(_Finder())
