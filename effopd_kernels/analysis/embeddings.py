"""Which tokens' embeddings moved."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from . import figures
from .findings import Findings
from .report import FIGURES, TABLES, Section
from .tables import write_table

SHOWN = 20  # tokens in the report
MOST = 200  # tokens with their text in the table


def embeddings(found: Findings, folder: Path) -> list[Section]:
    """Write the tables embedding_tokens and embedding_top and their figures; return the report's part."""
    if not found.tokens:
        return []
    spoken = speaker([found.comparison.base.path, *(c[-1].path for c in found.comparison.trajectories.values())])
    columns: dict[str, list] = {key: [] for key in ("trajectory", "token", "shift", "relative_shift", "cosine")}
    top, leads = [], []  # columns hold one array per trajectory: lists of numbers would take a second
    for trajectory, measured in found.tokens.items():
        finite = measured["shift"].isfinite()  # the relative one is not where the base's row is zero
        shift = torch.where(finite, measured["relative_shift"], -1.0)  # last in the order
        parts = {"trajectory": np.full(len(shift), trajectory), "token": np.arange(len(shift))}
        for key, values in {**parts, **measured}.items():
            columns[key].append(np.asarray(values))
        moved = int((finite & (measured["shift"] > 0)).sum())
        order = torch.argsort(shift, descending=True, stable=True)[: min(MOST, moved)].tolist()
        top += [
            {"trajectory": trajectory, "place": place, "token": token, "text": spoken(token)}
            | {key: values[token].item() for key, values in measured.items()}
            for place, token in enumerate(order, 1)
        ]
        leads.append(f"{moved:,} of {len(shift):,} tokens moved in {trajectory}")
    write_table(folder / TABLES, "embedding_tokens", {key: np.concatenate(parts) for key, parts in columns.items()})
    figure_names = [
        _histogram(found, folder, "relative_shift", "‖Δe‖ / ‖e‖ of a token", lambda x: x),
        _histogram(found, folder, "cosine", "1 − cos(e, e in the base)", lambda x: 1 - x),
    ]
    if top:
        write_table(folder / TABLES, "embedding_top", top)
    table = [
        {"trajectory": r["trajectory"], "token": r["token"]} | ({"text": r["text"]} if r["text"] else {})
        | {"‖Δe‖": r["shift"], "‖Δe‖ / ‖e‖": r["relative_shift"], "1 − cosine": 1 - r["cosine"]}
        for r in top if r["place"] <= SHOWN
    ]  # fmt: skip
    return [
        Section(
            "Which tokens moved",
            "; ".join(leads) + ".",
            [name for name in figure_names if name],
            "How many tokens' embeddings moved by how much: far to the left of what the layers moved means that "
            "training left the embedding alone.",
            table,
            f"The tokens that moved most for their size; more, up to {MOST}, are in tables/embedding_top, the numbers "
            "of every token in tables/embedding_tokens."
            + ("" if any(r["text"] for r in top) else " No tokenizer beside the models could be read, so no text."),
        )
    ]


def _histogram(found: Findings, folder: Path, column: str, label: str, of: Callable) -> str | None:
    values = {t: of(measured[column].double()) for t, measured in found.tokens.items()}
    positive = {t: v[(v > 0) & v.isfinite()] for t, v in values.items()}
    if not any(len(v) for v in positive.values()):
        return None
    low = min(float(v.min()) for v in positive.values() if len(v))
    high = max(float(v.max()) for v in positive.values() if len(v))
    edges = torch.logspace(*(float(torch.tensor(x).log10()) for x in (low * 0.9, high * 1.1)), 50, dtype=torch.float64)
    counts = {t: torch.histogram(v, edges).hist.tolist() for t, v in positive.items()}
    middles = (edges[1:] * edges[:-1]).sqrt().tolist()
    figure = figures.lines(
        {t: (middles, count) for t, count in counts.items()},
        label, "tokens", markers=False, xscale="log", drawstyle="steps-mid", ylim=(0, None),
    )  # fmt: skip
    return figures.save(figure, folder / FIGURES, f"embedding_{column}")


def speaker(folders: list[Path]) -> Callable[[int], str]:
    """A function from a token's id to its text, through the first tokenizer in these folders that can be read; without
    one, to "".
    """
    decode = next((d for folder in folders if (d := _tried(_decoder, folder))), lambda _: "")
    return lambda token: _visible(_tried(decode, token) or "")


def _tried(function: Callable, argument: Any) -> Any:
    """None where it fails: tokenizers may be damaged, need a package that is not installed, or not know an id, and
    raise what they like; the numbers do not depend on them.
    """
    try:
        return function(argument)
    except Exception:
        return None


def _decoder(folder: Path) -> Callable[[int], str] | None:
    if (folder / "tokenizer.json").is_file():
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        return lambda token: tokenizer.decode([token], skip_special_tokens=False)
    if any((folder / name).is_file() for name in ("tokenizer.model", "vocab.json", "tokenizer_config.json")):
        from transformers import AutoTokenizer

        slow = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)  # asks nobody
        return lambda token: slow.decode([token])
    return None


def _visible(text: str) -> str:
    """Spaces and line ends as signs one can see."""
    return text.replace(" ", "␣").replace("\n", "⏎").replace("\t", "⇥")
