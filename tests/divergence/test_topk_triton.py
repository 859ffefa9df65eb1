"""The Triton kernels for teachers known in part, on the GPU or in the interpreter. N tokens, V vocabulary, k known."""

import math

import pytest
import torch

pytest.importorskip("triton")

from divergence.criterion import TOPK_PLAIN as PLAIN
from divergence.criterion import assert_entropy_accurate, assert_topk_accurate, in_buckets, topk_spec
from divergence.test_triton import every_route, logits
from interpreted import DEVICE, ON_GPU, needs_kernels, round_once, run_in_interpreter

from effopd_kernels.divergence import ops, triton_kernels, triton_topk


def test_in_interpreter():
    run_in_interpreter(__file__)


@pytest.fixture(autouse=True)
def small_slices(monkeypatch):
    """The interpreter crosses slices, tiles and blocks of ids with short rows; a GPU runs what is shipped. See
    test_triton.py."""
    if not ON_GPU:
        launch = triton_kernels.LAUNCH["sm_90"]._replace(lanes=8, loads=32, slice=8192, resident=3)
        monkeypatch.setattr(triton_kernels, "UNALIGNED_LOADS", 128)
        for module in (triton_topk, triton_kernels):
            monkeypatch.setattr(module, "launch_for", lambda device: (launch, 2))
        monkeypatch.setattr(triton_topk, "BLOCK", 16)


