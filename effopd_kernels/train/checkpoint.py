"""Checkpoints that appear whole or not at all, and can be told from damaged ones.

A checkpoint is written under another name, gets a manifest of its files' sizes and CRC-32, and is then renamed. A
process killed at any moment leaves the folder it was writing unpublished, and one that it was replacing readable under
`checkpoint-N.replaced`; a file truncated or altered later no longer agrees with the manifest.
"""

import json
import logging
import re
import shutil
from contextlib import suppress
from pathlib import Path

from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..commands import json_object
from ..errors import UserError
from ..extrapolation.checkpoint import crc32

MANIFEST = "manifest.json"
STAGING = ".saving-"
REPLACED = ".replaced"
logger = logging.getLogger(__name__)


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
