"""The trainer's small world, and one analysis of two planted trajectories that many tests look at."""

import pytest
from analysis import planted
from train.conftest import world  # noqa: F401

from effopd_kernels.analysis import cli, figures


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("planted")
    base = planted.base_weights()
    planted.write(root / "base", base)
    for step in planted.ANGLES:
        planted.write(root / "opd" / f"checkpoint-{step}", planted.moved(base, planted.low_rank(step)))
    for step in (1, 2):
        planted.write(root / "rl" / f"saved{step}", planted.moved(base, planted.noise(step)), step=50 * step)
    return root


@pytest.fixture(scope="session")
def out(folders):
    assert cli.main(planted.two_trajectories(folders, folders / "out")) == 0
    return folders / "out"


@pytest.fixture
def undrawn(monkeypatch):
    """Runs whose figures nobody looks at."""
    monkeypatch.setattr(figures, "save", planted.save_blank)
