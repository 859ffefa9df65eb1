"""Truncated SVD and spectra of weight updates."""

from .alignment import principal_cosines, reconstruct, subspace_alignment, subspace_overlap
from .metrics import SpectralMetrics, spectral_metrics
from .reconstruction import low_rank_update
from .rsvd import batched_rsvd, low_rank_part
from .storage import load, save
from .types import RSVD, Flag
from .update import update_svd

__all__ = [
    "RSVD",
    "Flag",
    "SpectralMetrics",
    "batched_rsvd",
    "load",
    "low_rank_part",
    "low_rank_update",
    "principal_cosines",
    "reconstruct",
    "save",
    "spectral_metrics",
    "subspace_alignment",
    "subspace_overlap",
    "update_svd",
]
