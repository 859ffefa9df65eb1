"""Inputs that break low-rank codes: degenerate, huge, tiny, poisoned, oddly shaped."""

import functools
import re
import threading
from contextlib import nullcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lowrank.matrices import assert_certified, bf16_pair, orthogonality, spectrum, with_spectrum

from effopd_kernels.lowrank import (
    Flag,
    batched_rsvd,
    low_rank_part,
    panels,
    principal_cosines,
    routes,
    spectral_metrics,
    subspace_alignment,
    subspace_overlap,
    update_svd,
    workers,
)
from effopd_kernels.lowrank.decompose import Settings, decompose_group

ROUTES = ("subspace", "gram", "exact")


@pytest.mark.parametrize("route", ROUTES)
def test_identical_checkpoints(route):
    a = torch.randn(30, 20).bfloat16()
    svd = batched_rsvd(a, 5, base=a, route=route)
    assert (svd.S == 0).all() and svd.frobenius_norm == 0 and svd.residual_norm == 0
    assert svd.flags == Flag.ZERO | Flag.RANK_DEFICIENT
    assert orthogonality(svd.U) == 0 and orthogonality(svd.Vh.mT) == 0


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("route", ROUTES)
def test_poisoned_matrix_is_flagged_and_harms_no_other(route, poison):
    a = torch.stack([spectrum("polynomial", 40, 60, seed).float() for seed in range(3)])
    clean = batched_rsvd(a, 5, route=route)
    a[1, 7, 9] = poison
    svd = batched_rsvd(a, 5, route=route)
    assert svd.flags.tolist() == [0, Flag.NON_FINITE, 0]
    for before, after in zip(clean[:-1], svd[:-1], strict=True):
        assert torch.equal(before[0], after[0]) and torch.equal(before[2], after[2])
        assert after[1].isnan().all()


@pytest.mark.parametrize("rank, small", [(0, 1e-3), (4, 1e-3), (4, 1e-30)])
@pytest.mark.parametrize("shape", [(40, 30), (30, 40)], ids=["tall", "wide"])
@pytest.mark.parametrize("route", ROUTES)
def test_a_group_is_each_of_its_matrices(route, shape, rank, small):
    """A group, as a GPU takes them: zero, poisoned and small ones beside usual ones."""
    base = spectrum("polynomial", *shape).float().repeat(5, 1, 1)
    a = base + torch.stack([spectrum("polynomial", *shape, seed).float() for seed in range(5)])
    a[1], a[3, 7, 9] = base[1], torch.nan
    a[4], base[4] = base[4] * small, 0
    settings = Settings(rank, route=route)
    together, _ = decompose_group(list(a), list(base), settings)
    for i in range(5):
        alone, _ = decompose_group([a[i]], [base[i]], settings)
        norm = float(alone.frobenius_norm.nan_to_num()) or 1.0
        for name, x, y in zip(together._fields, together, alone, strict=True):
            unit = 1.0 if name in ("U", "Vh", "flags") else norm
            torch.testing.assert_close(x[i] / unit, y[0] / unit, rtol=0, atol=1e-4, equal_nan=True, msg=f"{name} {i}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(7, 33), (40, 30), (31, 43)], ids=str)
def test_small_matrices_do_not_depend_on_their_batch(shape, dtype):
    """Though they are factored together: zero, poisoned and tiny ones beside usual ones, wherever in memory."""
    a = torch.randn(40, *shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    a[3], a[5, 0, 0], a[7] = 0, torch.nan, a[7] * 1e-30
    together = batched_rsvd(a, 5)
    for i in range(40):
        alone = batched_rsvd(a[i].clone(), 5)
        assert all(torch.equal(x[i].nan_to_num(), y.nan_to_num()) for x, y in zip(together, alone, strict=True)), i
        if i not in (3, 5):
            assert_certified(alone, a[i].double())


@pytest.mark.parametrize("decay", [0.0, 0.1, 1.0])
@pytest.mark.parametrize(("m", "n", "rank"), [(12, 9, 9), (60, 90, 6), (200, 150, 100), (130, 140, 130)])
def test_left_to_lapack(m, n, rank, decay):
    """Few entries, or most of the triplets; fp64 is not, whose certificates its roundings would break."""
    a = with_spectrum(m, n, torch.exp(-decay * torch.arange(min(m, n), dtype=torch.float64))).float()
    assert routes.choose(a, rank, rank) == "direct" != routes.choose(a.double(), rank, rank)
    assert routes.choose(torch.empty(200, 150), 10, 42) == "exact"
    svd = batched_rsvd(a, rank)
    assert_certified(svd, a.double())
    assert bool(svd.flags & Flag.RANK_DEFICIENT) == (decay * (rank - 1) > 14)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("tall", [False, True])
def test_rank_below_k(route, tall):
    a = with_spectrum(90, 140, torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64)).float()
    a = a.mT if tall else a
    svd = batched_rsvd(a, 8, route=route)
    assert_certified(svd, a.double())
    assert svd.flags & Flag.RANK_DEFICIENT
    assert (svd.S[3:] < 1e-5).all()
    assert svd.residual_norm < 1e-5


def test_exactly_one_column():
    """A matrix whose only column is repeated zeros elsewhere: rank one with exact zeros in the sketch's Gram."""
    a = torch.zeros(60, 80)
    a[:, 3] = torch.arange(60.0)
    svd = batched_rsvd(a, 4, route="subspace")
    assert_certified(svd, a.double())
    assert abs(svd.S[0] / a.norm() - 1) < 1e-6


@pytest.mark.parametrize("shape", [(1, 40), (40, 1), (1, 1), (17, 33), (3, 200)], ids=str)
@pytest.mark.parametrize("route", [None, *ROUTES])
def test_odd_shapes(shape, route):
    a = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    assert_certified(batched_rsvd(a, 1, route=route), a.double())
    everything = batched_rsvd(a, min(shape), route=route)
    assert_certified(everything, a.double())
    torch.testing.assert_close(everything.S, torch.linalg.svdvals(a), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(5000, 1), (5000, 3), (1, 5000), (5000, 16), (20000, 64)], ids=str)
