"""W0 plus part of a truncated update.

    head   W0 + α · Σ_{i ≤ rank} σ_i u_i v_iᵀ
    tail   W0 + α · Σ_{i > tail} σ_i u_i v_iᵀ   over the triplets at hand

With ΔW = W_t − W0 the *whole* tail, W0 + ΔW − Σ_{i ≤ k}, is ``low_rank_update(w_t, svd, rank=k, alpha=-1)``: no further
triplets needed.
"""

import itertools
import math

import torch
from torch import Tensor

from ..checks import below_infinity, check_float, is_integer, is_number, overlaps_itself, readable, shown
from .panels import PANEL
from .types import RSVD, check_svd
from .workers import without_autocast


@without_autocast
def low_rank_update(
    w0: Tensor,
    svd: RSVD,
    *,
    rank: int | None = None,
    tail: int | None = None,
    alpha: float | Tensor = 1.0,
    match_norm: float | Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Add the head or the tail of an update to ``w0``, summed in fp32 (fp64 where either is) and rounded once, panel by
    panel. Differentiable in ``w0`` and the factors unless ``out`` is given.

    Args:
        w0: (..., m, n) bf16, fp16, fp32 or fp64.
        svd: factors of (..., m, n).
        rank: use triplets 1 … rank (default: all). tail: use triplets tail + 1 … instead. Not both.
        alpha: factor on the sum.
        match_norm: rescale the sum to this Frobenius norm before ``alpha`` (a number or (...)): the norm-matched
            comparison of arXiv 2605.11739. A zero sum stays zero.
        out: written without gradients and returned; may be ``w0`` itself, of which a copy is taken where ``out`` is
            another view of its memory. Default: a new tensor like ``w0``.

    Raises:
        TypeError: ``w0`` that is no dense floating tensor, ``svd`` that is no RSVD, ``alpha`` that is no real number,
            ``out`` that is no tensor.
        ValueError: shapes or devices that do not agree, an ``out`` whose own elements share memory, both of ``rank``
            and ``tail``, or either outside 0 … k, ``alpha`` or ``match_norm`` that is not finite, the latter below 0
            (on a GPU these are not looked at).
    """
    _check(w0, svd, rank, tail, alpha, match_norm, out)
    part = slice(tail, None) if tail is not None else slice(0, rank)
    u, s, vh = svd.U[..., part], svd.S[..., part], svd.Vh[..., part, :]
    if match_norm is not None:
        s = _of_norm(s, match_norm)
    us = u * ((alpha if isinstance(alpha, Tensor) else float(alpha)) * s).unsqueeze(-2)
    wide = torch.promote_types(w0.dtype, us.dtype)
    us, vh = us.to(wide), vh.to(wide)
    if out is None and torch.is_grad_enabled() and any(t.requires_grad for t in (w0, us, vh)):
        return (w0.to(wide) + us @ vh).to(w0.dtype)
    if out is None:
        return _added(w0, us, vh, torch.empty_like(w0))
    w0, vh = (t.clone() if _is_another_view(t, out) else t for t in (w0, vh))
    return _added(w0, us, vh, out)


def _check(w0: Tensor, svd: RSVD, rank, tail, alpha, match_norm, out) -> None:
    """Raises as `low_rank_update`."""
    check_float(w0=w0, **({} if out is None else {"out": out}))
    check_svd(svd)
    check_float(w0=w0, U=svd.U, S=svd.S, Vh=svd.Vh)
    k = svd.S.shape[-1]
    if rank is not None and tail is not None:
        raise ValueError("give rank or tail, not both")
    for name, value in (("rank", rank), ("tail", tail)):
        if value is not None and not (is_integer(value) and 0 <= value <= k):
            raise ValueError(f"{name} must be an integer from 0 to the {k} triplets at hand, got {shown(value)}")
    if not is_number(alpha) and not (isinstance(alpha, Tensor) and alpha.ndim == 0 and not alpha.is_complex()):
        raise TypeError(f"alpha must be a real number, got {shown(alpha)}")
    if not _usable(alpha, -math.inf):
        raise ValueError(f"alpha must be finite, got {alpha}")
    shape = (*svd.U.shape[:-1], svd.Vh.shape[-1])
    if w0.shape != shape:
        raise ValueError(f"w0 is {tuple(w0.shape)}, the factors make {tuple(shape)}")
    if out is not None and (out.shape != w0.shape or out.dtype != w0.dtype):
        raise ValueError(f"out is {tuple(out.shape)} {out.dtype}, w0 is {tuple(w0.shape)} {w0.dtype}")
    if out is not None and overlaps_itself(out):
        raise ValueError(f"out has elements that share memory: its shape is {tuple(out.shape)}, strides {out.stride()}")

    if isinstance(match_norm, Tensor):
        if match_norm.is_complex():
            raise TypeError(f"match_norm must be real, got {match_norm.dtype}")
        if match_norm.shape not in ((), shape[:-2]):
            raise ValueError(
                f"match_norm must be a number or one for each matrix, {shape[:-2]}, got {tuple(match_norm.shape)}"
            )
    elif match_norm is not None and not is_number(match_norm):
        raise ValueError(f"match_norm must be a number ≥ 0, or a tensor of one for each matrix, got {match_norm!r}")
    if match_norm is not None and not _usable(match_norm, 0):
        raise ValueError(f"match_norm must be finite and ≥ 0, got {shown(match_norm)}")


def _of_norm(s: Tensor, wanted: float | Tensor) -> Tensor:
    """Singular values (..., K) scaled such that their sum of triplets has this Frobenius norm; zeros stay zeros."""
    norm = torch.linalg.vector_norm(s, dim=-1, dtype=torch.float64)
    wanted = wanted if isinstance(wanted, Tensor) else float(wanted)
    wanted = torch.as_tensor(wanted, dtype=torch.float64, device=s.device)
    norm, wanted = norm.masked_fill(zero := norm == 0, 1), wanted.expand_as(norm).masked_fill(zero, 0)
    return s * (wanted / norm).to(s.dtype).unsqueeze(-1)


def _is_another_view(a: Tensor, b: Tensor) -> bool:
    """Whether they may share memory without being the same elements in the same places. torch.compile cannot tell."""
    if torch.compiler.is_compiling() or a.is_set_to(b):
        return False
    return a.untyped_storage()._cdata == b.untyped_storage()._cdata


def _usable(value: float | Tensor, least: float) -> bool:
    """Whether it is finite and no less, as far as a look at it costs nothing."""
    if not isinstance(value, Tensor):
        return value >= least and below_infinity(abs(value))
    return not readable(value) or bool(((value >= least) & value.isfinite()).all())


@torch.no_grad()
def _added(w0: Tensor, us: Tensor, vh: Tensor, out: Tensor) -> Tensor:
    """out = w0 + us vh, and where it is rounded a panel at a time, all of them in the same memory."""
    (m, n), rounds = w0.shape[-2:], w0.dtype != us.dtype
    rows = max(1, min(m, PANEL // max(1, n)) if rounds else m)
    room = us.new_empty(rows if rounds else 0, n)
    for where in itertools.product(*map(range, w0.shape[:-2])):
        for start in range(0, m, rows):
            panel = (*where, slice(start, start + rows))
            w, u, v = w0[panel], us[panel], vh[where]
            if rounds:
                out[panel] = room[: len(w)].copy_(w).addmm_(u, v)
            else:
                torch.addmm(w, u, v, out=out[panel])
    return out
