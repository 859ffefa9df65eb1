"""Run by test_sharded.py under torchrun: a plain training loop on a model sharded by torch's own fully_shard.

sharded_run.py FOLDER CASE        writes FOLDER/<CASE>-<rank>.pt, or raises as a failing rank does
"""

import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode

from effopd_kernels.extrapolation import EffOPDController, Scores, checkpoint, extrapolate_, share
from effopd_kernels.extrapolation.dense import DenseWeights

STEPS, PROMPTS, WIDTH = 8, 16, 6


class Net(torch.nn.Module):
    """Two blocks with names that the default patterns know; 7 rows do not divide by 2 ranks."""

    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Linear(WIDTH, WIDTH)
        self.layers = torch.nn.ModuleList(
            torch.nn.ModuleDict({"self_attn": torch.nn.Linear(WIDTH, 7), "mlp": torch.nn.Linear(7, WIDTH)})
            for _ in range(2)
        )

    def forward(self, x):
        x = self.embed(x)
        for layer in self.layers:
            x = x + layer["mlp"](layer["self_attn"](x).tanh())
        return x


def data(seed):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(PROMPTS, WIDTH, generator=g)
    return x, x.roll(1, dims=1).sin()


class Collectives(TorchDispatchMode):
    """Counts what is communicated outside of the engine's own forward and backward."""

    def __init__(self):
        super().__init__()
        self.calls, self.largest, self.paused = 0, 0, False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "c10d" in str(func) and not self.paused:
            sizes = [t.nbytes for t in torch.utils._pytree.tree_leaves(args) if isinstance(t, torch.Tensor)]
            self.calls, self.largest = self.calls + 1, max([self.largest, *sizes])
        return func(*args, **(kwargs or {}))


def build(sharded, mixed):
    torch.manual_seed(0)
    net = Net()
    if sharded:
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16) if mixed else MixedPrecisionPolicy()
        for layer in net.layers:
            if layer is not net.layers[-1]:  # the root module, too, has something that moves
                fully_shard(layer["mlp"], mp_policy=policy)
            fully_shard(layer["self_attn"], mp_policy=policy)
        fully_shard(net, mp_policy=policy)
    return net, torch.optim.AdamW(net.parameters(), 1e-3)


def errors(net, seed):
    """Per prompt of this rank's share."""
    x, y = (share(t) for t in data(seed))
    return (net(x) - y).square().mean(1)


def run(
    folder, sharded=False, mixed=False, search="candidates", policy="keep", stop=None, resume=None, fail=None,
    accumulating=False,
):  # fmt: skip
    """Train; returns full weights, events, losses, what was communicated during events, and this rank's part of the
    anchor that was saved (to folder, after the step `stop`) or loaded (from `resume`, on any number of ranks).
    accumulating: gradients are not reduced after a step, as a loop leaves it for the first of several micro-batches."""
    net, optimizer = build(sharded, mixed)
    counter, calls = Collectives(), []

    def score():
        counter.paused = True
        calls.append(1)
        if fail is not None and len(calls) == 3 and dist.get_rank() == 1:
            raise RuntimeError(f"scoring server lost ({fail})")
        if fail == "alone":  # no collective of the engine between this and the decision
            values = torch.full((8,), float(len(calls)))
        else:
            with torch.no_grad():
                values = -errors(net, 99)
        counter.paused = False
        return Scores(values, tokens=10 * len(values))

    def loss_fn():
        counter.paused = True
        yield errors(net, 99).mean()
        counter.paused = False

    loss_fn = loss_fn if search == "gradient" else None
    options = dict(search=search, loss_fn=loss_fn, optimizer=optimizer, optimizer_policy=policy, report_s=1.0)
    controller = EffOPDController(net, score, **options)
    first, anchor = 0, []
    if resume is not None:
        model, moments = get_state_dict(net, optimizer)
        dcp.load({"model": model, "optimizer": moments}, checkpoint_id=resume / "dcp")
        set_state_dict(net, optimizer, model_state_dict=model, optim_state_dict=moments)  # strict, as accelerate's
        controller.load(resume)
        first, anchor = controller.last_step, [a.clone() for a in controller.weights.anchors]
    losses = []
    for step in range(first + 1, (stop or STEPS) + 1):
        optimizer.zero_grad()
        loss = errors(net, step).mean()
        if accumulating:
            net.set_requires_gradient_sync(True)
        loss.backward()
        optimizer.step()
        if accumulating:
            net.set_requires_gradient_sync(False)
        if not fail:
            with torch.no_grad():  # as a loop that logs does: the root module keeps what FSDP2 gathered for it
                net(data(step)[0])
        if sharded:
            loss = loss.detach().clone()
            dist.all_reduce(loss)
            loss /= dist.get_world_size()
        losses.append(loss.item())
        held = [p.to_local().clone() for p in net.parameters()] if fail else []
        with counter:
            try:
                controller.step(step)
            except BaseException as error:
                shards = [p.to_local() for p in net.parameters()]
                intact = all(map(torch.equal, held, shards)) and not controller.events
                (folder / f"{fail}-{dist.get_rank()}.txt").write_text(f"{intact} {type(error).__name__}: {error}")
                raise
    if stop is not None:
        controller.save(folder)
        model, moments = get_state_dict(net, optimizer)
        dcp.save({"model": model, "optimizer": moments}, checkpoint_id=folder / "dcp")
        anchor = [a.clone() for a in controller.weights.anchors]
    full = [p.detach().full_tensor() if isinstance(p, DTensor) else p.detach() for p in net.parameters()]
    return {
        "weights": full,
        "events": [e.to_dict() for e in controller.events],
        "losses": losses,
        "collectives": (counter.calls, counter.largest),
        "anchor": anchor,
    }


