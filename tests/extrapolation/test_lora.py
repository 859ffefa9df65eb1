"""A LoRA student's effective weight is the dense extrapolation of its merged weights, event after event."""

import copy
import signal
from collections import OrderedDict

import pytest
import torch
from transformers.pytorch_utils import Conv1D

from effopd_kernels.extrapolation import EffOPDController
from effopd_kernels.extrapolation.adapters import Adapters
from effopd_kernels.extrapolation.lora import COMPANION, MOST_TERMS
from effopd_kernels.extrapolation.products import TOLERANCE, Term, shortened

peft = pytest.importorskip("peft")

pytestmark = pytest.mark.filterwarnings("ignore:.*:UserWarning:peft")


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.self_attn = torch.nn.ModuleDict({"q_proj": torch.nn.Linear(6, 5, bias=False)})
        self.mlp = torch.nn.ModuleDict({"up_proj": torch.nn.Linear(5, 7), "down_proj": torch.nn.Linear(7, 6)})
        self.lm_head = torch.nn.Linear(6, 9, bias=False)

    def forward(self, x):
        return self.lm_head(self.mlp["down_proj"](self.mlp["up_proj"](self.self_attn["q_proj"](x)).relu()))


def lora(dtype=torch.float32, seed=0, **options):
    torch.manual_seed(seed)
    options = dict(r=2, lora_alpha=6, target_modules=["q_proj", "up_proj", "down_proj"]) | options
    return peft.get_peft_model(Net().to(dtype), peft.LoraConfig(**options))


def train(model, step):
    """Stands for an optimizer step: the trained factors move."""
    g = torch.Generator().manual_seed(step)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn(p.shape, generator=g).to(p.dtype))


@torch.no_grad()
def merged(model):
    """Effective weights through peft's own delta, of all active adapters, in fp64."""
    out = {}
    for name, layer in model.named_modules():
        if hasattr(layer, "lora_A"):
            weight = layer.base_layer.weight.double()
            for adapter in layer.active_adapters:
                if adapter in layer.lora_A:
                    a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
                    weight = weight + layer.scaling[adapter] * (b.double() @ a.double())
            out[name] = weight
    return out


