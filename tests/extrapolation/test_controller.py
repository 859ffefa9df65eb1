"""The published rule against scripted scores, and what an event leaves behind however it ends."""

import json
import math
import random
import threading
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import partial

import numpy as np
import pytest
import torch

from effopd_kernels.extrapolation import EffOPDController, EffOPDEvent, Scores, extrapolate_
from effopd_kernels.extrapolation.distributed import RankFailed, Ranks
from effopd_kernels.extrapolation.records import Candidate


def model(dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    layers = {"self_attn": torch.nn.Linear(5, 4), "mlp": torch.nn.Linear(3, 2), "norm": torch.nn.LayerNorm(5)}
    return torch.nn.ModuleDict(layers).to(dtype)


def train(net, step=1):
    """Stands for an optimizer step: every parameter moves, and differently each time."""
    g = torch.Generator().manual_seed(step)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.01 * torch.randn(p.shape, generator=g).to(p.dtype))


def snapshot(net):
    return {name: p.detach().clone() for name, p in net.named_parameters()}


def same(net, weights):
    return all(torch.equal(p.view(torch.uint8), weights[n].view(torch.uint8)) for n, p in net.named_parameters())


def expected(anchor, current, alpha):
    moved = {n: w.clone() for n, w in current.items()}
    names = [n for n in current if not n.startswith("norm")]
    extrapolate_(*([x[n] for n in names] for x in (moved, anchor, current)), alpha)
    return moved


class Script:
    """A score_fn that plays a list back; an exception in the list is raised. Records the weights it was asked about."""

    def __init__(self, net, *scores):
        self.net, self.scores, self.seen = net, list(scores), []

    def __call__(self):
        self.seen.append(snapshot(self.net))
        score = self.scores.pop(0)
        if isinstance(score, BaseException):
            raise score
        return score


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "scores, alpha, tried",
    [
        ([0.5, 0.4], 1.0, 1),  # the first candidate is no better
        ([0.5, 0.5], 1.0, 1),  # strictly better is asked for
        ([0.5, 0.6, 0.6], 3.0, 2),
        ([0.5, 0.6, 0.7, 0.8, 0.75], 7.0, 4),
        ([0.1, 0.2, 0.3, 0.4, 0.5, 0.6], 11.0, 5),  # all five
        ([0.5, float("nan")], 1.0, 1),
        ([0.5, float("inf")], 1.0, 1),
    ],
)
def test_published_rule(dtype, scores, alpha, tried):
    net = model(dtype)
    script = Script(net, *scores)
    controller = EffOPDController(net, script)
    anchor = snapshot(net)
    train(net)
    current = snapshot(net)
    event = controller.step(1)
    assert (event.alpha, event.num_candidates, event.step) == (alpha, tried, 1)
    assert [c.accepted for c in event.candidates] == [a <= alpha for a in (3, 5, 7, 9, 11)][:tried]
    assert event.score_initial == scores[0] and event.score_best == scores[{1.0: 0, 3.0: 1, 7.0: 3, 11.0: 5}[alpha]]
    assert same(net, expected(anchor, current, alpha))
    for seen, a in zip(script.seen, (1, 3, 5, 7, 9, 11), strict=False):
        assert all(torch.equal(w, seen[n]) for n, w in expected(anchor, current, a).items())
    # The next event extrapolates from what was accepted.
    accepted = snapshot(net)
    train(net, 2)
    current = snapshot(net)
    script.scores = [1.0, 2.0, 0.0]
    assert controller.step(2).alpha == 3.0
    assert same(net, expected(accepted, current, 3.0))


def test_off_schedule_and_repeated_steps_do_nothing():
    net = model()
    controller = EffOPDController(net, Script(net, 1.0, 0.0, 1.0, 0.0))
    train(net)
    assert controller.step(3) is None and controller.step(0) is None
    assert controller.step(4) is not None
    assert controller.step(4) is None and controller.step(2) is None
    assert [e.step for e in controller.events] == [4]


@pytest.mark.parametrize(
    "schedule, steps",
    [("pow2", [1, 2, 4, 8, 16]), (5, [5, 10, 15]), ({3, 7}, [3, 7]), (np.array([2, 6]), [2, 6])],
    ids=str,
)
def test_schedules(schedule, steps):
    net = model()
    controller = EffOPDController(net, lambda: 0.0, schedule=schedule)
    for step in range(1, 18):
        train(net, step)
        controller.step(step)
    assert [e.step for e in controller.events] == steps


