"""Whole checkpoints: streamed from files, equal to one matrix at a time, whole or not at all."""

import json
import math
import os
import re
import sys

import numpy as np
import pytest
import torch
from lowrank.matrices import assert_certified, bf16_pair
from safetensors.torch import save_file

from effopd_kernels.lowrank import Flag, batched_rsvd, load, save, update, update_svd

SHAPES = {"a.weight": (40, 60), "b.weight": (60, 40), "c.weight": (40, 60), "small.weight": (3, 50)}


@pytest.fixture
def pair():
    """(current, anchor) by name: matrices, a stack of experts, and a bias that is no matrix."""
    sides = {name: bf16_pair(*shape, 2, 1e-2, seed) for seed, (name, shape) in enumerate(SHAPES.items())}
    experts = [bf16_pair(30, 20, 2, 1e-2, seed) for seed in range(3)]
    sides["experts"] = tuple(torch.stack(side) for side in zip(*experts, strict=True))
    current, anchor = ({name: side[i] for name, side in sides.items()} for i in (0, 1))
    return current | {"bias": torch.ones(5)}, anchor | {"bias": torch.zeros(7)}


@pytest.fixture
def folders(pair, tmp_path):
    """The pair on disk: one side sharded with an index, the other in one file."""
    current, anchor = tmp_path / "current", tmp_path / "anchor"
    current.mkdir()
    anchor.mkdir()
    names = list(pair[0])
    shards = {"model-1.safetensors": names[:3], "model-2.safetensors": names[3:]}
    for shard, members in shards.items():
        save_file({name: pair[0][name] for name in members}, current / shard)
    weight_map = {name: shard for shard, members in shards.items() for name in members}
    (current / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    save_file(pair[1], anchor / "model.safetensors")
    return current, anchor


def equal(one, two) -> bool:
    return all(torch.equal(x, y) for x, y in zip(one, two, strict=True))


def test_every_matrix_as_if_it_were_alone(pair):
    found = update_svd(*pair, 5)
    assert list(found) == [*SHAPES, "experts"]
    for name, svd in found.items():
        alone = batched_rsvd(pair[0][name], 5, base=pair[1][name], clip_rank=True)
        assert equal(svd, alone), name
        assert_certified(svd, pair[0][name].double() - pair[1][name].double())
    assert found["small.weight"].flags & Flag.CLIPPED and found["small.weight"].S.shape == (3,)


def test_folders_give_the_same_bits(pair, folders):
    from_memory, from_files = update_svd(*pair, 5), update_svd(*folders, 5)
    mixed = update_svd(pair[0], folders[1] / "model.safetensors", 5)
    assert from_memory.keys() == from_files.keys() == mixed.keys()
    for name, svd in from_memory.items():
        assert equal(svd, from_files[name]) and equal(svd, mixed[name])


def test_reads_one_pair_ahead_and_no_more(pair):
    """Streaming: when a matrix is factored at most the next pair has been read."""
    reads, factored = [], []

    class Watched(dict):
        def __getitem__(self, name):
            reads.append(name)
            assert len(reads) - len(factored) <= 3  # the one in use, the next, and the one being read
            return super().__getitem__(name)

    original = update._factor
    names = [name for name in SHAPES]
    try:
        update._factor = lambda *arguments: factored.append(0) or original(*arguments)
        update_svd(Watched({name: pair[0][name] for name in names}), pair[1], 2, include="weight")
    finally:
        update._factor = original
    assert reads == names


def test_on_a_cpu_as_many_pairs_are_held_as_fit(pair, monkeypatch):
    held = []
    monkeypatch.setattr(update, "side_by_side", lambda f, groups, at_once: (held.append(at_once), map(f, groups))[1])
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    for limit in (1, 3 * 2 * 2400 * 2, 1 << 30):  # a, b and c are the largest, in bf16
        monkeypatch.setattr(update, "HELD_BYTES", limit)
        update_svd(*pair, 2)
    assert held == [1, 3, 8]


def test_include_and_strict(pair):
    current, anchor = pair
    assert list(update_svd(current, anchor, 2, include=r"^[ab]\.")) == ["a.weight", "b.weight"]
    assert list(update_svd(current, anchor, 2, include=lambda name: name == "experts")) == ["experts"]
    del current["a.weight"], anchor["b.weight"]
    with pytest.raises(ValueError, match=r"2 matrices.*b\.weight \(not in anchor\), a\.weight \(not in current\)"):
        update_svd(current, anchor, 2)
    assert list(update_svd(current, anchor, 2, strict=False)) == ["c.weight", "small.weight", "experts"]


def test_align_to_follows_earlier_signs(pair):
    first = update_svd(*pair, 3)
    flipped = {name: svd._replace(U=-svd.U, Vh=-svd.Vh) for name, svd in first.items()}
    again = update_svd(*pair, 3, align_to=flipped)
    assert all(torch.equal(again[name].U, flipped[name].U) for name in first)


def test_align_to_is_checked_before_any_work(pair, monkeypatch):
    earlier = update_svd(*pair, 3)
    monkeypatch.setattr("effopd_kernels.lowrank.update._factor", None)
    for wrong, error in (({"a.weight": earlier["b.weight"]}, ValueError), ({"a.weight": "last"}, TypeError)):
        with pytest.raises(error, match=r"align_to\['a\.weight'\]"):
            update_svd(*pair, 3, align_to=wrong)


def test_include_takes_what_re_compiled(pair):
    assert list(update_svd(*pair, 3, include=re.compile("^a"))) == ["a.weight"]


def test_tied_weights(pair):
    """One tensor under two names, and one side tied where the other is not."""
    current, anchor = ({"embed": side["a.weight"], "head": side["a.weight"]} for side in pair)
    found = update_svd(current, anchor, 4)
    assert equal(found["embed"], found["head"])
    anchor["head"] = anchor["head"].clone()
    assert equal(update_svd(current, anchor, 4)["head"], found["head"])


def test_mismatched_and_wrong_tensors_are_named(pair):
    current, anchor = pair
    turned, flat = {"a.weight": anchor["a.weight"].mT}, {"a.weight": torch.ones(2400)}
    whole_numbers = {"a.weight": torch.zeros(40, 60, dtype=torch.int8)}
    include, device = "include must be a regular expression or a predicate, got", "device must be one that PyTorch can"
    for given, options, error, words in (
        ((current, anchor | turned), {}, ValueError, r"'a\.weight' is \(40, 60\) in current and \(60, 40\) in anchor"),
        ((current | flat, anchor), {}, ValueError, r"'a\.weight' is \(2400,\) in current and \(40, 60\) in anchor"),
        ((current, anchor | flat), {}, ValueError, r"'a\.weight' is \(40, 60\) in current and \(2400,\) in anchor"),
        ((current, anchor | whole_numbers), {}, TypeError, r"'a\.weight' in anchor is torch\.int8"),
        (({"x": [1.0]}, anchor), {}, TypeError, r"current\['x'\].*list"),
        (({1: anchor["a.weight"]}, anchor), {}, TypeError, "names of current must be strings, got 1"),
        ((current, 3), {}, TypeError, "anchor must be a mapping"),
        (pair, {"include": np.array(["a", "b"])}, ValueError, f"{include} array"),
        (pair, {"include": b"a"}, ValueError, f"{include} b'a'"),
        (pair, {"include": "("}, ValueError, rf"{include} '\('"),
        (pair, {"device": "meta:x"}, ValueError, f"{device} use here, got 'meta:x'"),
        (pair, {"device": "nonsense"}, ValueError, f"{device} use here, got 'nonsense'"),
        (pair, {"rank": 5, "clip_rank": False}, ValueError, r"rank 5 exceeds min\(m, n\) = 3"),
        (pair, {"align_to": torch.ones(2)}, TypeError, "align_to must be a mapping of names to earlier results, got T"),
    ):
        with pytest.raises(error, match=words):
            update_svd(*given, **{"rank": 2} | options)
    assert update_svd({}, {}, 2) == {}
    assert update_svd({"empty": torch.zeros(0, 4)}, {"empty": torch.zeros(0, 4)}, 2)["empty"].S.shape == (0,)


def header_of(name="a", shape=(2, 3), stop=24):
    """A file of one tensor, of which it says this."""
    header = json.dumps({name: {"dtype": "F32", "shape": shape, "data_offsets": [0, stop]}}).encode()
    return len(header).to_bytes(8, "little") + header + bytes(24 if stop else 0)


def test_damaged_files_are_named_before_any_work(folders, monkeypatch):
    monkeypatch.setattr("effopd_kernels.lowrank.update._factor", None)
    current, anchor = folders
    shard = current / "model-2.safetensors"
    whole = shard.read_bytes()
    negative = header_of(shape=[-2, -3])
    odd = (header_of(name="a\ud800"), header_of(shape=[2**32, 2**32], stop=0), header_of(shape=[2**70, 0], stop=0),
           header_of(stop=math.inf), header_of(stop=24.0))  # fmt: skip
    for damaged in (
        whole[:-7], whole[:50], b"", b"\xff" * 100, whole + b"\0", whole.replace(b"BF16", b"BF17"), negative, *odd,
    ):  # fmt: skip
        shard.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"model-2\.safetensors: damaged or truncated"):
            update_svd(current, anchor, 2)
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=r"model-2\.safetensors"):
        update_svd(current, anchor, 2)
    (current / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match="not a safetensors index"):
        update_svd(current, anchor, 2)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        update_svd(current / "nowhere", anchor, 2)
    empty = current / "empty"
    empty.mkdir()
    with pytest.raises(FileNotFoundError, match=r"no \*\.safetensors"):
        update_svd(empty, anchor, 2)
    (pipe := current / "pipe").mkdir()
    os.mkfifo(pipe / "model.safetensors")
    with pytest.raises(FileNotFoundError, match=r"no \*\.safetensors"):
        update_svd(pipe, anchor, 2)
    (current / "model.safetensors.index.json").unlink()
    save_file({"a.weight": torch.zeros(2, 2)}, current / "again.safetensors")
    with pytest.raises(ValueError, match=r"'a\.weight' is in both"):
        update_svd(current, anchor, 2)


