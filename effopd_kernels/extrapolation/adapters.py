"""The two adapters of a LoRA student in peft: the products of the trained one, read; sums of products, written.

A sum Σ coefficient·P of products (see products.py) is one adapter again, of concatenated ranks.
"""

import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from copy import copy
from functools import partial

import torch
from torch import Tensor, nn

from .products import Factors, Term, is_nonzero, rank_of
from .selection import plain_name

COMPANION = "effopd"
BASE = "base_model.model."  # where a PeftModel holds the model that its configs speak of
# Initialisations that first change the base weights, most by taking the first r ranks out of them, and do so again
# wherever the adapter is loaded (eva, orthogonal, gaussian and mica leave them alone).
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
# Kinds of adapters that change a weight in proportion to their parameters: what is extrapolated is the weight, too.
LINEAR = ("C3A", "FOURIERFT", "IA3", "LN_TUNING", "MISS", "SHIRA", "TRAINABLE_TOKENS", "WAVEFT")


class Adapters:
    """What peft holds of a student, beside its base.

    Args:
        model: a `peft.PeftModel` with one trained LoRA adapter, or a wrapper (DDP) around it.
        chosen: names of the factors that move. A layer moves if its A or its B does.

    Raises:
        ValueError: not a PeftModel; another kind of adapter than LoRA; several trained adapters; DoRA or another
            variant that is not W + s·B·A; adapter bias; sharded factors; trainable_token_indices; the companion of an
            earlier run on other layers.

    Attributes:
        trained: name of the trained adapter. tensors: its factors that move. layers: those they belong to, by name.
    """

    def __init__(self, model: nn.Module, chosen: Collection[str]):
        self.model = model = _peft_model(model)
        self.all_layers = {n: m for n, m in model.named_modules() if hasattr(m, "lora_A") and hasattr(m, "scaling")}
        trained = {
            adapter
            for layer in self.all_layers.values()
            for factors in (layer.lora_A, layer.lora_B)
            for adapter, factor in factors.items()
            if factor.weight.requires_grad and adapter in layer.active_adapters
        }
        if len(trained) != 1:
            raise ValueError(f"EffOPD moves one trained LoRA adapter, the model has {sorted(trained) or 'none'}")
        (self.trained,) = trained
        if self.trained == COMPANION:
            raise ValueError(
                f"the trained adapter is named {COMPANION!r}, as that of EffOPD's jumps: name it otherwise"
            )
        if getattr(model.peft_config[self.trained], "trainable_token_indices", None):
            raise ValueError(
                "peft cannot save a second adapter beside trainable_token_indices, and EffOPD keeps its jumps in one: "
                "adapt the embeddings as one of the target_modules, or not at all"
            )
        self.layers = {
            name: layer
            for name, layer in self.all_layers.items()
            if any(plain_name(f"{name}.lora_{x}.{self.trained}.weight") in chosen for x in "AB")
        }
        for name, layer in self.layers.items():
            self._check(name, layer)
        self.tensors = [ab[self.trained].weight for m in self.layers.values() for ab in (m.lora_A, m.lora_B)]
        if self.has_companion():
            self._check_companion()

    def has_companion(self) -> bool:
        return COMPANION in self.model.peft_config

    def check_unmerged(self) -> None:
        """Raises ValueError where peft has added an adapter to the base's weights: a forward pass goes by these."""
        merged = next((name for name, layer in self.all_layers.items() if layer.merged_adapters), None)
        if merged is not None:
            raise ValueError(f"the adapters of {merged} are merged into its weight: unmerge_adapter() before an event")

    @torch.no_grad()
    def factors(self, adapter: str) -> Factors:
        """A copy of what an adapter is now, of the layers that move."""
        return {
            name: self.by_expert(
                name,
                layer.lora_A[adapter].weight.detach().float().clone(),
                layer.lora_B[adapter].weight.detach().float() * layer.scaling[adapter],
            )
            for name, layer in self.layers.items()
        }

    def by_expert(self, name: str, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """A layer's factors as peft has them → as `Factors`, on the layer's device."""
        experts, device = _experts(self.layers[name]), self._device(name)
        return a.to(device).reshape(experts, -1, a.shape[1]), _by_expert_b(b.to(device), experts)

    def check_factors(self, name: str, a: Tensor, b: Tensor) -> None:
        """Raises ValueError for factors, as peft has them, that are not of this layer's product."""
        layer, experts = self.layers[name], _experts(self.layers[name])
        fit = a.ndim == b.ndim == 2 and len(a) == b.shape[1] and len(a) % experts == 0
        if not fit or (len(b), a.shape[1]) != (layer.out_features, layer.in_features):
            raise ValueError(
                f"EffOPD state of another model: {name} is {layer.out_features} × {layer.in_features}, and its factors "
                f"there are {tuple(b.shape)} and {tuple(a.shape)}"
            )

    def companion_gradient(self, name: str) -> Tensor | None:
        """∂L/∂B (E, out, R) of the companion; None if the loss did not pass through the layer."""
        gradient = self.layers[name].lora_B[COMPANION].weight.grad
        return None if gradient is None else _by_expert_b(gradient, _experts(self.layers[name]))

    def nonfinite(self) -> int:
        """Elements of the companion's B that are inf or NaN."""
        if not self.has_companion():
            return 0
        return sum(int((~layer.lora_B[COMPANION].weight.isfinite()).sum()) for layer in self.layers.values())

    @torch.no_grad()
    def install(self, terms: list[Term], slope: bool = False) -> None:
        """Make the companion Σ coefficient·P, ranks concatenated and filled up with zeros to a power of two;
        no companion if that is nothing. It has gradients only while a slope is measured; what else is trained stays so.
        """
        terms = terms if slope else list(filter(is_nonzero, terms))
        with _trainability_kept(self.model):
            if not terms:
                if self.has_companion():
                    for layer in self.all_layers.values():
                        vars(layer).pop("set_adapter", None)
                    self.model.delete_adapter(COMPANION)
                return
            rank = 1 << (rank_of(terms) - 1).bit_length()  # few sizes: a compiled student is compiled anew for each
            if not self.has_companion():
                self._add_companion(rank)
            self._activate_companion(slope)
        for name, layer in self.all_layers.items():
            if COMPANION in layer.lora_A:
                a, b = self._concatenated(name, terms, rank)
                layer.lora_A[COMPANION].weight = nn.Parameter(a, requires_grad=False)
                layer.lora_B[COMPANION].weight = nn.Parameter(b, requires_grad=slope)
                self._resize(layer, COMPANION, rank, rank)
        config = self.model.peft_config[COMPANION]
        config.r = config.lora_alpha = rank

    @torch.no_grad()
    def lengthen(self, terms: list[Term]) -> None:
        """Make the trained adapter Σ coefficient·P and delete the companion.

        The factors are the same `Parameter`s with longer data, in fp32, at scaling 1. Raises ValueError, before
        anything is changed, for an adapter that must keep its rank.
        """
        config = self.model.peft_config[self.trained]
        if str(config.init_lora_weights).startswith(CHANGES_BASE):
            raise ValueError(
                f"an adapter with init_lora_weights={config.init_lora_weights!r} must keep its rank, so the jumps stay "
                f"in the adapter {COMPANION!r}: load both, from the folder and from its subfolder of that name"
            )
        rank = rank_of(terms)
        alpha = rank**0.5 if config.use_rslora else rank  # scaling 1
        self.install([])
        # peft keeps the very LoraConfig that the model was made with, and others may be made with it
        config = self.model.peft_config[self.trained] = copy(config)
        for name, layer in self.layers.items():
            factors = layer.lora_A[self.trained].weight, layer.lora_B[self.trained].weight
            for factor, longer in zip(factors, self._concatenated(name, terms, rank), strict=True):
                factor.data, factor.grad = longer, None
            self._resize(layer, self.trained, rank, alpha)
        config.r, config.lora_alpha = rank, alpha
        config.init_lora_weights = True  # others may ask something of the rank wherever the adapter is loaded
        still = {_key(n, m): m for n, m in self.all_layers.items() if n not in self.layers and self.trained in m.r}
        config.rank_pattern = {key: layer.r[self.trained] for key, layer in still.items()}
        config.alpha_pattern = {key: layer.lora_alpha[self.trained] for key, layer in still.items()}

    def _concatenated(self, name: str, terms: list[Term], rank: int) -> tuple[Tensor, Tensor]:
        """Factors of Σ coefficient·P of one layer as peft has them, padded with zeros to the rank."""
        layer = self.all_layers[name]
        experts, device = _experts(layer), self._device(name)
        a = torch.zeros(experts, rank, layer.in_features, dtype=torch.float32, device=device)
        b = torch.zeros(experts, layer.out_features, rank, dtype=torch.float32, device=device)
        start = 0
        for term in terms if name in self.layers else ():
            factor_a, factor_b = term.factors[name]
            ranks = slice(start, start := start + factor_a.shape[1])
            a[:, ranks], b[:, :, ranks] = factor_a, term.coefficient * factor_b
        return as_in_peft(a, b)

    @staticmethod
    def _resize(layer: nn.Module, adapter: str, rank: int, alpha: float) -> None:
        a, b = layer.lora_A[adapter], layer.lora_B[adapter]
        a.out_features = b.in_features = rank * _experts(layer)
        layer.r[adapter], layer.lora_alpha[adapter], layer.scaling[adapter] = rank, alpha, 1.0

    def _add_companion(self, rank: int) -> None:
        """Plain LoRA on the layers that move. Made without memory and without random numbers: `install` fills it."""
        trained = self.model.peft_config[self.trained]
        targets = [n.removeprefix(BASE) for n, m in self.layers.items() if not hasattr(m, "parameter_name")]
        # In a list, names are of all layers that end so; peft combines adapters that have lists, or all expressions.
        endings = {ending for n, _ in self.model.base_model.model.named_modules() for ending in _proper_endings(n)}
        if not endings.isdisjoint(targets):
            targets = "|".join(map(re.escape, targets))
        config = type(trained)(
            r=rank,
            lora_alpha=rank,
            target_modules=targets,
            fan_in_fan_out=trained.fan_in_fan_out,
            init_lora_weights=False,
            task_type=trained.task_type,
            base_model_name_or_path=trained.base_model_name_or_path,
        )
        if any(hasattr(m, "parameter_name") for m in self.layers.values()):  # peft wants the same ones in each adapter
            config.target_parameters = trained.target_parameters
        self.model.add_adapter(COMPANION, config, low_cpu_mem_usage=True)

    def _activate_companion(self, slope: bool) -> None:
        """Both adapters add to the forward pass, whoever activates the trained one again (peft after adding an adapter,
        trainers after a pass of the reference). Only LoRA layers are told: peft's wrappers of trained embeddings and of
        `modules_to_save`, which the companion has no part in, take one adapter at a time."""
        active = self.model.active_adapters
        for layer in self.all_layers.values():
            layer.set_adapter = partial(_set_adapter, layer, self.model.peft_config, self.trained, slope)
            layer.set_adapter(active)
        self.model.base_model.active_adapter = layer.active_adapters

    def _check_companion(self) -> None:
        for name, layer in self.all_layers.items():
            there = COMPANION in layer.lora_A and bool(layer.lora_B[COMPANION].weight.any())
            if there if name not in self.layers else COMPANION not in layer.lora_A:
                raise ValueError(
                    f"the adapter {COMPANION!r} of an earlier run has moved other layers than this one would ({name}): "
                    "fold it into the trained adapter first, or move the same layers"
                )

    def _device(self, name: str) -> torch.device:
        return self.all_layers[name].lora_A[self.trained].weight.device

    def _check(self, name: str, layer: nn.Module) -> None:
        a, b = layer.lora_A[self.trained], layer.lora_B[self.trained]
        if not isinstance(a, nn.Linear) or self.trained in getattr(layer, "lora_variant", {}):
            raise ValueError(
                f"{name} is not plain linear LoRA (W + s·B·A), so its product cannot be extrapolated: leave "
                "DoRA and the like out, or EffOPD"
            )
        if b.bias is not None:
            raise ValueError(f"{name} has a trained LoRA bias, which a product cannot hold: use lora_bias=False")
        if hasattr(a.weight, "placements"):
            raise ValueError(f"the LoRA factors of {name} are sharded; EffOPD needs them whole on every rank (DDP)")


def _proper_endings(name: str) -> list[str]:
    """mlp.fc and fc of dec.mlp.fc."""
    parts = name.split(".")
    return [".".join(parts[i:]) for i in range(1, len(parts))]


def _key(name: str, layer: nn.Module) -> str:
    """What `rank_pattern` and `alpha_pattern` call a layer."""
    name = name.removeprefix(BASE).replace(".base_layer", "")
    return f"{name}.{layer.parameter_name}" if hasattr(layer, "parameter_name") else name


def refuse_curved(model: nn.Module, chosen: Collection[str]) -> None:
    """Raises ValueError for adapters among `chosen` that are neither LoRA nor `LINEAR`."""
    adapters = [name for name in chosen if ".modules_to_save." not in name]
    for name, config in _configs(model).items():
        own = re.compile(rf"\.{re.escape(name)}(\.|$)")
        if config.peft_type not in ("LORA", *LINEAR) and any(map(own.search, adapters)):
            raise ValueError(
                f"EffOPD moves weights along a line, on which the parameters of {name!r} ({type(config).__name__}) do "
                "not lie with the weights that they make: use a LoraConfig"
            )


def _unwrapped(model: nn.Module) -> Iterator[nn.Module]:
    """The model, and what wrappers hold."""
    while isinstance(model, nn.Module):
        yield model
        model = getattr(model, "_orig_mod", getattr(model, "module", None))


def _configs(model: nn.Module) -> dict:
    """Of a `PeftModel`, or of a model that transformers' own `add_adapter` gave adapters."""
    every = (getattr(each, "peft_config", None) for each in _unwrapped(model))
    return next((configs for configs in every if isinstance(configs, dict)), {})


def _peft_model(model: nn.Module) -> nn.Module:
    """What is in the wrappers: the `PeftModel`, of LoRA adapters."""
    try:
        from peft import PeftModel
    except ImportError:
        PeftModel = ()
    peft_model = next((each for each in _unwrapped(model) if isinstance(each, PeftModel)), None)
    if peft_model is None:
        raise ValueError(
            f"LoRA parameters in a {type(model).__name__}, outside a peft.PeftModel: pass the PeftModel itself as "
            "params (get_peft_model makes one; a model's own add_adapter does not)"
        )
    for name, config in peft_model.peft_config.items():
        if config.peft_type != "LORA":
            raise ValueError(
                f"EffOPD moves LoRA adapters, and {name!r} is of {type(config).__name__}: use a LoraConfig"
            )
    return peft_model


def _set_adapter(layer, configs, trained: str, slope: bool, adapter_names: str | list[str], **options) -> None:
    """A layer's own `set_adapter`, after which the companion is active if the trained adapter is, and has gradients
    only for a slope. A partial of the layer, so that a copy of the model has its own."""
    names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
    names = [name for name in names if name != COMPANION] or names
    if trained in names and COMPANION in configs:
        names = [*names, COMPANION]
    type(layer).set_adapter(layer, names, **options)
    if COMPANION in layer.lora_A:
        layer.lora_A[COMPANION].requires_grad_(False)
        layer.lora_B[COMPANION].requires_grad_(slope)


def _experts(layer: nn.Module) -> int:
    return getattr(layer, "num_experts", 1)


def _by_expert_b(b: Tensor, experts: int) -> Tensor:
    """peft's B (out, r·E), whose columns go through the experts first, as (E, out, r). Its A is (E·r, in)."""
    return b.reshape(len(b), -1, experts).permute(2, 0, 1)


def as_in_peft(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """A layer's `Factors` → as peft has them, (E·r, in) and (out, r·E)."""
    return a.flatten(0, 1), b.permute(1, 2, 0).flatten(1)


@contextmanager
def _trainability_kept(model: nn.Module):
    """peft makes every factor of an active adapter trainable, those that the user froze too."""
    flags = [(p, p.requires_grad) for p in model.parameters()]
    try:
        yield
    finally:
        for p, flag in flags:
            p.requires_grad_(flag)
