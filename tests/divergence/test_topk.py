"""Each implementation of the row op for teachers known in part, called by name, against fp64. N tokens, V vocabulary, k
known entries.
"""

import math

import pytest
import torch
from divergence.criterion import TOPK_PLAIN as PLAIN
from divergence.criterion import assert_entropy_accurate, assert_topk_accurate, in_buckets, spec, topk_spec
from divergence.test_rows import IMPLEMENTATIONS, every_implementation, logits

from effopd_kernels.divergence import ops

every_route = pytest.mark.parametrize("member", ["reverse", "forward", "jsd(0.3)"])


def teacher(N, V, k, seed=1, spread=3.0, tail=True):
    """Log-probabilities of its k likeliest entries, and with a tail of the rest; their ids, in no order."""
    log_p = torch.log_softmax(logits(N, V, torch.float64, spread, seed), -1)
    order = torch.randperm(k, generator=torch.Generator().manual_seed(seed))
    ids = log_p.topk(k).indices[:, order]
    return in_buckets(log_p, ids, tail).float(), ids


def run(
    implementation, student, ids, known, member="reverse", tail=True, knobs=PLAIN, mask=None, row_scale=None, out=None
):
    """(loss, gradient, stats); the gradient's memory is poisoned beforehand. member None: log-probabilities."""
    grad = torch.full(student.shape, math.nan, dtype=student.dtype) if out is None else out
    args = student, ids, known, mask, row_scale, topk_spec(member, tail, knobs), grad, True
    if implementation == "reference":
        loss, stats = ops._topk_reference(*args)
    else:
        loss, stats = ops._topk_cpp(*args, instruction_set=int(implementation[-1]))
    return loss, grad, stats


def check(implementation, student, ids, known, member="reverse", tail=True, knobs=PLAIN):
    loss, grad, _ = run(implementation, student, ids, known, member, tail, knobs)
    assert_topk_accurate((loss, grad), member, student, ids, known, tail, knobs)


@every_implementation
@every_route
@pytest.mark.parametrize("V, k", [(2, 1), (33, 32), (1025, 3), (4097, 500), (50257, 20)])
def test_vocabularies(implementation, member, V, k):
    known, ids = teacher(3, V, k)
    check(implementation, logits(3, V), ids, known, member)
    check(implementation, logits(3, V), ids, known[:, :k], member, tail=False)


@every_implementation
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("knobs", [PLAIN, (0.7, 1.0, 0.0), (1.0, 0.25, 0.0), (2.0, 1.5, 5.0)])
def test_dtypes_temperature_scale_softcap(implementation, dtype, knobs):
    known, ids = teacher(3, 2500, 20)
    check(implementation, logits(3, 2500, dtype), ids, known, "reverse", True, knobs)
    check(implementation, logits(3, 2500, dtype), ids, known[:, :20], "reverse", False, knobs)


@every_implementation
@pytest.mark.parametrize("temperature", [1.0, 2.0, 3.0])
@pytest.mark.parametrize("low", [-1e10, -1e20, torch.finfo(torch.bfloat16).min])
def test_others_that_begin_far_below(implementation, temperature, low):
    """See test_rows.py."""
    student, (known, ids) = logits(3, 2500), teacher(3, 2500, 8)
    student[:, :2048] = low
    ids = 2048 + torch.arange(8) + 0 * ids
    check(implementation, student, ids, known, knobs=(temperature, 1.0, 0.0))
    check(implementation, student, ids[:, :1], None, None, knobs=(temperature, 1.0, 0.0))


@every_implementation
@pytest.mark.parametrize("member", ["reverse", "forward", "jsd(0.3)", None])
def test_nan_far_below_is_not_hidden(implementation, member):
    """See test_rows.py."""
    student, (known, ids) = logits(3, 4097), teacher(3, 4097, 8)
    student[:, :2048] -= 1e4
    student[1, 5] = math.nan
    ids = 2048 + torch.arange(8) + 0 * ids
    loss, _, _ = run(implementation, student, ids[:, : 8 if member else 1], known if member else None, member)
    assert loss.isnan().view(3, -1).any(1).tolist() == [False, True, False]


