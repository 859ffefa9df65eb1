"""Where the buffers live and which copies are written must not change a bit of what an event does."""

import errno
import gc
import itertools
import math
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.testing._internal.distributed.fake_pg import FakeStore

from effopd_kernels.extrapolation import EffOPDController, buffers, dense, weights
from effopd_kernels.extrapolation import masters as masters_module
from effopd_kernels.extrapolation.masters import find_masters, is_master
from effopd_kernels.extrapolation.optimizer_policy import copy_of_weights, reset_state
from effopd_kernels.extrapolation.shards import checksum


def model(dtype=torch.float32):
    torch.manual_seed(0)
    layers = {"self_attn": torch.nn.Linear(5, 4), "mlp": torch.nn.Linear(3, 2), "norm": torch.nn.LayerNorm(5)}
    return torch.nn.ModuleDict(layers).to(dtype)


def snapshot(net):
    return {n: p.detach().clone() for n, p in net.named_parameters()}


def run(net, stepper, steps=range(1, 9), score=None, **options):
    """Deterministic training: fixed bf16 gradients, accepted up to α = 5 at every event."""
    scores = iter([0, 1, 2, 0] * 10)
    controller = EffOPDController(net, score or (lambda: next(scores)), **options)
    for step in steps:
        for i, p in enumerate(net.parameters()):
            p.grad = torch.sin(torch.arange(p.numel()) + i + step).view_as(p).bfloat16().to(p.dtype)
        stepper.step()
        controller.step(step)
    return controller


def mappings(folder):
    """Files of `folder` that this process has mapped."""
    return len({line.split()[4] for line in Path("/proc/self/maps").read_text().splitlines() if str(folder) in line})


