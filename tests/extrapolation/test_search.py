"""search="gradient": the slope is the slope, the minimum is found, and nothing worse than W_t is ever kept."""

import math
import random
import re
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from effopd_kernels.extrapolation import EffOPDController, Losses, Scores
from effopd_kernels.extrapolation.search import Point, gradients_aside, line_minimum


def parabola(minimum, curvature=1.0):
    return lambda a: Point(a, 0.5 * curvature * (a - minimum) ** 2, curvature * (a - minimum))


def best(points):
    return min(points, key=lambda p: p.loss).alpha


@pytest.mark.parametrize("minimum", [1.5, 3.0, 4.2, 7.0, 10.9])
def test_parabola_is_found_in_a_handful_of_passes(minimum):
    points = line_minimum(parabola(minimum), 11.0)
    assert best(points) == pytest.approx(minimum, abs=0.25 * (minimum - 1)) and len(points) <= 5


@pytest.mark.parametrize("minimum, alpha", [(0.5, 1.0), (1.0, 1.0), (25.0, 11.0)])
def test_ends_of_the_line(minimum, alpha):
    points = line_minimum(parabola(minimum), 11.0)
    assert best(points) == alpha and len(points) <= 4


@pytest.mark.parametrize(
    "loss, slope",
    [
        (lambda a: math.exp(-a) + 0.01 * a, lambda a: -math.exp(-a) + 0.01),
        (lambda a: math.cosh(a - 4), lambda a: math.sinh(a - 4)),
        (lambda a: math.sqrt(1 + (a - 6) ** 2), lambda a: (a - 6) / math.sqrt(1 + (a - 6) ** 2)),
        (lambda a: -a if a < 5 else math.nan, lambda a: -1.0 if a < 5 else math.nan),
        (lambda a: -a if a < 5 else math.inf, lambda a: -1.0 if a < 5 else 1.0),
    ],
)
@pytest.mark.parametrize("passes", [2, 6])
def test_hard_lines_never_end_worse_than_they_began(loss, slope, passes):
    points = line_minimum(lambda a: Point(a, loss(a), slope(a)), 11.0, max_passes=passes)
    assert len(points) <= passes and all(1.0 <= p.alpha <= 11.0 for p in points)
    finite = [p for p in points if math.isfinite(p.loss)]
    assert min(p.loss for p in finite) < loss(1.0)


@pytest.mark.parametrize(
    "loss, alpha",
    [
        (lambda a: 1 - torch.exp(-((a - 1.6) ** 2) / 0.3), 1.6),  # flat beyond its minimum
        (lambda a: torch.where(a < 2, -0.1 * a, 1000 - 0.2 * a), 1.875),  # falling on, above a cliff
        (lambda a: torch.sin(3 * a), math.pi / 2),  # falling into a second valley
    ],
    ids=["flat", "cliff", "valleys"],
)
def test_a_higher_loss_is_beyond_the_minimum_whatever_its_slope(loss, alpha):
    def evaluate(a):
        at = torch.tensor(a, dtype=torch.float64, requires_grad=True)
        value = loss(at)
        return Point(a, value.item(), torch.autograd.grad(value, at)[0].item())

    points = line_minimum(evaluate, 64.0)
    assert best(points) == pytest.approx(alpha, abs=0.02) and len(points) <= 6


def test_the_search_of_a_saturated_student_ends_near_the_teacher():
    """Reverse KL is flat where the student is certain: at α = 3 it is above that of α = 1, and hardly falls."""
    teacher = torch.tensor([2.0, 0.0, -1.0], dtype=torch.float64).log_softmax(-1)
    start = torch.tensor([-3.0, 0.5, 0.0], dtype=torch.float64)
    update = torch.tensor([3.6, -1.0, -0.9], dtype=torch.float64)

    def evaluate(a):
        at = torch.tensor(a, dtype=torch.float64, requires_grad=True)
        student = (start + at * update).log_softmax(-1)
        loss = (student.exp() * (student - teacher)).sum()
        return Point(a, loss.item(), torch.autograd.grad(loss, at)[0].item())

    points = line_minimum(evaluate, 11.0)
    assert points[1].loss > points[0].loss and best(points) == pytest.approx(1.25, abs=0.15)


