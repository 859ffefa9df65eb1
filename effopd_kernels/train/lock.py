"""One run at a time in an output folder: two would replace and remove each other's checkpoints."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from ..commands import written
from .errors import UserError

try:
    import fcntl
except ImportError:  # Windows: nobody is kept out
    fcntl = None

# In the folder while a run is, by a name that is not pushed to the hub; the system unlocks what a killed run leaves
# behind, once processes that it forked have ended, too.
LOCK_NAME = "_lock"
_held: set[Path] = set()  # folders, by this process


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
