"""Stop signals become KeyboardInterrupt, at once or, with several processes, when all have agreed."""

import signal
import threading
from contextlib import contextmanager


class Interrupts:
    """Handles SIGINT and SIGTERM during training.

    Args:
        immediate: True raises KeyboardInterrupt where the signal finds the program. False only sets `pending`: a
            process that left a collective operation alone would leave the others waiting, so the caller asks all of
            them first.
    """

    def __init__(self, immediate: bool):
        self.immediate = immediate
        self.pending = False

    def _handle(self, signum, frame):
        if self.immediate:
            raise KeyboardInterrupt
        self.pending = True

    @contextmanager
    def installed(self):
        """Handle signals for the duration; outside the main thread Python delivers none, and this does nothing."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        saved = {s: signal.signal(s, self._handle) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield self
        finally:
            for s, handler in saved.items():
                signal.signal(s, handler)
