"""Edit, evaluate, restore, note it down; what is noted down already is not evaluated again."""

import json
import math
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from tqdm.auto import tqdm

from ..commands import written
from ..errors import UserError
from .edits import EditableModel
from .plans import Trial

FILE = "evaluations.jsonl"
METRICS = ("accuracy", "teacher_kl")
Z = 1.96  # intervals hold 95 % of what drawing other prompts would give
MEASURED = "gain"  # the first column of a row that is a measurement; before it, what was tried


class Evaluation(NamedTuple):
    """Per-prompt values in prompt order; None where not measured."""

    accuracy: list[float] | None
    teacher_kl: list[float] | None
    tokens: int
    seconds: float

    def score(self, metric: str) -> list[float]:
        """Higher is better: accuracy, or minus the KL."""
        return self.accuracy if metric == "accuracy" else [-kl for kl in self.teacher_kl]


class Evaluations:
    """Finished evaluations by edit key, in a file of JSON lines that grows with each.

    Args:
        folder: where the file is or will be.
        settings: what an evaluation depends on beside the edit; the file's first line.
        fresh: whether to begin anew over what an earlier run left.

    Raises:
        UserError: the folder holds evaluations made with other settings, or something else.
    """

    def __init__(self, folder: Path, settings: dict, fresh: bool = False):
        self.path, self.settings = folder / FILE, json.loads(json.dumps(settings))
        self.done: dict[str, Evaluation] = {}
        self._intact = 0  # bytes; a line that a kill cut short is written again
        if self.path.is_file() and not fresh:
            self._read()

    def _read(self) -> None:
        lines = self.path.read_bytes().splitlines(keepends=True)
        whole = [line for line in lines if line.endswith(b"\n")]
        if not whole:
            return
        try:
            settings, *noted = map(json.loads, whole)
            found, self.done = dict(settings), {key: Evaluation(*values) for key, *values in noted}
            differ = [k for k in self.settings if found.get(k) != self.settings[k]]
            if not differ:
                _check(self.done, found.get("eval metric"))
        except (ValueError, TypeError, RecursionError) as error:
            raise UserError(
                f"'{self.path}' is damaged ({error}); pass --overwrite_output_dir to start again, or another "
                "--output_dir"
            ) from error
        if differ:
            raise UserError(
                f"'{self.path}' holds evaluations with other settings ({differ[0]} was {found.get(differ[0])!r}, is "
                f"now {self.settings[differ[0]]!r}); pass --overwrite_output_dir to start again, or another "
                "--output_dir"
            )
        self._intact = sum(map(len, whole))

    def begin(self) -> None:
        """Note the settings alone, where nothing is noted: what is written beside the file is of them too."""
        self._append()

    def add(self, key: str, evaluation: Evaluation, write: bool) -> None:
        """write: whether this process is the one that keeps the file. Raises UserError where the disk is full."""
        self.done[key] = evaluation
        if write:
            self._append([key, *evaluation])

    def _append(self, *lines: list) -> None:
        lines = lines if self._intact else (self.settings, *lines)
        text = "".join(json.dumps(line) + "\n" for line in lines)
        with written(self.path.parent):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "ab") as file:
                file.truncate(self._intact)
                file.write(text.encode())
                file.flush()
                os.fsync(file.fileno())
        self._intact += len(text.encode())


def _check(done: dict[str, Evaluation], metric: str | None) -> None:
    """Raises ValueError unless all are numbers, NaN too, of the same prompts, and ``metric`` is among them."""
    prompts = set()
    for key, found in done.items():
        measured = [values for values in (found.accuracy, found.teacher_kl) if values is not None]
        if not all(map(_numbers, (*measured, [found.tokens, found.seconds]))):
            raise ValueError(f"evaluation {key} has something that is no number")
        if metric and getattr(found, metric) is None:
            raise ValueError(f"evaluation {key} has no {metric}")
        prompts.update(map(len, measured))
    if prompts and (len(prompts) > 1 or 0 in prompts):
        raise ValueError(f"its evaluations are of {' and '.join(map(str, sorted(prompts)))} prompts")


def _numbers(values: list) -> bool:
    return isinstance(values, list) and all(type(value) in (int, float) for value in values)


