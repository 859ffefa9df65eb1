"""Spectral metrics against their definitions on an fp64 SVD, and the noise edge against what rounding really does."""

import math

import numpy as np
import pytest
import torch
from lowrank.matrices import SPECTRA, bf16_pair, kahan, spectrum, with_spectrum

from effopd_kernels.lowrank import spectral_metrics


def definitions(exact: torch.Tensor, top_fraction: float = 0.01) -> dict[str, float]:
    s = torch.linalg.svdvals(exact)
    p = s / s.sum()
    top = math.ceil(top_fraction * min(exact.shape))
    return {
        "spectral_norm": s[0].item(),
        "frobenius_norm": exact.norm().item(),
        "spectral_to_frobenius": (s[0] / exact.norm()).item(),
        "effective_rank": (-torch.special.xlogy(p, p).sum()).exp().item(),
        "top_fraction_norm_ratio": (s[:top].norm() / s.norm()).item(),
        "participation_ratio": (s.norm() ** 4 / (exact.mT @ exact).norm() ** 2).item(),
        "stable_rank": (s.norm() ** 2 / s[0] ** 2).item(),
    }


@pytest.mark.parametrize("shape", [(120, 200), (200, 120)], ids=str)
@pytest.mark.parametrize("name", [*SPECTRA, "kahan"])
def test_exact_metrics_in_fp32(name, shape):
    a = (kahan(96) if name == "kahan" else spectrum(name, *shape)).float()
    metrics = spectral_metrics(a, top_fraction=0.05)
    for field, value in definitions(a.double(), 0.05).items():
        assert abs(getattr(metrics, field) / value - 1) < 1e-5, field
    assert not metrics.quantisation_limited and metrics.unchanged_fraction == (a == 0).double().mean()


def test_the_top_of_a_hundred_triplets_is_the_per_cent_asked_for():
    """In floating point 0.07 · 100 is above 7 and 0.28 · 100 above 28."""
    a = torch.diag(torch.arange(100.0, 0, -1))
    for count in range(1, 101):
        ratio = spectral_metrics(a, top_fraction=count / 100).top_fraction_norm_ratio
        assert ratio == pytest.approx(float(a[:count].norm() / a.norm()), rel=1e-6)


@pytest.mark.parametrize("ratio", [1e-1, 1e-2, 1e-3])
def test_exact_metrics_of_bf16_pairs(ratio):
    current, base = bf16_pair(150, 220, 6, ratio)
    exact = current.double() - base.double()
    metrics = spectral_metrics(current, base=base)
    for field, value in definitions(exact).items():
        assert abs(getattr(metrics, field) / value - 1) < 1e-6, field
    assert metrics.unchanged_fraction == (current == base).double().mean()


def test_noise_edge_tells_rounding_from_learning():
    """A rank-6 update of 5 % of the weights: rounding multiplies its effective rank, the count above the edge stays
    6.
    """
    current, base = bf16_pair(300, 400, 6, 0.05)
    clean = spectral_metrics(with_spectrum(300, 400, torch.ones(6, dtype=torch.float64)).float())
    metrics = spectral_metrics(current, base=base)
    assert abs(clean.effective_rank - 6) < 0.01 and metrics.effective_rank > 2.5 * clean.effective_rank
    assert metrics.rank_above_noise == 6 and metrics.quantisation_limited and not clean.quantisation_limited
    assert abs(metrics.participation_ratio - 6) < 0.1
    # The edge is the norm that rounding alone has: measured from the update before it was rounded.
    generator = torch.Generator().manual_seed(0)
    unrounded = base.double() + 2e-3 * torch.randn(300, 400, generator=generator, dtype=torch.float64)
    noise = torch.linalg.svdvals(unrounded.bfloat16().double() - unrounded)[0]
    assert abs(spectral_metrics(unrounded.bfloat16(), base=base).noise_edge / noise - 1) < 0.03


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_ulp(dtype):
    """Against the distance to the next number."""
    from effopd_kernels.lowrank.statistics import ulp

    x = torch.tensor([1.0, 1.5, 2.0, -3.75, 0.02, 1000.0]).to(dtype)
    if dtype in (torch.float32, torch.float64):
        expected = torch.nextafter(x.abs(), torch.tensor(torch.inf, dtype=dtype)) - x.abs()
    else:
        bits = x.abs().view(torch.int16)
        expected = (bits + 1).view(dtype).float() - x.abs().float()
    torch.testing.assert_close(ulp(x), expected, rtol=0, atol=0)


@pytest.mark.parametrize("pair", [False, True])
def test_slq_lies_within_its_standard_error(pair):
    if pair:
        a, base = bf16_pair(300, 400, 6, 1e-2)
        exact = a.double() - base.double()
    else:
        a, base = spectrum("polynomial", 300, 400).float(), None
        exact = a.double()
    metrics, truth = spectral_metrics(a, base=base, method="slq"), definitions(exact)
    for field in ("spectral_norm", "frobenius_norm", "top_fraction_norm_ratio", "stable_rank"):
        assert abs(getattr(metrics, field) / truth[field] - 1) < 1e-4, field
    error = metrics.standard_error["effective_rank"]
    assert 0 < error < 0.05 * truth["effective_rank"]
    assert abs(metrics.effective_rank - truth["effective_rank"]) < 4 * error
    assert abs(metrics.participation_ratio / truth["participation_ratio"] - 1) < 1e-3
    assert torch.equal(metrics.effective_rank, spectral_metrics(a, base=base, method="slq").effective_rank)


