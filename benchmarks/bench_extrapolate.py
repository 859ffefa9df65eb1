"""In-place extrapolation of a model's parameter list against what PyTorch offers.

    pytest benchmarks/bench_extrapolate.py --benchmark-only [--quick] [--save-results]

The lists are what EffOPD moves: attention and MLP weights and biases of Qwen2.5-0.5B (CPU) and Qwen3-8B (GPU); one
layer of the latter, whose tensors are so large that an allocator gives temporaries of them back each time; and small
tensors. Traffic: read A and C, write W, so 3 elements moved per parameter; statistics move nothing more where they are
fused. A machine's ceiling is its measured copy bandwidth on tensors of this size (4 GiB at most). Contenders take turns
(see `common.turns`); ratios are of medians.
"""

import functools

import pytest
import torch
from common import DEVICE, race

from effopd_kernels.extrapolation import extrapolate_

ALPHA = 3.0


def block(hidden, intermediate, heads, kv_heads, head_dim, bias):
    """The attention and MLP tensors of one decoder layer."""
    q, kv = heads * head_dim, kv_heads * head_dim
    biases = [(q,), (kv,), (kv,)] if bias else []
    return [(q, hidden), (kv, hidden), (kv, hidden), (hidden, q), (intermediate, hidden), (intermediate, hidden),
            (hidden, intermediate), *biases]  # fmt: skip


LISTS = {
    "Qwen2.5-0.5B": block(896, 4864, 14, 2, 64, True) * 24,
    "Qwen3-8B": block(4096, 12288, 32, 8, 128, False) * 36,
    "one layer of Qwen3-8B": block(4096, 12288, 32, 8, 128, False),
    "2,000 small tensors": [(4096,)] * 2000,
}
NAMES = ["Qwen3-8B" if DEVICE == "cuda" else "Qwen2.5-0.5B", "one layer of Qwen3-8B", "2,000 small tensors"]


def ours(w, a, c):
    extrapolate_(w, a, c, ALPHA, stats=False)


def ours_with_statistics(w, a, c):
    extrapolate_(w, a, c, ALPHA)


def lerp_out(w, a, c):
    for x, y, z in zip(w, a, c, strict=True):
        torch.lerp(y, z, ALPHA, out=x)


def foreach_lerp(w, a, c):
    torch._foreach_copy_(w, torch._foreach_lerp(a, c, ALPHA))


def foreach_chain(w, a, c):
    delta = torch._foreach_sub(c, a)
    torch._foreach_mul_(delta, ALPHA)
    torch._foreach_add_(delta, a)
    torch._foreach_copy_(w, delta)


def naive(w, a, c):
    for x, y, z in zip(w, a, c, strict=True):
        x.copy_(y + ALPHA * (z - y))


CONTENDERS = [ours, ours_with_statistics, lerp_out, foreach_lerp, foreach_chain, naive]


def extra_memory(function, arguments):
    """Peak bytes allocated beyond the three lists: temporaries."""
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function(*arguments)
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        function(*arguments)
    live = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("name", NAMES)
def test_extrapolate(benchmark, request, report, name, dtype):
    quick = request.config.getoption("--quick", False)
    shapes = LISTS[name][: len(LISTS[name]) // 4] if quick else LISTS[name]
    generator = torch.Generator(DEVICE).manual_seed(0)
    torch.cuda.empty_cache()  # blocks of the last test's sizes
    a, c, w = ([torch.empty(s, dtype=dtype, device=DEVICE) for s in shapes] for _ in range(3))
    for y, z in zip(a, c, strict=True):
        y.normal_(generator=generator)
        z.copy_(y + 1e-3)
    size = sum(t.nbytes for t in w)
    # beside three lists of Qwen3-8B in fp32 and a contender's temporaries, copies of that size would not fit a GPU
    flat, source = (torch.zeros(min(size, 1 << 32), dtype=torch.uint8, device=DEVICE) for _ in range(2))
    contenders = {f.__name__: functools.partial(f, w, a, c) for f in CONTENDERS}
    times = race({"copy": lambda: flat.copy_(source), **contenders}, rounds=7)
    benchmark.pedantic(ours, (w, a, c), rounds=3)
    bandwidth = 2 * flat.nbytes / times["copy"]
    rows = []
    for f in CONTENDERS:
        median = times[f.__name__]
        rows.append(
            {
                "contender": f.__name__,
                "ms": round(1e3 * median, 2),
                "of copy bandwidth": round(3 * size / median / bandwidth, 3),
                "speed / lerp": round(times["lerp_out"] / median, 3),
                "extra memory / list": round(extra_memory(f, (w, a, c)) / size, 3),
            }
        )
    title = f"{name}, {len(w)} tensors of {str(dtype).split('.')[1]}, {size / 1e6:.0f} MB"
    report(title, rows, **{"copy GB/s": round(bandwidth / 1e9, 1)})
