"""LoRA students: extrapolating the merged product exactly, while the trained factors stay as they are.

An adapter changes a layer's weight by P = s·B·A (s scaling, A (r, in), B (out, r)). Extrapolating A and B one by one
would not extrapolate P. What has to be added to the weight to make it W_A + α(W_t − W_A) is

    F = (α − 1)·(P_t − P_anchor)            rank ≤ 2r: (α − 1)·s·[B_t, −B_anchor] [A_t; A_anchor]

and F goes into a second, frozen adapter, the companion, by concatenation of ranks. The trained adapter keeps its
factors, its shape and its optimizer state, as the published rule asks of every weight. Over events F = Σ c_j·P_j, where
an event adds one product and changes the coefficient of another. Of more than `MOST_TERMS` the sum is taken as one,
of the least rank that is within rounding, so the companion's rank does not grow with the number of events.

The alternatives lose something: folding F into the base weights rounds it to their dtype, fails on quantised ones, and
makes the saved adapter wrong on the published base; truncating to rank r is not the extrapolation; lengthening the
trained factors changes parameters an optimizer holds. The price of the companion is its forward pass and a second
folder when saving, until `fold`, at the end, makes one adapter of the two.
"""

from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from .adapters import COMPANION, Adapters, as_in_peft
from .products import Factors, Term, is_nonzero, shortened, square_of_product

MOST_TERMS = 8  # of the companion, before they become one


def is_lora_name(name: str) -> bool:
    return ".lora_A." in name or ".lora_B." in name


