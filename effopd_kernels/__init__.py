"""Kernels that make on-policy distillation of language models cheap: fused losses, low-rank maths, extrapolation."""

from .divergence import (
    FORWARD_KL,
    REVERSE_KL,
    Divergence,
    DivergenceStats,
    divergence_loss,
    jsd,
    linear_divergence_loss,
    linear_reverse_kl_loss,
    linear_token_logprobs,
    reverse_kl_loss,
    sampled_kl,
    skew_forward_kl,
    skew_reverse_kl,
    topk_divergence_loss,
)
from .extrapolation import EffOPDController, EffOPDEvent, Losses, Scores, extrapolate, extrapolate_, share
from .lowrank import (
    RSVD,
    SpectralMetrics,
    batched_rsvd,
    low_rank_update,
    spectral_metrics,
    subspace_alignment,
    update_svd,
)

__version__ = "0.1.0"

__all__ = [
    "FORWARD_KL",
    "REVERSE_KL",
    "RSVD",
    "Divergence",
    "DivergenceStats",
    "EffOPDController",
    "EffOPDEvent",
    "Losses",
    "Scores",
    "SpectralMetrics",
    "batched_rsvd",
    "divergence_loss",
    "extrapolate",
    "extrapolate_",
    "jsd",
    "linear_divergence_loss",
    "linear_reverse_kl_loss",
    "linear_token_logprobs",
    "low_rank_update",
    "reverse_kl_loss",
    "sampled_kl",
    "share",
    "skew_forward_kl",
    "skew_reverse_kl",
    "spectral_metrics",
    "subspace_alignment",
    "topk_divergence_loss",
    "update_svd",
]