def trained(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def scripted(*scores):
    play = iter(scores)
    return lambda: next(play)


SCORES = (*(0, 1, 2, 0), *(0, 1, 0), *(0, 0), *(0, 1, 2, 3, 4, 5), *(0, 1, 0))
ALPHAS = (5.0, 3.0, 1.0, 11.0, 3.0)


@pytest.mark.parametrize("options", [{}, dict(rank_pattern={"up_proj": 4}), dict(use_rslora=True)], ids=str)
def test_effective_weight_is_the_dense_extrapolation(options):
    model = lora(**options)
    controller = EffOPDController(model, scripted(*SCORES))
    anchor = merged(model)
    x = torch.randn(4, 6)
    for event, alpha in enumerate(ALPHAS):
        train(model, event)
        current, factors = merged(model), trained(model)
        record = controller.step(2**event)
        assert record.alpha == alpha
        expected = {n: anchor[n] + alpha * (current[n] - anchor[n]) for n in anchor}
        for name, weight in merged(model).items():
            torch.testing.assert_close(weight, expected[name], rtol=1e-5, atol=1e-5)
        delta = torch.cat([(current[n] - anchor[n]).flatten() for n in anchor])
        assert record.delta_norm == pytest.approx(delta.norm().item(), rel=1e-5)
        after = trained(model)
        assert after.keys() == factors.keys() and all(torch.equal(after[n], p) for n, p in factors.items())
        anchor = merged(model)
    # What the model computes is what those weights compute.
    dense = Net()
    dense.load_state_dict(copy.deepcopy(model).merge_and_unload().state_dict())
    torch.testing.assert_close(model(x), dense(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("of", ["linear", "experts"])
def test_the_companion_does_not_grow_with_the_number_of_events(of):
    model = lora() if of == "linear" else experts()
    effective = (lambda: list(merged(model).values())) if of == "linear" else (lambda: products(model))
    controller = EffOPDController(model, scripted(*[0, 1] * 40), schedule=1)
    anchor, ranks = effective(), []
    for event in range(1, 31):
        train(model, event)
        current = effective()
        controller.alphas = (alpha := 2.0 + event % 3,)
        assert controller.step(event).alpha == alpha
        for weight, was, moved in zip(effective(), anchor, current, strict=True):
            expected = was + alpha * (moved - was)
            assert (weight - expected).norm() <= TOLERANCE * expected.norm()
        anchor = effective()
        ranks.append(model.peft_config[COMPANION].r)
    # Exact for so many terms, and of few sizes, for compiled students.
    assert ranks[: MOST_TERMS + 1] == [2, 4, *[8] * 2, *[16] * 4, 32]
    assert max(ranks) == 32  # 25 or less is needed: 7, the longest of the short sides, and 2 for each term


def test_a_sum_of_products_is_shortened_to_its_rank():
    """Rank 3 in one expert and 2 in the other, of terms of rank 4 that cancel but for a little noise."""
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 3, 40, generator=g), torch.randn(2, 60, 3, generator=g)
    b[1, :, 2] = 0
    far_a, far_b = torch.randn(2, 4, 40, generator=g), torch.randn(2, 60, 4, generator=g)
    noise = 1e-6 * torch.randn(2, 60, 4, generator=g)
    zero = torch.zeros(1, 2, 9), torch.zeros(1, 5, 2)
    terms = [
        Term(2.0, {"x": (a, b), "zero": zero}),
        Term(-3.0, {"x": (far_a, far_b), "zero": zero}),
        Term(3.0, {"x": (far_a, far_b + noise), "zero": zero}),
    ]
    short = shortened(terms)
    assert {name: (a.shape, b.shape) for name, (a, b) in short.factors.items()} == {
        "x": ((2, 3, 40), (2, 60, 3)),
        "zero": ((1, 1, 9), (1, 5, 1)),
    }
    exact = sum(t.coefficient * (t.factors["x"][1].double() @ t.factors["x"][0].double()) for t in terms)
    found = short.coefficient * (short.factors["x"][1].double() @ short.factors["x"][0].double())
    assert (found - exact).norm() <= TOLERANCE * exact.norm()
    assert not any(t.any() for t in short.factors["zero"])


class Experts(torch.nn.Module):
    """Three experts in one parameter, as transformers keeps them."""

    def __init__(self):
        super().__init__()
        self.gate_up_proj = torch.nn.Parameter(torch.randn(3, 6, 5))

    def forward(self, x):
        return torch.einsum("ni,eio->no", x, self.gate_up_proj)


def experts():
    torch.manual_seed(0)
    net = torch.nn.ModuleDict(
        {"experts": Experts(), "self_attn": torch.nn.ModuleDict({"q_proj": torch.nn.Linear(6, 5)})}
    )
    options = dict(target_modules=["q_proj"], target_parameters=["experts.gate_up_proj"])
    return peft.get_peft_model(net, peft.LoraConfig(r=2, lora_alpha=6, **options))


def products(model):
    layers = [m for m in model.modules() if hasattr(m, "lora_A")]
    assert len(layers) == 2
    return [sum(m.get_delta_weight(x) for x in m.active_adapters if x in m.lora_A).detach().double() for m in layers]


def test_experts_in_one_parameter():
    """Each expert's product is extrapolated, over several jumps and beside layers of another rank."""
    model = experts()
    controller = EffOPDController(model, scripted(*SCORES))
    anchor = products(model)
    for event, alpha in enumerate(ALPHAS):
        train(model, event)
        current = products(model)
        record = controller.step(2**event)
        assert record.alpha == alpha
        delta = [c - a for a, c in zip(anchor, current, strict=True)]
        anchor = products(model)
        for after, c, d in zip(anchor, current, delta, strict=True):
            torch.testing.assert_close(after, c + (alpha - 1) * d, rtol=1e-5, atol=1e-5)
        assert record.delta_norm == pytest.approx(torch.cat([d.flatten() for d in delta]).norm().item(), rel=1e-5)


class Worded(Net):
    """With words before the layers, which may be trained too and never move."""

    def __init__(self):
        super().__init__()
        self.embed_tokens = torch.nn.Embedding(8, 6)

    def get_input_embeddings(self):
        return self.embed_tokens

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, ids):
        return super().forward(self.embed_tokens(ids))


@pytest.mark.parametrize(
    "options",
    [
        dict(target_modules=["q_proj", "up_proj", "embed_tokens"]),
        dict(target_modules=["q_proj", "up_proj"], modules_to_save=["embed_tokens"]),
    ],
    ids=str,
)
def test_only_layers_that_move_are_touched(options):
    torch.manual_seed(0)
    model = peft.get_peft_model(Worded(), peft.LoraConfig(r=2, **options))
    frozen = next(p for n, p in model.named_parameters() if "up_proj.lora_A" in n).requires_grad_(False)
    controller = EffOPDController(model, scripted(0, 1, 0, 0, 1, 0), exclude=["embed", "up_proj"])
    assert any("up_proj" in name for name in controller.weights.still)
    train(model, 0)
    names, ids = trained(model).keys(), torch.arange(8)
    random, words = torch.get_rng_state(), model.get_input_embeddings()(ids)
    for step in (1, 2):
        assert controller.step(step).alpha == 3.0
        assert trained(model).keys() == names and not frozen.requires_grad
        assert torch.equal(model.get_input_embeddings()(ids), words)
        companion = {n for n, _ in model.named_parameters() if COMPANION in n}
        assert len(companion) == 2 and all("q_proj.lora_" in n for n in companion)
        assert torch.equal(torch.get_rng_state(), random)
        train(model, step)
        words = model.get_input_embeddings()(ids)


def test_a_layer_with_one_trained_factor_moves():
    model = lora(target_modules=["q_proj"])
    next(p for n, p in model.named_parameters() if "lora_A" in n).requires_grad_(False)
    controller = EffOPDController(model, scripted(0, 1, 0))
    anchor = merged(model)
    train(model, 0)
    current = merged(model)
    assert controller.step(1).alpha == 3.0
    for name, weight in merged(model).items():
        torch.testing.assert_close(weight, anchor[name] + 3 * (current[name] - anchor[name]), rtol=1e-5, atol=1e-5)


def test_another_adapter_that_is_active_stays_so():
    model = lora(target_modules=["q_proj"])
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["up_proj"], init_lora_weights=False))
    model.base_model.set_adapter(["default", "other"])
    for name, parameter in model.named_parameters():
        if ".other." in name:
            parameter.requires_grad_(False)
    controller = EffOPDController(model, scripted(0, 1, 0))
    train(model, 0)
    before = merged(model)
    assert controller.step(1).alpha == 3.0
    assert model.active_adapters == ["default", "other", COMPANION]
    name = next(n for n in before if "up_proj" in n)
    assert torch.equal(merged(model)[name], before[name]) and not any(".other." in n for n in trained(model))


