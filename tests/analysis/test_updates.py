"""`effopd-analyze updates` on checkpoints whose updates are known by construction."""

import csv
import errno
import gc
import html
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path

import numpy
import pytest
import torch
from analysis import planted
from analysis.planted import ANGLES, PROFILE, SIGMA, TOKENS, analyse, low_rank
from matplotlib import image
from tables import read_table

from effopd_kernels.analysis import cli, figures, updates
from effopd_kernels.analysis.comparison import compare
from effopd_kernels.analysis.output import terminated_as_interrupted, whole_folder
from effopd_kernels.analysis.report import Interval, shown
from effopd_kernels.analysis.roles import role_of


def raising(error):
    def function(*_, **__):
        raise error

    return function


def rows(out, table, **wanted):
    found = [r for r in read_table(out / "tables", table) if all(r[k] == v for k, v in wanted.items())]
    assert found, (table, wanted)
    return found


def test_norms_of_every_tensor(out):
    for row in rows(out, "tensors", trajectory="opd", progress=1.0):
        role = role_of(row["tensor"])
        if row["tensor"] == "model.embed_tokens.weight":
            continue
        matrix = role.part in ("attention", "mlp") and not row["tensor"].endswith("bias")
        expected = PROFILE[role.layer] * float(SIGMA.norm()) if matrix else 0.0
        assert row["update_norm"] == pytest.approx(expected, rel=1e-5, abs=1e-12)
        assert row["relative_update"] == pytest.approx(row["update_norm"] / row["weight_norm"])
        assert row["unchanged_fraction"] == (pytest.approx(0, abs=1e-3) if matrix else 1.0)


def test_profile_over_the_depth(out):
    planned = {"bottom": 2 * 1.0, "middle": 2 * 16.0, "top": 2 * 4.0}  # squares of PROFILE
    found = {r["third"]: r["share_of_update"] for r in rows(out, "depth", trajectory="opd", progress=1.0)}
    assert sum(found.values()) == pytest.approx(1)
    for name, square in planned.items():
        assert found[name] == pytest.approx(square / sum(planned.values()), rel=0.02)  # the embedding has a little
    layer = rows(out, "allocation", trajectory="opd", progress=1.0, layer=2, type="gate")[0]
    assert layer["update_norm"] == pytest.approx(4 * float(SIGMA.norm()), rel=1e-5)


@pytest.mark.parametrize("group", ["MLP and attention", "attention", "MLP", "q", "down"])
def test_spectral_table(out, group):
    (row,) = rows(out, "spectra", trajectory="opd", progress=1.0, group=group)
    p = SIGMA / SIGMA.sum()
    norm = float(SIGMA.norm())
    assert row["spectral_to_frobenius"] == pytest.approx(8 / norm, rel=1e-5)
    assert row["effective_rank"] == pytest.approx(float((-(p * p.log()).sum()).exp()), rel=1e-3)
    assert row["top_fraction_norm_ratio"] == pytest.approx(8 / norm, rel=1e-5)
    assert row["participation_ratio"] == pytest.approx(norm**4 / float((SIGMA**4).sum()), rel=1e-4)
    assert row["rank_above_noise"] == 4 and row["matrices_moved"] == row["matrices"]
    assert row["spectral_to_frobenius_low"] <= 8 / norm <= row["spectral_to_frobenius_high"]
    assert row["spectral_to_frobenius_high"] - row["spectral_to_frobenius_low"] < 1e-4


def test_noise_has_no_leading_direction(out):
    (opd,), (rl,) = (rows(out, "spectra", trajectory=t, progress=1.0, group="MLP") for t in ("opd", "rl"))
    assert rl["effective_rank"] > 10 * opd["effective_rank"] and rl["spectral_to_frobenius"] < 0.3


def test_energy_reaches_one_at_the_planted_rank(out):
    energy = rows(out, "energy", trajectory="opd", progress=1.0)
    after = [r for r in energy if r["rank_fraction"] >= 4 / 16]  # of the narrowest matrices
    assert min(r["top"] for r in after) == pytest.approx(1, abs=1e-6)
    assert [r["top"] for r in energy] == sorted(r["top"] for r in energy)
    assert max(r["bottom"] for r in energy if r["rank_fraction"] <= 1 - 4 / 16 - 0.01) == pytest.approx(0, abs=1e-3)


