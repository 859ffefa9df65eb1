"""Ctrl-C and SIGTERM wait while weights are being written.

A signal raises its exception between any two bytecodes, so also between two tensors of a write, or inside the `except`
that would repair it. Inside `Deferred` signals are therefore kept and delivered at the end, except within `open()`,
where the caller has already prepared to be interrupted.
"""

import signal
import threading
from contextlib import contextmanager


class Deferred:
    """Context manager: SIGINT and SIGTERM are held back inside, but let through inside `open()`.

    Python runs signal handlers in the main thread only; elsewhere this does nothing. Nor does it hold back a signal
    that Python has no handler for: the default action ends the process, and no weights are left half written; and a
    handler that C code has set (`faulthandler.register`) could not be put back. One that C code has set over a handler
    of Python's is lost, for Python goes on to report its own.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __enter__(self) -> "Deferred":
        self._previous, self._pending, self._open, self._over = {}, [], False, False
        if threading.current_thread() is threading.main_thread():
            for number in self.SIGNALS:
                if callable(signal.getsignal(number)):
                    self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *exception) -> None:
        self._over = True
        try:
            self._restore()
        finally:  # interrupted by one that came just now
            try:
                self._restore()
            finally:
                _raise_all(self._pending)

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    @contextmanager
    def open(self):
        """Let signals through, first those that waited. The one that raises closes the block behind it."""
        self._open = True
        try:
            while self._pending:
                self._deliver(self._pending.pop(0), None)
            yield
        finally:
            self._open = False

    def _receive(self, number, frame) -> None:
        if self._open or self._over:
            self._deliver(number, frame)
        else:
            self._pending.append(number)

    def _deliver(self, number, frame) -> None:
        # Closed before the handler runs: a second Ctrl-C must not interrupt the clean-up after the first.
        self._open = False
        self._previous[number](number, frame)
        self._open = True


def _raise_all(numbers: list[int]) -> None:
    """Each, whatever the handlers of those before it raise."""
    if numbers:
        try:
            signal.raise_signal(numbers[0])
        finally:
            _raise_all(numbers[1:])
