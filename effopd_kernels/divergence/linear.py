"""Divergences straight from hidden states and the two heads. N tokens, V vocabulary, D hidden size."""

from typing import Any

import torch
from torch import Tensor

from ..checks import FLOATS, check_float
from .arguments import answer, check_num_valid, chunk_budget, gathered, make_spec, row_factor
from .autograd import reduced_loss
from .family import REVERSE_KL, Divergence
from .linear_rows import held_in, may_keep, student_bytes  # and defines effopd::linear_divergence_rows


def run_linear_rows(op: str, tensors, row_scale, spec, needs, with_stats, keep=False):
    """What `reduced_loss` asks for, of an op of `linear_rows`."""
    loss, *grads, stats, kept = getattr(torch.ops.effopd, op)(*tensors, row_scale, *spec, *needs, with_stats, keep)
    return loss, tuple(grad if need else None for grad, need in zip(grads, needs, strict=True)), stats, kept


def _rows(*args):
    return run_linear_rows("linear_divergence_rows", *args)


def compute_dtype(prefix: str, hidden: Tensor, weight: Tensor) -> torch.dtype:
    """Of the products. prefix: of the arguments' names, in the error."""
    device = hidden.device.type
    autocast = device != "meta" and torch.is_autocast_enabled(device)  # torch 2.11 cannot trace is_autocast_available
    if autocast and hidden.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    if hidden.dtype != weight.dtype:
        raise TypeError(
            f"{prefix}hidden is {hidden.dtype} but {prefix}weight {weight.dtype}: cast one"
            + ("" if autocast else ", or use autocast")
        )
    return hidden.dtype


def check_side(prefix: str, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if weight.ndim != 2 or hidden.ndim < 1 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{prefix}hidden (..., D) and {prefix}weight (V, D) do not fit: "
            f"{tuple(hidden.shape)}, {tuple(weight.shape)}"
        )
    if 0 in weight.shape:
        raise ValueError(f"{prefix}weight is empty: {tuple(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{prefix}bias must be ({weight.shape[0]},) as {prefix}weight has it, got {tuple(bias.shape)}")


def linear_divergence_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    divergence: Divergence = REVERSE_KL,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    student_logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    mask: Tensor | None = None,
    weight: Tensor | None = None,
    temperature: float = 1.0,
    teacher_temperature: float | None = None,
    reduction: str = "mean",
    num_tokens: int | float | Tensor | None = None,
    return_stats: bool = False,
    chunk_bytes: int | None = None,
    logits_dtype: torch.dtype | None = None,
    num_valid: int | None = None,
) -> Any:
    """`divergence_loss` of softcap·tanh(scale·(hidden·weightᵀ + bias)/softcap), never holding the logits.

    student_hidden (..., Ds), student_weight (Vs, Ds), student_bias (Vs,) and the teacher's likewise: leading shapes
        agree, sizes and dtypes may differ. Gradients go to the student's three, and only where they are required.
    mask, weight, temperature, reduction, num_tokens, return_stats: as in `divergence_loss`. Masked tokens leave before
        the projections and cost nothing; on a GPU, finding them waits for it, once (with reduction "none" in backward
        again), which num_valid avoids.
    num_valid: how many tokens the mask keeps, where the caller knows. More are an error on the CPU; elsewhere, and
        under torch.compile, those beyond that number are dropped.
    chunk_bytes: budget for logits alive at a time; default 208 MiB on the CPU, 1 GiB elsewhere.
    logits_dtype: of the projections' results; default the operands' dtype. float32 avoids the rounding of logits to
        bf16, which at |logit| ≈ 20 is as large as an on-policy divergence.

    Under autocast the projections run in its dtype. dW is summed in fp32. Sharded heads (DTensor) are gathered in full,
    and get the mean of the ranks' gradients, as FSDP takes it.
    With reduction "none" and a head that is trained, the gradients of all logits are kept for backward if chunk_bytes
    holds them, else (and always in fp16) it projects again: six GEMM units of 2·N·V·D operations instead of four.
    Raises ValueError or TypeError, before any work, for shapes, dtypes, devices or options that do not fit.
    """
    student_hidden, student_weight, student_bias = map(gathered, (student_hidden, student_weight, student_bias))
    teacher_hidden, teacher_weight, teacher_bias = map(gathered, (teacher_hidden, teacher_weight, teacher_bias))
    mask, weight, num_tokens = map(gathered, (mask, weight, num_tokens))
    biases = {"student_bias": student_bias, "teacher_bias": teacher_bias}
    check_float(
        student_hidden=student_hidden, student_weight=student_weight,
        teacher_hidden=teacher_hidden, teacher_weight=teacher_weight,
        **{name: bias for name, bias in biases.items() if bias is not None},
    )  # fmt: skip
    check_side("student_", student_hidden, student_weight, student_bias)
    check_side("teacher_", teacher_hidden, teacher_weight, teacher_bias)
    shape = student_hidden.shape[:-1]
    if teacher_hidden.shape[:-1] != shape:
        raise ValueError(
            "student_hidden (..., Ds) and teacher_hidden (..., Dt) must have the same leading shape, got "
            f"{tuple(student_hidden.shape)} and {tuple(teacher_hidden.shape)}"
        )
    if logits_dtype not in (None, *FLOATS):
        raise TypeError(f"logits_dtype must be one of {', '.join(map(str, FLOATS))}, got {logits_dtype!r}")
    chunk_bytes = chunk_budget(chunk_bytes, student_hidden.device)
    spec = make_spec(
        divergence, temperature, teacher_temperature, student_logit_scale, teacher_logit_scale, student_softcap,
        teacher_softcap,
    )  # fmt: skip
    mask_N, scale_N = row_factor(student_hidden, teacher_hidden, mask, weight, reduction, num_tokens)
    check_num_valid(mask_N, num_valid)
    dtypes = (
        compute_dtype("student_", student_hidden, student_weight),
        compute_dtype("teacher_", teacher_hidden, teacher_weight),
    )
    student = student_hidden.reshape(-1, student_hidden.shape[-1]), student_weight, student_bias
    teacher = teacher_hidden.reshape(-1, teacher_hidden.shape[-1]), teacher_weight, teacher_bias
    teacher = tuple(t if t is None else t.detach() for t in teacher)
    keep, s_dtype = None, logits_dtype or dtypes[0]
    if reduction == "none":
        V = min(student_weight.shape[0], teacher_weight.shape[0])
        keep = may_keep(student[0], num_valid, V, dtypes[0], s_dtype, student_bytes(chunk_bytes))
    loss, rows, stats = reduced_loss(
        _rows,
        (*student, *teacher, mask_N),
        (*spec, *dtypes, logits_dtype, chunk_bytes, num_valid),
        scale_N,
        num_inputs=3,
        per_row=reduction == "none",
        with_stats=return_stats,
        dtype=held_in(student[0], dtypes[0], s_dtype),
        keep=keep,
    )
    return answer(loss, rows, stats, shape, reduction, return_stats)


def linear_reverse_kl_loss(
    student_hidden: Tensor, student_weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor, **options
) -> Any:
    """KL(student ‖ teacher): `linear_divergence_loss` with REVERSE_KL, and its options."""
    return linear_divergence_loss(student_hidden, student_weight, teacher_hidden, teacher_weight, REVERSE_KL, **options)
