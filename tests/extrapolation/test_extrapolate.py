"""extrapolate_ and extrapolate against fp64, bit for bit at the ends of the line, for every backend of this machine."""

import itertools
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from effopd_kernels.extrapolation import cpu, extrapolate, extrapolate_, reference
from effopd_kernels.native import native

INSTRUCTION_SETS = range(native().num_instruction_sets() if native() and cpu.EXCHANGE else 0)
IN_CPP = pytest.mark.skipif(not INSTRUCTION_SETS, reason="needs the C++ extension, and DLPack's exchange API in torch")
IMPLEMENTATIONS = {
    "reference": reference.extrapolate_,
    "lerp": partial(cpu.extrapolate_, instruction_set=None),
    **{f"c++ {i}": partial(cpu.extrapolate_, instruction_set=i) for i in INSTRUCTION_SETS},
}
BACKENDS = pytest.mark.parametrize("backend", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS)
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
SHAPES = [(), (0,), (1,), (7, 3), (2, 0, 5), (cpu.BLOCK + 13,)]


def bits(x):
    return x.contiguous().view(torch.uint8)


def triple(shape, dtypes, seed=0):
    """Parameter (poisoned), anchor and a current close to it."""
    g = torch.Generator().manual_seed(seed)
    anchor = torch.randn(shape, generator=g, dtype=torch.float64)
    current = anchor + 1e-2 * torch.randn(shape, generator=g, dtype=torch.float64)
    return torch.full(shape, torch.nan, dtype=dtypes[0]), anchor.to(dtypes[1]), current.to(dtypes[2])


def run(backend, params, anchors, currents, alpha, masters=(), stats=True):
    alphas = torch.as_tensor(alpha, dtype=torch.float64).expand(len(params))
    return backend(params, anchors, currents, alphas, list(masters), stats)


def spacing(x):
    """Distance from |x| (fp64) to the next value of each dtype: the unit in the last place."""
    return lambda dtype: torch.finfo(dtype).eps * 2.0 ** torch.floor(torch.log2(x.abs().clamp_min(1e-30)))


@BACKENDS
@pytest.mark.parametrize(
    "dtypes", list(itertools.product(DTYPES, repeat=3)), ids=lambda d: "-".join(str(x)[6:] for x in d)
)
def test_value_is_fp32_arithmetic_rounded_once(backend, dtypes):
    param, anchor, current = triple((1000,), dtypes)
    run(backend, [param], [anchor], [current], 3.0)
    exact = anchor.double() + 3.0 * (current.double() - anchor.double())
    inner = torch.float64 if torch.float64 in dtypes[1:] else torch.float32
    scale = torch.maximum(exact.abs(), anchor.double().abs())
    # Half a unit of the result for rounding, a few units of the inner dtype for the arithmetic.
    bound = 0.5 * spacing(exact)(dtypes[0]) + 8 * torch.finfo(inner).eps * scale
    assert ((param.double() - exact).abs() <= bound).all()


@BACKENDS
@pytest.mark.parametrize("dtype", DTYPES[:3])
@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_ends_are_copies_bit_for_bit(backend, dtype, alpha):
    # As torch.lerp alone would not make them: between [-0, 1] and [0, inf] it gives [0, nan] at α = 0.
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e-38, -6e-8, 65504.0]).to(dtype)
    anchor, current = (t.flatten().clone() for t in torch.meshgrid(special, special, indexing="ij"))
    param = torch.empty_like(anchor)
    run(backend, [param], [anchor], [current], alpha)
    assert torch.equal(bits(param), bits(current if alpha else anchor))


@BACKENDS
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes_and_statistics(backend, shape):
    param, anchor, current = triple(shape, (torch.float32,) * 3)
    stats = run(backend, [param], [anchor], [current], 5.0)
    assert stats.shape == (1, 3) and stats.dtype == torch.float32
    delta_sq, weight_sq, nonfinite = stats[0].double()
    torch.testing.assert_close(delta_sq, (current.double() - anchor.double()).square().sum(), rtol=1e-5, atol=0)
    torch.testing.assert_close(weight_sq, param.double().square().sum(), rtol=1e-5, atol=0)
    assert nonfinite == 0