@every_implementation
@pytest.mark.parametrize("temperature", [0.01, 100.0])
@every_route
def test_extreme_temperatures(implementation, member, temperature):
    known, ids = teacher(3, 1500, 8)
    check(implementation, logits(3, 1500), ids, known, member, True, (temperature, 1.0, 0.0))


@every_implementation
def test_the_others_are_summed_for_themselves(implementation):
    """The known entries hold all of the student but 1e-12, or 1e-40, of which the gradient speaks."""
    student = logits(2, 3000)
    known, ids = teacher(2, 3000, 5)
    student.scatter_(1, ids, torch.tensor([[45.0], [110.0]]).expand(2, 5).contiguous())
    for member in ("reverse", "forward"):
        check(implementation, student, ids, known, member)
    _, grad, _ = run(implementation, student, ids, known, "forward")
    others = torch.ones_like(grad).scatter(1, ids, 0)
    torch.testing.assert_close((grad * others).sum(1), -known[:, -1].exp(), rtol=1e-5, atol=0.0)


@every_implementation
@pytest.mark.parametrize("spread", [100.0, 1000.0])
def test_rows_that_rise(implementation, spread):
    """Each block's logits lie hundreds of bits above all before."""
    known, ids = teacher(3, 5000, 40)
    rising = logits(3, 5000, spread=spread).sort().values
    for student in (rising, rising.flip(1)):
        check(implementation, student, ids, known)
        check(implementation, student, ids, known, "forward")


@every_implementation
def test_log_probability_of_one_entry(implementation):
    student, ids = logits(4, 3001), torch.tensor([[0], [3000], [1024], [7]])
    student[3, 7] = 60.0  # a log-probability of −1e-22, which 1 − p would lose
    for knobs in (PLAIN, (0.7, 1.5, 5.0)):
        loss, grad, _ = run(implementation, student, ids, None, None, knobs=knobs)
        assert_topk_accurate((loss, grad), None, student, ids, None, True, knobs)
    loss, *_ = run(implementation, student, ids, None, None)
    assert -1e-20 < loss[3] < 0


@every_implementation
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_entropy(implementation, dtype):
    """Of flat rows and peaked ones, of a token that has nearly everything, nearly nothing, or all, wherever the largest
    logits lie."""
    student, ids = logits(7, 4097, dtype), torch.tensor([[0], [4096], [1024], [7], [9], [2000], [1500]])
    student[1] = student[1].sort().values * 30
    student[2] *= 0.01
    student[3, 7], student[4, 3000] = 60.0, 60.0
    student[5, torch.arange(4097) != 2000], student[6, torch.arange(4097) != 1500] = -torch.inf, -300.0
    for knobs in (PLAIN, (0.7, 1.5, 5.0)):
        _, _, stats = run(implementation, student, ids, None, None, knobs=knobs)
        assert_entropy_accurate(stats, student, knobs)
    student[0, 1:4097:2], student[1, 0], ids[1] = -torch.inf, -torch.inf, 0  # a token that cannot be, too
    _, _, stats = run(implementation, student, ids, None, None)
    assert_entropy_accurate(stats, student)
    mask = torch.arange(7) % 2 == 0
    student[~mask] = torch.nan
    _, _, masked = run(implementation, student, ids, None, None, mask=mask)
    assert not masked[:, ~mask].any() and torch.equal(masked[:, mask], stats[:, mask])
    lone = logits(2, 1, dtype)
    assert not run(implementation, lone, torch.zeros(2, 1, dtype=torch.long), None, None)[2].any()


@every_implementation
def test_what_is_no_token(implementation):
    """Negative ids take no part, and the entries they might be mistaken for, the first and the last, are others."""
    known, ids = teacher(3, 1500, 6)
    ids[0, 2:], known[0, 2:6], ids[1], known[1, :6] = -1, -torch.inf, -1, -torch.inf
    known = torch.cat([known[:, :6], torch.log1p(-known[:, :6].exp().sum(1, keepdim=True))], 1)
    student = logits(3, 1500)
    check(implementation, student, ids, known)
    (loss, grad, _), few = run(implementation, student, ids, known), (student[:1], ids[:1, :2], known[:1, [0, 1, 6]])
    torch.testing.assert_close((loss[:1], grad[:1]), run(implementation, *few)[:2])


