"""A state saved by any number of ranks loads on any other: each rank gets its part, bit for bit."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard
from torch.testing._internal.distributed.fake_pg import FakeStore

from effopd_kernels.extrapolation import CheckpointError, checkpoint
from effopd_kernels.extrapolation.dense import DenseWeights
from effopd_kernels.extrapolation.distributed import Ranks

WHOLE = {
    "weight": torch.randn(5, 6),
    "bias": torch.randn(5).bfloat16(),
    "cube": torch.randn(5, 6, 2, dtype=torch.float64),
    "gate": torch.randn(()),  # a plain tensor on all ranks
}
LAYOUTS = {
    "not sharded": ((), []),
    "FSDP2 on 1": ((1,), [Shard(0)]),
    "FSDP2 on 2": ((2,), [Shard(0)]),
    "FSDP2 on 3": ((3,), [Shard(0)]),
    "more ranks than rows": ((7,), [Shard(0)]),
    "columns, and a rank without": ((4,), [Shard(1)]),
    "HSDP": ((2, 2), [Replicate(), Shard(0)]),
    "rows and columns": ((2, 2), [Shard(0), Shard(1)]),
    "FSDP2 and tensor parallel": ((2, 2), [_StridedShard(0, split_factor=2), Shard(0)]),
}


@pytest.fixture(scope="module")
def layouts():
    """By layout: the anchor and the parts of each of its ranks."""
    return {name: [rank_of(*layout, rank) for rank in range(size(layout[0]))] for name, layout in LAYOUTS.items()}


def size(mesh_shape):
    return torch.Size(mesh_shape).numel()


def rank_of(mesh_shape, placements, rank, of=lambda weights: (weights.state(), weights.parts)):
    if not placements:
        return of(DenseWeights(WHOLE))
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size(mesh_shape))
    try:
        mesh, named = dist.init_device_mesh("cpu", mesh_shape), dict(WHOLE)
        for name in named.keys() - {"gate"}:
            fitting = [p if getattr(p, "dim", 0) < named[name].dim() else Replicate() for p in placements]
            named[name] = distribute_tensor(named[name], mesh, fitting, src_data_rank=None)
        return of(DenseWeights(named))
    finally:
        dist.destroy_process_group()


class Thread(Ranks):
    """A rank that is one of `size` threads."""

    def __init__(self, rank, size, board, barrier):
        self.rank, self.size, self.board, self.barrier = rank, size, board, barrier

    def gather(self, value, error=None):
        self.board[self.rank] = value
        self.barrier.wait(20)
        values = list(self.board)
        self.barrier.wait(20)
        return values


def everywhere(layout, action):
    """What action(anchor, parts, ranks) returned, or the exception it raised, on each rank of a layout."""
    board, barrier = [None] * len(layout), threading.Barrier(len(layout))

    def on(rank):
        try:
            return action(*layout[rank], Thread(rank, len(layout), board, barrier))
        except Exception as error:
            return error

    with ThreadPoolExecutor(len(layout)) as pool:
        return list(pool.map(on, range(len(layout))))


def save(layout, folder):
    said = everywhere(layout, lambda anchor, parts, ranks: checkpoint.save(folder, anchor, {"step": 3}, ranks, parts))
    assert not any(said), said


def load(layout, folder):
    return everywhere(layout, lambda anchor, parts, ranks: checkpoint.load(folder, ranks, parts))


@pytest.mark.parametrize("saved", LAYOUTS)
def test_every_layout_loads_what_every_other_saved(layouts, saved, tmp_path):
    save(layouts[saved], tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) == len(layouts[saved])
    for layout in layouts.values():
        for (anchor, _), (loaded, scalars) in zip(layout, load(layout, tmp_path), strict=True):
            assert scalars == {"step": 3} and loaded.keys() == anchor.keys()
            for name in anchor:
                assert loaded[name].dtype == anchor[name].dtype and torch.equal(loaded[name], anchor[name])


@pytest.mark.parametrize("saved, here", [("FSDP2 on 3", "FSDP2 on 3"), ("more ranks than rows", "FSDP2 on 2")])
def test_a_rank_opens_the_shards_it_needs_only(layouts, saved, here, tmp_path, monkeypatch):
    save(layouts[saved], tmp_path)
    opened, real = [], checkpoint.safe_open
    monkeypatch.setattr(checkpoint, "safe_open", lambda path, *args: opened.append(path) or real(path, *args))
    load(layouts[here], tmp_path)
    needed = [s for s in sorted(tmp_path.glob("*.safetensors")) if "-00005-" not in s.name and "-00006-" not in s.name]
    assert sorted(opened) == needed  # five rows: ranks 5 and 6 had nothing


@pytest.mark.parametrize("here", ["not sharded", "FSDP2 on 2", "FSDP2 on 3", "more ranks than rows"])
@pytest.mark.parametrize("damage", ["flip", "delete"])
def test_a_damaged_shard_is_named_on_every_rank(layouts, here, damage, tmp_path):
    save(layouts["FSDP2 on 3"], tmp_path)
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    if damage == "delete":
        shard.unlink()
    else:
        shard.write_bytes(shard.read_bytes()[:-1] + b"!")
    for error in load(layouts[here], tmp_path):
        assert isinstance(error, CheckpointError) and str(shard) in str(error)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_element_counts_once_in_norms_and_slope(layout):
    """With A = 0 and the weights themselves for a gradient all three are ‖W‖²."""
    shape, placements = LAYOUTS[layout]

    def measured(weights):
        for anchor in weights.anchors:
            anchor.zero_()
        weights.hold()
        norms = weights.norms(size(shape))
        for tensor in weights.tensors:
            tensor.grad = tensor.clone()
        return torch.tensor([*norms, weights.slope(size(shape))])

    total = sum(rank_of(shape, placements, rank, measured) for rank in range(size(shape)))
    expected = sum(float(t.double().square().sum()) for t in WHOLE.values())
    torch.testing.assert_close(total, torch.full((3,), expected), rtol=1e-5, atol=0)


def test_shards_that_do_not_make_up_a_tensor_are_an_error(layouts, tmp_path):
    save(layouts["FSDP2 on 3"][:2], tmp_path)
    for error in load(layouts["FSDP2 on 2"], tmp_path):
        assert isinstance(error, CheckpointError) and "do not make up all of" in str(error)
    (anchor, parts), second = layouts["FSDP2 on 2"]  # the first rank, which finds all of its part, is of other weights
    for error in load([(anchor, {n: p for n, p in parts.items() if n != "bias"}), second], tmp_path):
        assert isinstance(error, CheckpointError)
        assert "do not make up all of" in str(error) and "anchor of other weights" in str(error)


def test_other_weights_are_named_on_every_rank(layouts, tmp_path):
    save(layouts["FSDP2 on 2"], tmp_path)
    for change, words in [
        (lambda parts: {n: p for n, p in parts.items() if n != "bias"}, "missing [], unexpected ['bias']"),
        (lambda parts: parts | {"bias": parts["bias"]._replace(whole=(9,))}, "anchor of bias is (5,), here it is (9,)"),
    ]:
        for error in load([(anchor, change(parts)) for anchor, parts in layouts["FSDP2 on 3"]], tmp_path):
            assert type(error) is ValueError and words in str(error)