def test_roundings_that_do_not_average_out(shape):
    """Sums of thousands of equal entries err to one side, by up to 25 ε: bounds hold all the same."""
    assert_certified(batched_rsvd(torch.full(shape, 0.37), 1), torch.full(shape, 0.37).double())


@pytest.mark.parametrize("noise", [0, 1e-7, 1e-6, 1e-4])
@pytest.mark.parametrize("route", ROUTES)
def test_nearly_equal_entries(route, noise):
    """Nor do those of sums of hundreds of nearly equal entries; most of the vectors asked for are arbitrary."""
    a = 1 + noise * torch.randn(257, 300, generator=torch.Generator().manual_seed(0))
    assert_certified(batched_rsvd(a, 64, route=route), a.double())


@pytest.mark.parametrize("scale", [1e-38, 1e-25, 1e30])
@pytest.mark.parametrize("route", ROUTES)
def test_extreme_scales(scale, route):
    a = spectrum("polynomial", 60, 90).float()
    plain, scaled = batched_rsvd(a, 6, route=route), batched_rsvd(a * scale, 6, route=route)
    torch.testing.assert_close(scaled.S / scale, plain.S, rtol=1e-4 if scale == 1e-38 else 1e-5, atol=0)
    assert_certified(scaled, (a * scale).double())


def test_fp64_certificates_hold_to_its_rounding():
    """Of what falls as fast as exp(-i), residuals of both sides are roundings. Held against longdouble."""
    decay = torch.diag(torch.exp(-torch.arange(60, dtype=torch.double)))
    for seed in range(20):
        a = torch.randn(100, 60, dtype=torch.double, generator=torch.Generator().manual_seed(seed)) @ decay
        svd = batched_rsvd(a, 10)
        a, u, s, vh = (t.numpy().astype("longdouble") for t in (a, svd.U, svd.S, svd.Vh))
        for residual in (a @ vh.T - u * s, a.T @ u - vh.T * s):
            assert ((residual**2).sum(0) ** 0.5 <= svd.triplet_residual.numpy()).all(), seed


@pytest.mark.parametrize("route", ROUTES)
def test_one_huge_entry(route):
    a = torch.randn(60, 90, generator=torch.Generator().manual_seed(0))
    a[5, 6] = 1e12
    svd = batched_rsvd(a, 4, route=route)
    assert abs(svd.S[0] / 1e12 - 1) < 1e-6
    assert_certified(svd, a.double())


@pytest.mark.parametrize("route", ROUTES)
def test_cluster_across_the_rank(route):
    """σ equal on both sides of the cut: values right, subspace flagged, and every vector inside the cluster's space."""
    s = torch.tensor([3.0] * 2 + [1.0] * 6 + [0.01] * 30, dtype=torch.float64)
    a = with_spectrum(60, 90, s)
    svd = batched_rsvd(a.float(), 5, route=route)
    assert svd.flags & Flag.CLUSTERED
    torch.testing.assert_close(svd.S.double(), s[:5], rtol=1e-5, atol=0)
    assert_certified(svd, a.float().double())
    assert abs(subspace_overlap(svd.U, torch.linalg.svd(a)[0][:, :8]) - 1) < 1e-4


