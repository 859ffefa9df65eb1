"""How early an update's directions settle: each checkpoint's subspaces against the last one's, and their path."""

from typing import Any

import torch
from torch import Tensor

from . import figures
from .comparison import CHECKPOINT
from .findings import GROUPS, WHOLE, Findings, Row, grouped, mean
from .report import Headline, Part, Section

MEASURES = {"mean_cosine": "mean |cos(uᵢ, uᵢ,last)|", "mean_principal_cosine": "mean principal cosine"}


def subspaces(found: Findings) -> Part:
    """The tables alignment, alignment_tensors and directions, and what they say. Trajectories of one checkpoint have no
    evolution, so with no others there is nothing.
    """
    if not found.alignment or all(len(c) < 2 for c in found.comparison.trajectories.values()):
        return Part()
    table = _averages(found.alignment)
    whole = [r for r in table if r["group"] == WHOLE]
    sections, tables = [_alignment(found, whole)], {"alignment_tensors": found.alignment, "alignment": table}
    places = [i for i in range(len(found.directions)) if found.directions[i, i] > 0]
    if len(places) >= 3:
        tables["directions"], labels = _coordinates(found, places)
        sections.append(_paths(found, tables["directions"], labels))
    return Part(sections, _early(found, whole), tables)


def _averages(rows: list[Row]) -> list[dict[str, Any]]:
    columns = (*MEASURES, "largest_angle_degrees", "chance_cosine")
    return [
        about | {"group": name, "matrices": len(members)} | {column: mean(members, column) for column in columns}
        for about, own in grouped(rows, *CHECKPOINT, "k")
        for name, inside in GROUPS.items()
        if (members := [r for r in own if inside(r)])
    ]


def _early(found: Findings, whole: list[Row]) -> list[Headline]:
    """The smallest k at the first checkpoint, where lock-in would show."""
    smallest = min(r["k"] for r in whole)
    early = found.each(r for r in whole if r["k"] == smallest and r["progress"] < 1)
    first = {t: min(own, key=lambda r: r["progress"]) for t, own in early.items() if own}
    if not first:
        return []
    when = ", ".join(f"{t} at {r['progress']:.0%} of training" for t, r in first.items())
    return [
        Headline(
            f"Early alignment, k = {smallest}",
            {t: r["mean_cosine"] for t, r in first.items()},
            f"Cosine of the leading directions at the first checkpoint with those at the last: {when}.",
            full=1.0,
        )
    ]


def _alignment(found: Findings, whole: list[Row]) -> Section:
    drawn = {}
    for column, label in MEASURES.items():
        for k in sorted({r["k"] for r in whole}):
            if k == 1 and column != "mean_cosine":  # the same number
                continue
            own = [r for r in whole if r["k"] == k]
            drawn[f"alignment_{column.removeprefix('mean_')}_k{k}"] = figures.lines(
                found.curves(own, "progress", column),
                "training progress",
                label,
                levels=[(own[0]["chance_cosine"], figures.GREY)] if column == "mean_cosine" else (),
                ylim=(0, 1.03),
                xlim=(0, 1.03),
                title=f"k = {k}",
            )
    return Section(
        "When the directions settle",
        "",
        drawn,
        "How well the k leading left directions of ΔW agree with the last checkpoint's, averaged over the MLP "
        "and attention matrices that moved; 1 is the same, the dotted line chance. A curve that is high early has "
        "locked in. Where σ falls slowly the last few of k directions turn easily, and the largest angle with them. "
        "Left is of the matrix as stored: a linear layer's outputs, the inputs of GPT-2's Conv1D.",
        [
            {"trajectory": r["trajectory"], "checkpoint": r["checkpoint"], "progress": r["progress"], "k": r["k"],
             "mean |cos|": r["mean_cosine"], "mean principal cosine": r["mean_principal_cosine"],
             "largest angle, degrees": r["largest_angle_degrees"]}
            for r in whole if r["progress"] < 1
        ],
        "For attention and MLP apart: tables/alignment; for every matrix: tables/alignment_tensors.",
    )  # fmt: skip


def _coordinates(found: Findings, places: list[int]) -> tuple[list[dict[str, Any]], dict[str, tuple[str, str]]]:
    """PCA and t-SNE of the leading directions of all matrices, joined into one vector per checkpoint: a table of those
    at ``places``, and what to call the axes of either.
    """
    products = found.directions[places][:, places]
    products = products / products.diagonal().max()
    points, explained = _principal(products)
    coordinates = {"pca": points.tolist()}
    labels = {"pca": (f"first component, {explained[0]:.0%}", f"second component, {explained[1]:.0%}")}
    if len(places) >= 4:
        coordinates["tsne"] = _neighbours(products, found.options.seed).tolist()
        labels["tsne"] = ("t-SNE, first axis", "t-SNE, second axis")
    order = found.comparison.checkpoints()
    table = []
    for j, i in enumerate(places):
        row = found.comparison.about(*order[i][:2])
        for name, points in coordinates.items():
            row[f"{name}_1"], row[f"{name}_2"] = points[j]
        table.append(row)
    return table, labels


def _paths(found: Findings, table: list[Row], labels: dict[str, tuple[str, str]]) -> Section:
    return Section(
        "The path of the leading directions",
        "",
        {f"directions_{name}": figures.paths(found.curves(table, f"{name}_1", f"{name}_2"), *axes)
         for name, axes in labels.items()},
        "Each point is one checkpoint: the leading directions of all its matrices, signs aligned, in two "
        "dimensions; lines join them in order, a ring marks the last. Points that crowd together mean directions "
        "that no longer turn.",
    )  # fmt: skip


def _principal(products: Tensor) -> tuple[Tensor, list[float]]:
    """Coordinates (P, 2) on the first two principal components, and the parts of the variance they explain, from the
    (P, P) inner products: eigenvectors of the centred Gram.
    """
    centred = products - products.mean(0) - products.mean(1, keepdim=True) + products.mean()
    values, vectors = torch.linalg.eigh(centred)
    values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
    pivot = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    points = vectors * torch.where(pivot < 0, -1.0, 1.0) * values.sqrt()
    total = float(values.sum()) or 1.0
    return points[:, :2], [float(v) / total for v in values[:2]]


def _neighbours(products: Tensor, seed: int):
    """t-SNE coordinates (P, 2) from the same inner products."""
    from sklearn.manifold import TSNE

    squares = products.diagonal()
    distances = (squares[:, None] + squares - 2 * products).clamp_min(0).sqrt().fill_diagonal_(0)
    perplexity = max(1.0, min(30.0, (len(products) - 1) / 3))
    tsne = TSNE(metric="precomputed", init="random", perplexity=perplexity, random_state=seed % 2**32)
    return tsne.fit_transform(((distances + distances.mT) / 2).numpy())
