"""Names of what this package keeps next to a model; none of it may look like weights to any reader."""

from __future__ import annotations

PROVENANCE = "slim_provenance.json"
REFERENCE = "slim_reference.json"
STORAGE = "slim_storage.json"  # next to the config.json of a torch_dist checkpoint, whose own layout cannot say
CARRIED_TENSORS = "slim_carried.tensors"  # next to the config.json of a torch_dist checkpoint: `carried`
CARRIED_CONTENT = "slim_carried.json"  # its digest
PLAN, REPORT = "plan.json", "pruning_report.md"
ELASTIC = "elastic.json"  # the budgets that an elastic checkpoint holds
PLAN_ITEMS = 40_000_000  # at most, of plans: they name neurons of every expert of a large model, of each budget
QUANTIZATION_REPORT = "quantization_report.md"
STATS, FORMER_STATS = "calibration.stats", "stats.safetensors"
RECORDS = frozenset(
    {
        PROVENANCE,
        REFERENCE,
        STORAGE,
        CARRIED_TENSORS,
        CARRIED_CONTENT,
        PLAN,
        REPORT,
        ELASTIC,
        QUANTIZATION_REPORT,
        STATS,
        FORMER_STATS,
    }
)
