"""Names and defaults of the distillation losses, in one place for formulas, flags, checks and planning (no torch)."""

from __future__ import annotations

from dataclasses import dataclass

FORWARD_KL, REVERSE_KL, JSD, TOP_K = "forward-kl", "reverse-kl", "jsd", "top-k"
# Divergences, which are the choices of --kd-loss, and what each is; `divergences.DIVERGENCES` has their functions.
KD_LOSSES = {
    FORWARD_KL: "the cross entropy H(p, q), whose gradient is that of KL(p || q)",
    REVERSE_KL: "KL(q || p) (MiniLLM, arXiv 2306.08543)",
    JSD: "KL(p || m) / 2 + KL(q || m) / 2 with m = (p + q) / 2 (GKD, arXiv 2306.13649, beta 0.5)",
    TOP_K: "the cross entropy over k + 1 events, the teacher's k most probable tokens and the rest as one",
}
COSINE, MSE = HIDDEN_LOSSES = ("cosine", "mse")


@dataclass(frozen=True)
class LossDefaults:
    """What a run uses where its flags say nothing; `terms` has the weights.

    Attributes:
        kd_loss: one of `KD_LOSSES`.
        kd_temperature: T of both softmaxes.
        kd_top_k: k of the loss ``top-k``.
        hidden_kd_loss: one of `HIDDEN_LOSSES`.
    """

    kd_loss: str = FORWARD_KL
    kd_temperature: float = 1.0
    kd_top_k: int = 64
    hidden_kd_loss: str = COSINE


DEFAULTS = LossDefaults()
