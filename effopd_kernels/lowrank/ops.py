"""The operators under the low-rank maths, and which implementation serves which device.

Shape legend: B matrices of equal shape, dtype and strides; N rows, M columns of each; L sketch columns.

Every operator takes the difference X_b = scale_b · (x_b − base_b) as two lists of tensors ("a batch by pointers"):
nothing is stacked and the difference is never written at full size. An empty ``base`` list means X_b = scale_b · x_b.
``scale`` (B,) holds powers of two, so it is exact; None means 1. A transposed product is asked for with transposed
views (``x.mT``), so exactly one stride of each matrix is 1, and it may be either. Subtraction is in fp32 (fp64 when
``q`` is fp64 or ``double``); results are fp32 (fp64).

The PyTorch reference serves every device; Triton takes CUDA over when it imports.
"""

import torch
from torch import Tensor

from . import reference

SUM_SQUARES, MAX_ABS, UNCHANGED, SUM_ULP_SQUARES, NON_FINITE = range(5)


@torch.library.custom_op("effopd::lowrank_stats", mutates_args=())
def stats(x: list[Tensor], base: list[Tensor], full: bool) -> Tensor:
    """First-pass statistics of the unscaled differences, (B, 5) fp64: Σ Δ², max |Δ|, entries with Δ = 0, Σ ulp(x)²,
    non-finite entries.

    The two middle ones are filled only when ``full``. A matrix with non-finite entries may hold anything in the first
    two.
    """
    return reference.stats(x, base, full)


@torch.library.custom_op("effopd::lowrank_sketch", mutates_args=())
def sketch(x: list[Tensor], base: list[Tensor], q: Tensor, full: bool, fast: bool) -> tuple[Tensor, Tensor]:
    """The first pass: (:func:`gram_apply` of the unscaled differences, :func:`stats`), the second from the same
    reading.
    """
    return reference.sketch(x, base, q, full, fast)


@torch.library.custom_op("effopd::lowrank_skinny", mutates_args=())
def skinny(x: list[Tensor], base: list[Tensor], q: Tensor, scale: Tensor | None, fast: bool) -> Tensor:
    """Y_b = X_b q_b: x_b (N, M), q (B, M, L) → (B, N, L). ``fast`` lets the operands be rounded to bf16 (accumulation
    stays fp32).
    """
    return reference.skinny(x, base, q, scale, fast)


@torch.library.custom_op("effopd::lowrank_gram_apply", mutates_args=())
def gram_apply(x: list[Tensor], base: list[Tensor], q: Tensor, scale: Tensor | None, fast: bool) -> Tensor:
    """Z_b = X_bᵀ (X_b q_b): x_b (N, M), q (B, M, L) → (B, M, L). One reading of the pair on CPU; two skinny products
    elsewhere.
    """
    return reference.gram_apply(x, base, q, scale, fast)


@torch.library.custom_op("effopd::lowrank_project", mutates_args=())
def project(x: list[Tensor], base: list[Tensor], q: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """(Y_b = X_b q_b, X_bᵀ Y_b): (B, M, L) → (B, N, L), (B, M, L). Readings of the pair as in :func:`gram_apply`."""
    return reference.project(x, base, q, scale)


@torch.library.custom_op("effopd::lowrank_gram", mutates_args=())
def gram(x: list[Tensor], base: list[Tensor], scale: Tensor | None, double: bool) -> Tensor:
    """G_b = X_bᵀ X_b, (B, M, M), exactly symmetric; only one triangle is computed. ``double``: fp64 products and
    result.
    """
    return reference.gram(x, base, scale, double)


@torch.library.custom_op("effopd::lowrank_eigh", mutates_args=())
def eigh(g: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, descending, (B, L) and eigenvectors in columns (B, L, L) of symmetric g (B, L, L), in g's dtype
    (fp32 or fp64).
    """
    return reference.eigh(g)


def _arithmetic(double: bool) -> torch.dtype:
    return torch.float64 if double else torch.float32


@stats.register_fake
def _(x, base, full):
    return x[0].new_empty((len(x), 5), dtype=torch.float64)


@sketch.register_fake
def _(x, base, q, full, fast):
    return q.new_empty(q.shape), x[0].new_empty((len(x), 5), dtype=torch.float64)


@skinny.register_fake
def _(x, base, q, scale, fast):
    return q.new_empty((len(x), x[0].shape[0], q.shape[2]))


@gram_apply.register_fake
def _(x, base, q, scale, fast):
    return q.new_empty(q.shape)


@project.register_fake
def _(x, base, q, scale):
    return q.new_empty((len(x), x[0].shape[0], q.shape[2])), q.new_empty(q.shape)


@gram.register_fake
def _(x, base, scale, double):
    m = x[0].shape[1]
    return x[0].new_empty((len(x), m, m), dtype=_arithmetic(double or x[0].dtype == torch.float64))


@eigh.register_fake
def _(g):
    return g.new_empty(g.shape[:2]), g.new_empty(g.shape)


try:
    from . import triton_kernels
except ImportError:  # no Triton on this machine: the reference serves CUDA too
    pass
else:
    for op, launch in (
        (stats, "launch_stats"),
        (sketch, "launch_sketch"),
        (skinny, "launch_skinny"),
        (gram_apply, "launch_gram_apply"),
        (project, "launch_project"),
        (gram, "launch_gram"),
        (eigh, "launch_eigh"),
    ):
        if hasattr(triton_kernels, launch):
            op.register_kernel("cuda")(getattr(triton_kernels, launch))