@pytest.mark.parametrize(
    "edge, below, beyond, alphas",
    [
        (3, -1.0, (-3, 1000.0), [1.0, 3.0, 1.2, 1.38]),
        (3, -1000.0, (-3, 101.0), [1.0, 3.0, 2.8, 2.98]),
        (5, -1.0, (-5, math.nan), [1.0, 3.0, 9.0, 6.0, 4.5]),
        (5, -1.0, (math.nan, -1.0), [1.0, 3.0, 9.0, 6.0, 4.5]),
    ],
    ids=["near", "far", "no slope", "no loss"],
)
def test_secants_keep_away_from_the_ends_of_a_bracket(edge, below, beyond, alphas):
    """The search would creep away from one end, were the slope at the other much steeper. Where that has none, or no
    loss, the bracket is halved."""

    def evaluate(a):
        return Point(a, -a, below) if a < edge else Point(a, *beyond)

    points = line_minimum(evaluate, 11.0, max_passes=len(alphas))
    assert [p.alpha for p in points] == pytest.approx(alphas)


def world():
    """A quadratic loss whose minimum is along the first update, at α = 6 of it."""
    torch.manual_seed(0)
    net = torch.nn.ModuleDict({"mlp": torch.nn.Linear(4, 3), "norm": torch.nn.LayerNorm(4)})
    start = net["mlp"].weight.detach().clone()
    target = start + torch.randn_like(start)

    def loss():
        return 0.5 * (net["mlp"].weight - target).square().sum()

    def train():
        with torch.no_grad():
            net["mlp"].weight.add_((target - start) / 6)

    return net, start, target, loss, train


def test_alpha_is_the_minimum_along_the_line_and_gradients_are_as_they_were():
    net, _, target, loss, train = world()
    controller = EffOPDController(net, lambda: -loss().item(), search="gradient", loss_fn=loss)
    train()
    kept = torch.randn_like(net["mlp"].weight)
    net["mlp"].weight.grad = kept
    event = controller.step(1)
    assert event.alpha == pytest.approx(6.0, rel=1e-4) and event.num_candidates == 1 and event.num_gradients <= 4
    torch.testing.assert_close(net["mlp"].weight.detach(), target)
    assert net["mlp"].weight.grad is kept


@pytest.mark.parametrize("named", [False, True])
def test_no_parameter_keeps_a_gradient_of_the_validation_loss(named):
    """Moved or not, and though loss_fn itself enables gradients: the next step would train on the validation set."""
    net, _, _, loss, train = world()
    kept = net["norm"].bias.grad = torch.ones(4)

    @torch.enable_grad()
    def whole():
        return loss() + sum(p.square().sum() for p in net["norm"].parameters())

    controller = EffOPDController(net.named_parameters() if named else net, None, search="gradient", loss_fn=whole)
    train()
    assert controller.step(1).alpha > 1
    assert [n for n, p in net.named_parameters() if p.grad is not None] == ["norm.bias"]
    assert net["norm"].bias.grad is kept and torch.equal(kept, torch.ones(4))


@pytest.mark.parametrize(
    "wrong, error, words",
    [
        (lambda loss: loss.detach(), ValueError, "without a gradient"),
        (lambda loss: loss * torch.ones(3), TypeError, r"a tensor of shape \(3,\)"),
        (lambda loss: [1.0], TypeError, "got float"),
        (lambda loss: loss.item(), TypeError, "got float"),
        (lambda loss: None, TypeError, "got NoneType"),
    ],
)
def test_what_loss_fn_must_not_return(wrong, error, words):
    net, _, _, loss, train = world()
    controller = EffOPDController(net, None, search="gradient", loss_fn=lambda: wrong(loss()))
    train()
    with pytest.raises(error, match=f"loss_fn .*{words}"):
        controller.step(1)