def test_a_file_of_another_kind_is_not_called_damaged(pair, tmp_path):
    torch.save(pair[0], tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin: not a safetensors file"):
        update_svd(tmp_path / "pytorch_model.bin", pair[1], 2)


def test_file_cut_after_its_header_was_read(folders):
    from effopd_kernels.tensor_files import FileCheckpoint

    file = FileCheckpoint(folders[1])
    path = folders[1] / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"model\.safetensors: the file ended inside tensor"):
        for name in file.shapes:
            file.read(name)


def test_save_and_load(pair, tmp_path):
    found = update_svd(*pair, 4)
    path = tmp_path / "factors.safetensors"
    save(found, path)
    again = load(path)
    assert found.keys() == again.keys() and all(equal(found[name], again[name]) for name in found)
    assert path.stat().st_size < 0.5 * sum(t.nbytes for side in pair for t in side.values()) + 20_000
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(ValueError, match=r"factors\.safetensors: damaged"):
        load(path)
    save_file({"x": torch.ones(2)}, path)
    with pytest.raises(TypeError, match="svds must be a mapping of names to RSVDs, got RSVD"):
        save(found[next(iter(found))], path)
    for folder in ("", tmp_path):
        with pytest.raises(ValueError, match="is a folder: give the name of a file"):
            save({}, folder)
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*nowhere"):
        save({}, tmp_path / "nowhere" / "factors.safetensors")
    with pytest.raises(ValueError, match="is a folder"):
        load(tmp_path)
    with pytest.raises(ValueError, match="not written by"):
        load(path)