@pytest.mark.parametrize("place", ["host", "disk"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_place_of_the_buffers_changes_nothing(place, dtype, tmp_path):
    one, two = model(dtype), model(dtype)
    run(one, torch.optim.SGD(one.parameters(), 0.1))
    controller = run(two, torch.optim.SGD(two.parameters(), 0.1), anchor_device=place, anchor_dir=tmp_path)
    assert [e.alpha for e in controller.events] == [5.0] * 4
    assert all(map(torch.equal, one.parameters(), two.parameters()))
    if place == "disk":
        assert not list(tmp_path.iterdir())  # nothing that a killed process would leave
        assert mappings(tmp_path) == 1  # W_t's file went with the event
        del controller
        gc.collect()
        assert mappings(tmp_path) == 0


def test_mapped_tensors_of_all_dtypes_and_shapes(tmp_path):
    like = {
        str(i): torch.full(shape, float(i), dtype=dtype)
        for i, (shape, dtype) in enumerate(
            [((3,), torch.bfloat16), ((), torch.float64), ((0, 2), torch.float32), ((5, 1), torch.float16)]
        )
    }
    mapped = buffers.allocate(like, "disk", tmp_path / "new")
    for tensor, source in zip(mapped, like.values(), strict=True):
        tensor.copy_(source)
        assert torch.equal(tensor, source) and tensor.dtype == source.dtype
    assert all(map(torch.equal, mapped, like.values()))  # none lies in another's memory


def test_a_disk_without_room_is_an_error_when_the_buffers_are_made(tmp_path, monkeypatch):
    def full(descriptor, offset, size):
        assert size == 12
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(buffers.os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left"):
        buffers.allocate({"w": torch.zeros(3)}, "disk", tmp_path)
    assert not list(tmp_path.iterdir())


def test_staging_in_parts(monkeypatch):
    net = model()
    buffered = dense.DenseWeights(dict(net.named_parameters()))
    # As if the buffers were on another device, and only two small tensors fit at a time.
    monkeypatch.setattr(dense, "STAGED_BYTES", 40)
    buffered.anchors = [torch.empty_like(a, device="meta") for a in buffered.anchors]
    parts = list(buffered._staged())
    assert [i for part in parts for i in part] == list(range(len(buffered.tensors))) and len(parts) > 2
    assert all(len(p) == 1 or sum(buffered.anchors[i].nbytes for i in p) <= 40 for p in parts)


@pytest.mark.parametrize("options", [dict(anchor_device="gpu"), dict(anchor_device="disk")], ids=str)
def test_places_that_are_none(options):
    with pytest.raises(ValueError, match=r"anchor_device|anchor_dir"):
        EffOPDController(model(), lambda: 0.0, **options)


class MasterInState(torch.optim.Optimizer):
    """As Transformer Engine's and apex's FusedAdam with masters: fp32 copies made at the first step."""

    def __init__(self, params, lr):
        super().__init__(params, dict(lr=lr))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    master = p if p.dtype == torch.float32 else p.float()
                    state.update(exp_avg=torch.zeros_like(p, dtype=torch.float32), master_param=master)
                state["exp_avg"].mul_(0.5).add_(p.grad.float())
                state["master_param"].sub_(group["lr"] * state["exp_avg"])
                p.copy_(state["master_param"])


class MasterInGroups(torch.optim.SGD):
    """As apex O2 and hand-written loops: the optimizer steps fp32 copies and copies them back."""

    def __init__(self, params, lr):
        self.model_params = list(params)
        super().__init__([p.detach().float().requires_grad_() for p in self.model_params], lr=lr)

    def step(self):
        masters = self.param_groups[0]["params"]
        for p, m in zip(self.model_params, masters, strict=True):
            m.grad = p.grad.float()
        super().step()
        with torch.no_grad():
            for p, m in zip(self.model_params, masters, strict=True):
                p.copy_(m)


@pytest.mark.parametrize("kind", [MasterInState, MasterInGroups])
@pytest.mark.parametrize("wrapped", [False, True])
def test_masters_jump_with_the_parameters_and_the_jump_survives_the_next_step(kind, wrapped):
    """The bf16 run with masters is the fp32 run, rounded: nothing is lost and nothing undone."""

    class Wrapper:  # accelerate's AcceleratedOptimizer holds the real one as .optimizer
        def __init__(self, optimizer):
            self.optimizer, self.param_groups, self.state = optimizer, optimizer.param_groups, optimizer.state

    half, full = model(torch.bfloat16), model(torch.bfloat16).float()
    optimizer = kind(half.parameters(), 0.1)
    witness = kind(full.parameters(), 0.1)
    controller = run(half, optimizer, optimizer=Wrapper(optimizer) if wrapped else optimizer)
    run(full, witness)
    assert [e.alpha for e in controller.events] == [5.0] * 4
    for (name, p), q in zip(half.named_parameters(), full.parameters(), strict=True):
        assert torch.equal(p, q.bfloat16()), name
    masters, _ = find_masters(dict(half.named_parameters()), optimizer)
    assert set(masters) == set(dict(half.named_parameters()))


@pytest.fixture
def accelerator():
    accelerate = pytest.importorskip("accelerate")

    def reset():  # accelerate keeps its settings for the whole process: those of tests before, and of this one
        accelerate.state.GradientState._reset_state()
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)

    reset()
    yield accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    reset()


def test_under_accelerates_mixed_precision_the_parameters_are_the_masters(accelerator):
    plain, prepared = model(), model()
    wrapped, optimizer = accelerator.prepare(prepared, torch.optim.SGD(prepared.parameters(), 0.1))
    events = run(wrapped, optimizer, optimizer=optimizer).events
    run(plain, torch.optim.SGD(plain.parameters(), 0.1))
    assert [e.alpha for e in events] == [5.0] * 4
    for p, q in zip(plain.parameters(), wrapped.parameters(), strict=True):
        assert q.dtype == torch.float32 and torch.equal(p, q)


def test_without_its_master_a_jump_is_undone():
    """Why masters are written: the guard above has teeth."""
    net = model(torch.bfloat16)
    optimizer = MasterInState(net.parameters(), 0.1)
    controller = run(net, optimizer, steps=[1])
    jumped = snapshot(net)
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert controller.events[0].alpha == 5.0
    assert (net["mlp"].weight - jumped["mlp.weight"]).abs().max() > 0.1


def test_a_rejected_event_restores_masters_bit_for_bit():
    net = model(torch.bfloat16)
    optimizer = MasterInState(net.parameters(), 0.1)
    seen = []

    def score():
        masters, _ = find_masters(dict(net.named_parameters()), optimizer)
        seen.append({n: m.clone() for n, m in masters.items()})
        return -len(seen)

    run(net, optimizer, steps=[1], score=score, optimizer=optimizer)
    after, _ = find_masters(dict(net.named_parameters()), optimizer)
    assert not torch.equal(seen[0]["mlp.weight"], seen[1]["mlp.weight"])
    assert all(torch.equal(after[n], m) for n, m in seen[0].items())


def test_state_with_masters_loads_into_a_fresh_controller(tmp_path):
    net = model(torch.bfloat16)
    optimizer = MasterInState(net.parameters(), 0.1)
    controller = run(net, optimizer, optimizer=optimizer)
    controller.save(tmp_path)
    fresh = EffOPDController(net, lambda: 0.0, optimizer=optimizer)
    fresh.load(tmp_path)
    for name, anchor in fresh.state_dict()["anchor"].items():
        assert anchor.dtype == torch.float32 and torch.equal(anchor, controller.state_dict()["anchor"][name])


def test_partitioned_parameters_are_refused():
    net = model()
    net["mlp"].weight = torch.nn.Parameter(torch.empty(0))
    net["mlp"].weight.ds_id = 0  # as DeepSpeed ZeRO-3 leaves them
    with pytest.raises(ValueError, match=r"mlp\.weight is partitioned by DeepSpeed"):
        EffOPDController(net, lambda: 0.0)


def test_a_master_is_compared_to_its_last_row():
    param = torch.ones(3, 4).bfloat16()
    master = param.float() * (1 + 2**-12)
    assert is_master(master, param)
    master[2, 3] = 2
    assert not is_master(master, param)


def test_a_moment_of_zeros_is_no_master():
    param = torch.nn.Parameter(torch.zeros(3, dtype=torch.float16))
    optimizer = torch.optim.SGD([param])
    optimizer.state[param] = {"exp_avg": torch.full((3,), 1e-9), "master_param": torch.full((3,), 2e-8)}
    masters, _ = find_masters({"w": param}, optimizer)
    assert masters["w"] is optimizer.state[param]["master_param"]


def test_equal_parameters_have_masters_of_their_own():
    params = [torch.nn.Parameter(torch.ones(3).bfloat16()) for _ in range(2)]
    optimizer = torch.optim.SGD([torch.ones(3) for _ in params])
    masters, _ = find_masters(dict(enumerate(params)), optimizer)
    assert [masters[i] is p for i, p in enumerate(optimizer.param_groups[0]["params"])] == [True, True]


def test_a_master_is_found_whatever_the_bits_of_nan():
    """An event of such weights is skipped, and says why."""
    param = torch.nn.Parameter(torch.tensor([0x7FC0, -0x40, -1], dtype=torch.int16).view(torch.bfloat16))
    master = torch.full((3,), math.nan)
    masters, unstepped = find_masters({"w": param}, torch.optim.SGD([master]))
    assert masters["w"] is master and not unstepped


def test_masters_under_every_name_of_a_tied_parameter():
    net = torch.nn.ModuleDict({"mlp": torch.nn.Linear(3, 3)}).bfloat16()
    net["mlp2"] = net["mlp"]
    masters = {n: p.detach().float() for n, p in net.named_parameters(remove_duplicate=False)}
    assert EffOPDController(net, lambda: 0.0, masters=masters).weights.names == ["mlp.weight", "mlp.bias"]


def test_masters_that_are_no_mapping():
    net = model(torch.bfloat16)
    for wrong in 5, [(n, p.detach().float()) for n, p in net.named_parameters()]:
        with pytest.raises(TypeError, match=r"masters must be a dict of tensors by name, got a (int|list)"):
            EffOPDController(net, lambda: 0.0, masters=wrong)


def test_a_checksum_tells_zeros_of_other_shapes_apart():
    assert checksum(torch.zeros(3)) != checksum(torch.zeros(4))


def test_given_masters_are_checked():
    net = model(torch.bfloat16)
    good = {n: p.detach().float() for n, p in net.named_parameters()}  # of some that do not move, too
    scores = iter([0.0, 1.0, 0.0])
    controller = EffOPDController(net, lambda: next(scores), masters=good)
    with torch.no_grad():
        good["mlp.weight"].add_(0.3)
        net["mlp"].weight.copy_(good["mlp.weight"])
    assert controller.step(1).alpha == 3.0
    assert torch.equal(good["mlp.weight"].bfloat16(), net["mlp"].weight)
    good["mlp.weight"].add_(0.1)
    with pytest.raises(ValueError, match=r"mlp\.weight is not its master"):
        controller.step(2)
    with torch.no_grad():
        for place in (good["mlp.weight"], net["mlp"].weight):
            place.fill_(math.nan)
    assert controller.step(2).skipped == "the weights are not finite"


@pytest.mark.parametrize(
    "change, words",
    [
        ({"mlp.wieght": torch.zeros(2, 3)}, r"masters names module\.mlp\.wieght, which is none of the 6 parameters"),
        ({"mlp.weight": None}, r"masters leaves out mlp\.weight, which moves and is torch\.bfloat16"),
        (
            {"mlp.weight": torch.zeros(6)},
            r"mlp\.weight is \(2, 3\) torch\.bfloat16 on cpu, .* got \(6,\) torch\.float32",
        ),
        ({"mlp.weight": torch.zeros(2, 3, dtype=torch.float16)}, r"a wider dtype; got \(2, 3\) torch\.float16 on cpu"),
        ({"mlp.weight": [0.0]}, "got a list"),
    ],
    ids=["unknown", "left out", "shape", "dtype", "no tensor"],
)
@pytest.mark.parametrize("named", [False, True], ids=["module", "named"])
def test_masters_that_cannot_be_are_refused_at_construction(change, words, named):
    net = model(torch.bfloat16)
    good = {"module." + n: p.detach().float() for n, p in net.named_parameters()}
    params = dict(net.named_parameters()) if named else net
    EffOPDController(params, lambda: 0.0, masters=good)
    changed = good | {"module." + name: master for name, master in change.items()}
    with pytest.raises(ValueError, match=words):
        EffOPDController(params, lambda: 0.0, masters={n: m for n, m in changed.items() if m is not None})


def test_an_optimizer_that_steps_something_else_is_refused():
    net = model(torch.bfloat16)
    flat = torch.cat([p.detach().float().flatten() for p in net.parameters()]).requires_grad_()
    controller = EffOPDController(net, lambda: 0.0, optimizer=torch.optim.SGD([flat], 0.1))
    assert "not moved" in controller.step(1).skipped  # a parameter nobody steps is no reason to stop
    with torch.no_grad():
        net["self_attn"].weight.add_(1.0)
    with pytest.raises(ValueError, match=r"steps neither self_attn\.weight nor an fp32 master"):
        controller.step(2)
    with pytest.raises(TypeError, match="an optimizer, with param_groups, or a list of them, got a object"):
        find_masters(dict(net.named_parameters()), object())


@pytest.mark.parametrize(
    "wrong",
    [[], "adamw", 0.1, torch.optim.AdamW, [torch.optim.SGD(model().parameters()), "adamw"]],
    ids=["empty", "text", "number", "class", "among others"],
)
@pytest.mark.parametrize("policy", ["keep", "reset"])
def test_what_is_no_optimizer_is_refused_at_construction(wrong, policy):
    last = wrong[-1] if wrong and isinstance(wrong, list) else wrong
    kind = "the class AdamW" if isinstance(last, type) else f"a {type(last).__name__}"
    with pytest.raises(TypeError, match=f"with param_groups, or a list of them, got {kind}"):
        EffOPDController(model(), lambda: 0.0, optimizer=wrong, optimizer_policy=policy)


@pytest.fixture(params=[1, 2])
def ranks(request):
    """How many there are, this process one of them; their collectives do nothing."""
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=request.param)
    yield request.param
    torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_zero_redundancy_keeps_its_states_in_an_inner_optimizer(ranks):
    from torch.distributed.optim import ZeroRedundancyOptimizer

    net = model()
    optimizer = ZeroRedundancyOptimizer(net.parameters(), torch.optim.AdamW)
    gradient_step(net, optimizer)
    reset_state([net["mlp"].weight, net["self_attn"].weight], optimizer)
    gradient_step(net, optimizer)
    steps = {n: int(optimizer.optim.state[p]["step"]) for n, p in net.named_parameters() if p in optimizer.optim.state}
    assert len(steps) < 6 or ranks == 1
    assert set(steps.items()) & {("mlp.weight", 1), ("self_attn.weight", 1)}
    assert all(count == 2 for name, count in steps.items() if name not in ("mlp.weight", "self_attn.weight"))


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_masters_that_one_rank_has_are_refused(ranks):
    from torch.distributed.optim import ZeroRedundancyOptimizer

    net = model(torch.bfloat16)
    optimizer = ZeroRedundancyOptimizer(net.parameters(), MasterInState, lr=0.1)
    gradient_step(net, optimizer)
    named = dict(net.named_parameters())
    if ranks == 1:
        assert find_masters(named, optimizer)[0].keys() == named.keys()
    else:
        with pytest.raises(ValueError, match=r"master of \w+\.\w+ is on this rank alone \(ZeroRedundancyOptimizer\)"):
            find_masters(named, optimizer)


def gradient_step(net, optimizer):
    for p in net.parameters():
        p.grad = torch.cos(torch.arange(p.numel())).view_as(p).to(p.dtype)
    optimizer.step()


def test_several_optimizers():
    """As Muon for matrices and AdamW for the others: each is asked for its masters, and each is reset."""
    net = model(torch.bfloat16)
    kinds = [p for p in net.parameters() if p.dim() > 1], [p for p in net.parameters() if p.dim() == 1]
    muon, adam = (MasterInState(params, 0.1) for params in kinds)
    both = SimpleNamespace(step=lambda: (muon.step(), adam.step()))
    controller = run(net, both, steps=[1, 2], optimizer=(muon, adam), optimizer_policy="reset")
    assert [e.alpha for e in controller.events] == [5.0, 5.0] and all(m is not None for m in controller.weights.masters)
    gradient_step(net, both)
    for name, p in net.named_parameters():
        moment = (muon if p.dim() > 1 else adam).state[p]["exp_avg"]
        assert torch.equal(moment, p.grad.float()) is not name.startswith("norm"), name


class MasterBesideGroups(torch.optim.SGD):
    """As apex's FusedAdam with master_weights."""

    def __init__(self, params, lr):
        super().__init__(params, lr=lr)
        self.param_groups_master = [
            {"params": [p.detach().float() for p in group["params"]]} for group in self.param_groups
        ]

    @torch.no_grad()
    def step(self):
        for group, masters in zip(self.param_groups, self.param_groups_master, strict=True):
            for p, master in zip(group["params"], masters["params"], strict=True):
                p.copy_(master.add_(p.grad.float(), alpha=-group["lr"]))


def test_masters_in_groups_of_their_own():
    half, full = model(torch.bfloat16), model(torch.bfloat16).float()
    optimizer = MasterBesideGroups(half.parameters(), 0.1)
    assert [e.alpha for e in run(half, optimizer, optimizer=optimizer).events] == [5.0] * 4
    run(full, torch.optim.SGD(full.parameters(), 0.1))
    assert all(torch.equal(p, q.bfloat16()) for p, q in zip(half.parameters(), full.parameters(), strict=True))


@pytest.mark.parametrize("given", [False, True])
def test_the_anchor_is_what_the_masters_hold(given):
    """Not that rounded, from which a small first update could be ten times as far."""
    net = torch.nn.ModuleDict({"mlp": torch.nn.Linear(8, 8)})
    start = {n: p.detach().clone() for n, p in net.named_parameters()}
    masters = {n: p.clone().requires_grad_() for n, p in start.items()}
    net.bfloat16()
    found = dict(masters=masters) if given else dict(optimizer=torch.optim.SGD(masters.values()))
    scores = iter([0.0, 1.0])
    controller = EffOPDController(net, lambda: next(scores), alphas=(11,), **found)
    with torch.no_grad():
        for name, p in net.named_parameters():
            p.copy_(masters[name].sub_(2.0**-10))
    assert controller.step(1).alpha == 11.0
    for name, master in masters.items():
        torch.testing.assert_close(master.detach(), start[name] - 11 * 2.0**-10)


def test_nothing_is_allocated_after_the_decision(monkeypatch):
    """Though masters appeared since: it could fail, and leave a jump that no event records."""
    net = model(torch.bfloat16)
    optimizer = MasterInState(net.parameters(), 0.1)
    calls, allocate = [], buffers.allocate
    monkeypatch.setattr(buffers, "allocate", lambda *args: calls.append(1) or allocate(*args))
    controller = run(net, optimizer, steps=[1], optimizer=optimizer)
    assert len(calls) == 2  # A at construction, W_t before the decision
    assert controller.events[0].alpha == 5.0 and all(a.dtype == torch.float32 for a in controller.weights.anchors)


class AdamWScheduleFree(torch.optim.SGD):
    """As that of the package schedulefree: steps z, and averages it into the weights."""

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            group["k"] = group.get("k", 0) + 1
            for p in group["params"]:
                z = self.state[p].setdefault("z", p.clone())
                p.lerp_(z.sub_(group["lr"] * p.grad), 1 / group["k"])


def test_an_optimizer_that_averages_another_copy_into_the_weights_has_to_start_afresh():
    net = model()
    optimizer = AdamWScheduleFree(net.parameters(), lr=0.01)
    with pytest.raises(ValueError, match=r"AdamWScheduleFree keeps a copy .* use optimizer_policy=\"reset\""):
        EffOPDController(net, lambda: 0.0, optimizer=optimizer)
    controller = run(net, optimizer, steps=[1], optimizer=optimizer, optimizer_policy="reset")
    jumped = snapshot(net)
    gradient_step(net, optimizer)
    assert controller.events[0].alpha == 5.0
    for name, p in net["mlp"].named_parameters(prefix="mlp"):
        torch.testing.assert_close(p.detach(), jumped[name] - 0.005 * p.grad)  # half of a step, and nothing undone


def test_reset_forgets_counts_and_nested_states_beside_a_master():
    param = torch.nn.Parameter(torch.ones(3).bfloat16())
    optimizer, master = torch.optim.SGD([param]), torch.ones(3)
    optimizer.state[param] = dict(
        step=7, master_param=master, moments=dict(exp_avg=torch.ones(3), counts=[4, torch.ones(1)]), fused=True
    )
    reset_state([param], optimizer)
    state = optimizer.state[param]
    assert state["step"] == 0 and state["master_param"] is master and master.sum() == 3 and state["fused"] is True
    assert not state["moments"]["exp_avg"].any() and state["moments"]["counts"] == [0, torch.zeros(1)]


@pytest.mark.parametrize("policy", ["keep", "reset"])
def test_optimizer_policy_and_masters(policy):
    """The moments go, the masters stay, and the next step starts from both; resumed before it, too."""
    net = model(torch.bfloat16)
    optimizer = MasterInState(net.parameters(), 0.1)
    controller = run(net, optimizer, steps=[1], optimizer=optimizer, optimizer_policy=policy)
    state = {n: optimizer.state[p] for n, p in net.named_parameters()}
    masters = {n: s["master_param"].clone() for n, s in state.items()}
    moments = {n: s["exp_avg"].clone() for n, s in state.items()}
    resumed = EffOPDController(net, lambda: 0.0, optimizer=optimizer, optimizer_policy=policy)
    resumed.load_state_dict(controller.state_dict())
    del controller
    gc.collect()
    gradient_step(net, optimizer)
    assert not resumed.reset_due
    for name, p in net.named_parameters():
        moment = p.grad.float()
        if policy == "keep" or name.startswith("norm"):
            moment = moment + 0.5 * moments[name]
        assert torch.equal(optimizer.state[p]["exp_avg"], moment)
        torch.testing.assert_close(optimizer.state[p]["master_param"], masters[name] - 0.1 * moment)


class SharedTable(torch.optim.SGD):
    """As bitsandbytes' 8-bit optimizers: every state holds the one table that all of them are read with."""

    def __init__(self, params, lr):
        super().__init__(params, lr=lr, momentum=0.9)
        self.table = torch.ones(3)

    def step(self):
        super().step()
        for group in self.param_groups:
            for p in group["params"]:
                p.data.sub_(group["lr"] * self.state[p].setdefault("table", self.table)[0])


class Adagrad(torch.optim.Adagrad):
    """As of torch 2.10, which makes no state that its construction did not."""

    def step(self):
        assert all(self.state.get(p) for group in self.param_groups for p in group["params"])
        super().step()


@pytest.mark.parametrize(
    "kind, options",
    [
        (torch.optim.AdamW, dict(amsgrad=True)),
        (torch.optim.SGD, dict(momentum=0.9)),
        (torch.optim.NAdam, {}),
        (torch.optim.Rprop, {}),
        (torch.optim.ASGD, {}),
        (Adagrad, dict(initial_accumulator_value=0.1)),
        (SharedTable, {}),
    ],
    ids=lambda x: x.__name__ if isinstance(x, type) else "",
)
def test_reset_is_what_a_new_optimizer_starts_from(kind, options):
    net = model()
    optimizer = kind(net.parameters(), lr=0.01, **options)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)  # leaves what construction takes not in the groups
    controller = run(net, optimizer, steps=[1, 2], optimizer=optimizer, optimizer_policy="reset")
    assert [e.alpha for e in controller.events] == [5.0, 5.0]
    fresh = model()
    fresh.load_state_dict(net.state_dict())
    new = kind(fresh.parameters(), lr=0.01, **options)
    for _ in range(3):
        gradient_step(net, optimizer)
        gradient_step(fresh, new)
    for (name, p), q in zip(net.named_parameters(), fresh.parameters(), strict=True):
        assert torch.equal(p, q) is not name.startswith("norm"), name


