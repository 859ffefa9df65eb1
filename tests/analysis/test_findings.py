"""What the reports say of unusual checkpoints: that it is true, and that nothing contradicts it."""

import html
import math
import re

import pytest
import torch
from analysis import planted
from tokenizers import Tokenizer, models

from effopd_kernels.analysis import cli, figures
from effopd_kernels.analysis.embeddings import speaker
from effopd_kernels.analysis.tables import read_table


@pytest.fixture
def report(tmp_path, monkeypatch):
    """Writes a base and checkpoints, compares them, and gives the tables' reader and the page's text."""
    monkeypatch.setattr(figures, "save", planted.save_blank)

    def compare(base, *checkpoints):
        planted.write(tmp_path / "base", base)
        paths = [planted.write(tmp_path / f"checkpoint-{i}", c) for i, c in enumerate(checkpoints, 1)]
        flags = ["--base", tmp_path / "base", "--checkpoints", *paths, "--output_dir", tmp_path / "out"]
        assert cli.main(["updates", *map(str, flags)]) == 0
        page = re.sub(r"(<[^>]+>)+", "|", (tmp_path / "out/report.html").read_text())
        return (lambda name: read_table(tmp_path / "out/tables", name)), html.unescape(page)

    return compare


def moved(base, part, size=0.01):
    """Every entry of the tensors whose name has `part` in it, by a normal number."""
    return planted.moved(base, lambda name, w: size * torch.randn_like(w) if part in name else None)


def layers(count):
    return {n: s for n, s in planted.SHAPES.items() if ".layers." not in n or int(n.split(".")[2]) < count}


def test_what_did_not_move_has_no_spectrum(report):
    """LoRA on q alone: the MLP's entries are all as they were, and no average is taken of nothing."""
    base = planted.base_weights(shapes=layers(3))
    read, page = report(base, moved(base, "q_proj.weight"))
    row = {r["group"]: r for r in read("spectra")}
    assert row["MLP"]["unchanged_fraction"] == 1 and math.isnan(row["MLP"]["effective_rank"])
    q, every = (sum(base[n].numel() for n in base if part in n and n.endswith("weight") and ".layers." in n
                    and "norm" not in n) for part in ("q_proj", ""))  # fmt: skip
    assert row["MLP and attention"]["unchanged_fraction"] == pytest.approx(1 - q / every, abs=1e-3)
    assert row["MLP and attention"]["effective_rank"] == row["q"]["effective_rank"] > 10
    assert "|MLP|0 of 9|–|–|–|–|–|–|1|0 of 0|" in page and "matrices that moved" in page
    assert "In the tensors that moved: training " in page


def test_of_nothing_no_share_is_taken(report):
    base = planted.base_weights(shapes=layers(3))
    read, page = report(base, base)
    assert all(math.isnan(r["share_of_update"]) for r in read("depth"))
    assert "|MLP|training|–|" in page and "put 0%" not in page and "Effective rank" not in page
    assert "No matrix of attention or MLP moved." in page and "No tensor moved." in page


def test_the_first_tokenizer_that_can_be_read_speaks(tmp_path):
    """Measuring is over when it is looked for: a broken one must not undo that."""
    for name, file, text in (
        ("broken", "tokenizer.json", '{"version": "9.9"'),
        ("half", "tokenizer_config.json", "{}"),
        ("foreign", "tokenizer.model", "abc"),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text(text)
    assert speaker(sorted(tmp_path.iterdir()))(0) == ""
    (tmp_path / "whole").mkdir()
    Tokenizer(models.WordLevel({"a b": 0}, unk_token="?")).save(str(tmp_path / "whole/tokenizer.json"))
    spoken = speaker(sorted(tmp_path.iterdir()))
    assert spoken(0) == "a␣b" and spoken(99) == ""