def teacher(N, V, k, tail=True):
    log_p = torch.log_softmax(logits(N, V, seed=1).double(), -1)
    order = torch.randperm(k, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    ids = log_p.topk(k).indices[:, order]
    return in_buckets(log_p, ids, tail).float(), ids


def run(student, ids, known, member="reverse", tail=True, knobs=PLAIN, mask=None, row_scale=None, out=None):
    """(loss, gradient, stats); the gradient's memory is poisoned beforehand. member None: log-probabilities."""
    grad = torch.full_like(student, math.nan) if out is None else out
    numbers = topk_spec(member, tail, knobs)
    loss, stats = triton_topk.launch_topk_rows(student, ids, known, mask, row_scale, numbers, grad, True)
    return loss, grad, stats


def check(student, ids, known, member="reverse", tail=True, knobs=PLAIN):
    loss, grad, _ = run(student, ids, known, member, tail, knobs)
    assert_topk_accurate((loss, grad), member, student, ids, known, tail, knobs)


@needs_kernels
@every_route
@pytest.mark.parametrize("V, k", [(2, 1), (127, 126), (2100, 40)] + [(151936, 20), (151936, 1000)] * ON_GPU)
def test_value_and_gradient(member, V, k):
    known, ids = teacher(2, V, k)
    check(logits(2, V), ids, known, member)
    check(logits(2, V), ids, known[:, :k], member, tail=False)


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("knobs", [PLAIN, (0.7, 1.5, 5.0)], ids=["plain", "capped"])
def test_dtypes_and_alignment(dtype, knobs):
    """Rows that all begin at multiples of 16 elements are read in vectors, others element by element."""
    V = 8448 // dtype.itemsize  # of two slices, the first of two tiles
    student = logits(2, V, dtype=dtype)
    for rows in (student, student[:, 1 : V - 6]):
        known, ids = teacher(2, rows.shape[1], 20)
        check(rows, ids, known, "reverse", True, knobs)


@needs_kernels
def test_in_place_in_sequences():
    known, ids = teacher(4, 1100, 20)
    for knobs in (PLAIN, (1.0, 1.0, 5.0)):
        whole = logits(2, 3, 1104)
        student = whole[:, :2, :1100]
        loss, grad, _ = run(student.reshape(4, 1100), ids, known, knobs=knobs)
        over, _, _ = run(student, ids, known, knobs=knobs, out=student)
        torch.testing.assert_close((over, student.reshape(4, 1100)), (loss, grad))
        assert torch.equal(whole[:, 2], logits(2, 3, 1104)[:, 2])


@needs_kernels
@pytest.mark.parametrize("low", [-1e10, -1e20])
def test_others_far_below(monkeypatch, low):
    """See test_triton.py."""
    round_once(monkeypatch)
    student, (known, ids) = logits(2, 3072), teacher(2, 3072, 5)
    student[:, :2048] = low
    for temperature in (1.0, 3.0):
        check(student, 2048 + torch.arange(5, device=DEVICE) + 0 * ids, known, knobs=(temperature, 1.0, 0.0))


@needs_kernels
def test_the_others_are_summed_for_themselves():
    student = logits(2, 2100)
    known, ids = teacher(2, 2100, 5)
    student.scatter_(1, ids, torch.tensor([[45.0], [100.0]], device=DEVICE).expand(2, 5).contiguous())
    for member in ("reverse", "forward"):
        check(student, ids, known, member)


@needs_kernels
def test_log_probability_of_one_entry():
    student, ids = logits(3, 2101), torch.tensor([[0], [2100], [7]], device=DEVICE)
    student[2, 7] = 60.0
    for knobs in (PLAIN, (0.7, 1.5, 5.0)):
        loss, grad, _ = run(student, ids, None, None, knobs=knobs)
        assert_topk_accurate((loss, grad), None, student, ids, None, True, knobs)


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_entropy(dtype):
    """Rows as in test_topk.py, aligned and not."""
    student, ids = logits(6, 2112, dtype=dtype), torch.tensor([[0], [2111], [7], [9], [2000], [5]], device=DEVICE)
    student[1] = student[1].sort().values * 30
    student[1] -= student[1, -1].clone()  # the interpreter's fma rounds the product, too
    student[2, 7], student[3, 1500] = 60.0, 60.0
    student[4, torch.arange(2112, device=DEVICE) != 2000] = -torch.inf
    student[5, ::2], student[5, 5] = -torch.inf, -torch.inf
    for rows, of in ((student, ids), (student[:4, 1:], ids[:4].clamp(min=1) - 1)):
        for knobs in (PLAIN, (0.7, 1.5, 5.0)):
            if knobs == PLAIN or rows.shape[0] == 4:  # tanh of −inf is −1
                _, _, stats = run(rows, of, None, None, knobs=knobs)
                assert_entropy_accurate(stats, rows, knobs)
    mask = torch.arange(6, device=DEVICE) % 2 == 0
    _, _, stats = run(student, ids, None, None)
    student[~mask] = math.nan
    _, _, masked = run(student, ids, None, None, mask=mask)
    assert not masked[:, ~mask].any() and torch.equal(masked[:, mask], stats[:, mask])


@needs_kernels
def test_what_is_no_token_masked_or_minus_infinity():
    known, ids = teacher(5, 1100, 20)
    student, mask, scale = logits(5, 1100), torch.tensor([1, 0, 1, 1, 1], device=DEVICE) > 0, logits(5).abs() + 1
    student[1], known[1], ids[1] = math.nan, math.nan, -1
    ids[0, 3:], known[0, 3:20] = -1, -torch.inf
    student[2].scatter_(0, ids[2], 50.0)
    student[2, student[2] < 50] = -torch.inf  # no others
    student[3, 100:600] = -torch.inf
    for tail in (True, False):
        args = student, ids, known if tail else known[:, :20]
        found = run(*args, tail=tail, mask=mask, row_scale=scale)
        grad = torch.empty_like(student)
        loss, stats = ops._topk_reference(*args, mask, scale, topk_spec("reverse", tail), grad, True)
        torch.testing.assert_close(found, (loss, grad, stats), rtol=1e-4, atol=1e-5)


@needs_kernels
def test_known_entries_far_above_the_others():
    known, ids = teacher(3, 2100, 20)
    student = (logits(3, 2100, spread=1.0) - 3000).scatter(1, ids, logits(3, 20, spread=1.0))
    temperature = 1 / math.log(2)  # which the kernels multiply by 1: the interpreter's fma rounds its product
    loss, grad, _ = run(student, ids, known, knobs=(temperature, 1.0, 0.0))
    exact = torch.empty_like(student, dtype=torch.float64)
    numbers = topk_spec("reverse", True, (temperature, 1.0, 0.0))
    exact_loss, _ = ops._topk_reference(student.double(), ids, known, None, None, numbers, exact, False)
    torch.testing.assert_close(loss.double(), exact_loss, rtol=1e-6, atol=0.0)
    torch.testing.assert_close(grad.double().gather(1, ids), exact.gather(1, ids), rtol=2e-4, atol=0.0)


@needs_kernels
def test_strided_teachers_and_ids():
    known, ids = teacher(4, 1100, 5)
    mask, scale = torch.tensor([1, 0, 1, 1], device=DEVICE) > 0, logits(4).abs() + 1
    expected = run(logits(4, 1100), ids, known, mask=mask, row_scale=scale)
    mask, scale = (torch.stack([x, x.flip(0)], 1)[:, 0] for x in (mask, scale))
    known, ids = (x.T.contiguous().T for x in (known, ids))
    torch.testing.assert_close(run(logits(4, 1100), ids, known, mask=mask, row_scale=scale), expected)


@needs_kernels
@pytest.mark.skipif(ON_GPU, reason="ends the context")
def test_ids_beyond_the_vocabulary():
    """On a GPU an assertion, after which nothing else would run."""
    known, ids = teacher(2, 100, 3)
    ids[1, 2] = 100
    with pytest.raises(RuntimeError, match="below 100"):
        run(logits(2, 100), ids, known)


@needs_kernels
def test_no_rows():
    loss, grad, stats = run(logits(0, 10), torch.empty(0, 3, dtype=torch.long, device=DEVICE), logits(0, 4))
    assert loss.shape == (0,) and grad.shape == (0, 10) and stats.shape == (3, 0)