def test_reset_through_accelerate(accelerator):
    net = model()
    net, optimizer = accelerator.prepare(net, torch.optim.AdamW(net.parameters()))
    controller = run(net, optimizer, steps=[1], optimizer=optimizer, optimizer_policy="reset")
    gradient_step(net, optimizer)
    assert [int(optimizer.state[p]["step"]) for p in net.parameters()] == [1, 1, 1, 1, 2, 2]
    assert controller.events[0].alpha == 5.0 and not controller.reset_due


def test_optimizer_policy_resets_only_after_a_jump():
    net = model()
    optimizer = torch.optim.AdamW(net.parameters())
    options = dict(optimizer=optimizer, optimizer_policy="reset")
    controller = run(net, optimizer, steps=[1], score=lambda: 0.0, **options)
    controller.load_state_dict(controller.state_dict())  # nor where it is resumed
    gradient_step(net, optimizer)
    assert optimizer.state[net["mlp"].weight]["step"] == 2
    for options in (dict(optimizer_policy="reset"), dict(optimizer_policy="forget", optimizer=optimizer)):
        with pytest.raises(ValueError, match="optimizer_policy"):
            EffOPDController(net, lambda: 0.0, **options)
    other = SimpleNamespace(param_groups=optimizer.param_groups, state={})
    with pytest.raises(TypeError, match=r'"reset" needs a torch\.optim\.Optimizer, not a SimpleNamespace'):
        EffOPDController(net, lambda: 0.0, optimizer=other, optimizer_policy="reset")


