"""The gradient is that of the truncated SVD itself: gradcheck, the full SVD's gradient, and where none exists an
error.
"""

import pytest
import torch
from lowrank.matrices import spectrum, with_spectrum
from torch.utils.checkpoint import checkpoint

from effopd_kernels.lowrank import (
    autograd,
    batched_rsvd,
    low_rank_part,
    low_rank_update,
    principal_cosines,
    reconstruct,
    subspace_alignment,
    subspace_overlap,
)

ROUTES = ("subspace", "gram", "exact")


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def factors(k: int, **options):
    """(a, base?) → (U, S, Vh), the differentiable fields."""

    def function(a, base=None):
        svd = batched_rsvd(a, k, base=base, **options)
        return svd.U, svd.S, svd.Vh

    return function


@pytest.mark.parametrize(
    ("shape", "k"), [((7, 5), 2), ((5, 8), 3), ((2, 6, 4), 2), ((5, 5), 5), ((4, 6), 4), ((6, 4), 4), ((1, 5), 1)]
)
@pytest.mark.parametrize("oversample", [None, 0])
def test_gradcheck(shape, k, oversample):
    assert torch.autograd.gradcheck(factors(k, oversample=oversample), random(*shape).requires_grad_())


def test_gradcheck_of_a_pair():
    a, base = random(6, 5).requires_grad_(), random(6, 5, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(factors(2), (a, base))
    assert torch.autograd.gradcheck(lambda base: factors(2)(a.detach(), base), base)


def loss(u, s, vh, target):
    """One that feels U, S and Vh and their complement, not the signs."""
    return (
        ((u * s.unsqueeze(-2)) @ vh * target).sum() + s.pow(3).sum() + (u.square() * target[..., : u.shape[-1]]).sum()
    )


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-5)], ids=str)
def test_equals_the_gradient_of_the_full_svd(dtype, tolerance, transpose):
    exact, target = spectrum("polynomial", 60, 45), random(60, 45, seed=1)
    if transpose:
        exact, target = exact.mT, random(45, 60, seed=1)
    reference = exact.clone().requires_grad_()
    u, s, vh = torch.linalg.svd(reference, full_matrices=False)
    loss(u[:, :9], s[:9], vh[:9], target).backward()
    a = exact.to(dtype).requires_grad_()
    svd = batched_rsvd(a, 9)
    loss(svd.U, svd.S, svd.Vh, target.to(dtype)).backward()
    assert a.grad.dtype == dtype
    assert (a.grad - reference.grad).norm() < tolerance * reference.grad.norm()


@pytest.mark.parametrize("route", ["subspace", "gram"])
def test_converged_sketch_gives_the_same_gradient(route):
    """Without the coupling to the complement this is wrong by tens of percent, so the second half shows the guard's
    teeth.
    """
    exact, target = spectrum("exponential", 60, 45), random(60, 45, seed=1)
    gradients = []
    for options in ({"route": "exact"}, {"route": route, "oversample": 8, "power_iters": 12}):
        a = exact.clone().requires_grad_()
        (reconstruct(batched_rsvd(a, 9, **options)) * target).sum().backward()
        gradients.append(a.grad)
    assert (gradients[0] - gradients[1]).norm() < 1e-6 * gradients[0].norm()
    svd = batched_rsvd(exact, 9)
    inside = svd.U @ svd.U.mT @ target @ svd.Vh.mT @ svd.Vh
    assert (inside - gradients[0]).norm() > 0.1 * gradients[0].norm()


def test_loss_on_singular_values_alone(monkeypatch):
    """Ā = U diag(ḡ) Vᵀ, with no solve."""
    from effopd_kernels.lowrank import autograd

    monkeypatch.setattr(autograd, "complement", None)
    a, base = random(9, 7).requires_grad_(), random(9, 7, seed=1).requires_grad_()
    svd = batched_rsvd(a, 3, base=base)
    svd.S.square().sum().backward()
    torch.testing.assert_close(a.grad, 2 * reconstruct(svd).detach())
    assert torch.equal(a.grad, -base.grad)


def test_bf16_pair_gets_bf16_gradients_of_opposite_sign():
    a, base = random(9, 7).bfloat16().requires_grad_(), random(9, 7, seed=1).bfloat16().requires_grad_()
    batched_rsvd(a, 3, base=base).U.square().mul(torch.arange(3.0)).sum().backward()
    (reconstruct(batched_rsvd(a, 3, base=base)) * random(9, 7, seed=2)).sum().backward()
    assert a.grad.dtype == torch.bfloat16 and torch.equal(a.grad, -base.grad) and a.grad.abs().sum() > 0


