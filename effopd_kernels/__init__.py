"""Kernels that make on-policy distillation of language models cheap: fused losses, low-rank maths, extrapolation."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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


if not TYPE_CHECKING:  # to a type checker a name that is not above is a mistake

    def __getattr__(name: str) -> Any:
        """The public names and the folders they are from, imported when the first is used: PyTorch takes over a second,
        and --help does not need it."""
        ideas = ("divergence", "extrapolation", "lowrank")
        if name not in (*__all__, *ideas):
            raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
        for module in [import_module(f"{__name__}.{idea}") for idea in ideas]:
            globals().update({public: getattr(module, public) for public in __all__ if public in module.__all__})
        return globals()[name]


def __dir__() -> list[str]:
    return [*globals(), *__all__]
