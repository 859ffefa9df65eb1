"""W ← A + α·ΔW in place, and the controller that chooses α."""

from .checkpoint import CheckpointError, newest_intact
from .controller import EffOPDController
from .distributed import share
from .functional import ExtrapolationStats, extrapolate, extrapolate_
from .records import Candidate, EffOPDEvent, Losses, Scores

__all__ = [
    "Candidate",
    "CheckpointError",
    "EffOPDController",
    "EffOPDEvent",
    "ExtrapolationStats",
    "Losses",
    "Scores",
    "extrapolate",
    "extrapolate_",
    "newest_intact",
    "share",
]
