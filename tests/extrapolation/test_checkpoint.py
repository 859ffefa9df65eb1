"""States on disk: whole or named as broken, never half of one and half of another."""

import json
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from effopd_kernels.extrapolation import CheckpointError, EffOPDController, checkpoint, newest_intact
from effopd_kernels.extrapolation.checkpoint import INDEX


@pytest.fixture
def controller():
    torch.manual_seed(0)
    net = torch.nn.ModuleDict({"mlp": torch.nn.Linear(30, 20)}).bfloat16()
    out = EffOPDController(net, lambda: 0.0)
    with torch.no_grad():
        net["mlp"].weight.mul_(1.5)
    out.step(np.int64(1))
    return out


def anchor_of(controller):
    return controller.state_dict()["anchor"]


def test_round_trip(controller, tmp_path):
    controller.save(tmp_path / "new" / "folder")
    other = EffOPDController(torch.nn.ModuleDict({"mlp": torch.nn.Linear(30, 20)}).bfloat16(), lambda: 0.0)
    other.load(tmp_path / "new" / "folder")
    assert other.events == controller.events and other.last_step == 1
    for name, anchor in anchor_of(controller).items():
        assert torch.equal(anchor_of(other)[name], anchor)


def test_a_file_where_a_folder_belongs_is_named(controller, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="Not a directory"):
        controller.load(tmp_path / "file")


def test_a_second_save_leaves_only_its_own_files(controller, tmp_path):
    controller.save(tmp_path)
    controller.save(tmp_path)
    assert len(list(tmp_path.glob("*"))) == 2
    checkpoint.check(tmp_path)


@pytest.mark.parametrize("where", ["save_file", "os.replace", "Path.unlink"])
def test_a_save_that_dies_leaves_the_state_before_or_the_new_one(controller, tmp_path, monkeypatch, where):
    controller.save(tmp_path)
    controller.val_tokens = 777

    def die(*args, **kwargs):
        raise KeyboardInterrupt

    target = {"save_file": (checkpoint, "save_file"), "os.replace": (checkpoint.os, "replace")}
    with monkeypatch.context() as patch:
        patch.setattr(*target.get(where, (checkpoint.Path, "unlink")), die)
        with pytest.raises(KeyboardInterrupt):
            controller.save(tmp_path)
    controller.load(tmp_path)
    assert controller.val_tokens == (777 if where == "Path.unlink" else 0)


@pytest.mark.parametrize("damage", ["truncate", "flip", "delete", "index", "index number", "no index"])
def test_damage_is_detected_and_named_and_the_state_before_is_found(controller, tmp_path, damage, caplog):
    old, new = tmp_path / "checkpoint-1", tmp_path / "checkpoint-2"
    controller.save(old)
    controller.save(new)
    (shard,) = new.glob("*.safetensors")
    index = new / "effopd.json"
    if damage == "truncate":
        shard.write_bytes(shard.read_bytes()[:-7])
    elif damage == "flip":
        data = bytearray(shard.read_bytes())
        data[-5] ^= 1
        shard.write_bytes(data)
    elif damage == "delete":
        shard.unlink()
    elif damage == "index":
        index.write_bytes(index.read_bytes()[:-9])
    elif damage == "index number":
        body = json.loads(index.read_text())
        body["scalars"]["last_step"] = 2
        index.write_text(json.dumps(body))
    else:
        index.unlink()
    culprit = shard if damage in ("truncate", "flip", "delete") else index
    before = {name: anchor.clone() for name, anchor in anchor_of(controller).items()}
    with pytest.raises(CheckpointError, match=culprit.name):
        controller.load(new)
    assert all(torch.equal(anchor, before[name]) for name, anchor in anchor_of(controller).items())
    assert newest_intact([new, old]) == old
    assert culprit.name in caplog.text
    assert newest_intact([new]) is None


@pytest.mark.parametrize("one", [str, Path])
def test_a_single_folder_is_no_sequence_of_them(one, tmp_path):
    with pytest.raises(TypeError, match=r"directories must be a sequence of them, newest first, got .*checkpoint-1"):
        newest_intact(one(tmp_path / "checkpoint-1"))


def test_content_is_on_the_disk_before_the_name_that_makes_it_count(controller, tmp_path, monkeypatch):
    fsync, replace, order = checkpoint.os.fsync, checkpoint.os.replace, []

    def flushed(descriptor):
        order.append(Path(f"/proc/self/fd/{descriptor}").resolve().suffix or "folder")
        fsync(descriptor)

    monkeypatch.setattr(checkpoint.os, "fsync", flushed)
    monkeypatch.setattr(checkpoint.os, "replace", lambda *paths: (order.append("replace"), replace(*paths)))
    controller.save(tmp_path / "new")
    assert order == [".safetensors", ".tmp", "replace", "folder"]


def test_ctrl_c_waits_for_a_save(controller, tmp_path, monkeypatch):
    write = checkpoint.save_file
    monkeypatch.setattr(checkpoint, "save_file", lambda *args: (signal.raise_signal(signal.SIGINT), write(*args)))
    with pytest.raises(KeyboardInterrupt):
        controller.save(tmp_path)
    checkpoint.check(tmp_path)


def test_what_is_no_folder_at_all_is_passed_over(tmp_path, caplog):
    net = torch.nn.ModuleDict({"mlp": torch.nn.Linear(3, 2)})
    EffOPDController(net, lambda: 0.0).save(tmp_path / "good")
    (tmp_path / "file").touch()
    (tmp_path / "odd" / INDEX).mkdir(parents=True)
    assert newest_intact([tmp_path / "file", tmp_path / "odd", tmp_path / "good"]) == tmp_path / "good"
    assert len(caplog.records) == 2
