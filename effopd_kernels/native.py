"""What the kernels are written in, where it is there: the C++ extension and Triton."""

import warnings
from importlib.util import find_spec

import torch

try:
    from . import _C
except ImportError as error:
    _C = None
    _unsaid = iter(
        [
            "effopd_kernels was installed without its C++ extension, so CPU kernels run as plain PyTorch, many times "
            f"slower; reinstall with a C++17 compiler present to build it ({error})"
        ]
    )
else:
    _unsaid = iter(())

TRITON = find_spec("triton") is not None  # found, not imported: that takes a second, and only CUDA needs it

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # those of the kernels, in the order of csrc/cpu.h


def native():
    """The module, or None where there is none: then plain PyTorch serves the CPU. That is said by the first call, so
    once whatever becomes of the warning and in however many threads, and never to those who compute on a GPU.
    """
    for message in _unsaid:
        warnings.warn(message, RuntimeWarning, stacklevel=2)
    return _C


def has_products() -> bool:
    """Whether the extension is there and has matrix products of its own for this processor: from AVX2 on."""
    return native() is not None and native().num_multipliers() > 0
