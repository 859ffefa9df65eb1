"""W ← A + α·ΔW in place, and the controller that chooses α."""

from .controller import EffOPDController
from .distributed import share
from .functional import ExtrapolationStats, extrapolate, extrapolate_
from .records import Candidate, EffOPDEvent, Scores

__all__ = [
    "Candidate",
    "EffOPDController",
    "EffOPDEvent",
    "ExtrapolationStats",
    "Scores",
    "extrapolate",
    "extrapolate_",
    "share",
]
