"""The operators under the low-rank maths, and which implementation serves which device.

Shape legend: B matrices of equal shape, dtype and strides; N rows, M columns of each; L sketch columns.

Every operator takes the difference X_b = scale_b · (x_b − base_b) as two lists of tensors ("a batch by pointers"):
nothing is stacked and the difference is never written at full size. An empty ``base`` list means X_b = scale_b · x_b.
``scale`` (B,) holds powers of two, so it is exact; None means 1. A transposed product is asked for with transposed
views (``x.mT``), so exactly one stride of each matrix is 1, and it may be either. Subtraction is in fp32 (fp64 when
``q`` is fp64 or ``double``); results are fp32 (fp64).

The PyTorch reference serves every device, Triton CUDA where it is installed. They are defined without
`torch.library.custom_op`, whose first call imports torch._dynamo, a second or two.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ..native import TRITON
from . import reference

LIBRARY = torch.library.Library("effopd", "FRAGMENT")
SUM_SQUARES, MAX_ABS, UNCHANGED, SUM_ULP_SQUARES, NON_FINITE = range(5)


def _operator(function: Callable) -> torch._ops.OpOverload:
    """effopd::lowrank_<name>, which calls the function, and on CUDA the launcher of its name."""
    name = f"lowrank_{function.__name__}"

    def launch(*args):
        from . import triton_kernels  # at first use: importing this package needs no Triton

        return getattr(triton_kernels, f"launch_{function.__name__}")(*args)

    LIBRARY.define(name + torch.library.infer_schema(function, mutates_args=()))
    LIBRARY.impl(name, function, "CompositeExplicitAutograd")
    if TRITON:
        LIBRARY.impl(name, launch, "CUDA")
    return getattr(torch.ops.effopd, name).default


@_operator
def stats(x: list[Tensor], base: list[Tensor], full: bool) -> Tensor:
    """First-pass statistics of the unscaled differences, (B, 5) fp64: Σ Δ², max |Δ|, entries with Δ = 0, Σ ulp(x)²,
    non-finite entries.

    The two middle ones are filled only when ``full``. A matrix with non-finite entries may hold anything in the first
    two.
    """
    return reference.stats(x, base, full)


@_operator
def sketch(x: list[Tensor], base: list[Tensor], columns: int, seed: int, full: bool) -> tuple[Tensor, Tensor]:
    """The first pass: (fast :func:`gram_apply` of the unscaled differences and the test matrix of :mod:`signs`,
    :func:`stats`), the second from the same reading.
    """
    return reference.sketch(x, base, columns, seed, full)


@_operator
def skinny(x: list[Tensor], base: list[Tensor], q: Tensor, scale: Tensor | None, fast: bool) -> Tensor:
    """Y_b = X_b q_b: x_b (N, M), q (B, M, L) → (B, N, L). ``fast`` lets the operands be rounded to 16 bits (sums
    stay in fp32).
    """
    return reference.skinny(x, base, q, scale, fast)


@_operator
def gram_apply(x: list[Tensor], base: list[Tensor], q: Tensor, scale: Tensor | None, fast: bool) -> Tensor:
    """Z_b = X_bᵀ (X_b q_b): x_b (N, M), q (B, M, L) → (B, M, L). One reading of the pair on CPU; two skinny products
    elsewhere.
    """
    return reference.gram_apply(x, base, q, scale, fast)


@_operator
def project(x: list[Tensor], base: list[Tensor], q: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """(Y_b = X_b q_b, X_bᵀ Y_b): (B, M, L) → (B, N, L), (B, M, L). Readings of the pair as in :func:`gram_apply`."""
    return reference.project(x, base, q, scale)


@_operator
def gram(x: list[Tensor], base: list[Tensor], scale: Tensor | None, double: bool) -> Tensor:
    """G_b = X_bᵀ X_b, (B, M, M), exactly symmetric; only one triangle is computed. ``double``: fp64 products and
    result.
    """
    return reference.gram(x, base, scale, double)


@_operator
def eigh(g: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, descending, (B, L) and eigenvectors in columns (B, L, L) of symmetric g (B, L, L), in g's dtype
    (fp32 or fp64).
    """
    return reference.eigh(g)


def _arithmetic(double: bool) -> torch.dtype:
    return torch.float64 if double else torch.float32


@torch.library.register_fake("effopd::lowrank_stats", lib=LIBRARY)
def _(x, base, full):
    return x[0].new_empty((len(x), 5), dtype=torch.float64)


@torch.library.register_fake("effopd::lowrank_sketch", lib=LIBRARY)
def _(x, base, columns, seed, full):
    z = x[0].new_empty((len(x), x[0].shape[1], columns), dtype=_arithmetic(x[0].dtype == torch.float64))
    return z, x[0].new_empty((len(x), 5), dtype=torch.float64)


@torch.library.register_fake("effopd::lowrank_skinny", lib=LIBRARY)
def _(x, base, q, scale, fast):
    return q.new_empty((len(x), x[0].shape[0], q.shape[2]))


@torch.library.register_fake("effopd::lowrank_gram_apply", lib=LIBRARY)
def _(x, base, q, scale, fast):
    return q.new_empty(q.shape)


@torch.library.register_fake("effopd::lowrank_project", lib=LIBRARY)
def _(x, base, q, scale):
    return q.new_empty((len(x), x[0].shape[0], q.shape[2])), q.new_empty(q.shape)


@torch.library.register_fake("effopd::lowrank_gram", lib=LIBRARY)
def _(x, base, scale, double):
    m = x[0].shape[1]
    return x[0].new_empty((len(x), m, m), dtype=_arithmetic(double or x[0].dtype == torch.float64))


@torch.library.register_fake("effopd::lowrank_eigh", lib=LIBRARY)
def _(g):
    return g.new_empty(g.shape[:2]), g.new_empty(g.shape)
