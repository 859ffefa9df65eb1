"""Teachers known in part. N tokens, V vocabulary, k known entries."""

import oracle
import pytest
import torch

from effopd_kernels.divergence import (
    FORWARD_KL,
    REVERSE_KL,
    divergence_loss,
    jsd,
    linear_divergence_loss,
    linear_rows,
    linear_token_logprobs,
    partial,
    sampled_kl,
    topk_divergence_loss,
)

N, V, D = 6, 97, 8
MEMBERS = {"reverse": REVERSE_KL, "forward": FORWARD_KL, "jsd(0.3)": jsd(0.3)}
every_member = pytest.mark.parametrize("member", MEMBERS)


def random(*shape, seed=0, spread=2.0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype) * spread


@pytest.fixture
def projected(monkeypatch):
    """How many rows each product with the head has had."""
    rows, project = [], linear_rows.project
    monkeypatch.setattr(linear_rows, "project", lambda out, *rest: (rows.append(len(out)), project(out, *rest)))
    return rows


def teacher(k, seed=1, dtype=torch.float64):
    log_p = torch.log_softmax(random(N, V, seed=seed), -1)
    known, ids = log_p.topk(k)
    return log_p, known.to(dtype), ids


def buckets(log_q, ids):
    rest = torch.ones_like(log_q).scatter(1, ids, 0)
    tail = (log_q.exp() * rest).sum(1, keepdim=True).log()
    return torch.cat([log_q.gather(1, ids), tail], 1)


@every_member
@pytest.mark.parametrize("k", [1, 5, V - 1])
def test_topk_compares_k_plus_1_outcomes(member, k):
    log_p, known, ids = teacher(k)
    student = random(N, V)
    expected = oracle.value_and_grad(
        lambda x: oracle.FAMILY[member](buckets(oracle.log_probs(x, 0.7), ids), buckets(log_p, ids)).mean(), student
    )
    leaf = student.clone().requires_grad_()
    loss = topk_divergence_loss(leaf, known, ids, MEMBERS[member], temperature=0.7)
    loss.backward()
    torch.testing.assert_close((loss, leaf.grad), expected)


@every_member
def test_topk_of_everything_is_the_full_divergence(member):
    log_p, known, ids = teacher(V)
    student = random(N, V)
    leaf, full = (student.clone().requires_grad_() for _ in range(2))
    loss, expected = (
        topk_divergence_loss(leaf, known, ids, MEMBERS[member], temperature=0.7, student_logit_scale=1.4),
        divergence_loss(full * 1.4, log_p, MEMBERS[member], temperature=0.7, teacher_temperature=1.0),
    )
    torch.testing.assert_close(loss, expected)
    loss.backward(), expected.backward()
    torch.testing.assert_close(leaf.grad, full.grad)


def test_topk_of_everything_with_a_soft_cap_or_little_support():
    student, log_p = random(N, V), teacher(V)[0]
    log_p[:, 5:] = -torch.inf
    known, ids = log_p.log_softmax(-1).topk(V)
    for softcap, capped in ((None, student), (2.0, 2 * torch.tanh(student / 2))):
        found = topk_divergence_loss(student, known, ids, student_softcap=softcap)
        torch.testing.assert_close(found, divergence_loss(capped, log_p))


@every_member
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_topk_is_a_divergence(member, dtype):
    """Never negative and no more than the full one, even for teachers whose k entries hold all mass but rounding."""
    for spread in (0.1, 3.0, 40.0):
        t = random(N, V, seed=1, spread=spread, dtype=torch.float32)
        known, ids = torch.log_softmax(t, -1).topk(5)
        for student in (t, random(N, V, seed=2, spread=spread, dtype=torch.float32)):
            loss = topk_divergence_loss(student.to(dtype), known, ids, MEMBERS[member], reduction="none")
            full = divergence_loss(student.to(dtype), t, MEMBERS[member], reduction="none")
            # the tail's floor of 2⁻²⁴ may cost this much; fp32 may leave a zero this far below itself
            assert (loss >= -1e-6).all() and (loss <= full + 1e-4).all() and loss.isfinite().all()


