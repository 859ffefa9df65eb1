"""Checkpoints that appear whole or not at all, and can be told from damaged ones.

A checkpoint is written under another name, gets a manifest of its files' sizes and CRC-32, and is then renamed. A
process killed at any moment leaves the folder it was writing unpublished, and one that it was replacing readable under
`checkpoint-N.replaced`; a file truncated or altered later no longer agrees with the manifest.
"""

import json
import logging
import math
import re
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..commands import json_object
from ..errors import UserError
from ..extrapolation.checkpoint import crc32
from ..tensor_files import FileCheckpoint
from .config import OPDConfig

MANIFEST = "manifest.json"
STAGING = ".saving-"
REPLACED = ".replaced"
SETTINGS_NAME = "settings.json"  # inside each checkpoint folder
# What a run keeps to its end: whether it extrapolates, what held-out prompts are drawn and scored with, and what comes
# back with the optimizer's state, whatever is given.
KEPT = (
    "effopd_enabled", "seed", "eval_metric", "learning_rate", "weight_decay", "adam_beta1", "adam_beta2",
    "adam_epsilon", "optim", "optim_args",
)  # fmt: skip
PROMPTS = "prompts_per_step"  # kept too, whatever it is made of: the place in the data is counted in steps
logger = logging.getLogger(__name__)


def load_renamed(model: PreTrainedModel, folder: str | Path) -> bool:
    """Load a checkpoint whose tensors have other names than the model's, as those of mixtures of experts, GPT-NeoX and
    Nemotron-H have; False, and nothing done, where all names are alike.

    transformers' Trainer reads by name alone (5.23), and leaves tensors of other names as they were: the base's.
    """
    try:
        saved = FileCheckpoint(folder).shapes.keys()
    except FileNotFoundError:
        return False
    own = model.state_dict()
    read = {t.data_ptr() for name, t in own.items() if name in saved}  # under one of their names, where they are tied
    if all(t.data_ptr() in read for t in own.values()):
        return False
    wide = torch.promote_types(model.dtype, torch.float32)  # rounds nothing, should dtypes be mixed
    model.load_state_dict(type(model).from_pretrained(folder, dtype=wide).state_dict())
    return True


def check_rank(checkpoint: str | Path, student: torch.nn.Module) -> None:
    """Raises UserError where the student's adapter is not as long as the checkpoint's: when training ends, it takes up
    its jumps (`EffOPDController.fold_`), and what was saved before does not fit any more."""
    config, adapters = Path(checkpoint) / "adapter_config.json", getattr(student, "peft_config", None)
    if not adapters or not config.is_file():
        return
    there, here = json_object(config).get("r"), getattr(adapters[student.active_adapters[0]], "r", None)
    if there != here:
        raise UserError(
            f"checkpoint '{checkpoint}' has an adapter of rank {there}, the student's is of rank {here}; if jumps made "
            "it longer when training ended, resume with model and trainer constructed anew"
        )


def checkpoint_name(step: int | str) -> str:
    return f"{PREFIX_CHECKPOINT_DIR}-{step}"


def publish(staged: Path, final: Path) -> None:
    """Give `staged` its manifest and the name `final`, which may exist and is then replaced."""
    files = [p for p in sorted(staged.rglob("*")) if p.is_file() and p.name != MANIFEST]
    manifest = {str(p.relative_to(staged)): [p.stat().st_size, crc32(p)] for p in files}
    (staged / MANIFEST).write_text(json.dumps(manifest, indent=1))
    if final.exists():
        aside = final.with_name(final.name + REPLACED)
        remove(aside)
        final.rename(aside)  # two directories cannot be swapped in one go everywhere; `newest_intact` knows this name
    staged.rename(final)
    for replaced in checkpoints(final.parent):
        if replaced.name.endswith(REPLACED):
            with suppress(OSError):
                remove(replaced)


def remove(path: Path) -> None:
    """A folder with all that is in it, a file, or of a link the link alone; nothing where there is none."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a published checkpoint, naming the file; None if it is whole."""
    if not (checkpoint / MANIFEST).is_file():
        return f"'{checkpoint}' is not a checkpoint of effopd-train: it has no {MANIFEST}"
    try:
        listed = [(name, size, crc) for name, (size, crc) in json_object(checkpoint / MANIFEST).items()]
    except UserError as e:
        return str(e)
    except (ValueError, TypeError):
        return f"'{checkpoint / MANIFEST}' is unreadable: it does not list files with their sizes"
    for name, size, crc in listed:
        file = checkpoint / name
        if not file.is_file():
            return f"'{file}' is missing"
        if file.stat().st_size != size:
            return f"'{file}' has {file.stat().st_size} bytes instead of {size}"
        if crc32(file) != crc:
            return f"'{file}' was altered"
    return None


def write_settings(folder: Path, args: OPDConfig) -> None:
    given = _settings(args)
    (folder / SETTINGS_NAME).write_text(json.dumps({name: given[name] for name in (*KEPT, PROMPTS)}))


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
    return {**args.to_dict(), PROMPTS: math.prod(_factors(args))}


def _factors(args: OPDConfig) -> tuple[int, int, int]:
    """Of the prompts that a step takes, as TRL counts them."""
    return args.per_device_train_batch_size, args.gradient_accumulation_steps, args.world_size


def _found(output_dir: Path) -> dict[Path, tuple[int, bool]]:
    """Folder → its step, and whether it is the one that counts or one that was being replaced."""
    name = rf"{PREFIX_CHECKPOINT_DIR}-(\d+)({re.escape(REPLACED)})?"
    return {p: (int(m[1]), not m[2]) for p in output_dir.glob("*") if (m := re.fullmatch(name, p.name))}


def checkpoints(output_dir: Path) -> list[Path]:
    """Those in `output_dir`, whole or not, without what only has the name of one."""
    told_by = (MANIFEST, TRAINER_STATE_NAME)
    return [p for p in _found(output_dir) if any((p / name).is_file() for name in told_by)]


def unpublished(output_dir: Path) -> list[Path]:
    """What processes that were killed had been writing."""
    return [p for p in output_dir.glob(f"{STAGING}*") if re.fullmatch(rf"{re.escape(STAGING)}\d+", p.name)]


def saved_steps(output_dir: Path) -> list[int]:
    """The steps of the checkpoints in `output_dir`, whole or not."""
    return sorted(step for step, counts in _found(output_dir).values() if counts)


def newest_intact(output_dir: Path) -> Path:
    """The newest checkpoint in `output_dir` that is whole; damaged ones are named in a warning and passed over.

    Raises:
        UserError: there is none.
    """
    steps = _found(output_dir)
    for checkpoint in sorted(steps, key=steps.get, reverse=True):
        if (wrong := damage(checkpoint)) is None:
            return checkpoint
        logger.warning("%s; going on from the checkpoint before it", wrong)
    raise UserError(f"--resume_from_checkpoint: '{output_dir}' holds no {'intact ' if steps else ''}checkpoint")
