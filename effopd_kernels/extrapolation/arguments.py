"""Arguments that come in many forms: numbers of every kind, and sequences."""

import math
from collections.abc import Iterable, Mapping
from numbers import Complex, Real


def as_float(value) -> float:
    """A number of Python's, numpy's or a tensor's as a float; one beyond all floats is infinite.

    Raises TypeError for what is no real number, text that looks like one among it.
    """
    if isinstance(value, (str, bytes)) or (isinstance(value, Complex) and not isinstance(value, Real)):
        raise TypeError(f"{value!r} is no real number")
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf
    except (RuntimeError, ValueError) as error:  # tensors: a complex one, and one of several elements
        raise TypeError(str(error)) from error


def listed(name: str, tensors) -> list:
    """The argument as a list; TypeError unless it is a sequence. Whether it holds tensors is checked later."""
    if not isinstance(tensors, Iterable) or isinstance(tensors, (str, Mapping)):
        raise TypeError(f"{name} must be a sequence of tensors, got a {type(tensors).__name__}")
    return list(tensors)
