"""When a candidate counts as better."""

import math
import random
import statistics

import pytest

from effopd_kernels.extrapolation import Scores
from effopd_kernels.extrapolation.acceptance import acceptance_rule, students_quantile


def test_mean_is_strict_and_min_delta_is_a_margin():
    better = acceptance_rule("mean", 0.0, 0.84)
    assert better(Scores((1.0, 0.5)), Scores((1.0, 0.25))) and not better(Scores((0.5, 1.0)), Scores((1.0, 0.5)))
    better = acceptance_rule("mean", 0.25, 0.84)
    assert not better(Scores((0.75,)), Scores((0.5,))) and better(Scores((0.8,)), Scores((0.5,)))
    better, zero = acceptance_rule("paired", 0.25, 0.84), Scores((0.0,) * 3)
    assert not better(Scores((0.2, 0.21, 0.2)), zero) and better(Scores((0.3, 0.31, 0.3)), zero)
    assert not acceptance_rule("mean", 10**400, 0.84)(Scores((1.0,)), Scores((0.0,)))  # beyond all floats


def test_paired_sees_a_small_gain_on_every_prompt_through_large_differences_between_prompts():
    best = Scores(tuple(float(10 * i) for i in range(16)))
    steady = Scores(tuple(v + 0.1 + 0.01 * (i % 2) for i, v in enumerate(best.values)))
    lucky = Scores((best.values[0] + 100.0, *best.values[1:]))  # one prompt, a larger mean
    better = acceptance_rule("paired", 0.0, 0.95)
    assert better(steady, best)
    assert lucky.mean > steady.mean and not better(lucky, best)


@pytest.mark.parametrize(
    "confidence, t", [(0.5, 0.0), (0.95, 2.131847), (0.975, 2.776445)]
)  # of four degrees of freedom
def test_paired_threshold_is_students_quantile_of_the_standard_error(confidence, t):
    d = [0.3, -0.1, 0.2, 0.4, 0.0]
    error = statistics.stdev(d) / len(d) ** 0.5
    better = acceptance_rule("paired", 0.0, confidence)
    for shift, accepted in ((1e-6, True), (-1e-6, False)):
        moved = [x - statistics.mean(d) + t * error + shift for x in d]
        assert better(Scores(tuple(moved)), Scores((0.0,) * 5)) is accepted


def test_paired_needs_prompts_and_equal_scores_are_not_better():
    better = acceptance_rule("paired", 0.0, 0.84)
    with pytest.raises(ValueError, match="at least 2 prompts"):
        better(Scores((1.0,)), Scores((0.0,)))
    assert not better(Scores((1.0, 2.0)), Scores((1.0, 2.0)))
    assert not better(Scores((float("nan"), 2.0)), Scores((1.0, 2.0)))


@pytest.mark.parametrize(
    "probability, dof, t",  # tables of Student's t
    [
        (0.975, 1, 12.7062),
        (0.95, 2, 2.91999),
        (0.95, 9, 1.83311),
        (0.99, 30, 2.45726),
        (0.84, 1000, 0.99495),
        (0.5, 3, 0),
    ],
)
def test_students_quantile(probability, dof, t):
    assert students_quantile(probability, dof) == pytest.approx(t, rel=1e-5, abs=1e-9)


@pytest.mark.parametrize("n", [2, 4, 16])
@pytest.mark.parametrize("confidence", [0.84, 0.95])
def test_the_confidence_holds_for_few_prompts(n, confidence):
    """Candidates that are no better are accepted as often as was said."""
    better, draw = acceptance_rule("paired", 0.0, confidence), random.Random(0)
    zero, rounds = Scores((0.0,) * n), 4000
    accepted = sum(better(Scores(tuple(draw.gauss(0, 1) for _ in range(n))), zero) for _ in range(rounds))
    assert abs(accepted / rounds - (1 - confidence)) < 4 * math.sqrt(confidence * (1 - confidence) / rounds)


@pytest.mark.parametrize("accept", ["mean", "paired"])
def test_the_same_scores_in_another_order_are_no_better(accept):
    """0.1 + 0.2 + 0.3 is more than 0.3 + 0.2 + 0.1, summed as floats."""
    better = acceptance_rule(accept, 0.0, 0.84)
    assert not better(Scores((0.1, 0.2, 0.3)), Scores((0.3, 0.2, 0.1)))
    assert not better(Scores((0.3, 0.2, 0.1)), Scores((0.1, 0.2, 0.3)))


def test_means_that_no_float_is():
    assert Scores((1e308, 1e308)).mean == math.inf and Scores((-math.inf, 1.0)).mean == -math.inf
    assert math.isnan(Scores((math.inf, -math.inf)).mean)