@pytest.mark.parametrize("k", [1, 4])
@pytest.mark.parametrize("step", ANGLES)
def test_planted_rotation(out, step, k):
    (row,) = rows(out, "alignment", trajectory="opd", step=step, k=k, group="MLP and attention")
    expected = math.cos(math.radians(ANGLES[step]))
    assert row["mean_cosine"] == pytest.approx(expected, abs=1e-4)
    assert row["mean_principal_cosine"] == pytest.approx(expected, abs=1e-4)
    assert row["largest_angle_degrees"] == pytest.approx(ANGLES[step], abs=0.1)


def test_paths_of_the_leading_directions(undrawn, folders, out, tmp_path):
    """Three sign-aligned u₁ span a plane, so distances on it are chords of the planted angles."""
    assert len(rows(out, "directions", trajectory="rl")) == 2
    assert all(math.isfinite(r["tsne_1"]) and math.isfinite(r["tsne_2"]) for r in rows(out, "directions"))
    assert analyse(folders / "base", *sorted((folders / "opd").iterdir()), "--rank=4", out=tmp_path / "out") == 0
    points = {r["step"]: (r["pca_1"], r["pca_2"]) for r in rows(tmp_path / "out", "directions")}
    for step, angle in ANGLES.items():
        assert math.dist(points[step], points[100]) == pytest.approx(2 * math.sin(math.radians(angle / 2)), abs=1e-3)


def test_tokens_that_moved(out):
    found = {r["token"]: r for r in rows(out, "embedding_tokens", trajectory="opd")}
    assert len(found) == planted.VOCABULARY
    for token, row in found.items():
        size = TOKENS.get(token, 0.0)
        assert row["relative_shift"] == pytest.approx(size, rel=1e-3)
        # 1 − cos of a right-angled step; a product of fp32 unit vectors would lose 5e-9
        assert 1 - row["cosine"] == pytest.approx(1 - 1 / math.hypot(1, size), rel=0.05)
    assert [r["token"] for r in rows(out, "embedding_top", trajectory="opd")] == [3, 7, 11]


def test_order_and_progress_come_from_the_steps(out):
    totals = rows(out, "totals", trajectory="opd")
    assert [(r["checkpoint"], r["progress"]) for r in totals] == [
        ("checkpoint-10", 0.1), ("checkpoint-50", 0.5), ("checkpoint-100", 1.0),
    ]  # fmt: skip
    assert [r["step"] for r in rows(out, "totals", trajectory="rl")] == [50, 100]


def test_csv_and_parquet_agree(out):
    for path in (out / "tables").glob("*.csv"):
        with open(path, newline="") as file:
            text = list(csv.DictReader(file))
        binary = read_table(path.parent, path.stem)
        assert len(text) == len(binary) > 0
        for a, b in zip(text, binary, strict=True):
            assert list(a) == list(b)
            assert all(float(a[k]) == v for k, v in b.items() if isinstance(v, float) and v == v)


def test_figures_are_there_and_not_blank(out):
    names = {path.stem for path in (out / "figures").glob("*.png")}
    assert names == {path.stem for path in (out / "figures").glob("*.svg")} and len(names) >= 15
    for name in names:
        pixels = image.imread(out / "figures" / f"{name}.png")[..., :3]
        ink = (pixels < 0.95).any(-1)
        colours = numpy.unique((255 * pixels).astype(int) @ [65536, 256, 1])
        assert 0.01 < ink.mean() < 0.9 and len(colours) > 20, name


def test_every_figure_has_each_trajectory(out):
    for path in (out / "figures").glob("*.svg"):
        if "_relative_update_" in path.stem or "_update_norm_" in path.stem:
            continue  # heat maps: one figure each
        colours = set(re.findall(r"#[0-9a-f]{6}", path.read_text()))
        assert {"#0072b2", "#d55e00"} <= colours, path.stem


def test_powers_on_a_logarithmic_axis():
    """Of the decades, and between them where there are few; as text, for a browser's and a person's eyes."""
    for (low, high), some in (((1e-3, 1), ["10⁻³", "10⁻²", "10⁻¹", "10⁰"]), ((3e-7, 2e-6), ["6×10⁻⁷", "10⁻⁶"])):
        (axes,) = figures.lines({"a": ([low, high], [0, 1])}, "x", "y", xscale="log").draw().axes
        labels = [t.get_text() for t in axes.get_xticklabels() + axes.get_xticklabels(minor=True)]
        assert set(some) <= set(labels) and not any(set(text) & set("$^\\{}") for text in labels), labels


