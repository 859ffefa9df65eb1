"""EffOPD (arXiv 2605.11739): on-policy distillation that jumps ahead along its own update.

At scheduled steps t (1, 2, 4, 8, ...), after the optimizer's step:

    δ = W_t − A                          A: the weights the last event left, W_0 at first
    best = score(W_t)
    for α in 3, 5, 7, 9, 11:             W = A + α·δ
        keep it if score(W) > best, else stop and restore the best
    A ← W                                whether or not anything was kept

Scores are computed on the same prompts with the same random numbers for every candidate. The optimizer's state is left
alone. All it takes of an engine is a list of named tensors and a function that scores the current weights.
"""

import math
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

from . import checkpoint
from .acceptance import acceptance_rule
from .distributed import Ranks
from .interrupts import Deferred
from .randomness import SameRandomness
from .records import Candidate, EffOPDEvent, Scores
from .schedules import schedule_of
from .selection import DEFAULT_EXCLUDE, DEFAULT_INCLUDE, named_tensors, select
from .weights import DenseWeights

__all__ = ["EffOPDController"]

FP32_EPS = 2.0**-23


class EffOPDController:
    """Call `step(global_step)` after every optimizer and scheduler step; on schedule it tries to jump ahead.

    Args:
        params: a module or named tensors as the engine holds them (plain or DTensor shards). The anchor W_0 is taken
            here, so construct it before the first training step.
        score_fn: () → scores of the current weights, one per prompt, higher is better: `Scores`, a sequence, a tensor
            or one number. Always the same prompts; seeds are handled here for torch, random and numpy. On several
            ranks each scores its `share` of the prompts and all take the same decision.
        schedule: "pow2" (published), an int n for every n-th step, or a collection of steps.
        alphas: candidates in the order they are tried.
        include, exclude: regular expressions on parameter names; the default moves attention and MLP weights.
        min_delta: a candidate's mean score must exceed the best by more than this.
        accept, confidence: "mean", or "paired" differences per prompt, see `acceptance_rule`.
        max_val_tokens: over the whole run; an evaluation that would exceed it, judged by the last one, is not started.
        on_weights_changed: called whenever the weights were rewritten, after rollback too (resync rollout engines).
        process_group: whom to decide with, all ranks by default (then every rank must construct the controller).

    Raises:
        ValueError: an option is out of range, or no parameter matches.
    """

    def __init__(
        self,
        params,
        score_fn: Callable[[], Any],
        *,
        schedule: str | int | Sequence[int] = "pow2",
        alphas: Sequence[float] = (3, 5, 7, 9, 11),
        include: str | Sequence[str] = DEFAULT_INCLUDE,
        exclude: str | Sequence[str] = DEFAULT_EXCLUDE,
        min_delta: float = 0.0,
        accept: str = "mean",
        confidence: float = 0.84,
        max_val_tokens: int | None = None,
        on_weights_changed: Callable[[], None] | None = None,
        process_group=None,
    ):
        self.alphas = tuple(float(a) for a in alphas)
        if not self.alphas or not all(math.isfinite(a) and a not in (0.0, 1.0) for a in self.alphas):
            raise ValueError(f"alphas must be finite and neither 0 nor 1, at least one, got {alphas}")
        self.due = schedule_of(schedule)
        self.better = acceptance_rule(accept, min_delta, confidence)
        self.max_val_tokens = max_val_tokens
        self.score_fn = score_fn
        self.on_weights_changed = on_weights_changed
        self.weights = DenseWeights(select(named_tensors(params), include, exclude))
        self.ranks = Ranks(process_group)
        self.events: list[EffOPDEvent] = []
        self.val_tokens = 0  # over the run
        self.last_step = 0  # of the last event

    def step(self, global_step: int) -> EffOPDEvent | None:
        """The event of this step, or None off schedule and for steps not after the last event.

        Raises whatever score_fn or on_weights_changed raises, Ctrl-C included; the weights are then W_t, bit for bit,
        and the controller as if the step had not been called.
        """
        if global_step <= self.last_step or not self.due(global_step):
            return None
        with Deferred() as signals:
            self.weights.hold()
            try:
                event = self._event(global_step, signals)
            except BaseException as error:
                self.weights.write(1.0)
                self._after(error, signals)
                raise
            self.weights.anchor_here()
            self.events.append(event)
            self.last_step = global_step
            self.val_tokens += event.val_tokens
        return event

    def _event(self, step: int, signals: Deferred) -> EffOPDEvent:
        clock = time.perf_counter()
        randomness = SameRandomness()
        tried: list[Candidate] = []
        accepted, best, first, tokens = 1.0, None, None, 0
        delta_norm, weight_norm = self._norms()

        def score() -> Scores:
            nonlocal tokens
            scores = self._score(randomness, signals)
            tokens += scores.tokens
            return scores

        skipped = self._reason_to_skip(delta_norm, weight_norm)
        if skipped is None:
            best = first = score()
            if not all(map(math.isfinite, first.values)):
                raise ValueError(f"score_fn returned a score that is not finite for the weights of step {step}")
            for alpha in self.alphas:
                if not self._affordable(tokens, best.tokens):
                    break
                if self._overflows(alpha):
                    tried.append(Candidate(alpha, None, False, 0, 0.0))
                    break
                self._changed(signals)
                scores = score()
                keep = self.better(scores, best)
                tried.append(Candidate(alpha, scores.mean, keep, scores.tokens, scores.seconds))
                if not keep:
                    break
                accepted, best = alpha, scores
            if tried and not tried[-1].accepted:
                self.weights.write(accepted)
                self._changed(signals)
        return EffOPDEvent(
            step=step,
            alpha=accepted,
            score_initial=first and first.mean,
            score_best=best and best.mean,
            num_candidates=sum(c.score is not None for c in tried),
            delta_norm=delta_norm,
            val_tokens=tokens,
            seconds=time.perf_counter() - clock,
            virtual_step=self.virtual_step(self.last_step) + accepted * (step - self.last_step),
            candidates=tuple(tried),
            skipped=skipped,
        )

    def virtual_step(self, global_step: int) -> float:
        """Where plain OPD would be if an update taken α times over were α times the steps."""
        start = self.events[-1].virtual_step if self.events else 0.0
        return start + (global_step - self.last_step)

    def state_dict(self) -> dict[str, Any]:
        """{"anchor": name → this rank's part of A (not a copy), "scalars": JSON-able}."""
        events = [event.to_dict() for event in self.events]
        scalars = {"last_step": self.last_step, "val_tokens": self.val_tokens, "events": events}
        return {"anchor": self.weights.state(), "scalars": scalars}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken. ValueError, before anything changes, if it is of other weights."""
        scalars = state["scalars"]
        self.weights.load_state(state["anchor"])
        self.events = [EffOPDEvent.from_dict(event) for event in scalars["events"]]
        self.last_step, self.val_tokens = scalars["last_step"], scalars["val_tokens"]

    def save(self, directory: str | os.PathLike) -> None:
        """Write the state to a directory, atomically; every rank calls it (see `checkpoint`)."""
        with Deferred():
            checkpoint.save(directory, **self.state_dict(), ranks=self.ranks, sharded=self.weights.sharded)

    def load(self, directory: str | os.PathLike) -> None:
        """Continue from `save`; every rank calls it. Raises `CheckpointError`, naming the file, if it is not intact."""
        anchor, scalars = checkpoint.load(directory, self.ranks)
        self.load_state_dict({"anchor": anchor, "scalars": scalars})

    def _norms(self) -> tuple[float, float]:
        """‖W_t − A‖ and ‖W_t‖ over all moved parameters and ranks; writes W_t, which is there already."""
        stats = self.weights.write(1.0, stats=True)
        share = 1.0 / self.weights.replication(self.ranks.size)
        sums = [float((column.cpu().double() * share).sum()) for column in stats[:2]]
        return tuple(math.sqrt(x) for x in self.ranks.sum(sums))

    def _reason_to_skip(self, delta_norm: float, weight_norm: float) -> str | None:
        if not math.isfinite(delta_norm):
            return "the weights are not finite"
        if delta_norm <= FP32_EPS * weight_norm:
            return "the weights have not moved by more than rounding since the last event"
        if not self._affordable(0, 0):
            return "max_val_tokens is spent"
        return None

    def _affordable(self, spent: int, next_cost: int) -> bool:
        return self.max_val_tokens is None or self.val_tokens + spent + next_cost < self.max_val_tokens

    def _overflows(self, alpha: float) -> bool:
        """Write a candidate; true if an element of it is not finite on some rank, so that scoring would be wasted."""
        stats = self.weights.write(alpha, stats=True)
        return self.ranks.sum([float(stats.nonfinite.sum())])[0] > 0

    def _score(self, randomness: SameRandomness, signals: Deferred) -> Scores:
        """This event's next evaluation, over all ranks."""
        start = time.perf_counter()
        with signals.open(), randomness.rewound():
            scores = Scores.of(self.score_fn())
        seconds = time.perf_counter() - start if scores.seconds is None else scores.seconds
        merged = self.ranks.merge(Scores(scores.values, scores.tokens, seconds))
        if not merged.values:
            raise ValueError("score_fn returned no score")
        return merged

    def _changed(self, signals: Deferred) -> None:
        if self.on_weights_changed is not None:
            with signals.open():
                self.on_weights_changed()

    def _after(self, error: BaseException, signals: Deferred) -> None:
        """Tell engines and other ranks that an error rolled W_t back; a hook that fails now must not hide the error."""
        try:
            self._changed(signals)
        except BaseException as second:
            error.__context__ = second
        self.ranks.report(error)