@BACKENDS
def test_nonfinite_elements_are_counted_and_large_ones_are_not(backend):
    anchor = torch.tensor([torch.inf, torch.nan, 0.0, 3e38, 1e30])  # 1e30 is finite, its square is not
    current = torch.tensor([0.0, 0.0, -torch.inf, -3e38, 1e30])
    param = torch.empty(5)
    assert run(backend, [param], [anchor], [current], 3.0)[0, 2] == (~param.isfinite()).sum() == 4


@BACKENDS
def test_master_is_written_and_the_working_copy_is_its_rounding(backend):
    _, anchor, current = triple((300,), (torch.float32,) * 3)
    master, param = torch.full((300,), torch.nan), torch.full((300,), torch.nan, dtype=torch.bfloat16)
    run(backend, [param], [anchor], [current], 7.0, masters=[master])
    alone = torch.empty(300)
    run(backend, [alone], [anchor], [current], 7.0)
    assert torch.equal(master, alone) and torch.equal(param, master.bfloat16())


@BACKENDS
def test_current_may_be_the_parameter_itself(backend):
    _, anchor, current = triple((cpu.BLOCK + 1,), (torch.float32,) * 3)
    apart, together = torch.empty_like(current), current.clone()
    one = run(backend, [apart], [anchor], [current], 3.0)
    two = run(backend, [together], [anchor], [together], 3.0)
    assert torch.equal(apart, together) and torch.equal(one, two)


@IN_CPP
def test_spans_of_several_threads_give_the_same_bits():
    """Larger than a span (2¹⁷), streamed, ragged; statistics summed in one order whoever did the spans."""
    param, anchor, current = triple((9 * 2**17 + 13,), (torch.float32,) * 3)
    results, threads = [], torch.get_num_threads()
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        param = torch.empty_like(anchor)
        results.append((run(cpu.extrapolate_, [param], [anchor], [current], 3.0), param))
    torch.set_num_threads(threads)
    exact = anchor.double() + 3 * (current.double() - anchor.double())
    torch.testing.assert_close(results[0][1].double(), exact, rtol=1e-6, atol=1e-6)
    truth = [(current.double() - anchor.double()).square().sum(), exact.square().sum(), torch.zeros(())]
    torch.testing.assert_close(results[0][0][0].double(), torch.tensor(truth, dtype=torch.float64), rtol=1e-5, atol=0)
    for stats, param in results[1:]:
        assert torch.equal(stats, results[0][0]) and torch.equal(param, results[0][1])


@BACKENDS
def test_strided_parameters(backend):
    param, anchor, current = triple((6, 4), (torch.float32,) * 3)
    strided = torch.full((4, 12), torch.nan)[:, ::2].t()
    one = run(backend, [param], [anchor], [current], 3.0)
    two = run(backend, [strided], [anchor], [current.t().contiguous().t()], 3.0)
    assert torch.equal(param, strided)
    torch.testing.assert_close(one, two)


@IN_CPP
@pytest.mark.parametrize("order", [(3, 2, 1, 0), (0, 2, 3, 1)], ids=["transposed", "channels_last"])
@pytest.mark.parametrize("masters", [True, False])
def test_what_lies_without_gaps_is_as_fast_in_any_order(order, masters, monkeypatch):
    """By the kernel, bit for bit what contiguous tensors get; beside one that has gaps."""
    dtypes = (torch.bfloat16, torch.float32, torch.float32)
    plain, gaps = triple((2, 3, 4, 5), dtypes), triple((4, 6), dtypes)
    back = [order.index(d) for d in range(4)]
    laid = [t.permute(order).contiguous().permute(back) for t in plain]
    assert not laid[0].is_contiguous()
    slow, in_blocks = [], cpu._in_blocks
    monkeypatch.setattr(cpu, "_in_blocks", lambda *args: slow.append(args[0].shape) or in_blocks(*args))
    results = []
    for tensors in (laid, plain):
        columns = [[t, gap.clone()[:, ::2]] for t, gap in zip(tensors, gaps, strict=True)]
        columns.append([torch.empty_like(t, dtype=torch.float32) for t in columns[0]] if masters else [])
        results.append((run(cpu.extrapolate_, *columns[:3], 3.0, masters=columns[3]), columns))
    assert slow == [(4, 3), (4, 3)]  # what has gaps
    (one, written), (two, expected) = results
    assert all(torch.equal(a, b) for k in (0, 3) for a, b in zip(written[k], expected[k], strict=True))
    torch.testing.assert_close(one, two)