def test_long_names_fit_into_the_figure(tmp_path):
    """All of a legend's, a title's that is one; letters the font lacks are boxes and no warnings."""
    names = ["on-policy distillation from a teacher of 72 billion parameters", "grpo-lr1e-5-beta0.04", "sft 模型", "x"]
    drawn = [
        figures.lines({n: ([0, 1], [0, 1]) for n in names}, "x", "y"),
        figures.bars(["q"], {n: [1.0] for n in names[1:]}, "y", marks={"share of parameters": [1.0]}),
        figures.heat_map([[1.0]], ["0"], ["q"], "y", limits=(0, 1), title=names[0], row_label="layer"),
    ]
    for picture in drawn:
        figure = picture.draw()
        figures.save(figure, tmp_path, picture.kind)
        texts = [text for legend in figure.legends for text in legend.get_texts()] or [figure.axes[0]._left_title]
        for box in (text.get_window_extent() for text in texts):
            assert min(box.min) > 0 and box.x1 < figure.bbox.width and box.y1 < figure.bbox.height
        assert figure.axes[0].get_window_extent().height > 0.6 * figures.HEIGHT * figure.dpi


def test_a_flat_curve_does_not_run_along_the_edge():
    (axes,) = figures.lines({"a": ([0, 1], [0.33, 0.3301])}, "x", "y", ylim=(0, None)).draw().axes
    assert axes.get_ylim()[0] == 0 and axes.get_ylim()[1] > 1.02 * 0.3301


def test_the_report_shows_the_tables_numbers(out):
    page = html.unescape(re.sub(r"<[^>]+>", "|", (out / "report.html").read_text()))
    whole = rows(out, "spectra", trajectory="opd", progress=1.0, group="MLP and attention")[0]
    for column in ("spectral_norm", "spectral_to_frobenius", "effective_rank", "participation_ratio"):
        assert f"|{shown(whole[column])}|" in page, column
    mlp = sum(r["share_of_update"] for r in rows(out, "types", trajectory="opd", progress=1.0)
              if r["type"] in ("gate", "up", "down"))  # fmt: skip
    assert re.search(rf"\|MLP\|+opd\|+{re.escape(shown(mlp))}\|", page)
    for row in rows(out, "depth", progress=1.0):
        shares = shown(row["share_of_update"]), shown(row["share_of_parameters"])
        line = f"|{row['trajectory']}||{row['third']}||{shares[0]}||{shares[1]}|"
        assert line in page, line
    for row in rows(out, "totals"):
        assert f"|{row['checkpoint']}||{shown(row['update_norm'])}||{shown(row['relative_update'])}|" in page
    for row in rows(out, "embedding_top"):
        if row["place"] <= 20:
            assert f"||{row['token']}||" in page


def test_the_report_stands_alone(out):
    page = (out / "report.html").read_text()
    assert "<script" not in page and page.count("data:image/svg+xml;base64,") >= 15
    assert not re.findall(r"""(?:src|href)=["'](?!data:|#)""", page)


@pytest.mark.parametrize(
    "value, text",
    [
        (0.0, "0"), (1.0, "1"), (0.999963, "0.99996"), (0.12345, "0.123"), (1234.5, "1,234"), (999.7, "1,000"),
        (3.21e-5, "3.21e−5"),
        (-0.5, "−0.5"), (math.nan, "–"), (None, "–"), (math.inf, "∞"), (True, "yes"), (12345, "12,345"),
        (Interval(0.5, 0.25, 0.75), "0.5 [0.25, 0.75]"), ("q", "q"), (2.5e9, "2.5e9"),
    ],
)  # fmt: skip
def test_numbers_as_printed(value, text):
    assert shown(value) == text


def test_one_checkpoint_has_no_evolution_and_says_nothing_of_it(undrawn, folders, tmp_path):
    assert analyse(folders / "base", folders / "rl" / "saved2", "--rank=4", out=tmp_path / "out") == 0
    tables = {path.stem for path in (tmp_path / "out" / "tables").glob("*.csv")}
    assert tables.isdisjoint({"alignment", "directions"}) and "spectra" in tables