def test_a_cluster_of_roundings_is_none():
    svd = batched_rsvd(torch.diag(torch.tensor([1.0, 1e-20, 1e-20])), 2)
    assert svd.flags == Flag.RANK_DEFICIENT


@pytest.mark.parametrize("route", ROUTES)
def test_strided_views_give_the_same_bits(route):
    wide = torch.randn(64, 200, generator=torch.Generator().manual_seed(0)).bfloat16()
    view = wide[::2, 3:150]
    for field, expected in zip(
        batched_rsvd(view, 5, route=route), batched_rsvd(view.contiguous(), 5, route=route), strict=True
    ):
        assert torch.equal(field, expected)


@pytest.mark.parametrize("route", ROUTES)
def test_repeatable_and_independent_of_the_batch(route):
    """Bitwise, on CPU: twice the same, and a matrix in a batch as alone."""
    pairs = [bf16_pair(50, 75, 3, 1e-2, seed) for seed in range(6)]
    a, base = (torch.stack(side).reshape(2, 3, 50, 75) for side in zip(*pairs, strict=True))
    first, again = (batched_rsvd(a, 7, base=base, route=route) for _ in range(2))
    assert first.U.shape == (2, 3, 50, 7) and first.Vh.shape == (2, 3, 7, 75) and first.flags.shape == (2, 3)
    alone = batched_rsvd(a[1, 2].clone(), 7, base=base[1, 2].clone(), route=route)
    for x, y, z in zip(first, again, alone, strict=True):
        assert torch.equal(x, y) and torch.equal(x[1, 2], z)


@pytest.mark.parametrize("columns", [64, 75])
def test_batch_equals_single_where_panels_are_views(columns):
    """fp32 without a base needs no copy: results must still not depend on where a matrix lies in its batch."""
    a = torch.randn(3, 50, columns, generator=torch.Generator().manual_seed(0))
    before = a.clone()
    together = batched_rsvd(a, 5, route="subspace")
    for i in range(3):
        alone = batched_rsvd(a[i].clone(), 5, route="subspace")
        assert all(torch.equal(x[i], y) for x, y in zip(together, alone, strict=True))
    assert torch.equal(a, before)


@pytest.mark.parametrize("pair", [True, False])
@pytest.mark.parametrize("route", ROUTES)
def test_independent_of_the_number_of_threads(route, pair, monkeypatch):
    """Bitwise, whether matrices or panels of them are shared out."""
    monkeypatch.setattr(panels, "PANEL", 1 << 10)  # four to a matrix
    pairs = [bf16_pair(50, 75, 3, 1e-2, seed) for seed in range(5)]
    a, base = (torch.stack(side) for side in zip(*pairs, strict=True))
    a, base = (a, base) if pair else (a.float(), None)
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)  # put back by the fixture
        assert torch.get_num_threads() == threads
        together = batched_rsvd(a, 7, base=base, route=route)
        alone = batched_rsvd(a[3], 7, base=None if base is None else base[3], route=route)
        assert torch.get_num_threads() == threads
        found.append((*together, *(x[None] for x in alone)))
        assert all(torch.equal(x[3], y) for x, y in zip(together, alone, strict=True))
    for other in found[1:]:
        assert all(torch.equal(x, y) for x, y in zip(found[0], other, strict=True))


