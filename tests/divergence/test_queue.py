"""The row kernel's queue under programs that run at once and in any order, as on a GPU: processes with shared memory,
each running a share of the programs in the interpreter. An item that did not wait, or a count that came before what it
counts, would show.
"""

import os
import random
import signal
import time
import traceback

import pytest
import torch

pytest.importorskip("triton")

from divergence.criterion import spec
from divergence.test_triton import every_route, logits
from interpreted import ON_GPU, needs_kernels, run_in_interpreter

from effopd_kernels.divergence import triton_kernels
from effopd_kernels.divergence.triton_kernels import launch_divergence_rows

PROCESSES = 8
PAUSES = (0, 0, 0, 0, 0, 0.001, 0.003, 0.01)  # seconds


def test_in_interpreter():
    run_in_interpreter(__file__)


class AtOnce:
    """Stands in for a kernel: a launch is shared out over processes, which tarry at random around atomics."""

    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        def launch(*args, **kwargs):
            for x in args:
                if isinstance(x, torch.Tensor):
                    x.share_memory_()
            shares = [len(range(i, grid[0], PROCESSES)) for i in range(PROCESSES)]
            children = [self.child(i, share, args, kwargs) for i, share in enumerate(shares)]
            try:
                while children:
                    child, status = os.wait()
                    children.remove(child)
                    assert status == 0
            finally:  # the others of one that failed would wait for it
                for child in children:
                    os.kill(child, signal.SIGKILL)
                    os.waitpid(child, 0)

        return launch

    def child(self, index, programs, args, kwargs):
        child = os.fork()
        if child:
            return child
        try:
            from triton.runtime import interpreter

            interpreter.GridExecutor._restore_args_dev = lambda *_: None  # nothing was copied
            atomic, wait = interpreter.InterpreterBuilder.create_atomic_rmw, random.Random(index)

            def tarrying(*args):
                time.sleep(wait.choice(PAUSES))
                found = atomic(*args)
                time.sleep(wait.choice(PAUSES))
                return found

            interpreter.InterpreterBuilder.create_atomic_rmw = tarrying
            self.kernel[(programs,)](*args, **kwargs)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)


@needs_kernels
@pytest.mark.skipif(ON_GPU, reason="the device does it")
@pytest.mark.timeout(120)
@every_route
def test_results_do_not_depend_on_the_order_of_programs(member, monkeypatch):
    # with few programs to keep busy, phases follow each other closely
    launch = triton_kernels.LAUNCH["sm_90"]._replace(lanes=8, slice=4096, resident=0)
    monkeypatch.setattr(triton_kernels, "UNALIGNED_LOADS", 128)  # a tile of a slice's size
    monkeypatch.setattr(triton_kernels, "launch_for", lambda device: (launch, 1))
    student, teacher = logits(7, 1500), logits(7, 1500, seed=1)
    mask = torch.tensor([True, True, False, True, True, True, True])

    def run():
        rows = student.clone()  # the gradient takes their place while other programs read them
        return *launch_divergence_rows(rows, teacher, mask, None, spec(member), rows, True), rows

    one_by_one = run()
    monkeypatch.setattr(triton_kernels, "_divergence_kernel", AtOnce(triton_kernels._divergence_kernel))
    for ours, expected in zip(run(), one_by_one, strict=True):
        assert torch.equal(ours, expected)