@every_implementation
@pytest.mark.parametrize("spare", [0, 1])
def test_minus_infinity(implementation, spare):
    """Among the known and the others; and no others that have any mass."""
    known, ids = teacher(2, 1100, 5)
    student = logits(2, 1100)
    here = student.gather(1, ids)
    student[:, 100:600] = -torch.inf
    student.scatter_(1, ids, here)
    check(implementation, student, ids, known, "forward")
    student[0, ids[0, 0]] = -torch.inf
    of_buckets = in_buckets(student.log_softmax(1), ids, True), known
    dense = ops._reference(*of_buckets, None, None, spec("forward"), None, False)
    loss, grad, _ = run(implementation, student, ids, known, "forward")
    torch.testing.assert_close(loss, dense[0])
    assert grad.isfinite().all()
    alone = torch.full((2, 1100), -torch.inf).scatter(1, ids, logits(2, 5))
    alone[:, 1050 : 1050 + spare] = 1.0
    loss, grad, _ = run(implementation, alone, ids, known)
    assert loss.isfinite().all() and grad.isfinite().all() and (grad[alone == -torch.inf] == 0).all()


@every_implementation
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_masked_rows_and_weights(implementation, dtype):
    known, ids = teacher(4, 1100, 5)
    student, mask, scale = logits(4, 1100, dtype), torch.tensor([True, False, True, False]), torch.rand(4) + 1
    student[1], known[1], ids[3] = math.nan, math.nan, -1
    loss, grad, stats = run(implementation, student, ids, known, mask=mask, row_scale=scale)
    assert not loss[~mask].any() and not grad[~mask].any() and not stats[:, ~mask].any()
    of_two = run(implementation, student[mask], ids[mask], known[mask])
    torch.testing.assert_close(loss[mask], of_two[0])
    torch.testing.assert_close(stats[:, mask], of_two[2])
    torch.testing.assert_close(grad[mask].float(), of_two[1].float() * scale[mask, None], rtol=2e-2, atol=1e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS[1:])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("softcap", [0.0, 5.0])
def test_in_place_in_sequences_and_at_any_address(implementation, dtype, softcap):
    """The gradient over the logits; rows that lie apart, as those of logits[:, :-1]; starts at every offset."""
    known, ids = teacher(6, 2100, 30)
    whole = logits(8, 2150, dtype).view(2, 4, 2150)
    knobs = (1.0, 1.0, softcap)
    for offset in (0, 1, 7, 16):
        student = whole[:, :3, offset : offset + 2100]
        loss, grad, _ = run(implementation, student.reshape(6, 2100), ids, known, knobs=knobs)
        over = whole.clone()[:, :3, offset : offset + 2100]
        loss2, _, _ = run(implementation, over, ids, known, knobs=knobs, out=over)
        assert torch.equal(loss, loss2) and torch.equal(grad, over.reshape(6, 2100))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS[1:])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stored_past_the_caches(implementation, dtype):
    """As gradients that outgrow them are, from the output's first whole line on."""
    N, V = (64 if dtype == torch.float32 else 128), 40001
    known, ids = teacher(N, V, 4)
    student = logits(N, V, dtype)
    loss, grad, _ = run(implementation, student, ids, known)
    for row in (slice(r, r + 1) for r in range(0, N, 9)):
        loss_alone, grad_alone, _ = run(implementation, student[row], ids[row], known[row])
        assert torch.equal(loss[row], loss_alone)
        torch.testing.assert_close(grad[row], grad_alone, rtol=torch.finfo(dtype).eps, atol=0.0)


@every_implementation
@every_route
@pytest.mark.parametrize("shift", [-500.0, 1000.0, 8192.0])
def test_a_shift_of_all_logits_does_not_matter(implementation, member, shift):
    """Nor do sums of the others start at 0, nor known entries lose digits to where the logits lie."""
    known, ids = teacher(3, 2500, 5)
    check(implementation, logits(3, 2500) + shift, ids, known, member)
    check(implementation, logits(3, 2500) + shift, ids, known[:, :5], member, tail=False)


