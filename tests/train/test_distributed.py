"""Two processes on gloo under DDP against one, to reduction order."""

from pathlib import Path

import pytest
import torch
from torchrun import torchrun

HERE = Path(__file__).parent


def run(world, out, ranks):
    result = torchrun(HERE / "ddp_run.py", world, out, ranks=ranks)
    assert result.returncode == 0, result.stderr[-4000:]
    return torch.load(out / "result.pt")


def test_two_processes_equal_one(world, tmp_path):
    one = run(world, tmp_path / "one", ranks=1)
    two = run(world, tmp_path / "two", ranks=2)
    assert [e[:2] for e in one["events"]] == [e[:2] for e in two["events"]] and len(one["events"]) == 2
    assert any(alpha != 1 for _, alpha, *_ in one["events"])
    assert one["costs"] == two["costs"]
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-4)
    assert two["kl"] == pytest.approx(one["kl"], rel=1e-3)
    for name, value in one["weights"].items():
        torch.testing.assert_close(two["weights"][name], value, rtol=1e-3, atol=2e-5, msg=name)
    assert (tmp_path / "two" / "checkpoint-2" / "effopd_state").is_dir()