def test_the_adaptive_schedule_comes_back_soon_while_jumps_pay():
    """Jumps of α = 3 gain more steps than they took, of 1.5 fewer, none nothing; resuming does not change when."""
    net, jumps, scores = model(), {2: 3.0, 4: 1.5, 16: 3.0, 20: 3.0}, iter(())
    controller = EffOPDController(net, lambda: next(scores), schedule="adaptive")
    for step in range(1, 30):
        train(net, step)
        scores, controller.alphas = iter((0.0, float(step in jumps))), (jumps.get(step, 3.0),)
        controller.step(step)
        resumed = EffOPDController(net, controller.score_fn, schedule="adaptive")
        resumed.load_state_dict(controller.state_dict())
        controller = resumed
    assert [(e.step, e.alpha) for e in controller.events] == [
        (2, 3),
        (4, 1.5),
        (8, 1),
        (16, 3),
        (20, 3),
        (22, 1),
        (26, 1),
    ]


def test_named_tensors_in_any_form():
    """A generator too, which can be gone through once."""
    for params in (lambda n: n.named_parameters(), lambda n: list(n.named_parameters()), lambda n: snapshot(n)):
        net = model()
        controller = EffOPDController(params(net), lambda: 0.0)
        assert controller.weights.names == [n for n in snapshot(net) if not n.startswith("norm")]


def test_an_exception_leaves_the_weights_of_the_step_and_the_event_can_be_repeated():
    for failing in range(6):
        net = model()
        changes = []
        controller = EffOPDController(
            net, lambda: 0.0, on_weights_changed=lambda n=net, c=changes: c.append(snapshot(n))
        )
        anchor = snapshot(net)
        train(net)
        current = snapshot(net)
        scores = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
        controller.score_fn = Script(net, *scores[:failing], RuntimeError("score server lost"))
        before = random.getstate(), torch.get_rng_state()
        with pytest.raises(RuntimeError, match="score server lost"):
            controller.step(1)
        assert same(net, current) and controller.events == [] and controller.last_step == 0
        assert same(net, changes[-1])  # engines were told of the rollback
        assert random.getstate() == before[0] and torch.equal(torch.get_rng_state(), before[1])
        controller.score_fn = Script(net, *scores)
        assert controller.step(1).alpha == 11.0
        assert same(net, expected(anchor, current, 11.0))


def test_a_failing_hook_restores_and_does_not_hide_the_first_error():
    net = model()

    def hook():
        raise RuntimeError("engine gone")

    controller = EffOPDController(net, Script(net, 0.1, ValueError("never reached")), on_weights_changed=hook)
    train(net)
    current = snapshot(net)
    with pytest.raises(RuntimeError, match="engine gone"):
        controller.step(1)
    assert same(net, current)
    controller.score_fn = Script(net, ValueError("scoring"))
    with pytest.raises(ValueError, match="scoring") as raised:
        controller.step(1)
    assert str(raised.value.__context__) == "engine gone"  # in the traceback, both


def test_a_hook_that_fails_on_another_rank_takes_the_event_back_on_this_one():
    net = model()
    controller = EffOPDController(net, Script(net, 0.1, 0.2, 0.0), on_weights_changed=lambda: None)
    train(net)
    current, gather = snapshot(net), controller.ranks.gather

    def after_the_last_hook(value, error=None):
        if value is None:
            raise RankFailed("rank 1: engine gone")
        return gather(value, error)

    controller.ranks.gather = after_the_last_hook
    with pytest.raises(RankFailed, match="engine gone"):
        controller.step(1)
    assert same(net, current) and not controller.events


def test_no_hook_is_called_where_other_ranks_could_not_be_told():
    """It may communicate, and would wait for them for good."""
    net, calls = model(), []
    controller = EffOPDController(net, Script(net, OSError()), on_weights_changed=lambda: calls.append(1))
    train(net)
    controller.ranks.report = lambda error: False
    with pytest.raises(OSError):
        controller.step(1)
    assert not calls


