"""EffOPD for any `transformers.Trainer`: the controller's `step` after each optimizer step, its state in checkpoints.

trainer.add_callback(EffOPDCallback(score_fn, log=trainer.log))
"""

import inspect
import json
import logging
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..errors import UserError
from ..extrapolation import CheckpointError, EffOPDController, EffOPDEvent, checkpoint
from ..extrapolation.lora import LoraWeights
from .checkpoint_weights import load_trained_adapter

logger = logging.getLogger(__name__)

STATE_DIR = "effopd_state"  # inside each checkpoint folder
STATE_KEY = "effopd"  # in trainer_state.json: which events the run has had that the state belongs to
DECISIONS = ("should_log", "should_evaluate", "should_save", "should_epoch_stop", "should_training_stop")
PATIENCE = "early_stopping_patience_counter"  # of callbacks that count evaluations without gain


class EffOPDCallback(TrainerCallback):
    """Extrapolates a trainer's student along its update, with a step size chosen on validation (arXiv 2605.11739).

    Args:
        score_fn: no arguments; returns per-prompt scores of the model's current weights, higher is better, as
            `EffOPDController` takes them. Called with the model as training left it.
        log: receives a dict of `effopd/*` metrics after each event; if it was skipped, with the reason as text in place
            of scores. Pass `trainer.log`: of its trainer a `score_fn` that evaluates with it uses up no patience
            (`EarlyStoppingCallback`).
        controller_args: keyword arguments of `EffOPDController` (schedule, alphas, include, min_delta, …).

    The anchor is taken when training begins, so add the callback before `train()`, one to a trainer. The controller's
    state goes into each checkpoint folder; resuming reads it from `args.resume_from_checkpoint` if that is set,
    otherwise from the checkpoint of the resumed step in `args.output_dir`; trainer_state.json says whether it is of the
    same run.

    A LoRA student that jumped is two adapters while it trains, and so are its checkpoints. When training ends they
    become one, of a larger rank (`EffOPDController.fold_`): what `save_model` writes then is the student. To train
    further from one of the checkpoints, construct model and trainer anew.

    Raises:
        TypeError: for an option that `EffOPDController` does not have.
        UserError: when training begins, for an option out of range, when no parameter matches, beside another
            EffOPDCallback, or in a hyperparameter search without `log=trainer.log`; when it began without the callback;
            on resume, when the checkpoint holds no EffOPD state, or that of another run or of other weights.
    """

    def __init__(
        self,
        score_fn: Callable[[], Any] | None,
        *,
        log: Callable[[dict[str, Any]], object] | None = None,
        **controller_args: Any,
    ):
        inspect.signature(EffOPDController).bind(None, score_fn, optimizer=None, **controller_args)
        if not (score_fn is None or callable(score_fn)):
            raise TypeError(f"score_fn must be a function, got {score_fn!r}")
        self.score_fn = score_fn
        self.trainer = trainer = getattr(log, "__self__", None)
        # TRL's trainers override `log` to add, and clear, the averages of the steps since the last one: an event's
        # record would take them away from the next step's.
        averages = any("log" in vars(cls) and cls.__module__.startswith("trl.") for cls in type(trainer).__mro__)
        self.log = partial(Trainer.log, trainer) if averages else log
        self.controller_args = controller_args
        self.controller: EffOPDController | None = None
        self.state = None
        self.saved_step: int | None = None

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        self.state, self.saved_step = state, None
        if vars(state).setdefault("effopd_callback", id(self)) != id(self):  # each training has a new TrainerState
            raise UserError("the trainer has two EffOPDCallbacks, which would undo each other's jumps: add one")
        if state.is_hyper_param_search and not isinstance(self.trainer, Trainer):
            raise UserError(
                "in a hyperparameter search EffOPDCallback needs log=trainer.log: its trainer names the trial's folder"
            )
        given = _given_checkpoint(args)
        resumed = None if state.global_step == 0 else given or self._checkpoint(args, state)
        if resumed is not None:
            load_trained_adapter(model, resumed)
        try:
            self.controller = EffOPDController(model, self.score_fn, optimizer=optimizer, **self.controller_args)
        except (ValueError, TypeError, OSError) as e:  # OSError: anchor_dir
            raise UserError(str(e)) from e
        if resumed is not None:
            self._load(resumed, guessed=given is None)
            # A no-op, unless the run was interrupted inside this step's event or has another schedule now.
            self._step(state, control)
        self._note_history()

    def _load(self, checkpoint: Path, guessed: bool) -> None:
        """The controller's state in a checkpoint of the run that is resumed. `guessed`: callbacks are not told which
        that is, and this one is by its step."""
        folder = checkpoint / STATE_DIR
        if not folder.is_dir():
            raise UserError(
                f"checkpoint '{checkpoint}' holds no EffOPD state ('{STATE_DIR}/'), so it was saved without, or "
                "its saving cut short; resume from an earlier one, with EffOPD disabled, or start afresh"
                + ("; if another folder is resumed from, set args.resume_from_checkpoint to it" if guessed else "")
            )
        try:
            self.controller.load(folder)
        except (ValueError, CheckpointError) as e:  # of other weights, or not intact
            raise UserError(f"the EffOPD state in '{folder}' cannot be resumed from: {e}") from e
        # Absent where an older version wrote the checkpoint.
        if self.state.stateful_callbacks.get(STATE_KEY) not in (None, self._history()):
            raise UserError(
                f"the EffOPD state in '{folder}' is of another run than the one resumed: set "
                "args.resume_from_checkpoint to the checkpoint that is resumed from"
            )

    def on_step_end(self, args, state, control, **kwargs):
        if self.controller is None:
            raise UserError("an EffOPDCallback was added to a training that had begun: add it before train()")
        self._step(state, control)

    def _step(self, state, control) -> None:
        # A score_fn that logs or evaluates with the trainer, and logging here, clear what the step itself has to do;
        # and candidates' evaluations are not those that training is stopped by.
        callbacks = self.trainer.callback_handler.callbacks if isinstance(self.trainer, Trainer) else []
        decided = [(control, name, getattr(control, name)) for name in DECISIONS]
        decided += [(each, PATIENCE, getattr(each, PATIENCE)) for each in callbacks if hasattr(each, PATIENCE)]
        try:
            event = self.controller.step(state.global_step)
            if event is not None:
                self._record(event)
        finally:
            for owner, name, value in decided:
                setattr(owner, name, value)

    def _record(self, event: EffOPDEvent) -> None:
        self._note_history()  # transformers writes trainer_state.json before it calls on_save
        if self.log is not None:
            record = {
                "effopd/score_initial": event.score_initial,
                "effopd/score_best": event.score_best,
                "effopd/skipped": event.skipped,
                "effopd/alpha_accepted": event.alpha,
                "effopd/num_candidates": event.num_candidates,
                "effopd/delta_norm": event.delta_norm,
                "effopd/val_tokens": event.val_tokens,
                "effopd/overhead_s": event.seconds,
                "effopd/virtual_step": event.virtual_step,
            }
            # A skipped event has a reason in place of scores; loggers take numbers and text, and complain of None.
            self.log({name: value for name, value in record.items() if value is not None})

    def on_train_end(self, args, state, control, **kwargs):
        weights = self.controller.weights
        if not isinstance(weights, LoraWeights):
            return
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            # transformers has loaded that step's trained adapter; that step's jumps belong to it, and no later ones.
            folder = Path(state.best_model_checkpoint) / STATE_DIR
            try:
                weights.load_state(checkpoint.load(folder, self.controller.ranks)[0])
            except (CheckpointError, ValueError) as e:
                logger.warning("the jumps of the best checkpoint are lost, the model is without any: %s", e)
                weights.adapters.install([])
                return
        try:
            self.controller.fold_()
        except ValueError as e:
            logger.warning("%s", e)

    def on_save(self, args, state, control, **kwargs):
        if self.saved_step != state.global_step:  # a trainer that writes checkpoints whole has called save() itself
            self.save(self._checkpoint(args, state), state.global_step)

    def save(self, checkpoint: Path, step: int) -> None:
        """Write the controller's state into a checkpoint folder; every rank calls it, before trainer_state.json is
        written there."""
        self._note_history()  # an interrupt may have come between an event and its note
        self.controller.save(checkpoint / STATE_DIR)
        self.saved_step = step

    def _checkpoint(self, args, state) -> Path:
        """Where this step's is: that of a hyperparameter search's trial, in a folder of the trial's."""
        known, trial = isinstance(self.trainer, Trainer), getattr(self.trainer, "_trial", None)
        folder = self.trainer._get_output_dir(trial) if known else args.output_dir
        return Path(folder) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"

    def _note_history(self) -> None:
        self.state.stateful_callbacks[STATE_KEY] = self._history()

    def _history(self) -> dict[str, int]:
        """A checksum of what the events decided: the same on every rank, and of every version."""
        events = [(e.step, e.alpha, e.score_initial, e.score_best, e.delta_norm) for e in self.controller.events]
        return {"events": zlib.crc32(json.dumps(events).encode())}


def _given_checkpoint(args) -> Path | None:
    """What args.resume_from_checkpoint names, where that is a checkpoint."""
    folder = Path(args.resume_from_checkpoint or "")
    return folder if args.resume_from_checkpoint and (folder / TRAINER_STATE_NAME).is_file() else None
