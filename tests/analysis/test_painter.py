"""What a second process draws is what this one would, and what goes wrong there is said here."""

import errno
import os
import pickle
import signal
import subprocess
import sys
import time

import pytest
from analysis import planted

from effopd_kernels.analysis import figures
from effopd_kernels.analysis.painter import Painter, _draw_in_halves

LINE = figures.lines({"a": ([0, 1], [2, 3])}, "x", "y", title="‖ΔW‖")


def test_the_command_by_itself_writes_what_it_writes_in_this_process(folders, out, tmp_path):
    """Which has PyTorch imported, and so draws alone."""
    code = "import sys; from effopd_kernels.analysis.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, *planted.two_trajectories(folders, tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    for kind in ("tables/*.csv", "figures/*"):
        names = [path.relative_to(out) for path in sorted(out.glob(kind))]
        assert names == [path.relative_to(tmp_path / "out") for path in sorted((tmp_path / "out").glob(kind))]
        assert len(names) > 10
        for name in names:
            assert (out / name).read_bytes() == (tmp_path / "out" / name).read_bytes(), name


def test_draws_while_the_block_is_at_work(tmp_path):
    with Painter() as painter:
        process = painter.process
        with painter.drawing([(LINE, tmp_path, "there")]):
            process.wait(60)  # it needs nothing from here to finish
    with Painter().drawing([(LINE, tmp_path, "here")]):
        assert not (tmp_path / "here.svg").exists()
    for suffix in ("png", "svg"):
        assert (tmp_path / f"there.{suffix}").read_bytes() == (tmp_path / f"here.{suffix}").read_bytes()


@pytest.mark.parametrize("before", [0, 1])  # of the two that draw, each its turn
def test_its_errors_are_raised_here(tmp_path, before):
    (tmp_path / "file").write_text("")
    jobs = [(LINE, tmp_path, "x")] * before + [(LINE, tmp_path / "file", "x")]
    with Painter() as painter, pytest.raises(FileExistsError) as error, painter.drawing(jobs):
        pass
    assert error.value.filename == str(tmp_path / "file")


def test_a_killed_one_is_done_without(tmp_path):
    with Painter() as painter:
        painter.process.kill()
        painter.process.wait()
        with painter.drawing([(LINE, tmp_path, "x")]):
            pass
    assert (tmp_path / "x.svg").exists()


def test_a_system_that_starts_no_more_processes(tmp_path, monkeypatch):
    def refused(*_, **__):
        raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")

    monkeypatch.setattr(os, "fork", refused, raising=False)
    _draw_in_halves([(LINE, tmp_path, name) for name in "ab"])
    monkeypatch.setattr(subprocess, "Popen", refused)
    with Painter() as alone, alone.drawing([(LINE, tmp_path, "c")]):
        pass
    assert sorted(path.name for path in tmp_path.glob("*.svg")) == ["a.svg", "b.svg", "c.svg"]


def test_does_not_draw_into_what_an_interrupt_clears_away(tmp_path):
    with Painter() as painter:
        with pytest.raises(KeyboardInterrupt), painter.drawing([(LINE, tmp_path, str(i)) for i in range(1000)]):
            while len(list(tmp_path.iterdir())) < 4:  # both are at it
                time.sleep(0.01)
            raise KeyboardInterrupt
        assert painter.process.poll() == -signal.SIGKILL
    there = set(tmp_path.iterdir())
    time.sleep(0.5)
    assert set(tmp_path.iterdir()) == there


def test_nobody_to_answer(tmp_path, capfd):
    """As when this process is killed."""
    with Painter() as painter:
        painter.process.stdout.close()
        pickle.dump([(LINE, tmp_path, "x")], painter.process.stdin)
        painter.process.stdin.close()
        assert painter.process.wait(60) == 0
    assert capfd.readouterr() == ("", "")


def test_ends_with_nothing_to_draw(capfd):
    with Painter() as painter:
        painter.process.stdin.close()  # as when this process is killed
        assert painter.process.wait(60) == 0
    assert capfd.readouterr() == ("", "")
