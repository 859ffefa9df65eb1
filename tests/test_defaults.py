"""Whatever the caller's default dtype and device are, results are the same bits: kernels get addresses, and a buffer of
another dtype or without memory behind them would be written over its end.
"""

import pytest
import torch
from torch import nn

from effopd_kernels import (
    EffOPDController,
    batched_rsvd,
    extrapolate,
    extrapolate_,
    linear_reverse_kl_loss,
    low_rank_update,
    reverse_kl_loss,
    spectral_metrics,
    subspace_alignment,
    update_svd,
)
from effopd_kernels.divergence import sampled_kl, topk_divergence_loss

GENERATOR = torch.Generator().manual_seed(0)
S, T = (torch.randn(6, 301, generator=GENERATOR) for _ in range(2))
H, HEAD = torch.randn(6, 32, generator=GENERATOR), torch.randn(301, 32, generator=GENERATOR)
BIG, SMALL = torch.randn(700, 600, generator=GENERATOR), torch.randn(90, 40, generator=GENERATOR)


def logits():
    s = S.clone().requires_grad_()
    loss, stats = reverse_kl_loss(s, T, num_tokens=1001.0, return_stats=True)
    loss.backward()
    return loss, s.grad, *stats


def hidden():
    h, w = H.clone().requires_grad_(), HEAD.clone().requires_grad_()
    loss = linear_reverse_kl_loss(h, w, H * 1.1, HEAD, mask=torch.arange(6, device="cpu") < 5)
    loss.backward()
    return loss, h.grad, w.grad


def partial():
    values, ids = T.log_softmax(-1).topk(9)
    rows = S.log_softmax(-1)[:, 0], T.log_softmax(-1)[:, 0]
    return topk_divergence_loss(S, values, ids), sampled_kl(*rows, estimator="k3")


def in_place():
    lists = [[BIG.clone(), SMALL.mT.clone().mT], [BIG * 0.5, SMALL * 0.5], [BIG, SMALL]]
    found = extrapolate_(*lists, 2.0)
    mixed = extrapolate_(lists[0], lists[1], lists[2], [1.5, 2.5], masters=[None, SMALL.clone()])
    return *lists[0], *found, *mixed, extrapolate(SMALL, SMALL * 2, 3.0)


def factors():
    svd, own = batched_rsvd(BIG, 40), batched_rsvd(SMALL, 5, base=SMALL * 0.5, route="subspace")
    one = update_svd({"w": BIG}, {"w": SMALL.new_zeros(700, 600)}, 4)["w"]
    return *svd, *own, *one, low_rank_update(BIG, svd), subspace_alignment(svd.U, svd.U + 0.1, 4)


def spectra():
    sampled = spectral_metrics(BIG, method="slq")
    return *spectral_metrics(BIG, base=BIG * 0.5)[:-1], *sampled[:-1], *sampled.standard_error.values()


def controller(place, folder):
    model = nn.ModuleDict({"mlp": nn.Linear(8, 8, bias=False, dtype=torch.float32, device="cpu")})
    weight = model["mlp"].weight
    with torch.no_grad():
        weight.copy_(SMALL[:8, :8])
        run = EffOPDController(
            model, lambda: [-float((weight.detach() - 3).abs().sum())], anchor_device=place, anchor_dir=folder
        )
        weight += 0.1
    event = run.step(1)
    run.save(folder)
    run.load(folder)
    return weight.detach().clone(), torch.tensor([event.alpha], dtype=torch.float64, device="cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("what", [logits, hidden, partial, in_place, factors, spectra, "host", "disk"])
def test_results_do_not_depend_on_them(what, dtype, tmp_path):
    function = (lambda: controller(what, tmp_path / "controller")) if isinstance(what, str) else what
    want = function()
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        with torch.device("meta"):
            found = function()
    finally:
        torch.set_default_dtype(before)
    assert len(found) == len(want)
    for a, b in zip(found, want, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)
