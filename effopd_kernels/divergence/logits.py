"""Divergences from logits. N tokens, V vocabulary."""

from typing import Any

import torch
from torch import Tensor

from ..checks import check_float, steps_overlap
from . import ops  # noqa: F401  (defines torch.ops.effopd.divergence_rows)
from .arguments import answer, gathered, make_spec, row_factor
from .autograd import in_kept_backward, reduced_loss
from .family import REVERSE_KL, Divergence


def run_rows(op: str, tensors, row_scale, spec, needs, with_stats):
    """What `reduced_loss` asks for, of a row op of `ops`."""
    student, *rest = tensors
    if needs[0] and student.dtype == torch.float16:  # whose gradients 1/V and 1/tokens take below its range
        return run_rows_inplace(op, (student.float(), *rest), row_scale, spec, needs, with_stats)
    loss, grad, stats = getattr(torch.ops.effopd, op)(student, *rest, row_scale, *spec, needs[0], with_stats)
    return loss, (grad,) if needs[0] else (None,), stats


def run_rows_inplace(op: str, tensors, row_scale, spec, needs, with_stats):
    student, *rest = tensors
    if needs[0] and in_kept_backward():  # of reduction "none", which needs the logits again
        return run_rows(op, tensors, row_scale, spec, needs, with_stats)
    if _rows_overlap(student):
        student = student.clone(memory_format=torch.contiguous_format)
    loss, stats = getattr(torch.ops.effopd, op + "_")(student, *rest, row_scale, *spec, needs[0], with_stats)
    return loss, (student,) if needs[0] else (None,), stats


def _rows(*args):
    return run_rows("divergence_rows", *args)


def _rows_inplace(*args):
    return run_rows_inplace("divergence_rows", *args)


def _rows_overlap(logits: Tensor) -> bool:
    """Whether rows of (N, V) or (B, T, V) may share memory, as those of expanded logits or of sliding windows do."""
    axes = _axes(logits)
    if len(axes) == 2 and axes[1][1] < axes[0][1]:
        axes.reverse()  # the smaller stride first; torch.compile cannot sort symbols
    return steps_overlap([(stride, size) for size, stride in axes], logits.shape[-1])


def _announce_writing(logits: Tensor) -> None:
    """Whoever keeps them for a backward of their own, as tanh does, then raises instead of computing from our gradient.
    Not for views, which a raised version takes out of their graph.
    """
    written = not torch.compiler.is_compiling() and torch.is_grad_enabled() and logits.requires_grad
    if written and not logits._is_view():
        torch.autograd.graph.increment_version(logits)


def _axes(logits: Tensor) -> list[tuple[int, int]]:
    """(size, stride) of the leading dimensions of (..., V), those merged that one stride walks through."""
    axes: list[tuple[int, int]] = []
    for size, stride in zip(logits.shape[:-1], logits.stride()[:-1], strict=True):
        if axes and axes[-1][1] == size * stride:
            axes[-1] = (axes[-1][0] * size, stride)
        elif size != 1:
            axes.append((size, stride))
    return axes


def as_rows(*sides: Tensor) -> tuple[Tensor, ...]:
    """All (..., V·) as (N, V·) with neighbouring columns adjacent, or as (B, T, V·) where that spares a copy, as it
    does for logits[:, :-1].
    """
    sides = tuple(x if x.stride(-1) == 1 else x.contiguous() for x in sides)
    apart = [axes[-1][0] for axes in map(_axes, sides) if len(axes) == 2]
    if sides[0].numel() and apart and apart[0] == apart[-1] and all(len(_axes(x)) <= 2 for x in sides):
        return tuple(x.reshape(-1, apart[0], x.shape[-1]) for x in sides)
    return tuple(x.reshape(-1, x.shape[-1]) for x in sides)


def divergence_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    divergence: Divergence = REVERSE_KL,
    *,
    mask: Tensor | None = None,
    weight: Tensor | None = None,
    temperature: float = 1.0,
    teacher_temperature: float | None = None,
    reduction: str = "mean",
    num_tokens: int | float | Tensor | None = None,
    return_stats: bool = False,
    inplace: bool = False,
) -> Any:
    """Divergence between student and teacher over the vocabulary; the teacher is a constant.

    student_logits (..., Vs), teacher_logits (..., Vt): fp32, bf16, fp16 or fp64, not necessarily alike; where the
        vocabularies are padded to different lengths both are renormalised over the shared prefix.
    mask (...): bool, True where the token counts. weight (...): a constant factor per token.
    temperature divides the student's logits, teacher_temperature (default: the same) the teacher's; both are at least
        1e-6. No T² is applied.
    reduction: "mean" is Σ weight·D / Σ weight over the tokens that count, or / num_tokens where given: of accumulation
        those of all micro-batches; with DDP and FSDP, which average gradients, those of all ranks / their number. "sum"
        is Σ weight·D; "none" has the mask's shape and is 0 where masked.
    return_stats: return (loss, DivergenceStats), from the same pass.
    inplace: write the gradient over the student's logits, whose values are then gone. The logits must not be needed
        by anything else; memory then does not grow at all, where rows do not overlap and their columns are adjacent.

    Computed in fp32 (fp64 for fp64 logits) whatever the logits' dtype; the gradient of fp16 logits is also held in fp32
    until a loss scale reaches it, unless in place. An entry at −inf on both sides is outside the support; where one
    side alone is −inf its log-probability counts as −1e4: large, but finite. Logits below about −1e38, as finfo.min,
    may count as −inf; rows whose largest is beyond ±1e9 times the temperature are out of the kernels' range.
    No tokens that count, or num_tokens of 0, make a normaliser of 1.
    Raises ValueError or TypeError, before any work, for shapes, dtypes, devices or options that do not fit.
    """
    student_logits, teacher_logits = gathered(student_logits), gathered(teacher_logits)
    mask, weight, num_tokens = map(gathered, (mask, weight, num_tokens))
    check_float(student_logits=student_logits, teacher_logits=teacher_logits)
    shape = student_logits.shape[:-1]
    if student_logits.ndim < 1 or teacher_logits.ndim < 1 or teacher_logits.shape[:-1] != shape:
        raise ValueError(
            "student_logits (..., Vs) and teacher_logits (..., Vt) must have the same leading shape, got "
            f"{tuple(student_logits.shape)} and {tuple(teacher_logits.shape)}"
        )
    if 0 in (student_logits.shape[-1], teacher_logits.shape[-1]):
        raise ValueError(f"empty vocabulary: {tuple(student_logits.shape)} and {tuple(teacher_logits.shape)}")
    spec = make_spec(divergence, temperature, teacher_temperature)
    mask_N, scale_N = row_factor(student_logits, teacher_logits, mask, weight, reduction, num_tokens)
    if inplace:
        _announce_writing(student_logits)
    loss, rows, stats = reduced_loss(
        _rows_inplace if inplace else _rows,
        (*as_rows(student_logits, teacher_logits.detach()), mask_N),
        spec,
        scale_N,
        num_inputs=1,
        per_row=reduction == "none",
        with_stats=return_stats,
        dtype=student_logits.dtype if inplace else torch.float32,
    )
    return answer(loss, rows, stats, shape, reduction, return_stats)


def reverse_kl_loss(student_logits: Tensor, teacher_logits: Tensor, **options) -> Any:
    """KL(student ‖ teacher): `divergence_loss` with REVERSE_KL, and its options."""
    return divergence_loss(student_logits, teacher_logits, REVERSE_KL, **options)