@settings(deadline=None, max_examples=30)
@given(
    alphas=st.lists(st.floats(-20, 20), min_size=1, max_size=5),
    dtypes=st.tuples(*[st.sampled_from(DTYPES[:3])] * 3),
    with_masters=st.booleans(),
)
def test_backends_agree(alphas, dtypes, with_masters):
    triples = [triple((5, i), dtypes, seed=i) for i in range(len(alphas))]
    results = []
    for backend in IMPLEMENTATIONS.values():
        params, anchors, currents = ([t.clone() for t in ts] for ts in zip(*triples, strict=True))
        masters = [torch.full(p.shape, torch.nan) for p in params] if with_masters else []
        stats = backend(params, anchors, currents, torch.tensor(alphas, dtype=torch.float64), masters, True)
        results.append((params, masters, stats))
    (p0, m0, s0), *others = results
    for p1, m1, s1 in others:
        for x, y in zip(p0, p1, strict=True):
            atol = 2e-5 if x.dtype.itemsize == 4 else 2e-3
            torch.testing.assert_close(x, y, rtol=torch.finfo(x.dtype).eps, atol=atol)
        torch.testing.assert_close(m0, m1, rtol=1e-6, atol=2e-5)
        torch.testing.assert_close(s0, s1, rtol=2e-2, atol=1e-4)


