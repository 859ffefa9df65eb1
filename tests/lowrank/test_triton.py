"""The Triton low-rank kernels against fp64, on the GPU or in the interpreter.

Shape legend: B matrices; N rows, M columns of each; L sketch columns.
"""

import pytest
import torch

pytest.importorskip("triton")

from interpreted import DEVICE, ON_GPU, needs_gpu, needs_kernels, run_in_interpreter

from effopd_kernels.device_cache import captured
from effopd_kernels.lowrank import signs
from effopd_kernels.lowrank import triton_kernels as kernels
from effopd_kernels.lowrank.statistics import NON_FINITE, SUM_SQUARES

N, M, L = (100, 70, 20) if not ON_GPU else (1000, 5000, 72)
LONG = N + 1500 if ON_GPU else N + 200  # columns of two spans
EPS = torch.finfo(torch.float32).eps


def test_in_interpreter():
    run_in_interpreter(__file__)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """The interpreter crosses tiles and spans with small matrices, and knows no bf16 products: fp16 stands in."""
    if not ON_GPU:
        monkeypatch.setattr(kernels, "SPAN", 256)
        monkeypatch.setattr(kernels, "COLUMNS", 16)
        monkeypatch.setattr(kernels, "GRAM_TILE", 32)
        monkeypatch.setattr(kernels, "HALF_DTYPE", torch.float16)
        monkeypatch.setattr(kernels, "STATS_ROWS", 64)
        for device, (_, launch) in kernels.JACOBI.items():
            monkeypatch.setitem(kernels.JACOBI, device, (16, launch))
        config = {name: {**launch, "BLOCK": 64} for name, launch in kernels.CONFIG.items()}
        monkeypatch.setattr(kernels, "CONFIG", config)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def batch(dtype=torch.bfloat16, transposed=False, pair=True, size=(N, M), B=2):
    """(x, base, X in fp64): weights of size 1, updates of size 0.1, views of shape ``size`` whatever their layout."""
    stored = size[::-1] if transposed else size
    base = [normal(*stored, seed=i).to(DEVICE, dtype) for i in range(B)]
    x = [(b.float() + 0.1 * normal(*stored, seed=B + i).to(DEVICE)).to(dtype) for i, b in enumerate(base)]
    if transposed:
        x, base = [t.mT for t in x], [t.mT for t in base]
    exact = torch.stack([t.double() for t in x])
    if pair:
        exact = exact - torch.stack([t.double() for t in base])
    return x, base if pair else [], exact


def assert_product(found, a, b, relative):
    """|found − a b| ≤ relative·|a||b|, entry by entry; a sum of rounded products can promise no more."""
    error = (found.double() - a @ b).abs()
    bound = relative * (a.abs() @ b.abs()) + 1e-30
    assert (error <= bound).all(), (error / bound).max()


layouts = pytest.mark.parametrize("transposed", [False, True], ids=["rows", "columns"])
dtypes = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])


@needs_kernels
@pytest.mark.parametrize(
    ("dtype", "transposed", "pair"),
    [
        (torch.bfloat16, False, True),
        (torch.bfloat16, True, True),
        (torch.float32, True, True),
        (torch.float32, False, False),
    ],
)
def test_skinny(dtype, transposed, pair):
    x, base, exact = batch(dtype, transposed, pair, size=(M, LONG))
    q, scale = normal(2, LONG, L).to(DEVICE), torch.tensor([2.0, 0.25], device=DEVICE)
    want = exact * scale.double()[:, None, None]
    assert_product(kernels.launch_skinny(x, base, q, scale), want, q.double(), 8 * EPS)
    assert_product(kernels.launch_skinny(x, base, q, None, True), exact, q.double(), 2.0**-7 + 8 * EPS)


@needs_kernels
def test_skinny_does_not_depend_on_the_batch():
    x, base, _ = batch(B=3)
    q = normal(3, M, L).to(DEVICE)
    together = kernels.launch_skinny(x, base, q, None)
    for i in range(3):
        one = slice(i, i + 1)
        assert torch.equal(together[i], kernels.launch_skinny(x[one], base[one], q[one], None)[0])


