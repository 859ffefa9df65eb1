"""Edited weights against an fp64 definition, and the base back bit for bit whatever happens."""

import math
import os
import signal

import pytest
import torch
from analysis.planted import lora, write
from safetensors.torch import load_file, save_file
from transformers import (
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
)

from effopd_kernels.analysis import edits
from effopd_kernels.analysis.comparison import compare
from effopd_kernels.analysis.edits import Edit, EditableModel, live_tensors
from effopd_kernels.analysis.loaded import as_the_model_names_them
from effopd_kernels.analysis.plans import INTERVENTIONS, Plan
from effopd_kernels.errors import UserError

SHAPES = {"mlp.up_proj": (24, 16), "mlp.down_proj": (16, 24), "self_attn.q_proj": (16, 16)}
LAYERS = 4
WEIGHTS = "model.safetensors"
MIXTURE = dict(
    vocab_size=20, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, head_dim=4,
    num_key_value_heads=1, moe_intermediate_size=4, num_experts=2, num_experts_per_tok=1,
)  # fmt: skip


class Net(torch.nn.Module):
    """Enough of a transformer to have roles: an embedding that is also the head, layers, a norm."""

    def __init__(self, dtype):
        super().__init__()
        tensors = {"model.embed_tokens.weight": torch.randn(40, 16), "model.norm.weight": torch.ones(16)}
        for i in range(LAYERS):
            for name, shape in SHAPES.items():
                tensors[f"model.layers.{i}.{name}.weight"] = torch.randn(shape) / 4
        for name, tensor in tensors.items():
            module = self
            *path, leaf = name.split(".")
            for part in path:
                if not hasattr(module, part):
                    module.add_module(part, torch.nn.Module())
                module = getattr(module, part)
            module.register_parameter(leaf, torch.nn.Parameter(tensor.to(dtype)))
        self.lm_head = torch.nn.Module()
        self.lm_head.weight = self.model.embed_tokens.weight


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def world(request, tmp_path):
    """(model, its comparison, weights by trajectory and position with the base under None)."""
    torch.manual_seed(0)
    net = Net(request.param)
    base = {n: p.detach().clone() for n, p in net.named_parameters()}
    weights = {None: base}
    for trajectory in ("opd", "rl"):
        for i in range(2):
            moved = {n: (w + 0.05 * (i + 1) * torch.randn_like(w)).to(w.dtype) for n, w in base.items()}
            weights[trajectory, i] = moved
            write(tmp_path / trajectory / f"checkpoint-{i + 1}", moved)
    folders = {t: [tmp_path / t / f"checkpoint-{i + 1}" for i in range(2)] for t in ("opd", "rl")}
    return net, EditableModel(net, compare(write(tmp_path / "base", base), folders).trajectories), weights


def plan_for(model):
    norms = {(t, i): math.hypot(*model.norms(t, i).values()) for t in ("opd", "rl") for i in range(2)}
    return Plan(list(model.live), {"opd": [(1, 0.5), (2, 1.0)], "rl": [(1, 0.5), (2, 1.0)]}, norms, window=2, stride=1)


def bits(net):
    return {n: p.detach().clone().view(torch.uint8) for n, p in net.named_parameters()}


def same(a, b):
    return all(torch.equal(a[n], b[n]) for n in a)


def expected(edit, weights, name):
    """The edited tensor in fp64, by definition."""
    w0 = weights[None][name].double()
    if name not in edit.names:
        return w0
    delta = weights[edit.trajectory, edit.checkpoint][name].double() - w0
    if edit.part != "whole" and delta.ndim == 2:
        u, s, v = torch.linalg.svd(delta, full_matrices=False)
        k = math.ceil(edit.fraction * len(s))
        keep = slice(0, k) if edit.part == "top" else slice(k, None)
        delta = u[:, keep] @ s[keep].diag() @ v[keep]
    scale = edit.alpha
    if edit.norm_of is not None:
        target = (weights[edit.norm_of, 1][name].double() - w0).norm()
        scale *= target / delta.norm() if delta.norm() > 0 else 0
    return w0 + scale * delta


