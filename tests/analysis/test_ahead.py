"""What is read ahead is what will be read, and nothing that goes wrong is an error yet."""

import builtins
import threading

from effopd_kernels.analysis import ahead
from effopd_kernels.analysis.ahead import reading_ahead


def test_reads_the_first_files_alike_far_until_the_block_ends(tmp_path, monkeypatch):
    read, whole = [], threading.Event()

    class Watched:
        def __init__(self, path, *_, **__):
            self.file, self.name = opened(path, "rb", buffering=0), path.parent.name

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def readinto(self, piece):
            count = self.file.readinto(piece)
            read.append((self.name, count))
            if (self.name, count) == ("b", 0):
                whole.set()
            return count

    opened = builtins.open
    monkeypatch.setattr(ahead, "open", Watched, raising=False)
    monkeypatch.setattr(ahead, "_PIECE", 4)
    for folder, names in {
        "a": ["model-00002-of-00002.safetensors", "model-00001-of-00002.safetensors", "consolidated.safetensors"],
        "b": ["model.safetensors"],
    }.items():
        (tmp_path / folder).mkdir()
        for i, name in enumerate(names):
            (tmp_path / folder / name).write_bytes(bytes(6 + 2 * i))
    with reading_ahead([tmp_path / "a", tmp_path / "b", tmp_path / "missing"]):
        assert whole.wait(60)
    assert read == [("a", 4), ("b", 4), ("a", 4), ("b", 2), ("a", 0), ("b", 0)]


def test_ends_with_the_block(tmp_path):
    with open(tmp_path / "model.safetensors", "wb") as file:
        file.truncate(1 << 40)
    before = threading.active_count()
    with reading_ahead([tmp_path]):
        assert threading.active_count() == before + 1
    assert threading.active_count() == before


def test_opens_no_more_than_a_process_may(tmp_path, monkeypatch):
    monkeypatch.setattr(ahead, "_FILES", 2)
    monkeypatch.setattr(ahead, "_read", lambda paths, _: opened.extend(paths))
    opened = []
    for name in "abc":
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").touch()
    with reading_ahead([tmp_path / name for name in "abc"]):
        pass
    assert [path.parent.name for path in opened] == ["a", "b"]


def test_what_cannot_be_read_is_not_said_here(tmp_path, capfd):
    (tmp_path / "model.safetensors").symlink_to(tmp_path / "model.safetensors")
    with reading_ahead([tmp_path, "\0", ""]):
        pass
    assert capfd.readouterr() == ("", "")
