"""When a candidate is better than the best so far."""

import math
from collections.abc import Callable
from numbers import Real
from statistics import NormalDist

from .records import Scores

__all__ = ["acceptance_rule"]

Rule = Callable[[Scores, Scores], bool]


def acceptance_rule(accept: str, min_delta: float, confidence: float) -> Rule:
    """better(candidate, best) → bool.

    "mean" (published): mean(candidate) > mean(best) + min_delta.
    "paired": with d the n per-prompt differences, mean(d) > min_delta + z·s(d)/√n, where z is the standard normal
    quantile of `confidence` (one-sided; 0.84 is one standard error). Prompts differ far more from each other than
    candidates do on one prompt, so pairing removes most of the noise.

    A candidate with a score that is not finite is never better.
    """
    if accept not in ("mean", "paired"):
        raise ValueError(f'accept must be "mean" or "paired", got {accept!r}')
    if not (isinstance(confidence, Real) and 0.5 <= confidence < 1):
        raise ValueError(f"confidence must be in [0.5, 1), got {confidence!r}")
    if not (isinstance(min_delta, Real) and min_delta >= 0):
        raise ValueError(f"min_delta must be >= 0, got {min_delta!r}")
    z = NormalDist().inv_cdf(confidence) if accept == "paired" else 0.0

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
        return mean > min_delta + z * math.sqrt(variance / n)

    return better