def test_a_failed_save_leaves_what_was_there(pair, tmp_path, monkeypatch):
    path = tmp_path / "factors.safetensors"
    path.write_bytes(b"before")

    def full_disk(_, path, **__):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("safetensors.torch.save_file", full_disk)
    with pytest.raises(OSError, match="disk full"):
        save(update_svd(*pair, 2), path)
    assert path.read_bytes() == b"before" and list(tmp_path.iterdir()) == [path]


def test_progress_bar_on_request(pair, capsys):
    update_svd(*pair, 2, progress=True)
    assert "update_svd: 100%" in capsys.readouterr().err
    update_svd(*pair, 2, progress=False)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("progress", [None, True])
def test_without_a_console_there_is_no_progress_bar(pair, monkeypatch, progress):
    monkeypatch.setattr(sys, "stderr", None)
    assert update_svd(*pair, 2, progress=progress)


def test_names_keep_their_order(tmp_path):
    a = torch.eye(3)
    names = ["layers.2", "layers.10", "a/b", ""]
    save({name: batched_rsvd(a, 1) for name in names}, tmp_path / "svd.safetensors")
    assert list(load(tmp_path / "svd.safetensors")) == names
    save({1: batched_rsvd(a, 1)}, tmp_path / "number.safetensors")
    assert list(load(tmp_path / "number.safetensors")) == ["1"]
    tensors = {f"{name}/{f}": t for name in "ba" for f, t in batched_rsvd(a, 1)._asdict().items()}
    for names, found in ((None, ["a", "b"]), ('["b"]', ["b", "a"])):  # as written before names were kept
        about = {"format": "effopd_kernels.lowrank.RSVD/1"} | ({} if names is None else {"names": names})
        save_file({k: t.clone() for k, t in tensors.items()}, tmp_path / "old.safetensors", metadata=about)
        assert list(load(tmp_path / "old.safetensors")) == found
    save({}, tmp_path / "none.safetensors")
    assert load(tmp_path / "none.safetensors") == {}