def test_slope_is_the_derivative_along_the_line():
    net, start, _, loss, train = world()
    controller = EffOPDController(net, lambda: 0.0, search="gradient", loss_fn=loss)
    train()
    weights = controller.weights
    weights.hold()
    current = net["mlp"].weight.detach().clone()
    for alpha in (1.0, 2.5, 8.0):
        weights.write_for_slope(alpha)
        net.zero_grad()
        loss().backward()
        a = torch.tensor(alpha, requires_grad=True)
        moved = start + a * (current - start)
        target = world()[2]
        (expected,) = torch.autograd.grad(0.5 * (moved - target).square().sum(), a)
        assert weights.slope(1) == pytest.approx(expected.item(), rel=1e-4)
    weights.restore()
    assert torch.equal(net["mlp"].weight, current)


def test_micro_batches_average_and_their_tokens_count():
    def halves():
        yield 0.5 * loss()
        yield 1.5 * loss()

    for losses, tokens in ((halves, 0), (lambda: Losses(halves(), tokens=7), 7)):
        net, _, _, loss, train = world()
        controller = EffOPDController(net, None, search="gradient", loss_fn=losses)
        train()
        before = loss().item()
        event = controller.step(1)
        assert event.alpha == pytest.approx(6.0, rel=1e-4) and event.score_initial == pytest.approx(-before)
        assert event.val_tokens == tokens * (event.num_gradients + 2)  # and W_t and the minimum as scores


def test_without_score_fn_the_loss_is_the_score():
    net, _, _, loss, train = world()
    controller = EffOPDController(net, None, search="gradient", loss_fn=loss)
    train()
    before = loss().item()
    event = controller.step(1)
    assert event.score_initial == pytest.approx(-before) and event.score_best > event.score_initial


@pytest.mark.parametrize("around", [nullcontext, torch.no_grad])
def test_points_have_equal_random_numbers_and_gradients_and_scores_no_graph(around):
    net, _, _, loss, train = world()
    draws, graphs = [], []

    def drawing():
        draws.append(random.random())
        graphs.append(torch.is_grad_enabled())
        return loss()

    controller = EffOPDController(net, None, search="gradient", loss_fn=drawing)
    train()
    with around():
        event = controller.step(1)
    assert event.alpha > 1 and len(set(draws)) == 1
    assert graphs == [True] * event.num_gradients + [False] * 2


def test_a_minimum_of_the_loss_that_scores_worse_is_not_kept():
    net, _, _, loss, train = world()
    scores = iter([0.5, 0.4])
    controller = EffOPDController(net, lambda: next(scores), search="gradient", loss_fn=loss)
    train()
    current = net["mlp"].weight.detach().clone()
    event = controller.step(1)
    assert event.alpha == 1.0 and event.num_candidates == 1
    assert torch.equal(net["mlp"].weight, current)


@pytest.mark.parametrize(
    "of, options, passes, words",
    [
        (lambda loss: math.nan * loss, {}, 1, "not finite at the current weights"),
        (lambda loss: math.inf + loss, {}, 1, "not finite at the current weights"),  # of a finite slope
        (lambda loss: -loss, {}, 1, "does not fall beyond the current weights"),
        (lambda loss: loss, dict(alphas=(64,), max_gradients=2), 2, "no lower loss was found .*, in 2 gradients"),
        (lambda loss: loss, dict(max_val_tokens=4), 2, "max_val_tokens is spent"),
    ],
)
def test_why_an_event_was_skipped(of, options, passes, words):
    net, _, _, loss, train = world()

    def costly():
        return Losses(of(loss()), tokens=2)

    controller = EffOPDController(net, lambda: pytest.fail("scored"), search="gradient", loss_fn=costly, **options)
    train()
    current = net["mlp"].weight.detach().clone()
    event = controller.step(1)
    assert re.search(words, event.skipped) and (event.num_gradients, event.val_tokens) == (passes, 2 * passes)
    assert torch.equal(net["mlp"].weight, current)