def lists_of_dtensors():
    """extrapolate_ on DTensors: this rank's rows of the dense result, its statistics, and no communication."""
    mesh = dist.init_device_mesh("cpu", (2,))
    g = torch.Generator().manual_seed(0)
    dense = [torch.randn(5, 3, generator=g) for _ in range(3)]
    param, anchor, current = (distribute_tensor(t, mesh, [Shard(0)]) for t in dense)
    counter = Collectives()
    with counter:
        stats = extrapolate_([param], [anchor], [current], 3.0)
    expected = torch.empty_like(dense[0])
    extrapolate_([expected], [dense[1]], [dense[2]], 3.0)
    rows = slice(0, 3) if dist.get_rank() == 0 else slice(3, 5)
    right = torch.equal(param.to_local(), expected[rows]) and counter.calls == 0
    partial = DTensor.from_local(dense[0], mesh, [Partial()])
    try:
        extrapolate_([partial], [anchor], [current], 3.0)
    except ValueError as error:
        return right and "partial sums" in str(error), stats.weight_sq.item(), expected[rows].square().sum().item()


def placed_otherwise():
    """What is said of anchors and masters placed as the parameter is, otherwise with shards of its shards' shape, and
    of another, and not at all."""
    mesh, said = dist.init_device_mesh("cpu", (2, 1)), []
    whole, rows = torch.ones(4, 4), [Shard(0), Replicate()]
    param = distribute_tensor(whole.bfloat16(), mesh, rows)
    for other in (
        distribute_tensor(whole, mesh, rows),
        distribute_tensor(whole, mesh, [Shard(0), Shard(1)]),
        distribute_tensor(whole, mesh, [Shard(1), Replicate()]),
        whole,
    ):
        for action in (
            lambda t: extrapolate_([param], [t], [param], 3.0),
            lambda t: EffOPDController({"mlp.w": param}, lambda: 0.0, masters={"mlp.w": t}),
        ):
            try:
                action(other)
            except ValueError as error:
                said.append(str(error))
            else:
                said.append("right")
    return said


def outside():
    """What a rank hears that is not in the group."""
    first = dist.new_group([0])
    try:
        EffOPDController({"mlp.w": torch.zeros(4)}, lambda: 0.0, process_group=first)
    except ValueError as error:
        return str(error)


