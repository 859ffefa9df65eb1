"""How early an update's directions settle: each checkpoint's subspaces against the last one's, and their path."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import figures
from .findings import CHECKPOINT, GROUPS, Findings, Row, grouped, mean
from .report import FIGURES, TABLES, Headline, Section
from .tables import write_table

MEASURES = {"mean_cosine": "mean |cos(uᵢ, uᵢ,last)|", "mean_principal_cosine": "mean principal cosine"}


def subspaces(found: Findings, folder: Path) -> tuple[list[Section], list[Headline]]:
    """Write the tables alignment, alignment_tensors and directions and their figures; return the report's part.
    Trajectories of one checkpoint have no evolution, so with no others there is no part.
    """
    if not found.alignment or all(len(c) < 2 for c in found.comparison.trajectories.values()):
        return [], []
    write_table(folder / TABLES, "alignment_tensors", found.alignment)
    table = _averages(found.alignment)
    write_table(folder / TABLES, "alignment", table)
    whole = [r for r in table if r["group"] == "MLP and attention"]
    return [_alignment(found, folder, whole), *_paths(found, folder)], _early(found, whole)


def _averages(rows: list[Row]) -> list[dict[str, Any]]:
    out = []
    for key, own in grouped(rows, *CHECKPOINT, "k").items():
        for name, inside in GROUPS.items():
            if members := [r for r in own if inside(r)]:
                columns = (*MEASURES, "largest_angle_degrees", "chance_cosine")
                out.append(
                    dict(zip((*CHECKPOINT, "k"), key, strict=True))
                    | {"group": name, "matrices": len(members)}
                    | {column: mean(members, column) for column in columns}
                )
    return out


def _early(found: Findings, whole: list[Row]) -> list[Headline]:
    """The smallest k at the first checkpoint, where lock-in would show."""
    smallest = min(r["k"] for r in whole)
    first = {
        t: min(own, key=lambda r: r["progress"])
        for t in found.trajectories
        if (own := [r for r in whole if r["trajectory"] == t and r["k"] == smallest and r["progress"] < 1])
    }
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


def _alignment(found: Findings, folder: Path, whole: list[Row]) -> Section:
    drawn, ks = [], sorted({r["k"] for r in whole})
    for column, label in MEASURES.items():
        for k in ks:
            if k == 1 and column != "mean_cosine":  # the same number
                continue
            own = [r for r in whole if r["k"] == k]
            curves = {
                t: ([r["progress"] for r in rows], [r[column] for r in rows])
                for t in found.trajectories
                if (rows := [r for r in own if r["trajectory"] == t])
            }
            level = own[0]["chance_cosine"] if column == "mean_cosine" else None
            figure = figures.lines(
                curves, "training progress", label, level=level, ylim=(0, 1.03), xlim=(0, 1.03), title=f"k = {k}"
            )
            drawn.append(figures.save(figure, folder / FIGURES, f"alignment_{column.removeprefix('mean_')}_k{k}"))
    return Section(
        "When the directions settle",
        "",
        drawn,
        "How well the k leading left directions of ΔW agree with the last checkpoint's, averaged over the MLP "
        "and attention matrices that moved; 1 is the same, the dotted line chance. A curve that is high early has "
        "locked in. Left is of the matrix as stored: a linear layer's outputs, the inputs of GPT-2's Conv1D.",
        [
            {"trajectory": r["trajectory"], "checkpoint": r["checkpoint"], "progress": r["progress"], "k": r["k"],
             "mean |cos|": r["mean_cosine"], "mean principal cosine": r["mean_principal_cosine"],
             "largest angle, degrees": r["largest_angle_degrees"]}
            for r in whole if r["progress"] < 1
        ],
        "For attention and MLP apart: tables/alignment; for every matrix: tables/alignment_tensors.",
    )  # fmt: skip


def _paths(found: Findings, folder: Path) -> list[Section]:
    """PCA and t-SNE of the leading directions of all matrices, joined into one vector per checkpoint."""
    order = found.comparison.checkpoints()
    products = found.directions
    places = [i for i in range(len(order)) if products[i, i] > 0]
    if len(places) < 3:
        return []
    products = products[places][:, places] / products.diagonal().max()
    points, explained = _principal(products)
    embedded = _neighbours(products, found.options.seed) if len(places) >= 4 else None
    table = []
    for j, i in enumerate(places):
        trajectory, position, checkpoint = order[i]
        where = (trajectory, checkpoint.label, checkpoint.step, found.comparison.progress[trajectory][position])
        row = dict(zip(CHECKPOINT, where, strict=True)) | {"pca_1": points[j, 0].item(), "pca_2": points[j, 1].item()}
        if embedded is not None:
            row |= {"tsne_1": float(embedded[j, 0]), "tsne_2": float(embedded[j, 1])}
        table.append(row)
    write_table(folder / TABLES, "directions", table)
    labels = {"pca": (f"first component, {explained[0]:.0%}", f"second component, {explained[1]:.0%}")}
    if embedded is not None:
        labels["tsne"] = ("t-SNE, first axis", "t-SNE, second axis")
    drawn = []
    for stem, (x, y) in labels.items():
        own = {t: [r for r in table if r["trajectory"] == t] for t in found.trajectories}
        curves = {
            t: ([r[f"{stem}_1"] for r in rows], [r[f"{stem}_2"] for r in rows]) for t, rows in own.items() if rows
        }
        figure = figures.paths(curves, x, y)
        drawn.append(figures.save(figure, folder / FIGURES, f"directions_{stem}"))
    return [
        Section(
            "The path of the leading directions",
            "",
            drawn,
            "Each point is one checkpoint: the leading directions of all its matrices, signs aligned, in two "
            "dimensions; lines join them in order, a ring marks the last. Points that crowd together mean directions "
            "that no longer turn.",
        )
    ]


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
    tsne = TSNE(metric="precomputed", init="random", perplexity=perplexity, random_state=seed)
    return tsne.fit_transform(((distances + distances.mT) / 2).numpy())
