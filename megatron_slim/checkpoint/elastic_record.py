"""``elastic.json`` next to a checkpoint: where it is, and how it goes along with the model (imports no torch)."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_slim.aliases import Document
from megatron_slim.checkpoint.iterations import roots
from megatron_slim.checkpoint.records import ELASTIC, PLAN_ITEMS
from megatron_slim.checkpoint.torch_dist_names import HF_DIR
from megatron_slim.files import read_json, write_atomic

if TYPE_CHECKING:
    from megatron_slim.checkpoint.units import Checkpoint

logger = logging.getLogger(__name__)


def elastic_file(checkpoint: Path) -> Path | None:
    """The document of a checkpoint directory of either format: in it, in its hf/, or above a directory of weights."""
    files = [folder / ELASTIC for root in roots(checkpoint) for folder in (root, root / HF_DIR)]
    return next((file for file in files if file.is_file()), None)


def carry_elastic(source: Checkpoint, target: Path) -> Document:
    """Take it along to the same model in another format, byte for byte; not to a model of other sizes."""
    file = elastic_file(source.path)
    if file is None:
        return {}
    document = read_json(file, max_items=PLAN_ITEMS)
    parent = document.get("parent") if isinstance(document, Mapping) else None
    shape = json.loads(json.dumps(source.shape.to_dict()))
    if not isinstance(parent, Mapping) or parent.get("shape") != shape:
        logger.warning(f"{file}: is for a model of other sizes, and is not carried over")
        return {}
    write_atomic(target / ELASTIC, file.read_bytes())
    return {"elastic": ELASTIC}
