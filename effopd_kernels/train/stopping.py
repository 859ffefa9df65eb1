"""Stop signals become KeyboardInterrupt, at once or, with several processes, when all have agreed; what a step was when
it completed is remembered, so that a checkpoint of it can still be written."""

import signal

import torch
from transformers import TrainerCallback

from ..commands import handled
from ..extrapolation.interrupts import Deferred
from ..extrapolation.randomness import SameRandomness


class Interrupts:
    """Handles SIGINT and SIGTERM during training.

    Args:
        immediate: True raises KeyboardInterrupt where the signal finds the program. False only sets `pending`: a
            process that left a collective operation alone would leave the others waiting, so the caller asks all of
            them first.
    """

    def __init__(self, immediate: bool):
        self.immediate = immediate
        self.pending = False

    def _handle(self, signum, frame):
        if self.immediate:
            raise KeyboardInterrupt
        self.pending = True

    def installed(self):
        """Handle signals for the duration; one that came in an earlier duration is over."""
        self.pending = False
        return handled(self._handle, signal.SIGINT, signal.SIGTERM)


class StepGuard(TrainerCallback):
    """Brackets the optimizer step against interrupts, and remembers the random state and the counts of tokens that
    each completed step ended with."""

    def __init__(self, trainer):
        self.trainer = trainer
        self.step = self.first = 0
        self.saved: int | None = None  # the step of the last checkpoint
        self.random_state, self.train_tokens, self.num_tokens = None, 0, 0
        self._update: Deferred | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        self._completed(state)
        self.first, self.saved = self.step, None

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        # An optimizer step is many small writes; interrupted between two of them, the weights would belong to no step.
        self._update = Deferred()
        self._update.__enter__()

    def on_step_end(self, args, state, control, **kwargs):
        self._completed(state)
        if args.eval_at_powers_of_two and args.do_eval and state.global_step.bit_count() == 1:
            control.should_evaluate = True
        if self.anyone_told():
            control.should_save = control.should_training_stop = True
        self._update.__exit__()

    def on_save(self, args, state, control, **kwargs):
        self.saved = state.global_step

    def anyone_told(self) -> bool:
        """Whether a signal is pending, on any of several processes: they stop together or not at all."""
        interrupts, accelerator = self.trainer.interrupts, self.trainer.accelerator
        if not interrupts.immediate:
            told = torch.tensor(int(interrupts.pending), device=accelerator.device)
            interrupts.pending = bool(accelerator.reduce(told, "sum"))
        return interrupts.pending

    def _completed(self, state) -> None:
        self.step, self.random_state = state.global_step, SameRandomness()
        self.train_tokens, self.num_tokens = self.trainer.ledger.train_tokens, state.num_input_tokens_seen

    def restore(self) -> None:
        """As it was then: resuming draws, and counts, the abandoned rollout again."""
        self.trainer.ledger.train_tokens = self.train_tokens
        self.trainer.state.num_input_tokens_seen = self.num_tokens  # TRL's, prompts included
        self.random_state.rewind()


class EvaluationDue(TrainerCallback):
    """Makes up for the evaluation that an interrupt cut short, when training goes on: the curve gets no gap."""

    def __init__(self, trainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        saved = state.stateful_callbacks.get("TrainerControl", {}).get("args", {})
        if state.global_step > 0 and saved.get("should_evaluate"):
            self.trainer.evaluate()
