"""W0 plus the head or the tail of an update, and the comparison of subspaces."""

from fractions import Fraction

import pytest
import torch
from lowrank.matrices import bf16_pair, spectrum, with_spectrum

from effopd_kernels.lowrank import (
    batched_rsvd,
    low_rank_update,
    principal_cosines,
    reconstruct,
    reconstruction,
    subspace_alignment,
    subspace_overlap,
)


@pytest.fixture
def case():
    w0, a = (
        torch.randn(2, 30, 40, dtype=torch.float64),
        torch.stack([spectrum("polynomial", 30, 40, i) for i in (0, 1)]),
    )
    return w0, a, batched_rsvd(a, 10)


def test_head_tail_and_alpha(case):
    w0, a, svd = case
    u, s, v = svd.U, svd.S, svd.Vh.mT
    terms = torch.einsum("bmk,bk,bnk->bkmn", u, s, v)
    torch.testing.assert_close(low_rank_update(w0, svd), w0 + terms.sum(1))
    torch.testing.assert_close(low_rank_update(w0, svd, rank=3, alpha=2.5), w0 + 2.5 * terms[:, :3].sum(1))
    torch.testing.assert_close(low_rank_update(w0, svd, tail=3, alpha=-1), w0 - terms[:, 3:].sum(1))
    assert torch.equal(low_rank_update(w0, svd, rank=0), w0) and torch.equal(low_rank_update(w0, svd, tail=10), w0)
    # The whole tail needs no further triplets.
    torch.testing.assert_close(low_rank_update(w0 + a, svd, rank=3, alpha=-1), w0 + a - terms[:, :3].sum(1))


def test_match_norm(case):
    w0, _, svd = case
    norms = torch.tensor([2.0, 3.0], dtype=torch.float64)
    for part in ({"rank": 3}, {"tail": 3}):
        moved = low_rank_update(w0, svd, **part, match_norm=norms) - w0
        torch.testing.assert_close(torch.linalg.matrix_norm(moved), norms)
    zero = batched_rsvd(torch.zeros(30, 40, dtype=torch.float64), 3)
    assert torch.equal(low_rank_update(w0[0], zero, match_norm=1.0), w0[0])


def test_rounded_once_in_place_and_in_panels():
    """bf16 weights: the sum is in fp32 and rounded once, also when it overwrites w0 and when panels do not divide the
    rows.
    """
    current, base = bf16_pair(700, 1000, 4, 1e-1)
    svd = batched_rsvd(current, 4, base=base)
    expected = (base.double() + reconstruct(svd).double()).bfloat16()
    result = low_rank_update(base, svd)
    assert (result != expected).double().mean() < 1e-4  # fp32 against fp64 at a rounding boundary
    work = base.clone()
    assert low_rank_update(work, svd, out=work) is work and torch.equal(work, result)


def test_low_rank_update_has_a_gradient(case):
    w0, _, svd = case
    w0 = w0.clone().requires_grad_()
    s = svd.S.clone().requires_grad_()
    low_rank_update(w0, svd._replace(S=s), rank=2, alpha=3.0).square().sum().backward()
    assert w0.grad is not None and (s.grad[:, :2] != 0).all() and (s.grad[:, 2:] == 0).all()


def test_out_is_written_whatever_requires_a_gradient(case):
    w0, _, svd = case
    expected = low_rank_update(w0, svd)
    parameter = torch.nn.Parameter(w0.clone())
    assert low_rank_update(parameter, svd, out=parameter) is parameter and torch.equal(parameter, expected)
    out = torch.empty_like(w0)
    found = low_rank_update(w0, svd._replace(S=svd.S.clone().requires_grad_()), out=out)
    assert found is out and torch.equal(out, expected) and not out.requires_grad


@pytest.mark.parametrize("view", [lambda rows: rows[1:], lambda rows: rows[:-1].mT], ids=["a row on", "transposed"])
def test_out_may_be_another_view_of_what_is_read(view, monkeypatch):
    monkeypatch.setattr(reconstruction, "PANEL", 100)  # five rows at a time
    svd, rows = batched_rsvd(spectrum("polynomial", 20, 20), 3), torch.randn(21, 20, dtype=torch.float64)
    # of the same layout, since a product into a transposed matrix may be rounded in another order
    expected = low_rank_update(rows[:-1].clone(), svd, out=view(rows.clone()))
    torch.testing.assert_close(expected, low_rank_update(rows[:-1], svd), rtol=1e-14, atol=1e-14)
    assert torch.equal(low_rank_update(rows[:-1], svd, out=view(rows)), expected)


def test_fp64_weights_keep_their_digits(case):
    w0, a, _ = case
    svd = batched_rsvd(a.float(), 10)
    assert torch.equal(low_rank_update(w0, svd, rank=0), w0)
    torch.testing.assert_close(low_rank_update(w0, svd), w0 + reconstruct(svd).double(), rtol=0, atol=1e-6)


def test_numbers_may_be_of_any_kind(case):
    w0, _, svd = case
    for number, same in ((Fraction(1, 2), 0.5), (2**64, 2.0**64)):
        for name in ("alpha", "match_norm"):
            assert torch.equal(low_rank_update(w0, svd, **{name: number}), low_rank_update(w0, svd, **{name: same}))


