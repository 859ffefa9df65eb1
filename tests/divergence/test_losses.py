"""The public losses, from logits and from hidden states, against fp64. N tokens, V vocabulary, D hidden size."""

import math

import oracle
import pytest
import torch
from divergence.criterion import MEMBERS, spec
from hypothesis import given, settings
from hypothesis import strategies as st

from effopd_kernels.divergence import (
    FORWARD_KL,
    REVERSE_KL,
    Divergence,
    divergence_loss,
    head_products,
    jsd,
    linear_divergence_loss,
    linear_reverse_kl_loss,
    reference,
    reverse_kl_loss,
    skew_forward_kl,
    skew_reverse_kl,
)

every_member = pytest.mark.parametrize("member", MEMBERS)


def random(*shape, seed=0, spread=2.0, dtype=torch.float32):
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * spread).to(dtype)


class Heads:
    """A student and a teacher that differ in everything they may differ in."""

    def __init__(self, shape=(3, 5), V=157, dtype=torch.float32, teacher_dtype=None):
        teacher_dtype = teacher_dtype or dtype
        self.student = random(*shape, 12, seed=1, dtype=dtype), random(V + 3, 12, seed=2, spread=0.5, dtype=dtype)
        self.bias = random(V + 3, seed=3, dtype=dtype)
        self.teacher = (
            random(*shape, 8, seed=4, dtype=teacher_dtype),
            random(V, 8, seed=5, spread=0.5, dtype=teacher_dtype),
        )
        self.teacher_bias = random(V, seed=6, dtype=teacher_dtype)
        self.mask = torch.rand(shape, generator=torch.Generator().manual_seed(7)) > 0.4
        self.weight = torch.rand(shape, generator=torch.Generator().manual_seed(8))
        self.options = {
            "teacher_bias": self.teacher_bias,
            "student_logit_scale": 0.7,
            "teacher_logit_scale": 1.3,
            "student_softcap": 4.0,
            "teacher_softcap": 9.0,
            "temperature": 0.8,
            "teacher_temperature": 1.1,
        }

    def inputs(self):
        return [x.clone().requires_grad_() for x in (*self.student, self.bias)]

    def definition(self, member, reduce):
        """reduce((...) divergence) and gradients, in fp64."""
        V = len(self.teacher_bias)

        def value(hidden, weight, bias):
            log_q = oracle.log_probs(oracle.logits(hidden, weight, bias)[..., :V], 0.8, 0.7, 4.0)
            t = oracle.logits(self.teacher[0].double(), self.teacher[1].double(), self.teacher_bias.double())
            return reduce(oracle.FAMILY[member](log_q, oracle.log_probs(t, 1.1, 1.3, 9.0)))

        return oracle.value_and_grad(value, *self.student, self.bias)


def reductions(mask, weight):
    kept = torch.where(mask, weight, 0).double()
    return {
        "mean": (lambda d: (d * kept).sum() / kept.sum(), {}),
        "num_tokens": (lambda d: (d * kept).sum() / 11, {"num_tokens": torch.tensor(11)}),
        "sum": (lambda d: (d * kept).sum(), {"reduction": "sum"}),
        "none": (lambda d: d * kept, {"reduction": "none"}),
    }


def assert_all_close(found, expected, rtol=1e-4, atol=1e-5):
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f.double(), e, rtol=rtol, atol=atol)


def test_the_family_is_three_numbers():
    assert jsd(0.25) == Divergence(0.25, 0.75, 0.25)
    assert skew_reverse_kl(0.0) == REVERSE_KL and skew_forward_kl(0.0) == FORWARD_KL
    bad_ones = (jsd, 0.0), (jsd, 1.0), (skew_forward_kl, 1.0), (skew_reverse_kl, 1.5), (skew_reverse_kl, "0.1")
    for build, bad in bad_ones:
        with pytest.raises(ValueError, match=f"{build.__name__} needs 0.*< 1, got {bad!r}"):
            build(bad)
    with pytest.raises(ValueError):
        Divergence(-1, 0, 0)


