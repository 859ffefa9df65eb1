"""Figures drawn by a second process, which imports matplotlib while this one imports PyTorch, and draws while this one
writes tables.

It is told on its stdin what to draw, and ends when it has drawn that or when its stdin is closed: whatever ends this
process, it is not left waiting. A Ctrl-C at the terminal is this process's alone, which then kills it.

A system that starts no second process, or loses it, is done without: this one draws.
"""

import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from . import figures

_PROGRAM = "import sys; sys.path[:] = sys.argv[1:]; from effopd_kernels.analysis.painter import paint; paint()"
Job = tuple[figures.Picture, Path, str]  # a picture, and the folder and name of its files


class Painter:
    """Draws in a second process within ``with painter:``, and otherwise in this one."""

    def __init__(self) -> None:
        self.process: subprocess.Popen | None = None

    def __enter__(self) -> "Painter":
        command = [sys.executable, "-c", _PROGRAM, *sys.path]
        pipe = subprocess.PIPE
        with suppress(OSError):
            self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, start_new_session=True)
        return self

    def __exit__(self, *_: object) -> None:
        if self.process:
            with suppress(BrokenPipeError), self.process:  # closes the pipes
                self._kill()  # it has drawn, or is not to
        self.process = None

    @contextmanager
    def drawing(self, jobs: Sequence[Job]) -> Iterator[None]:
        """Draw and `figures.save` these while the block is at work, and raise what that raises."""
        try:
            with suppress(BrokenPipeError):  # killed, as by a system that is short of memory
                if self.process:
                    pickle.dump(jobs, self.process.stdin)
                    self.process.stdin.flush()
            yield
            answer = self.process.stdout.read() if self.process else b""
            if not answer:
                _draw(jobs)
            elif error := pickle.loads(answer):
                raise error
        except BaseException:
            if self.process:  # or it would go on writing into what is cleared away now
                self._kill()
            raise

    def _kill(self) -> None:
        if hasattr(os, "killpg"):
            with suppress(ProcessLookupError):  # gone by itself
                if self.process.poll() is None:
                    os.killpg(self.process.pid, signal.SIGKILL)  # with the copy that draws the other half
        self.process.kill()
        self.process.wait()


def paint() -> None:
    """What the second process does."""
    sys.stdout, answer = sys.stderr, sys.stdout.fileno()
    figures.lines({}, "", "").draw()  # imports what it takes
    error = None
    try:
        _draw_in_halves(pickle.load(sys.stdin.buffer))
    except EOFError:  # nothing to draw
        return
    except Exception as raised:
        error = raised
    with suppress(BrokenPipeError):  # whoever asked has gone
        os.write(answer, pickle.dumps(error))


def _draw_in_halves(jobs: Sequence[Job]) -> None:
    """Half of it by a copy of this process, if the system makes one; what the copy fails at is tried again here."""
    copy = None
    with suppress(AttributeError, OSError):  # Windows has none; there may be no room for one
        copy = os.fork()
    if copy == 0:
        try:
            _draw(jobs[1::2])
            os._exit(0)
        finally:
            os._exit(1)
    failed = True
    try:
        _draw(jobs[::2])
    finally:
        if copy is not None:
            failed = os.waitpid(copy, 0)[1] != 0
    if failed:
        _draw(jobs[1::2])


def _draw(jobs: Sequence[Job]) -> None:
    for picture, folder, name in jobs:
        figures.save(picture.draw(), folder, name)