class TestPublicFunction:
    def test_one_alpha_per_tensor_and_statistics(self):
        params, anchors, currents = map(
            list, zip(*(triple((4,), (torch.float32,) * 3, i) for i in range(3)), strict=True)
        )
        stats = extrapolate_(params, anchors, currents, [0.0, 1.0, 2.0])
        assert torch.equal(params[0], anchors[0]) and torch.equal(params[1], currents[1])
        torch.testing.assert_close(params[2], anchors[2] + 2 * (currents[2] - anchors[2]))
        assert [column.shape for column in stats] == [(3,)] * 3
        assert extrapolate_(params, anchors, currents, 1.0, stats=False) is None
        assert [column.shape for column in extrapolate_([], [], [], 1.0)] == [(0,)] * 3

    def test_some_masters(self):
        params, anchors, currents = map(
            list, zip(*(triple((4,), (torch.float32,) * 3, i) for i in range(3)), strict=True)
        )
        params[1] = params[1].bfloat16()
        masters = [None, torch.empty(4), None]
        stats = extrapolate_(params, anchors, currents, [2.0, 3.0, 4.0], masters=masters)
        assert torch.equal(params[1], masters[1].bfloat16())
        expected = torch.stack([p.double().square().sum() for p in params])
        torch.testing.assert_close(stats.weight_sq.double(), expected)

    def test_what_parameters_returns_and_numbers_of_numpy(self):
        net, anchor, current = (torch.nn.Linear(3, 2) for _ in range(3))
        expected = [torch.lerp(a, c, 3.0) for a, c in zip(anchor.parameters(), current.parameters(), strict=True)]
        extrapolate_(net.parameters(), anchor.parameters(), current.parameters(), np.float32(3))
        torch.testing.assert_close(list(net.parameters()), expected)
        assert extrapolate([torch.ones(2)], [torch.ones(2)], np.float32(3))[0].tolist() == [4.0, 4.0]

        extrapolate_([param := torch.zeros(2)], [torch.zeros(2)], [torch.ones(2)], np.array(3.0))
        assert param.tolist() == [3.0, 3.0] and extrapolate([param], [param], np.array(3.0))[0].tolist() == [12.0, 12.0]

    @pytest.mark.parametrize("contiguous", [True, False])
    def test_tied_weights_move_once(self, contiguous):
        """As a state_dict lists them, and `currents` the parameters themselves: twice would be α² of the way."""
        tied, other = torch.ones(3, 3) if contiguous else torch.ones(3, 3).t(), torch.ones(2)
        params, anchors = [tied, other, tied.detach()], [torch.zeros(3, 3), torch.zeros(2), torch.zeros(3, 3)]
        stats = extrapolate_(params, anchors, params, 3.0)
        assert (tied == 3).all() and (other == 3).all() and stats.weight_sq.tolist() == [81, 18, 81]
        masters = [torch.ones(3), torch.ones(3)]  # of a parameter that two optimizers step
        extrapolate_([half := torch.ones(3).bfloat16(), half], [torch.zeros(3)] * 2, masters, 3.0, masters=masters)
        assert all((t == 3).all() for t in (half, *masters))

    def test_tensors_without_memory(self):
        with FakeTensorMode():
            columns = [[torch.zeros(3, 3).t(), torch.zeros(3, 3)] for _ in range(3)]
            assert extrapolate_(*columns, 3.0).nonfinite.shape == (2,)

    def test_parameters_that_require_grad(self):
        param = torch.nn.Parameter(torch.zeros(3))
        version = param._version
        extrapolate_([param], [torch.zeros(3)], [torch.ones(3)], 2.0)
        assert torch.equal(param, torch.full((3,), 2.0)) and param._version > version and param.grad_fn is None

    @pytest.mark.parametrize(
        "change, error, words",
        [
            (dict(anchors=[torch.zeros(4)]), ValueError, r"anchors\[0\] has shape \(4,\)"),
            (dict(currents=[]), ValueError, "1 params, 1 anchors, 0 currents"),
            (dict(alpha=[1.0, 2.0]), ValueError, "2 alphas for 1 tensors"),
            (dict(alpha=torch.ones(2)), ValueError, "alpha has shape"),
            (dict(alpha=float("nan")), ValueError, "finite"),
            (dict(alpha=torch.tensor(float("nan"))), ValueError, "finite"),
            (dict(alpha=10**400), ValueError, "alpha must be finite, got inf"),
            (dict(alpha=[-(10**400)]), ValueError, "alpha must be finite, got -inf"),
            (dict(alpha=[None]), TypeError, "alpha must be a number, or one per tensor, got None"),
            (dict(alpha=[torch.ones(2)]), TypeError, "alpha must be a number, or one per tensor, got tensor"),
            (dict(alpha=torch.tensor(1 + 2j)), TypeError, r"alpha must be real, got a tensor of torch\.complex64"),
            (dict(alpha=np.array([1 + 2j])), TypeError, "alpha must be a number, or one per tensor, got np.complex128"),
            (dict(masters=[torch.zeros(1).expand(3)]), ValueError, r"masters\[0\] has elements that share memory"),
            (dict(params=[torch.zeros(3, dtype=torch.int8)]), TypeError, r"params\[0\] is torch.int8"),
            (dict(masters=[torch.zeros(2)]), ValueError, r"masters\[0\]"),
            (dict(currents=[torch.zeros(3, device="meta")]), ValueError, "on meta"),
            (dict(alpha="3"), TypeError, "alpha must be a number, or one per tensor, got '3'"),
            (dict(alpha=None), TypeError, "alpha must be a number, or one per tensor, got None"),
            (dict(anchors=torch.nn.Linear(2, 2)), TypeError, "anchors must be a sequence of tensors, got a Linear"),
            (dict(currents=3.0), TypeError, "currents must be a sequence of tensors, got a float"),
            (dict(masters={"w": None}), TypeError, "masters must be a sequence of tensors, got a dict"),
            (dict(anchors=[np.zeros(3)]), TypeError, r"anchors\[0\] must be a tensor, got ndarray"),
            (dict(anchors=[None]), TypeError, r"anchors\[0\] must be a tensor, got NoneType"),
            (dict(anchors=[torch.zeros(3).to_sparse()]), TypeError, r"anchors\[0\] is torch.float32, torch.sparse_coo"),
        ],
    )
    def test_what_does_not_fit_is_named_before_anything_is_written(self, change, error, words):
        arguments = dict(params=[torch.zeros(3)], anchors=[torch.ones(3)], currents=[torch.ones(3)], alpha=2.0) | change
        before = [p.clone() for p in arguments["params"]]
        with pytest.raises(error, match=words):
            extrapolate_(**arguments)
        assert all(map(torch.equal, arguments["params"], before))

    @pytest.mark.parametrize(
        "params, currents, words",
        [
            (
                torch.zeros(1, 2).expand(2, 2),
                torch.ones(2, 2),
                r"params\[1\] has elements that share memory.*: clone",
            ),
            ((square := torch.zeros(2, 2)), square.t(), r"currents\[1\] is the memory of params\[1\] in another order"),
        ],
        ids=["expanded", "transposed"],
    )
    def test_memory_that_cannot_be_written_is_named_before_the_first_is(self, params, currents, words):
        first = torch.zeros(3)
        with pytest.raises(ValueError, match=words):
            extrapolate_([first, params], [torch.zeros(3), torch.ones(2, 2)], [torch.ones(3), currents], 3.0)
        assert not first.any()