def different_settings():
    """What this rank is told of each setting that rank 1 alone has another value of."""
    (net, optimizer), said = build(sharded=False, mixed=False), []
    others = [
        dict(alphas=(2, 4)),
        dict(schedule={1, 8}),
        dict(min_delta=0.5),
        dict(max_val_tokens=100),
        dict(exclude=()),
        dict(include="mlp"),
        dict(search="gradient", loss_fn=float),
        dict(max_gradients=3),
        dict(accept="paired"),
        dict(confidence=0.9),
        dict(optimizer_policy="reset", optimizer=optimizer),
    ]
    for other in others:
        try:
            EffOPDController(net, lambda: 0.0, **(other if dist.get_rank() == 1 else {}))
        except ValueError as error:
            said.append(str(error))
    return said


def partial_sums():
    """The slope where the gradient of a parameter that every rank has is partial sums, as of a norm under sequence
    parallelism; δ and the whole gradient are ones, four of each."""
    mesh = dist.init_device_mesh("cpu", (2,))
    param = distribute_tensor(torch.zeros(4), mesh, [Replicate()])
    dense = DenseWeights({"norm.weight": param})
    param.to_local().add_(1.0)
    dense.hold()
    param.grad = DTensor.from_local(torch.full((4,), 0.25 + 0.5 * dist.get_rank()), mesh, [Partial()])
    return dense.slope(2)


def stages(folder):
    """Two stages of a pipeline: the norm of both updates, and what saving them and loading the first say."""
    EffOPDController({"layers.0.mlp.w": torch.zeros(4)}, lambda: 0.0).save(folder / "first")
    weight, said = torch.zeros(4), []
    controller = EffOPDController({f"layers.{dist.get_rank()}.mlp.w": weight}, lambda: 0.0)
    weight.add_(1.0)
    for action in controller.save, controller.load:
        try:
            action(folder / "first")
        except ValueError as error:
            said.append(str(error))
    return controller.step(1).delta_norm, said


def plain_shards(folder):
    """What saving says of a plain tensor of which each rank holds another part, and of one that all hold alike."""
    whole = torch.arange(4.0)
    EffOPDController({"mlp.w": whole.clone()}, lambda: 0.0).save(folder / "alike")
    try:
        EffOPDController({"mlp.v": whole.clone(), "mlp.w": share(whole)}, lambda: 0.0).save(folder / "parts")
    except ValueError as error:
        return str(error)


def save_on_a_full_disk(folder):
    """What each rank raises when rank 1 cannot write its part of a checkpoint."""

    def full(*args):
        raise OSError("no space left")

    controller = EffOPDController(build(sharded=True, mixed=False)[0], lambda: 0.0)
    write = checkpoint.save_file
    checkpoint.save_file = full if dist.get_rank() == 1 else write
    try:
        controller.save(folder / "full")
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finally:
        checkpoint.save_file = write


def main(folder, case):
    dist.init_process_group("gloo")
    results = {}
    if case == "equal":
        results["dtensors"] = lists_of_dtensors()
        results["placed otherwise"] = placed_otherwise()
        results["outside"] = outside()
        results["settings"] = different_settings()
        results["partial sums"] = partial_sums()
        results["stages"] = stages(folder)
        results["plain shards"] = plain_shards(folder)
        results["full disk"] = save_on_a_full_disk(folder)
        results["plain"] = run(folder, sharded=True)
        results["gradient"] = run(folder, sharded=True, search="gradient")
        results["accumulating"] = run(folder, sharded=True, search="gradient", accumulating=True)
        results["mixed"] = run(folder, sharded=True, mixed=True)
        results["stopped"] = run(folder / "two", sharded=True, stop=4)
        results["plain, resumed"] = run(folder, sharded=True, resume=folder / "two")
        results["one's"] = run(folder, sharded=True, resume=folder / "one")
        results["reset"] = run(folder, sharded=True, policy="reset")
        run(folder / "reset", sharded=True, policy="reset", stop=4)
        results["reset, resumed"] = run(folder, sharded=True, policy="reset", resume=folder / "reset")
    else:
        run(folder, sharded=True, fail=case)
    torch.save(results, folder / f"{case}-{dist.get_rank()}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # torchrun's, when the other rank has ended
    main(Path(sys.argv[1]), sys.argv[2])