def test_replaced_parameters_are_named():
    """As fully_shard replaces them: the controller would look at tensors that nobody trains."""
    net = torch.nn.ModuleDict({"self_attn": torch.nn.Linear(3, 3), "mlp": torch.nn.Linear(3, 3)})
    controller = EffOPDController(net, lambda: 0.0)
    net["mlp"].weight = torch.nn.Parameter(torch.zeros(3, 3))
    with pytest.raises(ValueError, match=r"mlp.weight \(1 of 4\) is not the model's parameter any more: make the"):
        controller.step(1)


def test_a_changed_dtype_is_named():
    net = model()
    controller = EffOPDController(net, lambda: 0.0)
    net.bfloat16()
    with pytest.raises(ValueError, match=r"self_attn\.weight is torch\.bfloat16 and was torch\.float32 when the"):
        controller.step(1)


def test_inference_mode_around_construction_and_events_does_not_matter():
    net, scores = model(), iter([0.0, 1.0] * 2)
    with torch.inference_mode():
        controller = EffOPDController(net, lambda: next(scores), alphas=(3,))
    for step, mode in (1, True), (2, False):
        with torch.no_grad():
            net["mlp"].weight.add_(0.1)
        with torch.inference_mode(mode):
            assert controller.step(step).alpha == 3.0


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("strategy", ["FULL_SHARD", "SHARD_GRAD_OP", "NO_SHARD"])
def test_flattened_shards_are_refused(ranks, strategy):
    """Of FSDP1. One rank alone holds all."""
    from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy

    options = dict(sharding_strategy=ShardingStrategy[strategy], device_id=torch.device("cpu"), use_orig_params=True)
    net = torch.nn.ModuleDict({"mlp": FullyShardedDataParallel(torch.nn.Linear(3, 2), **options)})
    arguments = net, [re.compile("mlp")], [], None, None, "device", None
    if ranks == 1 or strategy == "NO_SHARD":
        assert weights.weights_of(*arguments).names == ["mlp.weight", "mlp.bias"]
    else:
        with pytest.raises(ValueError, match=rf"FullyShardedDataParallel \({strategy}\), .* shard with FSDP2"):
            weights.weights_of(*arguments)


