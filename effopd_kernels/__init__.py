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
    reverse_kl_loss,
    skew_forward_kl,
    skew_reverse_kl,
)
from .extrapolation import EffOPDController, EffOPDEvent, Scores, extrapolate, extrapolate_
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
    "Scores",
    "SpectralMetrics",
    "batched_rsvd",
    "divergence_loss",
    "extrapolate",
    "extrapolate_",
    "jsd",
    "linear_divergence_loss",
    "linear_reverse_kl_loss",
    "low_rank_update",
    "reverse_kl_loss",
    "skew_forward_kl",
    "skew_reverse_kl",
    "spectral_metrics",
    "subspace_alignment",
    "update_svd",
]