@pytest.mark.parametrize("scale", [1e-25, 1e30])
def test_extreme_scales(scale):
    """reconstruct is homogeneous of degree one, so its gradient does not see the scale."""
    a, target = spectrum("polynomial", 20, 30).float(), random(20, 30, seed=1).float()
    gradients = []
    for factor in (1.0, scale):
        leaf = (a * factor).requires_grad_()
        (reconstruct(batched_rsvd(leaf, 4)) * target).sum().backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-4)


CLUSTERED = torch.tensor([3.0, 2.0, 2.0, 2.0, 1.0, 0.5, 0.4, 0.3, 0.2, 0.1], dtype=torch.float64)


def test_invariant_loss_on_a_cluster():
    """Equal σ inside the rank: a loss on the subspace has a gradient, and it is the one that finite differences see."""
    a = with_spectrum(14, 10, CLUSTERED).requires_grad_()
    target, direction = torch.linalg.qr(random(14, 4, seed=1))[0], 1e-6 * random(14, 10, seed=2)
    subspace_overlap(batched_rsvd(a, 4).U, target).backward()
    with torch.no_grad():
        ahead, behind = (subspace_overlap(batched_rsvd(a + sign * direction, 4).U, target) for sign in (1, -1))
    torch.testing.assert_close((a.grad * direction).sum(), (ahead - behind) / 2, rtol=1e-6, atol=0)