def test_a_rank_that_failed_does_not_wait_for_the_others_for_good():
    ranks, together = Ranks(report_s=0.05), threading.Event()
    ranks.gather = lambda value, error: together.wait(5)
    assert not ranks.report(OSError())
    together.set()
    assert Ranks(report_s=math.inf).report(OSError())  # longer than a thread can wait


@pytest.mark.parametrize("last, changes", [(0.0, (3, 5, 3)), (0.3, (3, 5))], ids=["worse", "better"])
def test_hook_sees_every_change_and_the_end(last, changes):
    net = model()
    seen, script = [], Script(net, 0.1, 0.2, last)
    controller = EffOPDController(net, script, alphas=(3, 5), on_weights_changed=lambda: seen.append(snapshot(net)))
    anchor = snapshot(net)
    train(net)
    current = snapshot(net)
    controller.step(1)
    for weights, alpha in zip(seen, changes, strict=True):
        assert all(torch.equal(weights[n], w) for n, w in expected(anchor, current, alpha).items())


def test_every_candidate_is_scored_with_the_same_random_numbers_and_training_keeps_its_own():
    net = model()
    draws = []

    def score():
        draws.append(draw())
        return len(draws)

    def draw():
        return random.random(), torch.rand(1).item(), np.random.rand()

    def seed():
        for each in torch.manual_seed, random.seed, np.random.seed:
            each(5)

    controller = EffOPDController(net, score)
    train(net)
    seed()
    plain = draw()
    seed()
    controller.step(1)
    assert len(draws) == 6 and set(draws) == {plain}
    assert draw() == plain


@pytest.mark.parametrize("search", ["candidates", "gradient"])
def test_the_model_is_in_the_modes_that_training_left_it_in(search):
    net = model()
    net["norm"].eval()
    entered = []

    def score():
        entered.append(net.training)
        net.eval()
        if len(entered) == 3:
            raise OSError
        return len(entered)

    def loss():
        score()
        return -net["mlp"].weight.sum()

    controller = EffOPDController(net, score, search=search, loss_fn=loss)
    with torch.no_grad():
        net["mlp"].weight.add_(0.1)
    for error in OSError, None:
        with pytest.raises(error) if error else nullcontext():
            controller.step(1)
        assert net.training and net["mlp"].training and not net["norm"].training
    assert len(entered) > 3 and all(entered)


@pytest.mark.parametrize("search", ["candidates", "gradient"])
def test_an_event_inside_autocast_is_the_event_outside(search):
    """Autocast keeps its casts of parameters until the outermost region ends, with other weights in them since."""

    def run(around_step, around_loss):
        net, x = model(), torch.ones(4, 3)

        def loss():
            with around_loss():
                return (net["mlp"](x).float() - 9.0).square().mean()

        def score():
            with torch.set_grad_enabled(search == "candidates"):  # for then are casts kept
                return -loss().item()

        controller = EffOPDController(net, score, search=search, loss_fn=loss, schedule=1)
        losses = []
        for step in 1, 2:
            with around_step():
                net.zero_grad()
                losses.append(loss())
                losses[-1].backward()
                with torch.no_grad():
                    [p.sub_(0.01 * p.grad) for p in net["mlp"].parameters()]
                controller.step(step)
                losses.append(loss())
        events = [(e.alpha, e.score_initial, e.score_best, e.num_gradients) for e in controller.events]
        assert all(alpha > 1 for alpha, *_ in events)
        return events, torch.stack(losses).tolist()

    autocast = partial(torch.autocast, "cpu", torch.bfloat16)
    assert run(autocast, nullcontext) == run(nullcontext, autocast)


def test_tokens_seconds_and_budget():
    net = model()
    scores = [Scores([x], tokens=torch.tensor(100), seconds=np.float32(2.0)) for x in (1, 2, 3, 4, 5, 6)]
    controller = EffOPDController(net, Script(net, *scores), max_val_tokens=350)
    train(net)
    event = controller.step(1)
    assert (event.val_tokens, event.num_candidates, event.alpha) == (300, 2, 5.0)
    assert [c.seconds for c in event.candidates] == [2.0, 2.0]
    train(net, 2)
    skipped = controller.step(2)  # W_t could be scored, no candidate beside it
    assert skipped.skipped == "max_val_tokens is spent" and skipped.score_initial is None
    assert len(controller.score_fn.scores) == 3 and controller.val_tokens == 300
    json.dumps(controller.state_dict()["scalars"])


