"""Sampled spectra against LAPACK's: bounds hold, estimates lie within their errors."""

import math
from types import SimpleNamespace

import pytest
import torch
from analysis import planted

from effopd_kernels.analysis import matrix as matrix_module
from effopd_kernels.analysis import measure
from effopd_kernels.analysis.comparison import compare
from effopd_kernels.analysis.findings import interval
from effopd_kernels.analysis.matrix import GRID, PROBES, Options, _bounds, alignment_rows, energy_curve, spectrum_of
from effopd_kernels.analysis.measure import _tokens
from effopd_kernels.analysis.report import shown
from effopd_kernels.lowrank import RSVD
from effopd_kernels.lowrank.metrics import spectrum_and_metrics

M, N, RANK = 640, 1408, 64  # short side beyond what is done exactly


def matrix(kind):
    """(a, b) whose difference has a spectrum of the given kind."""
    generator = torch.Generator().manual_seed(1)
    if kind == "rounded":  # a rank-16 update kept in bf16
        b = (0.02 * torch.randn(M, N, generator=generator)).bfloat16()
        u, v = torch.randn(M, 16, generator=generator), torch.randn(16, N, generator=generator)
        return (b.float() + 5e-5 * (u @ v)).bfloat16(), b
    index = torch.arange(M, dtype=torch.float64)
    s = {
        "polynomial": 1 / (1 + index),
        "flat": torch.ones(M, dtype=torch.float64),
        "step": torch.where(index < 5, 1.0, 0.01),
    }
    u, v = (torch.linalg.qr(torch.randn(n, M, dtype=torch.float64, generator=generator))[0] for n in (M, N))
    b = torch.randn(M, N, generator=generator)
    return (b.double() + (u * s[kind]) @ v.T).float(), b


@pytest.fixture(scope="module", params=["rounded", "polynomial", "flat", "step"])
def case(request):
    a, b = matrix(request.param)
    exact = torch.linalg.svdvals(a.double() - b.double())
    return request.param, a, b, exact, *spectrum_of(a, b, Options(RANK))[1:3]


def assert_bounds(row, exact):
    assert row["spectral_norm_low"] <= exact[0] <= row["spectral_norm_high"]
    norm, top = float(exact.norm()), math.ceil(0.01 * len(exact))
    ratio = float(exact[:top].norm()) / norm
    assert row["top_fraction_norm_ratio"] <= ratio * (1 + 1e-6) and ratio <= row["top_fraction_norm_ratio_high"]
    assert row["update_norm"] == pytest.approx(norm, rel=1e-6)


def test_bounds_hold_and_are_narrow(case):
    kind, _, _, exact, _, row = case
    assert row["spectrum"] == "sampled"
    assert_bounds(row, exact)
    if kind != "flat":  # where every direction is as good as any other a sketch resolves none
        assert row["spectral_norm_high"] < 1.1 * exact[0]


@pytest.mark.parametrize("beyond, first, both", [(10.0, 1 + 25 + 4, 1.25 + 25 + 2 * 4), (1.0, 1 + 1, 1.25 + 1)])
def test_upper_bounds_are_the_theorems(beyond, first, both):
    """Of σ₁² = 1 and σ₂² = 1/4 with ‖G‖ = 5 and τ = 2, unless the norm of all the rest says more."""
    numbers = (torch.tensor(x, dtype=torch.float64) for x in (beyond, 20.0, [3.0, 4.0], 0.0))
    svd = RSVD(torch.eye(9, 2), torch.tensor([1.0, 0.5]), torch.eye(2, 8), *numbers)
    found = _bounds(svd, SimpleNamespace(rest_norm=lambda: 2.0), 1.0, 2, False)[1:]
    assert found == pytest.approx((math.sqrt(first), math.sqrt(both)), rel=1e-3)


def test_bounds_of_exact_spectra_leave_room_for_rounding():
    generator = torch.Generator().manual_seed(0)
    for shape in [(2, 64), (17, 2), (200, 5), (64, 96)] * 5:
        a = torch.randn(shape, generator=generator)
        row = spectrum_of(a, None, Options(4, exact=True))[2]
        assert row["spectrum"] == "exact"
        assert_bounds(row, torch.linalg.svdvals(a.double()))


def test_the_whole_spectrum_is_estimated(case):
    kind, _, _, exact, _, row = case
    p = exact / exact.sum()
    rank = float((-(p * p.log()).sum()).exp())
    # Beside the scatter of the probes, few Lanczos steps leave a bias of a percent on spectra that reach down to 0.
    assert abs(row["effective_rank"] - rank) <= 4 * row["effective_rank_error"] + 0.015 * rank
    participation = float(exact.square().sum() ** 2 / (exact**4).sum())
    assert row["participation_ratio"] == pytest.approx(participation, rel=0.02)
    if kind == "rounded":
        assert row["rank_above_noise"] == 16 and row["quantisation_limited"]