def test_a_section_without_figures_does_not_explain_them(undrawn, tmp_path):
    """Of a model without layers there are no heat maps, and of its cells nothing is said."""
    base = planted.base_weights(shapes={"model.norm.weight": (8,), "lm_head.weight": (9, 8)})
    planted.write(tmp_path / "base", base)
    planted.write(tmp_path / "run", planted.moved(base, planted.noise(1)))
    arguments = ["updates", "--base", tmp_path / "base", "--checkpoints", tmp_path / "run"]
    assert cli.main([*map(str, arguments), "--output_dir", str(tmp_path / "out")]) == 0
    page = (tmp_path / "out/report.html").read_text()
    assert "Where the update went</h2>" in page and "Each cell is" not in page and "A bar is the part" in page


def test_an_equal_checkpoint_gives_zeros_and_says_so(undrawn, folders, tmp_path, capsys):
    assert analyse(folders / "base", folders / "base", folders / "rl" / "saved2", out=tmp_path / "out") == 0
    assert (
        "equals the base" in capsys.readouterr().err and "equals the base" in (tmp_path / "out/report.html").read_text()
    )
    zeros = rows(tmp_path / "out", "tensors", checkpoint="base")
    for row in zeros:
        assert row["update_norm"] == 0 and row["unchanged_fraction"] == 1
        assert not any(isinstance(v, float) and math.isnan(v) for v in row.values()), row


def test_nan_weights_are_named_and_the_others_reported(undrawn, folders, tmp_path, capsys):
    weights = planted.moved(planted.base_weights(), low_rank(100))
    weights["model.layers.1.mlp.up_proj.weight"][3, 4] = math.nan
    weights["model.norm.weight"][0] = math.inf
    assert analyse(folders / "base", planted.write(tmp_path / "nan", weights), out=tmp_path / "out") == 0
    said = capsys.readouterr().err
    assert "model.layers.1.mlp.up_proj.weight, model.norm.weight" in said
    assert [r["tensor"] for r in rows(tmp_path / "out", "tensors") if r["non_finite"]] == [
        "model.layers.1.mlp.up_proj.weight", "model.norm.weight",
    ]  # fmt: skip
    (row,) = rows(tmp_path / "out", "spectra", group="up")
    assert row["matrices"] == 5 and row["spectral_to_frobenius"] == pytest.approx(8 / float(SIGMA.norm()), rel=1e-5)


def test_a_run_that_diverged_at_its_end_is_reported(undrawn, folders, tmp_path, capsys):
    weights = {n: torch.full_like(t, math.nan) for n, t in planted.base_weights().items()}
    diverged = planted.write(tmp_path / "checkpoint-99", weights, step=99)
    before, *_ = sorted((folders / "opd").glob("checkpoint-*"))
    assert analyse(folders / "base", before, diverged, "--rank=8", out=tmp_path / "out") == 0
    assert "NaN or infinite" in capsys.readouterr().err
    assert any(row["non_finite"] == 0 for row in read_table(tmp_path / "out" / "tables", "tensors"))


def test_tokens_that_are_not_finite_have_not_moved_most(undrawn, folders, tmp_path):
    weights = planted.moved(planted.base_weights(), low_rank(100))
    weights["model.embed_tokens.weight"][0, 0], weights["model.embed_tokens.weight"][1, 0] = math.nan, math.inf
    assert analyse(folders / "base", planted.write(tmp_path / "nan", weights), out=tmp_path / "out") == 0
    assert [r["token"] for r in rows(tmp_path / "out", "embedding_top")] == list(TOKENS)
    first, second = rows(tmp_path / "out", "embedding_tokens")[:2]
    assert all(math.isnan(first[column]) for column in ("shift", "relative_shift", "cosine"))
    assert math.isinf(second["shift"]) and math.isnan(second["cosine"])


@pytest.mark.skipif(sys.platform != "linux", reason="file names are text there")
def test_names_of_bytes_that_are_no_text(undrawn, folders, tmp_path, capsys):
    place = tmp_path / os.fsdecode(b"\xff")
    shutil.copytree(folders / "rl" / "saved1", place / os.fsdecode(b"run\xfe"))
    run = os.fsdecode(b"opd\xfd=") + str(place / os.fsdecode(b"run\xfe"))
    arguments = ["updates", "--base", folders / "base", "--trajectory", run, "--output_dir", place / "out"]
    assert cli.main([*map(str, arguments), "--rank", "4"]) == 0
    (row,) = rows(place / "out", "totals")
    assert (row["trajectory"], row["checkpoint"]) == (r"opd\udcfd", r"run\udcfe")
    assert r"\udcff/run\udcfe</dd>" in (place / "out" / "report.html").read_text()
    assert capsys.readouterr().out.endswith("\\udcff/out/report.html\n")


