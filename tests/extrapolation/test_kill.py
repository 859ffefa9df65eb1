"""kill -9 at every point of a run: the resumed run ends bit for bit where the uninterrupted one does."""

import os
import shutil
import signal
import subprocess
import sys
import traceback
from pathlib import Path

import torch

from effopd_kernels.extrapolation import EffOPDController, checkpoint, cpu, newest_intact

STEPS = 5


def run(folder):
    """A training loop with a checkpoint after every step, written beside its place and renamed into it."""
    torch.manual_seed(0)
    net = torch.nn.ModuleDict({"mlp": torch.nn.Linear(3, 2)})
    optimizer = torch.optim.AdamW(net.parameters(), 0.1)
    x, y = torch.randn(8, 3), torch.randn(8, 2)
    controller = EffOPDController(net, lambda: -(net["mlp"](x) - y).square().mean(1))
    first = 0
    last = newest_intact(sorted(folder.glob("step-*"), reverse=True))
    if last is not None:
        state = torch.load(last / "state.pt")
        net.load_state_dict(state["net"])
        optimizer.load_state_dict(state["optimizer"])
        controller.load(last)
        first = int(last.name.removeprefix("step-"))
    for step in range(first + 1, STEPS + 1):
        optimizer.zero_grad()
        (net["mlp"](x) - y).square().mean().backward()
        optimizer.step()
        controller.step(step)
        temporary = folder / "unfinished"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        torch.save({"net": net.state_dict(), "optimizer": optimizer.state_dict()}, temporary / "state.pt")
        controller.save(temporary)
        os.rename(temporary, folder / f"step-{step}")
    return net["mlp"].weight.detach().clone(), [e.alpha for e in controller.events]


def killed(folder, at):
    """Run in a child that kills itself at the at-th write, flush or rename; true if it lived to the end."""
    pid = os.fork()
    if pid == 0:
        left = [at]

        def dying(function):
            def wrapper(*args, **kwargs):
                left[0] -= 1
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*args, **kwargs)

            return wrapper

        try:
            for owner, name in (
                (cpu, "_cpp"),
                (checkpoint, "save_file"),
                (checkpoint, "_flush"),
                (os, "replace"),
                (os, "rename"),
                (torch, "save"),
            ):
                setattr(owner, name, dying(getattr(owner, name)))
            run(folder)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        os._exit(1)
    status = os.waitpid(pid, 0)[1]
    assert status in (0, signal.SIGKILL)
    return status == 0


def kill_at_every_point(folder):
    weight, alphas = run(folder / "whole")
    assert any(a != 1 for a in alphas)
    at = 0
    while True:
        at += 1
        if killed(folder / str(at), at):
            break
        again, events = run(folder / str(at))
        assert torch.equal(again, weight) and events == alphas, at
    assert at > 30


def test_kill_at_every_point(tmp_path):
    """In a process of its own: once autograd has threads, as any backward on a GPU starts them, it refuses to fork."""
    done = subprocess.run([sys.executable, __file__, tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


if __name__ == "__main__":
    kill_at_every_point(Path(sys.argv[1]))