@pytest.mark.parametrize("method", ["exact", "slq"])
def test_degenerate_matrices(method):
    a = torch.stack([torch.zeros(20, 30), torch.full((20, 30), torch.nan), torch.ones(20, 30)])
    metrics = spectral_metrics(a, method=method)
    assert metrics.spectral_norm[0] == metrics.effective_rank[0] == metrics.rank_above_noise[0] == 0
    assert metrics.spectral_to_frobenius[0].isnan() and metrics.effective_rank[1].isnan()
    assert abs(metrics.effective_rank[2] - 1) < 1e-4 and metrics.rank_above_noise[2] == 1
    assert not metrics.quantisation_limited.any()
    assert spectral_metrics(a, base=torch.zeros_like(a), method=method).unchanged_fraction.tolist() == [1, 0, 0]
    same = spectral_metrics(a[2], base=a[2], method=method)
    assert same.unchanged_fraction == 1 and same.frobenius_norm == 0
    assert spectral_metrics(torch.empty(0, 3, 4), method=method).effective_rank.shape == (0,)


@pytest.mark.parametrize("method", ["exact", "slq"])
def test_metrics_of_what_is_trained_are_constants(method):
    a, base = bf16_pair(40, 60, 2, 1e-2)
    metrics = spectral_metrics(a.requires_grad_(), base=base.requires_grad_(), method=method)
    assert not any(value.requires_grad for value in metrics[:-1])


def test_metrics_do_not_depend_on_scale_or_batch():
    a = spectrum("polynomial", 40, 60).float()
    batch = spectral_metrics(torch.stack([a, a * 1e-25, a * 1e30]).unsqueeze(0))
    assert batch.effective_rank.shape == (1, 3)
    alone = spectral_metrics(a)
    for field in ("effective_rank", "participation_ratio", "spectral_to_frobenius", "stable_rank"):
        torch.testing.assert_close(getattr(batch, field)[0], getattr(alone, field).expand(3), rtol=1e-5, atol=0)
    assert torch.equal(batch.effective_rank[0, 0], alone.effective_rank)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"top_fraction": 0.0}, ValueError, "top_fraction"),
        ({"method": "lanczos"}, ValueError, '"exact" or "slq"'),
        ({"top_fraction": None}, ValueError, r"top_fraction must be a number in \(0, 1\], got None"),
        ({"method": "slq", "probes": 1}, ValueError, "probes must be an integer ≥ 2, got 1"),
        ({"probes": 16.5}, ValueError, "probes must be an integer ≥ 2, got 16.5"),
        ({"steps": math.inf}, ValueError, "steps must be an integer ≥ 1, got inf"),
        ({"seed": 1.5}, TypeError, "seed must be an integer, got 1.5"),
        ({"base": torch.zeros(3, 3)}, ValueError, r"\(4, 5\) and base \(3, 3\)"),
    ],
)
def test_bad_input(options, error, words):
    with pytest.raises(error, match=words):
        spectral_metrics(torch.zeros(4, 5), **options)
    with pytest.raises(TypeError, match="int64"):
        spectral_metrics(torch.zeros(4, 5, dtype=torch.int64))


def test_numpy_integers_are_integers():
    a, three = spectrum("polynomial", 20, 30).float(), np.int64(3)
    options = {"probes": three, "steps": three, "seed": three}
    found, expected = (spectral_metrics(a, method="slq", **each) for each in (options, dict.fromkeys(options, 3)))
    assert torch.equal(found.effective_rank, expected.effective_rank)


@pytest.mark.parametrize(
    "spectrum",
    [
        lambda i: i**-0.7,
        lambda i: i**-1.5,  # what is left beside the leading σ is far below them
        lambda i: i**-2.0,
        lambda i: torch.exp(-i / 20),  # down to nothing: slow for a quadrature
        lambda i: torch.exp(-i / 60),
        lambda i: 1 - i / 300,
    ],
)
@pytest.mark.parametrize("steps", [4, 20])
def test_standard_errors_tell_of_the_quadrature_too(spectrum, steps):
    a = with_spectrum(300, 500, spectrum(torch.arange(1.0, 301, dtype=torch.float64))).float()
    exact = spectral_metrics(a)
    for seed in range(3):
        sampled = spectral_metrics(a, method="slq", steps=steps, seed=seed)
        for name, error in sampled.standard_error.items():
            if name != "rank_above_noise":  # in whole numbers
                assert abs(getattr(sampled, name) - getattr(exact, name)) <= 4 * error + 1e-5 * getattr(exact, name)


@pytest.mark.parametrize("ratio", [0.97, 0.98, 0.99])
def test_the_standard_error_of_a_count_tells_of_what_the_nodes_do_not_part(ratio):
    """Of geometric spectra one node stands for hundreds of σ on both sides of the noise, in every probe and after every
    step: neither the spread over probes nor the last step's change is anything.
    """
    generator = torch.Generator().manual_seed(0)
    base = (0.02 * torch.randn(896, 768, generator=generator)).bfloat16()
    a = (base.double() + with_spectrum(896, 768, ratio ** torch.arange(768, dtype=torch.float64))).bfloat16()
    exact = spectral_metrics(a, base=base).rank_above_noise
    sampled = spectral_metrics(a, base=base, method="slq")
    assert abs(sampled.rank_above_noise - exact) <= sampled.standard_error["rank_above_noise"] + 0.5


@pytest.mark.parametrize("rank", [4, 12])
def test_a_count_within_the_leading_triplets_is_nearly_certain(rank):
    generator = torch.Generator().manual_seed(0)
    base = (0.02 * torch.randn(500, 300, generator=generator)).bfloat16()
    update = torch.randn(500, rank, generator=generator) @ torch.randn(rank, 300, generator=generator)
    sampled = spectral_metrics((base + 3e-4 * update).bfloat16(), base=base, method="slq")
    assert sampled.rank_above_noise == rank and sampled.standard_error["rank_above_noise"] < 2