def test_alphas_below_one_do_not_lead_the_search_backwards():
    net, _, _, loss, train = world()
    controller = EffOPDController(net, None, search="gradient", loss_fn=loss, alphas=(-1, 0.5, 11))
    train()
    seen, write = [], controller.weights.write_for_slope
    controller.weights.write_for_slope = lambda alpha: (seen.append(alpha), write(alpha))
    assert controller.step(1).alpha == pytest.approx(6.0, rel=1e-4) and min(seen) == 1.0


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_an_exception_in_the_loss_restores_weights_and_gradients(failing):
    net, _, _, loss, train = world()
    calls = []

    def broken():
        calls.append(1)
        if len(calls) > failing:
            raise RuntimeError("out of memory")
        return loss()

    controller = EffOPDController(net, lambda: 0.0, search="gradient", loss_fn=broken)
    train()
    current = net["mlp"].weight.detach().clone()
    with pytest.raises(RuntimeError, match="out of memory"):
        controller.step(1)
    assert torch.equal(net["mlp"].weight, current) and net["mlp"].weight.grad is None


def test_an_optimizer_that_steps_in_backward_is_refused():
    """It would train on the validation batch. Hooks that reduce gradients, as DDP's when compiled, may run."""
    net, _, _, loss, train = world()
    controller = EffOPDController(net, None, search="gradient", loss_fn=loss)
    train()

    def reduce(param, index):
        assert param.grad is not None

    reduce.__module__ = "torch.nn.parallel.distributed"
    net["mlp"].weight.register_post_accumulate_grad_hook(partial(reduce, index=0))
    assert controller.step(1).alpha > 1
    net["norm"].bias.register_post_accumulate_grad_hook(lambda p: p.data.sub_(p.grad))
    train()
    with pytest.raises(ValueError, match="a hook of a parameter would run"):
        controller.step(2)
    with pytest.raises(ValueError, match="a hook of a parameter would run"):
        EffOPDController(net, None, search="gradient", loss_fn=loss)
    EffOPDController(net, lambda: 0.0)
    net = world()[0]
    net["norm"].bias._in_backward_optimizers = []  # as PyTorch's _apply_optimizer_in_backward marks them
    with pytest.raises(ValueError, match=r"may train \(an optimizer in backward\)"):
        EffOPDController(net, None, search="gradient", loss_fn=loss)


def test_options():
    net, _, _, loss, _ = world()
    for options in (dict(search="gradient"), dict(search="newton"), dict(search="gradient", loss_fn=list)):
        with pytest.raises(ValueError, match=r"search|no loss"):
            controller = EffOPDController(net, lambda: 0.0, **options)
            with torch.no_grad():
                net["mlp"].weight.add_(1.0)
            controller.step(1)
    with pytest.raises(ValueError, match="needs score_fn"):
        EffOPDController(net, None)
    controller = EffOPDController({"mlp.weight": torch.zeros(2)}, None, search="gradient", loss_fn=loss)
    controller.weights.tensors[0].add_(1.0)
    with pytest.raises(ValueError, match="requires_grad"):
        controller.step(1)


@pytest.mark.parametrize("limit", [150, 340, 350, 650])
@pytest.mark.parametrize("scored", [False, True])
def test_the_budget_is_kept_by_searches_that_find_no_jump(limit, scored):
    """After the first evaluation, whose cost nobody knows; the loss costs 100, and is the score or beside one of 30."""
    net, draw = torch.nn.ModuleDict({"mlp": torch.nn.Linear(3, 2)}), random.Random(limit)

    def score():
        return Scores((draw.random(),), tokens=30)

    def loss():
        return Losses(net["mlp"].weight.sum() * (draw.random() - 0.6), 100)

    options = dict(search="gradient", loss_fn=loss, schedule=1, max_val_tokens=limit)
    controller = EffOPDController(net, score if scored else None, **options)
    for step in range(1, 30):
        with torch.no_grad():
            net["mlp"].weight.add_(0.1)
        controller.step(step)
    assert controller.val_tokens <= max(limit, 100)


