"""LoRA students: extrapolating the merged product exactly, while the trained factors stay as they are.

An adapter changes a layer's weight by P = s·B·A (s scaling, A (r, in), B (out, r)). Extrapolating A and B one by one
would not extrapolate P. What has to be added to the weight to make it W_A + α(W_t − W_A) is

    F = (α − 1)·(P_t − P_anchor)            rank ≤ 2r: (α − 1)·s·[B_t, −B_anchor] [A_t; A_anchor]

and F goes into a second, frozen adapter, the companion, by concatenation of ranks. The trained adapter keeps its
factors, its shape and its optimizer state, as the published rule asks of every weight. Over events F = Σ c_j·P_j, where
an event adds one product and changes the coefficient of another, so the companion's rank is at most
r·(accepted events + 1).

E experts in one parameter (peft's `target_parameters`) have E products: factors are (E, r, in) and (E, out, r) here,
E = 1 for a linear layer.

The alternatives lose something: folding F into the base weights rounds it to their dtype, fails on quantised ones, and
makes the saved adapter wrong on the published base; truncating to rank r is not the extrapolation; lengthening the
trained factors changes parameters an optimizer holds. The price of the companion is its forward pass and a second
folder when saving, until `fold`, at the end, makes one adapter of the two.
"""

from collections.abc import Collection, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .selection import plain_name

__all__ = ["COMPANION", "LoraWeights", "is_lora_name"]

COMPANION = "effopd"
BASE = "base_model.model."  # where a PeftModel holds the model that its configs speak of
# Initialisations that first change the base weights, most by taking the first r ranks out of them, and do so again
# wherever the adapter is loaded (eva, orthogonal, gaussian and mica leave them alone).
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")

Factors = dict[str, tuple[Tensor, Tensor]]  # layer → (A (E, r, in), s·B (E, out, r)), fp32


@dataclass
class Term:
    coefficient: float
    factors: Factors


def is_lora_name(name: str) -> bool:
    return ".lora_A." in name or ".lora_B." in name


