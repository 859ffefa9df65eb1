"""The part of a truncated SVD's gradient that leaves the subspace.

    [σ_i I, −A⊥; −A⊥ᵀ, σ_i I] [x_i; y_i] = [P_U⊥ ḡU_i; P_V⊥ ḡV_i]        for every triplet i

Eliminating x leaves (σ_i² − A⊥ᵀA⊥) y_i = σ_i ḡV_i + A⊥ᵀ ḡU_i on the short side: positive definite when σ_i > σ_{k+1},
with condition σ_i² / (σ_i² − σ_{k+1}²). Conjugate gradients run for all i at once, so a step is one reading of the
pair; the Ritz pairs that the sketch found beyond the rank precondition them, which takes the worst of the condition
away.

Shape legend: B matrices; N ≥ M long and short side; K = rank; R further Ritz pairs.
"""

import torch
from torch import Tensor

from .decompose import Rest, power_of_two
from .difference import Difference

MAX_ITERATIONS = 1000


def complement(
    x: list[Tensor], base: list[Tensor], u: Tensor, s: Tensor, v: Tensor, rest: Rest, grad_u: Tensor, grad_v: Tensor
) -> tuple[Tensor, Tensor]:
    """The solutions x (B, N, K) and y (B, M, K); x, base, u and v with the long side first."""
    # The solve squares A and ḡ: bring entries of 1e-25 or 1e30 to where that is safe. Vectors do not see A's scale,
    # σ does; in ḡ everything is linear.
    scale = power_of_two(s[:, 0].double())
    unit = power_of_two(torch.maximum(grad_u.abs().amax((-2, -1)), grad_v.abs().amax((-2, -1))).double())
    factor = (scale / unit)[:, None, None]
    scale, unit = scale.to(s.dtype), unit.to(s.dtype)[:, None, None]
    s, rest = s * scale.unsqueeze(-1), Rest(rest.s * scale.unsqueeze(-1), rest.v)
    left, right = _solve(Difference(x, base, scale), u, s, v, rest, grad_u * unit, grad_v * unit)
    return (left * factor).to(s.dtype), (right * factor).to(s.dtype)


def _solve(
    x: Difference, u: Tensor, s: Tensor, v: Tensor, rest: Rest, grad_u: Tensor, grad_v: Tensor
) -> tuple[Tensor, Tensor]:

    def outside(basis: Tensor, y: Tensor) -> Tensor:
        y = y - basis @ (basis.mT @ y)
        return y - basis @ (basis.mT @ y)

    eps = torch.finfo(s.dtype).eps
    size = (torch.linalg.vector_norm(grad_u, dim=-2) + torch.linalg.vector_norm(grad_v, dim=-2)).amax(-1, keepdim=True)
    grad_u, grad_v = outside(u, grad_u), outside(v, grad_v)
    active = (
        torch.hypot(torch.linalg.vector_norm(grad_u, dim=-2), torch.linalg.vector_norm(grad_v, dim=-2))
        > 16 * eps * size
    )
    following = rest.s[:, :1] if rest.s.shape[-1] else torch.zeros_like(s[:, :1])
    ill = active & (s - following <= 16 * eps * s[:, :1])
    if ill.any():
        i, j = ill.nonzero()[0].tolist()
        raise RuntimeError(
            f"the loss depends on how triplet {j + 1} of matrix {i} (σ = {s[i, j]:.6g}) is told from those beyond the "
            f"rank (σ = {following[i, 0]:.6g}), where no gradient exists: choose a rank at a gap of the spectrum."
        )
    if not active.any():
        return torch.zeros_like(u), torch.zeros_like(v)

    if v.shape[-1] == v.shape[-2]:  # of rows nothing is outside, and what follows would solve for rounding
        return grad_u / torch.where(active, s, 1.0).unsqueeze(-2) * active.unsqueeze(-2), torch.zeros_like(v)

    squares = s.square()
    safe = torch.where(active, s, 1.0).unsqueeze(-2)

    def operator(y: Tensor) -> Tensor:
        return squares.unsqueeze(-2) * y - outside(v, x.gram_apply(y))

    # 1/(σ² − θ²) on the Ritz pairs at hand, 1/σ² on the rest.
    flat = 1 / safe.square()
    gap = (squares.unsqueeze(-2) - rest.s.square().unsqueeze(-1)).clamp_min(16 * eps * squares[:, :1, None])
    gain = torch.where(active.unsqueeze(-2), 1 / gap, 0.0) - flat

    def precondition(r: Tensor) -> Tensor:
        return flat * r + rest.v @ (gain * (rest.v.mT @ r))

    right = s.unsqueeze(-2) * grad_v + outside(v, x.mT.apply(grad_u))
    y = _conjugate_gradients(operator, precondition, right * active.unsqueeze(-2), eps)
    return (grad_u + outside(u, x.apply(y))) / safe * active.unsqueeze(-2), y


def _conjugate_gradients(operator, precondition, right: Tensor, eps: float) -> Tensor:
    """Solve for every column of right (B, M, K) to a relative residual of 8 ε, or as far as rounding allows."""
    target = (8 * eps) ** 2 * right.square().sum(-2, keepdim=True)
    y = torch.zeros_like(right)
    r, z = right, precondition(right)
    p, rz = z, (right * z).sum(-2, keepdim=True)
    best = right.square().sum(-2, keepdim=True)
    stalled = 0
    for _ in range(MAX_ITERATIONS):
        running = r.square().sum(-2, keepdim=True) > target
        if not running.any() or stalled > 20:
            break
        ap = operator(p)
        curvature = (p * ap).sum(-2, keepdim=True)
        running &= curvature > 0
        step = torch.where(running, rz / torch.where(running, curvature, 1.0), 0.0)
        y, r = y + step * p, r - step * ap
        z = precondition(r)
        rz_next = (r * z).sum(-2, keepdim=True)
        p = z + torch.where(running, rz_next / torch.where(running, rz, 1.0), 0.0) * p
        rz = rz_next
        now = torch.minimum(best, r.square().sum(-2, keepdim=True))
        stalled = 0 if (now < 0.9 * best).any() else stalled + 1
        best = now
    relative = (r.square().sum(-2) / right.square().sum(-2).clamp_min(torch.finfo(right.dtype).tiny)).sqrt()
    # A matrix or gradient that is not finite has a gradient of NaN, and leaves the others alone.
    if (~(relative <= eps**0.5) & right.isfinite().all(-2)).any():
        raise RuntimeError(
            "the solve for the gradient of singular vectors did not converge: σ_k and σ_(k+1) are too close, or the "
            "triplets too inaccurate (ask for a smaller tol, or route='exact')."
        )
    return y
