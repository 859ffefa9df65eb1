"""Run a script on several ranks, and leave the interpreter without finalising it.

A gloo worker thread drops its last tensors a moment after the last collective; where the interpreter is being finalised
by then, the thread cannot take the GIL and the process aborts (pytorch/pytorch#179291). A rank that got to its end
therefore leaves by os._exit; one that raised ends as ever.
"""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import torch.distributed as dist

TESTS = Path(__file__).parent
PYTHONPATH = os.pathsep.join(filter(None, [str(TESTS), os.environ.get("PYTHONPATH")]))  # of processes that tests start


def torchrun(*script, timeout: float = 280) -> subprocess.CompletedProcess:
    """`script` with its arguments on two processes, one thread each, `tests` importable."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": PYTHONPATH}
    command = [sys.executable, *launcher, __file__, *map(str, script)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)


if __name__ == "__main__":
    sys.argv = sys.argv[1:]
    sys.path[0] = str(Path(sys.argv[0]).parent)
    runpy.run_path(sys.argv[0], run_name="__main__")
    if dist.is_initialized():
        dist.barrier()  # nobody leaves while another still reads from it
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
