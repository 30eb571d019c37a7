"""The report that a compression run ends with: a page, its numbers, and the model cards of the exports."""

from __future__ import annotations

import logging
from pathlib import Path

from megatron_slim.compression.card import card, write_card
from megatron_slim.compression.report_facts import gather
from megatron_slim.compression.report_inputs import read_compression_run
from megatron_slim.compression.report_page import page
from megatron_slim.files import to_json, write_atomic

PAGE, NUMBERS = "report.html", "report.json"
logger = logging.getLogger(__name__)


def write_report(save: Path) -> Path:
    """Write ``report.html`` and ``report.json`` into the directory of a run, and a model card into its exports.

    Whatever is not measured yet is stated as that, so a run in the middle has a report too. Cards are written into
    ``save/model`` and ``save/model-fp8`` where they exist: as README.md, or as MODEL_CARD.md where there is a README.md
    that is not ours.

    Args:
        save: directory of the run, with ``run.json``.

    Returns:
        The page.

    Raises:
        SlimError: ``run.json`` is missing, or a file of the run cannot be read; nothing is written then.
    """
    run = read_compression_run(save)
    gathered = gather(run)
    shown, numbers = page(gathered), to_json(gathered.facts)
    models = [model for model in (run.final_model(), run.quantized_model()) if model.is_dir()]
    cards = {model: card(gathered.facts, model) for model in models}
    for model, text in cards.items():
        logger.info(f"{write_card(text, model)}: the model card")
    write_atomic(save / NUMBERS, numbers)
    write_atomic(save / PAGE, shown)
    logger.info(f"{save / PAGE}: open it in a browser")
    return save / PAGE
