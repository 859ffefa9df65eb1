"""Singular values, vectors and certificates against fp64 SVDs: generators of sklearn and RandLAPACK, and bf16 pairs."""

import pytest
import torch
from lowrank.matrices import (
    SPECTRA,
    assert_certified,
    bf16_pair,
    kahan,
    low_rank_with_tail,
    orthogonality,
    spectrum,
    with_spectrum,
)

from effopd_kernels.lowrank import Flag, batched_rsvd, principal_cosines

ROUTES = ("subspace", "gram", "exact")


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("shape", [(90, 150), (150, 90), (97, 131)], ids=str)
@pytest.mark.parametrize("name", SPECTRA)
def test_spectra_in_fp32(name, shape, route):
    a = spectrum(name, *shape).float()
    truth = torch.linalg.svdvals(a.double())
    svd = batched_rsvd(a, 12, route=route)
    assert_certified(svd, a.double())
    assert abs(svd.S[0] / truth[0] - 1) < 1e-6
    # RandLAPACK's bar on both factors.
    bar = torch.finfo(torch.float32).eps ** 0.75 * shape[1] ** 0.5
    assert orthogonality(svd.U) < bar and orthogonality(svd.Vh.mT) < bar


@pytest.mark.parametrize("route", ROUTES)
def test_kahan(route):
    a = kahan(96)
    svd = batched_rsvd(a.float(), 10, route=route)
    assert_certified(svd, a.float().double())
    torch.testing.assert_close(svd.S.double(), torch.linalg.svdvals(a)[:10], rtol=1e-4, atol=0)


@pytest.mark.parametrize("tail", [0.1, 1.0])
@pytest.mark.parametrize(("dtype", "decimals"), [(torch.float32, 5), (torch.float64, 7)], ids=str)
@pytest.mark.parametrize("route", ROUTES)
def test_sklearn_bar(route, dtype, decimals, tail):
    """scikit-learn's own bar for randomized_svd: 100 × 500, effective rank 5, k = 10, so many decimals (its n_iter is
    7).
    """
    a = low_rank_with_tail(100, 500, 5, tail).to(dtype)
    truth = torch.linalg.svdvals(a.double())[:10]
    svd = batched_rsvd(a, 10, power_iters=7, route=route)
    assert (svd.S.double() - truth).abs().max() < 1.5 * 10**-decimals
    assert_certified(svd, a.double())


@pytest.mark.parametrize("route", [None, *ROUTES])
@pytest.mark.parametrize(("exponent", "bar"), [(1, 1e-3), (2, 3e-3)])
def test_power_law_at_large_rank(exponent, bar, route):
    """σ_i = 1/i, a slow spectrum on which small oversampling fails, and 1/i², whose σ_64² is at the rounding of σ_1² in
    fp32 and of σ_1 in bf16: worst relative error by default.
    """
    a = with_spectrum(520, 700, torch.arange(1, 521, dtype=torch.float64) ** -exponent)
    svd = batched_rsvd(a.float(), 64, route=route)
    truth = torch.linalg.svdvals(a.float().double())[:64]
    assert ((svd.S.double() - truth) / truth).abs().max() < bar
    assert_certified(svd, a.float().double())


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("ratio", [1e-1, 1e-2, 1e-3])
def test_bf16_pair(ratio, route, transpose):
    """The difference of a bf16 pair is exact in fp32: certificates hold for it, and the leading subspace is the
    update's.
    """
    current, base = bf16_pair(120, 170, 8, ratio)
    if transpose:
        current, base = current.mT, base.mT
    exact = current.double() - base.double()
    svd = batched_rsvd(current, 16, base=base, route=route)
    assert svd.U.dtype == torch.float32
    assert_certified(svd, exact)
    u, s, _ = torch.linalg.svd(exact)
    assert ((svd.S[:8].double() - s[:8]) / s[:8]).abs().max() < 1e-3
    if s[8] < 0.5 * s[7]:
        assert principal_cosines(svd.U[:, :8], u[:, :8]).min() > 0.999


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_dtypes(dtype):
    a = spectrum("polynomial", 40, 60).to(dtype)
    svd = batched_rsvd(a, 6)
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    assert svd.U.dtype == svd.S.dtype == svd.Vh.dtype == expected
    assert_certified(svd, a.double())
    mixed = batched_rsvd(a, 6, base=torch.zeros_like(a, dtype=torch.bfloat16))
    torch.testing.assert_close(mixed.S, svd.S, rtol=1e-6, atol=0)


def test_tol_is_met_or_said_not_to_be():
    a = spectrum("polynomial", 200, 260).float()
    loose = batched_rsvd(a, 10, route="subspace", oversample=4, power_iters=1)
    tight = batched_rsvd(a, 10, route="subspace", oversample=4, power_iters=1, tol=1e-2)
    assert (loose.triplet_residual > 1e-2 * loose.S).any()
    assert (tight.triplet_residual <= 1e-2 * tight.S).all() and tight.flags == 0
    assert_certified(tight, a.double())
    # Without oversampling across a flat spectrum no few iterations can converge.
    flat = torch.randn(200, 260, generator=torch.Generator().manual_seed(0))
    svd = batched_rsvd(flat, 10, route="subspace", oversample=0, power_iters=1, tol=1e-6)
    assert svd.flags & Flag.TOL_NOT_MET
    assert_certified(svd, flat.double())


def test_more_iterations_do_not_hurt():
    a = spectrum("polynomial", 200, 260).float()
    truth = torch.linalg.svdvals(a.double())[:20]
    errors = [
        (batched_rsvd(a, 20, route="subspace", oversample=10, power_iters=q).S.double() - truth).abs().max()
        for q in (0, 1, 3)
    ]
    assert errors[0] > errors[1] > errors[2]
