"""What a run has cost so far."""

import time
from contextlib import contextmanager


class Ledger:
    """Tokens over all ranks and seconds of training, across resumes.

    Attributes:
        train_tokens: completion tokens generated for training.
    """

    def __init__(self):
        self.train_tokens = 0
        self._seconds = 0.0
        self._running_since: float | None = None

    def start(self) -> None:
        self._running_since = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Seconds of training, scoring of candidates included, held-out evaluation and checkpointing excluded."""
        running = 0.0 if self._running_since is None else time.perf_counter() - self._running_since
        return self._seconds + running

    @contextmanager
    def off_the_clock(self):
        """Time spent inside does not count."""
        was_running = self._running_since is not None
        self._seconds, self._running_since = self.seconds, None
        try:
            yield
        finally:
            if was_running:
                self.start()

    def state_dict(self) -> dict[str, float]:
        return {"train_tokens": self.train_tokens, "seconds": self.seconds}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.train_tokens, self._seconds = state["train_tokens"], state["seconds"]
