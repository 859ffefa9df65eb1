"""The Triton extrapolation kernels against fp64, on the GPU or in the interpreter. L tensors in a list."""

import math

import pytest
import torch

pytest.importorskip("triton")

from interpreted import DEVICE, ON_GPU, needs_gpu, needs_kernels, run_in_interpreter

from effopd_kernels.device_cache import captured
from effopd_kernels.extrapolation import triton_kernels
from effopd_kernels.extrapolation.triton_kernels import (
    launch_extrapolate,
    launch_extrapolate_backward,
    launch_extrapolate_forward,
)

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
SHAPES = [(3, 5), (100, 70), (1,), (9000,), (64, 64), (2, 0)]
ALPHAS = [3.0, 5.0, -0.5, 1.5, 11.0, 7.0]


def test_in_interpreter():
    run_in_interpreter(__file__)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    if not ON_GPU:
        monkeypatch.setattr(triton_kernels, "CHUNK", 4096)
        monkeypatch.setattr(triton_kernels, "LANES", 64)


def weights(param=BF16, anchor=BF16, current=BF16, shapes=SHAPES):
    generator = torch.Generator().manual_seed(0)
    anchors = [torch.randn(s, generator=generator) for s in shapes]
    currents = [(a + 0.1 * torch.randn(a.shape, generator=generator)).to(DEVICE, current) for a in anchors]
    params = [torch.full(s, math.nan, dtype=param, device=DEVICE) for s in shapes]
    return params, [a.to(DEVICE, anchor) for a in anchors], currents


def run(params, anchors, currents, alphas, masters=None):
    """Statistics are poisoned first: the kernel must write each."""
    stats = torch.full((len(params), 3), math.nan, device=DEVICE)
    alphas = torch.as_tensor(alphas, dtype=torch.float64, device=DEVICE)
    launch_extrapolate(params, anchors, currents, alphas, masters, stats)
    return stats


def assert_rounded_once(written, exact):
    """Within one rounding to its dtype (the interpreter truncates bf16) and fp32's own of the two terms."""
    rounding = torch.finfo(written.dtype).eps * (0.5 if ON_GPU or written.dtype != BF16 else 1.0)
    torch.testing.assert_close(written.double(), exact, rtol=rounding, atol=2e-6)


@needs_kernels
@pytest.mark.parametrize(
    ("param", "anchor", "current"),
    [(BF16, BF16, BF16), (FP16, FP16, FP16), (FP32, BF16, FP32), (BF16, FP32, BF16)],
    ids=["bf16", "fp16", "fp32 weights, bf16 anchor", "bf16 weights, fp32 anchor"],
)
@pytest.mark.parametrize("with_masters", [False, True], ids=["", "masters"])
def test_values_and_statistics(param, anchor, current, with_masters):
    params, anchors, currents = weights(param, anchor, current)
    masters = [torch.full_like(p, math.nan, dtype=FP32) for p in params] if with_masters else None
    stats = run(params, anchors, currents, ALPHAS, masters)
    for i, alpha in enumerate(ALPHAS):
        a, delta = anchors[i].double(), currents[i].double() - anchors[i].double()
        assert_rounded_once(params[i], a + alpha * delta)
        if masters:
            assert_rounded_once(masters[i], a + alpha * delta)
        want = torch.stack([delta.square().sum(), params[i].double().square().sum(), torch.zeros((), device=DEVICE)])
        torch.testing.assert_close(stats[i].double(), want, rtol=1e-6, atol=0)


@needs_kernels
def test_without_statistics_the_values_are_the_same():
    with_stats, anchors, currents = weights()
    run(with_stats, anchors, currents, ALPHAS)
    params, _, _ = weights()
    launch_extrapolate(params, anchors, currents, torch.tensor(ALPHAS, device=DEVICE), None, None)
    assert all(torch.equal(p, q) for p, q in zip(params, with_stats, strict=True))


@needs_kernels
def test_long_lists_take_several_launches(monkeypatch):
    whole, anchors, currents = weights()
    stats = run(whole, anchors, currents, ALPHAS)
    monkeypatch.setattr(triton_kernels, "MOST", 2)
    params, _, _ = weights()
    assert torch.equal(run(params, anchors, currents, ALPHAS), stats)
    assert all(torch.equal(p, q) for p, q in zip(params, whole, strict=True))