@pytest.mark.parametrize(
    "limit, costs",
    [
        (100, [100, 0, 0]),  # scoring W_t once is all it allows
        (199, [100, 0, 0]),
        (200, [200, 0, 0]),
        (399, [200, 0, 0]),
        (400, [200, 200, 0]),  # to the last token
        (10_000, [200, 200, 200]),
    ],
)
def test_the_budget_is_never_exceeded(limit, costs):
    """By a score that costs 100, in events whose first candidate is no better."""
    net = model()
    controller = EffOPDController(net, lambda: Scores([0.0], tokens=100), max_val_tokens=limit)
    for step in (1, 2, 4):
        train(net, step)
        controller.step(step)
    assert [e.val_tokens for e in controller.events] == costs
    assert all((e.skipped == "max_val_tokens is spent") == (e.val_tokens == 0) for e in controller.events)


def test_weights_that_did_not_move_are_not_scored():
    net = model()
    controller = EffOPDController(net, Script(net))
    event = controller.step(1)
    assert "not moved" in event.skipped and event.alpha == 1.0 and event.delta_norm == 0.0
    with torch.no_grad():
        net["mlp"].weight[0, 0] *= 1 + 2**-23  # to the next number
    event = controller.step(2)
    assert "not moved" in event.skipped and event.delta_norm > 0


def test_a_candidate_that_overflows_is_not_scored():
    net = model(torch.float16)
    controller = EffOPDController(net, Script(net, 0.1, 0.2, 0.3))
    with torch.no_grad():
        net["mlp"].bias.fill_(10_000.0)
    anchor, current = controller.state_dict()["anchor"], snapshot(net)
    anchor = current | {name: tensor.clone() for name, tensor in anchor.items()}
    event = controller.step(1)
    assert event.alpha == 5.0 and event.num_candidates == 2  # 7 · 10,000 is beyond fp16
    assert event.candidates[-1].score is None
    assert same(net, expected(anchor, current, 5.0))


def test_an_event_after_one_whose_candidate_overflowed_can_afford_w_t_and_a_candidate():
    net = model(torch.float16)
    controller = EffOPDController(net, lambda: Scores([0.0], tokens=100), alphas=(7,), max_val_tokens=250)
    with torch.no_grad():
        net["mlp"].bias.fill_(10_000.0)
    assert controller.step(1).val_tokens == 100 and not controller.events[0].num_candidates
    train(net)
    assert controller.step(2).skipped == "max_val_tokens is spent"


def test_weights_that_are_not_finite_are_left_alone():
    net = model()
    controller = EffOPDController(net, Script(net))
    with torch.no_grad():
        net["mlp"].bias.fill_(torch.nan)
    assert controller.step(1).skipped == "the weights are not finite"


def test_delta_norm_and_virtual_step():
    net = model()
    controller = EffOPDController(net, Script(net, 0.1, 0.2, 0.3, 0.0, 1.0, 0.0))
    anchor = snapshot(net)
    train(net)
    delta = [(p - anchor[n]).flatten().double() for n, p in snapshot(net).items() if not n.startswith("norm")]
    event = controller.step(1)
    assert event.delta_norm == pytest.approx(torch.cat(delta).norm().item(), rel=1e-5)
    assert event.virtual_step == 5.0  # one step, taken five times over
    train(net, 2)
    assert controller.step(4).virtual_step == 8.0  # three more, as they are
    assert controller.virtual_step(6) == 10.0


@pytest.mark.parametrize("accepted", [False, True])
def test_state_dict_resumes_step_for_step(accepted):
    def run(net, controller, steps):
        for step in steps:
            train(net, step)
            controller.step(step)

    score = {True: lambda n: lambda: n["mlp"].bias.sum().item(), False: lambda n: lambda: 0.0}[accepted]
    whole = model()
    run(whole, EffOPDController(whole, score(whole)), range(1, 20))
    first = model()
    before = EffOPDController(first, score(first))
    run(first, before, range(1, 7))
    second = model(seed=1)
    second.load_state_dict(first.state_dict())
    after = EffOPDController(second, score(second))
    after.load_state_dict(before.state_dict())
    assert after.events == before.events and isinstance(after.events[0], EffOPDEvent)
    run(second, after, range(7, 20))
    assert same(second, snapshot(whole))


