"""Two processes on gloo under DDP against one, to reduction order."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent


def run(world, out, launcher):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent)}
    command = [sys.executable, *launcher, HERE / "ddp_run.py", world, out]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert result.returncode == 0, result.stderr[-4000:]
    return torch.load(out / "result.pt")


def test_two_processes_equal_one(world, tmp_path):
    one = run(world, tmp_path / "one", [])
    two = run(world, tmp_path / "two", ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"])
    assert [e[:2] for e in one["events"]] == [e[:2] for e in two["events"]] and len(one["events"]) == 2
    assert any(alpha != 1 for _, alpha, *_ in one["events"])
    assert one["costs"] == two["costs"]
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-4)
    assert two["kl"] == pytest.approx(one["kl"], rel=1e-3)
    for name, value in one["weights"].items():
        torch.testing.assert_close(two["weights"][name], value, rtol=1e-3, atol=2e-5, msg=name)
    assert (tmp_path / "two" / "checkpoint-2" / "effopd_state").is_dir()
