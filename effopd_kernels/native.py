"""The C++ extension, where it was built."""

import functools
import warnings

import torch

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # those of the kernels, in the order of csrc/cpu.h


@functools.cache
def native():
    """The module, or None (said once) where there is none: then plain PyTorch serves the CPU."""
    try:
        from . import _C
    except ImportError:
        warnings.warn(
            "effopd_kernels was installed without its C++ extension, so CPU kernels run as plain PyTorch, many times "
            "slower; reinstall with a C++17 compiler present to build it",
            RuntimeWarning,
            stacklevel=2,
        )
        return None
    return _C
