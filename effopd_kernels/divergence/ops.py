"""The row ops of the divergences, and which implementation serves which device: all dispatch of this idea.

N tokens, V vocabulary, k known entries. Logits are (N, V), or (B, T, V) with N = B·T, whose sequences may lie apart, as
those of logits[:, :-1] do; mask, row_scale, loss and stats are by token all the same. `effopd::divergence_rows` has the
teacher's logits, `effopd::topk_rows` k of its log-probabilities, as `reference` defines both. They return a fresh
gradient; their namesakes with an underscore write it over the student's logits. CUDA and ROCm: Triton. CPU: C++. Any
other device or dtype, or a backend that is not there: the reference. The ops themselves are not differentiable; the
public functions are.
"""

import itertools
import math

import torch
from torch import Tensor

from ..checks import wide
from ..native import DTYPES, TRITON, native
from . import reference

ARGS = (
    "Tensor? mask, Tensor? row_scale, float a, float b, float pi, float student_temperature, "
    "float teacher_temperature, float student_scale, float teacher_scale, float student_softcap, float teacher_softcap"
)
TOPK_ARGS = (
    "Tensor ids, Tensor? known, Tensor? mask, Tensor? row_scale, float a, float b, float pi, bool tail, "
    "float temperature, float scale, float softcap"
)
for name, args in (("divergence_rows", f"Tensor teacher, {ARGS}"), ("topk_rows", TOPK_ARGS)):
    args = f"{args}, bool with_grad, bool with_stats"
    torch.library.define(f"effopd::{name}", f"(Tensor student, {args}) -> (Tensor, Tensor, Tensor)")
    torch.library.define(f"effopd::{name}_", f"(Tensor(a!) student, {args}) -> (Tensor, Tensor)")

# x ·= factor, a scalar. On the CPU and under Triton nothing is read or written where it is 1, as in a plain backward.
torch.library.define("effopd::scale_", "(Tensor(a!) x, Tensor factor) -> ()")

_DLPACK_DTYPES = {torch.float32: (2, 32), torch.bfloat16: (4, 16), torch.float16: (2, 16)}
_CPU_BLOCK, _BLOCK = 1 << 20, 256 << 20  # bytes of logits in fp64 that the reference takes at a time, elsewhere
_KEPT_FROM = 4 << 20  # bytes from which pages are worth keeping (csrc/buffers.cpp)