@needs_kernels
@layouts
def test_gram_apply(transposed):
    x, base, exact = batch(transposed=transposed)
    q, scale = normal(2, M, L).to(DEVICE), torch.tensor([2.0, 0.25], device=DEVICE)
    want = exact * scale.double()[:, None, None]
    found = kernels.launch_gram_apply(x, base, q, scale, False)
    error = (found.double() - want.mT @ (want @ q.double())).norm() / found.double().norm()
    assert error <= 8 * EPS
    y, z = kernels.launch_project(x, base, q, scale)
    assert torch.equal(y, kernels.launch_skinny(x, base, q, scale)) and torch.equal(z, found)


def statistics(x, base, exact, full):
    """The definition, in fp64."""
    rows = []
    for values, d in zip(x, exact, strict=True):
        exponent = torch.frexp(values.double())[1] - 1
        ulp = torch.finfo(values.dtype).eps * 2.0 ** exponent.double()
        ulp[values == 0] = 0
        same, ulps = ((d == 0).sum(), ulp.square().sum()) if full else (0, 0)
        rows.append([d.square().sum(), d.abs().max(), same, ulps, (~d.isfinite()).sum()])
    return torch.tensor(rows, dtype=torch.float64, device=DEVICE)


@needs_kernels
@pytest.mark.parametrize(
    ("dtype", "transposed", "full"),
    [
        (torch.bfloat16, False, True),
        (torch.bfloat16, True, True),
        (torch.float16, False, True),
        (torch.float32, True, True),
        (torch.float32, False, False),
    ],
)
def test_statistics(dtype, transposed, full):
    x, base, exact = batch(dtype, transposed)
    want = statistics(x, base, exact, full)
    torch.testing.assert_close(kernels.launch_stats(x, base, full), want, rtol=2 * EPS, atol=0)
    z, found = kernels.launch_sketch(x, base, L, 0, full)
    torch.testing.assert_close(found, want, rtol=2 * EPS, atol=0)
    product = exact.mT @ (exact @ signs.dense(0, M, L, DEVICE).double())
    assert (z.double() - product).norm() <= 2.0**-7 * product.norm()


@needs_kernels
def test_batches_beyond_the_grid_are_left_to_the_reference(monkeypatch):
    x, base, exact = batch(B=3)
    q = normal(3, M, 2 * kernels.COLUMNS).to(DEVICE)
    monkeypatch.setattr(kernels, "MAX_GRID", 5)
    monkeypatch.setattr(kernels, "_skinny_kernel", None)
    assert_product(kernels.launch_skinny(x, base, q, None), exact, q.double(), 8 * EPS)
    monkeypatch.setattr(kernels, "MAX_GRID", 2)
    monkeypatch.setattr(kernels, "_stats_kernel", None)
    torch.testing.assert_close(
        kernels.launch_stats(x, base, True), statistics(x, base, exact, True), rtol=2 * EPS, atol=0
    )


@needs_kernels
@pytest.mark.parametrize("size", [1e-25, 1e30])
def test_sums_of_squares_beyond_fp32(size):
    a = torch.full((40, 50), size, device=DEVICE)
    assert abs(kernels.launch_stats([a], [], False)[0, SUM_SQUARES] / a.double().square().sum() - 1) < 1e-12


@needs_kernels
def test_non_finite_entries_are_counted_and_stay_in_their_matrix():
    x, base, _ = batch(torch.float32)
    x[1][3, 4], base[1][5, 6] = torch.nan, -torch.inf
    z, found = kernels.launch_sketch(x, base, L, 0, False)
    assert found[:, NON_FINITE].tolist() == [0, 2]
    assert kernels.launch_stats(x, base, False)[:, NON_FINITE].tolist() == [0, 2]
    assert torch.equal(z[:1], kernels.launch_sketch(x[:1], base[:1], L, 0, False)[0])