def test_events_are_read_back_from_strict_json():
    scores = (math.nan, math.inf, -math.inf, -0.5, None)
    candidates = tuple(Candidate(3.0, score, False, 5, 0.1) for score in scores)
    event = EffOPDEvent(2, 1.0, -1.0, -1.0, 4, math.inf, 25, 0.5, 2.0, candidates)
    record = json.loads(json.dumps(event.to_dict(), allow_nan=False))
    back = EffOPDEvent.from_dict(record)
    assert math.isnan(back.candidates[0].score)
    whole = [replace(e, candidates=e.candidates[1:]) for e in (event, back)]  # NaN equals nothing
    assert whole[0] == whole[1] and back.to_dict() == event.to_dict()
    old = json.loads(json.dumps(asdict(event)))
    assert EffOPDEvent.from_dict(old).to_dict() == event.to_dict()
    del old["candidates"]
    assert EffOPDEvent.from_dict(old) == replace(event, candidates=())


@pytest.mark.parametrize("kind", ["EffOPDEvent", "Candidate"])
def test_a_record_of_other_fields_is_refused(kind):
    event = EffOPDEvent(2, 1.0, -1.0, -1.0, 1, 0.5, 5, 0.5, 2.0, (Candidate(3.0, -2.0, False, 5, 0.1),))
    record = event.to_dict()
    part = record if kind == "EffOPDEvent" else record["candidates"][0]
    for wrong in ({**part, "colour": "red"}, {name: value for name, value in part.items() if name != "alpha"}):
        part.clear(), part.update(wrong)
        with pytest.raises(ValueError, match=f"not the record of one {kind}: .*'(colour|alpha)'"):
            EffOPDEvent.from_dict(record)


