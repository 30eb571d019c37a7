"""Larger models that hold a language model, such as one that also sees pictures: what of them is the language model.

Of such a checkpoint, the language model is read, pruned and trained. All other tensors travel with it as they are, but
for those whose rows are its hidden dimensions: they lose the rows that it loses.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from megatron_slim.aliases import HFConfig, JsonObject

TRUNK = "model."  # what names of the language model's trunk begin with by themselves


@dataclass(frozen=True)
class Wrapper:
    """A kind of larger model.

    Attributes:
        model_type: as its config.json says it.
        architecture: transformers' class.
        text: key in config.json of the language model's own.
        trunk: what its names begin with where they are ``model.*`` by themselves.
        others: what the names of all other tensors begin with.
        hidden_rows: those of them whose rows are the hidden dimensions of the language model.
        hidden_key: section and key in config.json that say how many these are.
        accepted: keys of that section that ask for what is not implemented -> values accepted.
    """

    model_type: str
    architecture: str
    text: str
    trunk: str
    others: tuple[str, ...]
    hidden_rows: tuple[str, ...]
    hidden_key: tuple[str, str]
    accepted: Mapping[str, tuple[object, ...]]

    def file_name(self, name: str) -> str:
        """Name in the files of a tensor of the language model."""
        return self.trunk + name.removeprefix(TRUNK) if name.startswith(TRUNK) else name

    def is_other(self, name: str) -> bool:
        """Whether a name in the files is not of the language model."""
        return name.startswith(self.others)

    def violations(self, config: HFConfig, names: Collection[str], hidden_size: object) -> list[str]:
        """What makes the rest of the larger model another one than this.

        Args:
            config: its config.json.
            names: of its tensors outside the language model, at least one.
            hidden_size: of the language model.
        """
        section, key = self.hidden_key
        values = config.get(section)
        if not isinstance(values, Mapping):
            return [f"{section} is missing, or is not an object"]
        found = [f"{name} is missing" for name in self.hidden_rows if name.endswith(".weight") and name not in names]
        if values.get(key, hidden_size) != hidden_size:
            found.append(f"{section}.{key} {values[key]!r} is not hidden_size {hidden_size}")
        return found + [
            f"{section}.{name} {values[name]!r} is not supported (only {accepted[0]!r})"
            for name, accepted in self.accepted.items()
            if name in values and values[name] not in accepted
        ]

    def wrapped(self, base: HFConfig, text: HFConfig, hidden_size: int) -> JsonObject:
        """config.json of the whole: ``base`` with another language model of ``hidden_size`` in it."""
        section, key = self.hidden_key
        before = base.get(self.text, {})
        kept = {name: value for name, value in text.items() if name != "architectures" or name in before}
        found = {**base, self.text: kept}
        if isinstance(base.get(section), Mapping):
            found[section] = {**base[section], key: hidden_size}
        return found


def text_config(config: HFConfig, wrapper: Wrapper | None) -> HFConfig:
    """What a config.json says of the language model; all of it where that is the whole model.

    A section that is missing or is not an object gives an empty one, for the caller to refuse what it lacks.
    """
    if wrapper is None:
        return config
    text = config.get(wrapper.text)
    return text if isinstance(text, Mapping) else {}