@every_implementation
def test_known_entries_far_above_the_others(implementation):
    """Keep the digits in which they differ, as no number relative to the others' sum would."""
    known, ids = teacher(3, 2500, 5)
    student = logits(3, 2500, spread=1.0).scatter_add(1, ids, torch.full((3, 5), 3000.0))
    options = {"ids": ids, "known": known, "knobs": (0.7, 1.0, 0.0)}
    loss, grad, _ = run(implementation, student, **options)
    exact = run("reference", student.double(), **options)
    torch.testing.assert_close(loss.double(), exact[0], rtol=1e-6, atol=0.0)
    torch.testing.assert_close(grad.double().gather(1, ids), exact[1].gather(1, ids), rtol=1e-4, atol=0.0)


@every_implementation
def test_a_step_of_200_nats(implementation):
    """2^288 is none of fp32: where the exponent wrapped it would pass for a small negative number."""
    known, ids = teacher(3, 2500, 5)
    student = logits(3, 2500)
    student[:, 1024:2048] += torch.tensor([[200.0], [400.0], [700.0]])
    check(implementation, student, ids, known, "forward")


@every_implementation
def test_log_probability_of_an_unlikely_entry_and_its_upstream(implementation):
    """Whose odds leave fp64."""
    student, ids, scale = logits(2, 3001), torch.tensor([[5], [0]]), torch.tensor([3.0, -0.5])
    student[0, 2000] = 2000.0
    loss, grad, _ = run(implementation, student, ids, None, None)
    assert_topk_accurate((loss, grad), None, student, ids, None)
    _, scaled, _ = run(implementation, student, ids, None, None, row_scale=scale)
    torch.testing.assert_close(scaled, grad * scale[:, None])


@every_implementation
def test_more_known_entries_than_a_block(implementation):
    known, ids = teacher(2, 4097, 3000)
    check(implementation, logits(2, 4097), ids, known, "jsd(0.3)")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("garbage", [1e6, math.inf, math.nan])
def test_without_a_tail_the_others_do_not_matter(implementation, garbage):
    known, ids = teacher(3, 1500, 5, tail=False)
    student = logits(3, 1500)
    expected = run(implementation, student, ids, known, tail=False)
    student[torch.ones_like(student, dtype=torch.bool).scatter(1, ids, False)] = garbage
    torch.testing.assert_close(run(implementation, student, ids, known, tail=False), expected)


@every_implementation
def test_strided_teachers_and_ids(implementation):
    known, ids = teacher(4, 1100, 5)
    mask, scale = torch.tensor([True, False, True, True]), torch.rand(4)
    expected = run(implementation, logits(4, 1100), ids, known, mask=mask, row_scale=scale)
    mask, scale = (torch.stack([x, x.flip(0)], 1)[:, 0] for x in (mask, scale))
    known, ids = (x.T.contiguous().T for x in (known, ids))
    found = run(implementation, logits(4, 1100), ids, known, mask=mask, row_scale=scale)
    torch.testing.assert_close(found, expected)


@every_implementation
def test_sequences_that_lie_apart_and_a_gradient_that_does_not(implementation):
    known, ids = teacher(6, 1100, 5)
    student = logits(8, 1150).view(2, 4, 1150)[:, :3, 3:1103]
    loss, grad, _ = run(implementation, student, ids, known)
    expected = run(implementation, student.reshape(6, 1100), ids, known)
    torch.testing.assert_close((loss, grad.view(6, 1100)), expected[:2])


def test_repeated_ids():
    ids = torch.tensor([[3, 5, -1, -1], [5, 3, 7, 8]])
    assert ops.repeated_id(ids, 9) == -1 and ops.repeated_id(ids.expand(2, 2, 4)[0], 9) == -1
    ids[1, 3] = 5
    assert ops.repeated_id(ids, 9) == 5


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS[1:])
def test_ids_beyond_the_vocabulary(implementation):
    """Of which compiled code learns only here."""
    known, ids = teacher(2, 100, 3)
    ids[1, 2] = 100
    with pytest.raises(IndexError, match="below 100, got 100"):
        run(implementation, logits(2, 100), ids, known)


def test_no_rows():
    nothing = torch.empty(0, 10)
    for implementation in IMPLEMENTATIONS:
        loss, grad, stats = run(implementation, nothing, torch.empty(0, 3, dtype=torch.long), torch.empty(0, 4))
        assert loss.shape == (0,) and grad.shape == (0, 10) and stats.shape == (3, 0)