@pytest.mark.parametrize("search", ["candidates", "gradient"])
def test_a_parameter_frozen_between_events_stays_where_it_is(search):
    net, scores = model(), itertools.count()

    def loss():
        return net["mlp"].weight.sum() + net["self_attn"].weight.sum()

    controller = EffOPDController(net, lambda: next(scores), search=search, loss_fn=loss, schedule=1)
    where = []
    for step in 1, 2:
        with torch.no_grad():
            [p.sub_(0.1) for p in net.parameters() if p.requires_grad]
        assert controller.step(step).alpha == 11.0
        net["mlp"].requires_grad_(False)
        where.append(snapshot(net["mlp"]))
    assert all(map(torch.equal, where[0].values(), where[1].values()))


def test_parameters_trained_only_later_are_named_once(caplog):
    net = model()
    for part in "mlp", "norm":  # a norm would not move
        net[part].requires_grad_(False)
    controller = EffOPDController(net, lambda: 0.0, schedule=1)
    controller.step(1)
    assert not caplog.records
    net.requires_grad_(True)
    for step in 2, 3:
        controller.step(step)
    (record,) = caplog.records
    assert record.getMessage().startswith("2 parameters that were frozen when the controller was made are trained now")


@pytest.mark.parametrize("order", [slice(None), slice(None, None, -1)])
def test_many_masters_in_any_order_are_found_without_comparing_each_with_each(order, monkeypatch):
    """As one Linear for each of many experts has them."""
    params = [torch.nn.Parameter(torch.full((2, 3), float(i)).bfloat16()) for i in range(50)]
    wide = [torch.nn.Parameter(p.detach().float() + 1e-4 * (p.detach().float() > 1)) for p in params]
    compared, compare = [], masters_module.is_master
    monkeypatch.setattr(masters_module, "is_master", lambda *pair: (compared.append(1), compare(*pair))[1])
    found, unstepped = find_masters(dict(enumerate(params)), torch.optim.SGD(wide[order], lr=1.0))
    assert all(found[i] is w for i, w in enumerate(wide)) and not unstepped
    assert len(compared) == 50


