"""The folder a run writes to: nobody else's, seen by all ranks, and written over only on request.

One run at a time has it: two would replace and remove each other's checkpoints.
"""

import errno
import os
import platform
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from transformers import TrainerCallback

from ..commands import written
from ..errors import UserError
from ..extrapolation.adapters import COMPANION
from .checkpoint import checkpoints, remove
from .config import OPDConfig
from .options import DataArguments
from .report import METRICS_NAME, SUMMARY_NAME

try:
    import fcntl
except ImportError:  # Windows: nobody is kept out
    fcntl = None

# In the folder while a run is, by a name that is not pushed to the hub; the system unlocks what a killed run leaves
# behind, once processes that it forked have ended, too.
LOCK_NAME = "_lock"
_held: set[Path] = set()  # folders, by this process
SAVED_MODEL = (  # files of a saved student, which go when a run is written over
    "model.safetensors", "model.safetensors.index.json", "model-{0}-of-{0}.safetensors".format("[0-9]" * 5),
    *(f"{f}adapter_{n}" for f in ("", f"{COMPANION}/") for n in ("config.json", "model.safetensors")),
)  # fmt: skip


def check_output_dir(folder: Path, write_over: bool, go_on: str = "") -> None:
    """A folder in use is resumed or overwritten on request, never by accident; one that cannot be written is said now,
    not when there is something to write. `go_on`: how to resume a run in it, if that can be."""
    with written(folder):  # a name may be too long to ask for
        missing = [p for p in (folder, *folder.absolute().parents) if not p.exists()]
    there = next(p for p in (folder, *folder.absolute().parents) if p not in missing)
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise UserError(
            f"--output_dir '{folder}' cannot be written: '{there}' is "
            + ("read-only" if there.is_dir() else "not a folder")
        )
    with written(folder):  # some do not let one make a folder there, whatever their permissions say
        folder.mkdir(parents=True, exist_ok=True)
        for made in missing:
            with suppress(OSError):
                made.rmdir()
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if LOCK_NAME in names:
        release(acquire(folder), folder)  # another run that is writing there is told of now, not after loading models
    if not write_over and names - {LOCK_NAME}:
        raise UserError(
            f"--output_dir '{folder}' exists and is not empty; pass {go_on}--overwrite_output_dir to write over it, or "
            "another folder"
        )


def check_shared(output_dir: Path) -> None:
    """Raises UserError, the same on every rank, where one does not see what rank 0 writes to `output_dir`: rank 0's
    files and the others' would make no checkpoint that could be resumed from. Leaves no trace, nor makes the folder."""
    if PartialState().num_processes == 1:
        return
    folder, probe, missing, failure = output_dir.absolute(), Path(), (), None
    if PartialState().is_main_process:
        there = next(level for level in (folder, *folder.parents) if level.is_dir())
        probe, missing = there / f".shared-{secrets.token_hex(8)}", folder.relative_to(there).parts
        try:
            with written(output_dir):
                probe.touch()
        except UserError as error:
            failure = error
    try:
        # Ranks may know the one folder by different names, though not what of its path is still to be made.
        name, missing, failure = broadcast_object_list([(probe.name, missing, failure)])[0]
        if failure is not None:
            raise failure
        known = folder.parts[: len(folder.parts) - len(missing)]
        sees = (*known, *missing) == folder.parts and Path(*known, name).exists()
        every = gather_object([(sees, folder, platform.node())])
    finally:
        if PartialState().is_main_process:
            probe.unlink(missing_ok=True)
    for rank, (sees, where, host) in enumerate(every):
        if not sees:
            raise UserError(
                f"--output_dir '{where}' of rank {rank} (on {host}) is not the folder '{every[0][1]}' that rank 0 (on "
                f"{every[0][2]}) writes to: give one folder that all nodes share"
            )


@contextmanager
def sole_run(output_dir: Path) -> Iterator[None]:
    """Keeps other runs out of `output_dir`, which is made; inside another of the same folder, nothing. Raises
    UserError, on every rank, where one is there.
    """
    folder = output_dir.absolute()
    if folder in _held:
        yield
        return
    lock = failure = None
    if PartialState().is_main_process:
        try:
            lock = acquire(output_dir)
        except Exception as error:  # whatever it is, or the others would wait
            failure = error
    (failure,) = broadcast_object_list([failure])
    if failure is not None:
        raise failure
    _held.add(folder)
    try:
        yield
    finally:
        _held.discard(folder)
        if lock is not None:
            release(lock, output_dir)


def acquire(output_dir: Path) -> int:
    """An open file that holds the lock; where the file system has none, one that keeps nobody out."""
    path = output_dir / LOCK_NAME
    while True:
        with written(output_dir):
            output_dir.mkdir(parents=True, exist_ok=True)
            lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        if fcntl is None:
            return lock
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):  # the latter from some network file systems
                os.close(lock)
                raise UserError(
                    f"another run is writing to --output_dir '{output_dir}': wait for its end, or give another folder"
                ) from error
            return lock
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(lock), os.stat(path)):
                return lock
        os.close(lock)  # of a file that the run before has removed since it was opened: no other run would find it


def release(lock: int, output_dir: Path) -> None:
    """The file goes while it is still locked: whoever has opened it meanwhile sees that it is gone, and looks again."""
    with suppress(OSError):
        (output_dir / LOCK_NAME).unlink()
    os.close(lock)


def check_inputs_stay(args: OPDConfig, student: str | None, data: DataArguments) -> None:
    """Raises UserError where writing over an earlier run would remove a model that this one begins with, or prompts."""
    if not args.overwrite_output_dir:
        return
    gone = [path.resolve() for path in _abandoned(args)]
    for name in filter(None, (student, args.teacher_model_name_or_path)):
        folder = Path(name).resolve()
        if any(path in (folder, *folder.parents) or path.parent == folder for path in gone):
            raise UserError(f"--overwrite_output_dir would remove '{name}': choose another --output_dir")
    gone += [Path(args.output_dir, name).resolve() for name in (METRICS_NAME, SUMMARY_NAME)]
    for name in filter(None, (data.dataset_name, data.eval_dataset_name, data.val_dataset_name)):
        file = Path(name).resolve()
        if any(path in (file, *file.parents) for path in gone):
            raise UserError(f"--overwrite_output_dir would write over '{name}': choose another --output_dir")


def _abandoned(args: OPDConfig) -> list[Path]:
    """What goes of an earlier run that is written over. Its checkpoints: their steps may lie beyond this run's, and
    resuming and `save_total_limit` would take them for the newer ones. Its saved model: an adapter beside new weights,
    or shards beside a single file, would be loaded with them or in their place."""
    if args.resume_from_checkpoint:
        return []
    folder = Path(args.output_dir)
    saved = (path for pattern in SAVED_MODEL for path in folder.glob(pattern) if path.is_file())
    return [*checkpoints(folder), *saved]


class WriteOver(TrainerCallback):
    """Removes what an earlier run left: when training begins, after all that can be refused has been."""

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            for path in _abandoned(args):
                remove(path)