def test_every_edit_of_every_intervention_writes_its_definition_and_leaves_the_base(world):
    net, model, weights = world
    before, seen = bits(net), set()
    for trial in plan_for(model).trials(list(INTERVENTIONS)):
        with model.edited(trial.edit):
            for name, param in net.named_parameters():
                want = expected(trial.edit, weights, name)
                # Once rounded: half a unit in the last place, and the fp32 arithmetic before it.
                atol = torch.finfo(param.dtype).eps * want.abs() / 2 + 2e-6
                assert ((param.double() - want).abs() <= atol).all(), (trial.intervention, trial.about, name)
        assert same(bits(net), before), trial.about
        seen.add(trial.intervention)
    assert seen == {*INTERVENTIONS, "base", "final"}


def test_a_checkpoint_as_it_is_is_written_bit_for_bit(world):
    net, model, weights = world
    with model.edited(Edit("opd", 0, tuple(model.live))):
        assert all(torch.equal(p, weights["opd", 0][n]) for n, p in net.named_parameters())
        assert net.lm_head.weight is net.model.embed_tokens.weight


def test_the_biases_of_all_experts_have_no_rank(tmp_path):
    experts = torch.nn.Module()
    experts.down_proj_bias = torch.nn.Parameter(torch.randn(4, 8))
    net = torch.nn.ModuleDict({"layers": torch.nn.ModuleList([torch.nn.ModuleDict({"experts": experts})])})
    name = "layers.0.experts.down_proj_bias"
    base = write(tmp_path / "base", {name: experts.down_proj_bias.detach()})
    final = write(tmp_path / "checkpoint-1", {name: (weight := torch.randn(4, 8))})
    model = EditableModel(net, compare(base, {"opd": [final]}).trajectories)
    assert model.factor_seconds("opd", 0) == 0
    with model.edited(Edit("opd", 0, (name,), part="top", fraction=0.25)):
        torch.testing.assert_close(experts.down_proj_bias.detach(), weight)


def test_seven_per_cent_of_a_rank_of_a_hundred_are_seven_triplets(tmp_path):
    up = torch.nn.Linear(100, 100, bias=False)
    net = torch.nn.ModuleDict({"layers": torch.nn.ModuleList([torch.nn.ModuleDict({"mlp": up})])})
    name, base = "layers.0.mlp.weight", up.weight.detach().clone()
    start = write(tmp_path / "base", {name: base})
    final = write(tmp_path / "checkpoint-1", {name: torch.randn(100, 100)})
    model = EditableModel(net, compare(start, {"opd": [final]}).trajectories)
    with model.edited(Edit("opd", 0, (name,), part="top", fraction=0.07)):
        assert torch.linalg.matrix_rank(up.weight.detach() - base, atol=1e-2) == 7


def test_norms(world):
    _, model, weights = world
    for (trajectory, i), moved in ((k, v) for k, v in weights.items() if k is not None):
        for name, norm in model.norms(trajectory, i).items():
            assert norm == pytest.approx((moved[name].double() - weights[None][name].double()).norm().item(), rel=1e-6)