@needs_kernels
@dtypes
@layouts
def test_gram(dtype, transposed):
    """Of 16-bit pairs X = hi + lo is exact but for 2⁻¹⁷, and lo·lo is not added."""
    x, base, exact = batch(dtype, transposed)
    scale = torch.tensor([2.0, 0.25], device=DEVICE)
    found = kernels.launch_gram(x, base, scale, False)
    assert torch.equal(found, found.mT)
    want = exact * scale.double()[:, None, None]
    assert_product(found, want.mT, want, 2.0**-15 if dtype == torch.bfloat16 else 8 * EPS)


@needs_kernels
@pytest.mark.parametrize("shape", [(1, 5), (5, 1), (1, 1), (33, 17)])
def test_odd_shapes(shape):
    x, base, exact = batch(torch.float32, size=shape)
    q = normal(2, shape[1], 3).to(DEVICE)
    assert_product(kernels.launch_skinny(x, base, q, None), exact, q.double(), 8 * EPS)
    assert_product(kernels.launch_gram(x, base, None, False), exact.mT, exact, 8 * EPS)
    want = statistics(x, base, exact, True)
    torch.testing.assert_close(kernels.launch_stats(x, base, True), want, rtol=2 * EPS, atol=0)


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1, 5] + [10, 136, 257] * ON_GPU)
def test_eigh(dtype, size, monkeypatch):
    """Well-conditioned, of deficient rank, zero and diagonal, in one batch."""
    monkeypatch.setattr(kernels, "JACOBI_ALONE", kernels.JACOBI_LIMIT)
    y = normal(4, 3 * size, size).to(DEVICE, dtype)
    y[1, :, size // 2 :] = y[1, :, : size - size // 2]
    y[2] = 0
    y[3] = torch.diag(torch.arange(1.0, size + 1))[torch.arange(3 * size) % size]
    g = y.mT @ y
    values, vectors = kernels.launch_eigh(g)
    largest = torch.linalg.eigvalsh(g.double())[:, -1].clamp_min(1e-30)
    near = 4 * size * torch.finfo(dtype).eps
    want = torch.linalg.eigvalsh(g.double()).flip(-1)
    assert ((values - want).abs().amax(-1) <= near * largest).all()
    assert (values.diff(dim=-1) <= 0).all()
    residual = g @ vectors - vectors * values[:, None]
    assert (residual.abs().amax((1, 2)) <= near * largest).all()
    eye = torch.eye(size, dtype=dtype, device=DEVICE)
    assert (vectors.mT @ vectors - eye).abs().max() <= near


@needs_kernels
def test_large_eigenproblems_are_left_to_the_reference_unless_they_are_many(monkeypatch):
    g = torch.diag(torch.arange(1.0, 6)).to(DEVICE).expand(2, 5, 5)
    monkeypatch.setattr(kernels, "JACOBI_ALONE", 3)
    monkeypatch.setattr(kernels, "_jacobi_kernel", None)
    assert kernels.launch_eigh(g)[0].tolist() == [[5, 4, 3, 2, 1]] * 2
    with pytest.raises(TypeError):
        kernels.launch_eigh(g.repeat(2, 1, 1))


@needs_gpu
def test_another_stream_reads_addresses_that_the_first_has_yet_to_copy():
    first, second, addresses = torch.cuda.Stream(), torch.cuda.Stream(), tuple(range(2**40, 2**40 + 50))
    with torch.cuda.stream(first):
        torch.cuda._sleep(10**9)  # cycles: half a second
        kernels._on_device(addresses, torch.device(DEVICE, 0))
    with torch.cuda.stream(second):
        found = kernels._on_device(addresses, torch.device(DEVICE, 0)).clone()
    second.synchronize()
    assert found.tolist() == list(addresses)


@needs_gpu
def test_launches_are_captured_in_a_cuda_graph():
    x, base, _ = batch()
    want = kernels.launch_sketch(x, base, L, 0, False)
    graph, kept = torch.cuda.CUDAGraph(), len(captured)
    with torch.cuda.graph(graph):
        found = kernels.launch_sketch(x, base, L, 0, False)
    assert len(captured) > kept  # else the cache might drop what the graph reads
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))
