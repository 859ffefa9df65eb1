"""The Gram of a bf16 pair in C++, and what is taken from it instead of from the pair."""

import functools
from dataclasses import replace

import pytest
import torch
from lowrank import matrices

from effopd_kernels.lowrank import RSVD, Flag, ops, panels
from effopd_kernels.lowrank.decompose import Settings, decompose_group, oriented
from effopd_kernels.lowrank.difference import Difference
from effopd_kernels.lowrank.panels import exact_gram
from effopd_kernels.lowrank.slq import Sampling, _in_cpp, _outside, _step, sampled_spectrum, step_in_cpp
from effopd_kernels.lowrank.statistics import NON_FINITE
from effopd_kernels.lowrank.types import least_rounding
from effopd_kernels.native import native

pytestmark = pytest.mark.skipif(not native() or not native().num_multipliers(), reason="needs AVX2")
GRAMS = range(native().num_multipliers() if native() else 0)  # instruction sets


def refuses(instruction_set):
    """Whether it leaves what 16 bits do not hold to others: of AVX-512 it is left to fp32."""
    return native().rounded(instruction_set) == "bf16" or instruction_set == 0


def of_pair(a, b, settings):
    """(svd, its statistics, its Gram)."""
    statistics = torch.zeros(6, dtype=torch.float64)
    tall = a.shape[0] >= a.shape[1]
    g = exact_gram(oriented(a, tall), oriented(b, tall), statistics)
    statistics = statistics[:5].unsqueeze(0)
    svd, _ = decompose_group([a], [b], settings, statistics, None if g is None else g.unsqueeze(0))
    return RSVD(*(field[0] for field in svd)), statistics, g


def assert_gram(found, x, base, statistics=None):
    n = len(x)
    exact = x.double() - (0 if base is None else base.double())
    assert torch.equal(found, found.mT)
    same = exact.float().mT @ exact.float()
    error, bar = ((g.double() - exact.mT @ exact).norm() for g in (found, same))
    assert error <= 2 * bar + least_rounding(exact.square().sum(), torch.float32)
    assert n < 1000 or error <= 2 * bar
    if statistics is None:
        return
    expected = ops.stats([x], [] if base is None else [base], True)[0]
    squares = 0.0 if base is None else float(base.double().square().sum())
    torch.testing.assert_close(statistics, torch.cat([expected, expected.new_tensor([squares])]), rtol=1e-6, atol=0)


@pytest.mark.parametrize("instruction_set", GRAMS)
def test_many_equal_terms(instruction_set):
    """Whose sum is rounded to one side each time it grows."""
    x = 0.01 * torch.randn(60_000, 96, generator=torch.Generator().manual_seed(0))
    x[:, 0] = 1.857
    x = x.bfloat16()
    g, exact = panels.exact_gram(x, None, instruction_set=instruction_set), x.double()
    if g is None:
        pytest.skip("these multiply integers, of which such a column makes too large ones")
    expected = exact.mT @ exact
    assert (g.double() - expected).norm() <= 2e-6 * expected.norm()


