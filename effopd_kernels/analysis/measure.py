"""What is measured on one tensor: norms in every checkpoint, and of attention and MLP matrices the spectrum of ΔW too.

Shape legend: T checkpoints of all trajectories; G grid points of an energy curve (`matrix.GRID`); V tokens.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..lowrank import ops
from ..lowrank.panels import row_squares, squares_of_rows
from ..lowrank.statistics import add_statistics
from ..tensor_files import EVERY
from .checkpoints import Checkpoint
from .comparison import Comparison
from .matrix import CONVERGED, QUICK, Options, alignment_rows, energy_curve, spectrum_of
from .roles import Role, role_of

BLOCK = 1 << 21  # entries of a tensor at a time, of which norms alone are wanted
TOKEN_COLUMNS = ("shift", "relative_shift", "cosine")


@dataclass
class Measured:
    """One tensor's contribution, small enough to send between ranks."""

    tensor: str
    rows: list[dict[str, Any]] = field(default_factory=list)  # per checkpoint and matrix
    alignment: list[dict[str, Any]] = field(default_factory=list)  # per checkpoint, matrix and k
    energy: list[tuple[str, int, list[float]]] = field(default_factory=list)  # trajectory, position, (G,)
    directions: Tensor | None = None  # (T, T) inner products of sign-aligned u₁, summed over the tensor's matrices
    tokens: dict[str, dict[str, Tensor]] = field(default_factory=dict)  # trajectory → column → (V,)


def measure(comparison: Comparison, name: str, options: Options, embedding: bool = False) -> Measured:
    """Read one tensor in the base and in every checkpoint, one at a time, and measure it.

    Args:
        embedding: it is the token embedding; every row is measured in the last checkpoint of every trajectory.
    """
    role, shape = role_of(name), comparison.base.shapes[name][0]
    spectral = role.part in ("attention", "mlp") and len(shape) >= 2 and min(shape[-2:]) > 1
    found = (
        _spectra(comparison, name, role, options) if spectral else _sizes(comparison, name, role, options, embedding)
    )
    for row in found.rows:
        row["relative_update"] = relative(row["update_norm"], row["weight_norm"])
        if math.isnan(row["weight_norm"]):  # the base's fault: `Findings` says so
            row["non_finite"] = 0
    return found


def _spectra(comparison: Comparison, name: str, role: Role, options: Options) -> Measured:
    found, base = Measured(name), comparison.base.read(name).to(options.device)
    effort = CONVERGED if any(len(own) > 1 for own in comparison.trajectories.values()) else QUICK
    first: dict[str, dict[int, Tensor]] = {}  # trajectory → position → u₁ of every matrix
    weights: dict[int, float] = {}  # ‖W‖ of every matrix
    for trajectory, checkpoints in comparison.trajectories.items():
        last, finals = len(checkpoints) - 1, []
        for position in (last, *range(last)):  # the last first: the others' subspaces are held against its
            a, b = _pair(checkpoints[position], name, base, options.device)
            where = comparison.about(trajectory, position)
            for i, (label, place, w, x, y) in enumerate(_matrices(name, role, base, a, b)):
                named = _named(label, place, x)
                svd, spectrum, row, base_norm = spectrum_of(x, y, options, effort)
                if i not in weights:  # only a bf16 checkpoint, no adapter, has a Gram: its b is the base
                    weights[i] = _norms(_statistics(w, None), w)["update_norm"] if base_norm is None else base_norm
                found.rows.append({**where, **named, **row, "weight_norm": weights[i]})
                if position == last:
                    finals.append(svd)
                if row["non_finite"] or row["update_norm"] == 0:
                    continue
                found.energy.append((trajectory, position, energy_curve(spectrum, min(x.shape), row)))
                found.alignment += [{**where, **named, **r} for r in alignment_rows(svd, finals[i], options.ks)]
                first.setdefault(trajectory, {}).setdefault(position, {})[i] = svd.U[:, 0].float().cpu()
    found.directions = _directions(comparison, first)
    return found


def _sizes(comparison: Comparison, name: str, role: Role, options: Options, embedding: bool) -> Measured:
    """Norms alone, and every token's, from blocks of rows that are read in all checkpoints while they are in cache."""
    shape, checkpoints = comparison.base.shapes[name][0], comparison.checkpoints()
    like = torch.empty(shape, device="meta")
    totals = torch.zeros(1 + len(checkpoints), 5, dtype=torch.float64, device=options.device or "cpu")
    tokens: dict[str, list[Tensor]] = {}
    for rows in _blocks(shape):
        base = comparison.base.read(name, rows).to(options.device)
        add_statistics(totals[0], _statistics(base, None))
        for total, (trajectory, position, checkpoint) in zip(totals[1:], checkpoints, strict=True):
            a, b = _pair(checkpoint, name, base, options.device, rows)
            add_statistics(total, _statistics(a, b))
            if embedding and position == len(comparison.trajectories[trajectory]) - 1:
                tokens.setdefault(trajectory, []).append(_tokens(a, b, base))
    weight_norm = _norms(totals[0], like)["update_norm"]
    return Measured(
        name,
        [
            {**comparison.about(*at), **_named(name, role, like), **_norms(total, like), "weight_norm": weight_norm}
            for total, (*at, _) in zip(totals[1:], checkpoints, strict=True)
        ],
        tokens={t: dict(zip(TOKEN_COLUMNS, torch.cat(parts, 1), strict=True)) for t, parts in tokens.items()},
    )