class LoraWeights:
    """The merged products of a peft LoRA model; the interface of `DenseWeights`.

    Args:
        model: a `peft.PeftModel` with one trained LoRA adapter, or a wrapper (DDP) around it.
        chosen: names of the factors that move. A layer moves if its A or its B does.

    Raises:
        ValueError: not a PeftModel; several trained adapters; DoRA or another variant that is not W + s·B·A; adapter
            bias; sharded factors; trainable_token_indices; the companion of an earlier run on other layers.
    """

    sharded = False

    def __init__(self, model: nn.Module, chosen: Collection[str]):
        while not hasattr(model, "peft_config") and hasattr(model, "module"):
            model = model.module
        if not hasattr(model, "peft_config") or not hasattr(model, "base_model"):
            raise ValueError("LoRA parameters outside a peft.PeftModel: pass the PeftModel itself as params")
        self.model = model = getattr(model, "_orig_mod", model)
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
        (self.adapter,) = trained
        if getattr(model.peft_config[self.adapter], "trainable_token_indices", None):
            raise ValueError(
                "peft cannot save a second adapter beside trainable_token_indices, and EffOPD keeps its jumps in one: "
                "adapt the embeddings as one of the target_modules, or not at all"
            )
        self.layers = {
            name: layer
            for name, layer in self.all_layers.items()
            if any(plain_name(f"{name}.lora_{x}.{self.adapter}.weight") in chosen for x in "AB")
        }
        for name, layer in self.layers.items():
            self._check(name, layer)
        self.tensors = [ab[self.adapter].weight for m in self.layers.values() for ab in (m.lora_A, m.lora_B)]
        self.settled: list[Term] = []  # what the companion holds; the last one is the anchor's product
        if self._has_companion():  # left by an earlier run: part of the weights, and not of this run's δ
            self._check_companion()
            self.settled = [Term(1.0, self._factors(COMPANION))]
        self.settled.append(Term(0.0, self._factors(self.adapter)))
        self.held: Factors | None = None
        self.offered: list[Term] = self.settled
        self._install(self.settled)

    def hold(self) -> None:
        """Keep P_t."""
        self.held = self._factors(self.adapter)

    @torch.no_grad()
    def write(self, alpha: float) -> list[Tensor]:
        """F(α) into the companion. Returns three (1,) tensors as `DenseWeights.write`; ‖·‖² are those of products."""
        self.offered = self.settled if alpha == 1.0 else self._line(alpha)
        self._install(self.offered)
        return self._stats()

    def write_for_slope(self, alpha: float) -> None:
        """As `write`, such that a backward pass leaves what `slope` needs."""
        self._install(self._line(alpha), slope=True)

    def slope(self, world_size: int) -> float:
        """This rank's part of ∂L/∂α = Σ ∂L/∂F·(P_t − P_anchor), after `write_for_slope` and a backward pass."""
        total = 0.0
        for name, (_, b) in self.held.items():
            b0 = self.settled[-1].factors[name][1]
            used = sum(t.factors[name][0].shape[1] for t in self.settled) + b.shape[2]
            gradient = self.layers[name].lora_B[COMPANION].weight.grad
            if gradient is None:  # the loss did not pass through this layer
                continue
            direction = torch.cat([-b0, b], 2)  # ∂B/∂α of the last two of the concatenated ranks
            gradient = _by_expert_b(gradient, len(b))[:, :, used - direction.shape[2] : used]
            total += float((gradient.double() * direction).sum())
        return total / world_size

    def trained(self) -> list[Tensor]:
        """Every parameter that a backward pass may give a gradient."""
        return list(self.model.parameters())

    def restore(self) -> None:
        self.held, self.offered = None, self.settled
        self._install(self.settled)

    def settle(self) -> None:
        """The anchor becomes the current weights: the companion keeps F, and δ counts from P_t."""
        coefficient = 0.0 if self.offered is self.settled else self.offered[-1].coefficient
        others = self.offered if self.offered is self.settled else self.offered[:-1]
        self.settled = [*filter(self._counts, others), Term(coefficient, self.held)]
        self.held, self.offered = None, self.settled
        self._install(self.settled)

    @torch.no_grad()
    def fold(self) -> bool:
        """Make the trained adapter the whole product and delete the companion; False if there is nothing to fold.

        The factors are the same `Parameter`s with longer data, in fp32, at scaling 1. Raises ValueError, before
        anything is changed, for an adapter that must keep its rank.
        """
        terms = list(filter(self._counts, self.settled))
        if not terms:
            return False
        config = self.model.peft_config[self.adapter]
        if str(config.init_lora_weights).startswith(CHANGES_BASE):
            raise ValueError(
                f"an adapter with init_lora_weights={config.init_lora_weights!r} must keep its rank, so the jumps stay "
                f"in the adapter {COMPANION!r}: load both, from the folder and from its subfolder of that name"
            )
        terms.insert(0, Term(1.0, self._factors(self.adapter)))
        rank = _rank(terms)
        alpha = rank**0.5 if config.use_rslora else rank  # scaling 1
        self._install([])
        for name, layer in self.layers.items():
            factors = layer.lora_A[self.adapter].weight, layer.lora_B[self.adapter].weight
            for factor, longer in zip(factors, self._concatenated(name, terms, rank), strict=True):
                factor.data, factor.grad = longer, None
            self._resize(layer, self.adapter, rank, alpha)
        config.r, config.lora_alpha = rank, alpha
        config.init_lora_weights = True  # others may ask something of the rank wherever the adapter is loaded
        still = {_key(n, m): m for n, m in self.all_layers.items() if n not in self.layers and self.adapter in m.r}
        config.rank_pattern = {key: layer.r[self.adapter] for key, layer in still.items()}
        config.alpha_pattern = {key: layer.lora_alpha[self.adapter] for key, layer in still.items()}
        self.settled = self.offered = [Term(0.0, self._factors(self.adapter))]
        return True

    def norms(self, world_size: int) -> tuple[float, float]:
        """As `DenseWeights.norms`, of the products; every rank holds them all."""
        delta_sq, weight_sq = self._squares()
        return delta_sq / world_size, weight_sq / world_size

    def state(self) -> dict[str, Tensor]:
        out = {"coefficients": torch.tensor([t.coefficient for t in self.settled], dtype=torch.float64, device="cpu")}
        for j, term in enumerate(self.settled):
            for name, (a, b) in term.factors.items():
                out[f"{j}.{name}.A"], out[f"{j}.{name}.B"] = _as_in_peft(a, b)
        return out

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Raises ValueError when the layers are not those of the state, before anything is changed."""
        coefficients = state["coefficients"].tolist() if "coefficients" in state else []
        expected = {f"{j}.{n}.{x}" for j in range(len(coefficients)) for n in self.layers for x in "AB"}
        if not coefficients or expected != set(state) - {"coefficients"}:
            some = sorted(expected ^ (set(state) - {"coefficients"}))[:3]
            raise ValueError(f"EffOPD state of other LoRA layers: {some} are in one and not in the other")
        self.settled = self.offered = [
            Term(
                c,
                {
                    n: self._by_expert(n, *(state[f"{j}.{n}.{x}"].to(self._device(n)) for x in "AB"))
                    for n in self.layers
                },
            )
            for j, c in enumerate(coefficients)
        ]
        self._install(self.settled)

    def _line(self, alpha: float) -> list[Term]:
        """Σ c_j·P_j with α − 1 of P_anchor moved to P_t."""
        *others, anchor = self.settled
        moved = Term(anchor.coefficient - (alpha - 1.0), anchor.factors)
        return [*others, moved, Term(alpha - 1.0, self.held)]

    @torch.no_grad()
    def _install(self, terms: list[Term], slope: bool = False) -> None:
        """Make the companion Σ coefficient·P, ranks concatenated; no companion if that is nothing. It has gradients
        only while a slope is measured, and what else is trained stays so."""
        terms = terms if slope else list(filter(self._counts, terms))
        with _trainability_kept(self.model):
            if not terms:
                if self._has_companion():
                    self.model.delete_adapter(COMPANION)
                return
            rank = _rank(terms)
            if not self._has_companion():
                self._add_companion(rank)
            self._activate_companion()
        for name, layer in self.all_layers.items():
            if COMPANION in layer.lora_A:
                a, b = self._concatenated(name, terms, rank)
                layer.lora_A[COMPANION].weight = nn.Parameter(a, requires_grad=False)
                layer.lora_B[COMPANION].weight = nn.Parameter(b, requires_grad=slope)
                self._resize(layer, COMPANION, rank, rank)
        config = self.model.peft_config[COMPANION]
        config.r = config.lora_alpha = rank

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
        return _as_in_peft(a, b)

    @staticmethod
    def _resize(layer: nn.Module, adapter: str, rank: int, alpha: float) -> None:
        a, b = layer.lora_A[adapter], layer.lora_B[adapter]
        a.out_features = b.in_features = rank * _experts(layer)
        layer.r[adapter], layer.lora_alpha[adapter], layer.scaling[adapter] = rank, alpha, 1.0

    def _add_companion(self, rank: int) -> None:
        """Plain LoRA on the layers that move. Made without memory and without random numbers: `_install` fills it."""
        trained = self.model.peft_config[self.adapter]
        config = type(trained)(
            r=rank,
            lora_alpha=rank,
            target_modules=[n.removeprefix(BASE) for n, m in self.layers.items() if not hasattr(m, "parameter_name")],
            fan_in_fan_out=trained.fan_in_fan_out,
            init_lora_weights=False,
            task_type=trained.task_type,
            base_model_name_or_path=trained.base_model_name_or_path,
        )
        if any(hasattr(m, "parameter_name") for m in self.layers.values()):  # peft wants the same ones in each adapter
            config.target_parameters = trained.target_parameters
        self.model.add_adapter(COMPANION, config, low_cpu_mem_usage=True)

    def _activate_companion(self) -> None:
        """Both adapters add to the forward pass. Only LoRA layers are told: peft's wrappers of trained embeddings and
        of `modules_to_save`, which the companion has no part in, take one adapter at a time."""
        active = [*(name for name in self.model.active_adapters if name != COMPANION), COMPANION]
        for layer in self.all_layers.values():
            layer.set_adapter(active)
        self.model.base_model.active_adapter = active

    def _has_companion(self) -> bool:
        return COMPANION in self.model.peft_config

    def _check_companion(self) -> None:
        for name, layer in self.all_layers.items():
            there = COMPANION in layer.lora_A and bool(layer.lora_B[COMPANION].weight.any())
            if there if name not in self.layers else COMPANION not in layer.lora_A:
                raise ValueError(
                    f"the adapter {COMPANION!r} of an earlier run has moved other layers than this one would ({name}): "
                    "fold it into the trained adapter first, or move the same layers"
                )

    @torch.no_grad()
    def _factors(self, adapter: str) -> Factors:
        return {
            name: self._by_expert(
                name,
                layer.lora_A[adapter].weight.detach().float().clone(),
                layer.lora_B[adapter].weight.detach().float() * layer.scaling[adapter],
            )
            for name, layer in self.layers.items()
        }

    def _by_expert(self, name: str, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        experts = _experts(self.layers[name])
        return a.reshape(experts, -1, a.shape[1]), _by_expert_b(b, experts)

    def _stats(self) -> list[Tensor]:
        bad = 0
        if self._has_companion():
            bad = sum(int((~layer.lora_B[COMPANION].weight.isfinite()).sum()) for layer in self.layers.values())
        return [torch.tensor([x], dtype=torch.float32, device="cpu") for x in (*self._squares(), bad)]

    def _squares(self) -> tuple[float, float]:
        """‖P_t − P_anchor‖² and ‖P_t‖² from Gram matrices of the factors, in fp64: nothing of size out × in."""
        delta = weight = 0.0
        for name, (a, b) in self.held.items():
            a0, b0 = self.settled[-1].factors[name]
            delta += _square_of_product(torch.cat([b, -b0], 2), torch.cat([a, a0], 1))
            weight += _square_of_product(b, a)
        return delta, weight

    def _counts(self, term: Term) -> bool:
        return term.coefficient != 0.0 and any(b.any() for _, b in term.factors.values())

    def _device(self, name: str) -> torch.device:
        return self.all_layers[name].lora_A[self.adapter].weight.device

    def _check(self, name: str, layer: nn.Module) -> None:
        a, b = layer.lora_A[self.adapter], layer.lora_B[self.adapter]
        if not isinstance(a, nn.Linear) or self.adapter in getattr(layer, "lora_variant", {}):
            raise ValueError(f"{name} is not plain linear LoRA (W + s·B·A), so its product cannot be extrapolated")
        if b.bias is not None:
            raise ValueError(f"{name} has a trained LoRA bias, which a product cannot hold: use lora_bias=False")
        if hasattr(a.weight, "placements"):
            raise ValueError(f"the LoRA factors of {name} are sharded; EffOPD needs them whole on every rank (DDP)")


def _key(name: str, layer: nn.Module) -> str:
    """What `rank_pattern` and `alpha_pattern` call a layer."""
    name = name.removeprefix(BASE).replace(".base_layer", "")
    return f"{name}.{layer.parameter_name}" if hasattr(layer, "parameter_name") else name


def _rank(terms: list[Term]) -> int:
    """Of the concatenated factors, the same for all layers."""
    return max(sum(t.factors[name][0].shape[1] for t in terms) for name in terms[0].factors)


def _experts(layer: nn.Module) -> int:
    return getattr(layer, "num_experts", 1)


def _by_expert_b(b: Tensor, experts: int) -> Tensor:
    """peft's B (out, r·E), whose columns go through the experts first, as (E, out, r). Its A is (E·r, in)."""
    return b.reshape(len(b), -1, experts).permute(2, 0, 1)


def _as_in_peft(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    return a.flatten(0, 1), b.permute(1, 2, 0).flatten(1)


def _square_of_product(b: Tensor, a: Tensor) -> float:
    a, b = a.double(), b.double()
    return max(float(((b.mT @ b) * (a @ a.mT)).sum()), 0.0)


@contextmanager
def _trainability_kept(model: nn.Module):
    """peft makes every factor of an active adapter trainable, those that the user froze too."""
    flags = [(p, p.requires_grad) for p in model.parameters()]
    try:
        yield
    finally:
        for p, flag in flags:
            p.requires_grad_(flag)