@every_member
@pytest.mark.parametrize("reduction", ["mean", "num_tokens", "sum", "none"])
@pytest.mark.parametrize("inplace", [False, True])
def test_from_logits(member, reduction, inplace):
    heads = Heads()
    student, teacher = random(3, 5, 160), random(3, 5, 157, seed=1)
    reduce, options = reductions(heads.mask, heads.weight)[reduction]
    expected = oracle.value_and_grad(
        lambda x: reduce(
            oracle.FAMILY[member](oracle.log_probs(x[..., :157], 0.8), oracle.log_probs(teacher.double(), 1.1))
        ),
        student,
    )
    leaf = student.clone().requires_grad_()
    loss = divergence_loss(
        leaf * 1, teacher, MEMBERS[member], mask=heads.mask, weight=heads.weight, temperature=0.8,
        teacher_temperature=1.1, inplace=inplace, **options,
    )  # fmt: skip
    loss.sum().backward()
    assert_all_close((loss, leaf.grad), expected)


@every_member
@pytest.mark.parametrize("reduction", ["mean", "num_tokens", "sum", "none"])
@pytest.mark.parametrize("chunk_bytes", [None, 9000])
@pytest.mark.parametrize("num_valid", [False, True])
def test_from_hidden_states(member, reduction, chunk_bytes, num_valid):
    heads = Heads()
    reduce, options = reductions(heads.mask, heads.weight)[reduction]
    expected = heads.definition(member, reduce)
    hidden, weight, bias = heads.inputs()
    loss = linear_divergence_loss(
        hidden, weight, *heads.teacher, MEMBERS[member], student_bias=bias, mask=heads.mask, weight=heads.weight,
        chunk_bytes=chunk_bytes, num_valid=int(heads.mask.sum()) + 2 if num_valid else None, **heads.options, **options,
    )  # fmt: skip
    loss.sum().backward()
    assert_all_close((loss, hidden.grad, weight.grad, bias.grad), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("logits_dtype", [None, torch.float32])
def test_linear_is_no_worse_than_eager(dtype, logits_dtype):
    """In norm: the GEMMs' order of summation is not ours to choose."""
    N, V, D = 96, 4097, 64
    tensors = [
        random(N, D, seed=1),
        random(V, D, seed=2, spread=0.3),
        random(N, D, seed=3),
        random(V, D, seed=4, spread=0.3),
    ]
    tensors = [x.to(dtype) for x in tensors]
    bias = random(V, seed=5).to(dtype)

    def value(hidden, weight, bias):
        teacher = oracle.logits(*(x.to(hidden.dtype) for x in tensors[2:]))
        student = oracle.logits(hidden, weight, bias)
        return oracle.reverse_kl(oracle.log_probs(student), oracle.log_probs(teacher)).mean()

    expected = oracle.value_and_grad(value, *tensors[:2], bias)
    eager = oracle.value_and_grad(value, *tensors[:2], bias, dtype=dtype)
    for chunk_bytes in (None, 400_000):
        leaves = hidden, weight, b = [x.clone().requires_grad_() for x in (*tensors[:2], bias)]
        loss = linear_reverse_kl_loss(
            hidden, weight, *tensors[2:], student_bias=b, chunk_bytes=chunk_bytes, logits_dtype=logits_dtype
        )
        loss.backward()
        for f, e, g in zip((loss, *(x.grad for x in leaves)), expected, eager, strict=True):
            # one rounding to the result's dtype besides
            assert (f.double() - e).norm() <= 1.05 * (g.double() - e).norm() + torch.finfo(f.dtype).eps * e.norm()


@pytest.mark.parametrize("logits_dtype", [torch.bfloat16, torch.float16])
def test_logits_narrower_than_the_operands_are_rounded_once(logits_dtype):
    """They are products of the operands as given, not of operands rounded first."""
    hidden, weight, t_hidden, t_weight = (random(n, 32, seed=n, spread=0.5) for n in (9, 157, 8, 163))
    t_hidden = t_hidden[torch.arange(9) % 8]
    found = linear_reverse_kl_loss(hidden, weight, t_hidden, t_weight, logits_dtype=logits_dtype)
    student, teacher = (h @ w.T for h, w in ((hidden, weight), (t_hidden, t_weight[:157])))
    torch.testing.assert_close(found, reverse_kl_loss(student.to(logits_dtype), teacher.to(logits_dtype)))


def test_stats():
    heads = Heads()
    student, teacher = random(3, 5, 157), random(3, 5, 157, seed=1)
    log_q, log_p = (oracle.log_probs(x.double()) for x in (student, teacher))
    for options in ({}, {"reduction": "none"}, {"reduction": "sum", "weight": heads.weight}):
        loss, stats = divergence_loss(student, teacher, mask=heads.mask, return_stats=True, **options)
        expected = (
            oracle.reverse_kl(log_q, log_p),
            oracle.entropy(log_q),
            oracle.entropy(log_p),
            (log_q.argmax(-1) == log_p.argmax(-1)).double(),
        )
        assert stats._fields == ("divergence", "student_entropy", "teacher_entropy", "top1_agreement")
        for found, e in zip(stats, expected, strict=True):
            assert found.shape == heads.mask.shape and found.dtype == torch.float32 and not found.requires_grad
            torch.testing.assert_close(found.double(), e * heads.mask, rtol=1e-5, atol=1e-5)
    hidden, weight, bias = heads.inputs()
    loss, stats = linear_divergence_loss(
        hidden, weight, *heads.teacher, student_bias=bias, mask=heads.mask, return_stats=True, chunk_bytes=9000,
        **heads.options,
    )  # fmt: skip
    kept = heads.mask.double()
    expected, *_ = heads.definition("reverse", lambda d: d * kept)
    torch.testing.assert_close(stats.divergence.double(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(loss, (stats.divergence.sum() / kept.sum()).float())
    assert ((stats.student_entropy > 0) == heads.mask).all()


def test_the_heads_gradient_is_gathered_in_fp32():
    """Of bf16 numbers, over as many chunks as there are rows: the sum is rounded once."""
    h, w, ht, wt = (random(n, 8, seed=n).bfloat16() for n in (512, 97, 511, 96))
    ht, grads = ht[torch.arange(512) % 511], []
    for chunk_bytes in (None, 8 * len(w)):
        leaf = w.clone().requires_grad_()
        linear_divergence_loss(h, leaf, ht, wt, chunk_bytes=chunk_bytes).backward()
        grads.append(leaf.grad.float())
    assert (grads[1] - grads[0]).norm() < 4e-3 * grads[0].norm()


# ---- nothing to do


@pytest.mark.parametrize("shape", [(0,), (2, 0), (4,)])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_no_tokens(shape, reduction):
    mask = torch.zeros(shape, dtype=torch.bool)
    student = torch.full((*shape, 50), math.nan, requires_grad=True)
    loss = divergence_loss(student, student.detach(), mask=mask, reduction=reduction)
    loss.sum().backward()
    assert loss.sum() == 0 and (student.grad == 0).all()
    hidden = torch.full((*shape, 4), math.nan, requires_grad=True)
    weight = torch.randn(50, 4, requires_grad=True)
    for options in ({}, {"num_valid": 0}, {"num_valid": mask.numel() + 2}):
        hidden.grad = weight.grad = None
        options |= {"mask": mask, "reduction": reduction, "return_stats": True}
        loss, stats = linear_divergence_loss(hidden, weight, hidden.detach(), weight.detach(), **options)
        loss.sum().backward()
        assert loss.sum() == 0 and (hidden.grad == 0).all() and (weight.grad == 0).all()
        assert stats.divergence.shape == shape and (stats.divergence == 0).all()


def test_masked_tokens_may_hold_anything():
    heads = Heads()
    hidden, weight, bias = heads.inputs()
    clean = linear_divergence_loss(hidden, weight, *heads.teacher, student_bias=bias, mask=heads.mask)
    poisoned = heads.student[0].masked_fill(~heads.mask[..., None], math.nan).requires_grad_()
    for num_valid in (None, int(heads.mask.sum()), heads.mask.numel()):
        teacher_hidden = heads.teacher[0].masked_fill(~heads.mask[..., None], math.inf)
        weight.grad = None
        loss = linear_divergence_loss(
            poisoned, weight, teacher_hidden, heads.teacher[1], student_bias=bias, mask=heads.mask, num_valid=num_valid
        )
        loss.backward()
        torch.testing.assert_close(loss, clean)
        assert weight.grad.isfinite().all() and poisoned.grad.isfinite().all()
        assert (poisoned.grad[~heads.mask] == 0).all()


# ---- shapes, strides, dtypes


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.integers(0, 4), max_size=3),
    st.integers(1, 200),
    st.integers(1, 200),
    st.sampled_from(list(MEMBERS)),
    st.floats(0.1, 10.0),
    st.booleans(),
    st.integers(0, 1000),
)
def test_any_shape(shape, student_V, teacher_V, member, temperature, masked, seed):
    V = min(student_V, teacher_V)
    student, teacher = random(*shape, student_V, seed=seed), random(*shape, teacher_V, seed=seed + 1)
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) > 0.3 if masked else None
    kept = torch.ones(shape) if mask is None else mask.double()
    expected = oracle.value_and_grad(
        lambda x: (
            (
                oracle.FAMILY[member](
                    oracle.log_probs(x[..., :V], temperature), oracle.log_probs(teacher[..., :V].double(), temperature)
                )
                * kept
            ).sum()
            / kept.sum().clamp(min=1)
        ),
        student,
    )
    leaf = student.clone().requires_grad_()
    loss = divergence_loss(leaf, teacher, MEMBERS[member], mask=mask, temperature=temperature)
    loss.backward()
    assert loss.shape == ()
    # the gradient carries the rounding of logits/temperature, once more divided by the temperature
    assert_all_close((loss, leaf.grad), expected, rtol=1e-4, atol=2e-5 * max(1, temperature**-2))


