"""Kernels in C++ read and write their tensors and nothing beside them: each operand here ends where memory does."""

import ctypes
import mmap
import subprocess
import sys

import pytest
import torch

from effopd_kernels.native import native

pytestmark = pytest.mark.skipif(not native() or sys.platform != "linux", reason="needs the C++ extension, and mprotect")
SIZES = ((1, 1), (2, 3), (16, 17), (400, 201), (201, 400), (3, 4097))


def at_the_end(x: torch.Tensor) -> torch.Tensor:
    """A copy, contiguous, after whose last byte comes a page that nobody may touch."""
    libc = ctypes.CDLL(None)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    whole = -(-x.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    start = libc.mmap(None, whole + mmap.PAGESIZE, 3, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
    assert libc.mprotect(start + whole, mmap.PAGESIZE, 0) == 0
    memory = (ctypes.c_char * x.nbytes).from_address(start + whole - x.nbytes)  # kept for good: a few pages
    return torch.frombuffer(memory, dtype=x.dtype).view(x.shape).copy_(x)


def divergences(N: int, V: int) -> None:
    from effopd_kernels.divergence import ops
    from effopd_kernels.divergence.family import Spec, TopKSpec

    ids, known = torch.zeros(N, 1, dtype=torch.long), torch.full((N, 2), -0.7)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        student, teacher, grad = (at_the_end(torch.randn(N, V).to(dtype)) for _ in range(3))
        for instruction_set in range(native().num_instruction_sets()):
            rest = grad, True, instruction_set
            for cap in (0.0, 5.0):
                for pi in (0.0, 0.5, 1.0):
                    ops._cpp(student, teacher, None, None, Spec(1 - pi, pi, pi, student_softcap=cap), *rest)
                spec, tops = TopKSpec(0.0, 1.0, 1.0, V > 1, softcap=cap), (ids, known[:, : 1 + (V > 1)])
                ops._topk_cpp(student, *map(at_the_end, tops), None, None, spec, *rest)
    out = at_the_end(torch.empty(V, N))
    ops.transpose(at_the_end(torch.randn(N, V)), out)


def extrapolation(N: int, V: int) -> None:
    from effopd_kernels.extrapolation import cpu

    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        p, a, c = ([at_the_end(torch.randn(N, V).to(dtype))] for _ in range(3))
        masters, alphas = [at_the_end(torch.randn(N, V))], torch.tensor([1.5])
        for instruction_set in range(native().num_instruction_sets()):
            cpu.extrapolate_(p, a, c, alphas, masters, True, instruction_set=instruction_set)


def lowrank(N: int, V: int) -> None:
    from effopd_kernels import batched_rsvd, spectral_metrics
    from effopd_kernels.lowrank import panels, signs

    q, y = torch.randn(V, 16), at_the_end(torch.empty(N, 16))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        a, base = (at_the_end(torch.randn(N, V).to(dtype)) for _ in range(2))
        for x in (a, at_the_end(torch.randn(V, N).to(dtype)).T):
            for b in (None, base):
                for instruction_set in range(native().num_multipliers()):
                    for half in (False, True):
                        panels.products(
                            x, b, None, slice(None), at_the_end(q), None if half else y, half=half,
                            instruction_set=instruction_set,
                        )  # fmt: skip
                    omega = signs.dense(0, V, 16, x.device), signs.sparse(0, V, 16)
                    panels.products(
                        x, b, None, slice(None), omega[0], half=True, places=omega[1], instruction_set=instruction_set
                    )
                    panels.exact_gram(x, b, instruction_set=instruction_set)
        batched_rsvd(a, 1), batched_rsvd(a, 1, base=base), spectral_metrics(a, base=base)


@pytest.mark.parametrize("work", [divergences, extrapolation, lowrank])
def test_nothing_beyond(work):
    done = subprocess.run(
        [sys.executable, "-X", "faulthandler", __file__, work.__name__], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


if __name__ == "__main__":
    torch.manual_seed(0)
    for size in SIZES:
        globals()[sys.argv[1]](*size)