def test_the_rank_above_noise_is_given_between_bounds_it_can_have(monkeypatch):
    """A count that is known to a few hundred only is not printed alone."""

    def uncertain(*given):
        spectrum, metrics = spectrum_and_metrics(*given)
        told = {"rank_above_noise": torch.tensor(600), "rank_above_noise error": torch.tensor(304.0)}
        return spectrum, metrics | told

    monkeypatch.setattr(matrix_module, "spectrum_and_metrics", uncertain)
    row = spectrum_of(*matrix("rounded"), Options(RANK))[2]
    assert shown(interval(row, "rank_above_noise")) == "600 [0, 640]"
    assert interval({"x": 1.0, "x_error": 0.25}, "x") == (1.0, 0.5, 1.5)  # elsewhere two standard errors


def test_energy_curves_follow_the_exact_ones(case):
    _, _, _, exact, spectrum, row = case
    curve = torch.tensor(energy_curve(spectrum, M, row), dtype=torch.float64)
    reached = torch.cat([torch.zeros(1, dtype=torch.float64), exact.square().cumsum(0)]) / exact.square().sum()
    expected = reached[(torch.tensor(GRID, dtype=torch.float64) * M - 1e-9).ceil().long()].sqrt()
    assert curve[0] == 0 and curve[-1] == pytest.approx(1)
    torch.testing.assert_close(curve, expected, atol=0.02, rtol=0)


def test_the_rest_is_bounded_over_seeds():
    """A bound that holds at one seed only would not be one: the same flat matrix, other probes."""
    a, b = matrix("flat")
    for seed in range(8):
        svd, spectrum, row, _ = spectrum_of(a, b, Options(16, seed=seed))
        rest = torch.linalg.matrix_norm(
            (a.double() - b.double()) @ (torch.eye(N).double() - svd.Vh.double().T @ svd.Vh.double()), 2
        )
        assert float(rest) <= spectrum.rest_norm() <= 3 * float(rest)
        assert row["spectral_norm_high"] >= 1 - 1e-6
    assert spectrum.nodes.shape[0] == PROBES


def test_equal_and_broken_matrices():
    a = torch.randn(20, 30)
    row = spectrum_of(a, a.clone(), Options(8))[2]
    assert row["update_norm"] == 0 and row["effective_rank"] == 0 and row["non_finite"] == 0
    assert not any(isinstance(v, float) and math.isnan(v) for v in row.values())
    broken = a.clone()
    broken[3, 4] = math.nan
    row = spectrum_of(broken, a, Options(8))[2]
    assert row["non_finite"] == 1 and row["rank_above_noise"] is None and row["quantisation_limited"] is None


@pytest.mark.parametrize("shape, a, b", [((16, 8), 3.3e38, -3.3e38), ((M, N), 1e38, 0.0)])
def test_an_update_beyond_fp32_is_not_finite(shape, a, b):
    """Its entries, though a narrow matrix is factored in fp64, and its leading σ."""
    a, b = (torch.full(shape, value, dtype=torch.bfloat16) for value in (a, b))
    svd, _, row, _ = spectrum_of(a, b, Options(8))
    assert row["non_finite"] == 1 and math.isnan(row["update_norm"]) and math.isnan(row["spectral_norm_high"])
    assert alignment_rows(svd, svd, (1,)) == []


