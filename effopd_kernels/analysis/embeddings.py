"""Which tokens' embeddings moved."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import figures
from .figures import Picture
from .findings import Findings
from .report import Part, Section

SHOWN = 20  # tokens in the report
MOST = 200  # tokens with their text in the table


def embeddings(found: Findings) -> Part:
    """The tables embedding_tokens and embedding_top, and what they say."""
    if not found.tokens:
        return Part()
    text_of = token_reader([found.comparison.base.path, *(c[-1].path for c in found.comparison.trajectories.values())])
    tokens, top, leads = [], [], []
    for trajectory, measured in found.tokens.items():
        finite = measured["shift"].isfinite()  # the relative one is not where the base's row is zero
        shift = torch.where(finite, measured["relative_shift"], -1.0)  # last in the order
        tokens.append({"trajectory": np.full(len(shift), trajectory), "token": np.arange(len(shift)), **measured})
        moved = int((finite & (measured["shift"] > 0)).sum())
        order = torch.argsort(shift, descending=True, stable=True)[: min(MOST, moved)].tolist()
        top += [
            {"trajectory": trajectory, "place": place, "token": token, "text": text_of(token)}
            | {key: values[token].item() for key, values in measured.items()}
            for place, token in enumerate(order, 1)
        ]
        broken = " that are finite" * (not finite.all())
        leads.append(f"{moved:,} of {int(finite.sum()):,} tokens{broken} moved in {trajectory}")
    # As arrays: lists of numbers would take a second.
    tables = {"embedding_tokens": {key: np.concatenate([own[key] for own in tokens]) for key in tokens[0]}}
    if top:
        tables["embedding_top"] = top
    return Part([_section(found, top, "; ".join(leads) + ".")], tables=tables)


def _section(found: Findings, top: list[dict[str, Any]], lead: str) -> Section:
    drawn = {
        "embedding_relative_shift": _histogram(
            {t: measured["relative_shift"].double() for t, measured in found.tokens.items()}, "‖Δe‖ / ‖e‖ of a token"
        ),
        "embedding_cosine": _histogram(
            {t: 1 - measured["cosine"].double() for t, measured in found.tokens.items()}, "1 − cos(e, e in the base)"
        ),
    }
    return Section(
        "Which tokens moved",
        lead,
        {name: figure for name, figure in drawn.items() if figure is not None},
        "How many tokens' embeddings moved by how much: far to the left of what the layers moved means that "
        "training left the embedding alone.",
        [
            {"trajectory": r["trajectory"], "token": r["token"]} | ({"text": r["text"]} if r["text"] else {})
            | {"‖Δe‖": r["shift"], "‖Δe‖ / ‖e‖": r["relative_shift"], "1 − cosine": 1 - r["cosine"]}
            for r in top if r["place"] <= SHOWN
        ],
        f"The tokens that moved most for their size; more, up to {MOST}, are in tables/embedding_top, the numbers "
        "of every token in tables/embedding_tokens."
        + ("" if any(r["text"] for r in top) else " No tokenizer beside the models could be read, so no text."),
    )  # fmt: skip


def _histogram(values: dict[str, Tensor], label: str) -> Picture | None:
    """Of what is positive; None where nothing is."""
    positive = {t: v[(v > 0) & v.isfinite()] for t, v in values.items()}
    every = torch.cat(list(positive.values()))
    if not len(every):
        return None
    low, high = math.log10(0.9 * float(every.min())), math.log10(1.1 * float(every.max()))
    edges = torch.logspace(low, high, 50, dtype=torch.float64)
    counts = {t: torch.histogram(v, edges).hist.tolist() for t, v in positive.items()}
    middles = (edges[1:] * edges[:-1]).sqrt().tolist()
    return figures.lines(
        {t: (middles, count) for t, count in counts.items()},
        label, "tokens", markers=False, xscale="log", drawstyle="steps-mid", ylim=(0, None),
    )  # fmt: skip


def token_reader(folders: list[Path]) -> Callable[[int], str]:
    """A function from a token's id to its text, through the first tokenizer in these folders that can be read; without
    one, to "".
    """
    decode = next((d for folder in folders if (d := _none_if_it_fails(_decoder, folder))), lambda _: "")
    return lambda token: _visible(_none_if_it_fails(decode, token) or "")


def _none_if_it_fails(function: Callable, argument: Any) -> Any:
    """Tokenizers may be damaged, need a package that is not installed, or not know an id, and raise what they like; the
    numbers do not depend on them.
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