@pytest.mark.parametrize("instruction_set", GRAMS)
@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("pair", [True, False])
@pytest.mark.parametrize("shape", [(1, 1), (3, 2), (40, 17), (257, 64), (700, 65), (513, 100), (1301, 300), (90, 1025)])
def test_gram(shape, pair, transposed, instruction_set):
    """Sizes that cross blocks, tiles and strips raggedly, lines apart, and rests that meet in a row."""
    n, m = shape
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(m if transposed else n, (n if transposed else m) + 5, generator=generator).bfloat16()
    x = (base.float() + 2**-9 * torch.randn(base.shape, generator=generator)).bfloat16() if pair else base
    x, base = (v[:, 3:-2].T if transposed else v[:, 3:-2] for v in (x, base))
    if pair:  # differences that 16 bits do not hold, two in each of some rows
        x[: n // 2 : 8, :2], base[: n // 2 : 8, :2] = 2**-6, 2**-15 * 1.5
    statistics = torch.zeros(6, dtype=torch.float64)
    found = exact_gram(x, base if pair else None, statistics, instruction_set)
    if found is not None:
        assert_gram(found, x, base if pair else None, statistics)
    else:
        assert refuses(instruction_set) and (not pair or m < 64)  # too many of them


@pytest.mark.parametrize("instruction_set", GRAMS)
def test_what_is_refused(instruction_set):
    """Differences that 16 bits do not hold, where it matters; other dtypes."""
    x, base = torch.randn(300, 40).bfloat16(), torch.randn(300, 40).bfloat16()
    gram = functools.partial(exact_gram, instruction_set=instruction_set)
    assert (gram(x, base) is None) == refuses(instruction_set)
    assert gram(x, x) is not None
    assert gram(x.float(), None) is None and gram(x, x.half()) is None


@pytest.mark.parametrize("instruction_set", GRAMS)
@pytest.mark.parametrize("transposed", [True, False])
def test_changes_of_one_size(transposed, instruction_set):
    """Sums that come as near to the largest integer as they may, of one sign; rows that do not change; other sizes in
    other blocks.
    """
    x = torch.zeros(1400, 96)
    x[:512], x[512:768], x[1100:1400] = 180 * 2.0**-20, -180 * 2.0**-9, 2.0**-30
    x[1100:1400:2, ::3] *= -1
    x = x.T.contiguous().T if transposed else x
    assert_gram(exact_gram(x.bfloat16(), None, None, instruction_set), x, None)


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_non_finite_entries_are_counted(poison):
    base = torch.randn(300, 80).bfloat16()
    x = base.clone()
    x[7, 5] = poison
    svd, statistics, _ = of_pair(x, base, Settings(8))
    assert statistics[0, NON_FINITE] == 1 and svd.flags == int(Flag.NON_FINITE) and svd.U.isnan().all()


@pytest.mark.parametrize("shape", [(1400, 640), (640, 1400), (600, 600)])
@pytest.mark.parametrize(("rank", "ratio"), [(64, 1e-3), (64, 1e-2), (300, 3e-3)])
def test_a_decomposition(shape, rank, ratio):
    a, b = matrices.bf16_pair(*shape, rank, ratio)
    svd, _, g = of_pair(a, b, Settings(32))
    assert g is not None
    exact = a.double() - b.double()
    matrices.assert_certified(svd, exact)
    s = torch.linalg.svdvals(exact)[:32]
    usual = decompose_group([a], [b], Settings(32))[0]
    errors = [((s - found.double()) / s).abs().max() for found in (svd.S, usual.S[0])]
    assert errors[0] <= 1.5 * errors[1] + 1e-5
    assert svd.triplet_residual.max() < 2 * usual.triplet_residual[0].max() + 1e-3 * s[0]


def test_what_rounding_would_swamp_is_taken_from_the_pair():
    """Of an update of rank 4 the Gram in fp32 knows no fifth σ."""
    generator = torch.Generator().manual_seed(0)
    b = torch.zeros(700, 520, dtype=torch.bfloat16)
    u, v = (torch.randint(-3, 4, shape, generator=generator).float() for shape in ((700, 4), (4, 520)))
    a = (u @ v).bfloat16()  # whole numbers, exactly
    svd, statistics, g = of_pair(a, b, Settings(16))
    assert g is not None and statistics[0, NON_FINITE] == 0
    usual = decompose_group([a], [b], Settings(16))[0]
    for field, same in zip(svd, usual, strict=True):
        assert torch.equal(field, same[0])


@pytest.mark.parametrize(("m", "k"), [(560, 32), (561, 32), (560, 31)])
def test_a_sampled_spectrum(m, k):
    """Of odd sizes too, which the kernel of a step does not take."""
    a, b = matrices.bf16_pair(1200, m, 200, 3e-3)
    svd, _, g = of_pair(a, b, Settings(k))
    pair = Difference([a], [b])
    usual, found = (
        sampled_spectrum(x, k, Sampling(16, 8, 8, 0), svd) for x in (pair, replace(pair, known_gram=g.unsqueeze(0)))
    )
    torch.testing.assert_close(found.nodes, usual.nodes, rtol=1e-3, atol=1e-5 * float(svd.S[0]))
    assert found.rest_norm() == pytest.approx(usual.rest_norm(), rel=1e-4)
    rest = torch.linalg.matrix_norm(
        (a.double() - b.double()) @ (torch.eye(m).double() - svd.Vh.mT.double() @ svd.Vh.double()), 2
    )
    assert rest < found.rest_norm()


@pytest.mark.parametrize("scale", [2.0**-60, 2.0**60])
def test_scales(scale):
    a, b = (scale * v for v in matrices.bf16_pair(600, 530, 40, 1e-2))
    svd, _, _ = of_pair(a, b, Settings(16))
    matrices.assert_certified(svd, a.double() - b.double())


@pytest.mark.parametrize("instruction_set", GRAMS)
@pytest.mark.parametrize(("m", "k"), [(560, 32), (98, 6), (34, 2)])
def test_a_step_of_lanczos(m, k, instruction_set):
    """In one kernel as in PyTorch; a probe in an invariant subspace, of which only rounding is left, harms no other."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(2 * m, m, generator=generator) * torch.arange(1, m + 1) ** -0.5
    v = torch.linalg.eigh(a.mT @ a)[1][:, -k:].flip(-1).contiguous()
    x = Difference([a], [], torch.tensor([0.5]), (a.mT @ a).unsqueeze(0))
    z = torch.randn(m, 16, generator=generator)
    z[:, 5] = torch.linalg.eigh(a.mT @ a)[1][:, 0]
    z = _outside(v, z)
    z /= z.norm(dim=0)
    results = []
    for step in (_step, functools.partial(step_in_cpp, instruction_set=instruction_set)):
        q, (diagonal, off) = torch.full((6, m, 16), torch.nan), torch.full((2, 5, 16), torch.nan)
        q[0] = z
        assert _in_cpp(x, q, v) and not _in_cpp(x, q, v[:, 1:])  # it takes columns by twos
        for t in range(5):
            step(x, v, q, t, diagonal, off)
        results.append((q, diagonal, off))
    others = torch.arange(16) != 5
    for found, same in zip(*results, strict=True):
        torch.testing.assert_close(
            found[..., others], same[..., others], rtol=2e-3, atol=2e-4 * float(same[..., others].abs().max())
        )
    q = results[1][0][..., others]
    products = torch.einsum("tmp,smp->pts", q.double(), q.double())
    assert (products - torch.eye(6)).abs().max() < 2e-6 and (v.mT @ q).abs().max() < 1e-5
