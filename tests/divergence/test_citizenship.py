"""The losses among PyTorch's own mechanisms: ops, compilation, autocast, autograd, sharding; and their errors."""

import math
import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torchrun import torchrun

from effopd_kernels.divergence import (
    FORWARD_KL,
    Divergence,
    divergence_loss,
    jsd,
    linear,
    linear_divergence_loss,
    linear_rows,
    linear_token_logprobs,
    ops,
    partial,
    topk_divergence_loss,
)

N, V, D = 6, 50, 8
NUMBERS = (0.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0)  # reverse KL; temperatures, scales, soft caps


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def heads(dtype=torch.float32):
    return [random(*shape, seed=i, dtype=dtype) for i, shape in enumerate([(N, D), (V, D), (N, D + 1), (V + 2, D + 1)])]


MASK = torch.arange(N) % 3 != 0


# ---- ops


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("with_grad", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_opcheck_rows(dtype, with_grad, masked):
    inputs = (random(N, V, dtype=dtype), random(N, V + 3, seed=1))
    args = (*inputs, MASK if masked else None, torch.rand(N) if masked else None, *NUMBERS, with_grad, masked)
    torch.library.opcheck(torch.ops.effopd.divergence_rows.default, args)
    torch.library.opcheck(torch.ops.effopd.divergence_rows_.default, args)
    apart = [torch.stack([x, x])[:, :-1] for x in inputs]
    torch.library.opcheck(torch.ops.effopd.divergence_rows.default, (*apart, None, None, *args[4:]))
    torch.library.opcheck(torch.ops.effopd.divergence_rows_.default, (*apart, None, None, *args[4:]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("needs", [(True, True, True), (False, True, False), (False, False, False)])
@pytest.mark.parametrize("num_valid", [None, 5])
@pytest.mark.parametrize("keep", [False, True])
def test_opcheck_linear(dtype, needs, num_valid, keep):
    h_s, w_s, h_t, w_t = heads(dtype)
    bias = random(V, dtype=dtype)
    tensors = h_s, w_s, bias, h_t, w_t, None, MASK, None
    args = *tensors, *NUMBERS, dtype, dtype, torch.float32, 3000, num_valid, *needs, True, keep
    torch.library.opcheck(torch.ops.effopd.linear_divergence_rows.default, args)
    kept, needs_head = random(N if num_valid is None else num_valid, V, dtype=dtype), (needs[0], needs[1])
    args = kept, h_s, w_s, bias, MASK, random(N), dtype, num_valid, *needs_head
    torch.library.opcheck(torch.ops.effopd.head_gradients.default, args)


TOPK = (0.3, 0.7, 0.3, True, 1.5, 2.0, 0.0)  # a, b, π, tail, temperature, scale, soft cap


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("with_grad", [True, False])
def test_opcheck_topk(dtype, with_grad):
    ids, known = torch.arange(3).expand(N, 3), random(N, 4).log_softmax(-1)
    for student in (random(N, V, dtype=dtype), random(N + 2, V, dtype=dtype).view(2, -1, V)[:, :-1]):
        args = (student, ids, known, MASK, random(N), *TOPK, with_grad, True)
        torch.library.opcheck(torch.ops.effopd.topk_rows.default, args)
        torch.library.opcheck(torch.ops.effopd.topk_rows_.default, args)


@pytest.mark.parametrize("token", [True, False], ids=["token", "buckets"])
@pytest.mark.parametrize("needs", [(True, True, True), (False, True, False)], ids=["all", "frozen hidden"])
@pytest.mark.parametrize("num_valid", [None, 5])
def test_opcheck_linear_topk(token, needs, num_valid):
    hidden, weight, *_ = heads(torch.float32)
    weight = weight.mT.contiguous().mT  # strides that the gradient does not take over
    ids = torch.arange(N).remainder(V)[:, None] if token else torch.arange(3).expand(N, 3)
    known = None if token else random(N, 4).log_softmax(-1)
    args = (hidden, weight, random(V), ids, known, MASK, random(N), *TOPK, torch.float32, 1000, num_valid, *needs)
    for keep in (False, True):
        torch.library.opcheck(torch.ops.effopd.linear_topk_rows.default, (*args, True, keep))


# ---- compilation


CASES = {
    "logits": (lambda s, t, **o: divergence_loss(s, t, **o), {}),
    "logits, masked, jsd": (lambda s, t, **o: divergence_loss(s, t, jsd(0.3), **o), {"mask": MASK}),
    "logits, per row": (lambda s, t, **o: divergence_loss(s, t, **o).square().sum(), {"reduction": "none"}),
    "logits, in place": (lambda s, t, **o: divergence_loss(s * 1, t, **o), {"inplace": True}),
    "top-k": (lambda s, t, **o: topk_divergence_loss(s, *torch.log_softmax(t, -1).topk(3), **o), {}),
}
LINEAR = {
    "linear": (lambda *x, **o: linear_divergence_loss(*x, **o), {"chunk_bytes": 1000}),
    "linear, masked": (lambda *x, **o: linear_divergence_loss(*x, **o), {"mask": MASK, "num_tokens": torch.tensor(9)}),
    "linear, num_valid": (lambda *x, **o: linear_divergence_loss(*x, **o), {"mask": MASK, "num_valid": 4}),
    "linear, per row": (lambda *x, **o: linear_divergence_loss(*x, **o).square().sum(), {"reduction": "none"}),
    "linear, per row, frozen head": (
        lambda h, w, *x, **o: linear_divergence_loss(h, w.detach(), *x, **o).square().sum() + w.sum(),
        {"reduction": "none", "mask": MASK},
    ),
    "token log-probabilities": (lambda h, w, *_: linear_token_logprobs(h, w, torch.arange(N)).sum(), {}),
}


# Dynamo instantiates autograd functions while it traces them, and autograd warns of that.
tracing = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")


@tracing
@pytest.mark.parametrize("case", [*CASES, *LINEAR])
def test_compiles_in_one_graph(case):
    function, options = (CASES | LINEAR)[case]
    inputs = [random(N, V), random(N, V, seed=1)] if case in CASES else heads()
    results = []
    for f in (function, torch.compile(function, fullgraph=True, backend="aot_eager")):
        leaves = [x.clone().requires_grad_(i < len(inputs) // 2) for i, x in enumerate(inputs)]
        loss = f(*leaves, **options)
        loss.backward()
        with torch.no_grad():
            alone = f(*inputs, **options)
        results.append((loss.detach(), alone, *(x.grad for x in leaves if x.requires_grad)))
    torch.testing.assert_close(results[1], results[0])


SIZES = {
    "logits": lambda s, t, mask: divergence_loss(s, t, mask=mask),
    "logits, statistics": lambda s, t, mask: divergence_loss(s, t, mask=mask, return_stats=True)[0],
    "logits, in place": lambda s, t, mask: divergence_loss(s * 1, t, mask=mask, inplace=True),
    "logits, per row": lambda s, t, mask: divergence_loss(s, t, reduction="none").square().sum(),
    "logits of sequences": lambda s, t, mask: divergence_loss(
        s.view(2, -1, V)[:, :-1], t.view(2, -1, V)[:, :-1], mask=mask.view(2, -1)[:, 1:]
    ),
    "sequences, in place": lambda s, t, mask: divergence_loss(
        (s * 1).view(2, -1, V)[:, :-1], t.view(2, -1, V)[:, :-1], mask=mask.view(2, -1)[:, 1:], inplace=True
    ),
    "logits, their number": lambda s, t, mask: divergence_loss(s, t, mask=mask, num_tokens=len(s)),
    "logits in fp16": lambda s, t, mask: divergence_loss(s.half(), t, mask=mask),
    "linear": lambda s, t, mask: linear_divergence_loss(s, t[:7], t, t[:7], mask=mask, num_valid=4),
    "top-k": lambda s, t, mask: topk_divergence_loss(s, *torch.log_softmax(t, -1).topk(3), mask=mask),
    "top-k, linear": lambda s, t, mask: topk_divergence_loss(
        s, *torch.log_softmax(t[:, :7], -1).topk(3), student_weight=t[:7], mask=mask
    ),
    "token log-probabilities": lambda s, t, mask: linear_token_logprobs(s, t[:7], mask.long()).sum(),
}


@tracing
@pytest.mark.parametrize("case", SIZES)
def test_new_sizes_are_not_compiled_for(case):
    """Once for the first number of tokens, and once for any."""
    compiled = CompileCounterWithBackend("aot_eager")
    function = torch.compile(SIZES[case], fullgraph=True, backend=compiled)
    for n in (8, 10, 12, 18, 22):
        student, teacher, mask = random(n, V).requires_grad_(), random(n, V, seed=1), torch.arange(n) < 4
        function(student, teacher, mask).backward()
        expected = student.detach().requires_grad_()
        SIZES[case](expected, teacher, mask).backward()
        torch.testing.assert_close(student.grad, expected.grad)
    assert compiled.frame_count <= 2


@tracing
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")  # inductor's own
def test_compiles_with_inductor():
    student, teacher = random(N, V).requires_grad_(), random(N, V, seed=1)
    loss = torch.compile(divergence_loss, fullgraph=True)(student, teacher)
    loss.backward()
    expected = student.detach().requires_grad_()
    divergence_loss(expected, teacher).backward()
    torch.testing.assert_close(student.grad, expected.grad)


# ---- inference mode


INFERENCE = (CASES | LINEAR) | {
    "logits, weighted per row": (
        lambda s, t, **o: divergence_loss(s, t, weight=t[:, 0].exp(), reduction="none").sum(),
        {},
    ),
}


@pytest.mark.parametrize("case", INFERENCE)
def test_what_was_made_in_inference_mode_is_a_constant(case):
    """A teacher's results are as good from there; and so is a student's, of whom nobody wants a gradient."""
    function, options = INFERENCE[case]
    inputs = [random(N, V), random(N, V, seed=1)] if case not in LINEAR else heads()
    half = len(inputs) // 2
    results = []
    for inference in (False, True):
        with torch.inference_mode(inference):
            made, alone = [x.clone() for x in inputs], function(*inputs, **options)
            options = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
        leaves = [x.clone().requires_grad_() for x in inputs[:half]]
        loss = function(*leaves, *made[half:], **options)
        loss.backward()
        results.append((loss.detach(), alone, function(*made, **options), *(x.grad for x in leaves)))
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)


def test_a_frozen_head_may_be_made_in_inference_mode():
    h, w, *_ = heads()
    with torch.inference_mode():
        frozen = w.clone()
    grads = []
    for weight in (w, frozen):
        hidden = h.clone().requires_grad_()
        linear_token_logprobs(hidden, weight, torch.arange(N)).sum().backward()
        grads.append(hidden.grad)
    assert torch.equal(*grads)


# ---- autocast


def test_autocast_projects_in_its_dtype():
    tensors = heads()
    h, w = (x.clone().requires_grad_() for x in tensors[:2])
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_divergence_loss(h, w, *tensors[2:])
    loss.backward()
    narrow = [x.bfloat16() for x in tensors]
    hb, wb = (x.clone().requires_grad_() for x in narrow[:2])
    expected = linear_divergence_loss(hb, wb, *narrow[2:])
    expected.backward()
    assert loss.dtype == h.grad.dtype == w.grad.dtype == torch.float32
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(w.grad, wb.grad.float(), rtol=1e-2, atol=1e-5)  # ours was not rounded to bf16
    with torch.autocast("cpu", torch.bfloat16):  # mixed parameters, as a user under autocast has them
        mixed = linear_divergence_loss(tensors[0].bfloat16(), tensors[1], *tensors[2:])
    torch.testing.assert_close(mixed, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_autocast_changes_neither_fp64_nor_the_backward_of_fp32(dtype):
    tensors = heads(dtype)
    leaves = h, w = [x.requires_grad_() for x in tensors[:2]]

    def loss():
        rows = linear_divergence_loss(*tensors, reduction="none")
        return (rows + linear_token_logprobs(h, w, torch.arange(N))).sum()

    expected, outside = torch.autograd.grad(loss(), leaves), loss()
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.autograd.grad(loss() if dtype == torch.float64 else outside, leaves)
    torch.testing.assert_close(found, expected)


def test_autocast_leaves_logits_alone():
    student, teacher = random(N, V).requires_grad_(), random(N, V, seed=1)
    with torch.autocast("cpu", torch.bfloat16):
        loss = divergence_loss(student, teacher)
    torch.testing.assert_close(loss, divergence_loss(student, teacher), rtol=0, atol=0)


# ---- autograd


def losses():
    """(what, loss as a function of leaves, leaves)"""
    teacher = random(N, V, seed=1)
    h_s, w_s, h_t, w_t = heads()
    top = torch.log_softmax(teacher, -1).topk(3)
    yield lambda s: divergence_loss(s, teacher), [random(N, V)]
    yield lambda s: divergence_loss(s, teacher, reduction="none").mean(), [random(N, V)]
    yield lambda h, w: linear_divergence_loss(h, w, h_t, w_t, mask=MASK), [h_s, w_s]
    yield lambda h, w: linear_divergence_loss(h, w, h_t, w_t, reduction="none").mean(), [h_s, w_s]
    yield lambda s: divergence_loss(s * 1, teacher, inplace=True), [random(N, V)]
    yield lambda s: divergence_loss(s * 1, teacher, inplace=True, reduction="none").mean(), [random(N, V)]
    yield lambda s: topk_divergence_loss(s, *top), [random(N, V)]
    yield lambda h, w: topk_divergence_loss(h, *top, student_weight=w), [h_s, w_s]
    yield lambda h, w: linear_token_logprobs(h, w, top[1][:, 0]).mean(), [h_s, w_s]
    yield lambda h: linear_token_logprobs(h, w_s, top[1][:, 0], mask=MASK).square().mean(), [h_s]


every_loss = pytest.mark.parametrize(
    "loss_of, leaves",
    list(losses()),
    ids=[
        "logits",
        "logits none",
        "linear",
        "linear none",
        "in place",
        "in place none",
        "top-k",
        "linear top-k",
        "token",
        "token, frozen head",
    ],
)


@every_loss
def test_a_second_backward_gives_the_same_gradient(loss_of, leaves):
    leaves = [x.clone().requires_grad_() for x in leaves]
    loss = loss_of(*leaves)
    results = []
    for retain in (True, True, False):
        loss.backward(retain_graph=retain)
        results.append([x.grad for x in leaves])
        for x in leaves:
            x.grad = None
        if retain:  # a caller may do with its gradients what it likes
            kept, results[-1] = results[-1], [g.clone() for g in results[-1]]
            for g in kept:
                g.fill_(math.nan)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@every_loss
@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpoints(loss_of, leaves, reentrant):
    expected = torch.autograd.grad(loss_of(*(kept := [x.clone().requires_grad_() for x in leaves])), kept)
    leaves = [x.clone().requires_grad_() for x in leaves]
    checkpoint(loss_of, *leaves, use_reentrant=reentrant).backward()
    torch.testing.assert_close([x.grad for x in leaves], list(expected))


@every_loss
def test_gradients_scale_and_accumulate(loss_of, leaves):
    leaves = [x.clone().requires_grad_() for x in leaves]
    once = torch.autograd.grad(loss_of(*leaves), leaves)
    (loss_of(*leaves) * 3).backward()
    loss_of(*leaves).backward()
    torch.testing.assert_close([x.grad for x in leaves], [4 * g for g in once])


@every_loss
def test_functional_gradient(loss_of, leaves):
    expected = torch.autograd.grad(loss_of(*(xs := [x.clone().requires_grad_() for x in leaves])), xs)
    found = torch.func.grad(loss_of, argnums=tuple(range(len(leaves))))(*leaves)
    torch.testing.assert_close(found, expected)


@every_loss
def test_a_second_derivative_is_an_error_not_a_zero(loss_of, leaves):
    leaves = [x.clone().requires_grad_() for x in leaves]
    grads = torch.autograd.grad(loss_of(*leaves), leaves, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        (loss_of(*leaves) + sum(g.square().sum() for g in grads)).backward()  # as a penalty would be
    grads = torch.autograd.grad(loss_of(*leaves), leaves, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):  # and where nothing else leads to the leaves
        torch.autograd.grad(sum(g.square().sum() for g in grads), leaves, allow_unused=True)


@every_loss
def test_a_second_functional_derivative_is_an_error(loss_of, leaves):
    def slope(*xs):
        return sum(g.square().sum() for g in torch.func.grad(loss_of, argnums=tuple(range(len(xs))))(*xs))

    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.func.grad(slope)(*leaves)
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.functional.hvp(loss_of, tuple(leaves), tuple(map(torch.ones_like, leaves)))


@every_loss
def test_a_derivative_in_the_factor_of_a_loss_is_an_error_not_a_part_of_it(loss_of, leaves):
    leaves, factor = [x.clone().requires_grad_() for x in leaves], torch.tensor(2.0, requires_grad=True)
    loss = factor * (loss_of(*leaves) + sum(x.square().sum() for x in leaves))
    grads = torch.autograd.grad(loss, leaves, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):  # as learned weights of losses would ask for it
        torch.autograd.grad(sum(g.square().sum() for g in grads), factor)
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.functional.jvp(loss_of, tuple(leaves), tuple(map(torch.ones_like, leaves)))


def test_many_upstream_gradients_at_a_time():
    """As torch.autograd.grad takes them by vmap; where the graph goes, too."""
    student = random(N, V).requires_grad_()
    loss, ones = divergence_loss(student, random(N, V, seed=1)), torch.tensor([1.0, -2.0])
    (expected,) = torch.autograd.grad(loss, student, retain_graph=True)
    (found,) = torch.autograd.grad(loss, student, ones, is_grads_batched=True)
    torch.testing.assert_close(found, ones[:, None, None] * expected)
    hidden, upstream = random(N, 8).requires_grad_(), random(2, N, seed=2)
    rows = linear_token_logprobs(hidden, random(V, 8), torch.arange(N))
    expected = [torch.autograd.grad(rows, hidden, each, retain_graph=True)[0] for each in upstream]
    (found,) = torch.autograd.grad(rows, hidden, upstream, is_grads_batched=True)
    torch.testing.assert_close(found, torch.stack(expected))


@every_loss
def test_inputs_are_not_mutated(loss_of, leaves):
    leaves = [x.clone().requires_grad_() for x in leaves]
    before = [x.detach().clone() for x in leaves]
    loss_of(*leaves).backward()
    assert all(torch.equal(a, b) for a, b in zip(leaves, before, strict=True))


def test_inplace_overwrites_the_logits_with_their_gradient():
    student, teacher = random(N, V).requires_grad_(), random(N, V, seed=1)
    expected = torch.autograd.grad(divergence_loss(student, teacher), student)[0]
    logits = student * 1
    loss = divergence_loss(logits, teacher, inplace=True)
    torch.testing.assert_close(logits.detach(), expected)
    first = torch.autograd.grad(loss, student, retain_graph=True)[0]
    torch.testing.assert_close(torch.autograd.grad(loss, student)[0], first)
    torch.testing.assert_close(first, expected)


def test_inplace_on_rows_that_share_memory_writes_rows_of_its_own():
    row, teacher = random(1, V).requires_grad_(), random(N, V, seed=1)
    expected = torch.autograd.grad(divergence_loss(row.expand(N, V), teacher), row)[0]
    torch.testing.assert_close(
        torch.autograd.grad(divergence_loss((row * 1).expand(N, V), teacher, inplace=True), row)[0], expected
    )


def test_inplace_on_overlapping_windows_writes_rows_of_its_own():
    base, teacher = random(9, 6).requires_grad_(), random(6, 4, 6, seed=1)
    results = []
    for inplace in (False, True):
        windows = (base * 1).unfold(0, 4, 1).transpose(1, 2)
        loss = divergence_loss(windows, teacher, inplace=inplace)
        results.append((loss, torch.autograd.grad(loss, base)[0]))
    torch.testing.assert_close(*results)


def test_inplace_is_heard_by_who_kept_the_logits():
    student, teacher = random(N, V).requires_grad_(), random(N, V, seed=1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        divergence_loss(torch.tanh(student), teacher, inplace=True).backward()
    logits = student * 1
    both = divergence_loss(logits, teacher, reduction="none").sum() + divergence_loss(logits, teacher, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        both.backward()


def test_inplace_leaves_a_view_in_the_graph_of_other_losses():
    view, teacher = (random(3, N, V).requires_grad_() * 1)[:, :-1], random(3, N - 1, V, seed=1)
    (once,) = torch.autograd.grad(divergence_loss(view, teacher), view)
    both = divergence_loss(view, teacher) + divergence_loss(view, teacher, inplace=True)
    torch.testing.assert_close(torch.autograd.grad(both, view)[0], 2 * once)


class Spy(TorchDispatchMode):
    """Records every operator that runs."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls.append((func, args))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("inplace", [False, True])
def test_sliced_logits_are_not_copied(inplace):
    """logits[:, :-1] of a batch, and a teacher's of another width, reach the kernel as they lie."""
    student, teacher = random(3, N, V), random(3, N, V + 8, seed=1)
    leaf = student.requires_grad_() * 1
    with Spy() as spy:
        divergence_loss(leaf[:, :-1], teacher[:, :-1], inplace=inplace).backward()
    (args,) = (args for func, args in spy.calls if "divergence_rows" in str(func))
    assert [x.data_ptr() for x in args[:2]] == [leaf.data_ptr(), teacher.data_ptr()]
    assert not any("clone" in str(func) and args[0].numel() >= N * V for func, args in spy.calls)


@pytest.mark.parametrize("hidden, weight", [(True, True), (True, False), (False, True), (False, False)])
def test_frozen_parts_are_skipped(hidden, weight):
    h_s, w_s, h_t, w_t = heads()
    with Spy() as spy:
        linear_divergence_loss(h_s.requires_grad_(hidden), w_s.requires_grad_(weight), h_t, w_t)
    (args,) = (args for func, args in spy.calls if func is torch.ops.effopd.linear_divergence_rows.default)
    assert args[-5:-3] == (hidden, weight)
    with torch.no_grad(), Spy() as spy:
        linear_divergence_loss(h_s, w_s, h_t, w_t)
    (args,) = (args for func, args in spy.calls if func is torch.ops.effopd.linear_divergence_rows.default)
    assert args[-5:] == (False,) * 5


@pytest.mark.parametrize("top_k", [False, True], ids=["head", "top-k"])
@pytest.mark.parametrize(
    "needs, gemms", [((True, True), 4), ((True, False), 3), ((False, True), 3), ((False, False), 2)]
)
def test_four_gemm_units_at_most(needs, gemms, top_k):
    """One less where the teacher has no logits."""
    h_s, w_s, h_t, w_t = heads()
    rest, gemms = (1 << 20, None, *needs, False, False, False), gemms - top_k
    with Spy() as spy:
        if top_k:
            ids, known = torch.arange(3).expand(N, 3), random(N, 4).log_softmax(-1)
            linear_rows.linear_topk_rows(h_s, w_s, None, ids, known, MASK, None, *TOPK, torch.float32, *rest)
        else:
            dtypes = torch.float32, torch.float32, None
            linear_rows.linear_divergence_rows(h_s, w_s, None, h_t, w_t, None, MASK, None, *NUMBERS, *dtypes, *rest)
    products = [args for func, args in spy.calls if "mm" in func.__name__]  # the operands stand last
    assert len(products) == gemms
    assert all(MASK.sum() in (*a.shape, *b.shape) for *_, a, b in products)  # masked rows have left


@tracing
@pytest.mark.parametrize("dynamic", [None, True])
@torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True)
def test_compiles_with_a_number_of_tokens_that_the_data_decides(dynamic):
    """Also results per token: whether their logits fit cannot be asked then."""
    h_s, w_s, h_t, w_t = heads()

    def loss(h, w, mask):
        i = mask.nonzero().squeeze(1)
        rows = linear_divergence_loss(h[i], w, h_t[i], w_t, reduction="none")
        return (rows + linear_token_logprobs(h[i], w, i)).square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    leaves = h_s.requires_grad_(), w_s.requires_grad_()
    for mask in (MASK, ~MASK):
        found, expected = (torch.autograd.grad(f(*leaves, mask), leaves) for f in (compiled, loss))
        torch.testing.assert_close(found, expected)


@tracing
@pytest.mark.parametrize("kind", ["linear", "linear, per row", "top-k", "token"])
def test_one_graph_for_every_promised_number_of_tokens(kind):
    h, w, ht, wt = (x.requires_grad_(i < 2) for i, x in enumerate(heads()))
    loss = {
        "linear": lambda **o: linear_divergence_loss(h, w, ht, wt, **o),
        "linear, per row": lambda **o: linear_divergence_loss(h, w, ht, wt, reduction="none", **o).square().sum(),
        "top-k": lambda **o: topk_divergence_loss(h, *TOP, student_weight=w, **o),
        "token": lambda **o: linear_token_logprobs(h, w, TOP[1][:, 0], **o).square().sum(),
    }[kind]
    backend = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(
        lambda mask, num_valid: loss(mask=mask, num_valid=num_valid), backend=backend, fullgraph=True
    )
    for kept in range(2, N):
        mask = torch.arange(N) < kept
        found, expected = (torch.autograd.grad(f, (h, w)) for f in (compiled(mask, kept), loss(mask=mask)))
        torch.testing.assert_close(found, expected)
    assert backend.frame_count <= 2  # the first number, and any


@tracing
def test_large_results_per_token_are_traced_without_memory():
    """What is kept is of the size for which a CPU has pages of its own, which no trace may touch."""
    ids = torch.arange(300)

    def grads(h, w):
        return torch.autograd.grad(linear_token_logprobs(h, w, ids.to(h.device)).square().sum(), (h, w))

    h, w = random(300, 4).requires_grad_(), random(50_000, 4).requires_grad_()
    compiled = torch.compile(lambda h, w: linear_token_logprobs(h, w, ids), fullgraph=True, backend="aot_eager")
    found = torch.autograd.grad(compiled(h, w).square().sum(), (h, w))
    torch.testing.assert_close(found, grads(h, w))
    with FakeTensorMode(allow_non_fake_inputs=True):
        fakes = [torch.empty(x.shape, requires_grad=True) for x in (h, w)]
        assert [type(g) for g in grads(*fakes)] == [FakeTensor] * 2


def test_what_stops_gradients_stops_them():
    class Stop(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 1

        @staticmethod
        def backward(ctx, grad_output):
            return None

    h, w, *_ = (x.requires_grad_() for x in heads())
    for rows in (linear_token_logprobs(h, w, torch.arange(N)), divergence_loss(h, w[:N], reduction="none")):
        Stop.apply(rows).sum().backward()
    assert not any(x.grad is not None and x.grad.any() for x in (h, w))


@pytest.mark.parametrize("kind", ["divergence", "top-k", "token"])
@pytest.mark.parametrize("chunk_bytes, fits", [(None, True), (4 * V * 4, False)])
@pytest.mark.parametrize("num_valid", [None, 8])
@pytest.mark.parametrize(
    "leaves", [(True, True, True), (True, False, False), (False, True, False), (False, False, True)]
)
def test_a_result_per_token_projects_once(kind, chunk_bytes, fits, num_valid, leaves, monkeypatch):
    """Where the gradients of logits fit `chunk_bytes` or the head is frozen; else again in backward."""
    h_s, w_s, h_t, w_t = heads()
    h, w, b = (x.requires_grad_(need) for x, need in zip((h_s, w_s, random(V)), leaves, strict=True))
    trained, mask, upstream = [x for x in (h, w, b) if x.requires_grad], torch.arange(9) % 3 != 0, random(9, seed=9)
    hidden, h_t = torch.cat([h, h[:3]]), torch.cat([h_t, h_t[3:]])
    ids, known = torch.arange(3).expand(9, 3), random(9, 4).log_softmax(-1)[:, :3]

    def divergence(**options):
        if kind == "top-k":
            return topk_divergence_loss(hidden, known, ids, student_weight=w, student_bias=b, **options)
        return linear_divergence_loss(hidden, w, h_t, w_t, student_bias=b, **options)

    if kind == "token":
        log_q = torch.log_softmax(hidden @ w.T + b, -1).gather(-1, ids[:, :1])[:, 0]
        expected = torch.autograd.grad((log_q * upstream)[mask].sum(), trained)
    else:
        expected = torch.autograd.grad(divergence(mask=mask, weight=upstream, reduction="sum"), trained)
    projected, project = [], linear_rows.project
    monkeypatch.setattr(linear_rows, "project", lambda out, *rest: (projected.append(len(out)), project(out, *rest)))
    options = {"mask": mask, "num_valid": num_valid, "chunk_bytes": chunk_bytes}
    if kind == "token":
        found = linear_token_logprobs(hidden, w, ids[:, 0], bias=b, **options)
    else:
        found = divergence(reduction="none", **options)
    grads = torch.autograd.grad(found, trained, upstream.masked_fill(~mask, math.nan))
    torch.testing.assert_close(grads, expected)
    times = (2 if kind == "divergence" else 1) * (1 if fits or not any(leaves[1:]) else 2)
    assert sum(projected) == times * (num_valid or mask.sum())


# ---- what a result per token keeps for backward


def token(h, w, **options):
    return linear_token_logprobs(h, w, torch.arange(N), **options)


def calls_of_backward(rows, op):
    with Spy() as spy:
        rows.sum().backward()
    return [args for func, args in spy.calls if func is op], spy.calls


def test_gradients_of_logits_are_kept_where_they_fit():
    fits = linear_rows.may_keep
    f32, bf16 = torch.float32, torch.bfloat16
    h, row = random(N, D), V * 4
    assert fits(h, None, V, f32, f32, N * row) and not fits(h, None, V, f32, f32, N * row - 1)
    assert fits(h, 4, V, f32, f32, 4 * row) and fits(h, 100, V, f32, f32, N * row)
    assert not fits(h, None, V, bf16, f32, N * row) and fits(h, None, V, bf16, f32, N * row * 3 // 2)  # and a cast
    for dtypes in ((f32, bf16, f32), (bf16, f32, f32), (f32, f32, bf16)):
        with_half = [torch.float16 if dtype == bf16 else dtype for dtype in dtypes]
        assert fits(h.to(dtypes[0]), None, V, *dtypes[1:], 1 << 20) is True
        assert fits(h.to(with_half[0]), None, V, *with_half[1:], 1 << 20) is None  # a loss scale is yet to come


@pytest.mark.parametrize("kind", [np.uint8, np.int16, np.int64])
def test_a_promise_may_be_a_number_of_numpy_s(kind):
    h, w, ht, wt = (random(*shape, seed=i) for i, shape in enumerate([(200, D), (100, D)] * 2))
    mask = torch.arange(200) < 100

    def grads(num_valid, chunk_bytes, **options):
        leaves = h.clone().requires_grad_(), w.clone().requires_grad_()
        options |= {"mask": mask, "num_valid": num_valid, "chunk_bytes": chunk_bytes}
        return torch.autograd.grad(linear_divergence_loss(*leaves, ht, wt, **options).sum(), leaves)

    for options in ({}, {"reduction": "none"}):
        for chunk_bytes in (24_000, 1 << 30):
            expected = grads(100, chunk_bytes, **options)
            torch.testing.assert_close(grads(kind(100), np.int32(chunk_bytes), **options), expected)


def test_what_is_saved_for_a_frozen_head_or_with_kept_gradients():
    """Nothing as large as the logits for the former, nothing of the teacher in both."""
    h, w, ht, wt = heads()
    saved = []
    for frozen in (True, False):
        saved.clear()
        with torch.autograd.graph.saved_tensors_hooks(lambda x: (saved.append(x), x)[1], lambda x: x):
            leaves = h.requires_grad_(), w.requires_grad_(not frozen)
            rows = linear_divergence_loss(*leaves, ht, wt, reduction="none"), token(*leaves)
        shapes = [tuple(x.shape) for x in saved]
        assert shapes.count((N, V)) == (0 if frozen else 2) and rows[0].requires_grad
        assert not any(x.data_ptr() in (ht.data_ptr(), wt.data_ptr()) for x in saved)


def test_backward_of_kept_gradients_makes_no_zeros_and_does_not_look_at_a_mask():
    rows = token(random(N, D).requires_grad_(), random(V, D).requires_grad_(), mask=MASK, num_valid=4)
    (args,), calls = calls_of_backward(rows, torch.ops.effopd.head_gradients.default)
    assert args[7] == 4
    assert args[0].shape == (4, V)
    assert not any("zeros" in str(func) and [4, V] in map(list, args[:2]) for func, args in calls)


def test_backward_that_projects_again_makes_the_head_s_gradients_alone():
    rows = token(random(N, D).requires_grad_(), random(V, D).requires_grad_(), chunk_bytes=V * 8)
    (args,), _ = calls_of_backward(rows, torch.ops.effopd.linear_topk_rows.default)
    assert args[-5:-2] == (False, True, False)


def test_backward_within_autocast_is_as_outside():
    leaves = [x.requires_grad_() for x in (random(N, D), random(V, D), random(V))]
    rows, upstream = token(*leaves[:2], bias=leaves[2]), random(N, seed=3)
    expected = torch.autograd.grad(rows, leaves, upstream, retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.autograd.grad(rows, leaves, upstream)
    assert all(map(torch.equal, found, expected))


def test_upstream_gradients_are_not_rounded_and_sums_over_tokens_are_in_fp32():
    """Of bf16: dh by one multiplication, dW and db from operands that are rounded once."""
    tokens = 70
    h, w = random(tokens, D, dtype=torch.bfloat16), random(V, D, seed=1, dtype=torch.bfloat16)
    leaves = [x.requires_grad_() for x in (h, w, random(V, seed=2).bfloat16())]
    upstream = 1 + torch.rand(tokens, generator=torch.Generator().manual_seed(3))
    ids = torch.arange(tokens) % V
    rows = linear_token_logprobs(*leaves[:2], ids, bias=leaves[2])
    ones = torch.autograd.grad(rows.sum(), leaves, retain_graph=True)
    dh, _, db = torch.autograd.grad(rows, leaves, upstream)
    assert torch.equal(dh, (ones[0].float() * upstream[:, None]).bfloat16())
    logits = (h.float() @ w.float().T + leaves[2].float()).bfloat16().detach().double()
    g = (torch.nn.functional.one_hot(ids, V) - torch.softmax(logits, -1)).bfloat16().double()
    torch.testing.assert_close(db.double(), (g * upstream[:, None]).sum(0), rtol=2**-8, atol=2**-7)
    row = linear_token_logprobs(h[:1].detach(), *leaves[1:2], ids[:1], bias=leaves[2])  # one product each: to the digit
    (g,) = torch.autograd.grad(row, leaves[2:], retain_graph=True)
    dw, db = torch.autograd.grad(row, leaves[1:], upstream[:1])
    assert torch.equal(db, (g.float() * upstream[0]).bfloat16())
    assert torch.equal(dw, (g[:, None].float() * (h[0].float() * upstream[0]).bfloat16().float()).bfloat16())


def test_logits_of_another_dtype_than_the_products_are_not_rounded_where_gradients_are_kept():
    h, w, ht, wt = heads(torch.bfloat16)
    options = {"logits_dtype": torch.float32, "reduction": "none"}
    with torch.no_grad():
        expected = linear_divergence_loss(h, w, ht, wt, **options)
    assert torch.equal(linear_divergence_loss(h, w.requires_grad_(), ht, wt, **options), expected)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("masked", [False, True])
def test_losses_export_with_any_number_of_tokens(reduction, masked):
    class Losses(torch.nn.Module):
        def forward(self, s, t, w, mask, ids):
            options = {"reduction": reduction, "mask": mask if masked else None}
            losses = divergence_loss(s, t, **options), linear_divergence_loss(s, w, t, w, **options)
            return *losses, linear_token_logprobs(s, w, ids, mask=options["mask"])

    w, tokens = random(11, 8), torch.export.Dim("tokens", min=2, max=64)
    examples = [
        (random(n, 8), random(n, 8, seed=1), w, (ids := torch.arange(n)) % 3 > 0, ids % 11) for n in (12, 5, 20)
    ]
    dynamic = {0: tokens}, {0: tokens}, None, {0: tokens}, {0: tokens}
    exported = torch.export.export(Losses(), examples[0], dynamic_shapes=dynamic, strict=False)
    for example in examples:
        torch.testing.assert_close(exported.module()(*example), Losses()(*example))


@pytest.mark.parametrize("call", [divergence_loss, linear_divergence_loss])
def test_upstream_of_masked_tokens_may_be_anything_in_fp64_too(call):
    inputs = [random(N, V), random(N, V)] if call is divergence_loss else heads()
    leaf = inputs[0].double().requires_grad_()
    rows = call(leaf, *(x.double() for x in inputs[1:]), mask=MASK, reduction="none")
    (grad,) = torch.autograd.grad(rows, leaf, torch.where(MASK, 1.0, math.nan).double())
    assert grad.isfinite().all() and (grad[~MASK] == 0).all()


# ---- synchronisation


TOP = torch.log_softmax(random(N, V, seed=1), -1).topk(3)
SYNCHRONISING = ("_local_scalar_dense", "nonzero.default", "masked_select", "item", "unique")


def waits(func, args) -> bool:
    by_mask = func is torch.ops.aten.index.Tensor and any(i is not None and i.dtype == torch.bool for i in args[1])
    return by_mask or any(name in str(func) for name in SYNCHRONISING)


@pytest.mark.parametrize(
    "call, allowed",
    [
        (lambda s, t, h: divergence_loss(s, t, mask=MASK, weight=torch.rand(N), num_tokens=torch.tensor(4)), 0),
        (lambda s, t, h: divergence_loss(s, t, mask=MASK, reduction="none", return_stats=True)[0].sum(), 0),
        (lambda s, t, h: linear_divergence_loss(*h, weight=torch.rand(N)), 0),
        (lambda s, t, h: linear_divergence_loss(*h, mask=MASK, num_valid=4, num_tokens=torch.tensor(4)), 0),
        (lambda s, t, h: linear_divergence_loss(*h, mask=MASK), 1),
        (lambda s, t, h: topk_divergence_loss(s, *TOP, mask=MASK), 0),
        (lambda s, t, h: topk_divergence_loss(h[0], *TOP, student_weight=h[1], mask=MASK, num_valid=4), 0),
        (lambda s, t, h: linear_token_logprobs(*h[:2], TOP[1][:, 0]).sum(), 0),
        (lambda s, t, h: linear_token_logprobs(h[0], h[1].detach(), TOP[1][:, 0], mask=MASK, num_valid=4).sum(), 0),
    ],
)
def test_no_host_synchronisation(call, allowed, monkeypatch):
    """Nothing that a GPU would have to be waited for, in forward or, scaled by a device scalar, in backward."""
    for module in (linear, partial):  # as it is off the CPU
        monkeypatch.setattr(module, "check_num_valid", lambda mask, num_valid: None)
    monkeypatch.setattr(partial, "readable", lambda tensor: False)
    h_s, w_s, *teacher = heads()
    inputs = random(N, V).requires_grad_(), random(N, V, seed=1), (h_s.requires_grad_(), w_s.requires_grad_(), *teacher)

    class Inside(Spy):  # opaque ops are entered, to see what they run
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            name = func.__name__.removesuffix(".default")
            if func.namespace == "effopd" and hasattr(linear_rows, name):
                with self:
                    return getattr(linear_rows, name)(*args)
            return super().__torch_dispatch__(func, types, args, kwargs)

    with Inside() as spy:
        call(*inputs).backward()
    waited = [func for func, args in spy.calls if waits(func, args)]
    assert any("divergence_rows" in str(func) or "topk_rows" in str(func) for func, _ in spy.calls)
    assert len(waited) == allowed, waited


# ---- loss scaling


@pytest.mark.parametrize("kind", ["logits", "in place", "hidden", "autocast", "logits alone"])
def test_a_loss_scale_lifts_gradients_of_fp16(kind):
    """1/tokens and 1/V together are below fp16's range: the gradient is as good as eager PyTorch's under the scale."""
    tokens, V, D, scale = 8, 4000, 16, 65536.0
    h, w, ht, wt = random(tokens, D), random(V, D), random(tokens, D, seed=2), random(V, D, seed=3)
    dtype = torch.float32 if kind in ("autocast", "logits alone") else torch.float16
    h, w, ht, wt = (x.to(dtype) for x in (h, w, ht, wt))
    options = {"num_tokens": 8192, "inplace": True} if kind == "in place" else {"num_tokens": 8192}

    def eager(h, w, ht, wt):
        s, t = h @ w.T, ht @ wt.T
        if kind == "logits alone" and s.dtype == torch.float32:
            s, t = s.half(), t.half()
        s, t = (x.float() if x.dtype == torch.float16 else x for x in (s, t))
        q, p = s.log_softmax(-1), t.log_softmax(-1)
        return (q.exp() * (q - p)).sum() / 8192

    def ours(h, w, ht, wt):
        if kind in ("hidden", "autocast", "logits alone"):
            logits_dtype = torch.float16 if kind == "logits alone" else None
            return linear_divergence_loss(h, w, ht, wt, **options, logits_dtype=logits_dtype)
        return divergence_loss(h @ w.T, ht @ wt.T, **options)

    def gradients(loss, dtype, scale):
        leaves = [x.to(dtype).clone().requires_grad_() for x in (h, w)]
        with torch.autocast("cpu", torch.float16, enabled=kind == "autocast" and dtype != torch.float64):
            value = loss(*leaves, ht.to(dtype), wt.to(dtype))
        (value * scale).backward()
        return [leaf.grad.double() / scale for leaf in leaves]

    for found, same, exact in zip(
        gradients(ours, dtype, scale), gradients(eager, dtype, scale), gradients(eager, torch.float64, 1.0), strict=True
    ):
        assert (found - exact).norm() <= 1.05 * (same - exact).norm() + 1e-6 * exact.norm()


@pytest.mark.parametrize("k", [None, 4])
def test_hidden_states_in_fp16_wait_for_a_loss_scale_under_autocast_to_bf16(k):
    h, w, wt = random(8, 16).half().requires_grad_(), random(4000, 16, seed=1), random(4000, 16, seed=3)

    def gradient(num_tokens):
        with torch.autocast("cpu", torch.bfloat16):
            if k is None:
                loss = linear_divergence_loss(h, w, h.detach(), wt, num_tokens=num_tokens)
            else:
                known = (h.detach().float() @ wt.T).log_softmax(-1).topk(k)
                loss = topk_divergence_loss(h, *known, student_weight=w, num_tokens=num_tokens)
        return torch.autograd.grad(loss * num_tokens, h)[0]

    found, true = gradient(2**26).float(), gradient(1).float()
    assert (found - true).norm() <= 1e-2 * true.norm() > 0


def test_weights_of_zero_make_gradients_of_zero_in_fp16():
    student = random(N, V, dtype=torch.float16).requires_grad_()
    divergence_loss(student * 1, random(N, V, seed=1), weight=torch.zeros(N), inplace=True).backward()
    assert not student.grad.any()


def test_the_linear_losses_have_shapes_on_the_meta_device():
    """Where models are laid out before there is memory for them."""
    h, w, ht, wt = (x.to("meta") for x in heads())
    assert linear_divergence_loss(h, w, ht, wt, reduction="none").shape == (N,)
    assert linear_token_logprobs(h, w, torch.arange(N, device="meta")).shape == (N,)


@pytest.mark.filterwarnings("ignore:`torch.jit.script`")
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_forward_mode_is_refused(reduction):
    h, *rest = heads()
    for loss, at in (
        (lambda s: divergence_loss(s, random(N, V), reduction=reduction).sum(), random(N, V)),
        (lambda h: linear_divergence_loss(h, *rest, reduction=reduction).sum(), h),
        (lambda h: linear_token_logprobs(h, rest[0], torch.arange(N)).sum(), h),
    ):
        with pytest.raises(RuntimeError, match="jvp"):
            torch.func.jvp(loss, (at,), (torch.ones_like(at),))


# ---- sharded heads


def test_sharded_heads_are_gathered_and_gradients_averaged(tmp_path):
    """Each rank with tokens of its own, as data parallelism has it; the head plainly sharded, and by FSDP2."""
    script = tmp_path / "sharded.py"
    script.write_text("""
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, init_device_mesh
from effopd_kernels.divergence import (
    divergence_loss, linear_divergence_loss, linear_token_logprobs, topk_divergence_loss,
)

dist.init_process_group("gloo")
rank, mesh = dist.get_rank(), init_device_mesh("cpu", (2,))
torch.manual_seed(0)
h, w, ht, wt = torch.randn(2, 6, 8), torch.randn(50, 8), torch.randn(2, 6, 8), torch.randn(50, 8)
ids = torch.arange(6)
plain = w.clone().requires_grad_()
def both(i, head, teacher):
    return linear_divergence_loss(h[i], head, ht[i], teacher) + linear_token_logprobs(h[i], head, ids).sum()

losses = [both(i, plain, wt) for i in (0, 1)]
(sum(losses) / 2).backward()
module = nn.Linear(8, 50, bias=False)
module.weight.data.copy_(w)
fully_shard(module, mesh=mesh)
plane = init_device_mesh("cpu", (2, 1))
for head in (
    distribute_tensor(w, mesh, [Shard(0)]).requires_grad_(),
    distribute_tensor(w, plane, [Replicate(), Shard(0)]).requires_grad_(),
    module.weight,
):
    loss = both(rank, head, distribute_tensor(wt, mesh, [Shard(1)]))
    loss.backward()
    torch.testing.assert_close(loss, losses[rank])
    assert isinstance(head.grad, DTensor) and head.grad.placements == head.placements
    torch.testing.assert_close(head.grad.full_tensor(), plain.grad)
top = wt[:6].log_softmax(-1).topk(3)
for loss in (lambda s, **o: divergence_loss(s, wt[:6], **o), lambda s, **o: topk_divergence_loss(s, *top, **o)):
    options = {"mask": ids > 1, "weight": ids.float(), "num_tokens": torch.tensor(4.0)}
    apart = {name: distribute_tensor(x, mesh, [Shard(0) if x.ndim else Replicate()]) for name, x in options.items()}
    for student in (w[:6], distribute_tensor(w[:6], mesh, [Shard(0)])):
        assert torch.equal(loss(student, **apart), loss(w[:6], **options))
for placement in (Replicate(), Shard(0), Shard(1)):  # a teacher's top k, as of logits sharded by tokens or vocabulary
    shard = lambda x: distribute_tensor(x, mesh, [Shard(0) if x.ndim == 1 and placement.is_shard() else placement])
    assert torch.equal(topk_divergence_loss(w[:6], *map(shard, top)), topk_divergence_loss(w[:6], *top))
    assert torch.equal(linear_token_logprobs(h[0], w, shard(ids)), linear_token_logprobs(h[0], w, ids))
""")
    done = torchrun(script)
    assert done.returncode == 0, done.stdout + done.stderr


def test_sharded_logits_heads_and_masks_under_torch_compile(tmp_path):
    script = tmp_path / "compiled.py"
    script.write_text("""
import torch
import torch.distributed as dist
from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh
from effopd_kernels.divergence import divergence_loss, linear_divergence_loss

dist.init_process_group("gloo")
mesh = init_device_mesh("cpu", (2,))
torch.manual_seed(0)
h, w, t, mask = torch.randn(6, 8), torch.randn(50, 8), torch.randn(6, 50), torch.arange(6) % 3 > 0
head, logits = w.clone().requires_grad_(), (h @ w.T).requires_grad_()

def both(logits, head, mask):
    return divergence_loss(logits, t, mask=mask) + linear_divergence_loss(h, head, h, t.T @ h, mask=mask)

expected = both(logits, head, mask)
expected.backward()
given = logits, head, mask
sharded = [distribute_tensor(x.detach(), mesh, [Shard(x.ndim - 1)]).requires_grad_(x.requires_grad) for x in given]
loss = torch.compile(both, fullgraph=True)(*sharded)
loss.backward()
torch.testing.assert_close(loss, expected)
for here, whole in zip(sharded[:2], (logits, head)):
    torch.testing.assert_close(here.grad.full_tensor(), whole.grad)
""")
    done = torchrun(script)
    assert done.returncode == 0, done.stdout + done.stderr


# ---- errors


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_sums_over_tokens_may_leave_the_range_of_fp16_where_their_mean_does_not(reduction):
    tokens = 1 << 17
    hidden, teacher = torch.full((tokens, 1), 60.0).half(), torch.tensor([[0.2], [0.0]]).half()
    weight, bias = torch.tensor([[0.0], [0.2]]).half().requires_grad_(), torch.zeros(2).half().requires_grad_()
    loss = linear_divergence_loss(
        hidden, weight, hidden, teacher, FORWARD_KL, student_bias=bias, reduction=reduction, chunk_bytes=1 << 20
    )
    (loss if reduction == "mean" else loss / tokens).backward()
    assert weight.grad.dtype == bias.grad.dtype == torch.float16
    torch.testing.assert_close(weight.grad.float(), torch.tensor([[-60.0], [60.0]]), rtol=1e-2, atol=0)
    torch.testing.assert_close(bias.grad.float(), torch.tensor([-1.0, 1.0]), rtol=1e-2, atol=0)


def test_statistics_are_not_the_loss():
    loss, stats = divergence_loss(S, T, reduction="none", return_stats=True)
    kept = stats.divergence.clone()
    loss.mul_(0)
    assert torch.equal(stats.divergence, kept) and (kept > 0).all()


def test_fp64_of_one_side_is_fp64():
    student, teacher = 0.01 * random(N, V, dtype=torch.bfloat16), 0.01 * random(N, V, seed=1, dtype=torch.float64)
    for s, t in ((student, teacher), (teacher, student)):
        found, exact = divergence_loss(s, t), divergence_loss(s.double(), t.double())
        torch.testing.assert_close(found, exact, rtol=1e-12, atol=0)


def test_a_trainable_bias_of_the_teacher_is_a_constant():
    loss = linear_divergence_loss(*H, teacher_bias=random(V + 2).requires_grad_(), reduction="none")
    assert not loss.requires_grad


S, T = random(N, V), random(N, V, seed=1)
H = heads()


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: divergence_loss(S, T[:3]), ["(6, 50)", "(3, 50)"]),
        (lambda: divergence_loss(S.long(), T), ["student_logits", "int64"]),
        (lambda: divergence_loss(S, T.to("meta")), ["cpu", "meta"]),
        (lambda: divergence_loss(S[:, :0], T), ["(6, 0)"]),
        (lambda: divergence_loss(S, T, mask=MASK[:4]), ["mask", "(6,)", "(4,)"]),
        (lambda: divergence_loss(S, T, mask=MASK.float()), ["bool", "float32"]),
        (lambda: divergence_loss(S, T, mask=MASK.to("meta")), ["mask", "meta", "cpu"]),
        (lambda: divergence_loss(S, T, weight=torch.ones(6, 1)), ["weight", "(6,)", "(6, 1)"]),
        (lambda: divergence_loss(S, T, reduction="batchmean"), ["batchmean"]),
        (lambda: divergence_loss(S, T, reduction="sum", num_tokens=3), ["num_tokens"]),
        (lambda: divergence_loss(S, T, num_tokens=-5), ["num_tokens", "-5"]),
        (lambda: divergence_loss(S, T, num_tokens=math.nan), ["num_tokens", "nan"]),
        (lambda: divergence_loss(S, T, num_tokens=torch.ones(2)), ["num_tokens", "(2,)"]),
        (lambda: divergence_loss(S, T, mask=[True] * 6), ["mask", "list"]),
        (lambda: divergence_loss(S, None), ["teacher_logits", "NoneType"]),
        (lambda: linear_divergence_loss(H[0], torch.nn.Linear(8, 50), *H[2:]), ["student_weight", "Linear"]),
        (lambda: divergence_loss(S, T, temperature=0.0), ["temperature", "0.0"]),
        (lambda: divergence_loss(S, T, teacher_temperature=-1.0), ["teacher_temperature", "-1.0"]),
        (lambda: linear_divergence_loss(*H, student_logit_scale=0.0), ["student_logit_scale", "0.0"]),
        (lambda: linear_divergence_loss(*H, teacher_softcap=-30.0), ["teacher_softcap", "-30.0"]),
        (lambda: divergence_loss(S, T, "reverse_kl"), ["REVERSE_KL", "reverse_kl"]),
        (lambda: linear_divergence_loss(H[0], H[3], H[2], H[3]), ["student_weight", "(6, 8)", "(52, 9)"]),
        (lambda: linear_divergence_loss(H[0], H[1], H[0], H[3]), ["teacher_weight", "(6, 8)", "(52, 9)"]),
        (lambda: linear_divergence_loss(H[0][:4], *H[1:]), ["(4, 8)", "(6, 9)"]),
        (lambda: linear_divergence_loss(H[0], H[1][:0], *H[2:]), ["student_weight is empty"]),
        (lambda: linear_divergence_loss(*H, student_bias=torch.zeros(3)), ["student_bias", "(50,)", "(3,)"]),
        (lambda: linear_divergence_loss(H[0].bfloat16(), *H[1:]), ["bfloat16", "float32", "autocast"]),
        (lambda: linear_divergence_loss(*H, num_valid=3), ["num_valid"]),
        (lambda: linear_divergence_loss(*H, mask=MASK, num_valid=3), ["num_valid", "3", "4"]),
        (lambda: linear_divergence_loss(*H, chunk_bytes=0), ["chunk_bytes", "0"]),
        (lambda: linear_divergence_loss(*H, logits_dtype=torch.int8), ["logits_dtype", "int8"]),
        (lambda: divergence_loss(S, T, temperature=math.inf), ["temperature", "inf"]),
        (lambda: divergence_loss(S, T, temperature=np.float32(math.inf)), ["temperature", "inf"]),
        (lambda: divergence_loss(S, T, temperature=torch.tensor(math.inf)), ["temperature", "inf"]),
        (lambda: divergence_loss(S, T, num_tokens=np.float32(math.inf)), ["num_tokens", "inf"]),
        (lambda: Divergence(np.float32(math.inf), 0.0, 0.0), ["finite", "inf"]),
        (lambda: linear_divergence_loss(*H, student_softcap=math.inf), ["student_softcap", "inf"]),
        (lambda: linear_divergence_loss(*H, chunk_bytes=1e6), ["chunk_bytes", "1000000.0"]),
        (lambda: linear_divergence_loss(*H, mask=MASK, num_valid=6.0), ["num_valid", "6.0"]),
        (lambda: divergence_loss(S, T, weight=torch.ones(6) * 1j), ["weight", "complex64"]),
        (lambda: divergence_loss(S, T, temperature="1"), ["temperature", "'1'"]),
        (lambda: divergence_loss(S, T, temperature=10**400), ["temperature", "finite"]),
        (lambda: divergence_loss(S, T, num_tokens=10**400), ["num_tokens", "finite"]),
        (lambda: Divergence(10**400, 0, 0), ["finite"]),
        (lambda: linear_divergence_loss(*H, chunk_bytes=2**63), ["chunk_bytes", "64 bits"]),
        (lambda: linear_divergence_loss(*H, mask=MASK, num_valid=10**30), ["num_valid", "64 bits"]),
        (lambda: linear_divergence_loss(*H, student_softcap=torch.ones(2)), ["student_softcap", "(2,)"]),
        (lambda: divergence_loss(S, T, temperature=None), ["temperature", "None"]),
        (lambda: divergence_loss(S, T, temperature=torch.ones(6)), ["temperature", "(6,)"]),
        (lambda: divergence_loss(S, T, temperature=torch.ones(1).requires_grad_()), ["temperature", "gradient"]),
        (lambda: divergence_loss(S, T, num_tokens="4"), ["num_tokens", "'4'"]),
        (lambda: divergence_loss(S, T, num_tokens=torch.tensor(4j)), ["num_tokens", "complex"]),
        (lambda: linear_divergence_loss(*H, chunk_bytes="1GB"), ["chunk_bytes", "'1GB'"]),
        (lambda: linear_divergence_loss(*H, student_logit_scale=None), ["student_logit_scale", "None"]),
        (lambda: linear_token_logprobs(H[0], H[1], torch.arange(6), temperature=None), ["temperature", "None"]),
        (lambda: linear_token_logprobs(H[0], H[1], torch.arange(6, device="meta")), ["ids", "meta", "cpu"]),
        (lambda: linear_token_logprobs(H[0], torch.ones(()), torch.arange(6)), ["hidden", "weight", "()"]),
        (lambda: jsd("0.5"), ["beta", "'0.5'"]),
        (lambda: Divergence(math.inf, 0, 0), ["inf"]),
        (lambda: Divergence("1", 0, 0), ["numbers", "'1'"]),
        (lambda: divergence_loss(S.to_sparse(), T), ["student_logits", "sparse"]),
        (lambda: divergence_loss(S.to(torch.float8_e4m3fn), T), ["student_logits", "float8"]),
        (lambda: linear_divergence_loss(*H, logits_dtype=torch.float8_e4m3fn), ["logits_dtype", "float8"]),
        (lambda: linear_divergence_loss(*H, logits_dtype="float32"), ["logits_dtype", "'float32'"]),
        (lambda: topk_divergence_loss(S[0, 0], T[:, :3], MASK), ["teacher_logprobs", "()", "(6, 3)"]),
        (lambda: divergence_loss(S, T, num_tokens=1e39), ["num_tokens", "finite in fp32", "1e+39"]),
        (lambda: divergence_loss(S, T, temperature=1e-30), ["temperature must be at least 1e-06", "1e-30"]),
        (lambda: divergence_loss(S, T, teacher_temperature=1e-7), ["teacher_temperature", "at least 1e-06", "1e-07"]),
        (lambda: divergence_loss(S, T, mask=MASK.to_sparse()), ["mask", "dense", "sparse"]),
        (lambda: divergence_loss(S, T, weight=torch.ones(6).to_sparse()), ["weight", "dense", "sparse"]),
        (lambda: divergence_loss(S, T, num_tokens=torch.ones(1).to_sparse()), ["num_tokens", "dense", "sparse"]),
        (
            lambda: linear_divergence_loss(H[0][:0], H[1], H[2][:0], H[3], mask=MASK[:0], num_valid=-1),
            ["num_valid", "negative", "-1"],
        ),
        (lambda: linear_token_logprobs(H[0], H[1], torch.arange(6), softcap=""), ["softcap", "''"]),
        (lambda: linear_token_logprobs(H[0], H[1], torch.arange(6), softcap=torch.ones(2)), ["softcap", "(2,)"]),
    ],
)
def test_errors_name_what_does_not_fit(call, words):
    with Spy() as spy, pytest.raises((ValueError, TypeError)) as error:
        call()
    assert all(word in str(error.value) for word in words), error.value
    assert not any("divergence_rows" in str(func) or "mm" in str(func) for func, _ in spy.calls)  # before any work


def test_numbers_may_be_of_any_kind():
    top = T.log_softmax(-1).topk(3)
    for number, same in ((Fraction(7, 2), 3.5), (2**70, 2.0**70)):
        assert torch.equal(divergence_loss(S, T, num_tokens=number), divergence_loss(S, T, num_tokens=same))
        knobs = [dict.fromkeys(("temperature", "student_logit_scale", "student_softcap"), x) for x in (number, same)]
        assert torch.equal(*(topk_divergence_loss(S, *top, **each) for each in knobs))
        knobs = [dict.fromkeys(("temperature", "logit_scale", "softcap"), x) for x in (number, same)]
        assert torch.equal(*(linear_token_logprobs(H[0], H[1], torch.arange(6), **each) for each in knobs))


def test_a_soft_cap_of_zero_is_none():
    assert torch.equal(linear_divergence_loss(*H, student_softcap=0.0), linear_divergence_loss(*H))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])  # in C++, and in the reference
def test_reference_and_kernel_share_the_floor(dtype):
    student, teacher = torch.zeros(1, 2, dtype=dtype), torch.tensor([[0.0, -math.inf]], dtype=dtype)
    expected = torch.tensor(5000 - math.log(2), dtype=dtype)  # half of each log-probability's distance
    torch.testing.assert_close(divergence_loss(student, teacher), expected, rtol=1e-6, atol=0)


def test_values_are_not_looked_at_where_there_are_none():
    with FakeTensorMode():
        S, H, ids = torch.empty(6, 50), [torch.empty(*x.shape) for x in heads()], torch.empty(6, 3, dtype=torch.long)
        assert topk_divergence_loss(S, torch.empty(6, 3), ids).shape == ()
        assert linear_token_logprobs(H[0], H[1], ids[:, 0]).shape == (6,)
        mask = torch.empty(6, dtype=torch.bool)
        assert linear_divergence_loss(*H, mask=mask, num_valid=4, reduction="none").shape == (6,)


@pytest.mark.filterwarnings("error")
def test_weights_and_the_number_of_tokens_are_constants():
    student, count, weight = random(N, V).requires_grad_(), torch.tensor(4.0), torch.rand(N)
    for options in ({"num_tokens": count.requires_grad_()}, {"weight": weight.requires_grad_(), "reduction": "none"}):
        divergence_loss(student, random(N, V, seed=1), **options).sum().backward()
    assert count.grad is None and weight.grad is None


@pytest.mark.skipif(not hasattr(ops.native(), "divergence_rows"), reason="needs the C++ extension")
@pytest.mark.skipif(sys.platform != "linux", reason="limits memory as Linux does")
def test_a_limit_on_memory_ends_no_loss():
    """Its threads are those of PyTorch, which are there already."""
    script = """if True:
        import resource, torch
        from effopd_kernels import reverse_kl_loss
        s, t = torch.randn(64, 40000), torch.randn(64, 40000)
        expected = reverse_kl_loss(s, t)
        torch.set_num_threads(8)
        s.exp()  # an operation of PyTorch itself, which could not start them either
        pages = int(open("/proc/self/statm").read().split()[0])
        limit = pages * resource.getpagesize() + (12 << 20)  # a stack takes 8 MB
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        assert reverse_kl_loss(s, t) == expected
    """
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