def test_gradient_does_not_depend_on_the_basis_inside_a_cluster():
    """The same matrix with the columns of its cluster rotated beforehand gives the same gradient."""
    u, v = torch.linalg.qr(random(14, 10))[0], torch.linalg.qr(random(12, 10, seed=1))[0]
    rotation = torch.eye(10, dtype=torch.float64)
    rotation[1:4, 1:4] = torch.linalg.qr(random(3, 3, seed=2))[0]
    target, gradients = random(14, 12, seed=3), []
    for r in (torch.eye(10, dtype=torch.float64), rotation):
        a = ((u @ r * CLUSTERED) @ (v @ r).mT).requires_grad_()
        (low_rank_part(a, 4) * target).sum().backward()
        gradients.append(a.grad)
        with pytest.raises(RuntimeError, match="cluster"):  # the triplets cannot carry this gradient
            (reconstruct(batched_rsvd(a, 4)) * target).sum().backward()
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("shape", [(5, 4), (2, 3, 4)])
def test_gradcheck_of_the_low_rank_part(shape):
    a, base = random(*shape).requires_grad_(), random(*shape, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda a, base: low_rank_part(a, 2, base=base), (a, base))
    clustered = with_spectrum(8, 6, torch.tensor([2.0, 2.0, 2.0, 1.0, 0.5, 0.1], dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(lambda a: low_rank_part(a, 3), clustered)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_ill_defined_gradients_are_errors(dtype):
    a = with_spectrum(14, 10, CLUSTERED).to(dtype).requires_grad_()
    with pytest.raises(RuntimeError, match=r"cluster of equal singular values.*triplets [234] and [234]"):
        batched_rsvd(a, 4).U[0].sum().backward()
    with pytest.raises(RuntimeError, match=r"told from those beyond the rank.*choose a rank at a gap"):
        (reconstruct(batched_rsvd(a, 2)) * torch.arange(10).to(dtype)).sum().backward()
    assert a.grad is None


def test_zero_and_rank_deficient_input():
    zero = torch.zeros(6, 5, dtype=torch.float64, requires_grad=True)
    batched_rsvd(zero, 2).S.sum().backward()
    assert zero.grad.isfinite().all()
    deficient = (random(9, 2) @ random(2, 8, seed=1)).requires_grad_()
    reconstruct(batched_rsvd(deficient, 4)).square().sum().backward()
    torch.testing.assert_close(deficient.grad, 2 * deficient.detach())
    with pytest.raises(RuntimeError, match="cluster"):
        batched_rsvd(deficient, 4).U[0].sum().backward()


def test_low_rank_part_of_a_matrix_of_lower_rank():
    deficient = (random(9, 2) @ random(2, 6, seed=1)).requires_grad_()
    low_rank_part(deficient, 4).square().sum().backward()  # stays in the span, so it does not ask for what is not there
    torch.testing.assert_close(deficient.grad, 2 * deficient.detach())
    target = random(9, 6, seed=2)
    with pytest.raises(RuntimeError, match=r"told from those beyond the rank.*choose a rank at a gap"):
        (low_rank_part(deficient, 4) * target).sum().backward()
    deficient.grad = None
    (low_rank_part(deficient, 6) * target).sum().backward()  # the whole matrix
    assert torch.equal(deficient.grad, target)


def test_a_matrix_that_is_not_finite_leaves_the_others_their_gradient():
    a, target = random(3, 9, 7), random(3, 9, 2, seed=1)
    alone = a[0].clone().requires_grad_()
    (batched_rsvd(alone, 2).U * target[0]).sum().backward()
    a[1, 4, 4] = torch.nan
    a.requires_grad_()
    (batched_rsvd(a, 2).U * target).sum().backward()
    torch.testing.assert_close(a.grad[0], alone.grad)
    assert a.grad[1].isnan().all() and a.grad[2].isfinite().all()


@pytest.mark.parametrize("shape", [(4, 5), (5, 0), (2, 0, 5)])
def test_no_triplets_have_a_gradient_of_zero(shape):
    a = random(*shape).requires_grad_()
    svd = batched_rsvd(a, 0)
    (svd.U.sum() + svd.S.sum() + svd.Vh.sum()).backward()
    assert torch.equal(a.grad, torch.zeros(shape, dtype=a.dtype))


def test_no_gradient_wanted_none_recorded():
    a = random(6, 5).requires_grad_()
    with torch.no_grad():
        assert not batched_rsvd(a, 2).U.requires_grad
    assert not batched_rsvd(a, 2).residual_norm.requires_grad


DECOMPOSITIONS = [
    lambda a, base=None: batched_rsvd(a, 2, base=base).S,
    lambda a, base=None: low_rank_part(a, 2, base=base),
]
either = pytest.mark.parametrize("of", DECOMPOSITIONS, ids=["singular values", "low-rank part"])


@either
def test_a_second_derivative_is_an_error_not_a_zero(of):
    a, factor = random(6, 5).requires_grad_(), torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    for leaf in (a, factor):
        loss = factor * (of(a).pow(3).sum() + a.square().sum())
        (slope,) = torch.autograd.grad(loss, a, create_graph=True)
        with pytest.raises(RuntimeError, match="differentiable once"):
            torch.autograd.grad(slope.square().sum(), leaf)


@pytest.mark.filterwarnings("ignore:`torch.jit.script`")
@either
def test_forward_mode_is_refused(of):
    a = random(6, 5)
    for function in (of, lambda base: of(a, base)):
        with pytest.raises(RuntimeError, match="jvp"):
            torch.func.jvp(function, (a + 1,), (a,))
        with pytest.raises(RuntimeError, match="jvp"), torch.autograd.forward_ad.dual_level():
            function(torch.autograd.forward_ad.make_dual(a + 1, a))


@either
def test_activation_checkpoints(of):
    a = random(6, 5).requires_grad_()
    (expected,) = torch.autograd.grad(of(a * 2).pow(3).sum(), a)
    checkpoint(lambda a: of(a * 2).pow(3).sum(), a, use_reentrant=False).backward()
    torch.testing.assert_close(a.grad, expected)


@either
def test_a_base_made_in_inference_mode_is_a_constant(of):
    a, base = random(6, 5).requires_grad_(), random(6, 5, seed=1)
    with torch.inference_mode():
        made = base.clone()
    found = [torch.autograd.grad(of(a, each).pow(3).sum(), a)[0] for each in (base, made)]
    assert torch.equal(*found)


def gradient_of_the_full_svd(a, function):
    x = a.double().clone().requires_grad_()
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    return torch.autograd.grad(function(u, s, vh), x)[0]


def error(found, exact):
    return ((found.double() - exact).norm() / exact.norm()).item()


SLOW = {
    "noise": lambda: random(300, 256).float(),
    "slow": lambda: with_spectrum(300, 256, torch.arange(1, 257, dtype=torch.float64) ** -0.3).float(),
}


@pytest.mark.parametrize("kind", SLOW)
@pytest.mark.parametrize("transpose", [False, True])
def test_low_rank_part_of_a_slow_spectrum(kind, transpose):
    """What its forward pass found is far from the triplets, and backward divides by the gap between them."""
    a, k = (SLOW[kind]().mT if transpose else SLOW[kind]()), 16
    target = random(*a.shape, seed=1)
    x = a.clone().requires_grad_()
    (low_rank_part(x, k, route="subspace") * target.float()).sum().backward()
    exact = gradient_of_the_full_svd(a, lambda u, s, vh: ((u[:, :k] * s[:k]) @ vh[:k] * target).sum())
    assert error(x.grad, exact) < 1e-3


def test_a_batch_of_which_some_have_slow_spectra():
    easy = with_spectrum(300, 256, torch.exp(-torch.arange(256) / 2.0).double()).float()
    batch, target = torch.stack([easy, SLOW["noise"](), easy]), random(3, 300, 256, seed=1).float()
    grads = []
    for x, t in ((batch, target), *((batch[i : i + 1], target[i : i + 1]) for i in range(3))):
        x = x.clone().requires_grad_()
        (low_rank_part(x, 16, route="subspace") * t).sum().backward()
        grads.append(x.grad)
    assert torch.equal(grads[0], torch.cat(grads[1:]))


def test_vectors_of_a_slow_spectrum():
    """The loss is of the vectors that forward found; backward's are others, and what comes for the former is turned."""
    a, k = SLOW["slow"](), 8
    near = torch.linalg.qr(torch.linalg.svd(a)[0][:, :k] + 0.02 * random(300, k).float())[0]
    exact = gradient_of_the_full_svd(a, lambda u, s, vh: subspace_overlap(u[:, :k], near.double()))
    errors = []
    for options in ({}, {"tol": 1e-3}):
        x = a.clone().requires_grad_()
        svd = batched_rsvd(x, k, route="subspace", **options)
        subspace_overlap(svd.U, near).backward()
        errors.append(error(x.grad, exact))
    assert errors[0] < 0.2 and errors[1] < 1e-2


def test_only_what_the_loss_uses_has_to_be_told_apart(monkeypatch):
    """σ_8 and σ_9 are equal; the loss is of the first vector."""
    sigma = torch.cat([torch.tensor([10.0, 5.0]), torch.full((30,), 1.0), 0.9 ** torch.arange(1, 225)]).double()
    a, target = with_spectrum(300, 256, sigma).float(), random(300, seed=2)
    x = a.clone().requires_grad_()
    svd = batched_rsvd(x, 8, route="subspace", power_iters=1)
    monkeypatch.setattr(autograd, "_factored_anew", lambda *_: pytest.fail("factored anew"))
    ((svd.U[:, 0] @ target.float()) ** 2).backward()
    exact = gradient_of_the_full_svd(a, lambda u, s, vh: (u[:, 0] @ target) ** 2)
    assert error(x.grad, exact) < 1e-2


def test_low_rank_part_of_rank_zero_is_a_constant():
    for shape in ((6, 5), (2, 5, 6), (0, 4, 3)):
        x = random(*shape).requires_grad_()
        low_rank_part(x, 0).sum().backward()
        assert x.grad.shape == shape and not x.grad.any()


def test_autocast_changes_no_helper():
    a = random(60, 40).float()
    svd, near = batched_rsvd(a, 8), batched_rsvd(a + 1e-3 * random(60, 40, seed=1).float(), 8)
    leaf = a.clone().requires_grad_()
    functions = (
        lambda: subspace_overlap(svd.U, near.U),
        lambda: subspace_alignment(svd.U, near.U, 4),
        lambda: principal_cosines(svd.U, near.U),
        lambda: reconstruct(svd),
        lambda: low_rank_update(leaf, svd),
    )
    for function in functions:
        outside = function()
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(function(), outside)


def test_signs_towards_what_was_made_in_inference_mode():
    a = random(30, 20)
    with torch.inference_mode():
        previous = batched_rsvd(-a, 4)
    x = a.clone().requires_grad_()
    svd = batched_rsvd(x, 4, align_to=previous)
    assert (svd.U.detach() * previous.U).sum(0).min() > 0.9
    svd.U.square().sum().backward()


@pytest.mark.parametrize("function", [lambda a: batched_rsvd(a, 2).S, lambda a: low_rank_part(a, 2)])
def test_transforms_of_torch_func_are_refused(function):
    for transformed in (torch.func.grad(lambda a: function(a).sum()), torch.func.vmap(function)):
        with pytest.raises(RuntimeError, match=r"no rules for the transforms of torch\.func"):
            transformed(random(3, 6, 5))


def decaying(*sigma, m=300, n=256):
    """With these leading singular values, and a slow tail."""
    tail = 0.9 * min(sigma) * torch.arange(1, n + 1 - len(sigma), dtype=torch.float64) ** -0.3
    return with_spectrum(m, n, torch.cat([torch.tensor(sigma, dtype=torch.float64), tail])).float()


def test_matrices_that_need_no_other_triplets_keep_their_gradient():
    """To the last bit, whatever else is in the batch, not finite matrices included."""
    easy = with_spectrum(300, 256, torch.exp(-torch.arange(256) / 2.0).double()).float()
    w = random(300, 16, seed=3).float()

    def grad(*matrices):
        batch = torch.stack(matrices).requires_grad_()
        (batched_rsvd(batch, 16, route="subspace").U * w).sum().backward()
        return batch.grad[0]

    alone = grad(easy)
    assert torch.equal(alone, grad(easy, SLOW["slow"]())) and torch.equal(
        alone, grad(easy, torch.full_like(easy, torch.nan))
    )
    batch = torch.stack([SLOW["slow"](), torch.full_like(easy, torch.nan)]).requires_grad_()
    low_rank_part(batch, 16, route="subspace")[0].square().sum().backward()
    assert batch.grad[0].isfinite().all()


def test_a_matrix_that_the_loss_does_not_use_is_not_factored_anew(monkeypatch):
    monkeypatch.setattr(autograd, "_factored_anew", lambda *_: pytest.fail("factored anew"))
    easy = with_spectrum(300, 256, torch.exp(-torch.arange(256) / 2.0).double()).float()
    batch = torch.stack([easy, SLOW["noise"]()]).requires_grad_()
    low_rank_part(batch, 16, route="subspace")[0].square().sum().backward()
    assert not batch.grad[1].any()


@pytest.mark.parametrize("oversample", [0, 1, None])
def test_what_is_beyond_the_rank_is_found_whatever_the_sketch(oversample):
    sigma = torch.cat([torch.linspace(2, 1.04, 8), torch.linspace(1, 0.2, 248)]).double()
    a, target = with_spectrum(300, 256, sigma).float(), random(300, 256, seed=1)
    x = a.clone().requires_grad_()
    (low_rank_part(x, 8, route="subspace", oversample=oversample, tol=9e-3) * target.float()).sum().backward()
    exact = gradient_of_the_full_svd(a, lambda u, s, vh: ((u[:, :8] * s[:8]) @ vh[:8] * target).sum())
    assert error(x.grad, exact) < 5e-3


def test_incoming_gradients_are_turned_to_the_triplets_that_they_meet():
    """In a cluster the vectors of one decomposition are not those of another; the complement's part follows."""
    a, k = decaying(1.0, 1.0, 1.0, 1.0), 4
    near = torch.linalg.qr(torch.linalg.svd(a)[0][:, :k] + 0.05 * random(300, k).float())[0]
    exact = gradient_of_the_full_svd(a, lambda u, s, vh: subspace_overlap(u[:, :k], near.double()))
    x = a.clone().requires_grad_()
    subspace_overlap(batched_rsvd(x, k, route="subspace", power_iters=1).U, near).backward()
    assert error(x.grad, exact) < 0.05


def test_a_pair_of_a_slow_spectrum():
    a, base, target = SLOW["slow"](), random(300, 256, seed=5).float(), random(300, 256, seed=1)
    x, y = (a + base).requires_grad_(), base.clone().requires_grad_()
    (low_rank_part(x, 16, base=y, route="subspace") * target.float()).sum().backward()
    exact = gradient_of_the_full_svd(
        (a + base).double() - base, lambda u, s, vh: ((u[:, :16] * s[:16]) @ vh[:16] * target).sum()
    )
    assert error(x.grad, exact) < 1e-2 and torch.equal(y.grad, -x.grad)


def test_triplets_that_cannot_be_told_from_the_rest_are_an_error(monkeypatch):
    monkeypatch.setattr(autograd, "FULL_SIDE", 100)
    monkeypatch.setattr(autograd, "CLOSER", 0.5)
    x = SLOW["noise"]().requires_grad_()
    with pytest.raises(RuntimeError, match=r"16 leading triplets of matrix 0 .* route='exact'"):
        low_rank_part(x, 16, route="subspace").square().sum().backward()


@pytest.mark.parametrize("seed", range(5))
def test_vectors_of_the_whole_short_side(seed):
    """Nothing is beyond the rank, and nothing outside of V to solve for: what is left there is rounding."""
    a, near = random(40, 8, seed=seed).float(), torch.linalg.qr(random(40, 8, seed=9))[0]
    exact = gradient_of_the_full_svd(a, lambda u, s, vh: subspace_overlap(u, near))
    x = a.clone().requires_grad_()
    subspace_overlap(batched_rsvd(x, 8).U, near.float()).backward()
    assert error(x.grad, exact) < 1e-4
