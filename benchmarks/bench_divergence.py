"""Divergence losses against eager PyTorch, torch.compile, F.kl_div, TRL and Liger.

    pytest benchmarks/bench_divergence.py --benchmark-only [--quick] [--save-results]

Traffic from logits, in tensors of N×V: value and gradient read s, read t, write ds = 3; value alone 2; with the
teacher known in part 2: read s, write ds. FLOP from hidden states: 4 GEMM units of 2·N·V·D (student and teacher
projections, dh, dW), 3 with the teacher known in part, 2 where the head is frozen too. The table gives each
contender's time, our speed relative to it, and the fraction of the machine: bytes over the measured copy bandwidth, or
FLOP over the measured GEMM rate, both taken in the same run. Shapes that a device cannot hold are skipped; peers that
are not installed, or that need a GPU where there is none, are left out.
"""

import pytest
import torch
import torch.nn.functional as F
from common import DEVICE, PATIENCE, copy_bandwidth, gemm_rate, peak_in_child, race

from effopd_kernels.divergence import (
    divergence_loss,
    jsd,
    linear_reverse_kl_loss,
    linear_token_logprobs,
    ops,
    reverse_kl_loss,
    topk_divergence_loss,
)

pytestmark = pytest.mark.filterwarnings("ignore")  # the peers' own

GPU = DEVICE == "cuda"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

# (device, tokens, vocabulary, dtype)
LOGITS = [
    ("cpu", 256, 151936, "fp32"),
    ("cpu", 256, 151936, "bf16"),
    ("cuda", 8192, 151936, "bf16"),
    ("cuda", 8192, 131072, "fp32"),
]
# (device, tokens, hidden, vocabulary, dtype)
LINEAR = [
    ("cpu", 512, 896, 151936, "fp32"),
    ("cpu", 512, 896, 151936, "bf16"),
    *(("cuda", tokens, 4096, 128256, "bf16") for tokens in (1024, 2048, 4096, 8192)),
]


def available_bytes() -> int:
    if GPU:
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0]
    with open("/proc/meminfo") as f:
        return next(int(line.split()[1]) * 1024 for line in f if line.startswith("MemAvailable"))


def need(device: str, nbytes: int) -> None:
    if device != DEVICE:
        pytest.skip(f"a {device} shape")
    if nbytes > available_bytes():
        pytest.skip(f"needs {nbytes / 1e9:.0f} GB")


def eager_reverse_kl(s, t):
    log_q, log_p = F.log_softmax(s, -1), F.log_softmax(t, -1)
    return (log_q.exp() * (log_q - log_p)).sum(-1).mean()


def kl_div(s, t):
    return F.kl_div(F.log_softmax(t, -1), F.log_softmax(s, -1), log_target=True, reduction="batchmean")


def eager_jsd(s, t):
    log_q, log_p = F.log_softmax(s, -1), F.log_softmax(t, -1)
    log_m = torch.logaddexp(log_q, log_p) - 0.6931471805599453
    return 0.5 * ((log_p.exp() * (log_p - log_m)).sum(-1) + (log_q.exp() * (log_q - log_m)).sum(-1)).mean()


def with_backward(loss, *leaves):
    def call():
        loss().backward()
        for leaf in leaves:  # each gives back its own gradient: returning pages to the system takes time too
            leaf.grad = None

    return call


def without_grad(loss):
    def call():
        with torch.no_grad():
            loss()

    return call


def rows_of(times: dict, ours: str, work: float, ceiling: float, of: str) -> list[dict]:
    return [
        {
            "contender": name,
            "ms": round(1e3 * t, 2),
            f"{ours} is × faster": round(t / times[ours], 2),
            of: round(work / t / ceiling, 3),
        }
        for name, t in times.items()
    ]