def test_state_of_other_weights_is_refused():
    net = model()
    controller = EffOPDController(net, lambda: 0.0)
    state = controller.state_dict()
    short = {**state, "anchor": {k: v for k, v in state["anchor"].items() if "bias" in k}}
    with pytest.raises(ValueError, match=r"missing \['mlp\.weight'"):
        controller.load_state_dict(short)
    wrong = {**state, "anchor": {k: v[..., :1] for k, v in state["anchor"].items()}}
    with pytest.raises(ValueError, match=r"anchor of self_attn\.weight is"):
        controller.load_state_dict(wrong)
    before = {k: v.clone() for k, v in state["anchor"].items()}
    moved = {k: v + 1 for k, v in state["anchor"].items()}
    with pytest.raises(ValueError, match="not the record of one EffOPDEvent"):
        controller.load_state_dict({"anchor": moved, "scalars": {**state["scalars"], "events": [{"step": 1}]}})
    for wrong in (None, {"anchor": moved, "scalars": None}):
        with pytest.raises(TypeError, match=r"state must be what state_dict returned, got a (NoneType|dict)"):
            controller.load_state_dict(wrong)
    candidates = [{**EffOPDEvent(1, 1.0, 0.0, 0.0, 0, 0.0, 0, 0.0, 1.0).to_dict(), "candidates": c} for c in (5, [1])]
    for wrong, words in [
        ({"anchor": None}, "the anchor in the controller's state must be a dict of tensors by name"),
        ({"anchor": {k: 1.0 for k in moved}}, "the anchor in .* must be a dict of tensors by name"),
        ({"scalars": {**state["scalars"], "last_step": "x"}}, "last_step in .* must be an int, got 'x'"),
        ({"scalars": {**state["scalars"], "val_tokens": 0.5}}, r"val_tokens in .* must be an int, got 0\.5"),
        ({"scalars": {**state["scalars"], "events": None}}, "events in .* must be a list, got None"),
        ({"scalars": {**state["scalars"], "events": [5]}}, "the record of one EffOPDEvent must be a dict, got 5"),
        ({"scalars": {**state["scalars"], "events": candidates[:1]}}, "candidates must be a list, got 5"),
        ({"scalars": {**state["scalars"], "events": candidates[1:]}}, "record of one Candidate must be a dict, got 1"),
    ]:
        with pytest.raises(TypeError, match=words):
            controller.load_state_dict({**state, "anchor": moved, **wrong})
    assert controller.last_step == 0 and not controller.events
    for lacking in ({}, {"anchor": moved, "scalars": {"events": [], "val_tokens": 0}}):
        with pytest.raises(ValueError, match=r"the controller's state lacks '(scalars|last_step)'"):
            controller.load_state_dict(lacking)
    assert all(torch.equal(v, before[k]) for k, v in controller.state_dict()["anchor"].items())


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(alphas=()), "alphas"),
        (dict(alphas=3), "alphas must be a sequence of numbers, got 3"),
        (dict(alphas=["a"]), "alphas must be a sequence of numbers"),
        (dict(alphas="35"), "alphas must be a sequence of numbers, got '35'"),
        (dict(alphas=(3, float("nan"))), "alphas"),
        pytest.param(dict(alphas=[10**400]), "alphas must be finite", id="beyond all floats"),
        (dict(alphas=(1,)), "alphas"),
        (dict(schedule="pow3"), "schedule"),
        (dict(schedule=0), "schedule"),
        (dict(schedule=True), "schedule"),
        (dict(schedule=[]), "schedule"),
        (dict(schedule=[0]), "schedule"),
        (dict(schedule=np.array([1.5])), "schedule"),
        (dict(schedule=np.ones((2, 2), int)), "schedule"),
        (dict(min_delta=-1), "min_delta"),
        (dict(min_delta=float("nan")), "min_delta"),
        (dict(min_delta="x"), "min_delta must be >= 0, got 'x'"),
        (dict(accept="paired", confidence=None), "confidence must be in .*, got None"),
        (dict(accept="median"), "accept"),
        (dict(accept="paired", confidence=1.0), "confidence"),
        (dict(confidence=0.3), "confidence"),
        (dict(max_val_tokens=0), "max_val_tokens must be a positive int"),
        (dict(max_val_tokens=-5), "max_val_tokens"),
        (dict(max_val_tokens=1e6), "max_val_tokens"),
        (dict(max_val_tokens=True), "max_val_tokens"),
        (dict(max_val_tokens="1000"), "max_val_tokens"),
        (dict(max_gradients=1), "max_gradients must be an int >= 2"),
        (dict(max_gradients=2.5), "max_gradients must be an int >= 2"),
        (dict(alphas=(0.5, -1), search="gradient", loss_fn=float), "alphas must reach above 1"),
        (dict(score_fn=None, accept="paired", search="gradient", loss_fn=float), 'accept="paired" needs score_fn'),
        (dict(include="nothing"), "no parameter to extrapolate"),
        (dict(report_s="60"), "report_s must be a number of seconds above 0, got '60'"),
    ],
    ids=str,
)
def test_options_out_of_range(options, words):
    with pytest.raises(ValueError, match=words):
        EffOPDController(model(), **{"score_fn": lambda: 0.0, **options})


def test_ranks_at_different_steps_are_told():
    net = model()
    controller = EffOPDController(net, lambda: 0.0)
    train(net)
    current = snapshot(net)
    controller.ranks.gather = lambda value, error=None: [value, (value[0] + 1, *value[1:])]
    with pytest.raises(RuntimeError, match=r"ranks are at different steps: \[1, 2\]"):
        controller.step(1)
    assert same(net, current)


def test_what_moves_on_one_rank_may_not_stay_on_another():
    ranks = EffOPDController(model(), lambda: 0.0).ranks
    ranks.gather = lambda value, error=None: [(["a", "b"], []), (["c"], ["d"])]  # two stages of a pipeline
    ranks.agree_on_moving([], [])
    ranks.gather = lambda value, error=None: [(["a", "b"], []), (["a"], ["b"])]
    with pytest.raises(ValueError, match="b is trained on rank 0 and frozen on rank 1"):
        ranks.agree_on_moving([], [])


def test_too_few_scores_are_found_before_a_candidate_is_tried():
    net = model()
    script = Script(net, 0.5)
    controller = EffOPDController(net, script, accept="paired")
    train(net)
    with pytest.raises(ValueError, match="at least 2 prompts"):
        controller.step(1)
    assert len(script.seen) == 1