def _by_blocks(definition, logits, per_row, numbers, grad_out, with_stats):
    """`definition` of a few rows at a time, of which it holds a dozen copies."""
    *logits, out = (x if x is None or x.ndim == 3 else x.unsqueeze(0) for x in (*logits, grad_out))
    B, T, V = logits[0].shape
    block = _CPU_BLOCK if logits[0].device.type == "cpu" else _BLOCK
    step, found = max(block // (8 * max(V, 1)), 1), []
    for sequence, start in itertools.product(range(B), range(0, max(T, 1), step)):
        rows, at = slice(start, min(start + step, T)), sequence * T
        own = (x if x is None else x[at + rows.start : at + rows.stop] for x in per_row)
        loss, grad, stats = definition(
            *(x[sequence, rows] for x in logits), *own, *numbers, with_grad=out is not None, with_stats=with_stats
        )
        if out is not None:
            out.data[sequence, rows] = grad  # .data, since a raised version takes a view out of its graph
        found.append((loss, loss.new_empty(0) if stats is None else stats))
    loss, stats = zip(*found, strict=True)
    return torch.cat(loss), torch.cat(stats, -1)


def _reference(student, teacher, mask, row_scale, *numbers, grad_out, with_stats):
    rows = (student, teacher), (mask, row_scale), numbers
    return _by_blocks(reference.divergence_rows, *rows, grad_out, with_stats)


def _topk_reference(student, ids, known, mask, row_scale, *numbers, grad_out, with_stats):
    rows = (student,), (ids, known, mask, row_scale), numbers
    return _by_blocks(reference.topk_rows, *rows, grad_out, with_stats)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _place(rows: Tensor | None) -> tuple[int, int, int]:
    """Address, and strides from one row to the next and from one sequence to the next."""
    return (0, 0, 0) if rows is None else (rows.data_ptr(), rows.stride(-2), rows.stride(0) if rows.ndim == 3 else 0)


def _cpp(student, teacher, mask, row_scale, *args, grad_out, with_stats, instruction_set=-1):
    module = native() if {student.dtype, teacher.dtype} <= DTYPES.keys() else None
    if module is None:
        return _reference(student, teacher, mask, row_scale, *args, grad_out=grad_out, with_stats=with_stats)
    N, V = student.shape[:-1].numel(), min(student.shape[-1], teacher.shape[-1])
    loss = student.new_empty(N, dtype=torch.float32)
    stats = loss.new_empty((3, N) if with_stats else 0)
    mask = None if mask is None else mask.contiguous()
    row_scale = None if row_scale is None else row_scale.to(torch.float32).contiguous()
    module.divergence_rows(
        *(*_place(student), DTYPES[student.dtype], *_place(teacher), DTYPES[teacher.dtype]),
        *(N, max(student.shape[-2], 1), V, _address(mask), _address(row_scale), *args),
        *(*_place(grad_out), student.shape[-1]),
        *(loss.data_ptr(), stats.data_ptr() if with_stats else 0, torch.get_num_threads(), instruction_set),
    )
    return loss, stats


def _topk_cpp(student, ids, known, mask, row_scale, *args, grad_out, with_stats, instruction_set=-1):
    module = native() if student.dtype in DTYPES and (known is None or known.dtype in DTYPES) else None
    if module is None:
        return _topk_reference(student, ids, known, mask, row_scale, *args, grad_out=grad_out, with_stats=with_stats)
    N, V = student.shape[:-1].numel(), student.shape[-1]
    a, b, pi, tail, *transform = args
    loss = student.new_empty(N, dtype=torch.float32)
    stats = loss.new_empty((3, N) if with_stats else 0)
    buckets = loss.new_empty(N, ids.shape[1] + tail)
    ids, mask = ids.contiguous(), None if mask is None else mask.contiguous()
    known, row_scale = (x if x is None else x.to(torch.float32).contiguous() for x in (known, row_scale))
    module.topk_rows(
        *(*_place(student), DTYPES[student.dtype], N, max(student.shape[-2], 1), V, ids.data_ptr(), ids.shape[1], tail),
        *(_address(known), buckets.data_ptr(), _address(mask), _address(row_scale), a, b, pi, *transform),
        *(*_place(grad_out), loss.data_ptr(), stats.data_ptr() if with_stats else 0),
        *(torch.get_num_threads(), instruction_set),
    )
    return loss, stats


def _triton(student, teacher, *args, grad_out, with_stats):
    if not {student.dtype, teacher.dtype} <= DTYPES.keys():
        return _reference(student, teacher, *args, grad_out=grad_out, with_stats=with_stats)
    from .triton_kernels import launch_divergence_rows

    return launch_divergence_rows(student, teacher, *args, grad_out, with_stats)


def _topk_triton(student, ids, known, *args, grad_out, with_stats):
    if student.dtype not in DTYPES or not (known is None or known.dtype in DTYPES):
        return _topk_reference(student, ids, known, *args, grad_out=grad_out, with_stats=with_stats)
    from .triton_topk import launch_topk_rows

    return launch_topk_rows(student, ids, known, *args, grad_out, with_stats)


def empty_rows(N: int, V: int, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Uninitialised (N, V) on the device of `like`, in its dtype unless told; large ones on the CPU on kept pages."""
    dtype = dtype or like.dtype
    large = like.device.type == "cpu" and N * V * dtype.itemsize >= _KEPT_FROM
    if large and dtype in _DLPACK_DTYPES and hasattr(native(), "fresh_rows"):
        return torch.from_dlpack(native().fresh_rows(N, V, *_DLPACK_DTYPES[dtype]))
    return like.new_empty(N, V, dtype=dtype)


def transpose(x: Tensor, out: Tensor) -> None:
    """out (C, R) = xᵀ of x (R, C), in out's dtype."""
    x = x.to(out.dtype)
    if x.device.type == "cpu" and x.stride(1) == out.stride(1) == 1 and hasattr(native(), "transpose"):
        places = x.data_ptr(), x.stride(0), out.data_ptr(), out.stride(0)
        native().transpose(*places, *x.shape, x.itemsize, torch.get_num_threads())
    else:
        out.copy_(x.T)


def repeated_id(ids: Tensor, V: int) -> int:
    """One that stands more than once in its row of ids (N, k), −1 where none does; negative ones are none."""
    if ids.device.type == "cpu" and hasattr(native(), "repeated_id"):
        ids = ids.contiguous()
        return native().repeated_id(ids.data_ptr(), *ids.shape, V)
    ids = ids.sort(-1).values
    twice = ids[:, 1:][(ids[:, 1:] == ids[:, :-1]) & (ids[:, 1:] >= 0)]
    return int(twice[0]) if twice.numel() else -1


def _register(name: str, device: str, launch):
    @torch.library.impl(f"effopd::{name}", device)
    def rows(student, *args):
        *args, with_grad, with_stats = args
        grad = None
        if with_grad:
            grad = empty_rows(student.shape[:-1].numel(), student.shape[-1], student).view(student.shape)
        loss, stats = launch(student, *args, grad_out=grad, with_stats=with_stats)
        return loss, student.new_empty(0) if grad is None else grad, stats

    @torch.library.impl(f"effopd::{name}_", device)
    def rows_(student, *args):
        *args, with_grad, with_stats = args
        return launch(student, *args, grad_out=student if with_grad else None, with_stats=with_stats)


_register("divergence_rows", "CompositeExplicitAutograd", _reference)
_register("divergence_rows", "CPU", _cpp)
_register("topk_rows", "CompositeExplicitAutograd", _topk_reference)
_register("topk_rows", "CPU", _topk_cpp)
if TRITON:
    _register("divergence_rows", "CUDA", _triton)
    _register("topk_rows", "CUDA", _topk_triton)


def _scale(x: Tensor, factor: Tensor) -> None:
    x.mul_(factor)


def _scale_cpu(x, factor):
    if factor.item() != 1:
        x.mul_(factor)


def _scale_triton(x, factor):
    if x.dtype not in DTYPES or not x.is_contiguous():
        return _scale(x, factor)
    from .triton_kernels import launch_scale

    return launch_scale(x, factor)


torch.library.impl("effopd::scale_", "CompositeExplicitAutograd", _scale)
torch.library.impl("effopd::scale_", "CPU", _scale_cpu)
if TRITON:
    torch.library.impl("effopd::scale_", "CUDA", _scale_triton)


def _fake_rows(student, teacher, with_stats):
    loss = student.new_empty(math.prod(student.shape[:-1]), dtype=wide(student, teacher))
    return loss, loss.new_empty((3, loss.shape[0]) if with_stats else 0)


@torch.library.register_fake("effopd::divergence_rows_")
def _(student, teacher, *args):
    return _fake_rows(student, teacher, args[-1])


@torch.library.register_fake("effopd::divergence_rows")
def _(student, teacher, *args):
    loss, stats = _fake_rows(student, teacher, args[-1])
    return loss, student.new_empty(student.shape if args[-2] else 0), stats


@torch.library.register_fake("effopd::topk_rows_")
def _(student, ids, known, *args):
    return _fake_rows(student, student if known is None else known, args[-1])


@torch.library.register_fake("effopd::topk_rows")
def _(student, ids, known, *args):
    loss, stats = _fake_rows(student, student if known is None else known, args[-1])
    return loss, student.new_empty(student.shape if args[-2] else 0), stats
