import pytest

from train import world as tiny


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    return tiny.build(tmp_path_factory.mktemp("world"))
