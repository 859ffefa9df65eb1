"""What the two commands share: output on any terminal, exit codes, one sentence for an error however many ranks find
it, signals, a full disk, a damaged JSON file, a quiet way out."""

import json
import os
import signal
import sys
import threading
import time
import traceback
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from .errors import UserError, one_line

if TYPE_CHECKING:
    import torch.distributed as dist

EXIT_USER_ERROR, EXIT_INTERRUPTED = 2, 130


def print_anywhere() -> None:
    """A character that the encoding of stdout lacks is printed as a ?, not refused: an α in a help, an é in a path."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")


def leave_stdout() -> None:
    """After a write to it failed: what Python still flushes as it exits goes to the null device, and fails no more."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextmanager
def printed_and_done() -> Iterator[None]:
    """Exits with code 0 after the block, quietly if the reader has closed the pipe, as in `--help | head`."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        leave_stdout()
    raise SystemExit(0)


def refused(command: str, why: str) -> int:
    """Say on stderr what was wrong with what was given, on one rank of those that found it; returns the exit code."""
    if _first_to_say(why):
        print(f"{command}: error: {why}", file=sys.stderr, flush=True)
    return EXIT_USER_ERROR


def interrupted(command: str, advice: str = "") -> int:
    """Say so on stderr, on one rank for all, which were too; returns the exit code."""
    if os.environ.get("RANK", "0") == "0":
        print(f"{command}: interrupted{advice}", file=sys.stderr)
    return EXIT_INTERRUPTED


def _first_to_say(message: str) -> bool:
    """Whether this rank is the first to report `message`, so that what all ranks find wrong is printed once, and what
    only one of them finds is printed, too. Counted in the launcher's store: a collective would wait for ranks that may
    be waiting for this one elsewhere."""
    try:
        store = _store()
        store.add("effopd said", 1)
        return store.add(f"effopd said {zlib.crc32(message.encode())}", 1) == 1
    except Exception:  # alone, or the store went with its host: twice is better than never
        return True


def something_was_said() -> bool:
    """Whether some rank has reported an error: a failed collective on this one is then only a consequence of it."""
    try:
        return _store().add("effopd said", 0) > 0
    except Exception:
        return False


def _store() -> "dist.Store":
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        raise RuntimeError("alone")
    import torch.distributed as dist

    return next(dist.rendezvous("env://", timeout=timedelta(seconds=10)))[0]


@contextmanager
def handled(handler: Callable[..., None], *numbers: signal.Signals) -> Iterator[None]:
    """The block's signals of these numbers are `handler`'s. Python has signals in the main thread only; a handler that
    it did not set stays, for it could not be put back."""
    before = {}
    if threading.current_thread() is threading.main_thread():
        before = {n: signal.signal(n, handler) for n in numbers if signal.getsignal(n) is not None}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


@contextmanager
def written(output_dir: str | Path) -> Iterator[None]:
    """What the system refuses in the block, such as room on a full disk, is a UserError that names `output_dir`."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        why = getattr(error, "strerror", None)
        if why is None and type(error) in (OSError, SafetensorError):  # a library's; those of a network are subclasses
            why = one_line(error)
        *_, (last, _) = traceback.walk_tb(error.__traceback__)
        if last.f_globals["__name__"] == "torch.serialization":  # torch.save has many words for it, none of them these
            why = "the disk is full, or does not take a file this long"
        if why is None:
            raise
        raise UserError(f"--output_dir '{output_dir}' could not be written: {why}") from error


def json_object(file: Path) -> dict[str, Any]:
    """The object that a file holds; a UserError where it holds anything else."""
    try:
        found = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # the last of brackets in brackets in brackets
        why = getattr(error, "strerror", None) or one_line(error, 200)
        raise UserError(f"'{file}' is unreadable: {why}") from error
    if not isinstance(found, dict):
        raise UserError(f"'{file}' is unreadable: it holds no JSON object")
    return found


def leave_process_group() -> None:
    """Ends a command that succeeded on several ranks. A gloo worker drops its last tensors a moment after the last
    collective, which needs the interpreter alive: else the run ends in SIGABRT (pytorch/pytorch#179291)."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
        time.sleep(0.2)