@pytest.mark.parametrize("dtype", [torch.bool, torch.int8, torch.complex64, torch.float8_e4m3fn])
def test_what_cannot_move_is_named_at_once(dtype):
    named = {"attn.q.weight": torch.zeros(2), "attn.mask": torch.zeros(2).to(dtype)}
    with pytest.raises(ValueError, match=f"attn.mask is {dtype}: .* exclude it"):
        EffOPDController(named, lambda: 0.0)
    with pytest.raises(ValueError, match=r"attn.q.weight is without data \(meta\)"):
        EffOPDController({"attn.q.weight": torch.zeros(2, device="meta")}, lambda: 0.0)
    with pytest.raises(ValueError, match=r"attn.q.weight is torch.sparse_coo: .* exclude it"):
        EffOPDController({"attn.q.weight": torch.ones(2).to_sparse()}, lambda: 0.0)


@pytest.mark.parametrize("option", ["score_fn", "loss_fn", "on_weights_changed"])
def test_what_should_be_a_function_is_named(option):
    with pytest.raises(TypeError, match=f"{option} must be a function, got 0.5"):
        EffOPDController(model(), **{"score_fn": lambda: 0.0, option: 0.5})


@pytest.mark.parametrize(
    "params, words",
    [
        (lambda: 0.0, "got a function"),
        (model().parameters(), "got a Parameter without a name"),
        ({"mlp": [1.0]}, "got a list named 'mlp'"),
    ],
    ids=["swapped", "parameters", "no tensor"],
)
def test_what_are_no_named_tensors(params, words):
    with pytest.raises(TypeError, match=rf"params must be a module, or named tensors as model\.named_par.*, {words}"):
        EffOPDController(params, model())


@pytest.mark.parametrize("array", [torch.tensor, np.array])
def test_scores_of_any_shape(array):
    net = model()
    controller = EffOPDController(net, Script(net, array([[1.0, 2.0], [3.0, 6.0]]), array(0.0)), alphas=(3,))
    train(net)
    with pytest.raises(ValueError, match="1 scores for a candidate and 4 before"):
        controller.step(1)
    controller.score_fn = Script(net, array([[1.0, 2.0], [3.0, 6.0]]), array([[0.0], [9.0], [9.0], [9.0]]))
    event = controller.step(1)
    assert (event.score_initial, event.score_best) == (3.0, 6.75)


@pytest.mark.parametrize(
    "scores, error, words",
    [
        (["good"], TypeError, "score_fn must return"),
        (["12"], TypeError, "score_fn must return"),
        ([None], TypeError, "score_fn must return"),
        ([Scores([1.0], seconds="two")], TypeError, "a number of tokens and of seconds, got 0 and 'two'"),
        ([Scores([1.0], tokens=math.nan)], TypeError, "a number of tokens"),
        ([["0.5", "0.6"]], TypeError, "score_fn must return"),
        ([math.nan], ValueError, "not finite for the weights of step 1"),
        ([[1.0, math.inf]], ValueError, "not finite for the weights of step 1"),
        pytest.param([10**400], ValueError, "not finite for the weights of step 1", id="beyond all floats"),
        ([[]], ValueError, "no score"),
        ([[0.1, 0.2], [0.5]], ValueError, "1 scores for a candidate and 2 before"),
    ],
    ids=str,
)
def test_what_score_fn_must_not_return(scores, error, words):
    net = model()
    controller = EffOPDController(net, Script(net, *scores))
    train(net)
    current = snapshot(net)
    with pytest.raises(error, match=words):
        controller.step(1)
    assert same(net, current)


@pytest.mark.parametrize("scores", [{0: 1.0, 1: 2.0}, {1.0, 2.0}, {0: 1.0}.keys()])
def test_scores_without_order_or_by_their_keys_are_refused(scores):
    with pytest.raises(TypeError, match="score_fn must return"):
        Scores.of(scores)


def test_tokens_are_counted_upwards():
    with pytest.raises(ValueError, match="tokens, got -3"):
        Scores.of(Scores([1.0], tokens=-3))


def test_the_hook_of_changed_weights_leaves_randomness_and_modes():
    net = model()

    def hook():
        torch.rand(3), random.random(), np.random.rand()
        net.eval()

    controller = EffOPDController(net, Script(net, 0.0, 1.0, 0.0), on_weights_changed=hook)
    train(net)
    before = torch.get_rng_state(), random.getstate()
    assert controller.step(1).alpha == 3
    assert torch.equal(before[0], torch.get_rng_state()) and before[1] == random.getstate() and net.training