VIEWS = {
    "dropped last": lambda x: x[:, :-1],
    "slice": lambda x: x[:, 1:, 3:60],
    "batch of batches": lambda x: x.view(2, 2, 6, 64)[:, :, :-1],
    "sliced twice": lambda x: x.view(2, 2, 6, 64)[:, :1, :-1],
    "apart in two dimensions": lambda x: x.view(4, 3, 2, 64)[:, :-1, :-1],
    "nothing": lambda x: x[:, :0],
    "transposed tokens": lambda x: x.transpose(0, 1),
    "transposed vocabulary": lambda x: x.transpose(1, 2),
    "strided": lambda x: x[..., ::2],
    "expanded": lambda x: x[:1].expand(3, -1, -1),
    "expanded tokens": lambda x: x[:, :1].expand(-1, 3, -1),
    "one token": lambda x: x[0, 0, ::2],
}


@pytest.mark.parametrize("teacher_as", ["the student", "a copy", "another view"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("view", VIEWS)
def test_views(view, reduction, teacher_as):
    view, base, teacher = VIEWS[view], random(4, 6, 64), VIEWS[view](random(4, 6, 64, seed=1))
    if teacher_as == "a copy":
        teacher = teacher.contiguous()
    elif teacher_as == "another view":
        padded = random(*(n + 1 for n in teacher.shape), seed=1)
        teacher = padded[tuple(slice(n) for n in teacher.shape)]
    mask = torch.rand(teacher.shape[:-1], generator=torch.Generator().manual_seed(2)) > 0.3
    results = []
    for copy in (False, True):
        leaf = base.clone().requires_grad_()
        student = view(leaf).contiguous() if copy else view(leaf)
        loss, stats = divergence_loss(
            student, teacher.contiguous() if copy else teacher, mask=mask, reduction=reduction, return_stats=True
        )
        loss.sum().backward()
        assert torch.equal(leaf.detach(), base)
        results.append((loss, leaf.grad, *stats))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])  # in C++, and in the reference