def test_the_top_is_known_whatever_the_rank():
    """Its share of ‖Δ‖ and, where a Gram is at hand, the participation ratio are those of the exact spectrum."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(1300, 1100, generator=generator).bfloat16()
    a = (base.float() + 0.05 * torch.randn(1300, 1100, generator=generator)).bfloat16()
    s = torch.linalg.svdvals(a.double() - base.double())
    row = spectrum_of(a, base, Options(1))[2]
    assert row["top_fraction_norm_ratio"] == pytest.approx(float(s[:11].norm() / s.norm()), rel=0.05)
    exact = float((s**2).sum() ** 2 / (s**4).sum())
    assert abs(row["participation_ratio"] - exact) <= 1e-5 * exact + 4 * row["participation_ratio_error"]


def test_the_norm_of_the_base_that_comes_with_the_gram(tmp_path):
    name, b = "model.layers.0.mlp.up_proj.weight", torch.randn(600, 520).bfloat16()
    base = planted.write(tmp_path / "base", {name: b})
    run = planted.write(tmp_path / "run", {name: (b.float() + 0.01 * torch.randn(b.shape)).bfloat16()})
    (row,) = measure.measure(compare(base, {"run": [run]}), name, Options(4)).rows
    assert row["weight_norm"] == pytest.approx(float(b.double().norm()), rel=1e-6)


def test_subspaces_are_compared_up_to_the_rank():
    """Beyond it vectors are arbitrary: an adapter of rank 4 would seem to turn to the end."""
    b, a = torch.randn(80, 4), torch.randn(4, 90)
    early, last = (spectrum_of(scale * b @ a, None, Options(16))[0] for scale in (0.5, 1.0))
    rows = alignment_rows(early, last, (1, 4, 8, 16))
    assert [row["k"] for row in rows] == [1, 4]
    assert all(row["mean_cosine"] == pytest.approx(1, abs=1e-5) for row in rows)
    svd = spectrum_of(torch.randn(8, 90), None, Options(8))[0]  # of which more than half fills its space
    rows = alignment_rows(svd, svd, (1, 4, 5, 8))
    assert [row["k"] for row in rows] == [1, 4]
    assert rows[0]["chance_cosine"] == pytest.approx(math.sqrt(2 / (8 * math.pi)))


@pytest.mark.parametrize("degrees", [0.0, 1e-3, 0.1, 30.0, 89.0])
def test_angles_between_subspaces(degrees):
    """The cosine's last place in fp32 would be worth 0.02 degrees."""
    basis = torch.linalg.qr(torch.randn(200, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))[0]
    angle, v = math.radians(degrees), torch.eye(4, 60, dtype=torch.float64)
    turned = basis[:, :4].clone()
    turned[:, 3] = math.cos(angle) * basis[:, 3] + math.sin(angle) * basis[:, 4]
    s = torch.tensor([4.0, 3.0, 2.0, 1.0], dtype=torch.float64)
    early, last = (spectrum_of(((u * s) @ v).float(), None, Options(4))[0] for u in (turned, basis[:, :4]))
    (row,) = alignment_rows(early, last, (4,))
    assert row["largest_angle_degrees"] == pytest.approx(degrees, abs=2e-5, rel=1e-5)


def test_bounds_of_a_constant_row_along_a_long_side():
    a = 0.0105 * 1.5 / 1024**0.5 * torch.randn(1024, 28672, generator=torch.Generator().manual_seed(0))
    a[0] = 1.5
    for x in (a, a.bfloat16()):
        exact = x.double()
        largest = torch.linalg.eigvalsh(exact @ exact.mT)[-1].sqrt()
        row = spectrum_of(x, torch.zeros_like(x), Options(16))[2]
        assert row["spectral_norm_low"] <= largest <= row["spectral_norm_high"]


def test_small_turns_of_a_token_are_resolved():
    """cos = 1 − 5e-9 would be 1 ± 1e-7 from unit vectors in fp32."""
    base = torch.tensor([[1.0, 0.0], [0.0, 2.0], [0.0, 0.0], [0.0, 0.0], [0.0, 1.0]])
    current = torch.tensor([[1.0, 1e-4], [0.0, 1.0], [0.0, 0.0], [1.0, 0.0], [0.0, 0.0]])
    shift, relative, cosine = _tokens(current, base, base)
    assert shift.tolist() == pytest.approx([1e-4, 1.0, 0.0, 1.0, 1.0])
    assert relative.tolist() == pytest.approx([1e-4, 0.5, 0.0, math.inf, 1.0])
    assert 1 - float(cosine[0]) == pytest.approx(5e-9, rel=0.01)
    assert cosine[1:3].tolist() == [1.0, 1.0] and cosine[3:].isnan().all()


def test_directions_of_slowly_falling_spectra_have_converged(tmp_path):
    """The bounds of norms hold after fewer iterations, but the last of 64 directions are then 50° off."""
    g = torch.Generator().manual_seed(0)
    size, name = 640, "model.layers.0.mlp.up_proj.weight"
    parts = [
        (torch.randn(size, size, generator=g) * torch.arange(1, size + 1) ** -0.5)
        @ torch.randn(size, size, generator=g)
        for _ in range(2)
    ]
    updates = [parts[0], parts[0] + 0.1 * parts[1]]
    base = planted.write(tmp_path / "base", {name: torch.zeros(size, size)})
    runs = [planted.write(tmp_path / f"run-{i}", {name: update}, step=i) for i, update in enumerate(updates, 1)]
    found = measure.measure(compare(base, {"run": runs}), name, Options(64, ks=(64,)))
    u, v = (torch.linalg.svd(update.double())[0][:, :64] for update in updates)
    exact = math.degrees(math.acos(float(torch.linalg.svdvals(u.mT @ v)[-1])))
    (angle,) = (row["largest_angle_degrees"] for row in found.alignment if row["step"] == 1)
    assert angle == pytest.approx(exact, abs=1)
    assert {"effective_rank_error", "spectral_norm_high"} <= {*found.rows[0]} and not any(
        " " in c for c in found.rows[0]
    )
