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
from .family import Spec, TopKSpec


def _schema(tensors: str, spec: type) -> str:
    return ", ".join([tensors, *(f"{kind.__name__} {name}" for name, kind in spec.__annotations__.items())])


ARGS = _schema("Tensor? mask, Tensor? row_scale", Spec)
TOPK_ARGS = _schema("Tensor ids, Tensor? known, Tensor? mask, Tensor? row_scale", TopKSpec)
for name, args in (("divergence_rows", f"Tensor teacher, {ARGS}"), ("topk_rows", TOPK_ARGS)):
    args = f"{args}, bool with_grad, bool with_stats"
    torch.library.define(f"effopd::{name}", f"(Tensor student, {args}) -> (Tensor, Tensor, Tensor)")
    torch.library.define(f"effopd::{name}_", f"(Tensor(a!) student, {args}) -> (Tensor, Tensor)")

# x ·= factor, a scalar. On the CPU and under Triton nothing is read or written where it is 1, as in a plain backward.
torch.library.define("effopd::scale_", "(Tensor(a!) x, Tensor factor) -> ()")

_DLPACK_DTYPES = {torch.float32: (2, 32), torch.bfloat16: (4, 16), torch.float16: (2, 16)}
_CPU_BLOCK, _BLOCK = 1 << 20, 256 << 20  # bytes of logits in fp64 that the reference takes at a time, elsewhere
_KEPT_FROM = 4 << 20  # bytes from which pages are worth keeping (csrc/buffers.cpp)