@every_member
@pytest.mark.parametrize("tail", [True, False])
def test_entries_at_minus_infinity_are_no_tokens(member, tail):
    """Ragged lists are padded with them, under any id; one token here has no entry at all."""
    _, known, ids = teacher(5)
    known[0, 3:], ids[0, 3:] = -torch.inf, torch.tensor([-100, V + 7])
    known[1, 1:], ids[1, 1:] = -torch.inf, ids[1, 0]
    known[2], ids[2] = -torch.inf, 0
    student, weight = random(N, D), random(V, D)
    for rows, k in ((slice(0, 1), 3), (slice(1, 2), 1), (slice(3, N), 5)):
        found, expected = student[rows].clone().requires_grad_(), student[rows].clone().requires_grad_()
        loss = topk_divergence_loss(found, known[rows], ids[rows], MEMBERS[member], student_weight=weight, tail=tail)
        alone = topk_divergence_loss(expected @ weight.T, known[rows, :k], ids[rows, :k], MEMBERS[member], tail=tail)
        (loss + alone).backward()
        torch.testing.assert_close((loss, found.grad), (alone, expected.grad))
    if tail:  # with nothing known, nothing is compared
        nothing = random(1, V).requires_grad_()
        loss = topk_divergence_loss(nothing, known[2:3], ids[2:3], MEMBERS[member])
        loss.backward()
        assert loss.abs() < 1e-12 and nothing.grad.abs().max() < 1e-12