@pytest.mark.parametrize("device, N, V, dtype", LOGITS)
def test_logits(benchmark, report, request, device, N, V, dtype):
    quick = request.config.getoption("--quick")
    N, rounds = (N // 4, 3) if quick else (N, 7)
    size = N * V * DTYPES[dtype].itemsize
    need(device, 14 * size)  # eager's temporaries
    s, t = (torch.randn(N, V, device=DEVICE).mul_(3).to(DTYPES[dtype]) for _ in range(2))
    s.requires_grad_()
    compiled = torch.compile(eager_reverse_kl)
    contenders = {
        "ours": lambda: reverse_kl_loss(s, t),
        "ours, in place": lambda: reverse_kl_loss(s, t, inplace=True),
        **({} if GPU else {"ours, on new pages": lambda: (release_pages(), reverse_kl_loss(s, t))[1]}),
        "eager": lambda: eager_reverse_kl(s, t),
        "torch.compile": lambda: compiled(s, t),
        "F.kl_div": lambda: kl_div(s, t),
    }
    bandwidth = copy_bandwidth()
    times = race({name: with_backward(loss, s) for name, loss in contenders.items()}, rounds)
    rows = rows_of(times, "ours", 3 * size, bandwidth, "of copy bandwidth")
    for row in rows:
        row["in place is × faster"] = round(times[row["contender"]] / times["ours, in place"], 2)
        if not GPU and row["contender"] in LOGITS_LOSSES:
            setup = LOGITS_SETUP.format(
                folder=str(request.path.parent), N=N, V=V, dtype=DTYPES[dtype], name=row["contender"]
            )
            row["extra MB"] = round((peak_in_child(setup, "loss(s, t).backward()") - size) / 1e6)
    report(f"reverse KL from logits, value and gradient, {N} × {V} {dtype}", rows, copy_GBs=round(bandwidth / 1e9, 1))

    forward = {name: without_grad(contenders[name]) for name in ("ours", "eager", "torch.compile", "F.kl_div")}
    times = race(forward, rounds)
    report(
        f"reverse KL from logits, value, {N} × {V} {dtype}",
        rows_of(times, "ours", 2 * size, bandwidth, "of copy bandwidth"),
    )

    contenders = {"ours": lambda: divergence_loss(s, t, jsd(0.5)), "eager": lambda: eager_jsd(s, t)}
    if GPU:
        contenders |= liger_jsd(s, t)
    times = race({name: with_backward(loss, s) for name, loss in contenders.items()}, min(rounds, 3))
    report(
        f"JSD from logits, value and gradient, {N} × {V} {dtype}",
        rows_of(times, "ours", 3 * size, bandwidth, "of copy bandwidth"),
    )
    s, t = (x.detach().view(4, N // 4, V)[:, :-1] for x in (s, t))  # as the shift by one token leaves them
    s.requires_grad_()
    contenders = {"ours": lambda: reverse_kl_loss(s, t), "eager": lambda: eager_reverse_kl(s, t)}
    times = race({name: with_backward(loss, s) for name, loss in contenders.items()}, min(rounds, 3))
    report(
        f"reverse KL from sliced logits, value and gradient, 4 × {N // 4 - 1} × {V} {dtype}",
        rows_of(times, "ours", 3 * size, bandwidth, "of copy bandwidth"),
    )
    benchmark.pedantic(with_backward(lambda: reverse_kl_loss(s, t), s), rounds=3)


LOGITS_LOSSES = {"ours": reverse_kl_loss, "eager": eager_reverse_kl}
LOGITS_SETUP = """
import sys
sys.path.insert(0, {folder!r})
import bench_divergence as bench
torch.manual_seed(0)
loss = bench.LOGITS_LOSSES[{name!r}]
small = torch.randn(64, 2048, dtype={dtype})  # threads and libraries are loaded before the peak is forgotten
loss(small.requires_grad_(), small.detach()).backward()
s, t = (torch.randn({N}, {V}).to({dtype}) for _ in range(2))
s.requires_grad_()
"""


def release_pages():
    """Give back what the last gradient left for the next (csrc/buffers.cpp)."""
    if hasattr(ops.native(), "release_rows"):
        ops.native().release_rows()


def liger_jsd(s, t):
    try:
        from liger_kernel.transformers.functional import liger_jsd
    except ImportError:
        return {}
    return {"Liger JSD": lambda: liger_jsd(F.log_softmax(s, -1), F.log_softmax(t, -1), beta=0.5)}


def linear_contenders(h, w, ht, wt) -> dict:
    contenders = {
        "ours": lambda: linear_reverse_kl_loss(h, w, ht, wt),
        "eager": lambda: eager_reverse_kl(F.linear(h, w), F.linear(ht, wt)),
    }
    try:
        from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

        contenders["TRL chunked"] = lambda: ChunkedDivergenceFunction.apply(h, w, None, ht, wt, None, 1.0)[0].mean()
    except ImportError:
        pass
    if not GPU:
        return contenders
    try:
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss
        from liger_kernel.transformers.functional import liger_fused_linear_jsd

        chunked = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0)
        labels = torch.zeros(len(h), dtype=torch.long, device=DEVICE)
        contenders["Liger fused JSD"] = lambda: liger_fused_linear_jsd(h, w, ht, wt)
        contenders["Liger chunked JSD"] = lambda: chunked(h, w, ht, wt, labels)
    except ImportError:
        pass
    return contenders


SETUP = """
import sys
sys.path.insert(0, {folder!r})
import bench_divergence as bench
torch.manual_seed(0)
inputs = bench.{inputs}({N}, {D}, {V}, torch.{dtype})
small = bench.{inputs}(4, 8, 64, torch.{dtype})  # threads and libraries are loaded before the peak is forgotten
for loss in bench.{contenders}(*small).values():
    loss().backward()
loss = bench.{contenders}(*inputs)[{name!r}]
"""


def linear_inputs(N, D, V, dtype):
    shapes = (N, D), (V, D), (N, D), (V, D)
    tensors = [torch.randn(s, device=DEVICE).mul_(0.3 if i % 2 else 1.0).to(dtype) for i, s in enumerate(shapes)]
    return [x.requires_grad_(i < 2) for i, x in enumerate(tensors)]


def extra_memory(name, N, D, V, dtype, folder, inputs=linear_inputs, contenders=linear_contenders) -> int:
    """Peak bytes beyond inputs and gradients, of value and gradient."""
    leaves = zip(inputs(1, 1, 1, dtype), (N * D, V * D), strict=False)
    gradients = sum(size * dtype.itemsize for leaf, size in leaves if leaf.requires_grad)
    if not GPU:
        names = {"inputs": inputs.__name__, "contenders": contenders.__name__, "name": name}
        setup = SETUP.format(folder=folder, N=N, D=D, V=V, dtype=str(dtype).split(".")[1], **names)
        return peak_in_child(setup, "loss().backward()") - gradients
    loss = contenders(*inputs(N, D, V, dtype))[name]
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss().backward()
    return torch.cuda.max_memory_allocated() - before - gradients


@pytest.mark.parametrize("device, N, D, V, dtype", LINEAR)
def test_linear(benchmark, report, request, device, N, D, V, dtype):
    quick = request.config.getoption("--quick")
    N, rounds = (N // 4, 1) if quick else (N, 3)
    dtype_ = DTYPES[dtype]
    need(device, 4 * V * D * dtype_.itemsize + 12 * N * V * dtype_.itemsize)
    h, w, ht, wt = linear_inputs(N, D, V, dtype_)
    contenders = {name: with_backward(loss, h, w) for name, loss in linear_contenders(h, w, ht, wt).items()}
    mask = torch.rand(N, generator=torch.Generator().manual_seed(0)).argsort() < 0.4 * N
    mask = mask.to(DEVICE)
    masked = with_backward(lambda: linear_reverse_kl_loss(h, w, ht, wt, mask=mask), h, w)
    rate = max(gemm_rate(N, V, D, kind) for kind in {dtype_, torch.float32})  # CPUs may have no GEMM of bf16
    times = race(contenders, rounds)
    pair = race({"ours": contenders["ours"], "masked": masked}, 2 * rounds)  # of each other's kind: more rounds
    times["ours, 60 % masked"] = times["ours"] * pair["masked"] / pair["ours"]
    rows = rows_of(times, "ours", 4 * 2 * N * V * D, rate, "of GEMM rate")
    del h, w, ht, wt, contenders, masked
    folder = str(request.path.parent)
    for row in rows:
        if "masked" not in row["contender"] and row["ms"] < 1e3 * PATIENCE:
            row["extra MB"] = round(extra_memory(row["contender"], N, D, V, dtype_, folder) / 1e6)
    report(f"reverse KL from hidden states, {N} tokens, D {D}, V {V}, {dtype}", rows, gemm_GFLOPs=round(rate / 1e9))
    h, w, ht, wt = linear_inputs(N, D, V, dtype_)
    benchmark.pedantic(with_backward(lambda: linear_reverse_kl_loss(h, w, ht, wt), h, w), rounds=1)


KNOWN = 20  # of the teacher's entries: what vLLM gives at most unless told otherwise (--max-logprobs)


def eager_topk(s, logprobs, ids):
    log_q = F.log_softmax(s, -1, dtype=torch.float32).gather(-1, ids)
    tails = [torch.log1p(-x.exp().sum(-1).clamp(max=1 - 2**-24)) for x in (log_q, logprobs)]
    return ((log_q.exp() * (log_q - logprobs)).sum(-1) + tails[0].exp() * (tails[0] - tails[1])).mean()


def known_of(s):
    """Of a teacher near the student, as on-policy ones are: far from it most gradients underflow, which slows peers."""
    return (s.float() + torch.randn_like(s, dtype=torch.float32)).log_softmax(-1).topk(KNOWN)


@pytest.mark.parametrize("device, N, V, dtype", LOGITS)
def test_topk(benchmark, report, request, device, N, V, dtype):
    quick = request.config.getoption("--quick")
    N, rounds = (N // 4, 3) if quick else (N, 7)
    size = N * V * DTYPES[dtype].itemsize
    need(device, N * V * (3 * DTYPES[dtype].itemsize + 16))
    s = torch.randn(N, V, device=DEVICE).mul_(3).to(DTYPES[dtype])
    logprobs, ids = known_of(s)
    s.requires_grad_()
    compiled = torch.compile(eager_topk)
    contenders = {
        "ours": lambda: topk_divergence_loss(s, logprobs, ids),
        "eager": lambda: eager_topk(s, logprobs, ids),
        "torch.compile": lambda: compiled(s, logprobs, ids),
    }
    bandwidth = copy_bandwidth()
    times = race({name: with_backward(loss, s) for name, loss in contenders.items()}, rounds)
    rows = rows_of(times, "ours", 2 * size, bandwidth, "of copy bandwidth")
    name = f"reverse KL, top {KNOWN} of the teacher known, from logits, value and gradient, {N} × {V} {dtype}"
    report(name, rows, copy_GBs=round(bandwidth / 1e9, 1))
    benchmark.pedantic(with_backward(contenders["ours"], s), rounds=3)


def linear_topk_contenders(h, w, logprobs, ids) -> dict:
    contenders = {
        "ours": lambda: topk_divergence_loss(h, logprobs, ids, student_weight=w),
        "eager": lambda: eager_topk(F.linear(h, w), logprobs, ids),
    }
    try:
        from trl.experimental.async_distillation import async_distillation_trainer as trl

        valid, chunk = torch.ones_like(ids, dtype=torch.bool), trl._CHUNKED_LM_HEAD_CHUNK_SIZE
        args = h, w, None, 1.0, None, ids, logprobs, valid, 1.0, 1.0, True, None, 1, chunk
        contenders["TRL chunked"] = lambda: trl._chunked_jsd_loss(*args)[0] / len(h)
    except ImportError:
        pass
    return contenders


@pytest.mark.parametrize("device, N, D, V, dtype", LINEAR)
def test_linear_topk(benchmark, report, request, device, N, D, V, dtype):
    quick = request.config.getoption("--quick")
    N, rounds = (N // 4, 1) if quick else (N, 3)
    dtype_ = DTYPES[dtype]
    need(device, 4 * V * D * dtype_.itemsize + 24 * N * V)
    h, w, *_ = linear_inputs(N, D, V, dtype_)
    with torch.no_grad():
        logprobs, ids = known_of(F.linear(h, w))
    contenders = linear_topk_contenders(h, w, logprobs, ids)
    rate = max(gemm_rate(N, V, D, kind) for kind in {dtype_, torch.float32})
    times = race({name: with_backward(loss, h, w) for name, loss in contenders.items()}, rounds)
    rows = rows_of(times, "ours", 3 * 2 * N * V * D, rate, "of GEMM rate")
    name = f"reverse KL, top {KNOWN} of the teacher known, from hidden states, {N} tokens, D {D}, V {V}, {dtype}"
    report(name, rows, gemm_GFLOPs=round(rate / 1e9))
    benchmark.pedantic(with_backward(contenders["ours"], h, w), rounds=1)


def trained_inputs(N, D, V, dtype):
    h, w, *_ = linear_inputs(N, D, V, dtype)
    return h, w, torch.randint(V, (N,), device=DEVICE)


def frozen_inputs(N, D, V, dtype):
    h, w, ids = trained_inputs(N, D, V, dtype)
    return h, w.requires_grad_(False), ids


def token_contenders(h, w, ids) -> dict:
    contenders = {
        "ours": lambda: linear_token_logprobs(h, w, ids).mean(),
        "eager": lambda: F.log_softmax(F.linear(h, w), -1).gather(-1, ids[:, None]).mean(),
    }
    try:
        from trl.kernels import ChunkedLogProbFunction
        from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE as chunk

        contenders["TRL chunked"] = lambda: ChunkedLogProbFunction.apply(h, w, None, ids, 1.0, chunk, None, 1.0, ())[
            0
        ].mean()
    except ImportError:
        pass
    return contenders


@pytest.mark.parametrize("inputs", [trained_inputs, frozen_inputs])
@pytest.mark.parametrize("device, N, D, V, dtype", LINEAR)
def test_linear_tokens(benchmark, report, request, device, N, D, V, dtype, inputs):
    """What sampled_kl takes. Of a trained head TRL's projects again in backward, and ours where logits do not fit
    chunk_bytes, which is not counted as work. TRL's takes the entropy, too; ours with `return_entropy`, in the same
    time."""
    quick = request.config.getoption("--quick")
    N, rounds = (N // 4, 1) if quick else (N, 3)
    dtype_ = DTYPES[dtype]
    need(device, 4 * V * D * dtype_.itemsize + 12 * N * V * dtype_.itemsize)
    tensors = inputs(N, D, V, dtype_)
    leaves = [x for x in tensors if x.requires_grad]
    contenders = {name: with_backward(loss, *leaves) for name, loss in token_contenders(*tensors).items()}
    rate = max(gemm_rate(N, V, D, kind) for kind in {dtype_, torch.float32})
    rows = rows_of(race(contenders, rounds), "ours", (1 + len(leaves)) * 2 * N * V * D, rate, "of GEMM rate")
    benchmark.pedantic(contenders["ours"], rounds=1)
    del tensors, leaves, contenders
    for row in rows:
        args = row["contender"], N, D, V, dtype_, str(request.path.parent), inputs, token_contenders
        row["extra MB"] = round(extra_memory(*args) / 1e6)
    head = inputs.__name__.removesuffix("_inputs")
    name = f"log-probabilities of tokens, {head} head, from hidden states, {N} tokens, D {D}, V {V}, {dtype}"
    report(name, rows, gemm_GFLOPs=round(rate / 1e9))
