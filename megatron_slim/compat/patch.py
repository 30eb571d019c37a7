"""A change of Megatron as a row that says why and until when, and the one place that makes changes."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

from megatron_slim.errors import SlimError

TESTED = "0.19.2"  # the version of megatron-core that the changes were made for
NOT_REPORTED = f"not reported, seen in megatron-core {TESTED}"

BUG = "bug"  # of Megatron, on any machine
HOOK = "hook"  # into Megatron's loop, which has none there
LIBRARY = "library"  # that is not installed
CPU = "cpu"  # where Megatron takes a GPU for granted
SPEED = "speed"  # on a CPU

# What a target is to be, from what Megatron has there.
Change: TypeAlias = Callable[[Any], Any]

# By target: what Megatron had there, and what is there now.
MADE: dict[str, tuple[object, object]] = {}


def instead(value: object) -> Change:
    """A change that does not look at what is there."""
    return lambda _: value


@dataclass(frozen=True)
class Patch:
    """One reason to change Megatron.

    Attributes:
        name: in a few words.
        kind: `BUG`, `HOOK`, `LIBRARY`, `CPU` or `SPEED`.
        targets: what is changed, as ``module:name`` or ``module:Class.name``.
        why: what happens without it.
        upstream: issue, pull request or file of Megatron-LM that it is about, or `NOT_REPORTED`.
        changes: one for each target; none where they depend on a run.
        optional: a name that Megatron takes from another library may be missing.
    """

    name: str
    kind: str
    targets: tuple[str, ...]
    why: str
    upstream: str
    changes: tuple[Change, ...] = ()
    optional: bool = False

    def apply(self, *changes: Change) -> None:
        """Make the changes, of what Megatron has: those of an earlier call are replaced.

        Args:
            changes: one for each target, where the row has none.

        Raises:
            SlimError: another version of Megatron has no such target.
        """
        for target, change in zip(self.targets, changes or self.changes, strict=True):
            self._change(target, change)

    def _change(self, target: str, change: Change) -> None:
        owner, name = self.place(target)
        now = inspect.getattr_static(owner, name, None) if isinstance(owner, type) else getattr(owner, name, None)
        first, ours = MADE.get(target, (now, None))
        theirs: Any = first if now is ours else now
        bound = isinstance(theirs, (staticmethod, classmethod))
        made = change(theirs.__get__(None, owner) if bound else theirs)
        made = staticmethod(made) if bound else made
        MADE[target] = theirs, made
        setattr(owner, name, made)

    def place(self, target: str) -> tuple[Any, str]:
        """The module or class that a target is in, and its name there.

        Raises:
            SlimError: another version of Megatron has no such target.
        """
        module, _, path = target.partition(":")
        *outer, name = path.split(".")
        try:
            owner = importlib.import_module(module)
            for each in outer:
                owner = getattr(owner, each)
            if not self.optional:
                getattr(owner, name)
        except (ModuleNotFoundError, AttributeError) as error:
            if isinstance(error, ModuleNotFoundError) and not (error.name or "").startswith("megatron."):
                raise  # something that Megatron needs is not installed
            raise SlimError(
                f"this Megatron has no {target}, which is changed for: {self.name}",
                fix=f"install megatron-core {TESTED}",
            ) from None
        return owner, name