def test_a_slope_needs_no_temporary_of_the_size_of_the_weights(monkeypatch):
    net, start, target, loss, train = world()
    controller = EffOPDController(net, None, search="gradient", loss_fn=loss)
    train()
    weights = controller.weights
    weights.hold()
    loss().backward()
    expected = ((net["mlp"].weight - target) * (net["mlp"].weight - start)).sum().item()
    sizes = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and not func.is_view:
                sizes.append(out.numel())
            return out

    monkeypatch.setattr("effopd_kernels.extrapolation.dense.BLOCK", 4)
    with Sizes():
        assert weights.slope(1) == pytest.approx(expected, rel=1e-5)
    assert max(sizes) == 4


def test_the_budget_counts_points_of_the_line():
    net = torch.nn.ModuleDict({"mlp": torch.nn.Linear(3, 2)})
    controller = EffOPDController(
        net, lambda: Scores((1.0,), tokens=5), search="gradient", max_val_tokens=7,
        loss_fn=lambda: Losses(net["mlp"].weight.square().sum(), 5),
    )  # fmt: skip
    with torch.no_grad():
        net["mlp"].weight.mul_(0.9)
    event = controller.step(1)
    assert (event.val_tokens, event.num_gradients) == (5, 1) and event.skipped == "max_val_tokens is spent"


def test_a_score_costs_what_the_last_one_did():
    """The third event could afford W_t and a candidate as the second began, not two scores like its last."""
    net, _, _, loss, train = world()
    costs = iter([10, 10, 20, 60])
    controller = EffOPDController(
        net, lambda: Scores((0.0,), next(costs)), search="gradient", loss_fn=loss, schedule=1, max_val_tokens=190
    )
    for step in 1, 2, 3:
        train()
        event = controller.step(step)
    assert event.num_gradients > 1 and event.skipped == "max_val_tokens is spent" and controller.val_tokens == 100


def test_gradients_in_the_buckets_of_ddp_come_back(tmp_path):
    """Where later backward passes write, too."""
    if not torch.distributed.is_available():
        pytest.skip("no torch.distributed")
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:

        class Net(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.mlp = torch.nn.Linear(4, 4)

            def forward(self, x):
                return self.mlp(x)

        net = torch.nn.parallel.DistributedDataParallel(Net(), gradient_as_bucket_view=True)
        batch, held_out = torch.randn(8, 4), torch.randn(8, 4)

        def loss(x):
            return (net(x) - x).square().mean()

        controller = EffOPDController(
            net, None, loss_fn=lambda: loss(held_out), search="gradient", alphas=(3, 9), schedule=[1]
        )
        for _ in range(2):  # after the first backward pass DDP makes its buckets anew
            loss(batch).backward()
            torch.optim.SGD(net.parameters(), 0.1).step()
        assert all(p.grad._is_view() for p in net.parameters())
        grads = [p.grad for p in net.parameters()]
        before = [g.clone() for g in grads]
        assert controller.step(1).num_gradients
        assert all(p.grad is g and torch.equal(g, b) for p, g, b in zip(net.parameters(), grads, before, strict=True))
    finally:
        torch.distributed.destroy_process_group()


def test_gradients_that_share_memory_come_back():
    shared, params = torch.zeros(4), [torch.nn.Parameter(torch.ones(2)) for _ in range(3)]
    params[0].grad, params[1].grad = shared[:2], shared[2:]
    params[2].grad = torch.ones(1).expand(2)
    with gradients_aside(params):
        shared.fill_(5.0)
        for p in params:
            p.grad = None
    assert not shared.any() and params[0].grad.data_ptr() == shared.data_ptr() and params[2].grad.sum() == 2