@pytest.mark.parametrize(
    "error, code, said",
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (OSError(errno.ENOSPC, "No space left on device"), 2, "out' could not be written: No space left on device"),
        (OSError("[errno 28] No space left"), 2, "out' could not be written: [errno 28] No space left"),  # pyarrow's
    ],
)
def test_nothing_is_left_when_interrupted(undrawn, folders, tmp_path, monkeypatch, capsys, error, code, said):
    monkeypatch.setattr(updates, "write_report", raising(error))
    assert analyse(folders / "base", folders / "rl" / "saved1", out=tmp_path / "new" / "out") == code
    assert list(tmp_path.iterdir()) == [] and capsys.readouterr().err.endswith(said + "\n")


@pytest.mark.parametrize("closed", [True, False])
def test_nobody_to_read_what_is_said(undrawn, folders, tmp_path, monkeypatch, closed):
    """Stdout a pipe whose reader is gone, stderr too or closed: the report is there, and that is success."""
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w", buffering=1) as pipe, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", pipe)
        patch.setattr(sys, "stderr", None if closed else pipe)
        assert analyse(folders / "base", folders / "rl" / "saved1", "--exact_spectrum", out=tmp_path / "out") == 0
        sys.stderr.close()
    assert (tmp_path / "out" / "report.html").is_file()


def test_terminated_is_interrupted(undrawn, folders, tmp_path, monkeypatch):
    monkeypatch.setattr(updates, "write_report", lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM))
    before = signal.getsignal(signal.SIGTERM)
    assert analyse(folders / "base", folders / "rl" / "saved1", out=tmp_path / "out") == 130
    assert list(tmp_path.iterdir()) == [] and signal.getsignal(signal.SIGTERM) is before


def test_a_handler_that_python_did_not_set_stays(monkeypatch):
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(signal, "getsignal", lambda number: None)
    with terminated_as_interrupted():
        assert signal.signal(signal.SIGTERM, before) is before


def test_signals_are_left_alone_outside_the_main_thread():
    """Where Python lets no handler be set."""

    def work():
        with terminated_as_interrupted():
            return signal.getsignal(signal.SIGTERM)

    with ThreadPoolExecutor() as pool:
        assert pool.submit(work).result() is signal.getsignal(signal.SIGTERM)


