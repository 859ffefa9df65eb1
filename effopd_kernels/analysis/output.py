"""A folder that appears whole or not at all, whatever ends the command, and what is said beside it."""

import contextlib
import os
import platform
import re
import shutil
import signal
import sys
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

from ..commands import handled, leave_stdout, written
from ..errors import UserError
from ..extrapolation.adapters import COMPANION


def say(notes: Iterable[str]) -> None:
    """What a reader must know, while the report is yet to come."""
    with contextlib.suppress(OSError):  # as in `answer`
        for note in notes:
            print(f"effopd-analyze: {note}", file=sys.stderr)


def answer(text: str) -> None:
    """Say on stdout what was asked for. That nobody reads it, or the disk it goes to is full, undoes no work."""
    try:
        print(text, flush=True)
    except OSError:
        leave_stdout()


def check_free(output_dir: str | Path, overwrite: bool = False, inputs: Iterable[str | Path] = ()) -> None:
    """Raises UserError when ``output_dir`` cannot be a folder or be written to, is or holds one of ``inputs`` (what is
    no file or folder is passed over), or holds something and may not be overwritten.

    A folder inside an input may be written: analyses are kept beside the weights, and only what it holds is replaced.
    """
    if not str(output_dir):
        raise UserError("--output_dir is empty; give a folder")
    folder = Path(output_dir)
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(path))
    if not there.is_dir():
        kind = "a file" if there.exists() else "a link that leads nowhere"
        raise UserError(f"--output_dir '{folder}' cannot be made: {there} is {kind}; give another folder")
    for given in map(Path, inputs):
        for read in (given, given / COMPANION):  # an adapter's second folder
            if read.exists() and folder.resolve() in (read.resolve(), *read.resolve().parents):
                raise UserError(f"--output_dir '{folder}' is or holds '{read}', which is read; give another folder")
    _clear_abandoned(folder.absolute())
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise UserError(
            f"--output_dir '{folder}' exists and is not empty; give another folder, or --overwrite_output_dir to "
            "replace the analysis in it"
        )
    probe = there / _partial_name(folder.absolute())
    try:
        probe.mkdir(exist_ok=True)
        probe.rmdir()
    except OSError as error:
        raise UserError(
            f"--output_dir '{folder}' cannot be written: {error.strerror} in {there}; give another folder"
        ) from error


def _partial_name(folder: Path) -> str:
    return f".{folder.name}.{platform.node()}.{os.getpid()}.partial"


def _clear_abandoned(folder: Path) -> None:
    """Remove what `whole_folder` began in a process of this machine that was killed."""
    ours = re.escape(f".{folder.name}.{platform.node()}.")
    for place in (folder, folder.parent):
        for partial in place.glob(".*.partial"):
            began = re.fullmatch(rf"{ours}(\d+)\.partial", partial.name)
            if began and not _runs(int(began[1])):
                shutil.rmtree(partial, ignore_errors=True)


def _runs(pid: int) -> bool:
    """Whether there is such a process, this one apart: in a container every run may have the same number."""
    if os.name == "nt":  # where 0 is no question but Ctrl-C
        return True
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return pid != os.getpid()


def terminated_as_interrupted() -> contextlib.AbstractContextManager[None]:
    """SIGTERM is what Ctrl-C is, so that what was begun is cleared away."""
    return handled(signal.default_int_handler, signal.SIGTERM)


@contextlib.contextmanager
def not_left_empty(output_dir: str | Path) -> Iterator[None]:
    """Folders that the block makes down to ``output_dir`` go again if nothing was written."""
    folder = Path(output_dir).absolute()
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        yield
    finally:
        for path in made:
            with contextlib.suppress(OSError):  # not empty, or never made
                path.rmdir()


@contextlib.contextmanager
def whole_folder(output_dir: str | Path, parts: Collection[str]) -> Iterator[Path]:
    """A temporary folder: it becomes ``output_dir`` when the block ends well and is removed when not. A folder that is
    there stays, for it may be a link, a mounted disk or where the user is; of what it holds ``parts`` are replaced, the
    names that the new one may have.

    Raises:
        UserError: the disk is full or cannot be written.
    """
    folder = Path(output_dir).absolute()
    with written(output_dir), not_left_empty(output_dir):
        filled = folder.is_dir()
        partial = (folder if filled else folder.parent) / _partial_name(folder)
        try:
            partial.mkdir(parents=True)
            yield partial
            if not filled:
                os.replace(partial, folder)
                return
            for old in (folder / part for part in parts):
                shutil.rmtree(old) if old.is_dir() and not old.is_symlink() else old.unlink(missing_ok=True)
            for part in partial.iterdir():
                part.replace(folder / part.name)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
