"""When a candidate is better than the best so far."""

import math
from collections.abc import Callable
from functools import cache
from numbers import Real
from statistics import NormalDist

from .arguments import as_float
from .records import Scores

Rule = Callable[[Scores, Scores], bool]


def acceptance_rule(accept: str, min_delta: float, confidence: float) -> Rule:
    """better(candidate, best) → bool.

    "mean" (published): mean(candidate) > mean(best) + min_delta.
    "paired": with d the n per-prompt differences, mean(d) > min_delta + t·s(d)/√n, where t is the quantile of
    `confidence` of Student's t with n − 1 degrees of freedom (one-sided; 0.84 is one standard error). Prompts differ
    far more from each other than candidates do on one prompt, so pairing removes most of the noise. The confidence is
    that of normal differences; of scores that are 0 or 1, one prompt more is one standard error, whatever n is.

    A candidate with a score that is not finite is never better.
    """
    if accept not in ("mean", "paired"):
        raise ValueError(f'accept must be "mean" or "paired", got {accept!r}')
    if not (isinstance(confidence, Real) and 0.5 <= confidence < 1):
        raise ValueError(f"confidence must be in [0.5, 1), got {confidence!r}")
    if not (isinstance(min_delta, Real) and min_delta >= 0):
        raise ValueError(f"min_delta must be >= 0, got {min_delta!r}")
    min_delta = as_float(min_delta)

    def better(candidate: Scores, best: Scores) -> bool:
        n = len(best.values)
        if len(candidate.values) != n:
            raise ValueError(
                f"score_fn returned {len(candidate.values)} scores for a candidate and {n} before: it must score the "
                "same prompts at every call"
            )
        if accept == "paired" and n < 2:
            raise ValueError('accept="paired" needs a score per prompt, for at least 2 prompts; score_fn gave 1 number')
        if not all(map(math.isfinite, candidate.values)):
            return False
        if accept == "mean":
            return candidate.mean > best.mean + min_delta
        d = [c - b for c, b in zip(candidate.values, best.values, strict=True)]
        mean = math.fsum(d) / n
        variance = math.fsum((x - mean) ** 2 for x in d) / (n - 1)
        return mean > min_delta + students_quantile(float(confidence), n - 1) * math.sqrt(variance / n)

    return better


@cache
def students_quantile(probability: float, dof: int) -> float:
    """Of Student's t, for 0.5 ≤ probability < 1."""
    if dof > 1000:  # to the sixth digit
        z = NormalDist().inv_cdf(probability)
        return z + (z**3 + z) / (4 * dof)
    low, high = 0.0, math.pi / 2  # of atan(t / √dof)
    for _ in range(60):
        angle = (low + high) / 2
        low, high = (angle, high) if (1 + _probability_within(angle, dof)) / 2 < probability else (low, angle)
    return math.sqrt(dof) * math.tan(low)


def _probability_within(angle: float, dof: int) -> float:
    """That |t| < √dof·tan(angle): a finite sum (Abramowitz & Stegun, 26.7.3 and 26.7.4)."""
    odd, total = dof % 2, 0.0
    term = math.cos(angle) if odd else 1.0
    for k in range(odd, dof - 1, 2):
        total += term
        term *= (k + 1) / (k + 2) * math.cos(angle) ** 2
    return 2 / math.pi * (angle + math.sin(angle) * total) if odd else math.sin(angle) * total
