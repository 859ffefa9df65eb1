"""Ctrl-C and SIGTERM at every point of an event: the weights are W_t or an accepted candidate, never in between."""

import os
import random
import signal
import subprocess
import sys
import threading
from contextlib import nullcontext

import pytest
import torch

from effopd_kernels.extrapolation import EffOPDController, cpu, interrupts
from effopd_kernels.extrapolation.interrupts import Deferred
from effopd_kernels.extrapolation.randomness import SameRandomness


@pytest.fixture(params=[signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def number(request):
    """A signal that raises: Ctrl-C does by itself, SIGTERM where a program has set a handler."""
    before = signal.getsignal(signal.SIGTERM)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    yield request.param
    signal.signal(signal.SIGTERM, before)


def world(seed=0):
    torch.manual_seed(seed)
    net = torch.nn.ModuleDict({"mlp": torch.nn.Linear(3, 2), "self_attn": torch.nn.Linear(2, 2)})
    return net, {n: p.detach().clone() for n, p in net.named_parameters()}


def event_with_signal(monkeypatch, number, at, scores):
    """One event in which the signal arrives in the `at`-th write of a tensor or call of score_fn or hook.

    Returns what the weights were (W_t, and the lines of the candidates), what they are, and whether it got that far.
    """
    net, anchor = world()
    remaining, script = [at], list(scores)
    handlers = {s: signal.getsignal(s) for s in Deferred.SIGNALS}

    def tick():
        remaining[0] -= 1
        if remaining[0] == 0:
            os.kill(os.getpid(), number)

    write = cpu._write

    def interrupted_write(*args):
        tick()
        write(*args)
        tick()

    def score():
        tick()
        return script.pop(0)

    controller = EffOPDController(net, score, on_weights_changed=tick)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(torch.randn_like(p))
    current = {n: p.detach().clone() for n, p in net.named_parameters()}
    raised = False
    with monkeypatch.context() as patch:
        patch.setattr(cpu, "_write", interrupted_write)
        patch.setattr(cpu, "native", lambda: None)  # tensor by tensor, so that there is a time in between
        try:
            controller.step(1)
        except (KeyboardInterrupt, SystemExit):
            raised = True
    assert {s: signal.getsignal(s) for s in Deferred.SIGNALS} == handlers
    line = {
        alpha: {n: torch.lerp(anchor[n], w, alpha) if alpha != 1 else w for n, w in current.items()}
        for alpha in (1, 3, 5, 7)
    }
    where = [a for a, weights in line.items() if all(torch.equal(p, weights[n]) for n, p in net.named_parameters())]
    return where, raised, remaining[0] <= 0, controller


@pytest.mark.parametrize("scores, accepted", [([0.1, 0.2, 0.3, 0.0], 5), ([0.5, 0.1], 1)], ids=["accepts", "rejects"])
def test_signal_at_every_point(monkeypatch, number, scores, accepted):
    at, interrupted = 0, 0
    while True:
        at += 1
        where, raised, reached, controller = event_with_signal(monkeypatch, number, at, scores)
        if not reached:
            break
        assert raised
        if controller.events:  # it arrived too late to stop the event, and was delivered after it
            assert where == [accepted] and controller.events[0].alpha == accepted
        else:
            interrupted += 1
            assert where == [1]
    assert at > 20 and interrupted > 5  # the loop did pass through writes, scores and hooks


@pytest.mark.parametrize("guarded", [True, False])
def test_ctrl_c_again_during_the_restore_waits_for_it(monkeypatch, guarded):
    net, _ = world()

    def score():
        if controller.score_fn.calls:
            monkeypatch.setattr(cpu, "native", lambda: None)
            monkeypatch.setattr(cpu, "_write", impatient)
            raise KeyboardInterrupt
        controller.score_fn.calls = 1
        return 0.0

    score.calls = 0
    controller = EffOPDController(net, score)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(1.0)
    current = {n: p.detach().clone() for n, p in net.named_parameters()}
    write = cpu._write

    def impatient(*args):
        write(*args)
        signal.raise_signal(signal.SIGINT)

    if not guarded:  # the test has teeth: without the guard the restore is torn
        monkeypatch.setattr(Deferred, "__enter__", lambda self: self)
        monkeypatch.setattr(Deferred, "__exit__", lambda self, *_: None)
        monkeypatch.setattr(Deferred, "open", lambda self: nullcontext())
    with pytest.raises(KeyboardInterrupt):
        controller.step(1)
    assert all(torch.equal(p, current[n]) for n, p in net.named_parameters()) is guarded


def test_signals_kept_are_delivered_in_open_or_at_the_end():
    with pytest.raises(KeyboardInterrupt), Deferred() as signals:
        signal.raise_signal(signal.SIGINT)
        done = True
        with signals.open():
            raise AssertionError("not reached")
    assert done
    with pytest.raises(KeyboardInterrupt), Deferred():
        signal.raise_signal(signal.SIGINT)
        done = 2
    assert done == 2


def test_each_of_two_signals_is_delivered():
    received = []
    before = {number: signal.signal(number, lambda number, _: received.append(number)) for number in Deferred.SIGNALS}
    try:
        with Deferred():
            for number in Deferred.SIGNALS:
                signal.raise_signal(number)
        assert received == list(Deferred.SIGNALS)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM], indirect=True)