def pending(trials: Iterable[Trial], evaluations: Evaluations) -> dict[str, Trial]:
    """What is left to evaluate, once each; same weights asked for by two interventions are one evaluation."""
    left: dict[str, Trial] = {}
    for trial in trials:
        if (key := trial.edit.key()) not in evaluations.done:
            left.setdefault(key, trial)
    return left


def evaluate_trials(
    model: EditableModel,
    left: dict[str, Trial],
    evaluations: Evaluations,
    validate: Callable[[], Evaluation],
    *,
    write: bool = True,
) -> None:
    """Every trial of `left` in turn; an exception or Ctrl-C leaves the base in `model` and the finished ones noted.

    Args:
        validate: scores the model as it is now.
        write: whether this process keeps the file and shows the progress.
    """
    with tqdm(left.items(), unit=" models", disable=not write) as bar:
        for key, trial in bar:
            bar.set_description(" ".join(filter(None, (trial.intervention, trial.edit.trajectory))))
            with model.edited(trial.edit):
                evaluation = validate()
            evaluations.add(key, evaluation, write)
            bar.set_postfix({m: f"{mean(v):.4g}" for m in METRICS if (v := getattr(evaluation, m)) is not None})


def rows_of(trials: Iterable[Trial], evaluations: Evaluations, metric: str) -> list[dict]:
    """One row per trial: means over prompts with their standard errors, and the gain over the base.

    `gain` is of the score (accuracy, or minus the KL); `recovered` is the gain over that of the trajectory's final
    model, None where that gained nothing, or no more than other prompts might take away. Both compare the same prompts,
    and so do their errors.
    """
    trials = list(trials)
    base = evaluations.done["base"].score(metric)

    def gains_of(trial: Trial) -> list[float]:
        return [x - y for x, y in zip(evaluations.done[trial.edit.key()].score(metric), base, strict=True)]

    whole = {trial.edit.trajectory: gains_of(trial) for trial in trials if trial.intervention == "final"}
    rows = []
    for trial in trials:
        found, gains = evaluations.done[trial.edit.key()], gains_of(trial)
        row = {"intervention": trial.intervention, "trajectory": trial.edit.trajectory, **trial.about}
        row |= {MEASURED: mean(gains), "gain_se": standard_error(gains)}
        row["recovered"], row["recovered_se"] = ratio(gains, whole.get(trial.edit.trajectory))
        for name in METRICS:
            if (values := getattr(found, name)) is not None:
                row |= {name: mean(values), f"{name}_se": standard_error(values)}
                row[f"{name}_low"], row[f"{name}_high"] = bounds(values, name == "accuracy")
        rows.append(row | {"tokens": found.tokens, "seconds": found.seconds})
    return rows


def ratio(values: list[float], reference: list[float] | None) -> tuple[float | None, float | None]:
    """mean(values) / mean(reference) and its standard error, both to first order (delta method); None where the
    reference is not positive, its interval of 95 % reaches 0, or either is NaN: a share of that could be any number.
    """
    if not (reference and mean(reference) > Z * standard_error(reference)):  # so asked, NaN is refused
        return None, None
    share = mean(values) / mean(reference)
    return share, standard_error([v - share * r for v, r in zip(values, reference, strict=True)]) / mean(reference)


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def standard_error(values: list[float]) -> float:
    """Of the mean, over prompts; NaN for one prompt."""
    if len(values) < 2:
        return math.nan
    centre = mean(values)
    return math.sqrt(sum((v - centre) ** 2 for v in values) / (len(values) - 1) / len(values))


def bounds(values: list[float], proportion: bool) -> tuple[float, float]:
    """The interval of 95 % around their mean; NaN for one prompt. Wilson's for a proportion, values that can only be 0
    or 1, so that it stays between them and keeps a width where all are equal (Brown, Cai & DasGupta 2001).
    """
    centre, n = mean(values), len(values)
    if proportion and set(values) <= {0, 1}:  # NaN is neither
        shrunk = 1 + Z * Z / n
        middle = (centre + Z * Z / (2 * n)) / shrunk
        spread = Z / shrunk * math.sqrt(centre * (1 - centre) / n + (Z / (2 * n)) ** 2)
        return max(middle - spread, 0.0), min(middle + spread, 1.0)
    spread = Z * standard_error(values)
    return centre - spread, centre + spread
