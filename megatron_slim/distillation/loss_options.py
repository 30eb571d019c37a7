"""Names and defaults of the distillation losses, in one place for formulas, flags, checks and planning (no torch)."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_slim.distillation.schedule import Schedule

FORWARD_KL, REVERSE_KL, JSD, TOP_K = "forward-kl", "reverse-kl", "jsd", "top-k"
# Divergences, which are the choices of --kd-loss, and what each is; `divergences.DIVERGENCES` has their functions.
KD_LOSSES = {
    FORWARD_KL: "the cross entropy H(p, q), whose gradient is that of KL(p || q)",
    REVERSE_KL: "KL(q || p) (MiniLLM, arXiv 2306.08543)",
    JSD: "KL(p || m) / 2 + KL(q || m) / 2 with m = (p + q) / 2 (GKD, arXiv 2306.13649, beta 0.5)",
    TOP_K: "the cross entropy over k + 1 events, the teacher's k most probable tokens and the rest as one",
}
COSINE, MSE = HIDDEN_LOSSES = ("cosine", "mse")
LAMBDA, BETA = Schedule("linear", 1.0, 0.75), Schedule("cosine", 0.3, 0.1)  # SlimQwen, section 3.3
ALWAYS_ONE = Schedule("constant", 1.0, 1.0)


@dataclass(frozen=True)
class LossDefaults:
    """What a run uses where its flags say nothing.

    Attributes:
        kd_loss: one of `KD_LOSSES`.
        kd_temperature: T of both softmaxes.
        kd_top_k: k of the loss ``top-k``.
        kd_lambda: weight of distillation against the language-model loss.
        mtp_beta: weight of the MTP heads.
        hidden_kd_loss: one of `HIDDEN_LOSSES`.
        hidden_kd_weight: weight of hidden-state distillation.
    """

    kd_loss: str = FORWARD_KL
    kd_temperature: float = 1.0
    kd_top_k: int = 64
    kd_lambda: Schedule = LAMBDA
    mtp_beta: Schedule = BETA
    hidden_kd_loss: str = COSINE
    hidden_kd_weight: Schedule = ALWAYS_ONE


DEFAULTS = LossDefaults()
