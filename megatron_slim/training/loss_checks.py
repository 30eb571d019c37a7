"""Which arguments of the losses do not go together, or would be without effect."""

from __future__ import annotations

import math
from argparse import Namespace

from megatron_slim.architecture.shape import ModelShape
from megatron_slim.distillation.functions import function_violations
from megatron_slim.distillation.loss_options import DEFAULTS, TOP_K
from megatron_slim.distillation.terms import LOSS_TERMS, terms_of, weights_of
from megatron_slim.training.slim_arguments import schedule_of

# Flags of Megatron that its own output layer, losses or batches would heed, and why ours do not.
_WITHOUT_EFFECT = {
    "defer_embedding_wgrad_compute": "the output layer's gradient comes with the loss, chunk by chunk",
    "fp16_lm_cross_entropy": "losses are computed in fp32",
    "fp8_output_proj": "the output layer is part of the losses and stays in bf16",
    "mtp_detach_heads": "all heads train the output layer",
    "use_mup": "logits are not scaled",
    "dataloader_inter_document_masking": "give --reset-attention-mask with --reset-position-ids",
    "fim_data": "samples are those of a GPT dataset",
    "full_validation": "some samples would count more often than others; give --eval-iters",
    "multiple_validation_sets": "validation is one blend of data sets",
}
_GIVE_TEACHER = "give --teacher-load or --teacher-cache"


def loss_violations(shape: ModelShape, args: Namespace) -> list[str]:
    """What is wrong with the arguments of the losses, in sentences.

    Args:
        shape: sizes of the student.
        args: Megatron's arguments and ours, as parsed.
    """
    found = [
        f"--{name.replace('_', '-')} is not supported: {why}"
        for name, why in _WITHOUT_EFFECT.items()
        if getattr(args, name, False)
    ]
    for weight in weights_of(LOSS_TERMS.values()):
        schedule = schedule_of(weight, args)
        for end, value in (("start", schedule.start), ("end", schedule.end)):
            if not math.isfinite(value):
                found.append(f"{weight.flag}-{end} {value:g} is not finite")
            elif value < weight.least:
                found.append(f"{weight.flag}-{end} {value:g} is below {weight.least:g}")
            elif value > weight.most:
                found.append(f"{weight.flag}-{end} {value:g} is above {weight.most:g}")
    has_teacher = args.teacher_load is not None or args.teacher_cache is not None
    has_mtp = shape.mtp_num_layers > 0
    terms = terms_of(has_teacher=has_teacher, has_mtp=has_mtp)
    found += function_violations(terms, shape.vocab_size)
    if not (math.isfinite(args.kd_temperature) and args.kd_temperature > 0):
        found.append(f"--kd-temperature {args.kd_temperature:g} is not positive")
    if args.kd_top_k is not None:
        if args.kd_loss != TOP_K:
            found.append(f"--kd-top-k has no effect on --kd-loss {args.kd_loss}; use --kd-loss top-k")
        if not 1 <= args.kd_top_k <= shape.vocab_size:
            found.append(f"--kd-top-k {args.kd_top_k} is not between 1 and the vocabulary's {shape.vocab_size}")
    given = args.kd_loss, args.kd_temperature
    if not has_teacher and given != (DEFAULTS.kd_loss, DEFAULTS.kd_temperature):
        found.append(f"--kd-loss and --kd-temperature need a teacher; {_GIVE_TEACHER}")
    at_work = weights_of(terms.values())
    for weight in weights_of(terms_of(has_teacher=True, has_mtp=has_mtp).values()):
        if weight not in at_work and schedule_of(weight, args) != weight.default:
            found.append(f"{weight.flag}-* needs a teacher; {_GIVE_TEACHER}")
    if args.loss_chunk_size is not None and args.loss_chunk_size < 1:
        found.append(f"--loss-chunk-size {args.loss_chunk_size} is not positive")
    if (args.eod_mask_loss or args.reset_position_ids) and args.null_tokenizer_eod_id is None:
        # Megatron would take the last id of the vocabulary.
        found.append(
            "--eod-mask-loss and --reset-position-ids need the id that ends a document; give --null-tokenizer-eod-id, "
            "mostly config.json's eos_token_id"
        )
    return found