def test_factoring_is_estimated_until_it_is_done(world):
    _, model, _ = world
    assert model.factor_seconds("opd", 1) > 0
    with model.edited(Edit("opd", 1, tuple(model.live), part="top", fraction=0.5)):
        pass
    assert model.factor_seconds("opd", 1) == 0 < model.factor_seconds("opd", 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_update_is_the_files_whatever_the_model_rounds(tmp_path, dtype):
    """Of 1e-6, a thousandth of a unit in the last place of bf16: against the rounded base it would be all rounding."""
    torch.manual_seed(0)
    net = Net(torch.float32)
    base = {n: p.detach().clone() for n, p in net.named_parameters()}
    moved = {n: w + 1e-6 * torch.randn_like(w) for n, w in base.items()}
    far = {n: w + 0.1 * torch.randn_like(w) for n, w in base.items()}
    folders = {name: tmp_path / name for name in ("base", "near", "far")}
    for folder, weights in zip(folders.values(), (base, moved, far), strict=True):
        write(folder, weights)
    comparison = compare(folders["base"], {name: [folders[name]] for name in ("near", "far")})
    net.to(dtype)
    before = bits(net)
    trajectories, files = as_the_model_names_them(comparison.trajectories, comparison.base, live_tensors(net))
    model = EditableModel(net, trajectories, files=files)
    for name, norm in model.norms("near").items():
        assert norm == pytest.approx(float((moved[name].double() - base[name].double()).norm()), rel=1e-6)
    for trajectory, final in (("near", moved), ("far", far)):
        for alpha in (0.0, 0.5, 1.0):
            with model.edited(Edit(trajectory, 0, tuple(model.live), alpha=alpha)):
                for name, param in net.named_parameters():
                    want = base[name].double() + alpha * (final[name].double() - base[name].double())
                    if alpha != 0.5:  # the base and the checkpoint in this dtype, bit for bit
                        assert torch.equal(param, want.float().to(dtype)), (trajectory, alpha, name)
                    assert ((param - want).abs() <= torch.finfo(dtype).eps * want.abs() / 2 + 1e-6).all()
            assert same(bits(net), before)
    for norm_of in (None, "near"):  # and so of its parts
        with model.edited(Edit("far", 0, tuple(model.live), part="top", norm_of=norm_of)):
            for name, param in net.named_parameters():
                update = far[name].double() - base[name].double()
                scale = model.norms("near")[name] / update.norm() if norm_of else 1
                want = base[name].double() + scale * update
                assert ((param - want).abs() <= torch.finfo(dtype).eps * want.abs() / 2 + 2e-6).all()


def test_what_raises_inside_leaves_the_base(world):
    net, model, _ = world
    before = bits(net)
    for error in (RuntimeError, KeyboardInterrupt):
        with pytest.raises(error), model.edited(Edit("opd", 1, tuple(model.live))):
            assert not same(bits(net), before)
            raise error
        assert same(bits(net), before)


def test_an_unreadable_tensor_half_way_leaves_the_base(world, monkeypatch):
    net, model, _ = world
    before, checkpoint = bits(net), model.trajectories["opd"][1]
    read, wrote = checkpoint.read, []

    def failing(name, *rows):
        if len(wrote) == 3:
            raise OSError("gone")
        wrote.append(name)
        return read(name, *rows)

    monkeypatch.setattr(checkpoint, "read", failing)
    with pytest.raises(OSError, match="gone"), model.edited(Edit("opd", 1, tuple(model.live))):
        pytest.fail("the edit was not complete")
    assert len(wrote) == 3 and same(bits(net), before)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_a_signal_at_every_point_leaves_the_base(world, monkeypatch, number):
    """In the n-th write of a tensor, inside the evaluation, in the n-th copy of the restoration."""
    net, model, _ = world
    before, edit = bits(net), Edit("opd", 1, tuple(model.live))
    handler = signal.signal(signal.SIGTERM, lambda *_: (_ for _ in ()).throw(SystemExit(143)))
    restore, write = model._restore, edits.extrapolate_
    left = [0]

    def tick():
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), number)

    def ticking(function):
        def wrapper(*args, **kwargs):
            tick()
            function(*args, **kwargs)
            tick()

        return wrapper

    monkeypatch.setattr(edits, "extrapolate_", ticking(write))
    monkeypatch.setattr(model, "_restore", ticking(restore))
    monkeypatch.setattr(model, "on_change", tick)
    points, evaluated = 0, 0
    try:
        while True:
            points += 1
            left[0] = points
            interrupted = True
            try:
                with model.edited(edit):
                    tick()
                    evaluated += 1
                interrupted = False
            except (KeyboardInterrupt, SystemExit):
                pass
            assert same(bits(net), before), points
            if left[0] > 0:
                break
            assert interrupted, points
    finally:
        signal.signal(signal.SIGTERM, handler)
    assert points == 2 * len(model.live) + 4 + 1  # every write twice, hook, evaluation, restoration twice; then none
    assert evaluated == 3  # a signal during writing or evaluation stops before it ends


def test_edits_that_write_the_same_weights_share_a_key():
    assert Edit().key() == Edit("opd", 1, ("a",), alpha=0.0).key() == Edit("rl", 0, ()).key() == "base"
    one = Edit("opd", 1, ("a", "b"))
    assert one.key() == Edit("opd", 1, ("b", "a")).key()
    others = [Edit("rl", 1, ("a", "b")), Edit("opd", 0, ("a", "b")), Edit("opd", 1, ("a",))]
    others += [Edit("opd", 1, ("a", "b"), **c) for c in ({"alpha": 2.0}, {"part": "top"}, {"norm_of": "rl"})]
    assert len({edit.key() for edit in [one, *others]}) == 7


