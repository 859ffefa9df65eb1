"""What launchers launch binds, specialises and compiles, sizes of 1 included, on a machine without a GPU."""

import pytest
import torch

pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from effopd_kernels.divergence import triton_kernels as divergence
from effopd_kernels.divergence import triton_topk
from effopd_kernels.divergence.family import Spec, TopKSpec
from effopd_kernels.extrapolation import triton_kernels as extrapolation
from effopd_kernels.lowrank import triton_kernels as lowrank

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the other tests launch on this GPU")
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


class Absent:
    """As much of a driver as compiling asks for."""

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)


@pytest.fixture(autouse=True)
def compiled(monkeypatch):
    """The kernels that were compiled where they would have been launched."""
    found, launch = [], JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        found.append(launch(self, *args, grid=grid, warmup=True, **kwargs))

    monkeypatch.setattr(JITFunction, "run", compile_only)
    monkeypatch.setattr(lowrank, "_shared_memory", lambda device: 227 << 10)
    monkeypatch.setattr(driver, "_active", Absent())
    return found


@pytest.mark.parametrize(
    ("shape", "dtypes", "member", "stats"),
    [
        ((1, 1), (BF16, BF16), (0.0, 1.0, 1.0), True),
        ((2, 1, 16), (BF16, FP32), (1.0, 0.0, 0.0), False),
        ((2, 3, 127), (FP32, FP16), (0.5, 0.5, 0.5), True),
    ],
)
def test_divergence(shape, dtypes, member, stats, compiled):
    student, teacher = (torch.zeros(shape, dtype=dtype) for dtype in dtypes)
    N = student.shape[:-1].numel()
    for mask, row_scale, softcap, grad in (
        (None, None, 0.0, torch.empty_like(student)),
        (torch.ones(N, dtype=torch.bool), torch.ones(N), 30.0, None),
    ):
        spec = Spec(*member, 1.0, 2.0, student_softcap=softcap)
        divergence.launch_divergence_rows(student, teacher, mask, row_scale, spec, grad, stats)
    divergence.launch_scale(student, torch.ones(()))
    assert len(compiled) == 3


@pytest.mark.parametrize(
    ("shape", "dtype", "k", "tail"),
    [((1, 1), BF16, 1, False), ((2, 1, 16), FP32, 1, True), ((2, 3, 127), FP16, 20, True)],
)
def test_topk(shape, dtype, k, tail, compiled):
    student, N = torch.zeros(shape, dtype=dtype), torch.Size(shape[:-1]).numel()
    ids, known = torch.arange(k).expand(N, k), torch.zeros(N, k + tail)
    for mask, softcap, grad in ((None, 0.0, torch.empty_like(student)), (torch.ones(N, dtype=torch.bool), 30.0, None)):
        args = mask, None, TopKSpec(0.0, 1.0, 1.0, tail, 1.0, 2.0, softcap), grad, False
        triton_topk.launch_topk_rows(student, ids, known, *args)
    assert len(compiled) == 2 * (2 * tail + 2) + 3


def test_rows_of_which_some_are_aligned_are_read_as_those_of_which_none_are(compiled):
    """As views of a padded head's logits beside a fresh gradient: tiles are laid out in the way that they are read."""
    padded, odd = torch.zeros(2, 4224, dtype=BF16)[:, :4113], torch.zeros(2, 4113, dtype=BF16)
    member = 0.0, 1.0, 1.0
    for student, teacher in ((padded, padded), (odd, odd), (odd, padded)):
        divergence.launch_divergence_rows(student, teacher, None, None, Spec(*member), torch.empty_like(odd), True)
    assert len({kernel.asm["ttgir"] for kernel in compiled}) == 1
    ids, known = torch.zeros(2, 1, dtype=torch.long), torch.zeros(2, 2)
    found = []
    for student in (padded, odd):
        compiled.clear()
        args = None, None, TopKSpec(*member, True), torch.empty_like(odd), False
        triton_topk.launch_topk_rows(student, ids, known, *args)
        found.append([k.asm["ttgir"] for k in compiled if k.metadata.name in ("_others_kernel", "_spread_kernel")])
    assert found[0] == found[1] and len(found[0]) == 2


@pytest.mark.parametrize("sizes", [(1,), (16, 7, 40000)])
def test_extrapolation(sizes, compiled):
    params, anchors, currents = ([torch.zeros(n, dtype=d) for n in sizes] for d in (BF16, BF16, FP32))
    alphas, masters = torch.ones(len(sizes)), [torch.zeros(n) for n in sizes]
    extrapolation.launch_extrapolate(params, anchors, currents, alphas, masters, torch.zeros(len(sizes), 3))
    extrapolation.launch_extrapolate(params, anchors, params, alphas, None, None)
    extrapolation.launch_extrapolate_forward(params[0], anchors[0], alphas[0])
    extrapolation.launch_extrapolate_backward(params[0], anchors[0], alphas[0])
    assert len(compiled) == 5


@pytest.mark.parametrize("N, M, L", [(1, 1, 1), (129, 33, 7)])
def test_lowrank(N, M, L, compiled):
    x, base = [torch.zeros(N, M, dtype=BF16)], [torch.zeros(N, M, dtype=FP32)]
    lowrank.launch_gram_apply(x, base, torch.zeros(1, M, L), torch.ones(1), False)
    lowrank.launch_sketch(x, [], L, 0, True)
    lowrank.launch_stats(x, base, True)
    lowrank.launch_gram(x, base, None, False)
    lowrank.launch_eigh(torch.eye(2 + M).expand(40, -1, -1))
    assert len(compiled) == 7