def test_lbfgs_forgets_its_one_memory():
    """Which is the first parameter's, whether that moves or not."""
    net, scores = torch.nn.ModuleDict({"embed": torch.nn.Linear(4, 4), "mlp": torch.nn.Linear(4, 4)}), iter(range(9))
    optimizer, x = torch.optim.LBFGS(net.parameters(), lr=0.1, max_iter=3), torch.randn(8, 4)
    controller = EffOPDController(
        net, lambda: next(scores), alphas=(3,), optimizer=optimizer, optimizer_policy="reset", schedule=[1]
    )

    def closure():
        optimizer.zero_grad()
        loss = (net["mlp"](net["embed"](x)) - x).square().mean()
        loss.backward()
        return loss

    steps = []
    for step in (1, 2):
        optimizer.step(closure)
        controller.step(step)
        steps.append(optimizer.state[net["embed"].weight]["n_iter"])
    assert steps[1] <= steps[0]


class Averaging(torch.optim.SGD):
    """Pulls the weights towards a copy of them in its state."""

    def step(self, closure=None):
        super().step()
        for p in self.param_groups[0]["params"]:
            z = self.state[p].setdefault("z", p.detach().clone())
            p.data.lerp_(z, 0.1)


def test_an_optimizer_that_holds_a_copy_of_the_weights_is_told_of(caplog):
    kinds = [(Averaging, "keep", 1), (Averaging, "reset", 0)]
    kinds += [(kind, "keep", 0) for kind in (torch.optim.AdamW, torch.optim.ASGD, torch.optim.Adagrad)]
    for kind, policy, told in kinds:
        net, scores = torch.nn.ModuleDict({"mlp": torch.nn.Linear(4, 4)}), iter(range(99))
        torch.nn.init.zeros_(net["mlp"].bias)
        optimizer = kind(net.parameters(), lr=1e-3)
        controller = EffOPDController(net, lambda s=scores: next(s), optimizer=optimizer, optimizer_policy=policy)
        for step in (1, 2):
            net["mlp"](torch.ones(4)).sum().backward()
            optimizer.step()
            controller.step(step)
        assert sum("'s 'z' is nearly the weights" in r.getMessage() for r in caplog.records) == told, kind
        assert len(caplog.records) == told
        caplog.clear()