def test_bad_input(case):
    w0, _, svd = case
    with pytest.raises(TypeError, match=r"svd must be an RSVD.*got Tensor"):
        reconstruct(w0)
    for given, options, words in (
        ((w0.long(), svd), {}, "int64"),
        ((svd, w0), {}, "w0 must be a tensor, got RSVD"),
        ((w0, w0), {}, r"svd must be an RSVD.*got Tensor"),
        ((w0.to_sparse(), svd), {}, r"w0 must be .*(dense|bfloat16)"),
        ((w0.to(torch.float8_e4m3fn), svd), {}, r"w0 must be .*(dense|bfloat16)"),
        ((w0, svd), {"out": [w0]}, "out must be a tensor, got list"),
        ((w0, svd), {"alpha": "2"}, "alpha must be a real number, got '2'"),
        ((w0, svd), {"alpha": torch.tensor(1j)}, r"alpha must be a real number, got a tensor \(\) of torch.complex64"),
        ((w0, svd), {"match_norm": torch.tensor(1j)}, r"match_norm must be real, got torch\.complex64"),
    ):
        with pytest.raises(TypeError, match=words):
            low_rank_update(*given, **options)
    for options, words in (
        ({"match_norm": torch.ones(3)}, r"one for each matrix, \(2,\), got \(3,\)"),
        ({"rank": 1, "tail": 1}, "not both"),
        ({"rank": 11}, "rank must be an integer from 0 to the 10 triplets"),
        ({"rank": 2.0}, "rank must be an integer.*got 2.0"),
        ({"tail": -1}, "tail must be an integer from 0"),
        ({"out": w0[:1]}, "out is"),
        ({"out": w0.to("meta")}, "w0 is on cpu but out is on meta"),
        ({"out": w0[:, :1].expand(2, 30, 40)}, r"out has elements that share memory.*strides \(1200, 0, 1\)"),
        ({"match_norm": -1.0}, "match_norm must be finite and ≥ 0, got -1.0"),
        ({"match_norm": torch.inf}, "match_norm must be finite"),
        ({"match_norm": torch.tensor([1.0, -1.0])}, "match_norm must be finite"),
        ({"match_norm": torch.tensor(torch.nan)}, "match_norm must be finite"),
        ({"alpha": -torch.inf}, "alpha must be finite, got -inf"),
        ({"alpha": torch.tensor(torch.nan)}, "alpha must be finite"),
        ({"match_norm": [1.0, 2.0]}, "match_norm must be a number.*got \\[1.0, 2.0\\]"),
    ):
        with pytest.raises(ValueError, match=words):
            low_rank_update(w0, svd, **options)
    with pytest.raises(ValueError, match="w0 is on meta but U is on cpu"):
        low_rank_update(w0.to("meta"), svd)
    with pytest.raises(ValueError, match=r"w0 is \(2, 40, 30\), the factors make \(2, 30, 40\)"):
        low_rank_update(w0.mT, svd)


def test_alignment_and_principal_angles():
    q = torch.linalg.qr(torch.randn(50, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))[0]
    u, v = q[:, :4], q[:, :4].clone()
    assert abs(subspace_alignment(u, -v, 4) - 1) < 1e-12
    for scale in (1e-30, 1e30):
        assert abs(subspace_alignment(scale * u.float(), u.float(), 4) - 1) < 1e-6
    angle = torch.tensor([0.1, 0.5, 1.0, 1.4], dtype=torch.float64)
    turned = u * angle.cos() + q[:, 4:8] * angle.sin()
    torch.testing.assert_close(subspace_alignment(turned, u, 4), angle.cos().mean())
    torch.testing.assert_close(subspace_alignment(turned, u, 2), angle[:2].cos().mean())
    torch.testing.assert_close(principal_cosines(turned, u), angle.cos())
    torch.testing.assert_close(subspace_overlap(turned, u), angle.cos().square().mean())
    # Rotation inside the subspace: alignment of single vectors falls, angles of the subspaces stay.
    rotation = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))[0]
    assert subspace_alignment(u @ rotation, u, 4) < 0.9
    torch.testing.assert_close(principal_cosines(u @ rotation, u), torch.ones(4, dtype=torch.float64))
    assert subspace_alignment(torch.stack([u, turned]), torch.stack([u, u]), 4).shape == (2,)
    with pytest.raises(ValueError, match="k must be an integer between 1 and the fewer columns, 4"):
        subspace_alignment(u, v, 5)
    with pytest.raises(ValueError, match="all but the last"):
        principal_cosines(u, v[:5])


def test_alignment_of_a_training_run_grows_towards_its_end():
    """Checkpoints on the way W0 + t·Δ + noise: the closer to the end, the better aligned."""
    update = with_spectrum(40, 60, torch.tensor([3.0, 2.0, 1.5], dtype=torch.float64))
    noise = 0.02 * torch.randn(40, 60, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    final = batched_rsvd(update, 3).U
    aligned = [subspace_alignment(batched_rsvd(t * update + noise, 3).U, final, 3) for t in (0.05, 0.2, 1.0)]
    assert aligned[0] < aligned[1] < aligned[2] and aligned[2] > 0.99


def test_a_sum_of_zero_has_gradients_too():
    a = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(0))
    a[1] = 0
    a.requires_grad_()
    low_rank_update(torch.zeros(2, 6, 5), batched_rsvd(a, 2), match_norm=1.0)[0].sum().backward()
    assert a.grad[0].any() and not a.grad[1].any()
    norm = torch.tensor(2.0, requires_grad=True)
    low_rank_update(torch.zeros(6, 5), batched_rsvd(a[0], 2), rank=0, match_norm=norm).sum().backward()
    assert norm.grad == 0
