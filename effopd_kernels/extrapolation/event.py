"""One EffOPD event in progress: writing candidates, scoring them on all ranks, and what it all cost."""

import math
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from .distributed import RankFailed, T
from .interrupts import Deferred
from .randomness import SameRandomness, modes_kept
from .records import Candidate, EffOPDEvent, Losses, Scores
from .search import Point, gradients_aside, gradients_reduced, line_minimum, refuse_steps_in_backward, summed

if TYPE_CHECKING:
    from .controller import EffOPDController

FP32_EPS = 2.0**-23
SPENT = "max_val_tokens is spent"


class Event:
    """The state of one call of `EffOPDController.step`, which reads these methods in order."""

    def __init__(self, controller: "EffOPDController", step: int, signals: Deferred):
        self.controller, self.weights, self.ranks = controller, controller.weights, controller.ranks
        self.step, self.signals = step, signals
        self.started = time.perf_counter()
        self.randomness = SameRandomness()
        self.alpha, self.first, self.best = 1.0, None, None
        self.slope_alpha = 1.0
        self.tried: list[Candidate] = []
        self.points: list[Point] = []
        self.point_tokens, self.spent = 0, False  # of the last point; whether there were none for another
        self.delta_norm = 0.0
        self.tokens = 0
        self.skipped: str | None = None

    def worth_trying(self) -> bool:
        """False, with the reason in `skipped`, where nothing could be gained or afforded."""
        norms = self.weights.norms(self.ranks.size)
        every = self.ranks.gather((self.step, *norms))
        if len({step for step, _, _ in every}) > 1:
            raise RuntimeError(f"ranks are at different steps: {[step for step, _, _ in every]}")
        self.delta_norm, weight_norm = (math.sqrt(sum(column)) for column in list(zip(*every, strict=True))[1:])
        if not math.isfinite(self.delta_norm):
            self.skipped = "the weights are not finite"
        elif self.delta_norm <= FP32_EPS * weight_norm:
            self.skipped = "the weights have not moved by more than rounding since the last event"
        elif not self._affordable(self._least_cost()):
            self.skipped = SPENT
        elif self.controller.search == "gradient":
            self.slope_alpha = self._line_minimum()
            if self.slope_alpha == 1.0:
                self.skipped = self._why_no_jump()
            elif not self._affordable(2 * self._score_cost()):
                self.skipped = SPENT
        return self.skipped is None

    def score_initial(self) -> None:
        """Score W_t. Raises ValueError if a score is not finite: no candidate could be compared with it."""
        self.best = self.first = self._score()
        if not all(map(math.isfinite, self.first.values)):
            raise ValueError(f"score_fn returned a score that is not finite for the weights of step {self.step}")
        self.controller.better(self.first, self.first)  # raises where such scores cannot be compared

    def improves_at(self, alpha: float) -> bool:
        """Write A + α·δ and score it; true if it is the new best. A candidate that overflows is not scored."""
        if not self._affordable(self.best.tokens):
            return False
        if self._write(alpha):
            self.tried.append(Candidate(alpha, None, False, 0, 0.0))
            return False
        self._changed()
        scores = self._score()
        accepted = self.controller.better(scores, self.best)
        self.tried.append(Candidate(alpha, scores.mean, accepted, scores.tokens, scores.seconds))
        if accepted:
            self.alpha, self.best = alpha, scores
        return accepted

    def write_best(self) -> None:
        """Leave the best weights in place, if the last candidate left others."""
        if self.tried and not self.tried[-1].accepted:
            self._write(self.alpha)
            self._changed()
            self.ranks.gather(None)  # where the hook fails on one rank, no other keeps the event

    def roll_back(self, error: BaseException) -> None:
        """W ← W_t; tell the other ranks, then engines. A hook that fails now must not hide the error.

        Ranks first: a hook may communicate, and would wait for ranks that wait for this one's scores. If they could not
        be told they hang elsewhere, and a hook is not called at all.
        """
        self.weights.restore()
        if isinstance(error, RankFailed) or self.ranks.report(error):
            try:
                self._changed()
            except BaseException as second:
                error.__context__ = second

    def record(self) -> EffOPDEvent:
        last = self.controller.last_step
        return EffOPDEvent(
            step=self.step,
            alpha=self.alpha,
            score_initial=self.first and self.first.mean,
            score_best=self.best and self.best.mean,
            num_candidates=sum(c.score is not None for c in self.tried),
            delta_norm=self.delta_norm,
            val_tokens=self.tokens,
            seconds=time.perf_counter() - self.started,
            virtual_step=self.controller.virtual_step(last) + self.alpha * (self.step - last),
            candidates=tuple(self.tried),
            num_gradients=len(self.points),
            skipped=self.skipped,
        )

    def _write(self, alpha: float) -> bool:
        """True if an element is not finite on some rank."""
        nonfinite = self.weights.write(alpha)[2]
        return self.ranks.sum([float(nonfinite.sum())])[0] > 0

    def _score(self) -> Scores:
        start = time.perf_counter()
        score_fn = self.controller.score_fn or self._negative_loss
        scores = self._call(lambda: Scores.of(score_fn()))
        seconds = time.perf_counter() - start if scores.seconds is None else scores.seconds
        merged = self.ranks.merge(Scores(scores.values, scores.tokens, seconds))
        if not merged.values:
            raise ValueError("score_fn returned no score")
        self.tokens += merged.tokens
        return merged

    def _changed(self) -> None:
        if self.controller.on_weights_changed is not None:
            self._call(self.controller.on_weights_changed)

    def _call(self, function: Callable[[], T]) -> T:
        """function(), which runs the user's code: always on the same random numbers, leaving every module in the mode
        that it was in, and open to signals."""
        with self.randomness.rewound(), modes_kept(self.controller.module), self.signals.open():
            return function()

    def _affordable(self, next_cost: int) -> bool:
        limit = self.controller.max_val_tokens
        return limit is None or self.controller.val_tokens + self.tokens + max(next_cost, 1) <= limit

    def _least_cost(self) -> int:
        """Tokens that an event takes at least: scoring W_t and one candidate, going by the last event that scored. If
        none has, one gradient, going by the last search; 0 before that."""
        scored = [event for event in self.controller.events if event.score_initial is not None]
        if not scored:
            searched = [event for event in self.controller.events if event.num_gradients]
            return searched[-1].val_tokens // searched[-1].num_gradients if searched else 0
        if not scored[-1].num_candidates:
            return 2 * scored[-1].val_tokens
        return scored[-1].val_tokens - sum(c.tokens for c in scored[-1].candidates[1:])

    def _score_cost(self) -> int:
        """Tokens of one score, as the last one found them; 0 where none has been."""
        if self.controller.score_fn is None:
            return self.point_tokens
        costs = [c.tokens for event in self.controller.events for c in event.candidates if c.score is not None]
        return costs[-1] if costs else 0

    def _why_no_jump(self) -> str:
        first = self.points[0]
        if not (math.isfinite(first.loss) and math.isfinite(first.slope)):
            return "the validation loss or its slope is not finite at the current weights"
        if first.slope >= 0.0:
            return "the loss does not fall beyond the current weights"
        if self.spent:
            return SPENT
        return f"no lower loss was found beyond the current weights, in {len(self.points)} gradients"

    def _line_minimum(self) -> float:
        """The α of least loss along the line; W_t is in place again afterwards."""
        alphas = [alpha for alpha in self.controller.alphas if alpha > 1]
        refuse_steps_in_backward(self.weights.trained())  # hooks may be newer than the controller
        with gradients_aside(self.weights.trained()), gradients_reduced(self.controller.module):
            self.points = line_minimum(
                self._point,
                max(alphas),
                min(alphas),
                self.controller.max_gradients,
                another=self._another_point,
            )
        self.weights.write(1.0)
        return min(self.points, key=lambda p: p.loss if math.isfinite(p.loss) else math.inf).alpha

    def _another_point(self) -> bool:
        self.spent = not self._affordable(self.point_tokens)
        return not self.spent

    def _point(self, alpha: float) -> Point:
        self.weights.write_for_slope(alpha)
        for param in self.weights.trained():
            param.grad = None
        total, count, tokens = self._call(self._backpropagated_loss)
        slope = self.weights.slope(self.ranks.size)
        loss, slope, tokens = self.ranks.sum([total / count / self.ranks.size, slope / count, tokens])
        self.point_tokens = int(tokens)
        self.tokens += self.point_tokens
        return Point(alpha, loss, slope)

    @torch.enable_grad()
    def _backpropagated_loss(self) -> tuple[float, int, int]:
        """The sum of loss_fn's losses, how many they are, and tokens generated for them."""
        losses = Losses.of(self.controller.loss_fn())
        return *summed(losses.values, backward=True), losses.tokens

    @torch.no_grad()
    def _negative_loss(self) -> Scores:
        losses = Losses.of(self.controller.loss_fn())
        total, count = summed(losses.values, backward=False)
        return Scores((-total / count,), losses.tokens)
