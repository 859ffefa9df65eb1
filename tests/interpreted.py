"""Tests of Triton kernels run on the GPU where there is one, and else by Triton's interpreter.

Triton decides at import whether it interprets, and the ahead-of-time tests need it not to. So without a GPU a test
module skips its kernels here and `run_in_interpreter` runs the same file again in a child process.
"""

import os
import subprocess
import sys

import numpy
import pytest
import torch

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"

if INTERPRETING:
    from triton.runtime.interpreter import InterpretedFunction

    whole_call, modules = InterpretedFunction.__call__, set()

    def call_from_a_kernel(self, *args, **kwargs):
        """Triton puts its interpreter in the place of triton.language at every launch, and again wherever one jitted
        function calls another. The first call into a module may need that; by all others nothing is left to put."""
        if self.fn.__module__ in modules:
            return self.rewrite()(*args, **kwargs)
        modules.add(self.fn.__module__)
        return whole_call(self, *args, **kwargs)

    if hasattr(InterpretedFunction, "rewrite"):
        InterpretedFunction.__call__ = call_from_a_kernel  # half of the time of the row kernel's tests


def round_once(monkeypatch) -> None:
    """Lets tl.fma round once in the interpreter too, as it does on a device."""
    if INTERPRETING:
        from triton.runtime import interpreter

        def fma(self, x, y, z):
            exact = x.data.astype(numpy.float64) * y.data + z.data
            return interpreter.TensorHandle(exact.astype(z.data.dtype), z.dtype.scalar)

        monkeypatch.setattr(interpreter.InterpreterBuilder, "create_fma", fma)


needs_kernels = pytest.mark.skipif(not (ON_GPU or INTERPRETING), reason="runs in the interpreter's process")
needs_gpu = pytest.mark.skipif(not ON_GPU, reason="needs a GPU")


def run_in_interpreter(test_file: str) -> None:
    if ON_GPU or INTERPRETING:
        pytest.skip("this process runs the kernels itself")
    if numpy.lib.NumpyVersion(numpy.__version__) >= "2.4.0":
        pytest.importorskip("triton", "3.7", "Triton 3.6's interpreter takes arrays for scalars, NumPy 2.4 does not")
    # The interpreter computes with numpy, which warns of infinities that the kernels mean, and of arrays as scalars.
    ignored = "-W", "ignore::RuntimeWarning", "-W", "ignore:Conversion of an array:DeprecationWarning"
    command = [sys.executable, "-m", "pytest", "-q", "-x", *ignored, test_file]
    done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