def _by_blocks(definition, logits, per_row, spec, grad_out, with_stats):
    """`definition` of a few rows at a time, of which it holds a dozen copies."""
    *logits, out = (x if x is None or x.ndim == 3 else x.unsqueeze(0) for x in (*logits, grad_out))
    B, T, V = logits[0].shape
    block = _CPU_BLOCK if logits[0].device.type == "cpu" else _BLOCK
    step, found = max(block // (8 * max(V, 1)), 1), []
    for sequence, start in itertools.product(range(B), range(0, max(T, 1), step)):
        rows, at = slice(start, min(start + step, T)), sequence * T
        own = (x if x is None else x[at + rows.start : at + rows.stop] for x in per_row)
        loss, grad, stats = definition(*(x[sequence, rows] for x in logits), *own, spec, out is not None, with_stats)
        if out is not None:
            out.data[sequence, rows] = grad  # .data, since a raised version takes a view out of its graph
        found.append((loss, loss.new_empty(0) if stats is None else stats))
    loss, stats = zip(*found, strict=True)
    return torch.cat(loss), torch.cat(stats, -1)


def _reference(student, teacher, mask, row_scale, spec, grad_out, with_stats):
    rows = (student, teacher), (mask, row_scale), spec
    return _by_blocks(reference.divergence_rows, *rows, grad_out, with_stats)


def _topk_reference(student, ids, known, mask, row_scale, spec, grad_out, with_stats):
    rows = (student,), (ids, known, mask, row_scale), spec
    return _by_blocks(reference.topk_rows, *rows, grad_out, with_stats)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()  # 0 of no elements, too


def _place(rows: Tensor | None) -> tuple[int, int, int, int]:
    """Address, strides from row to row and from sequence to sequence, and dtype; 0 for all where there are none."""
    if rows is None:
        return 0, 0, 0, 0
    return rows.data_ptr(), rows.stride(-2), rows.stride(0) if rows.ndim == 3 else 0, DTYPES[rows.dtype]


def _has_kernels(*logits: Tensor | None) -> bool:
    return all(x is None or x.dtype in DTYPES for x in logits)


def _cpp(student, teacher, mask, row_scale, spec, grad_out, with_stats, instruction_set=-1):
    if native() is None or not _has_kernels(student, teacher):
        return _reference(student, teacher, mask, row_scale, spec, grad_out, with_stats)
    N, V = student.shape[:-1].numel(), min(student.shape[-1], teacher.shape[-1])
    loss = student.new_empty(N, dtype=torch.float32)
    stats = loss.new_empty((3, N) if with_stats else 0)
    mask = None if mask is None else mask.contiguous()
    row_scale = None if row_scale is None else row_scale.to(torch.float32).contiguous()
    native().divergence_rows(
        *(_place(student), _place(teacher), _place(grad_out), N, max(student.shape[-2], 1), V, student.shape[-1]),
        *(_address(mask), _address(row_scale), spec, loss.data_ptr(), stats.data_ptr()),
        *(torch.get_num_threads(), instruction_set),
    )
    return loss, stats


def _topk_cpp(student, ids, known, mask, row_scale, spec, grad_out, with_stats, instruction_set=-1):
    if native() is None or not _has_kernels(student, known):
        return _topk_reference(student, ids, known, mask, row_scale, spec, grad_out, with_stats)
    N, V = student.shape[:-1].numel(), student.shape[-1]
    loss = student.new_empty(N, dtype=torch.float32)
    stats = loss.new_empty((3, N) if with_stats else 0)
    buckets = loss.new_empty(N, ids.shape[1] + spec.tail)
    ids, mask = ids.contiguous(), None if mask is None else mask.contiguous()
    known, row_scale = (x if x is None else x.to(torch.float32).contiguous() for x in (known, row_scale))
    native().topk_rows(
        *(_place(student), _place(grad_out), N, max(student.shape[-2], 1), V, ids.data_ptr(), ids.shape[1]),
        *(_address(known), buckets.data_ptr(), _address(mask), _address(row_scale), spec),
        *(loss.data_ptr(), stats.data_ptr(), torch.get_num_threads(), instruction_set),
    )
    return loss, stats


def _triton(student, teacher, *args):
    if not _has_kernels(student, teacher):
        return _reference(student, teacher, *args)
    from .triton_kernels import launch_divergence_rows

    return launch_divergence_rows(student, teacher, *args)


def _topk_triton(student, ids, known, *args):
    if not _has_kernels(student, known):
        return _topk_reference(student, ids, known, *args)
    from .triton_topk import launch_topk_rows

    return launch_topk_rows(student, ids, known, *args)


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


def _register(name: str, spec: type, device: str, launch):
    first = -2 - len(spec._fields)  # of the numbers

    def run(student, args, grad):
        return launch(student, *args[:first], spec(*args[first:-2]), grad, args[-1])

    @torch.library.impl(f"effopd::{name}", device)
    def rows(student, *args):
        grad = None
        if args[-2]:
            grad = empty_rows(student.shape[:-1].numel(), student.shape[-1], student).view(student.shape)
        loss, stats = run(student, args, grad)
        return loss, student.new_empty(0) if grad is None else grad, stats

    @torch.library.impl(f"effopd::{name}_", device)
    def rows_(student, *args):
        return run(student, args, student if args[-2] else None)


_register("divergence_rows", Spec, "CompositeExplicitAutograd", _reference)
_register("divergence_rows", Spec, "CPU", _cpp)
_register("topk_rows", TopKSpec, "CompositeExplicitAutograd", _topk_reference)
_register("topk_rows", TopKSpec, "CPU", _topk_cpp)
if TRITON:
    _register("divergence_rows", Spec, "CUDA", _triton)
    _register("topk_rows", TopKSpec, "CUDA", _topk_triton)


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


def _register_fake(name: str, teacher: int):
    """teacher: which argument after the student is the teacher's."""

    @torch.library.register_fake(f"effopd::{name}_")
    def rows_(student, *args):
        known = student if args[teacher] is None else args[teacher]
        loss = student.new_empty(math.prod(student.shape[:-1]), dtype=wide(student, known))
        return loss, loss.new_empty((3, loss.shape[0]) if args[-1] else 0)

    @torch.library.register_fake(f"effopd::{name}")
    def rows(student, *args):
        loss, stats = rows_(student, *args)
        return loss, student.new_empty(student.shape if args[-2] else 0), stats


_register_fake("divergence_rows", 0)
_register_fake("topk_rows", 1)