@pytest.mark.parametrize(
    "view", ["dropped last", "slice", "batch of batches", "sliced twice", "strided batch", "every fourth"]
)
def test_in_place_writes_into_views(view, dtype):
    view = (VIEWS | {"strided batch": lambda x: x[::2], "every fourth": lambda x: x[:, ::4]})[view]
    base, teacher = random(4, 6, 64).to(dtype), view(random(4, 6, 64, seed=1)).to(dtype)
    logits = view(base.clone().requires_grad_() * 1)
    expected = torch.autograd.grad(divergence_loss(logits, teacher), logits)[0]
    memory = logits.data_ptr()
    (found,) = torch.autograd.grad(divergence_loss(logits, teacher, inplace=True), logits)
    assert found.data_ptr() == memory
    torch.testing.assert_close(found, expected)


def test_masks_and_weights_may_be_strided():
    student, teacher = random(10, 50).requires_grad_(), random(10, 50, seed=1)

    def gradient(**options):
        return torch.autograd.grad(divergence_loss(student, teacher, reduction="sum", **options), student)[0]

    mask, weight = (torch.arange(20) % 4 > 1)[::2], random(20)[::2]
    assert torch.equal(gradient(mask=mask), gradient(mask=mask.contiguous()))
    assert torch.equal(gradient(weight=weight), gradient(weight=weight.contiguous()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("teacher_dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_mixed_dtypes(dtype, teacher_dtype):
    heads = Heads(dtype=dtype, teacher_dtype=teacher_dtype)
    hidden, weight, bias = heads.inputs()
    logits_dtype = torch.float32 if dtype != torch.float64 else None
    loss = linear_divergence_loss(hidden, weight, *heads.teacher, student_bias=bias, logits_dtype=logits_dtype)
    loss.backward()
    assert (hidden.grad.dtype, weight.grad.dtype, bias.grad.dtype) == (dtype,) * 3
    expected = oracle.value_and_grad(
        lambda h, w, b: oracle.reverse_kl(
            oracle.log_probs(oracle.logits(h, w, b)[..., :157]),
            oracle.log_probs(oracle.logits(heads.teacher[0].double(), heads.teacher[1].double())),
        ).mean(),
        *heads.student,
        heads.bias,
    )
    narrow = max(torch.finfo(d).eps for d in (dtype, teacher_dtype))
    torch.testing.assert_close(loss.double(), expected[0], rtol=10 * narrow, atol=10 * narrow)
    for found, e in zip((hidden.grad, weight.grad, bias.grad), expected[1:], strict=True):
        assert (found.double() - e).norm() <= 10 * narrow * e.norm() + 1e-6


EXTREME = [jsd(1e-3), jsd(1 - 1e-6), skew_forward_kl(1e-8), skew_forward_kl(1 - 1e-6), skew_reverse_kl(1e-8)]


@pytest.mark.parametrize("divergence", [*(d for d in MEMBERS.values() if 0 < d.pi < 1), *EXTREME], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])  # the reference, and C++
def test_mixtures_of_far_distributions(divergence, dtype):
    """However little of one side is in the mixture, 1 − π included."""
    student, teacher = random(8, 50, dtype=torch.float64), random(8, 50, seed=1, dtype=torch.float64) * 40

    def value(s):
        log_q, log_p = oracle.log_probs(s), oracle.log_probs(teacher)
        m = oracle.log_mixture(log_p, log_q, divergence.pi)
        return (divergence.a * oracle.kl(log_p, m) + divergence.b * oracle.kl(log_q, m)).mean()

    expected = oracle.value_and_grad(value, student)
    leaf = student.to(dtype).requires_grad_()
    loss = divergence_loss(leaf, teacher.to(dtype), divergence)
    loss.backward()
    # of fp32: its own rounding of logits that reach 100, which moves probabilities by 1e-5 of themselves
    # besides, of fp64, 1e-16 where terms of the size of 1 − π cancel
    rtol, atol = (1e-12, 1e-16) if dtype == torch.float64 else (1e-4, 0)
    for found, e in zip((loss.detach(), leaf.grad), expected, strict=True):
        assert (found.double() - e).norm() <= rtol * e.norm() + atol


@every_member
def test_gradcheck_of_the_reference(member):
    teacher = random(4, 9, seed=1, dtype=torch.float64)
    student = random(4, 11, dtype=torch.float64).requires_grad_()
    numbers = spec(member, (0.7, 1.2, 1.3, 1.0, 2.5, 0.0))

    class Reference(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            loss, grad, _ = reference.divergence_rows(x, teacher, None, None, numbers)
            ctx.save_for_backward(grad)
            return loss

        @staticmethod
        def backward(ctx, g):
            return g[:, None] * ctx.saved_tensors[0]

    assert torch.autograd.gradcheck(Reference.apply, student)


# ---- outside witnesses


def test_f_kl_div_as_witness():
    student, teacher = random(6, 500), random(6, 500, seed=1)
    log_q, log_p = torch.log_softmax(student, -1), torch.log_softmax(teacher, -1)
    kl_div = torch.nn.functional.kl_div
    torch.testing.assert_close(
        divergence_loss(student, teacher, FORWARD_KL), kl_div(log_q, log_p, reduction="batchmean", log_target=True)
    )
    torch.testing.assert_close(
        reverse_kl_loss(student, teacher), kl_div(log_p, log_q, reduction="batchmean", log_target=True)
    )


@pytest.mark.parametrize("beta, divergence", [(0.0, FORWARD_KL), (1.0, REVERSE_KL), (0.4, jsd(0.4))])
def test_trl_as_witness(beta, divergence):
    trl = pytest.importorskip("trl.kernels.chunked_divergence")
    heads = Heads(shape=(15,))
    teacher_weight, teacher_bias = (
        random(160, 8, seed=5, spread=0.5),
        random(160, seed=6),
    )  # TRL wants equal vocabularies
    inputs, witness = heads.inputs(), heads.inputs()
    loss, stats = linear_divergence_loss(
        inputs[0], inputs[1], heads.teacher[0], teacher_weight, divergence, student_bias=inputs[2],
        teacher_bias=teacher_bias, student_softcap=4.0, student_logit_scale=0.7, temperature=0.8, return_stats=True,
    )  # fmt: skip
    loss.backward()
    value, entropy = trl.ChunkedDivergenceFunction.apply(
        *witness, heads.teacher[0], teacher_weight, teacher_bias, beta, 0.8, 0.7, 4.0, 1.0, None
    )
    value.mean().backward()
    torch.testing.assert_close(loss, value.mean())
    torch.testing.assert_close(stats.student_entropy, entropy)
    for ours, theirs in zip(inputs, witness, strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)


@given(total=st.integers(0, 5000), limit=st.integers(0, 3000))
@settings(deadline=None)
def test_pieces_are_few_and_cover_all(total, limit):
    found = head_products.pieces(total, limit)
    assert [i for piece in found for i in range(piece.start, piece.stop)] == list(range(total))
    sizes = [piece.stop - piece.start for piece in found]
    assert len(sizes) == -(-total // max(limit, 1)) and all(0 < size <= max(limit, 1) for size in sizes)


def test_pieces_are_whole_tiles_where_they_fit():
    assert head_products.pieces(8192, 3139) == [slice(0, 2816), slice(2816, 5632), slice(5632, 8192)]
    assert head_products.pieces(3000, 700) == [slice(i, i + 600) for i in range(0, 3000, 600)]
