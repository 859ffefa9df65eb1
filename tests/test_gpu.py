"""The public functions on a GPU, against fp64 or the CPU: what is dispatched there beyond the kernels, and no waiting.

N tokens, V vocabulary, D hidden size.
"""

import oracle
import pytest
import torch
from interpreted import DEVICE, needs_gpu

from effopd_kernels import (
    EffOPDController,
    batched_rsvd,
    extrapolate,
    extrapolate_,
    spectral_metrics,
    update_svd,
)
from effopd_kernels.divergence import (
    FORWARD_KL,
    REVERSE_KL,
    divergence_loss,
    jsd,
    linear_divergence_loss,
    linear_token_logprobs,
    topk_divergence_loss,
)

pytestmark = needs_gpu

MEMBERS = {"reverse": REVERSE_KL, "forward": FORWARD_KL, "jsd(0.3)": jsd(0.3)}
every_member = pytest.mark.parametrize("member", MEMBERS)
BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
N, V, D = 96, 5003, 64
NUMBERS = (0.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0)  # reverse KL; temperatures, scales, soft caps


def random(*shape, seed=0, spread=1.0, dtype=FP32):
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * spread).to(DEVICE, dtype)


def mask():
    return (torch.arange(N) % 3 != 0).to(DEVICE)


def heads(dtype=FP32):
    """Hidden states and head of the student, then of the teacher, whose vocabulary is padded."""
    shapes = (N, D), (V, D), (N, D // 2), (V + 61, D // 2)
    return [random(*shape, seed=i, spread=0.5 if i % 2 else 1.0, dtype=dtype) for i, shape in enumerate(shapes)]


def loss_and_grads(function, *inputs, leaves=1):
    inputs = [x.detach().requires_grad_(i < leaves) for i, x in enumerate(inputs)]
    loss = function(*inputs)
    loss.backward()
    return loss.detach(), *(x.grad for x in inputs[:leaves])


def assert_near(found, expected, relative):
    """‖found − expected‖ ≤ relative·‖expected‖ of each pair."""
    for f, e in zip(found, expected, strict=True):
        f, e = f.detach().double().cpu(), e.detach().double().cpu()
        assert f.isfinite().all() and (f - e).norm() <= relative * e.norm(), (f - e).norm() / e.norm()


# ---- divergences


@every_member
@pytest.mark.parametrize("dtype", [FP64, FP32, BF16, FP16])
@pytest.mark.parametrize("inplace", [False, True])
def test_from_logits(member, dtype, inplace):
    s, t, kept = random(N, V, spread=3, dtype=dtype), random(N, V + 61, seed=1, spread=3, dtype=dtype), mask()
    log_p = oracle.log_probs(t[:, :V].double(), 0.8)
    expected = oracle.value_and_grad(lambda x: oracle.FAMILY[member](oracle.log_probs(x, 0.8), log_p)[kept].sum(), s)
    options = {"mask": kept, "temperature": 0.8, "reduction": "sum", "inplace": inplace}
    found = loss_and_grads(lambda x: divergence_loss(x, t, MEMBERS[member], **options), s.clone())
    assert_near(found, expected, 2 * torch.finfo(dtype).eps + 1e-5)


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_sliced_logits(dtype):
    s, t = (random(3, N // 3 + 1, V + 5, seed=i, spread=3, dtype=dtype) for i in range(2))
    copies = loss_and_grads(divergence_loss, s[:, :-1].contiguous(), t[:, :-1].contiguous())
    assert_near(loss_and_grads(divergence_loss, s[:, :-1], t[:, :-1]), copies, 2 * torch.finfo(FP32).eps)


def test_upstream_gradients_statistics_and_rows():
    s, t = random(N, V, spread=3), random(N, V, seed=1, spread=3)
    loss, grad = loss_and_grads(lambda x: divergence_loss(x, t), s)
    assert_near(loss_and_grads(lambda x: 3 * divergence_loss(x, t), s), (3 * loss, 3 * grad), 1e-6)
    rows, stats = divergence_loss(s, t, reduction="none", return_stats=True)
    assert_near((rows.mean(), stats.divergence), (loss, rows), 1e-6)
    log_q, log_p = (oracle.log_probs(x.double()) for x in (s, t))
    assert_near((stats.student_entropy, stats.teacher_entropy), map(oracle.entropy, (log_q, log_p)), 1e-6)
    per_row = loss_and_grads(lambda x: (divergence_loss(x, t, reduction="none") / N).sum(), s)
    assert_near(per_row, (loss, grad), 1e-6)
    leaf = s.clone().requires_grad_()
    again = divergence_loss(leaf, t)
    again.backward(retain_graph=True)
    again.backward()
    assert_near((leaf.grad,), (2 * grad,), 1e-6)


@every_member
@pytest.mark.parametrize("dtype, logits_dtype", [(FP32, None), (BF16, None), (BF16, FP32), (FP16, FP32)])
@pytest.mark.parametrize("num_valid", [None, 70])
@pytest.mark.parametrize("chunk_bytes", [None, 600_000])
def test_from_hidden_states(member, dtype, logits_dtype, num_valid, chunk_bytes):
    """One product or many, of operands narrower than their result or not."""
    bias, options = random(V, seed=9, dtype=dtype), {"num_valid": num_valid, "chunk_bytes": chunk_bytes}
    tensors = heads(dtype)

    def loss(h, w, b, *teacher, **more):
        return linear_divergence_loss(h, w, *teacher, MEMBERS[member], student_bias=b, reduction="sum", **more)

    found = loss_and_grads(
        lambda *x: loss(*x, mask=mask(), logits_dtype=logits_dtype, **options), *tensors[:2], bias, *tensors[2:],
        leaves=3,
    )  # fmt: skip
    wide = [x.double().cpu() for x in (*tensors[:2], bias, *tensors[2:])]
    expected = loss_and_grads(lambda *x: loss(*x, mask=mask().cpu()), *wide, leaves=3)
    assert [g.dtype for g in found[1:]] == [dtype] * 3
    assert_near(found, expected, 4 * torch.finfo(dtype).eps + 2e-5)


def test_autocast_projects_in_its_dtype():
    tensors = heads()

    def loss(*x):
        with torch.autocast(DEVICE, BF16):
            return linear_divergence_loss(*x)

    expected = loss_and_grads(linear_divergence_loss, *(x.bfloat16() for x in tensors), leaves=2)
    found = loss_and_grads(loss, *tensors, leaves=2)
    assert [g.dtype for g in found[1:]] == [FP32] * 2
    assert_near(found, expected, 1e-2)


@every_member
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
@pytest.mark.parametrize("k", [1, 20, 1000])
def test_partial_teachers_from_logits(member, dtype, k):
    s, kept = random(2, N // 2 + 1, V, spread=3, dtype=dtype)[:, :-1], mask().view(2, -1)
    logprobs, ids = (x.view(2, -1, k) for x in random(N, V, seed=5, spread=3).log_softmax(-1).topk(k))
    found, expected = (
        loss_and_grads(
            lambda s, p, i, m: topk_divergence_loss(s, p, i, MEMBERS[member], mask=m, reduction="sum"), *tensors
        )
        for tensors in ((s, logprobs, ids, kept), (s.double().cpu(), logprobs.double().cpu(), ids.cpu(), kept.cpu()))
    )
    assert_near(found, expected, 4 * torch.finfo(dtype).eps + 2e-5)


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_partial_teachers(dtype):
    h, w, *_ = heads(dtype)
    logprobs, ids = torch.log_softmax(random(N, V, seed=5, spread=3), -1).topk(8)

    def loss(h, w, logprobs, ids):
        token, entropy = linear_token_logprobs(h, w, ids[:, 0], chunk_bytes=4_000_000, return_entropy=True)
        return topk_divergence_loss(h, logprobs, ids, student_weight=w) + token.mean() + entropy.mean()

    found = loss_and_grads(lambda *x: loss(*x, logprobs, ids), h, w, leaves=2)
    wide = [x.double().cpu() for x in (h, w)]
    expected = loss_and_grads(lambda *x: loss(*x, logprobs.double().cpu(), ids.cpu()), *wide, leaves=2)
    assert_near(found, expected, 4 * torch.finfo(dtype).eps + 2e-5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")  # inductor's
@pytest.mark.parametrize("inplace", [False, True])
def test_compiles_with_inductor(inplace):
    s, t, tensors = random(N, V), random(N, V, seed=1), heads(BF16)

    def loss(s, h, w, *teacher):
        return divergence_loss(s * 1, t, inplace=inplace) + linear_divergence_loss(h, w, *teacher)

    found, expected = (loss_and_grads(f, s, *tensors, leaves=3) for f in (torch.compile(loss, fullgraph=True), loss))
    assert_near(found, expected, 1e-2)


def test_opcheck():
    s, t, kept, scale = random(8, V), random(8, V, seed=1), mask()[:8], random(8, seed=2)
    for op in (torch.ops.effopd.divergence_rows.default, torch.ops.effopd.divergence_rows_.default):
        torch.library.opcheck(op, (s, t, kept, scale, *NUMBERS, True, True))
    teacher, numbers = (random(8, D, seed=3), random(V, D, seed=4)), (*NUMBERS, FP32, FP32, None, 200_000)
    linear = (random(8, D), random(V, D, seed=1), None, *teacher, None, kept, None, *numbers, None, True, True, False)
    torch.library.opcheck(torch.ops.effopd.linear_divergence_rows.default, (*linear, True, False))
    torch.library.opcheck(torch.ops.effopd.linear_divergence_rows.default, (*linear, True, True))
    head = *linear[:3], kept, scale, FP32, None, True, False
    torch.library.opcheck(torch.ops.effopd.head_gradients.default, (random(8, V, seed=5), *head))


def test_in_place_the_loss_needs_no_memory():
    s, t = random(64, 150_000, dtype=BF16).requires_grad_(), random(64, 150_000, seed=1, dtype=BF16)
    divergence_loss(s.detach(), t)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    divergence_loss(s, t, inplace=True).backward()
    assert torch.cuda.max_memory_allocated() - before < 1 << 20


@pytest.fixture
def waiting_raises():
    yield lambda: torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")


def test_nothing_waits_for_the_device(waiting_raises):
    """As far as PyTorch can tell: copies from memory that is not pinned it lets pass."""
    s, t, kept, tensors = random(N, V), random(N, V, seed=1), mask(), heads(BF16)
    weights = [random(300, 50, seed=i) for i in range(3)]
    waiting_raises()
    loss_and_grads(lambda x: divergence_loss(x, t, mask=kept, num_tokens=7), s)
    divergence_loss(s, t, jsd(0.5), weight=kept.float(), return_stats=True)
    loss_and_grads(lambda *x: linear_divergence_loss(*x, mask=kept, num_valid=64), *tensors, leaves=2)
    extrapolate_(*([w] for w in weights), 3.0)


def test_on_a_stream_of_its_own():
    s, t, weights = random(N, V), random(N, V, seed=1), [random(3000, 500, seed=i) for i in range(3)]
    expected = divergence_loss(s, t), extrapolate_(*([w.clone()] for w in weights), 3.0)[1]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        found = divergence_loss(s, t), extrapolate_(*([w] for w in weights), 3.0)[1]
    stream.synchronize()
    assert all(torch.equal(f, e) for f, e in zip(found, expected, strict=True))


# ---- extrapolation


@pytest.mark.parametrize("masters", [False, True])
def test_lists_of_weights(masters):
    """Of mixed dtypes, with and without masters in one list, as on the CPU."""
    dtypes = [BF16, FP32, FP16, FP64, BF16]
    sides = [[(random(37, 41 + i, seed=9 * k + i) + 0.1).to(dtype) for i, dtype in enumerate(dtypes)] for k in range(3)]
    wide = [w.float() if masters and i % 2 == 0 else None for i, w in enumerate(sides[0])]
    on_cpu = [[None if w is None else w.cpu() for w in side] for side in (*sides, wide)]
    alphas = [3.0, 1.0, 0.0, 5.0, -0.5]
    stats = extrapolate_(*sides, alphas, masters=wide)
    expected = extrapolate_(*on_cpu[:3], alphas, masters=on_cpu[3])
    for found, want in zip((*sides[0], *wide), (*on_cpu[0], *on_cpu[3]), strict=True):
        if found is not None:
            torch.testing.assert_close(found.cpu(), want, rtol=torch.finfo(want.dtype).eps, atol=1e-6)
    assert_near(stats[:2], expected[:2], 1e-3)
    assert not stats.nonfinite.any()


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_gradient_of_alpha(dtype):
    w0, delta, upstream = (random(500, 33, seed=i, dtype=dtype) for i in range(3))
    leaves = w0.requires_grad_(), delta.requires_grad_(), torch.tensor(2.5, device=DEVICE, requires_grad=True)
    extrapolate(*leaves).backward(upstream)
    wide = [x.detach().double().cpu().requires_grad_() for x in leaves]
    extrapolate(*wide).backward(upstream.double().cpu())
    assert_near([x.grad for x in leaves], [x.grad for x in wide], torch.finfo(dtype).eps + 1e-6)


def test_more_than_two_to_the_31st_elements():
    weights = [torch.full((2**31 + 5000,), value, dtype=BF16, device=DEVICE) for value in (0.0, 1.0, 2.0)]
    stats = extrapolate_(*([w] for w in weights), 3.0)
    assert (weights[0] == 4).all() and abs(stats.weight_sq.item() / (16 * weights[0].numel()) - 1) < 1e-5
    torch.ops.effopd.scale_(weights[0], torch.tensor(0.5, device=DEVICE))
    assert (weights[0] == 2).all()


@pytest.mark.parametrize("place", ["device", "host", "disk"])
@pytest.mark.parametrize("scores", [(0.5, 0.6, 0.7, 0.6), (0.5, 0.4)], ids=["accepted", "restored"])
def test_controller(place, scores, tmp_path):
    def decided(device):
        torch.manual_seed(0)
        net = torch.nn.ModuleDict({"self_attn": torch.nn.Linear(50, 40), "mlp": torch.nn.Linear(30, 20)})
        net = net.to(device, BF16)
        script = list(scores)
        controller = EffOPDController(net, lambda: script.pop(0), anchor_device=place, anchor_dir=tmp_path)
        with torch.no_grad():
            for i, p in enumerate(net.parameters()):
                p += 0.1 * random(*p.shape, seed=i).to(device, BF16)
        return controller.step(1), [p.detach().cpu() for p in net.parameters()]

    event, weights = decided(DEVICE)
    expected_event, expected = decided("cpu")
    assert event.alpha == expected_event.alpha
    for found, want in zip(weights, expected, strict=True):
        torch.testing.assert_close(found, want, rtol=torch.finfo(BF16).eps, atol=1e-6)


# ---- low rank


def updates(B=3, m=640, n=800):
    """(current, base) bf16 (B, m, n) whose difference has σ_i ∝ 1/i over 40 directions, and that difference in fp64."""
    u, v = (torch.linalg.qr(random(B, side, 40, seed=side))[0] for side in (m, n))
    base = random(B, m, n, spread=0.02, dtype=BF16)
    current = (base + (u / torch.arange(1, 41, device=DEVICE)) @ v.mT).to(BF16)
    return current, base, current.double() - base.double()


@pytest.mark.parametrize("route", ["subspace", "gram", "exact"])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("k", [1, 16])
def test_leading_triplets(route, transposed, k):
    current, base, exact = (x.mT if transposed else x for x in updates())
    svd = batched_rsvd(current, k, base=base, route=route)
    truth = torch.linalg.svdvals(exact)[:, :k]
    lower, upper = svd.bounds()
    assert (lower <= truth).all() and (truth <= upper).all()
    assert ((svd.S.double() - truth) / truth).abs().max() < 1e-4
    for q in (svd.U, svd.Vh.mT):
        assert (q.double().mT @ q.double() - torch.eye(k, device=DEVICE)).abs().max() < 1e-6
    rest = exact - svd.U.double() * svd.S.double().unsqueeze(-2) @ svd.Vh.double()
    assert (rest.flatten(1).norm(dim=1) <= svd.residual_norm).all()


def test_a_batch_gives_what_each_matrix_gives():
    current, base, _ = updates()
    together = batched_rsvd(current, 4, base=base)
    alone = [batched_rsvd(c, 4, base=b) for c, b in zip(current, base, strict=True)]
    assert_near(together[:3], [torch.stack(field) for field in list(zip(*alone, strict=True))[:3]], 1e-4)


@pytest.mark.parametrize("method", ["exact", "slq"])
def test_metrics(method):
    current, base, _ = updates(B=2)
    found = spectral_metrics(current, base=base, method=method)
    expected = spectral_metrics(current.cpu(), base=base.cpu(), method=method)
    for name in ("spectral_norm", "frobenius_norm", "effective_rank", "participation_ratio", "noise_edge"):
        assert_near([getattr(found, name)], [getattr(expected, name)], 1e-4)


def test_checkpoints():
    shapes = {"a": (300, 200), "b": (200, 300), "c": (300, 200), "experts": (2, 200, 300)}
    anchor = {name: random(*shape, seed=i, dtype=BF16).cpu() for i, (name, shape) in enumerate(shapes.items())}
    current = {name: w + 0.01 * random(*w.shape, seed=9, dtype=BF16).cpu() for name, w in anchor.items()}
    found, expected = update_svd(current, anchor, 3, device=DEVICE), update_svd(current, anchor, 3)
    assert_near([svd.S for svd in found.values()], [svd.S for svd in expected.values()], 1e-4)
