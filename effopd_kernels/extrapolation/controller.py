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

import logging
import operator
import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from numbers import Integral
from typing import Any, Literal

from torch import Tensor, nn

from ..checks import is_integer
from . import checkpoint
from .acceptance import acceptance_rule
from .dense import DenseWeights
from .distributed import Ranks
from .event import Event
from .interrupts import Deferred
from .optimizer_policy import check_policy, copy_of_weights, reset_before_next_step, reset_state
from .records import EffOPDEvent
from .schedules import alphas_of, budget_of, schedule_of
from .search import refuse_steps_in_backward
from .selection import DEFAULT_EXCLUDE, DEFAULT_INCLUDE, compiled
from .shards import checksum
from .weights import weights_of

logger = logging.getLogger(__name__)


class EffOPDController:
    """Call `step(global_step)` after every optimizer and scheduler step; on schedule it tries to jump ahead.

    A LoRA student's jumps are kept in a second adapter: call `fold_()` before the student is saved for use.

    Args:
        params: a module or named tensors as the engine holds them (plain or DTensor shards); a module for LoRA
            students and FSDP2. Name every trained tensor: include and exclude say which move. Ranks hold plain tensors
            of one name alike. The anchor W_0 is taken here: construct the controller before the first training step.
            Parameters may be frozen later; jumps never move those that are frozen now.
        score_fn: () → scores of the current weights, one per prompt, higher is better: `Scores`, a sequence, a tensor
            or one number. Always the same prompts; the seeds of torch, random and numpy are handled here, and a module
            is in train or eval mode again as it was. On several ranks each scores its `share` of the prompts and all
            take the same decision.
        schedule: "pow2" (published): steps 1, 2, 4, 8, ...; "adaptive": after a jump of α ≥ 2 half as many steps pass
            to the next event as did to this one, after any other twice as many; an int n for every n-th step; or a
            collection of steps.
        alphas: candidates, tried in this order until one is not strictly better than the best so far (published), so
            an ascending order walks outwards. For search="gradient" the least above 1 and the greatest bound it.
        include, exclude: regular expressions on parameter names; the default moves attention and MLP weights, and
            exclude=() excludes nothing.
        min_delta: a candidate's mean score must exceed the best by more than this.
        accept, confidence: "mean" (published) compares mean scores; "paired" prompt by prompt: the mean difference must
            exceed min_delta by more than chance, at this one-sided confidence of Student's t (0.84: a standard error).
        max_val_tokens: over the whole run, at least 1. An evaluation that would exceed it, judged by the last one, is
            not started, nor an event that could not afford to score W_t and a candidate, judged by the last event.
        search: "candidates" (published), or "gradient": the α at which loss_fn is least along the line, from secants on
            its slope, then tried against score_fn like any candidate, so that it is never accepted at a worse score
            than W_t's.
        loss_fn: () → differentiable scalar of a fixed validation batch, an iterable of them (micro-batches), or
            `Losses`. The gradients that all of params had before the event are there again afterwards. Without
            score_fn, −loss is the score. On several ranks the plain mean of their losses counts, whatever the sizes of
            their batches: give equal ones, or weigh each by its part of the whole times the number of ranks. Unused by
            search="candidates".
        max_gradients: most forward-backward passes of an event of search="gradient", at least 2.
        optimizer: to find fp32 masters in, and for optimizer_policy; a list where several step the parameters.
        optimizer_policy: "keep" (published), or "reset": after a jump the optimizer's next step starts afresh with the
            parameters that moved (moments, step counts). Schedule-free optimizers need it; a wrapper that pulls the
            weights towards a copy of its own, as Lookahead does, takes jumps back under either.
        masters: name → fp32 copy, where the optimizer keeps them out of reach: of all parameters of lower precision
            that move, and maybe of others.
        anchor_device: "device", "host" (pinned) or "disk" (memory-mapped files in anchor_dir, unused by the
            others) for A and W_t.
        on_weights_changed: called before rewritten weights are scored, when an event leaves other weights than it
            found, and after rollback (resync rollout engines); not for the points of search="gradient", whose losses
            come from the model itself.
        process_group: whom to decide with, all ranks by default (then every rank must construct the controller).
        report_s: how long a rank that failed waits to tell the others before it raises.

    Raises:
        ValueError: an option is out of range, or not the same on all ranks, no parameter matches, or masters names no
            parameter, leaves one out, or has what is not the master of one; search="gradient" where optimizers step
            in the backward pass; optimizer_policy="keep" for a schedule-free optimizer; a model sharded by FSDP1; a
            rank that is not in process_group.
        TypeError: optimizer is no optimizer, or for optimizer_policy="reset" no torch.optim.Optimizer, wrapped or
            not; masters is no mapping; a function argument is not callable. OSError: anchor_dir cannot be written to,
            or has no room.
    """

    def __init__(
        self,
        params: nn.Module | Mapping[str, Tensor] | Iterable[tuple[str, Tensor]],
        score_fn: Callable[[], Any] | None,
        *,
        schedule: Literal["pow2", "adaptive"] | int | Collection[int] = "pow2",
        alphas: Sequence[float] = (3, 5, 7, 9, 11),
        include: str | Sequence[str] = DEFAULT_INCLUDE,
        exclude: str | Sequence[str] = DEFAULT_EXCLUDE,
        min_delta: float = 0.0,
        accept: Literal["mean", "paired"] = "mean",
        confidence: float = 0.84,
        max_val_tokens: int | None = None,
        search: Literal["candidates", "gradient"] = "candidates",
        loss_fn: Callable[[], Any] | None = None,
        max_gradients: int = 6,
        optimizer=None,
        optimizer_policy: Literal["keep", "reset"] = "keep",
        masters: Mapping[str, Tensor] | None = None,
        anchor_device: Literal["device", "host", "disk"] = "device",
        anchor_dir: str | os.PathLike[str] | None = None,
        on_weights_changed: Callable[[], None] | None = None,
        process_group=None,
        report_s: float = 60.0,
    ):
        if search not in ("candidates", "gradient"):
            raise ValueError(f'search must be "candidates" or "gradient", got {search!r}')
        self.alphas = alphas_of(alphas, search)
        if search == "gradient" and loss_fn is None:
            raise ValueError('search="gradient" needs loss_fn')
        if search == "candidates" and score_fn is None:
            raise ValueError('search="candidates" needs score_fn')
        if accept == "paired" and score_fn is None:
            raise ValueError('accept="paired" needs score_fn, one score per prompt: loss_fn gives one number')
        for name, function in dict(score_fn=score_fn, loss_fn=loss_fn, on_weights_changed=on_weights_changed).items():
            if function is not None and not callable(function):
                raise TypeError(f"{name} must be a function, got {function!r}")
        if not (isinstance(max_gradients, Integral) and max_gradients >= 2):
            raise ValueError(f"max_gradients must be an int >= 2, got {max_gradients!r}")
        check_policy(optimizer_policy, optimizer)
        self.due = schedule_of(schedule)
        self.better = acceptance_rule(accept, min_delta, confidence)
        self.score_fn, self.loss_fn = score_fn, loss_fn
        self.module = params if isinstance(params, nn.Module) else None
        self.search, self.max_gradients, self.max_val_tokens = search, max_gradients, budget_of(max_val_tokens)
        self.optimizer, self.optimizer_policy = optimizer, optimizer_policy
        self.on_weights_changed = on_weights_changed
        self.ranks = Ranks(process_group, report_s)
        include, exclude = compiled("include", include), compiled("exclude", exclude)
        decisive = dict(
            schedule=schedule if isinstance(schedule, (str, Integral)) else sorted(map(int, schedule)),
            search=search,
            alphas=self.alphas,
            max_gradients=max_gradients,
            max_val_tokens=max_val_tokens,
            accept=accept,
            confidence=confidence,
            min_delta=min_delta,
            optimizer_policy=optimizer_policy,
            include=[pattern.pattern for pattern in include],
            exclude=[pattern.pattern for pattern in exclude],
        )
        self.ranks.agree(decisive)  # or their replicas would part in silence, or one wait for another that is done
        self.weights = weights_of(params, include, exclude, optimizer, masters, anchor_device, anchor_dir)
        if search == "gradient":
            refuse_steps_in_backward(self.weights.trained())
        self.weights.holders = self.ranks.agree_on_moving(self.weights.names, self.weights.still)
        self.events: list[EffOPDEvent] = []
        self.val_tokens: int = 0  # over the run
        self.last_step: int = 0  # of the last event
        # Only the next step resets: engines that load a checkpoint expect a state of every parameter in it.
        self.reset_due = self._warned = False
        if optimizer_policy == "reset":
            reset_before_next_step(optimizer, self._reset_if_due)

    def step(self, global_step: int) -> EffOPDEvent | None:
        """The event of this step, or None off schedule and for steps not after the last event.

        Raises whatever score_fn or on_weights_changed raises, Ctrl-C included; the weights are then W_t, bit for bit,
        and the controller as if the step had not been called. A Ctrl-C after the decision is raised too, with the event
        taken and recorded.
        """
        global_step = operator.index(global_step)
        if global_step <= self.last_step or not self.due(global_step, self.events):
            return None
        with Deferred() as signals:
            event = Event(self, global_step, signals)
            try:
                self.weights.hold()
                self._warn_of_copies()
                if event.worth_trying():
                    event.score_initial()
                    for alpha in self.alphas if self.search == "candidates" else [event.slope_alpha]:
                        if not event.improves_at(alpha):
                            break
                    event.write_best()
            except BaseException as error:
                event.roll_back(error)
                raise
            self.weights.settle()
            self._remember(event.record())
        return self.events[-1]

    def fold_(self) -> None:
        """Put a LoRA student's jumps into its trained adapter, when training is over: what to call before saving it.

        During training they are in a second adapter, "effopd", and whoever loads the trained one alone misses them.
        What the model computes stays; the rank grows, to at most r·(jumps + 2); the optimizer starts afresh with the
        longer factors. Other students have their jumps in the weights themselves: nothing to do.

        Raises ValueError for an adapter that must keep its rank (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA).
        """
        with Deferred():
            if self.weights.fold() and self.optimizer is not None:
                reset_state(self.weights.tensors, self.optimizer)

    def virtual_step(self, global_step: int) -> float:
        """Where plain OPD would be if an update taken α times over were α times the steps."""
        start = self.events[-1].virtual_step if self.events else 0.0
        return start + (global_step - self.last_step)

    def state_dict(self) -> dict[str, Any]:
        """{"anchor": name → this rank's part of A (not a copy), "scalars": JSON-able}. A sharded student's fits only
        the same rank of as many ranks; what `save` wrote fits any."""
        scalars = {
            "last_step": self.last_step,
            "val_tokens": self.val_tokens,
            "events": [event.to_dict() for event in self.events],
            "reset_due": self.reset_due,
        }
        return {"anchor": self.weights.state(), "scalars": scalars}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken. Of a LoRA student load it first and the model's state_dict then: that
        has entries of the jumps' adapter, which the model has only once the controller has loaded.

        Raises, before anything changes, ValueError if it is of other weights, lacks something, or its events are not
        what `EffOPDEvent.to_dict` made, and TypeError for what is no such dict, or has something of another type.
        """
        try:
            scalars, anchor = state["scalars"], state["anchor"]
            last_step, val_tokens, events = scalars["last_step"], scalars["val_tokens"], scalars["events"]
        except KeyError as error:
            raise ValueError(f"the controller's state lacks {error}") from error
        except TypeError as error:
            raise TypeError(f"state must be what state_dict returned, got a {type(state).__name__}") from error
        if not (isinstance(anchor, Mapping) and all(isinstance(t, Tensor) for t in anchor.values())):
            raise TypeError("the anchor in the controller's state must be a dict of tensors by name")
        for name, number in dict(last_step=last_step, val_tokens=val_tokens).items():
            if not is_integer(number):
                raise TypeError(f"{name} in the controller's state must be an int, got {number!r}")
        if not isinstance(events, (list, tuple)):
            raise TypeError(f"events in the controller's state must be a list, got {events!r}")
        events = [EffOPDEvent.from_dict(event) for event in events]
        self.weights.load_state(anchor)
        self.events, self.last_step, self.val_tokens = events, last_step, val_tokens
        self.reset_due = scalars.get("reset_due", False) and self.optimizer_policy == "reset"

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write the state to a directory that all ranks share, atomically; every rank calls it (see `checkpoint`).

        Each rank of a sharded student writes its own part; nothing is gathered. Of a student that every rank holds
        whole, LoRA students among them, rank 0 writes one file.

        A rank that cannot write raises why, all others a RuntimeError that names it; the state before stays. ValueError
        where ranks hold different parameters, as the stages of a pipeline do, or plain tensors of one name that differ:
        keep the `state_dict` of each.
        """
        with Deferred():
            apart = next((name for name, count in self.weights.holders.items() if count < self.ranks.size), None)
            if apart is not None:
                raise ValueError(
                    f"not every rank has {apart}, and save writes one state of all: store each rank's state_dict()"
                )
            uneven = self._uneven()
            if uneven is not None:
                raise ValueError(
                    f"{uneven} is a plain tensor that differs between ranks, and save writes that of rank 0 for all: "
                    "store each rank's state_dict(), or shard with DTensors"
                )
            checkpoint.save(directory, **self.state_dict(), ranks=self.ranks, parts=self.weights.parts)

    def load(self, directory: str | os.PathLike[str]) -> None:
        """Continue from `save`; every rank calls it, and reads what it holds itself.

        The number of ranks and the sharding (FSDP2, HSDP, tensor parallel, none) may be others than when it was saved:
        the anchor is the same bit for bit. A LoRA student's state_dict is loaded after it, see `load_state_dict`.

        Raises, on every rank and before anything changes, `CheckpointError`, naming the file, if the state is not
        intact, and ValueError if it is of other weights.
        """
        anchor, scalars = checkpoint.load(directory, self.ranks, self.weights.wanted)
        self.load_state_dict({"anchor": anchor, "scalars": scalars})

    def _uneven(self) -> str | None:
        """A tensor of which every rank should hold the same and does not, as plain shards of tensor parallelism."""
        # LoRA students are not asked: each rank shortens their sums of products itself, maybe not to the last bit.
        if self.ranks.size == 1 or self.weights.parts is not None or self.weights.wanted is None:
            return None
        sums = {name: checksum(anchor) for name, anchor in self.weights.state().items()}
        every = self.ranks.gather(sums)
        return next((name for name in sums if any(other.get(name) != sums[name] for other in every)), None)

    def _remember(self, record: EffOPDEvent) -> None:
        self.events.append(record)
        self.last_step = record.step
        self.val_tokens += record.val_tokens
        self.reset_due |= record.alpha != 1.0 and self.optimizer_policy == "reset"

    def _warn_of_copies(self) -> None:
        moves = isinstance(self.weights, DenseWeights)  # a LoRA student's jumps leave alone what optimizers step
        if not moves or self.optimizer is None or self.optimizer_policy == "reset" or self._warned:
            return
        if copy := copy_of_weights(self.weights.tensors, self.optimizer):
            self._warned = True
            logger.warning(
                "%s is nearly the weights, and does not jump: if the optimizer steps from it, it takes jumps back, and "
                'needs optimizer_policy="reset"',
                copy,
            )

    def _reset_if_due(self) -> None:
        if self.reset_due:
            reset_state(self.weights.tensors, self.optimizer)
            self.reset_due = False