def test_padding_is_no_token_twice():
    student, known, ids = random(1, 300), torch.tensor([[-0.1, -torch.inf, -torch.inf]]), torch.tensor([[5, 5, 5]])
    expected = topk_divergence_loss(student, known[:, :1], ids[:, :1])
    torch.testing.assert_close(topk_divergence_loss(student, known, ids), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_student_that_has_only_the_k(dtype):
    """As constrained decoding leaves it: the others' bucket is empty, and its gradient 0, not 0/0."""
    student = random(3, 8).to(dtype)
    student[0, 3:] = -torch.inf
    ids, teacher = torch.arange(3).expand(3, 3), random(3, 8, seed=1).log_softmax(-1)[:, :3].to(dtype)
    leaf = student.clone().requires_grad_()
    loss = topk_divergence_loss(leaf, teacher, ids)
    loss.backward()
    assert loss.isfinite() and leaf.grad.isfinite().all() and (leaf.grad[0, 3:] == 0).all()
    # the same through a head that leaves the logits as they are
    hidden, head = student.nan_to_num(neginf=-1e9).requires_grad_(), torch.eye(8, dtype=dtype)
    topk_divergence_loss(hidden, teacher, ids, student_weight=head).backward()
    torch.testing.assert_close(leaf.grad[1:], hidden.grad[1:])


def test_topk_without_tail_renormalises():
    log_p, known, ids = teacher(5)
    student = random(N, V)
    loss = topk_divergence_loss(student, known, ids, tail=False)
    torch.testing.assert_close(loss, divergence_loss(student.gather(1, ids), log_p.gather(1, ids)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_topk_from_hidden_states(dtype):
    _, known, ids = teacher(5, dtype=torch.float32)
    mask = torch.arange(N) != 2
    tensors = [random(N, D, seed=3).to(dtype), random(V, D, seed=4, spread=0.5).to(dtype), random(V, seed=5).to(dtype)]
    a, b = ([x.clone().requires_grad_() for x in tensors] for _ in range(2))
    options = {"temperature": 0.9, "student_softcap": 4.0, "student_logit_scale": 0.8}
    loss = topk_divergence_loss(
        a[0], known, ids.int(), student_weight=a[1], student_bias=a[2], chunk_bytes=V * 40, mask=mask, **options
    )
    expected = topk_divergence_loss(oracle.logits(*b), known, ids, mask=mask, **options)
    loss.backward(), expected.backward()
    tolerance = {} if dtype == torch.float64 else {"rtol": 2e-2, "atol": 2e-3}
    torch.testing.assert_close(loss, expected, **tolerance)
    torch.testing.assert_close([x.grad for x in a], [x.grad for x in b], **tolerance)


def test_token_logprobs():
    ids = torch.randint(V, (2, 3), generator=torch.Generator().manual_seed(0))
    tensors = [random(2, 3, D, seed=3), random(V, D, seed=4, spread=0.5), random(V, seed=5)]
    upstream = random(2, 3, seed=6)
    expected = oracle.value_and_grad(
        lambda h, w, b: (
            oracle.log_probs(oracle.logits(h, w, b), 0.9, 0.8, 4.0).gather(-1, ids[..., None])[..., 0] * upstream
        ),
        *tensors,
    )
    leaves = [x.clone().requires_grad_() for x in tensors]
    options = {"bias": leaves[2], "temperature": 0.9, "logit_scale": 0.8, "softcap": 4.0, "chunk_bytes": V * 40}
    found = linear_token_logprobs(*leaves[:2], ids.int(), **options)
    (found * upstream).sum().backward()
    torch.testing.assert_close((found * upstream, *(x.grad for x in leaves)), expected)
    assert torch.autograd.gradcheck(lambda h, w: linear_token_logprobs(h, w, ids), leaves[:2])


@pytest.mark.parametrize("masked", [False, True])
def test_token_logprobs_and_the_entropy_around_them(masked):
    """From the same chunks; a constant, that leaves the log-probabilities and their gradients what they are."""
    ids = torch.arange(N).view(2, 3)
    leaves = [x.requires_grad_() for x in (random(2, 3, D, seed=3), random(V, D, seed=4), random(V, seed=5))]
    knobs = {"bias": leaves[2], "temperature": 0.9, "logit_scale": 0.8, "softcap": 4.0, "chunk_bytes": V * 40}
    mask = (ids % 3 != 1) if masked else None
    found, entropy = linear_token_logprobs(*leaves[:2], ids, mask=mask, return_entropy=True, **knobs)
    alone = linear_token_logprobs(*leaves[:2], ids, mask=mask, **knobs)
    expected = oracle.entropy(oracle.log_probs(oracle.logits(*leaves), 0.9, 0.8, 4.0))
    assert not entropy.requires_grad
    torch.testing.assert_close(entropy, expected.detach() if mask is None else expected.detach() * mask)
    assert torch.equal(found, alone)
    assert all(map(torch.equal, *(torch.autograd.grad(x.square().sum(), leaves) for x in (found, alone))))


@pytest.mark.parametrize("num_valid", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_token_logprobs_of_masked_tokens_are_zero(frozen, num_valid, projected):
    """Whatever they hold and whatever comes from upstream; they are not projected."""
    kept, ids = (torch.arange(N) % 3 != 1).view(2, 3), torch.arange(N).view(2, 3)
    head = random(V, D, seed=4).requires_grad_(not frozen)
    clean = random(2, 3, D).requires_grad_()
    masked = clean.detach().masked_fill(~kept[..., None], torch.nan).requires_grad_()
    upstream = random(2, 3, seed=5)
    expected = linear_token_logprobs(clean, head, ids).where(kept, torch.zeros(()))
    projected.clear()
    promise = {"num_valid": int(kept.sum())} if num_valid else {}
    found = linear_token_logprobs(masked, head, ids.masked_fill(~kept, -100), mask=kept, **promise)
    torch.testing.assert_close(found, expected)
    trained = [] if frozen else [head]
    grads = torch.autograd.grad(found, [masked, *trained], upstream.masked_fill(~kept, torch.nan))
    assert projected == [int(kept.sum())]
    torch.testing.assert_close(grads, torch.autograd.grad(expected, [clean, *trained], upstream))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_per_token_gradients_of_a_frozen_head_err_no_more_than_eager_s(dtype):
    """On average over the tokens, and but for one more rounding in fp32: what comes from upstream, here of many sizes,
    is multiplied last, but for fp16."""
    tokens, V, D = 64, 1000, 32
    ids, hidden, head = torch.arange(tokens), random(tokens, D).to(dtype), random(V, D, seed=1, spread=0.2).to(dtype)
    upstream = (10 ** random(tokens, seed=2).clamp(-2, 2)).to(dtype)

    def grad(logprobs, hidden, head):
        rows = logprobs(leaf := hidden.clone().requires_grad_(), head, ids)
        return torch.autograd.grad(rows, leaf, upstream.to(rows.dtype))[0].double()

    def eager(hidden, head, ids):
        return torch.log_softmax(hidden @ head.T, -1).gather(-1, ids[:, None])[:, 0]

    exact = grad(eager, hidden.double(), head.double())
    ours, theirs = (
        (grad(logprobs, hidden, head) - exact).norm(dim=-1) / exact.norm(dim=-1)
        for logprobs in (linear_token_logprobs, eager)
    )
    assert ours.mean() <= theirs.mean() + torch.finfo(torch.float32).eps


def test_sampled_estimators_agree_in_expectation():
    """Averaged over the student's tokens, k1 and k3 are the divergence, and k2's gradient is the divergence's."""
    student, log_p = random(N, V).requires_grad_(), teacher(V)[0]
    log_q = torch.log_softmax(student, -1)
    q = log_q.detach().exp()
    exact = oracle.reverse_kl(oracle.log_probs(student), log_p)
    for estimator in ("k1", "k3"):
        torch.testing.assert_close((q * sampled_kl(log_q, log_p, estimator)).sum(-1), exact)
    (expected,) = torch.autograd.grad(exact.sum(), student)
    (found,) = torch.autograd.grad((q * sampled_kl(log_q, log_p, "k2")).sum(), student)
    torch.testing.assert_close(found, expected)
    assert (sampled_kl(log_q, log_p, "k3") >= 0).all() and (sampled_kl(log_q, log_p, "k2") >= 0).all()


def test_sampled_kl_is_in_fp32_and_the_teacher_a_constant():
    q, p = (random(N, seed=seed).bfloat16().requires_grad_() for seed in (0, 1))
    estimates = sampled_kl(q, p)
    estimates.sum().backward()
    assert estimates.dtype == torch.float32 and q.grad is not None and p.grad is None


def test_sampled_kl_of_linear_logprobs_estimates_the_linear_loss():
    """Monte Carlo: within four standard errors of the full divergence."""
    hidden, weight = random(1, D, seed=3), random(V, D, seed=4, spread=0.3)
    t_hidden, t_weight = random(1, D, seed=5), random(V, D, seed=6, spread=0.3)
    full = linear_divergence_loss(hidden, weight, t_hidden, t_weight)
    q = oracle.log_probs(oracle.logits(hidden, weight)).exp()[0]
    ids = torch.multinomial(q, 4000, replacement=True, generator=torch.Generator().manual_seed(0))
    log_q = linear_token_logprobs(hidden.expand(4000, D), weight, ids)
    log_p = linear_token_logprobs(t_hidden.expand(4000, D), t_weight, ids)
    for estimator in ("k1", "k3"):
        samples = sampled_kl(log_q, log_p, estimator)
        assert (samples.mean() - full).abs() < 4 * samples.std() / 4000**0.5


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("k", [3, V])
@pytest.mark.parametrize("garbage", [torch.nan, torch.inf])
def test_what_masked_tokens_hold_does_not_matter(garbage, k, softcap):
    """Student, teacher and ids alike; the gradients are those of the other tokens."""
    head, kept = random(V, D, seed=4), torch.arange(N) != 2
    _, known, ids = teacher(k)
    ids[~kept], known[~kept] = -100, garbage

    def loss_and_grads(rows, weight, mask):
        leaves = [x.clone().requires_grad_() for x in (rows, weight) if x is not None]
        options = {"student_weight": leaves[-1], "chunk_bytes": 4000} if weight is not None else {}
        t = (known, ids) if mask is not None else (known[kept], ids[kept])
        loss = topk_divergence_loss(leaves[0], *t, student_softcap=softcap, mask=mask, **options)
        return loss, *torch.autograd.grad(loss, leaves)

    for student, weight in ((random(N, V), None), (random(N, D), head)):
        student[~kept] = garbage
        loss, grad, *rest = loss_and_grads(student, weight, kept)
        assert (grad[~kept] == 0).all()
        torch.testing.assert_close((loss, grad[kept], *rest), loss_and_grads(student[kept], weight, None))


def test_what_masked_tokens_hold_does_not_matter_where_the_mask_cannot_be_read():
    """As an argument of a function that torch.func differentiates, while the teacher is not."""
    _, known, ids = teacher(3)
    slope = torch.func.grad(lambda student, mask: topk_divergence_loss(student, known, ids, mask=mask))
    student, kept = random(N, V), torch.arange(N) != 2
    expected = slope(student, kept)
    known[2], ids[2] = 9.0, V + 7
    assert torch.equal(slope(student, kept), expected)


@pytest.mark.parametrize("count", [0, 2, N])
def test_masked_tokens_leave_before_the_work(count, projected):
    """From hidden states they are not projected; and where there is a result per token, theirs is zero."""
    _, known, ids = (x.view(2, 3, -1) for x in teacher(5))
    student, weight = random(2, 3, V).requires_grad_(), random(2, 3).exp()
    kept = (torch.arange(N) < count).view(2, 3).flip(1)
    for head in (None, random(V, V, seed=4)):
        options = {"weight": weight, "student_weight": head}

        def results(mask, loss, stats):
            (grad,) = torch.autograd.grad((loss * mask * random(2, 3, seed=7)).sum(), student)
            return loss * mask, *(x * mask for x in stats), grad

        found = topk_divergence_loss(student, known, ids, mask=kept, reduction="none", return_stats=True, **options)
        of_found = results(torch.ones(2, 3), *found)
        assert sum(projected) == (0 if head is None else count)  # the gradient, of a frozen head, is ready
        expected = topk_divergence_loss(student, known, ids, reduction="none", return_stats=True, **options)
        torch.testing.assert_close(of_found, results(kept, *expected))
        projected.clear()
        mean = topk_divergence_loss(student, known, ids, mask=kept, **options)
        torch.testing.assert_close(mean, (expected[0] * kept).sum() / (weight * kept).sum().clamp(min=1e-9))
        promised = topk_divergence_loss(student, known, ids, mask=kept, num_valid=count, **options)
        torch.testing.assert_close(promised, mean)
        assert sum(projected) == (0 if head is None else 2 * count)  # no more for the gradient of a mean
        projected.clear()


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("num_valid", [0, 2, 4, N + 1])
def test_a_promised_number_of_tokens_stands_for_a_look_at_the_mask(num_valid, reduction, monkeypatch):
    """As on a GPU, which a look would wait for; more are promised than there are, but for the exact number."""
    _, known, ids = teacher(5)
    kept = (torch.arange(N) % 3 == 1) & (num_valid > 0)
    results = []
    for head in (None, random(V, D, seed=4)):
        student = random(N, V if head is None else D)
        student[~kept], known[~kept], ids[~kept] = torch.nan, torch.nan, -100
        options = {"student_weight": head, "weight": random(N).exp(), "mask": kept, "reduction": reduction}
        for look in (True, False):
            with monkeypatch.context() as patch:
                if not look:
                    patch.setattr(partial, "readable", lambda tensor: False)
                leaf = student.clone().requires_grad_()
                loss, stats = topk_divergence_loss(
                    leaf, known, ids, return_stats=True, **options, **({} if look else {"num_valid": num_valid})
                )
                results.append((loss, *stats, *torch.autograd.grad(loss.sum(), leaf)))
    torch.testing.assert_close(results[1::2], results[::2])


def test_promised_tokens_in_chunks_and_the_head_s_gradient():
    """More than there are: the absent ones stand in chunks of their own, on hidden states that are NaN."""
    _, known, ids = teacher(5)
    kept = torch.arange(N) % 3 == 1
    hidden, head = random(N, D), random(V, D, seed=4)
    hidden[~kept], known[~kept], ids[~kept] = torch.nan, torch.nan, -100
    results = []
    for options in ({}, {"num_valid": 5, "chunk_bytes": V * 8}):
        leaves = [x.clone().requires_grad_() for x in (hidden, head)]
        loss, stats = topk_divergence_loss(
            leaves[0], known, ids, student_weight=leaves[1], mask=kept, reduction="none", return_stats=True, **options
        )
        results.append((loss, *stats, *torch.autograd.grad(loss.sum(), leaves)))
    torch.testing.assert_close(results[1], results[0])


@pytest.mark.parametrize("call", ["topk", "token"])
def test_chunks_are_as_large_as_chunk_bytes(call, projected):
    _, known, ids = teacher(5)
    options = {"chunk_bytes": 2 * V * 8}  # two rows of logits in fp64
    if call == "topk":
        topk_divergence_loss(random(N, D), known, ids, student_weight=random(V, D), **options)
    else:
        linear_token_logprobs(random(N, D), random(V, D), ids[:, 0], **options)
    assert projected == [2] * (N // 2)


def test_absent_tokens_leave_the_first_alone():
    """Whose index those repeat that were promised but are not there."""
    _, known, ids = teacher(5)
    options = {"student_weight": random(V, D), "mask": torch.arange(N) < 2, "reduction": "none"}
    found = topk_divergence_loss(random(N, D), known, ids, num_valid=4, **options)
    assert found[0] > 0
    torch.testing.assert_close(found, topk_divergence_loss(random(N, D), known, ids, **options))


def test_the_teacher_s_tail():
    """What the k leave, from their own digits, fp64 or not; and at least 2⁻²⁴."""
    student = random(1, V)
    for known in (torch.tensor([[0.0]]), torch.tensor([[-1e-5]]).log1p(), torch.tensor([[-1e-6]], dtype=torch.float64)):
        log_q = buckets(oracle.log_probs(student), torch.tensor([[7]]))
        rest = (-torch.expm1(known.double())).clamp(min=2.0**-24).log()
        log_p = torch.cat([known.double(), rest], 1).log_softmax(1)
        found = topk_divergence_loss(student, known, torch.tensor([[7]]))
        torch.testing.assert_close(found, oracle.reverse_kl(log_q, log_p).mean(), rtol=1e-12, atol=0.0)
    known = torch.log_softmax(random(1, 20, dtype=torch.float32), -1) - 1e-6
    found, exact = (topk_divergence_loss(random(1, V), x, torch.arange(20)[None]) for x in (known, known.double()))
    torch.testing.assert_close(found, exact, rtol=1e-12, atol=0.0)


def test_no_tokens_at_all():
    hidden, head = random(2, 0, D).requires_grad_(), random(V, D).requires_grad_()
    ids = torch.zeros(2, 0, 3, dtype=torch.long)
    loss = topk_divergence_loss(hidden, random(2, 0, 3), ids, student_weight=head)
    logprobs = linear_token_logprobs(hidden, head, ids[..., 0])
    assert loss == 0 and logprobs.shape == (2, 0)
    for value in (loss, logprobs.sum()):
        grads = torch.autograd.grad(value, (hidden, head))
        assert grads[0].shape == hidden.shape and torch.equal(grads[1], torch.zeros_like(head))


def topk(**options):
    return topk_divergence_loss(random(N, V), *teacher(3)[1:], **options)


@pytest.mark.parametrize("supported", [0, 1])
def test_a_token_without_known_entries_is_its_tail(supported):
    """Whose only outcome has probability 1 for both, whatever the student supports."""
    student = torch.full((1, 3), -torch.inf)
    student[0, supported] = 0.5
    student.requires_grad_()
    loss = topk_divergence_loss(student, torch.tensor([[-torch.inf]]), torch.tensor([[2]]))
    assert loss == 0 and not torch.autograd.grad(loss, student)[0].any()


def test_topk_refuses_before_it_projects(monkeypatch):
    def project(*_):
        raise AssertionError("projected")

    monkeypatch.setattr(linear_rows, "project", project)
    for wrong in ({"reduction": "average"}, {"mask": torch.ones(N + 1, dtype=torch.bool)}, {"divergence": "jsd"}):
        with pytest.raises((ValueError, TypeError), match=next(iter(wrong))):
            topk(student_weight=random(V, V), **wrong)


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: topk_divergence_loss(random(N, V), random(N, 3), torch.zeros(N, 2, dtype=torch.long)), "(6, 3)"),
        (lambda: topk_divergence_loss(random(N, V), random(N, V + 1), torch.zeros(N, V + 1).long()), "k <= 97"),
        (lambda: topk_divergence_loss(random(N, V), random(5, 3), torch.zeros(5, 3).long()), "(5, 3)"),
        (lambda: topk_divergence_loss(random(N, V), random(N, 3), torch.zeros(N, 3)), "int64"),
        (
            lambda: linear_token_logprobs(random(N, D), random(V, 9), torch.zeros(N).long()),
            "hidden (..., D) and weight",
        ),
        (lambda: linear_token_logprobs(random(N, D), random(V, D), torch.zeros(5).long()), "(6,)"),
        (lambda: topk_divergence_loss(random(N, V), random(N, 3), torch.full((N, 3), V)), "0 to 96, got 97"),
        (lambda: linear_token_logprobs(random(N, D), random(V, D), torch.full((N,), -100)), "got -100; mask what"),
        (
            lambda: topk_divergence_loss(random(N, V), teacher(3)[1], teacher(3)[2] + V),
            "what the student lacks has log-probability −inf",
        ),
        (
            lambda: topk_divergence_loss(
                random(2, V), torch.tensor([[-1.0], [-torch.inf]]), torch.zeros(2, 1).long(), tail=False
            ),
            "got none in token 1",
        ),
        (lambda: linear_token_logprobs(random(N, D), random(V, D), torch.arange(N), temperature=0), "temperature"),
        (lambda: linear_token_logprobs(random(N, D), random(V, D), torch.arange(N), softcap=-1), "softcap"),
        (lambda: linear_token_logprobs(random(N, D), random(V, D), torch.arange(N), chunk_bytes=-1), "chunk_bytes"),
        (lambda: topk_divergence_loss(random(N, V), torch.full((N, 3), 0.4), torch.arange(3).expand(N, 3)), "of 4.48"),
        (
            lambda: topk_divergence_loss(random(1, V), random(1, 3) - 9, torch.tensor([[5, 96, 5]])),
            "got 5 more than once",
        ),
        (lambda: topk_divergence_loss(random(1, 1, V), random(1, 1, V) - 9, torch.ones(1, 1, V).long()), "got 1 more"),
        (lambda: topk_divergence_loss(random(N, V), random(N, 1), [0] * N), "teacher_ids must be a tensor, got list"),
        (lambda: linear_token_logprobs([0.0], random(V, D), torch.arange(N)), "hidden must be a tensor, got list"),
        (lambda: topk(student_bias=random(V)), "student_bias"),
        (lambda: topk(student_logit_scale=0.0), "student_logit_scale must be positive"),
        (lambda: topk(student_weight=random(V, V), chunk_bytes=0), "chunk_bytes"),
        (lambda: topk(student_weight=torch.ones(())), "student_hidden (..., D) and student_weight (V, D) do not fit"),
        (lambda: topk(num_valid=3), "num_valid is the number of tokens that mask keeps"),
        (lambda: topk(mask=torch.ones(N, dtype=torch.bool), num_valid=5), "num_valid is 5 but mask keeps 6"),
        (lambda: topk(mask=torch.ones(N, dtype=torch.bool), num_valid=6.0), "num_valid must be an int, got 6.0"),
        (lambda: topk(teacher_temperature=2.0), "teacher_temperature"),
        (lambda: topk(inplace=True), "inplace"),
        (
            lambda: linear_token_logprobs(
                random(N, D), random(V, D), torch.arange(N), mask=torch.ones(N, dtype=torch.bool), num_valid=3
            ),
            "num_valid is 3 but mask keeps 6",
        ),
        (lambda: sampled_kl(random(3), random(4)), "(4,)"),
        (lambda: sampled_kl(random(3), random(3), "k4"), "k4"),
        (lambda: sampled_kl(random(3), [0.0] * 3), "teacher_logprobs must be a tensor, got list"),
        (lambda: sampled_kl([0.0] * 3, random(3)), "student_logprobs must be a tensor, got list"),
    ],
)
def test_errors_name_what_does_not_fit(call, words):
    with pytest.raises((ValueError, TypeError)) as error:
        call()
    assert words in str(error.value)


def test_a_token_by_itself():
    student, (logprobs, ids) = torch.randn(7), torch.randn(7).log_softmax(-1).topk(3)
    one = (x[None] for x in (student, logprobs, ids))
    assert torch.equal(topk_divergence_loss(student, logprobs, ids), topk_divergence_loss(*one))