def test_a_lora_adapter_is_its_product(tmp_path):
    torch.manual_seed(0)
    net = Net(torch.float32)
    base = {n: p.detach().clone() for n, p in net.named_parameters()}
    save_file(base, tmp_path / "model.safetensors")
    name = "model.layers.1.mlp.up_proj"
    a, b = torch.randn(3, 16), torch.randn(24, 3)
    factors = {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
    adapter = lora(tmp_path / "adapter", factors, r=3, lora_alpha=6)
    model = EditableModel(net, compare(tmp_path / "model.safetensors", {"lora": [adapter]}).trajectories)
    product = 2 * b @ a
    assert model.norms("lora") == pytest.approx({n: product.norm().item() if name in n else 0 for n in base})
    for alpha in (1.0, 0.5):
        with model.edited(Edit("lora", 0, tuple(base), alpha=alpha)):
            for n, p in net.named_parameters():
                torch.testing.assert_close(p.detach(), base[n] + alpha * product if name in n else base[n])
    for norm_of in (None, "lora"):  # beyond its rank there is rounding, which no norm is given to
        with model.edited(Edit("lora", 0, tuple(base), part="bottom", fraction=3 / 16, norm_of=norm_of)):
            torch.testing.assert_close(net.get_parameter(f"{name}.weight").detach(), base[f"{name}.weight"])


def test_tensors_that_transformers_fuses_are_read_through_it(tmp_path):
    config = Qwen3MoeConfig(
        vocab_size=16, hidden_size=8, intermediate_size=16, moe_intermediate_size=4, num_hidden_layers=1, num_experts=4,
        num_attention_heads=2, num_key_value_heads=2, head_dim=4, num_experts_per_tok=2, tie_word_embeddings=True,
    )  # fmt: skip
    weights = {}
    for seed, name in enumerate(("base", "one", "two")):
        torch.manual_seed(seed)
        model = Qwen3MoeForCausalLM(config)
        model.save_pretrained(tmp_path / name)
        weights[name] = {n: p.detach() for n, p in model.named_parameters()}
    net = Qwen3MoeForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    comparison = compare(tmp_path / "base", {"run": [tmp_path / "one", tmp_path / "two"]})
    assert not set(live_tensors(net)) <= set(comparison.base.shapes)
    trajectories, files = as_the_model_names_them(comparison.trajectories, comparison.base, live_tensors(net))
    assert files is None  # the model holds what they hold
    model = EditableModel(net, trajectories)
    before = bits(net)
    for i, name in enumerate(("one", "two")):
        with model.edited(Edit("run", i, tuple(model.live))):
            assert all(torch.equal(p, weights[name][n]) for n, p in net.named_parameters())
        assert same(bits(net), before)
    experts = "model.layers.0.mlp.experts.down_proj"
    with model.edited(Edit("run", 1, (experts,), part="top", fraction=0.5)):  # of every expert's matrix
        update = net.get_parameter(experts).detach() - weights["base"][experts]
    assert update.shape == (4, 8, 4) and torch.linalg.matrix_rank(update, atol=1e-5).tolist() == [2] * 4
    half = Qwen3MoeForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.bfloat16)
    trajectories, files = as_the_model_names_them(comparison.trajectories, comparison.base, live_tensors(half))
    rounded = EditableModel(half, trajectories, files=files)
    assert rounded.norms("run") == model.norms("run")
    with rounded.edited(Edit("run", 1, tuple(rounded.live))):
        assert all(torch.equal(p, weights["two"][n].bfloat16()) for n, p in half.named_parameters())