@IN_CPP
def test_lists_that_need_no_look_at_each_tensor():
    """Every kind of mistake, in whichever row and list, is left to the checks that name it."""
    plain = [torch.zeros(3, 2), torch.nn.Parameter(torch.zeros(4, dtype=torch.bfloat16)), torch.zeros(9)[2:5],
             torch.zeros(3, 4).t(), torch.zeros(0), torch.zeros(())]  # fmt: skip
    wide = [torch.zeros(t.shape, dtype=torch.float64) for t in plain]
    lists = [plain, wide, plain, wide]
    assert cpu.alike(*lists) and cpu.alike(*lists[:3], [None] * 6)
    assert not cpu.alike([], [], [], []) and not cpu.alike(plain[:5], *lists[1:])
    wrong = [torch.zeros(4, dtype=torch.int32), torch.zeros(4, dtype=torch.complex64), torch.zeros(2, 2), None]
    wrong += [
        torch.zeros(3),
        torch.zeros(4, device="meta"),
        torch.zeros(4).to_sparse(),
        torch.nn.UninitializedParameter(),
    ]
    for column in range(4):
        for tensor in wrong:
            changed = [[*ts[:1], tensor, *ts[2:]] if k == column else ts for k, ts in enumerate(lists)]
            assert not cpu.alike(*changed), (column, tensor)


@IN_CPP
def test_views_are_written_where_they_are():
    """With an offset into their storage, or an odd stride along a side of one."""
    for view in (lambda t: t[5:11], lambda t: t.as_strided((6, 1), (1, 9), 3)):
        storage, anchor, current = torch.full((20,), -1.0), torch.randn(20), torch.randn(20)
        extrapolate_([view(storage)], [view(anchor)], [view(current)], 3.0)
        expected = torch.full((20,), -1.0)
        torch.lerp(view(anchor), view(current), 3.0, out=view(expected))
        torch.testing.assert_close(storage, expected)


def test_a_torch_whose_lists_cannot_be_read(monkeypatch):
    monkeypatch.setattr(cpu, "EXCHANGE", None)
    param, anchor, current = triple((300,), (torch.bfloat16, torch.float32, torch.float32))
    stats = extrapolate_([param], [anchor], [current], 3.0)
    assert torch.equal(param, torch.lerp(anchor, current, 3.0).bfloat16()) and stats.nonfinite.item() == 0


@pytest.mark.parametrize("in_cpp", [True, False], ids=["as-installed", "lerp"])
@pytest.mark.parametrize("contiguous", [True, False], ids=["contiguous", "transposed"])
@pytest.mark.parametrize("alpha", [0.0, 1.0, 3.0])
def test_trained_parameters_are_written_outside_the_graph(monkeypatch, in_cpp, contiguous, alpha):
    """Whichever backend, and whichever of the three requires gradients: no graph, and no error of a leaf's."""
    if not in_cpp:
        monkeypatch.setattr(cpu, "native", lambda: None)
    param, anchor, current = (torch.randn(6, 4) if contiguous else torch.randn(4, 6).t() for _ in range(3))
    leaves = [torch.nn.Parameter(t) for t in (param, anchor, current)]
    expected = {0.0: anchor, 1.0: current}.get(alpha, torch.lerp(anchor, current, alpha)).clone()
    for stats in (True, False):
        out = extrapolate_(*([leaf] for leaf in leaves), torch.tensor(alpha, requires_grad=True), stats=stats)
        assert leaves[0].is_leaf
        torch.testing.assert_close(leaves[0].detach(), expected)
        assert out is None or not any(x.requires_grad for x in out)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # imports of torch.compile's and of forward mode's own
