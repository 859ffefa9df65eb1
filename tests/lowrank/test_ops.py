"""The operators: schema, fakes, compilation, and the panels under them; and the orthonormalisation that they feed."""

import functools

import pytest
import torch
from lowrank.matrices import orthogonality, with_spectrum

from effopd_kernels.lowrank import ops, orth, panels, reference, signs, types
from effopd_kernels.lowrank.decompose import Settings, decompose_group
from effopd_kernels.lowrank.statistics import MAX_ABS, NON_FINITE, SUM_SQUARES, SUM_ULP_SQUARES, UNCHANGED, ulp
from effopd_kernels.native import native


def difference(dtype=torch.bfloat16, transposed=False, pair=True):
    """(x, base, X in fp64 by matrix), two 50 × 30 matrices."""
    generator = torch.Generator().manual_seed(0)
    shape = (30, 50) if transposed else (50, 30)
    x, base = ([torch.randn(shape, generator=generator).to(dtype) for _ in range(2)] for _ in range(2))
    if transposed:
        x, base = [v.mT for v in x], [v.mT for v in base]
    base = base if pair else []
    return x, base, [a.double() - (base[i].double() if pair else 0) for i, a in enumerate(x)]


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """‖found − expected‖ / ‖expected‖."""
    return ((found.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("in_cpp", [True, False])
@pytest.mark.parametrize("pair", [True, False])
@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_products(dtype, transposed, pair, in_cpp, monkeypatch):
    if not in_cpp:
        monkeypatch.setattr(panels, "multiplies", lambda *operands: False)
    monkeypatch.setattr(panels, "PANEL", 500)  # several panels, the last one short
    monkeypatch.setattr(reference, "GRAM_BLOCK", 8)
    x, base, exact = difference(dtype, transposed, pair)
    arithmetic = torch.promote_types(dtype, torch.float32)
    q = torch.randn(2, 30, 7, dtype=arithmetic, generator=torch.Generator().manual_seed(1))
    scale = torch.tensor([1.0, 4.0], dtype=arithmetic)
    bar = 4 * torch.finfo(arithmetic).eps
    rounds = panels.multiplies(x[0], base[0] if pair else None, q[0]) and native().rounded(-1)
    z, statistics = ops.sketch(x, base, 7, 0, True)
    torch.testing.assert_close(statistics, ops.stats(x, base, True))
    omega = signs.dense(0, 30, 7, x[0].device, torch.float64)
    y, projected = ops.project(x, base, q, scale)
    for i, a in enumerate(exact):
        qi, c = q[i].double(), scale[i].double()
        assert distance(z[i], a.mT @ (a @ omega)) < (1e-2 if rounds else bar)
        assert distance(ops.skinny(x, base, q, scale)[i], c * a @ qi) < bar
        assert distance(ops.gram_apply(x, base, q, scale, False)[i], c**2 * a.mT @ (a @ qi)) < bar
        assert distance(y[i], c * a @ qi) < bar
        assert distance(projected[i], c**2 * a.mT @ (a @ qi)) < bar
        assert distance(ops.gram(x, base, scale, True)[i], c**2 * a.mT @ a) < 1e-13
        assert abs(statistics[i, SUM_SQUARES] / a.square().sum() - 1) < 1e-6
        assert abs(statistics[i, MAX_ABS] / a.abs().max() - 1) < bar
        assert statistics[i, UNCHANGED] == (a == 0).sum()
    g = ops.gram(x, base, None, False)
    assert torch.equal(g, g.mT)
    # Operands of 16 bits, where the processor multiplies them faster: the error of rounding, no more.
    fast = ops.gram_apply(x, base, q, None, True)
    error = max(distance(fast[i], a.mT @ (a @ q[i].double())) for i, a in enumerate(exact))
    assert 1e-4 < error < 1e-2 if rounds else error < bar


@pytest.mark.parametrize("instruction_set", range(native().num_multipliers() if native() else 0))
@pytest.mark.parametrize("near", [True, False])
@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_products_in_cpp(dtype, transposed, near, instruction_set):
    """Sizes that cross blocks, strips and panels raggedly, lines apart; beside PyTorch on the same panels. Of bf16
    numbers that are near all but a few differences are bf16 numbers themselves.
    """
    generator = torch.Generator().manual_seed(0)
    for n, m in ((1, 1), (2, 3), (17, 16), (129, 255), (300, 1301), (1025, 40), (40, 4100)):
        shape = (m, n + 5) if transposed else (n, m + 5)
        x, base = (torch.randn(shape, generator=generator) for _ in range(2))
        x, base = (v.to(dtype) for v in (x, x + base / 500 if near else base))
        x, base = (v.T[3:-2] if transposed else v[:, 3:-2] for v in (x, base))
        exact = x.double() - base.double()
        matrix = x, base, None, slice(None)
        products = functools.partial(panels.products, instruction_set=instruction_set)
        for width in (1, 16, 33, 50, 64, 100, 144):
            q = torch.randn(m, width, generator=generator)
            y, alone, statistics = torch.empty(n, width), torch.empty(n, width), torch.zeros(2, 5, dtype=torch.float64)
            panel = panels.panel(*matrix, torch.float32, statistics[0], True).contiguous()
            z = products(*matrix, q, y, statistics=statistics[1], full=True)
            products(*matrix, q, alone, want_z=False)
            assert torch.equal(alone, y)
            expected = exact @ q.double()
            for found, truth, same in ((y, expected, panel @ q), (z, exact.mT @ expected, panel.mT @ (panel @ q))):
                assert distance(found, truth) <= 2 * distance(same, truth) + 2e-7
            torch.testing.assert_close(statistics[1], statistics[0], rtol=1e-6, atol=0)
            fast = products(x, base, torch.tensor(2.0), slice(None), q, half=True)
            # Four roundings of at most 2⁻⁹, where nothing averages; in fp32 none.
            bar = 8e-3 if native().rounded(instruction_set) else 2e-6
            assert distance(fast, 4 * exact.mT @ expected) < bar
            omega, places = signs.dense(0, m, width, x.device), signs.sparse(0, m, width)
            of_signs = products(*matrix, omega, half=True, places=places)
            assert distance(of_signs, exact.mT @ (exact @ omega.double())) < bar


@pytest.mark.parametrize("instruction_set", range(native().num_multipliers() if native() else 0))
@pytest.mark.parametrize("half", [True, False])
def test_products_of_long_rows(half, instruction_set):
    """Beyond the terms whose sums are added up in fp32, of a q and of signs."""
    m, width = 33_000, 16
    x = torch.randn(3, m, generator=torch.Generator().manual_seed(0)).bfloat16()
    omega, places = signs.dense(0, m, width, x.device), signs.sparse(0, m, width)
    exact = x.double().mT @ (x.double() @ omega.double())
    for given in (None, places) if half else (None,):
        z = panels.products(x, None, None, slice(None), omega, half=half, places=given, instruction_set=instruction_set)
        assert distance(z, exact) < (8e-3 if half and native().rounded(instruction_set) else 2e-6)


@pytest.mark.parametrize("instruction_set", range(native().num_multipliers() if native() else 0))
@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("shape", [(8, 100_000), (30_000, 8)])
def test_products_of_equal_terms(shape, transposed, instruction_set):
    """Whose sum is rounded to one side each time it grows: by what bounds allow for, no more."""
    x, q = torch.full(shape, 1.857).bfloat16(), torch.full((shape[1], 16), 0.3)
    x = x.T.contiguous().T if transposed else x
    y = torch.empty(shape[0], 16)
    z = panels.products(x, None, None, slice(None), q, y, instruction_set=instruction_set)
    expected = x.double() @ q.double()
    bar = types.BIASED * torch.finfo(torch.float32).eps
    assert distance(y, expected) < bar and distance(z, x.double().mT @ expected) < bar


@pytest.mark.parametrize("instruction_set", range(native().num_multipliers() if native() else 0))
@pytest.mark.parametrize("transposed", [True, False])
def test_products_in_16_bits_of_uneven_operands(transposed, instruction_set):
    """Outliers, rows of zeros, columns of q whose sizes differ: every column of the product is as exact as it would be
    alone. q does not meet the outliers, so that all they could do is to make the unit of their block coarse.
    """
    generator = torch.Generator().manual_seed(0)
    x, q = torch.randn(600, 300, generator=generator), torch.randn(300, 20, generator=generator)
    x[120:270], x[300, 7], x[450, 290] = 0, 400, 1e5
    q *= torch.logspace(0, -12, 20)
    q[:, 3] = q[7] = q[290] = 0
    x = x.T.contiguous().T if transposed else x
    z = panels.products(x, None, None, slice(None), q, half=True, instruction_set=instruction_set)
    exact = x.double().mT @ (x.double() @ q.double())
    rows = [i for i in range(300) if i not in (7, 290)]  # in those two a single rounding stands out
    error, norm = (torch.linalg.vector_norm(v[rows], dim=0) for v in (z - exact, exact))
    assert (error <= 8e-3 * norm).all()
    for bad in (torch.nan, torch.inf):
        q[5, 5] = bad
        z = panels.products(x, None, None, slice(None), q, half=True, instruction_set=instruction_set)
        assert not z[:, 5].isfinite().any() and z[:, :5].isfinite().all()


@pytest.mark.skipif(not native() or not native().num_multipliers(), reason="nothing rounds")
@pytest.mark.parametrize("columns", [20, 64])
def test_rounding_as_products_do(columns):
    """Once rounded, operands are not rounded again."""
    x = torch.eye(64)  # whose entries, and so Y, are exact
    q = panels.rounded(torch.randn(64, columns, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(panels.products(x, None, None, slice(None), q, half=True), q)


@pytest.mark.skipif(not native() or not native().has_tiles(), reason="needs matrix tiles")
def test_tiles_are_shared_with_torch():
    """PyTorch's own products in the same thread keep the shapes of tiles that they set."""
    x, q = torch.randn(300, 200).bfloat16(), torch.randn(200, 33)
    before = x @ q.bfloat16()
    ours = panels.products(x, None, None, slice(None), q)
    assert torch.equal(x @ q.bfloat16(), before)
    assert torch.equal(panels.products(x, None, None, slice(None), q), ours)


@pytest.mark.parametrize("zero", [True, False])
@pytest.mark.parametrize("shape", [(50, 12), (12, 50), (200, 60), (60, 200)])
@pytest.mark.parametrize("route", ["subspace", "gram", "exact"])
def test_a_decomposition_brings_the_statistics(route, shape, zero):
    """Those of the bf16 weights, also where the update is factored in fp64."""
    base = torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    x = base if zero else (base + 0.01 * torch.randn(shape, generator=torch.Generator().manual_seed(1))).bfloat16()
    found = torch.full((1, 5), torch.nan, dtype=torch.float64)
    decompose_group([x], [base], Settings(4, route=route), found)
    torch.testing.assert_close(found, ops.stats([x], [base], True), rtol=1e-6, atol=0)
    assert found[0, SUM_ULP_SQUARES] > 0 and (found[0, UNCHANGED] == x.numel()) == zero


@pytest.mark.parametrize("columns", [1, 5, 8, 9, 96])
def test_signs_of_a_sketch(columns):
    """One in each of eight blocks of columns, the same from both forms; all columns used, and both signs."""
    places, omega = signs.sparse(3, 500, columns), signs.dense(3, 500, columns, torch.device("cpu"))
    assert places.shape == (500, min(8, columns)) and places.dtype == torch.int32
    assert (omega.abs().sum(1) == min(8, columns)).all() and set(omega.unique().tolist()) <= {-1.0, 0.0, 1.0}
    assert torch.equal(omega.gather(1, places.long() >> 1), (1 - 2 * (places & 1)).float())
    share = omega.abs().mean(0) * columns / min(8, columns)
    assert share.min() > 0.5 and share.max() < 2 and omega.mean().abs() < 0.1
    assert torch.equal(places, signs.sparse(3, 500, columns)) and not torch.equal(places, signs.sparse(4, 500, columns))


def test_non_finite_entries_are_counted():
    x, base, _ = difference(torch.float32)
    x[1][3, 4], base[1][5, 6] = torch.nan, -torch.inf
    assert ops.stats(x, base, False)[:, NON_FINITE].tolist() == [0, 2]


@pytest.mark.parametrize("columns", [1, 3, 17])
def test_small_squares_of_narrow_matrices_add_up(columns):
    """Each is less than half of the first one's last place."""
    x = torch.full((1024, columns), 0.999 * 2**-12.5)
    x[0] = 1
    found = ops.stats([x], [], True)[0, SUM_SQUARES]
    torch.testing.assert_close(found, x.double().square().sum(), rtol=2e-6, atol=0)


def test_sums_of_squares_out_of_range_of_fp32():
    for scale in (1e-25, 1e30):
        a = scale * torch.ones(4, 5)
        assert abs(ops.stats([a], [], False)[0, SUM_SQUARES] / a.double().square().sum() - 1) < 1e-12


@pytest.mark.skipif(not native(), reason="needs the C++ extension")
@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("pair", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_panels_in_cpp_are_those_of_torch(dtype, pair, transposed, fast):
    """Bit for bit, and their statistics to rounding: ragged and unaligned lines, unchanged entries, zeros, denormals,
    squares beyond fp32, NaN.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(37, 2100, generator=generator)
    x[1:3] *= torch.tensor([[1e-25], [1e25]])
    x[4, 5:9] = torch.tensor([0.0, -0.0, 1e-40, 1e-7])
    base = (x + (torch.rand(x.shape, generator=generator) > 0.3) * 0.01 * x).to(dtype)
    x, scale = x.to(dtype), torch.tensor(0.25)
    if dtype == torch.float16:
        x[2], base[2] = 6e4, -6e4
    for poison in (0.0, torch.nan, torch.inf):
        x[20, 30] = x[20, 30] + poison
        for columns in (slice(None), slice(3, -10)):
            a, b = (x[:, columns].T, base[:, columns].T) if transposed else (x[:, columns], base[:, columns])
            found = []
            for instruction_set in (None, *range(native().num_instruction_sets())):
                rows, statistics = slice(3, len(a)), torch.zeros(5, dtype=torch.float64)
                panel = panels.panel(
                    a, b if pair else None, scale, rows, torch.bfloat16 if fast else torch.float32,
                    statistics, True, instruction_set,
                )  # fmt: skip
                found.append((panel.clone(), statistics))
            exact = a[3:].double() - (b[3:].double() if pair else 0)
            sums = torch.stack([exact.square().sum(), ulp(a[3:]).double().square().sum()])
            for panel, statistics in found[1:]:
                torch.testing.assert_close(panel, found[0][0], rtol=0, atol=0, equal_nan=True)
                told = [1, 2, 4] if poison == 0 else [2, 4]  # a matrix with NaN may have any norms
                torch.testing.assert_close(statistics[told], found[0][1][told], rtol=0, atol=0)
                if poison == 0:
                    torch.testing.assert_close(statistics[[0, 3]], sums, rtol=1e-6, atol=0)


@pytest.mark.parametrize("transposed", [True, False])
def test_opcheck(transposed):
    x, base, _ = difference(transposed=transposed)
    q, scale = torch.randn(2, 30, 7), torch.ones(2)
    torch.library.opcheck(ops.stats, (x, base, True))
    torch.library.opcheck(ops.sketch, (x, base, 7, 0, True))
    torch.library.opcheck(ops.skinny, (x, base, q, scale))
    torch.library.opcheck(ops.gram_apply, (x, [], q, None, True))
    torch.library.opcheck(ops.project, (x, base, q, scale))
    torch.library.opcheck(ops.gram, (x, base, scale, True))
    torch.library.opcheck(ops.eigh, (torch.eye(5).expand(2, 5, 5),))


def test_compiles():
    x, base, exact = difference()
    q = torch.randn(2, 30, 7)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def function(x, base, q):
        g = ops.gram(x, base, None, True)
        return ops.skinny(x, base, q, None) + 1, ops.gram_apply(x, base, q, None, False), ops.eigh(g)[0]

    y, z, values = function(x, base, q)
    torch.testing.assert_close(y[0].double(), exact[0] @ q[0].double() + 1, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(values[1], torch.linalg.svdvals(exact[1]).square())
    assert z.shape == (2, 30, 7)


@pytest.mark.parametrize("condition", [1e0, 1e3, 1e6, 1e12, torch.inf])
def test_orthonormal_bases(condition):
    """From well-conditioned to rank-deficient: CholeskyQR where it holds, Householder where it does not, one by one."""
    s = torch.logspace(0, -torch.log10(torch.tensor(condition)).item(), 12, dtype=torch.float64)
    if condition == torch.inf:
        s = torch.cat([torch.ones(5), torch.zeros(7)]).double()
    y = torch.stack([with_spectrum(200, 12, s), with_spectrum(200, 12, torch.ones(12))]).float()
    q = orth.orthonormal(y)
    assert orthogonality(q[0]) < 1e-6 and orthogonality(q[1]) < 1e-6
    assert (y.double() - q.double() @ (q.double().mT @ y.double())).abs().max() < 1e-5
    u, values, w = orth.svd_of_tall(y, 5)
    assert orthogonality(u[0]) < 1e-6 and orthogonality(w[0]) < 1e-5
    torch.testing.assert_close(values[0], s, rtol=1e-5, atol=1e-6)


def test_columns_of_very_different_length():
    y = torch.randn(1, 100, 6, generator=torch.Generator().manual_seed(0)) * torch.logspace(-18, 18, 6)
    assert orthogonality(orth.orthonormal(y)[0]) < 1e-6


def test_fp32_gram_would_not_do():
    """The guard has teeth: at condition 1e6 an fp32 Gram is not positive definite, or its factor far from
    orthonormal.
    """
    y = with_spectrum(200, 12, torch.logspace(0, -6, 12, dtype=torch.float64)).float()
    r, info = torch.linalg.cholesky_ex(y.mT @ y, upper=True)
    q = torch.linalg.solve_triangular(r, y, upper=True, left=False)
    assert info != 0 or orthogonality(q) > 1e-2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_squares_of_rows(dtype):
    x, base = (v.to(dtype) for v in torch.randn(2, 7, 1301, generator=torch.Generator().manual_seed(0)))
    x[3] = base[3]
    x, base = x[:, 2:-3], base[:, 2:-3]
    truth = torch.stack([v.double().square().sum(1) for v in (x.double() - base.double(), x, base)], 1)
    for instruction_set in (None, *range(native().num_instruction_sets() if native() else 0)):
        found = panels.row_squares(x, base, instruction_set)
        torch.testing.assert_close(found, truth, rtol=2e-6, atol=0)
        assert found[3, 0] == 0