def test_wider_vectors_beside_fused_experts_are_not_rounded(tmp_path):
    """Else the base itself, scored in fp32, would be another model than its own checkpoint."""
    Qwen3MoeForCausalLM(Qwen3MoeConfig(**MIXTURE)).bfloat16().save_pretrained(tmp_path / "base")
    tensors = load_file(tmp_path / "base" / WEIGHTS)
    tensors = {n: t + torch.rand(t.shape) if t.ndim == 1 else t for n, t in tensors.items()}
    save_file(tensors, tmp_path / "base" / WEIGHTS, {"format": "pt"})
    net = Qwen3MoeForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    comparison = compare(tmp_path / "base", {"run": [tmp_path / "base"]})
    trajectories, files = as_the_model_names_them(comparison.trajectories, comparison.base, live_tensors(net))
    assert files is None and not any(EditableModel(net, trajectories).norms("run").values())


def test_adapters_beside_fused_experts(tmp_path):
    net = Qwen3MoeForCausalLM(Qwen3MoeConfig(**MIXTURE))
    net.save_pretrained(tmp_path / "base")
    base, a, b = {n: p.detach().clone() for n, p in net.named_parameters()}, torch.randn(2, 8), torch.randn(8, 2)
    names = {"attention": "model.layers.0.self_attn.q_proj", "expert": "model.layers.0.mlp.experts.1.down_proj"}
    for kind, name in names.items():
        pair = {"A": a[:, : 8 if kind == "attention" else 4], "B": b}
        lora(tmp_path / kind, {f"{name}.lora_{x}.weight": t for x, t in pair.items()}, r=2, lora_alpha=4)
    comparison = compare(tmp_path / "base", {"lora": [tmp_path / "attention"], "whole": [tmp_path / "base"]})
    trajectories, files = as_the_model_names_them(comparison.trajectories, comparison.base, live_tensors(net))
    model, name = EditableModel(net, trajectories, files=files), f"{names['attention']}.weight"
    with model.edited(Edit("lora", 0, tuple(model.live))):
        for n, p in net.named_parameters():
            torch.testing.assert_close(p.detach(), base[n] + 2 * b @ a if n == name else base[n])
    assert not any(model.norms("whole").values())
    comparison = compare(tmp_path / "base", {"lora": [tmp_path / "expert"]})
    with pytest.raises(UserError, match=r"fuses, model\.layers\.0\.mlp\.experts\.1\.down_proj\.weight; merge"):
        as_the_model_names_them(comparison.trajectories, comparison.base, live_tensors(net))


def test_experts_that_transformers_turns_are_edited_as_the_model_has_them(tmp_path):
    """Files of Qwen3-VL's mixtures on the hub have the model's names, and their stacks of experts lie (in, out)."""
    text = dict(
        vocab_size=30, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, head_dim=8,
        num_key_value_heads=1, num_experts=2, num_experts_per_tok=1, moe_intermediate_size=6,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
    )  # fmt: skip
    vision = dict(
        depth=1, hidden_size=16, intermediate_size=16, num_heads=2, out_hidden_size=16, patch_size=2,
        num_position_embeddings=4, deepstack_visual_indexes=[],
    )  # fmt: skip
    torch.manual_seed(0)
    net = Qwen3VLMoeForConditionalGeneration(Qwen3VLMoeConfig(text_config=text, vision_config=vision))
    before, weights = bits(net), {}
    for folder in ("base", "hub"):
        net.save_pretrained(tmp_path / folder)
        weights[folder] = {n: p.detach().clone() for n, p in net.named_parameters()}
        turned = {n: t.mT if ".experts." in n else t for n, t in load_file(tmp_path / folder / WEIGHTS).items()}
        save_file({n: t.contiguous() for n, t in turned.items()}, tmp_path / folder / WEIGHTS, {"format": "pt"})
        with torch.no_grad():
            for p in net.parameters():
                p.mul_(1.5)
    with torch.no_grad():
        for name, p in net.named_parameters():
            p.copy_(weights["base"][name])
    comparison, live = compare(tmp_path / "base", {"run": [tmp_path / "hub"]}), live_tensors(net)
    assert set(live) <= set(comparison.base.shapes)
    trajectories, files = as_the_model_names_them(comparison.trajectories, comparison.base, live)
    model = EditableModel(net, trajectories, files=files)
    with model.edited(Edit("run", 0, tuple(model.live))):
        assert all(torch.equal(p, weights["hub"][n]) for n, p in net.named_parameters())
    assert same(bits(net), before)
