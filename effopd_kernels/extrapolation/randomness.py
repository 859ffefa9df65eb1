"""What an evaluation must leave as training had it: random numbers, the same for every candidate, and modules' modes.

Each evaluation starts from the generators' state at the start of the event, and leaves them there: candidates are
compared on equal draws, and a run with EffOPD draws the training data it would have drawn without.
"""

import random
import sys
from contextlib import contextmanager

import torch
from torch import nn


class SameRandomness:
    """Captures torch (CPU and initialised CUDA devices), `random` and, if loaded, numpy."""

    def __init__(self):
        self._torch = torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
        self._python = random.getstate()
        self._numpy = sys.modules["numpy"].random.get_state() if "numpy" in sys.modules else None

    @contextmanager
    def rewound(self):
        self.rewind()
        try:
            yield
        finally:
            self.rewind()

    def rewind(self) -> None:
        torch.set_rng_state(self._torch)
        if self._cuda is not None:
            torch.cuda.set_rng_state_all(self._cuda)
        random.setstate(self._python)
        if self._numpy is not None:
            sys.modules["numpy"].random.set_state(self._numpy)


@contextmanager
def modes_kept(module: nn.Module | None):
    """Afterwards every part of module is in the mode, train or eval, that it was in."""
    modes = [(part, part.training) for part in module.modules()] if module is not None else []
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training
