"""Two processes on gloo under DDP against one, to reduction order; and errors that not every rank meets."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from torchrun import torchrun

from train.test_cli import flags

HERE = Path(__file__).parent


def test_two_processes_equal_one(world, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["", str(world), str(tmp_path / "one")])
    runpy.run_path(str(HERE / "ddp_run.py"))  # this process is the one
    result = torchrun(HERE / "ddp_run.py", world, tmp_path / "two")
    assert result.returncode == 0, result.stderr[-4000:]
    one, two = (torch.load(tmp_path / name / "result.pt") for name in ("one", "two"))
    assert [e[:2] for e in one["events"]] == [e[:2] for e in two["events"]] and len(one["events"]) == 2
    assert any(alpha != 1 for _, alpha, *_ in one["events"])
    assert one["costs"] == two["costs"]
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-4)
    assert two["kl"] == pytest.approx(one["kl"], rel=1e-3)
    for name, value in one["weights"].items():
        torch.testing.assert_close(two["weights"][name], value, rtol=1e-3, atol=2e-5, msg=name)
    assert (tmp_path / "two" / "checkpoint-2" / "effopd_state").is_dir()


@pytest.mark.parametrize("who", ["one rank", "all ranks"])
def test_what_is_wrong_is_said_once_whoever_finds_it(world, tmp_path, who):
    """Nor does the rank that waited for the other in vain add a traceback of the network's."""
    wrong = [f"--dataset_name={tmp_path / 'missing.jsonl'}"]
    given = flags(world, tmp_path / "out") + (wrong if who == "all ranks" else [])
    result = torchrun(HERE / "cli_on_ranks.py", json.dumps(given), json.dumps(wrong))
    assert result.returncode != 0
    assert result.stderr.count(f"effopd-train: error: dataset file '{tmp_path / 'missing.jsonl'}' does not exist") == 1
    assert "rank0]: Traceback" not in result.stderr and "rank1]: Traceback" not in result.stderr, result.stderr


def test_folders_that_are_not_one_are_refused_before_the_first_step(world, tmp_path):
    """Once for all ranks; neither is made, nor is anything left beside them, where it was looked for."""
    here, there = tmp_path / "here", tmp_path / "there"
    result = torchrun(HERE / "cli_on_ranks.py", json.dumps(flags(world, here)), json.dumps([f"--output_dir={there}"]))
    said = [line for line in result.stderr.splitlines() if "effopd-train: error:" in line]
    assert len(said) == 1 and f"--output_dir '{there}' of rank 1 " in said[0] and f"folder '{here}' that" in said[0]
    assert "exitcode  : 2" in result.stderr and "]: Traceback" not in result.stderr, result.stderr
    assert not list(tmp_path.iterdir())
