"""The family of divergences as data.

With p the teacher's distribution, q the student's and m = π·p + (1−π)·q,

    D = a·KL(p‖m) + b·KL(q‖m)

so a divergence is three numbers, and one kernel per language serves all of them.
"""

from dataclasses import dataclass
from numbers import Real
from typing import NamedTuple

from ..checks import below_infinity


@dataclass(frozen=True)
class Divergence:
    """a·KL(p‖m) + b·KL(q‖m) with m = pi·p + (1−pi)·q; p is the teacher, q the student.

    Raises ValueError unless a, b ≥ 0, both finite, and 0 ≤ pi ≤ 1; TypeError for what is no number.
    """

    a: float
    b: float
    pi: float

    def __post_init__(self):
        if not all(isinstance(number, Real) for number in (self.a, self.b, self.pi)):
            raise TypeError(f"a divergence is three numbers, got {self}")
        if not (min(self.a, self.b) >= 0 and below_infinity(self.a) and below_infinity(self.b) and 0 <= self.pi <= 1):
            raise ValueError(f"a divergence needs a >= 0, b >= 0, both finite, and 0 <= pi <= 1, got {self}")


class Spec(NamedTuple):
    """The numbers of `effopd::divergence_rows`: the family's, and what makes log-probabilities of logits."""

    a: float
    b: float
    pi: float
    student_temperature: float = 1.0
    teacher_temperature: float = 1.0
    student_scale: float = 1.0
    teacher_scale: float = 1.0
    student_softcap: float = 0.0
    teacher_softcap: float = 0.0


class TopKSpec(NamedTuple):
    """Those of `effopd::topk_rows`, which has no teacher's logits; tail: all that is not known is one entry more."""

    a: float
    b: float
    pi: float
    tail: bool
    temperature: float = 1.0
    scale: float = 1.0
    softcap: float = 0.0


REVERSE_KL = Divergence(0.0, 1.0, 1.0)  # KL(q‖p)
FORWARD_KL = Divergence(1.0, 0.0, 0.0)  # KL(p‖q)


def jsd(beta: float = 0.5) -> Divergence:
    """Generalised Jensen–Shannon divergence of GKD (arXiv 2306.13649, eq. 1): beta·KL(p‖m) + (1−beta)·KL(q‖m).

    It vanishes identically at beta 0 and 1, where its direction is that of FORWARD_KL and REVERSE_KL: use those.
    """
    if not isinstance(beta, Real) or not 0 < beta < 1:
        raise ValueError(f"jsd needs 0 < beta < 1, got {beta!r}; its limits are FORWARD_KL (0) and REVERSE_KL (1)")
    return Divergence(beta, 1 - beta, beta)


def skew_forward_kl(alpha: float) -> Divergence:
    """KL(p ‖ alpha·p + (1−alpha)·q), DistiLLM's skew KL (arXiv 2402.03898, eq. 4); alpha 0 is FORWARD_KL. Raises
    ValueError outside 0 ≤ alpha < 1: at 1 it vanishes identically.
    """
    _check_skew("skew_forward_kl", alpha)
    return Divergence(1.0, 0.0, alpha)


def skew_reverse_kl(alpha: float) -> Divergence:
    """KL(q ‖ (1−alpha)·p + alpha·q), DistiLLM's skew reverse KL; alpha 0 is REVERSE_KL. Raises as `skew_forward_kl`."""
    _check_skew("skew_reverse_kl", alpha)
    return Divergence(0.0, 1.0, 1 - alpha)


def _check_skew(name: str, alpha: float) -> None:
    if not isinstance(alpha, Real) or not 0 <= alpha < 1:
        raise ValueError(f"{name} needs 0 <= alpha < 1, got {alpha!r}; at 1 it vanishes identically")