def test_a_state_of_another_kind_of_numbers_is_refused():
    net = torch.nn.ModuleDict({"mlp": torch.nn.Linear(4, 4)})
    controller = EffOPDController(net, lambda: 0.0)
    state = controller.state_dict()
    state["anchor"] = {name: t.long() for name, t in state["anchor"].items()}
    with pytest.raises(TypeError, match=r"mlp.*int64"):
        controller.load_state_dict(state)


@pytest.mark.parametrize("state", ["elsewhere", "sparse"])
def test_a_state_that_cannot_be_compared_stops_no_event(state):
    """As that of an optimizer that is moved off the device between steps."""
    net, scores = torch.nn.ModuleDict({"mlp": torch.nn.Linear(4, 4)}), iter(range(9))
    optimizer = torch.optim.AdamW(net.parameters())
    controller = EffOPDController(net, lambda: next(scores), optimizer=optimizer, alphas=(3,))
    for p in net.parameters():
        p.data.add_(0.1)
        moment = torch.empty_like(p, device="meta") if state == "elsewhere" else torch.zeros_like(p).to_sparse()
        optimizer.state[p] = {"exp_avg": moment}
    assert controller.step(1).alpha == 3


@pytest.mark.parametrize("state", [[torch.ones(3)], torch.ones(3), None])
def test_states_of_other_kinds_hold_no_copy(state):
    param = torch.nn.Parameter(torch.ones(3))
    optimizer = SimpleNamespace(param_groups=[{"params": [param]}])
    if state is not None:
        optimizer.state = {param: state}
    assert copy_of_weights([param], optimizer) is None


def test_lbfgs_keeps_its_memory_of_others():
    net = torch.nn.ModuleDict({"head": torch.nn.Linear(4, 4), "mlp": torch.nn.Linear(4, 4)})
    optimizer = torch.optim.LBFGS(net["head"].parameters())
    optimizer.state[net["head"].weight] = {"n_iter": 3}
    reset_state([*net["mlp"].parameters()], optimizer)
    assert optimizer.state[net["head"].weight] == {"n_iter": 3}
    reset_state([net["head"].bias], optimizer)
    assert not optimizer.state


def test_masters_beside_tensors_without_data_and_of_equal_first_rows():
    params = [
        torch.nn.Parameter(torch.cat([torch.zeros(1, 3), torch.full((2, 3), float(i))]).bfloat16()) for i in range(9)
    ]
    wide = [torch.nn.Parameter(p.detach().float()) for p in params]
    others = [torch.nn.Parameter(torch.empty(3, 3, device="meta"))]
    found, _ = find_masters(dict(enumerate(params)), torch.optim.SGD([*others, *wide[::-1]], lr=1.0))
    assert all(found[i] is w for i, w in enumerate(wide))
