"""Scoring a model as effopd-train does, and what scoring many will cost."""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

from ..train import OPDTrainer
from ..train.validation import Validator
from .edits import EditableModel
from .evaluations import Evaluation
from .plans import Trial


class Validate:
    """Every prompt's accuracy, where there are answers, and teacher KL, where there is a teacher.

    Args:
        trainer: its student is scored, on its evaluation set. most: score on so many prompts from the first.
    """

    def __init__(self, trainer: OPDTrainer, most: int | None):
        self.trainer, dataset = trainer, trainer.eval_dataset
        self.dataset = dataset.select(range(min(most or len(dataset), len(dataset))))
        has = {"accuracy": "answer" in dataset.column_names, "teacher_kl": trainer.teacher_model is not None}
        self.metrics = tuple(name for name, possible in has.items() if possible)
        self.validator = Validator(trainer, self.dataset, self.metrics)

    def __call__(self) -> Evaluation:
        found = self.validator()
        return Evaluation(found.accuracy, found.teacher_kl, found.tokens, found.seconds)

    def seconds(self) -> float:
        """About how long a call takes, from one batch on each process; the first warms up."""
        together = self.trainer.args.per_device_eval_batch_size * self.trainer.accelerator.num_processes
        few = Validator(self.trainer, self.dataset.select(range(min(together, len(self.dataset)))), self.metrics)
        return min(few().seconds for _ in range(2)) * math.ceil(len(self.dataset) / together)


def estimate(model: EditableModel, trials: Sequence[Trial], left: Mapping[str, Trial], validate: Validate) -> str:
    """What is to be done and about how long it takes, from one batch, one edit and one factorisation."""
    scored = len({trial.edit.key() for trial in trials})
    text = f"{scored} models to score on {len(validate.dataset):,} prompts each"
    if len(left) < scored:
        text += f", {scored - len(left)} of them done already"
    if not left:
        return text
    largest = max((t.edit for t in left.values()), key=lambda edit: len(edit.names))
    whole = replace(largest, part="whole", norm_of=None)
    start = time.perf_counter()
    with model.edited(whole):
        edit_seconds = time.perf_counter() - start
    seconds = len(left) * (validate.seconds() + edit_seconds)
    places = {(t.edit.trajectory, t.edit.checkpoint) for t in left.values() if t.edit.part != "whole"}
    seconds += sum(model.factor_seconds(*place) for place in places)
    return f"{text}: about {duration(seconds)}"


def duration(seconds: float) -> str:
    minutes, rest = divmod(math.ceil(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    parts = [f"{n} {unit}" for n, unit in ((hours, "h"), (minutes, "min"), (rest, "s")) if n]
    return " ".join(parts[:2]) or "no time"
