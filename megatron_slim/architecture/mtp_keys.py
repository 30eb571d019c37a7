"""What a config.json says about MTP, under the names that its readers have for it.

    num_nextn_predict_layers   vLLM (Qwen3-Next), SGLang
    num_mtp_layers             transformers' MtpModel, vLLM's transformers backend, llm-compressor
    mtp_layer_types            transformers' MtpModel: the type of every block's layer
    mtp_num_hidden_layers      vLLM (Qwen3.5), llm-compressor

The published Qwen3-Next states nothing about its MTP block: the names of the tensors say whether there is one.
"""

from __future__ import annotations

from megatron_slim.aliases import HFConfig, JsonObject
from megatron_slim.architecture.family import FULL_ATTENTION
from megatron_slim.errors import ShapeError

NEXTN, LAYERS, TYPES = "num_nextn_predict_layers", "num_mtp_layers", "mtp_layer_types"
COUNTS = (NEXTN, LAYERS, "mtp_num_hidden_layers")
MTP_KEYS = frozenset({*COUNTS, TYPES})


def stated_mtp_layers(config: HFConfig, where: str = "config.json") -> int | None:
    """How many MTP blocks the config.json of a language model says that there are; None where it says nothing.

    Raises:
        ShapeError: values that are not counts, contradict each other, or ask for another block than there is.
    """
    found, stated = [], {key: config[key] for key in COUNTS if config.get(key) is not None}
    found += [
        f"{key} {value!r} is not a number of MTP blocks"
        for key, value in stated.items()
        if type(value) is not int or value < 0
    ]
    if (kinds := config.get(TYPES)) is not None:
        if not isinstance(kinds, list) or any(kind != FULL_ATTENTION for kind in kinds):
            found.append(f"{TYPES} {kinds!r} is not supported (only {FULL_ATTENTION!r})")
        else:
            stated[TYPES] = len(kinds)
    if not found and len(set(stated.values())) > 1:
        found.append(f"{' and '.join(f'{key} {config[key]!r}' for key in stated)} contradict each other")
    if found:
        raise ShapeError(found, where=where)
    return next(iter(stated.values()), None)


def without_mtp_keys(config: HFConfig) -> JsonObject:
    """A config.json that says nothing of MTP."""
    return {key: value for key, value in config.items() if key not in MTP_KEYS}


def mtp_entries(layers: int, count: str) -> JsonObject:
    """What a config.json is to say of so many MTP blocks, under the key ``count`` of its family.

    Of none it has a zero for people and for our own tools; transformers takes the presence of its keys for a block.
    """
    return {count: layers} | ({LAYERS: layers, TYPES: [FULL_ATTENTION] * layers} if layers else {})
