"""What a run keeps to its end: settings that a checkpoint notes, and a run that is resumed has to have."""

import json
import logging
import math
from pathlib import Path
from typing import Any
from zlib import crc32

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
NOTED = "noted"  # what a run should keep, though it may go by another name, as a folder that has moved
logger = logging.getLogger(__name__)


def write_settings(folder: Path, args: OPDConfig, noted: dict[str, str]) -> None:
    given = _settings(args)
    kept = {name: given[name] for name in (*KEPT, PROMPTS)}
    (folder / SETTINGS_NAME).write_text(json.dumps({**kept, NOTED: noted}))


def note(teacher: torch.nn.Module, prompts: dict[str, list]) -> dict[str, str]:
    """Where a teacher was loaded from, empty if it was made otherwise, and checksums of the held-out prompts."""
    name = teacher.config._name_or_path
    sums = {what: f"{len(rows)} prompts of checksum {crc32(repr(rows).encode()):08x}" for what, rows in prompts.items()}
    return {"teacher": str(Path(name).resolve()) if name and Path(name).is_dir() else name, **sums}


def compare_noted(checkpoint: Path, noted: dict[str, str]) -> None:
    """Warns where the run that goes on from `checkpoint` had another of what is noted: its curve would be of two."""
    file = checkpoint / SETTINGS_NAME
    was = json_object(file).get(NOTED, {}) if file.is_file() else {}
    for what, got in noted.items():
        if got and was.get(what) not in (None, "", got):
            logger.warning(
                "checkpoint '%s' was made with %s '%s', and goes on with '%s': if that is another, begin another run "
                "with the checkpoint as its student",
                *(checkpoint, what, was[what], got),
            )


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