def test_workers_leave_errors_and_other_threads_alone():
    """An error in one matrix reaches the caller, and threads started later have as many threads as the caller."""
    torch.set_num_threads(3)

    def fail(i):
        if i == 2:
            raise ValueError("two")
        return i

    results = workers.side_by_side(fail, range(8))
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(ValueError, match="two"):
        next(results)
    assert list(workers.side_by_side(lambda i: torch.get_num_threads(), range(4))) == [1] * 4
    counts = []
    thread = threading.Thread(target=lambda: counts.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert counts == [3]


@pytest.mark.skipif(not workers._own_setters(), reason="PyTorch computes with other threads than OpenMP's")
def test_workers_set_no_count_but_their_own(monkeypatch):
    """A thread that starts together with them has the count of the one that called, in MKL too."""
    torch.set_num_threads(3)
    counts, start = [], workers._Team._start

    def start_beside_another(*args):
        start(*args)
        thread = threading.Thread(target=lambda: counts.append(torch.get_num_threads()))
        thread.start()
        thread.join()

    monkeypatch.setattr(workers._Team, "_start", start_beside_another)
    team = workers._Team(2)
    told = team.drivers.submit(torch.__config__.parallel_info).result()
    assert counts == [3] * 4 and set(re.findall(r"max_threads\(\) : (\d+)", told)) == {"1"}
    for pool in (team.drivers, team.sharers):
        pool.shutdown()


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_a_start_that_fails_leaves_neither_threads_nor_their_count(error, own, monkeypatch):
    """Interrupted where a thread runs already but its pool does not know, or at a limit on threads."""
    torch.set_num_threads(3)
    threads, start, setters = [], threading.Thread.start, workers._own_setters() if own else []

    def fail_at_the_third(thread):
        threads.append(thread)
        if len(threads) < 3 or error is KeyboardInterrupt:
            start(thread)
        if len(threads) == 3:
            raise error

    monkeypatch.setattr(workers, "_own_setters", lambda: setters)
    with monkeypatch.context() as patch, nullcontext() if error is RuntimeError else pytest.raises(error):
        patch.setattr(threading.Thread, "start", fail_at_the_third)
        workers._Team(3)
    for thread in threads[: 2 + (error is KeyboardInterrupt)]:
        thread.join(10)
        assert not thread.is_alive()
    counts = []
    thread = threading.Thread(target=lambda: counts.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert [*counts, torch.get_num_threads()] == [3, 3]


@pytest.mark.parametrize("closed", ["before", "after"])
def test_threads_that_outlive_the_main_one(monkeypatch, closed):
    """When it ends, pools are closed under the others: before or after they first computed anything."""
    torch.set_num_threads(2)
    monkeypatch.setattr(workers, "_team", functools.cache(workers._Team))
    a = torch.stack([spectrum("polynomial", 130, 140, seed).float() for seed in range(3)])

    def found():
        by_name = update_svd({"one": a[0]}, {"one": a[1]}, 5)
        return [*batched_rsvd(a, 5), *batched_rsvd(a[0], 5, route="subspace"), *by_name["one"]]

    def refuse(*_):
        raise RuntimeError("cannot schedule new futures after interpreter shutdown")

    expected = found()
    if closed == "before":
        workers._team.cache_clear()
    monkeypatch.setattr(workers.ThreadPoolExecutor, "submit", refuse)
    assert all(torch.equal(x, y) for x, y in zip(found(), expected, strict=True))
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize("threads", [1, 3])
def test_inference_mode_and_autocast_change_nothing(threads):
    """Neither inside them nor afterwards, though buffers made inside are used again; in backward too."""
    torch.set_num_threads(threads)
    panels._local.__dict__.clear()
    a = spectrum("polynomial", 60, 80).float()

    def found():
        pair = {"one": a}, {"one": torch.zeros_like(a)}
        parts = [*batched_rsvd(a, 5, route="subspace"), *batched_rsvd(a, 5, route="gram"), low_rank_part(a, 5)]
        return [*parts, *update_svd(*pair, 5)["one"], spectral_metrics(a).spectral_norm, *batched_rsvd(a.double(), 5)]

    def gradients():
        x = a.clone().requires_grad_()
        (batched_rsvd(x, 5).U[:3].square().sum() + low_rank_part(x, 5).sum()).backward()
        return [x.grad]

    with torch.inference_mode():
        inside = found()
    plain, slopes = found(), gradients()
    with torch.autocast("cpu", torch.bfloat16):
        rounding, slopes_rounding = found(), gradients()
    for other in (inside, rounding):
        assert all(torch.equal(x, y) for x, y in zip(plain, other, strict=True))
    assert torch.equal(*slopes, *slopes_rounding)


@pytest.mark.parametrize("seed", range(3))
def test_directions_along_the_axes(seed):
    """As many single columns as triplets: a sketch that mapped two of them alike would lose one."""
    generator = torch.Generator().manual_seed(seed)
    a = 1e-4 * torch.randn(2000, 700, generator=generator)
    sigma = 1 + torch.arange(64) / 64
    a[torch.randperm(2000, generator=generator)[:64], torch.randperm(700, generator=generator)[:64]] += sigma
    svd = batched_rsvd(a, 64, seed=seed, route="subspace")
    torch.testing.assert_close(svd.S.double(), torch.linalg.svdvals(a.double())[:64], rtol=1e-5, atol=0)


def test_the_seed_matters_only_to_the_sketch():
    a = spectrum("polynomial", 200, 260).float()
    one, two = (batched_rsvd(a, 5, seed=seed, route="subspace") for seed in (0, 1))
    assert not torch.equal(one.U, two.U)
    torch.testing.assert_close(one.S, two.S, rtol=1e-4, atol=0)


@pytest.mark.parametrize("seed", range(8))
def test_the_residual_of_nothing_kept_is_a_bound_too(seed):
    """The norm in fp32 falls short of the exact one as often as not."""
    a = torch.randn(96, 127, generator=torch.Generator().manual_seed(seed))
    svd = batched_rsvd(a, 0)
    assert torch.linalg.matrix_norm(a.double()) <= svd.residual_norm <= (1 + 1e-5) * svd.frobenius_norm


@pytest.mark.parametrize("route", [None, *ROUTES])
def test_rank_zero_and_empty_batches(route):
    a = torch.randn(12, 9)
    svd = batched_rsvd(a, 0, route=route)
    assert svd.U.shape == (12, 0) and svd.S.shape == (0,) and svd.Vh.shape == (0, 9)
    torch.testing.assert_close(svd.residual_norm.float(), a.norm())
    empty = batched_rsvd(torch.empty(2, 0, 12, 9), 4, route=route)
    assert empty.U.shape == (2, 0, 12, 4) and empty.flags.shape == (2, 0)
    assert batched_rsvd(torch.empty(2, 0, 9, 12), 4, route=route).U.shape == (2, 0, 9, 4)
    nothing = batched_rsvd(torch.empty(3, 0, 9), 0, route=route)
    assert nothing.U.shape == (3, 0, 0) and nothing.frobenius_norm.tolist() == [0, 0, 0]


def test_signs():
    a = spectrum("polynomial", 40, 60)
    svd = batched_rsvd(a, 5)
    assert (svd.U.gather(0, svd.U.abs().argmax(0, keepdim=True)) > 0).all()
    flipped = svd._replace(U=-svd.U, Vh=-svd.Vh)
    assert torch.equal(batched_rsvd(a, 5, align_to=flipped).U, flipped.U)
    assert torch.equal(batched_rsvd(a, 5, align_to=flipped.U[:, :3]).Vh[:3], flipped.Vh[:3])


@pytest.mark.parametrize("route", ["subspace", "gram"])
@pytest.mark.parametrize("long", [20_000, 60_000])
def test_a_constant_row_along_a_long_side(long, route):
    """Sums of equal terms are rounded to one side each time, so that errors grow with their number."""
    row = 1.857
    a = 0.0105 * row / 520**0.5 * torch.randn(520, long, generator=torch.Generator().manual_seed(0))
    a[0] = row
    svd = batched_rsvd(a, 1, route=route)
    exact = a.double()
    largest = torch.linalg.eigvalsh(exact @ exact.mT)[-1].sqrt()
    left = torch.linalg.matrix_norm(exact - (svd.U.double() * svd.S.double()) @ svd.Vh.double())
    low, high = svd.bounds()
    assert low <= largest <= high and left <= svd.residual_norm <= 1.1 * left
    assert abs(svd.S.double() / largest - 1) < 2e-6


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    m=st.integers(1, 40),
    n=st.integers(1, 40),
    rate=st.floats(0.0, 3.0),
    route=st.sampled_from(ROUTES),
    fraction=st.floats(0.0, 1.0),
    scale=st.integers(-30, 30),
)
def test_any_shape_and_spectrum(m, n, rate, route, fraction, scale):
    s = torch.exp(-rate * torch.arange(min(m, n), dtype=torch.float64))
    a = (with_spectrum(m, n, s, seed=m * 41 + n) * 10.0**scale).float()
    k = max(1, round(fraction * min(m, n)))
    svd = batched_rsvd(a, k, route=route)
    assert_certified(svd, a.double())
    assert abs(svd.S[0].double() / torch.linalg.svdvals(a.double())[0] - 1) < 1e-6


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda a: batched_rsvd(a, 10), ValueError, r"rank 10 exceeds min\(m, n\) = 9.*clip_rank"),
        (lambda a: batched_rsvd(a, -1), ValueError, "rank must be"),
        (lambda a: batched_rsvd(a, 2.0), ValueError, "rank must be"),
        (lambda a: batched_rsvd(a, 2, base=a[:5]), ValueError, r"a \(12, 9\) and base \(5, 9\)"),
        (lambda a: batched_rsvd(a.int(), 2), TypeError, "a must be .* got torch.int32"),
        (lambda a: batched_rsvd(a, 2, base=a.int()), TypeError, "base must be .* got torch.int32"),
        (lambda a: batched_rsvd(a.to(torch.complex64), 2), TypeError, "complex64"),
        (lambda a: batched_rsvd(a.numpy(), 2), TypeError, "ndarray"),
        (lambda a: batched_rsvd(None, 2), TypeError, "a must be a tensor of .* got NoneType"),
        (lambda a: spectral_metrics(None), TypeError, "a must be a tensor of .* got NoneType"),
        (lambda a: batched_rsvd(a.to_sparse(), 2), TypeError, "a must be dense, got layout torch.sparse_coo"),
        (lambda a: batched_rsvd(a, 2, align_to=a.to(torch.complex64)), TypeError, "its U, got torch.complex64"),
        (lambda a: batched_rsvd(a[0], 2), ValueError, r"\(9,\)"),
        (lambda a: batched_rsvd(a, 2, route="fast"), ValueError, "subspace, gram, exact"),
        (lambda a: batched_rsvd(a, 2, tol=0.0), ValueError, "tol must be a finite number > 0"),
        (lambda a: batched_rsvd(a, 2, tol=10**400), ValueError, "tol must be a finite number > 0"),
        (lambda a: batched_rsvd(a, 2, tol="1"), ValueError, "tol must be a finite number > 0 or None, got '1'"),
        (lambda a: batched_rsvd(a, a), ValueError, r"rank must be an integer ≥ 0, got a tensor \(12, 9\)"),
        (lambda a: subspace_alignment(a, a, 2.0), ValueError, "k must be an integer.*it is 2.0"),
        (lambda a: batched_rsvd(a, 2, oversample=-1), ValueError, "oversample"),
        (lambda a: batched_rsvd(a, 2, power_iters=-1), ValueError, "power_iters"),
        (lambda a: batched_rsvd(a, True), ValueError, "rank must be an integer"),
        (lambda a: batched_rsvd(a, 2, oversample=2.5), ValueError, "oversample must be an integer"),
        (lambda a: batched_rsvd(a, 2, align_to=a[:5]), ValueError, "align_to"),
        (lambda a: batched_rsvd(a, 2, align_to="last"), TypeError, "align_to must be an RSVD or its U, got str"),
        (lambda a: batched_rsvd(a, 2, seed=1.5), TypeError, "seed must be an integer, got 1.5"),
        (lambda a: batched_rsvd(a, 2, seed=2**63), ValueError, "seed must be an integer of 64 bits"),
        (lambda a: batched_rsvd(a, 2, seed=-(2**63) - 1), ValueError, "seed must be an integer of 64 bits"),
        (lambda a: subspace_alignment(a[0], a[0], 1), ValueError, r"\(9,\) and \(9,\)"),
        (lambda a: subspace_alignment(batched_rsvd(a, 2), a, 1), TypeError, "such as U of an RSVD, got RSVD"),
        (lambda a: subspace_overlap(a, a[:5]), ValueError, r"\(12, 9\) and \(5, 9\)"),
        (lambda a: subspace_overlap((a * 10).long(), a), TypeError, "the first basis must be .* got torch.int64"),
        (lambda a: principal_cosines(a, a > 0), TypeError, "the second basis must be .* got torch.bool"),
        (lambda a: subspace_alignment(a, a.to_sparse(), 2), TypeError, "the second basis must be dense"),
        (lambda a: subspace_alignment(a, a.to("meta"), 2), ValueError, "first basis is on cpu but the second .* meta"),
    ],
)
def test_bad_input(call, error, words):
    with pytest.raises(error, match=words):
        call(torch.randn(12, 9))


def test_clipped_rank():
    a = torch.randn(12, 9)
    svd = batched_rsvd(a, 10, clip_rank=True)
    assert svd.S.shape == (9,) and svd.flags & Flag.CLIPPED
    assert batched_rsvd(a, 9, clip_rank=True).flags == 0
    torch.testing.assert_close(low_rank_part(a, 10, clip_rank=True), a)


@pytest.mark.parametrize("power_iters", [0, 2])
def test_a_matrix_of_zeros_among_others(power_iters):
    a = torch.stack([torch.randn(100, 80), torch.zeros(100, 80)])
    svd = batched_rsvd(a, 4, route="subspace", power_iters=power_iters)
    assert svd.S[0].all() and not svd.S[1].any()