def _blocks(shape: tuple[int, ...]) -> list[slice]:
    """Rows together, all of them where there are no rows."""
    if len(shape) < 2 or 0 in shape:
        return [EVERY]
    step = max(1, BLOCK * shape[0] // math.prod(shape))
    return [slice(start, min(start + step, shape[0])) for start in range(0, shape[0], step)]


def relative(update: float, weight: float) -> float:
    """‖ΔW‖ / ‖W‖; infinite where W is zero, unless it still is."""
    return update / weight if weight else update * math.inf if update else 0.0


def _pair(
    checkpoint: Checkpoint, name: str, base: Tensor, device: str | None, rows: slice = EVERY
) -> tuple[Tensor, Tensor | None]:
    a, b = checkpoint.pair(name, base, rows)
    return a.to(device), None if b is None else b.to(device)


def _matrices(name: str, role: Role, w: Tensor, a: Tensor, b: Tensor | None) -> Iterator[tuple]:
    """(name, role, w, a, b) of every matrix: a stack of experts one by one."""
    if w.ndim == 2:
        yield name, role, w, a, b
        return
    stacks = [[None] * w.shape[:-2].numel() if t is None else t.reshape(-1, *w.shape[-2:]).unbind() for t in (w, a, b)]
    for i, matrices in enumerate(zip(*stacks, strict=True)):
        yield f"{name}[{i}]", role._replace(expert=i), *matrices


def _named(name: str, role: Role, like: Tensor) -> dict[str, Any]:
    return {
        "tensor": name,
        "layer": role.layer,
        "type": role.type,
        "part": role.part,
        "expert": role.expert,
        "parameters": like.numel(),
    }


def _statistics(a: Tensor, b: Tensor | None) -> Tensor:
    """Those of `ops.stats` (5,), in full, for any shape."""
    x, y = (None if t is None else t.reshape(-1, t.shape[-1] if t.ndim else 1) for t in (a, b))
    return ops.stats([x], [] if y is None else [y], True)[0]


def _norms(statistics: Tensor, like: Tensor) -> dict[str, Any]:
    """The update's norm, the share that did not move, and what is wrong with it."""
    squares, largest, unchanged, _, bad = statistics.tolist()
    bad = int(bad) or int(not math.isfinite(largest))
    return {
        "update_norm": math.nan if bad else math.sqrt(squares),
        "unchanged_fraction": unchanged / like.numel(),
        "non_finite": bad,
    }


def _directions(comparison: Comparison, first: dict[str, dict[int, dict[int, Tensor]]]) -> Tensor:
    """(T, T) inner products of u₁, its sign turned towards the trajectory's last one, and that towards the first
    trajectory's. A checkpoint whose update has no direction counts as zero.
    """
    order = [(t, i) for t, i, _ in comparison.checkpoints()]
    products = torch.zeros(len(order), len(order), dtype=torch.float64)
    matrices = sorted({i for positions in first.values() for own in positions.values() for i in own})
    for i in matrices:
        held = {(t, p): own[i].double() for t, positions in first.items() for p, own in positions.items() if i in own}
        zero = torch.zeros_like(next(iter(held.values())))
        lasts = {t: held.get((t, len(c) - 1), zero) for t, c in comparison.trajectories.items()}
        reference = next(iter(lasts.values()))
        lasts = {t: -u if u @ reference < 0 else u for t, u in lasts.items()}
        aligned = [held.get(key, zero) for key in order]
        aligned = torch.stack([-u if u @ lasts[t] < 0 else u for (t, _), u in zip(order, aligned, strict=True)])
        products += aligned @ aligned.mT
    return products


def _tokens(a: Tensor, b: Tensor | None, base: Tensor) -> Tensor:
    """`TOKEN_COLUMNS` (3, V) fp64: per token ‖Δe‖, ‖Δe‖/‖e‖ and cos(e_t, e_0). Of a row that was zero and no longer is
    the second is infinite; of one that was or became zero the third is NaN.

    1 − cos = (‖Δ‖² − (‖e_t‖ − ‖e_0‖)²) / (2 ‖e_t‖ ‖e_0‖) keeps small angles, which the product of unit vectors loses.
    """
    # Of an update that is given as such the weight is base + a.
    squares = squares_of_rows(a, base.float() + a, base) if b is None else row_squares(a, b)
    shift, after, length = squares.sqrt().unbind(1)
    still = shift == 0
    cosine = 1 - torch.where(still, 0.0, (shift.square() - (after - length).square()) / (2 * length * after))
    return torch.stack([shift, torch.where(still, 0.0, shift / length), cosine.clamp(-1, 1)]).cpu()
