"""What a run keeps to its end: settings that a checkpoint notes, and a run that is resumed has to have."""

import json
import logging
import math
from pathlib import Path
from typing import Any

import torch

from ..commands import json_object
from ..errors import UserError
from .config import OPDConfig

SETTINGS_NAME = "settings.json"  # inside each checkpoint folder
# Whether it extrapolates, what held-out prompts are drawn and scored with, and what comes back with the optimizer's
# state, whatever is given.
KEPT = (
    "effopd_enabled", "seed", "eval_metric", "learning_rate", "weight_decay", "adam_beta1", "adam_beta2",
    "adam_epsilon", "optim", "optim_args", "eval_temperature",
)  # fmt: skip
PROMPTS = "prompts_per_step"  # kept too, whatever it is made of: the place in the data is counted in steps
TEACHER = "teacher"  # by its name, which is another where the folder has moved
logger = logging.getLogger(__name__)


def write_settings(folder: Path, args: OPDConfig, teacher: torch.nn.Module) -> None:
    given = _settings(args) | {TEACHER: _name(teacher)}
    (folder / SETTINGS_NAME).write_text(json.dumps({name: given[name] for name in (*KEPT, PROMPTS, TEACHER)}))


def compare_teachers(checkpoint: Path, teacher: torch.nn.Module) -> None:
    """Warns where the run that goes on from `checkpoint` has learnt from a teacher of another name."""
    file = checkpoint / SETTINGS_NAME
    was, got = json_object(file).get(TEACHER) if file.is_file() else None, _name(teacher)
    if was and got and was != got:
        logger.warning(
            "checkpoint '%s' learnt from the teacher '%s', and goes on with '%s': if that is another model, begin "
            "another run with the checkpoint as its student",
            *(checkpoint, was, got),
        )


def _name(model: torch.nn.Module) -> str:
    """Where a model was loaded from; empty if it was made otherwise."""
    name = model.config._name_or_path
    return str(Path(name).resolve()) if name and Path(name).is_dir() else name


def check_settings(checkpoint: Path, args: OPDConfig) -> None:
    """Raises UserError where a run cannot go on from `checkpoint` with what `args` ask for. Another learning rate, say,
    would not be used, but be what the run's summary says; nor from one of the weights alone, which would go on with
    another optimizer and other random numbers."""
    if not any(checkpoint.glob("rng_state*.pth")):
        raise UserError(
            f"checkpoint '{checkpoint}' was saved with --save_only_model, without the optimizer's state that a resumed "
            "run goes on with: begin another run with the checkpoint as its student"
        )
    file = checkpoint / SETTINGS_NAME
    given = _settings(args)
    for name, was in json_object(file).items() if file.is_file() else ():
        if (got := given.get(name, was)) == was:  # another version may keep what this one does not know
            continue
        made = keep = f"--{name} {was}"
        if name == PROMPTS:
            batch, steps, processes = _factors(args)
            made = f"{was} prompts a step"
            got = f"{got} (--per_device_train_batch_size {batch} × --gradient_accumulation_steps {steps} × processes: "
            got += f"{processes})"
            more, rest = divmod(was, batch * processes)
            keep = f"--gradient_accumulation_steps {more}" if rest == 0 else f"factors that make {was}"
        raise UserError(
            f"checkpoint '{checkpoint}' was made with {made}, which a resumed run keeps, got {got}: resume with "
            f"{keep}, or begin another run with the checkpoint as its student"
        )


def _settings(args: OPDConfig) -> dict[str, Any]:
    return {**args.to_dict(), "eval_temperature": args.validation_temperature, PROMPTS: math.prod(_factors(args))}


def _factors(args: OPDConfig) -> tuple[int, int, int]:
    """Of the prompts that a step takes, as TRL counts them."""
    return args.per_device_train_batch_size, args.gradient_accumulation_steps, args.world_size