class TestDifferentiable:
    @pytest.mark.parametrize("shape", [(), (5,), (3, 0), (2, 3, 4)], ids=str)
    def test_gradcheck(self, shape):
        w0, delta = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for _ in range(2))
        alpha = torch.tensor(2.5, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(extrapolate, (w0, delta, alpha))

    def test_lists_with_one_alpha_or_one_each(self):
        w0 = [torch.randn(3, requires_grad=True), torch.randn(2, 2, requires_grad=True)]
        delta = [torch.randn(3, requires_grad=True), torch.randn(2, 2)]
        for alpha in (torch.tensor([2.0, 3.0], requires_grad=True), torch.tensor(2.0, requires_grad=True)):
            out = extrapolate(w0, delta, alpha)
            sum(x.square().sum() for x in out).backward()
            expected = torch.stack([(2 * x * d).sum() for x, d in zip(out, delta, strict=True)])
            torch.testing.assert_close(alpha.grad, expected if alpha.ndim else expected.sum())
        assert [x.shape for x in extrapolate(w0, delta, 2)] == [(3,), (2, 2)]

    def test_half_precision_accumulates_alpha_in_fp32(self):
        w0, delta = torch.ones(5000, dtype=torch.bfloat16), torch.ones(5000, dtype=torch.bfloat16)
        alpha = torch.tensor(1.0, requires_grad=True)
        extrapolate(w0, delta, alpha).sum().backward()
        assert alpha.grad == 5000  # a bf16 sum stops at 256

    def test_shapes_that_disagree(self):
        with pytest.raises(ValueError, match="shape"):
            extrapolate(torch.zeros(3), torch.zeros(4), 2.0)
        with pytest.raises(ValueError, match="2 alphas for 1 tensors"):
            extrapolate([torch.zeros(3)], [torch.zeros(3)], torch.ones(2))
        for alphas in ([2.0], [2.0, 3.0, 4.0]):
            with pytest.raises(ValueError, match=f"{len(alphas)} alphas for 2 tensors"):
                extrapolate([torch.zeros(3)] * 2, [torch.zeros(3)] * 2, alphas)
        with pytest.raises(ValueError, match="1 tensors in w0"):
            extrapolate([torch.zeros(3)], [], 2.0)
        with pytest.raises(ValueError, match="w0 is on cpu but delta is on meta"):
            extrapolate(torch.zeros(3), torch.zeros(3, device="meta"), 2.0)
        with pytest.raises(ValueError, match="alpha must be finite, got inf"):
            extrapolate(torch.zeros(3), torch.zeros(3), 10**400)

    @pytest.mark.parametrize(
        "w0, delta, alpha, words",
        [
            ({"w": torch.zeros(3)}, {"w": torch.zeros(3)}, 2.0, "w0 must be a sequence of tensors, got a dict"),
            ("w", "w", 2.0, "w0 must be a sequence of tensors, got a str"),
            (["w"], ["w"], 2.0, "w0 must be a sequence of tensors, got a str"),
            (torch.zeros(3), [torch.zeros(3)], 2.0, "delta must be a tensor, as w0 is, got a list"),
            (torch.zeros(3), torch.zeros(3), "3", "alpha must be a number or a scalar tensor, got '3'"),
            (torch.zeros(3), torch.zeros(3), None, "alpha must be a number or a scalar tensor, got None"),
            (torch.zeros(3), torch.zeros(3), torch.tensor(2j), "alpha must be real, got a tensor of torch.complex64"),
            ([torch.zeros(3)], [torch.zeros(3)], [None], "alpha must be a number or a scalar tensor, got None"),
            ([torch.zeros(3)], [torch.zeros(3)], "3", "alpha must be a number, or one per tensor, got '3'"),
            ([torch.zeros(3)], [torch.zeros(3)], None, "alpha must be a number, or one per tensor, got None"),
            (torch.ones(2, dtype=torch.int64), torch.ones(2), 2.0, r"w0 is torch\.int64"),
            ([torch.ones(2)], [torch.ones(2, dtype=torch.int8)], 2.0, r"delta is torch\.int8"),
        ],
    )
    def test_what_are_no_tensors_or_numbers(self, w0, delta, alpha, words):
        with pytest.raises(TypeError, match=words):
            extrapolate(w0, delta, alpha)

    def test_to_any_order_and_in_forward_mode(self):
        leaves = [torch.randn(5, dtype=torch.float64, requires_grad=True) for _ in range(2)]
        leaves.append(torch.tensor(2.5, dtype=torch.float64, requires_grad=True))
        assert torch.autograd.gradgradcheck(extrapolate, leaves)
        assert torch.autograd.gradcheck(extrapolate, leaves, check_forward_ad=True)

    @pytest.mark.parametrize(
        "transformed",
        [
            lambda f, w, d, a: torch.func.jvp(f, (w, d, a), (d, w, a)),
            lambda f, w, d, a: torch.func.jvp(lambda a: f(w, d, a).sum(), (a,), (torch.ones_like(a),)),
            lambda f, w, d, a: torch.func.jacrev(f, argnums=(0, 1, 2))(w, d, a),
            lambda f, w, d, a: torch.func.hessian(lambda a: f(w, d, a).pow(3).sum())(a),
            lambda f, w, d, a: torch.func.vmap(f, (None, None, 0))(w, d, torch.stack([a, 2 * a])),
            lambda f, w, d, a: torch.func.vmap(torch.func.grad(lambda d, a: f(w, d, a).square().sum()), (0, None))(
                torch.stack([d, w]), a
            ),
        ],
        ids=["jvp", "jvp of alpha", "jacrev", "hessian", "vmap", "vmap of grad"],
    )
    def test_under_torch_func(self, transformed):
        g = torch.Generator().manual_seed(0)
        w0, delta = (torch.randn(5, dtype=torch.float64, generator=g) for _ in range(2))
        alpha = torch.tensor(2.5, dtype=torch.float64)
        expected = transformed(lambda w, d, a: w + a * d, w0, delta, alpha)
        torch.testing.assert_close(transformed(extrapolate, w0, delta, alpha), expected)

    def test_compile(self):
        def loss(w0, delta, alpha):
            return extrapolate(w0, delta, alpha).square().sum()

        leaves = [
            torch.randn(6, requires_grad=True),
            torch.randn(6, requires_grad=True),
            torch.tensor(2.0, requires_grad=True),
        ]
        eager = torch.autograd.grad(loss(*leaves), leaves)
        compiled = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(*leaves), leaves)
        torch.testing.assert_close(compiled, eager)


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype):
    param, anchor, current = triple((3, 5), (dtype,) * 3)
    param = torch.zeros_like(anchor)
    alphas = torch.tensor([2.0], dtype=torch.float64)
    ops = torch.ops.effopd
    for stats, masters in itertools.product((True, False), ([], [torch.zeros(3, 5)])):
        arguments = ([param], [anchor], [current], alphas, masters, stats)
        torch.library.opcheck(ops.extrapolate_.default, arguments, test_utils=("test_schema", "test_faketensor"))
    leaves = (anchor.requires_grad_(), current.requires_grad_(), torch.tensor(2.0, requires_grad=True))
    torch.library.opcheck(ops.extrapolate.default, leaves)
    strided = (anchor.detach().t(), current.detach().t(), leaves[2].detach())
    torch.library.opcheck(ops.extrapolate.default, strided)
    torch.library.opcheck(ops.extrapolate_backward.default, tuple(x.detach() for x in (anchor, current, leaves[2])))


def test_one_number_for_tensors_here_and_nowhere():
    params = [torch.zeros(3, device="meta"), torch.zeros(3)]
    extrapolate_(params, [torch.zeros_like(t) for t in params], [torch.ones_like(t) for t in params], 2.0)
    assert torch.equal(params[1], torch.full((3,), 2.0))