class LoraWeights:
    """The merged products of a peft LoRA model; the interface of `DenseWeights`.

    Args and errors are those of `Adapters`.
    """

    parts = wanted = None  # every rank holds all

    def __init__(self, model: nn.Module, chosen: Collection[str]):
        self.adapters = Adapters(model, chosen)
        self.tensors = self.adapters.tensors
        self.settled: list[Term] = []  # what the companion holds; the last one is the anchor's product
        if self.adapters.has_companion():  # left by an earlier run: part of the weights, and not of this run's δ
            self.settled = [Term(1.0, self.adapters.factors(COMPANION))]
        self.settled.append(Term(0.0, self._product()))
        self.held: Factors | None = None
        self.offered: list[Term] = self.settled
        self.holders: Mapping[str, int] = {}  # layer → ranks that have it
        self.adapters.install(self.settled)

    @property
    def names(self) -> list[str]:
        return list(self.adapters.layers)

    @property
    def still(self) -> list[str]:
        """Layers with adapters that do not move."""
        return [name for name in self.adapters.all_layers if name not in self.adapters.layers]

    def hold(self) -> None:
        """Keep P_t. Raises ValueError where adapters are merged: no candidate would show."""
        self.adapters.check_unmerged()
        torch.clear_autocast_cache()  # of factors that were stepped inside torch.autocast
        self.held = self._product()

    @torch.no_grad()
    def write(self, alpha: float) -> list[Tensor]:
        """F(α) into the companion. Returns three (1,) tensors as `DenseWeights.write`; ‖·‖² are those of products.
        Raises as `hold`.
        """
        self.adapters.check_unmerged()
        self.offered = self.settled if alpha == 1.0 else self._line(alpha)
        self.adapters.install(self.offered)
        values = (*self._squares(), self.adapters.nonfinite())
        return [torch.tensor([x], dtype=torch.float32, device="cpu") for x in values]

    def write_for_slope(self, alpha: float) -> None:
        """As `write`, such that a backward pass leaves what `slope` needs."""
        self.adapters.install(self._line(alpha), slope=True)

    def slope(self, world_size: int) -> float:
        """This rank's part of ∂L/∂α = Σ ∂L/∂F·(P_t − P_anchor), after `write_for_slope` and a backward pass."""
        total = 0.0
        for name, (_, b) in self.held.items():
            b0 = self.settled[-1].factors[name][1]
            used = sum(t.factors[name][0].shape[1] for t in self.settled) + b.shape[2]
            gradient = self.adapters.companion_gradient(name)
            if gradient is None:  # the loss did not pass through this layer
                continue
            direction = torch.cat([-b0, b], 2)  # ∂B/∂α of the last two of the concatenated ranks
            total += float((gradient[:, :, used - direction.shape[2] : used].double() * direction).sum())
        return total / world_size

    def trained(self) -> list[Tensor]:
        """Every parameter that a backward pass may give a gradient."""
        return list(self.adapters.model.parameters())

    def restore(self) -> None:
        self.held, self.offered = None, self.settled
        self.adapters.install(self.settled)

    def settle(self) -> None:
        """The anchor becomes the current weights: the companion keeps F, and δ counts from P_t."""
        if self.offered is self.settled:  # no jump: P_t adds nothing
            others, coefficient = self.settled, 0.0
        else:
            *others, jump = self.offered
            coefficient = jump.coefficient
        others = list(filter(is_nonzero, others))
        if len(others) > MOST_TERMS:
            others = [shortened(others)]
        self.settled = [*others, Term(coefficient, self.held)]
        self.held, self.offered = None, self.settled
        self.adapters.install(self.settled)

    def fold(self) -> bool:
        """Make the trained adapter the whole product and delete the companion; False if there is nothing to fold.
        Raises as `Adapters.lengthen`."""
        terms = list(filter(is_nonzero, self.settled))
        if not terms:
            return False
        self.adapters.lengthen([Term(1.0, self._product()), *terms])
        self.settled = self.offered = [Term(0.0, self._product())]
        return True

    def norms(self, world_size: int) -> tuple[float, float]:
        """As `DenseWeights.norms`, of the products; every rank holds them all."""
        delta_sq, weight_sq = self._squares()
        return delta_sq / world_size, weight_sq / world_size

    def state(self) -> dict[str, Tensor]:
        out = {"coefficients": torch.tensor([t.coefficient for t in self.settled], dtype=torch.float64, device="cpu")}
        for j, term in enumerate(self.settled):
            for name, (a, b) in term.factors.items():
                out[f"{j}.{name}.A"], out[f"{j}.{name}.B"] = as_in_peft(a, b)
        return out

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Raises ValueError when the layers are not those of the state, before anything is changed."""
        coefficients = state["coefficients"].flatten().tolist() if "coefficients" in state else []
        layers = self.adapters.layers
        expected = {f"{j}.{n}.{x}" for j in range(len(coefficients)) for n in layers for x in "AB"}
        if not coefficients or expected != set(state) - {"coefficients"}:
            some = sorted(expected ^ (set(state) - {"coefficients"}))[:3]
            raise ValueError(f"EffOPD state of other LoRA layers: {some} are in one and not in the other")
        for j in range(len(coefficients)):
            for n in layers:
                self.adapters.check_factors(n, state[f"{j}.{n}.A"], state[f"{j}.{n}.B"])
        self.settled = self.offered = [
            Term(c, {n: self.adapters.by_expert(n, state[f"{j}.{n}.A"], state[f"{j}.{n}.B"]) for n in layers})
            for j, c in enumerate(coefficients)
        ]
        self.adapters.install(self.settled)

    def _product(self) -> Factors:
        """Of the trained adapter as it is now."""
        return self.adapters.factors(self.adapters.trained)

    def _line(self, alpha: float) -> list[Term]:
        """Σ c_j·P_j with α − 1 of P_anchor moved to P_t."""
        *others, anchor = self.settled
        moved = Term(anchor.coefficient - (alpha - 1.0), anchor.factors)
        return [*others, moved, Term(alpha - 1.0, self.held)]

    def _squares(self) -> tuple[float, float]:
        """‖P_t − P_anchor‖² and ‖P_t‖²."""
        delta = weight = 0.0
        for name, (a, b) in self.held.items():
            a0, b0 = self.settled[-1].factors[name]
            delta += square_of_product(torch.cat([b, -b0], 2), torch.cat([a, a0], 1))
            weight += square_of_product(b, a)
        return delta, weight
