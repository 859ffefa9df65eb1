"""The seven interventions, each as a list of edits and what its table says about them.

scale       W0 + α·ΔW of the final checkpoint, over α
norm        every checkpoint as it is: score against ‖ΔW‖
embeddings  the final model with the base's embeddings (and, where it is a tensor of its own, head)
window      the base with the final values of a few layers: their MLP, their attention, both
top         the leading part of the rank of every matrix's final update, its norm as it falls or matched
bottom      what is left without it, likewise
rescale     every checkpoint with each tensor's update brought to its final norm
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from .edits import Edit
from .roles import Role, block_of, depth, role_of

BLOCKS = {"mlp": ("mlp",), "attention": ("attention",), "both": ("mlp", "attention")}
KEPT = {"top": "rank_kept", "bottom": "rank_dropped"}  # what tables call a fraction
UNMATCHED = "as it falls"  # what tables say of a part's norm
OWN, FINAL = "its own", "the final one's"  # and of a checkpoint's


class Trial(NamedTuple):
    """One row of an intervention's table."""

    intervention: str
    edit: Edit
    about: dict[str, Any]


@dataclass
class Plan:
    """What to try.

    Args:
        names: tensors that can be edited.
        steps: trajectory → (optimizer steps, share of the training) of its checkpoints, in order.
        update_norms: (trajectory, position) → ‖W_t − W0‖_F.
        alphas: of `scale`. fractions: of the rank, for `top` and `bottom`.
        window, stride: in layers; by default a quarter of the depth, and half a window.
    """

    names: Sequence[str]
    steps: Mapping[str, Sequence[tuple[int, float]]]
    update_norms: Mapping[tuple[str, int], float]
    alphas: Sequence[float] = (0.25, 0.5, 0.75, 1.25, 1.5, 2.0)
    fractions: Sequence[float] = (0.01, 0.05, 0.1, 0.25, 0.5)
    window: int | None = None
    stride: int | None = None

    @cached_property
    def roles(self) -> dict[str, Role]:
        return {name: role_of(name) for name in self.names}

    def trials(self, interventions: Sequence[str]) -> list[Trial]:
        """The base, each trajectory's final model, then every intervention in turn."""
        rows = [Trial("base", Edit(), {"update_norm": 0.0})]
        rows += [
            Trial("final", self.final(t), {"update_norm": self.update_norms[t, len(steps) - 1]})
            for t, steps in self.steps.items()
        ]
        return rows + [row for name in interventions for t in self.steps for row in INTERVENTIONS[name](self, t)]

    def final(self, trajectory: str, **changes) -> Edit:
        return Edit(trajectory, len(self.steps[trajectory]) - 1, **{"names": tuple(self.names), **changes})

    def of_type(self, *types: str) -> set[str]:
        return {name for name, role in self.roles.items() if role.type in types}


def scale(plan: Plan, trajectory: str) -> Iterator[Trial]:
    for alpha in sorted({0.0, 1.0, *plan.alphas}):
        yield Trial("scale", plan.final(trajectory, alpha=alpha), {"alpha": alpha})


def norm(plan: Plan, trajectory: str) -> Iterator[Trial]:
    for i, (step, progress) in enumerate(plan.steps[trajectory]):
        about = {"step": step, "progress": progress, "update_norm": plan.update_norms[trajectory, i]}
        yield Trial("norm", Edit(trajectory, i, tuple(plan.names)), about)


def embeddings(plan: Plan, trajectory: str) -> Iterator[Trial]:
    choices = [("nothing", set()), ("embeddings", plan.of_type("embedding"))]
    if head := plan.of_type("head"):
        choices += [("head", head), ("embeddings and head", head | plan.of_type("embedding"))]
    for what, replaced in choices:
        names = tuple(n for n in plan.names if n not in replaced)
        yield Trial("embeddings", plan.final(trajectory, names=names), {"of_the_base": what})


def window(plan: Plan, trajectory: str) -> Iterator[Trial]:
    total = depth(plan.names)
    width = plan.window or max(1, total // 4)
    stride = plan.stride or max(1, width // 2)
    last = total - width
    starts = sorted({*range(0, last, stride), last}) if last >= 0 else []
    for block, parts in BLOCKS.items():
        for first in starts:
            layers = range(first, first + width)
            names = tuple(n for n, role in plan.roles.items() if role.layer in layers and block_of(n) in parts)
            about = {"block": block, "first_layer": first, "last_layer": layers[-1]}
            yield Trial("window", plan.final(trajectory, names=names), about)


def truncation(part: str) -> Callable[[Plan, str], Iterator[Trial]]:
    def trials(plan: Plan, trajectory: str) -> Iterator[Trial]:
        for norm_of in (None, *plan.steps):
            for fraction in sorted(plan.fractions):
                edit = plan.final(trajectory, part=part, fraction=fraction, norm_of=norm_of)
                matched = UNMATCHED if norm_of is None else f"that of {norm_of}"
                yield Trial(part, edit, {KEPT[part]: fraction, "norm": matched})

    return trials


def rescale(plan: Plan, trajectory: str) -> Iterator[Trial]:
    final = len(plan.steps[trajectory]) - 1
    for i, (step, progress) in enumerate(plan.steps[trajectory]):
        for norm in (OWN, FINAL):
            edit = Edit(trajectory, i, tuple(plan.names), norm_of=trajectory if norm == FINAL and i != final else None)
            yield Trial("rescale", edit, {"step": step, "progress": progress, "norm": norm})


INTERVENTIONS = {
    "scale": scale,
    "norm": norm,
    "embeddings": embeddings,
    "window": window,
    "top": truncation("top"),
    "bottom": truncation("bottom"),
    "rescale": rescale,
}