def test_both_are_delivered_though_the_first_raises(number):
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stopped, Deferred():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
    assert isinstance(stopped.value.__context__, KeyboardInterrupt)
    assert signal.getsignal(signal.SIGTERM) is before


def test_no_handler_is_left_behind_by_a_signal_that_comes_at_the_end(number, monkeypatch):
    handlers = {s: signal.getsignal(s) for s in Deferred.SIGNALS}
    restore = Deferred._restore

    def interrupted(self):
        monkeypatch.setattr(Deferred, "_restore", restore)
        signal.raise_signal(number)  # while its handler is still the one that defers
        restore(self)

    monkeypatch.setattr(Deferred, "_restore", interrupted)
    with pytest.raises((KeyboardInterrupt, SystemExit)), Deferred():
        pass
    assert {s: signal.getsignal(s) for s in Deferred.SIGNALS} == handlers


@pytest.mark.parametrize("what", ["modes", "randomness"])
def test_what_scoring_changed_is_put_back_whole(number, monkeypatch, what):
    """A signal during the clean-up waits for its end."""
    net, _ = world()
    state = random.getstate()

    def score():
        net.eval()
        random.random()
        return 0.0

    controller = EffOPDController(net, score)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(1.0)
    rewind, calls = SameRandomness.rewind, []

    def interrupted(self):
        calls.append(1)
        if len(calls) == 2:  # at the end of the first score; modes are put back after it
            signal.raise_signal(number)
        rewind(self)

    monkeypatch.setattr(SameRandomness, "rewind", interrupted)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        controller.step(1)
    assert all(part.training for part in net.modules()) if what == "modes" else random.getstate() == state


@pytest.mark.parametrize("what", ["loss_fn", "on_weights_changed"])
def test_ctrl_c_stops_what_was_called(what):
    net, _ = world()
    after = []

    def interrupted():
        signal.raise_signal(signal.SIGINT)
        after.append(1)

    options = {"loss_fn": dict(search="gradient"), "on_weights_changed": {}}[what]
    controller = EffOPDController(net, lambda: 0.0, **options, **{what: interrupted})
    with torch.no_grad():
        net["mlp"].weight.add_(1.0)
    with pytest.raises(KeyboardInterrupt):
        controller.step(1)
    assert not after


def test_ctrl_c_again_waits_for_the_clean_up_of_what_was_called():
    net, _ = world()
    cleaned = []

    def score():
        try:
            signal.raise_signal(signal.SIGINT)
        finally:
            signal.raise_signal(signal.SIGINT)
            cleaned.append(1)

    controller = EffOPDController(net, score)
    with torch.no_grad():
        net["mlp"].weight.add_(1.0)
    with pytest.raises(KeyboardInterrupt):
        controller.step(1)
    assert cleaned


def test_an_event_outside_the_main_thread():
    net, _ = world()
    controller, alphas = EffOPDController(net, lambda: 0.0), []
    with torch.no_grad():
        net["mlp"].weight.add_(1.0)
    thread = threading.Thread(target=lambda: alphas.append(controller.step(1).alpha))
    thread.start()
    thread.join()
    assert alphas == [1.0]


@pytest.mark.parametrize("set_in_c", [True, False])
def test_what_python_has_no_handler_for_is_left_alone(set_in_c):
    """C code's handler is still there afterwards; the default action, to end the process, is not put off."""
    program = """
import faulthandler, runpy, signal, sys
if len(sys.argv) > 2:
    faulthandler.register(signal.SIGTERM)
with runpy.run_path(sys.argv[1])["Deferred"]():
    signal.raise_signal(signal.SIGTERM)
signal.raise_signal(signal.SIGTERM)
"""
    arguments = [sys.executable, "-c", program, interrupts.__file__, *["in C"] * set_in_c]
    result = subprocess.run(arguments, capture_output=True, text=True)
    assert result.returncode == (0 if set_in_c else -signal.SIGTERM)
    assert result.stderr.count("Current thread") == 2 * set_in_c