def test_garbage_is_collected_after_an_import_that_was_interrupted(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(cli, "Painter", nullcontext)
    monkeypatch.delitem(sys.modules, "torch")
    monkeypatch.setitem(sys.modules, "effopd_kernels.analysis.updates", None)  # to import it is an error
    try:
        with pytest.raises(ImportError):
            analyse(folders / "base", folders / "base", out=tmp_path / "out")
        assert gc.isenabled()
    finally:
        gc.enable()


def test_a_file_that_goes_while_it_is_read_is_named(undrawn, folders, tmp_path, monkeypatch, capsys):
    """Gone, or cut short, between the look at its header and the reading of its tensors."""
    file = shutil.copytree(folders / "rl" / "saved1", tmp_path / "run") / "model.safetensors"
    for spoil, said in (
        (lambda: os.truncate(file, file.stat().st_size // 2), f"{file}: the file ended inside tensor"),
        (file.unlink, f"{file}: No such file or directory"),
    ):
        whole = file.read_bytes()
        monkeypatch.setattr(updates, "compare", lambda *given, spoil=spoil: (compare(*given), spoil())[0])
        assert analyse(folders / "base", file.parent, out=tmp_path / "out") == 2
        assert f"effopd-analyze: error: {said}" in capsys.readouterr().err and not (tmp_path / "out").exists()
        file.write_bytes(whole)


def test_exact_spectra_are_announced_and_agree(undrawn, folders, out, tmp_path, capsys):
    final = folders / "opd" / "checkpoint-100"
    assert analyse(folders / "base", final, "--exact_spectrum", out=tmp_path / "out") == 0
    assert re.search(r"exact spectra: about \d+ s", capsys.readouterr().err)
    (row,) = rows(tmp_path / "out", "spectra", group="MLP and attention")
    assert row["quantities"] == "exact" and row["effective_rank_error"] == 0
    assert row["spectral_to_frobenius"] == pytest.approx(8 / float(SIGMA.norm()), rel=1e-6)


def test_stacked_and_single_experts_are_matrices(undrawn, tmp_path):
    """A stack of experts gives one row per expert, each with its own planted rank."""
    shapes = {
        "model.layers.0.mlp.experts.gate_up_proj": (3, 32, 24),
        "model.layers.0.mlp.experts.1.down_proj.weight": (24, 32),
        "model.layers.0.mlp.gate.weight": (3, 24),
        "model.layers.0.self_attn.q_proj.weight": (24, 24),
    }
    base = planted.base_weights(shapes=shapes)

    def update(name, weight):
        if weight.ndim < 3:
            return None
        parts = [planted.directions(32, 24, e + 1, seed=e) for e in range(3)]
        return torch.stack([(e + 1) * u @ v.T for e, (u, v) in enumerate(parts)])

    moved = planted.write(tmp_path / "moved", planted.moved(base, update))
    assert analyse(planted.write(tmp_path / "base", base), moved, out=tmp_path / "out") == 0
    stacked = rows(tmp_path / "out", "tensors", type="expert gate_up")
    assert [(r["expert"], r["rank_above_noise"]) for r in stacked] == [(0, 1), (1, 2), (2, 3)]
    for e, row in enumerate(stacked):
        assert row["update_norm"] == pytest.approx((e + 1) * math.sqrt(e + 1), rel=1e-5)
        assert row["weight_norm"] == pytest.approx(float(base[row["tensor"].split("[")[0]][e].norm()), rel=1e-5)
    assert rows(tmp_path / "out", "tensors", type="expert down")[0]["expert"] == 1
    assert rows(tmp_path / "out", "tensors", type="router")[0]["update_norm"] == 0


def test_an_output_folder_is_replaced_only_on_request(undrawn, folders, tmp_path):
    """And then the analysis alone."""
    (tmp_path / "out" / "tables").mkdir(parents=True)
    for name in ("thesis.txt", "tables/stale.csv"):
        (tmp_path / "out" / name).write_text("x")
    given = folders / "base", folders / "rl" / "saved1"
    assert analyse(*given, out=tmp_path / "out") == 2 and (tmp_path / "out" / "thesis.txt").exists()
    assert analyse(*given, "--overwrite_output_dir", out=tmp_path / "out") == 0
    assert (tmp_path / "out" / "thesis.txt").exists() and (tmp_path / "out" / "report.html").exists()
    assert not (tmp_path / "out" / "tables" / "stale.csv").exists()
    shutil.rmtree(tmp_path / "out")


def test_replaced_only_when_whole(undrawn, folders, tmp_path, monkeypatch):
    """What was there before stays until the new report is complete."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "report.html").write_text("old")

    monkeypatch.setattr(updates, "write_report", raising(KeyboardInterrupt()))
    given = folders / "base", folders / "rl" / "saved1", "--overwrite_output_dir"
    assert analyse(*given, out=tmp_path / "out") == 130
    assert (tmp_path / "out" / "report.html").read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_a_folder_that_is_there_stays_the_one_it_is(tmp_path, monkeypatch):
    """A link, a mounted disk, the working directory: what is in it changes, not the folder."""
    (tmp_path / "disk" / "figures").mkdir(parents=True)
    (tmp_path / "link").symlink_to("disk")
    before = (tmp_path / "disk").stat().st_ino
    monkeypatch.chdir(tmp_path / "disk")
    for place, text in ((tmp_path / "link", "one"), (Path("."), "two")):
        with whole_folder(place, ["figures", "report.html"]) as folder:
            (folder / "report.html").write_text(text)
        assert [p.name for p in (tmp_path / "disk").iterdir()] == ["report.html"]
        assert (tmp_path / "disk" / "report.html").read_text() == text
    assert (tmp_path / "link").is_symlink() and (tmp_path / "disk").stat().st_ino == before
    assert len(list(tmp_path.iterdir())) == 2


def test_a_link_is_replaced_not_what_it_leads_to(tmp_path):
    for place in ("elsewhere", "out"):
        (tmp_path / place).mkdir()
    (tmp_path / "elsewhere/kept").touch()
    (tmp_path / "out/figures").symlink_to(tmp_path / "elsewhere")
    with whole_folder(tmp_path / "out", ["figures"]) as folder:
        (folder / "figures").mkdir()
    assert not (tmp_path / "out/figures").is_symlink() and (tmp_path / "elsewhere/kept").exists()


def test_the_command_reads_before_it_imports_what_it_draws_with():
    """transformers alone takes longer to import than a small model takes to read."""
    heavy = {"transformers", "trl", "sklearn", "matplotlib"}
    code = f"import sys, effopd_kernels.analysis.updates; print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "set()"
