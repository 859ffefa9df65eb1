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

from ..checks import wide
from ..native import TRITON
from . import reference

LIBRARY = torch.library.Library("effopd", "FRAGMENT")


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


stats = _operator(reference.stats)
sketch = _operator(reference.sketch)
skinny = _operator(reference.skinny)
gram_apply = _operator(reference.gram_apply)
project = _operator(reference.project)
gram = _operator(reference.gram)
eigh = _operator(reference.eigh)


@torch.library.register_fake("effopd::lowrank_stats", lib=LIBRARY)
def _(x, base, full):
    return x[0].new_empty((len(x), 5), dtype=torch.float64)


@torch.library.register_fake("effopd::lowrank_sketch", lib=LIBRARY)
def _(x, base, columns, seed, full):
    z = x[0].new_empty((len(x), x[0].shape[1], columns), dtype=wide(x[0]))
    return z, x[0].new_empty((len(x), 5), dtype=torch.float64)


@torch.library.register_fake("effopd::lowrank_skinny", lib=LIBRARY)
def _(x, base, q, scale):
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
    return x[0].new_empty((len(x), m, m), dtype=torch.float64 if double else wide(x[0]))


@torch.library.register_fake("effopd::lowrank_eigh", lib=LIBRARY)
def _(g):
    return g.new_empty(g.shape[:2]), g.new_empty(g.shape)