def test_the_jumps_adapter_is_told_what_the_trained_one_is():
    """Conv1D keeps its weight the other way round, which peft asks the config of each adapter."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(OrderedDict(c_fc=Conv1D(5, 4)))
    options = dict(r=2, target_modules=["c_fc"], fan_in_fan_out=True, init_lora_weights=False)
    model = peft.get_peft_model(net, peft.LoraConfig(**options))
    trained_config = model.peft_config["default"]
    trained_config.base_model_name_or_path, trained_config.task_type = "org/base", "FEATURE_EXTRACTION"
    x, outputs = torch.randn(3, 4), []
    controller = EffOPDController(model, scripted(0, 1, 0), include="c_fc")
    for change in (lambda: None, lambda: train(model, 0), lambda: controller.step(1)):
        change()
        outputs.append(model(x).detach())
    anchor, current, jumped = outputs
    torch.testing.assert_close(jumped, anchor + 3 * (current - anchor), rtol=1e-4, atol=1e-4)
    for option in "fan_in_fan_out", "task_type", "base_model_name_or_path":
        assert getattr(model.peft_config[COMPANION], option) == getattr(trained_config, option)


def test_an_adapter_that_is_not_active_is_not_among_those_trained():
    model = lora(target_modules=["q_proj"])
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["up_proj"]))
    model.requires_grad_(True)
    assert EffOPDController(model, lambda: 0.0, include="lora").weights.adapters.trained == "default"


def test_a_product_that_overflows_is_not_scored():
    model = lora(init_lora_weights=False)
    controller = EffOPDController(model, scripted(0), alphas=(1e38,))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.add_(10.0)
    event = controller.step(1)
    assert event.num_candidates == 0 and event.candidates[0].score is None


def test_ctrl_c_waits_until_the_adapters_are_folded(monkeypatch):
    model = lora()
    controller = EffOPDController(model, scripted(0, 1, 0))
    train(model, 0)
    controller.step(1)
    before, resize = merged(model), Adapters._resize

    def interrupted(*args):
        signal.raise_signal(signal.SIGINT)
        resize(*args)

    monkeypatch.setattr(Adapters, "_resize", staticmethod(interrupted))
    with pytest.raises(KeyboardInterrupt):
        controller.fold_()
    assert list(model.peft_config) == ["default"]
    torch.testing.assert_close(merged(model), before)


def test_the_jumps_are_active_whenever_the_trained_adapter_is():
    """Trainers with a reference adapter switch to it and back, or disable all."""
    model = lora(init_lora_weights=False)
    controller = EffOPDController(model, scripted(0, 1, 0))
    train(model, 0)
    model.add_adapter("ref", peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj", "lm_head"]))
    controller.step(1)
    x, whole, names = torch.randn(4, 6), merged(model), trained(model).keys()
    out = model(x)
    base = Net()
    base.load_state_dict(copy.deepcopy(model).unload().state_dict())

    def back_in(some):
        """Whether the model is whole, and whether it is with the reference alone and with nothing."""
        some.set_adapter("ref")  # whose B is 0
        torch.testing.assert_close(some(x), base(x))
        some.set_adapter("default")
        with some.disable_adapter():
            torch.testing.assert_close(some(x), base(x))
        return torch.equal(some(x), out) and torch.equal(some.base_model.model.self_attn["q_proj"](x), q)

    q = model.base_model.model.self_attn["q_proj"](x)
    assert back_in(model) and trained(model).keys() == names
    assert all(torch.equal(weight, whole[n]) for n, weight in merged(model).items() if n in whole)
    other = copy.deepcopy(model)
    assert back_in(other) and back_in(torch.compile(other, backend="aot_eager"))
    other.delete_adapter(COMPANION)
    other.set_adapter("default")
    with other.disable_adapter():
        torch.testing.assert_close(other(x), base(x))
    assert back_in(model)
    controller.fold_()
    torch.testing.assert_close(model(x), out)
    model.set_adapter("ref")
    model.set_adapter("default")
    assert model.active_adapters == ["default"]
    assert not any("set_adapter" in vars(layer) for layer in model.modules())


def test_a_slope_is_measured_of_a_loss_that_switches_adapters():
    model = lora(init_lora_weights=False)
    model.add_adapter("ref", peft.LoraConfig(r=2, target_modules=["q_proj"]))
    controller = EffOPDController(model, lambda: 0.0)
    train(model, 0)
    controller.weights.hold()
    x, slopes = torch.randn(16, 6), []
    for switching in (False, True):
        model.zero_grad()
        controller.weights.write_for_slope(2.0)
        if switching:
            model.set_adapter("ref")
            model.set_adapter("default")
            with model.disable_adapter():
                model(x)
        model(x).square().mean().backward()
        slopes.append(controller.weights.slope(1))
    assert slopes[0] == slopes[1] != 0.0
    # Of several ranks, which all hold all, each gives its part.
    assert controller.weights.slope(2) == slopes[1] / 2
    assert controller.weights.norms(2) == tuple(norm / 2 for norm in controller.weights.norms(1))


def test_candidates_are_on_the_line_when_they_are_scored():
    model = lora()
    anchor, seen = merged(model), []

    def score():
        seen.append(merged(model))
        return len(seen)

    controller = EffOPDController(model, score)
    train(model, 0)
    current = merged(model)
    controller.step(1)
    for alpha, weights in zip((1, 3, 5, 7, 9, 11), seen, strict=True):
        for name, weight in weights.items():
            torch.testing.assert_close(
                weight, anchor[name] + alpha * (current[name] - anchor[name]), rtol=1e-5, atol=1e-5
            )


def test_nothing_accepted_or_an_exception_leaves_the_model_as_it_was():
    model = lora()
    controller = EffOPDController(model, scripted(1, 0))
    train(model, 0)
    names, before = set(model.state_dict()), trained(model)
    assert controller.step(1).alpha == 1.0
    assert set(model.state_dict()) == names and list(model.peft_config) == ["default"]
    controller.score_fn = scripted(0, 1, 0)
    train(model, 1)
    controller.step(2)
    companion = {n: p.clone() for n, p in model.state_dict().items() if COMPANION in n}

    def broken():
        broken.calls += 1
        if broken.calls == 2:
            raise RuntimeError("lost")
        return broken.calls

    broken.calls = 0
    controller.score_fn = broken
    train(model, 2)
    before = trained(model)
    with pytest.raises(RuntimeError, match="lost"):
        controller.step(4)
    after = {n: p for n, p in model.state_dict().items() if COMPANION in n}
    assert after.keys() == companion.keys() and all(torch.equal(after[n], p) for n, p in companion.items())
    assert all(torch.equal(p, before[n]) for n, p in trained(model).items())


def test_resume_equals_not_stopping(tmp_path):
    whole = lora()
    controller = EffOPDController(whole, scripted(*SCORES))
    for event in range(5):
        train(whole, event)
        controller.step(2**event)
    first = lora()
    controller = EffOPDController(first, scripted(*SCORES))
    for event in range(2):
        train(first, event)
        controller.step(2**event)
    controller.save(tmp_path)
    second = lora(seed=0)
    second.load_state_dict({n: p for n, p in first.state_dict().items() if COMPANION not in n})
    again = EffOPDController(second, scripted(*SCORES[7:]))
    again.load(tmp_path)
    for event in range(2, 5):
        train(second, event)
        again.step(2**event)
    for name, weight in merged(whole).items():
        assert torch.equal(weight, merged(second)[name])


def test_saved_by_peft_and_loaded_again_is_the_same_model(tmp_path):
    model = lora()
    controller = EffOPDController(model, scripted(0, 1, 2, 0))
    train(model, 0)
    controller.step(1)
    model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    again = peft.PeftModel.from_pretrained(Net(), tmp_path)
    again.load_adapter(tmp_path / COMPANION, COMPANION)
    again.add_weighted_adapter(["default", COMPANION], [1.0, 1.0], "merged", combination_type="cat")
    again.set_adapter("merged")
    for name, weight in merged(again).items():
        torch.testing.assert_close(weight, merged(model)[name], rtol=1e-5, atol=1e-5)
    # A controller on a model that has a companion already keeps it as part of the weights.
    again = peft.PeftModel.from_pretrained(Net(), tmp_path, is_trainable=True)
    again.base_model.model.load_state_dict(model.base_model.model.state_dict(), strict=False)
    again.load_adapter(tmp_path / COMPANION, COMPANION)
    EffOPDController(again, lambda: 0.0)
    for name, weight in merged(again).items():
        torch.testing.assert_close(weight, merged(model)[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "options, exclude",
    [
        ({}, "nothing"),
        (dict(use_rslora=True, rank_pattern={"up_proj": 4}), "nothing"),
        (dict(use_rslora=True, rank_pattern={"up_proj": 4}, alpha_pattern={"down_proj": 3}), "up_proj|down_proj"),
        (dict(init_lora_weights="orthogonal"), "nothing"),
        (dict(target_modules=["q_proj", "up_proj", "embed_tokens"]), "embed"),
    ],
    ids=str,
)
def test_folded_it_is_one_adapter_that_trains_on(options, exclude, tmp_path):
    torch.manual_seed(0)
    options = dict(r=2, lora_alpha=6, target_modules=["q_proj", "up_proj", "down_proj"]) | options
    base = Worded()
    model = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**options))
    optimizer = torch.optim.Adagrad([p for p in model.parameters() if p.requires_grad], 0.05)

    def step(i):
        optimizer.zero_grad()
        (model(torch.arange(8)) - i).square().mean().backward()
        optimizer.step()

    controller = EffOPDController(model, scripted(0, 1, 0, 0, 1, 2, 0), exclude=exclude, optimizer=optimizer)
    for i in (1, 2):
        step(i)
        assert controller.step(i).alpha > 1
    ids, names = torch.arange(8), trained(model).keys()
    before = model(ids).detach()
    controller.fold_()
    assert list(model.peft_config) == model.active_adapters == ["default"] and trained(model).keys() == names
    torch.testing.assert_close(model(ids), before, rtol=1e-5, atol=1e-5)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(base, tmp_path)
    torch.testing.assert_close(again(ids), before, rtol=1e-5, atol=1e-5)
    state, folded = controller.weights.state(), model(ids)
    controller.fold_()  # nothing to fold
    assert all(map(torch.equal, controller.weights.state().values(), state.values()))
    assert torch.equal(model(ids), folded)
    step(3)
    assert not torch.equal(model(ids), before)
    controller.score_fn = scripted(0, 1, 0)
    assert controller.step(4).alpha == 3.0


def test_folding_leaves_the_config_that_the_model_was_made_with():
    config = peft.LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj"], rank_pattern={"q_proj": 3})
    model = peft.get_peft_model(Net(), config)
    before = config.to_dict()
    controller = EffOPDController(model, scripted(0, 1, 0))
    train(model, 0)
    controller.step(1)
    controller.fold_()
    assert config.to_dict() == before
    for holder in (model, model.base_model, model.base_model.model):
        assert holder.peft_config["default"].r == 6


def test_folding_experts(tmp_path):
    model = experts()
    controller = EffOPDController(model, scripted(0, 1, 0, 0, 1, 0))
    for event in (1, 2):
        train(model, event)
        controller.step(event)
    before = products(model)
    controller.fold_()
    for after, product in zip(products(model), before, strict=True):
        torch.testing.assert_close(after, product, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["pissa", "olora"])
def test_an_adapter_tied_to_its_rank_is_not_folded(kind):
    model = lora(init_lora_weights=kind, target_modules=["q_proj"])
    controller = EffOPDController(model, scripted(0, 1, 0))
    train(model, 0)
    controller.step(1)
    before = merged(model)
    with pytest.raises(ValueError, match=f"init_lora_weights='{kind}' must keep its rank"):
        controller.fold_()
    assert all(torch.equal(weight, before[n]) for n, weight in merged(model).items())


def test_gradient_search_past_a_layer_that_the_loss_does_not_use():
    """An expert no token was sent to has no gradient."""
    torch.manual_seed(0)
    net = Net()
    net.experts = torch.nn.ModuleDict({"up_proj": torch.nn.Linear(5, 7)})
    model = peft.get_peft_model(net, peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"]))
    x, y = torch.randn(16, 6), torch.randn(16, 9)

    def loss():
        return (model(x) - y).square().mean()

    controller = EffOPDController(model, None, search="gradient", loss_fn=loss)
    loss().backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.05).step()
    assert controller.step(1).alpha > 1


def test_gradient_search_moves_the_product():
    model = lora()
    x, y = torch.randn(16, 6), torch.randn(16, 9)

    def loss():
        return (model(x) - y).square().mean()

    controller = EffOPDController(model, None, search="gradient", loss_fn=loss)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.05)
    for step in (1, 2):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
        before = loss().item()
        controller.weights.hold()
        h, line = 1e-2, []
        for alpha in (2 - h, 2 + h):
            controller.weights.write(alpha)
            line.append(loss().item())
        controller.weights.write_for_slope(2.0)
        loss().backward()
        assert controller.weights.slope(1) == pytest.approx((line[1] - line[0]) / (2 * h), rel=0.05)
        controller.weights.restore()
        event = controller.step(step)
        assert event.alpha > 1 and loss().item() < before
        assert not any(p.requires_grad for n, p in model.named_parameters() if COMPANION in n)


def test_factors_stepped_inside_autocast_are_scored_as_they_are():
    model, x, scores = lora(), torch.randn(4, 6), []

    def score():
        scores.append(model(x).float().square().mean().item())
        return scores[-1] if len(scores) == 1 else -1.0

    controller = EffOPDController(model, score)
    with torch.autocast("cpu", torch.bfloat16):
        model(x)  # autocast keeps its casts of the factors
        train(model, 1)
        assert controller.step(1).alpha == 1.0
    with torch.autocast("cpu", torch.bfloat16):
        score()
    assert scores[-1] == scores[0] != scores[1]


def test_bf16_adapters_keep_fp32_products():
    model = lora(torch.bfloat16)
    for p in trained_parameters(model):
        p.data = p.data.bfloat16()
    controller = EffOPDController(model, scripted(0, 1, 0))
    anchor = merged(model)
    train(model, 0)
    current = merged(model)
    controller.step(1)
    for name, weight in merged(model).items():
        torch.testing.assert_close(weight, anchor[name] + 3 * (current[name] - anchor[name]), rtol=1e-5, atol=1e-5)
    assert model(torch.randn(2, 6).bfloat16()).dtype == torch.bfloat16


def test_a_wrapped_peft_model_is_found():
    class Wrapper(torch.nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

    model = lora()
    compiled, both = (torch.compile(m, backend="eager") for m in (model, Wrapper(model)))
    for wrapped in (compiled, both, Wrapper(model), Wrapper(compiled)):
        assert EffOPDController(wrapped, lambda: 0.0).weights.adapters.model is model


def trained_parameters(model):
    return [p for p in model.parameters() if p.requires_grad]


def test_what_cannot_be_extrapolated_is_refused():
    with pytest.raises(ValueError, match="pass the PeftModel as params"):
        EffOPDController(lora().named_parameters(), lambda: 0.0)
    for inner in (
        lora().base_model,
        lora().base_model.model,
        peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["q_proj"]), Net()),
    ):
        with pytest.raises(ValueError, match=f"in a {type(inner).__name__}, .* pass the PeftModel itself"):
            EffOPDController(inner, lambda: 0.0)
    adalora = peft.AdaLoraConfig(init_r=4, target_r=2, total_step=20, target_modules=["q_proj"])
    with pytest.raises(ValueError, match="'default' is of AdaLoraConfig: use a LoraConfig"):
        EffOPDController(peft.get_peft_model(Net(), adalora), lambda: 0.0)
    with pytest.raises(ValueError, match=r"not plain linear LoRA .*: leave DoRA and the like out, or EffOPD"):
        EffOPDController(lora(use_dora=True), lambda: 0.0)
    with pytest.raises(ValueError, match="trained LoRA bias"):
        EffOPDController(lora(lora_bias=True, target_modules=["up_proj"]), lambda: 0.0)
    tokens = peft.LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [3]})
    with pytest.raises(ValueError, match="cannot save a second adapter beside trainable_token_indices"):
        EffOPDController(peft.get_peft_model(Worded(), tokens), lambda: 0.0)
    model = lora(target_modules=["q_proj"])
    controller = EffOPDController(model, scripted(0, 1, 0))
    train(model, 0)
    controller.step(1)
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["up_proj"]))
    model.set_adapter("other")
    with pytest.raises(ValueError, match="moved other layers than this one would"):
        EffOPDController(model, lambda: 0.0)
    model = lora(target_modules=["q_proj", "up_proj"])
    controller = EffOPDController(model, scripted(0, 1, 0))
    train(model, 0)
    controller.step(1)
    with pytest.raises(ValueError, match=r"moved other layers than this one would \(.*up_proj"):
        EffOPDController(model, lambda: 0.0, exclude="up_proj")
    mixed = lora()
    mixed.base_model.model.mlp["up_proj"].base_layer.bias.requires_grad_(True)
    with pytest.raises(ValueError, match="trained beside LoRA adapters"):
        EffOPDController(mixed, lambda: 0.0)
    other = EffOPDController(lora(target_modules=["q_proj"]), lambda: 0.0).state_dict()
    with pytest.raises(ValueError, match="other LoRA layers"):
        EffOPDController(lora(), lambda: 0.0).load_state_dict(other)
    dense = EffOPDController(Net(), lambda: 0.0).state_dict()
    with pytest.raises(ValueError, match="other LoRA layers"):
        EffOPDController(lora(), lambda: 0.0).load_state_dict(dense)
    with pytest.raises(ValueError, match="the trained adapter is named 'effopd'"):
        model = peft.get_peft_model(Net(), peft.LoraConfig(r=2, target_modules=["q_proj"]), adapter_name=COMPANION)
        EffOPDController(model, lambda: 0.0)
    assert list(model.peft_config) == [COMPANION] and model.base_model.model.self_attn["q_proj"].lora_A


def test_a_state_of_another_width_changes_nothing():
    torch.manual_seed(0)
    controllers = []
    for width in (8, 16):
        net = torch.nn.ModuleDict({"mlp": torch.nn.ModuleDict({"up_proj": torch.nn.Linear(width, width)})})
        model = peft.get_peft_model(net, peft.LoraConfig(r=2, target_modules=["up_proj"]))
        controllers.append(EffOPDController(model, scripted(0, 1, 0), alphas=(3, 5)))
        train(model, 0)
        controllers[-1].step(1)
    before = {name: tensor.clone() for name, tensor in controllers[1].state_dict()["anchor"].items()}
    with pytest.raises(ValueError, match=r"up_proj is 16 × 16, and its factors there are \(8, 2\) and \(2, 8\)"):
        controllers[1].load_state_dict(controllers[0].state_dict())
    after = controllers[1].state_dict()["anchor"]
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_layers_whose_names_end_alike_are_left_alone():
    torch.manual_seed(0)
    own, other = (torch.nn.ModuleDict({"fc": torch.nn.Linear(4, 4)}) for _ in range(2))
    net = torch.nn.ModuleDict({"mlp": own, "dec": torch.nn.ModuleDict({"mlp": other})})
    model = peft.get_peft_model(net, peft.LoraConfig(r=2, target_modules=r"mlp\.fc"))
    controller = EffOPDController(model, scripted(0, 1, 0), alphas=(3, 5))
    train(model, 0)
    assert controller.step(1).alpha == 3.0
    assert not hasattr(other["fc"], "lora_A") and not any(p.is_meta for p in model.parameters())


def adapted(config):
    torch.manual_seed(0)
    net = peft.get_peft_model(torch.nn.ModuleDict({"mlp": torch.nn.Linear(8, 8, bias=False)}), config)
    return net, lambda: net.base_model.model["mlp"](torch.eye(8)).detach()


@pytest.mark.parametrize("config", ["IA3Config", "FourierFTConfig", "ShiraConfig", "MissConfig"])
def test_adapters_that_are_linear_in_their_parameters_move_as_the_weights_do(config):
    options = {"IA3Config": {"feedforward_modules": []}, "FourierFTConfig": {"n_frequency": 9}}.get(config, {"r": 2})
    net, weight = adapted(getattr(peft, config)(target_modules=["mlp"], **options))
    scores = iter((0.0, 1.0))
    controller = EffOPDController(net, lambda: next(scores), alphas=(5,))
    anchor = weight()
    train(net, 1)
    current = weight()
    assert controller.step(1).alpha == 5
    torch.testing.assert_close(weight(), anchor + 5 * (current - anchor), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("config", ["LoHaConfig", "LoKrConfig", "VeraConfig", "HRAConfig", "AdaLoraConfig"])
def test_adapters_that_are_not_are_refused(config):
    options = {"AdaLoraConfig": {"total_step": 9, "init_r": 3}}.get(config, {"r": 2})
    net, _ = adapted(getattr(peft, config)(target_modules=["mlp"], **options))
    with pytest.raises(ValueError, match=config):
        EffOPDController(net, lambda: 0.0)


def test_merged_adapters_are_refused():
    """A forward pass would not see candidates."""
    net, scores = lora(), iter(range(9))
    controller = EffOPDController(net, lambda: next(scores), alphas=(5,))
    train(net, 1)
    net.merge_adapter()
    with pytest.raises(ValueError, match=r"merged.*unmerge_adapter"):
        controller.step(1)
    net.unmerge_adapter()
    assert controller.step(1).alpha == 5


def test_adapters_that_transformers_adds_are_looked_at_too():
    from transformers import Qwen3Config, Qwen3ForCausalLM

    sizes = dict(hidden_size=16, intermediate_size=16, num_attention_heads=2, num_key_value_heads=2, head_dim=8)
    net = Qwen3ForCausalLM(Qwen3Config(vocab_size=9, num_hidden_layers=1, **sizes))
    net.add_adapter(peft.LoHaConfig(r=2, target_modules=["up_proj"]))
    with pytest.raises(ValueError, match="LoHaConfig"):
        EffOPDController(net, lambda: 0.0)


def test_modules_that_are_trained_whole_beside_other_adapters_move():
    config = peft.VeraConfig(r=2, target_modules=["down_proj"], modules_to_save=["up_proj"])
    net = peft.get_peft_model(Net(), config)
    controller = EffOPDController(net, lambda: 0.0, include="modules_to_save", exclude=())
    assert all("modules_to_save" in name for name in controller.weights.names)