@needs_kernels
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
def test_the_ends_are_copies_bit_for_bit(dtype):
    """Also of −0, and of a finite end when the other one is not finite."""
    params, anchors, currents = weights(dtype, dtype, dtype, shapes=[(300,), (300,)])
    for t in (anchors, currents):
        t[0][:3] = torch.tensor([-0.0, 0.0, 1e-7])
    anchors[0][5], currents[1][5] = math.inf, math.nan
    run(params, anchors, currents, [1.0, 0.0])
    bits = torch.int32 if dtype == FP32 else torch.int16
    assert torch.equal(params[0].view(bits), currents[0].view(bits))
    assert torch.equal(params[1].view(bits), anchors[1].view(bits))


@needs_kernels
def test_currents_may_be_the_parameters_themselves():
    want, anchors, currents = weights()
    run(want, anchors, currents, ALPHAS)
    run(currents, anchors, currents, ALPHAS)
    assert all(torch.equal(p, q) for p, q in zip(currents, want, strict=True))


@needs_kernels
def test_lists_of_mixed_dtypes_views_and_strides():
    """Dtype mixes, odd addresses, fp64 and transposed tensors in one call; rows of statistics keep their place."""
    shapes = [(33, 40)] * 5
    params, anchors, currents = weights(FP32, FP32, FP32, shapes)
    params[1], anchors[1] = params[1].to(FP16), anchors[1].to(BF16)
    params[2], anchors[2], currents[2] = (
        torch.cat([t.new_zeros(1), t.flatten()])[1:].view(33, 40) for t in (params[2], anchors[2], currents[2])
    )
    params[3], anchors[3], currents[3] = params[3].double(), anchors[3].double(), currents[3].double()
    params[4], currents[4] = params[4].t().contiguous().t(), currents[4].t().contiguous().t()
    stats = run(params, anchors, currents, ALPHAS[:5])
    for i in range(5):
        delta = currents[i].double() - anchors[i].double()
        assert_rounded_once(params[i], anchors[i].double() + ALPHAS[i] * delta)
        torch.testing.assert_close(stats[i, 0].double(), delta.square().sum(), rtol=1e-6, atol=0)


@needs_kernels
def test_alpha_of_fp64_weights_is_not_rounded():
    params, anchors, currents = weights(FP64, FP64, FP64, [(5, 7)] * 2)
    run(params, anchors, currents, torch.tensor(0.1, dtype=FP64, device=DEVICE).expand(2))
    for w, a, c in zip(params, anchors, currents, strict=True):
        torch.testing.assert_close(w, torch.lerp(a, c, 0.1), rtol=1e-14, atol=1e-14)


@needs_kernels
def test_non_finite_results_are_counted():
    params, anchors, currents = weights(FP16, FP16, FP16)
    anchors[1][3, 4:7] = torch.tensor([math.inf, -math.inf, math.nan])
    currents[3][8000:8010] = 6e4  # finite, but 6e4·1.5 overflows fp16
    stats = run(params, anchors, currents, ALPHAS)
    assert stats[:, 2].tolist() == [0, 3, 0, 10, 0, 0]


@needs_kernels
def test_results_repeat_bitwise():
    first, anchors, currents = weights()
    second, _, _ = weights()
    stats = run(first, anchors, currents, ALPHAS)
    assert torch.equal(stats, run(second, anchors, currents, ALPHAS))
    assert all(torch.equal(p, q) for p, q in zip(first, second, strict=True))


@needs_kernels
@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("numel", [0, 1, 5000])
def test_forward_and_backward(dtype, numel):
    generator = torch.Generator().manual_seed(0)
    w0, delta, grad = (torch.randn(numel, generator=generator).to(DEVICE, dtype) for _ in range(3))
    alpha = torch.tensor(2.5, device=DEVICE)
    assert_rounded_once(launch_extrapolate_forward(w0, delta, alpha), w0.double() + 2.5 * delta.double())
    grad_delta, grad_alpha = launch_extrapolate_backward(grad, delta, alpha)
    assert_rounded_once(grad_delta, 2.5 * grad.double())
    torch.testing.assert_close(grad_alpha.double(), (grad.double() * delta.double()).sum(), rtol=1e-6, atol=1e-4)


@needs_gpu
def test_launch_is_captured_in_a_cuda_graph():
    params, anchors, currents = weights()
    alphas = torch.tensor(ALPHAS, device=DEVICE)
    stats = run(params, anchors, currents, ALPHAS)
    want = [p.clone() for p in params]
    graph, kept = torch.cuda.CUDAGraph(), len(captured)
    with torch.cuda.graph(graph):
        launch_extrapolate(params, anchors, currents, alphas, None, stats)
    for p in params:
        p.fill_(math.nan)
    assert len(captured) > kept  # else the cache might drop what the graph reads
    graph.replay()
    assert all(torch.equal(p, q) for p, q in zip(params, want, strict=True))
