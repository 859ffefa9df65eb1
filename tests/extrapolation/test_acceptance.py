"""When a candidate counts as better."""

import statistics

import pytest

from effopd_kernels.extrapolation import Scores
from effopd_kernels.extrapolation.acceptance import acceptance_rule


def test_mean_is_strict_and_min_delta_is_a_margin():
    better = acceptance_rule("mean", 0.0, 0.84)
    assert better(Scores((1.0, 0.5)), Scores((1.0, 0.25))) and not better(Scores((0.5, 1.0)), Scores((1.0, 0.5)))
    better = acceptance_rule("mean", 0.25, 0.84)
    assert not better(Scores((0.75,)), Scores((0.5,))) and better(Scores((0.8,)), Scores((0.5,)))


def test_paired_sees_a_small_gain_on_every_prompt_through_large_differences_between_prompts():
    best = Scores(tuple(float(10 * i) for i in range(16)))
    steady = Scores(tuple(v + 0.1 + 0.01 * (i % 2) for i, v in enumerate(best.values)))
    lucky = Scores((best.values[0] + 100.0, *best.values[1:]))  # one prompt, a larger mean
    better = acceptance_rule("paired", 0.0, 0.95)
    assert better(steady, best)
    assert lucky.mean > steady.mean and not better(lucky, best)


@pytest.mark.parametrize("confidence, z", [(0.5, 0.0), (0.841344746, 1.0), (0.975, 1.959964)])
def test_paired_threshold_is_the_normal_quantile_of_the_standard_error(confidence, z):
    d = [0.3, -0.1, 0.2, 0.4, 0.0]
    error = statistics.stdev(d) / len(d) ** 0.5
    better = acceptance_rule("paired", 0.0, confidence)
    for shift, accepted in ((1e-6, True), (-1e-6, False)):
        moved = [x - statistics.mean(d) + z * error + shift for x in d]
        assert better(Scores(tuple(moved)), Scores((0.0,) * 5)) is accepted


def test_paired_needs_prompts_and_equal_scores_are_not_better():
    better = acceptance_rule("paired", 0.0, 0.84)
    with pytest.raises(ValueError, match="at least 2 prompts"):
        better(Scores((1.0,)), Scores((0.0,)))
    assert not better(Scores((1.0, 2.0)), Scores((1.0, 2.0)))
    assert not better(Scores((float("nan"), 2.0)), Scores((1.0, 2.0)))
