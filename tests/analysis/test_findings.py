"""What the reports say of unusual checkpoints: that it is true, and that nothing contradicts it."""

import html
import math
import re
from types import SimpleNamespace

import pytest
import torch
from analysis import planted
from scipy.stats import binomtest
from tables import read_table
from tokenizers import Tokenizer, models

from effopd_kernels.analysis import figures, intervention_report
from effopd_kernels.analysis.allocation import _maps
from effopd_kernels.analysis.embeddings import _histogram, token_reader
from effopd_kernels.analysis.evaluations import Evaluation, Evaluations, bounds, pending, rows_of
from effopd_kernels.analysis.findings import _roundings
from effopd_kernels.analysis.plans import INTERVENTIONS, Plan


@pytest.fixture
def base():
    return planted.base_weights(shapes=layers(3))


@pytest.fixture
def report(undrawn, tmp_path):
    """Writes a base and checkpoints, compares them, and gives the tables' reader and the page's text."""

    def compare(base, *checkpoints):
        paths = [planted.write(tmp_path / f"checkpoint-{i}", c) for i, c in enumerate(checkpoints, 1)]
        assert planted.analyse(planted.write(tmp_path / "base", base), *paths, out=tmp_path / "out") == 0
        page = re.sub(r"(<[^>]+>)+", "|", (tmp_path / "out/report.html").read_text())
        return (lambda name: read_table(tmp_path / "out/tables", name)), html.unescape(page)

    return compare


def moved(base, part, size=0.01):
    """Every entry of the tensors whose name has `part` in it, by a normal number."""
    return planted.moved(base, lambda name, w: size * torch.randn_like(w) if part in name else None)


def layers(count):
    return {n: s for n, s in planted.SHAPES.items() if ".layers." not in n or int(n.split(".")[2]) < count}


def test_what_did_not_move_has_no_spectrum(report, base):
    """LoRA on q alone: the MLP's entries are all as they were, and no average is taken of nothing."""
    read, page = report(base, moved(base, "q_proj.weight"))
    row = {r["group"]: r for r in read("spectra")}
    assert row["MLP"]["unchanged_fraction"] == 1 and math.isnan(row["MLP"]["effective_rank"])
    q, every = (sum(base[n].numel() for n in base if part in n and n.endswith("weight") and ".layers." in n
                    and "norm" not in n) for part in ("q_proj", ""))  # fmt: skip
    assert row["MLP and attention"]["unchanged_fraction"] == pytest.approx(1 - q / every, abs=1e-3)
    assert row["MLP and attention"]["effective_rank"] == row["q"]["effective_rank"] > 10
    assert "|MLP|0 of 9|–|–|–|–|–|–|1|0 of 0|" in page and "matrices that moved" in page
    assert "In the tensors that moved: training " in page


def test_where_nothing_moved_shares_are_zero(report, base):
    read, page = report(base, base)
    assert all(r["share_of_update"] == 0 for r in read("depth"))
    assert "|MLP|training|0|" in page and "put 0%" not in page and "Effective rank" not in page
    assert "No matrix of attention or MLP moved." in page and "No tensor moved." in page


def test_a_run_that_ends_where_it_began(report, base):
    read, page = report(base, moved(base, ""), base)
    numbers = [
        v for table in ("spectra", "types", "depth", "allocation", "totals") for r in read(table) for v in r.values()
    ]
    assert not any(isinstance(v, float) and math.isnan(v) for v in numbers)
    assert [r["effective_rank"] > 0 for r in read("spectra") if r["group"] == "MLP"] == [True, False]
    assert {r["checkpoint"] for r in read("energy")} == {"checkpoint-1"} and "Energy by rank" not in page
    assert "|.|" not in page and "of 0 matrices" not in page


def test_what_is_not_finite_has_no_norm(report, base):
    """A kind of module whose only tensor is infinite did not stay where it was."""
    current = moved(base, "mlp")
    current["lm_head.weight"][0, 0] = math.inf
    read, page = report(base, current)
    (head,) = (r for r in read("types") if r["type"] == "head")
    assert all(math.isnan(head[key]) for key in ("update_norm", "relative_update", "unchanged_fraction"))
    assert "|head|–|–|–|" in page and math.isfinite(read("totals")[0]["update_norm"])


def test_what_began_at_zero_moved(report, base):
    """New tokens, and norms that add their weight to one: theirs is no update of relative size 0."""
    for name in base:
        if "norm" in name:
            base[name].zero_()
    base["model.embed_tokens.weight"][[5, 6]] = 0
    current = moved(base, "layernorm")
    current["model.embed_tokens.weight"][5, 0] = 0.154
    current["model.embed_tokens.weight"][7] *= 1.01
    read, page = report(base, current)
    tokens = {r["token"]: r for r in read("embedding_tokens")}
    assert tokens[5]["relative_shift"] == math.inf and math.isnan(tokens[5]["cosine"])
    assert tokens[6]["relative_shift"] == 0 and tokens[6]["cosine"] == 1
    assert [r["token"] for r in read("embedding_top")] == [5, 7] and "2 of 50 tokens moved" in page
    relative = {r["tensor"]: r["relative_update"] for r in read("tensors")}
    assert relative["model.layers.1.input_layernorm.weight"] == math.inf and relative["model.norm.weight"] == 0
    assert {r["relative_update"] for r in read("types") if r["type"] == "norm"} == {math.inf}
    assert "most for its size" not in page  # norms alone moved in the layers


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_middle_third_needs_three_layers(report, count):
    base = planted.base_weights(shapes=layers(count))
    _, page = report(base, moved(base, ""), moved(base, "", 0.02))
    assert ("iddle third of the depth" in page) == (count == 3)


def test_the_base_is_blamed_for_its_own_nan(report, base):
    up, norm = "model.layers.1.mlp.up_proj.weight", "model.norm.weight"
    base[up][3, 4] = math.nan
    current = moved(base, "")
    current[norm][0] = math.inf
    read, page = report(base, moved(base, ""), current)
    assert f"NaN or infinite in the base, so left out of all sums and averages: {up}." in page
    assert page.count("NaN or infinite in") == 2 and re.search(f"in [^ ]*checkpoint-2, [^|]*: {norm}\\.", page)
    assert {r["tensor"] for r in read("tensors") if math.isnan(r["relative_update"])} == {up, norm}
    assert all(math.isfinite(r["relative_update"]) for r in read("totals"))
    assert {r["group"]: r["matrices"] for r in read("spectra")}["up"] == 2


def test_what_is_not_finite_neither_moved_nor_stayed(report, base):
    """Nor is it a reason why entries did not change."""
    broken = {name: torch.full_like(w, math.nan) for name, w in base.items()}
    _, page = report(base, broken)
    assert "0 of 0 tokens that are finite moved in training." in page
    assert "No tensor is finite." in page and "too small" not in page


def test_tokens_that_are_not_finite_in_the_base_are_not_counted(report, base):
    base["model.embed_tokens.weight"][4] = math.nan
    _, page = report(base, moved(base, ""))
    assert "49 of 49 tokens that are finite moved in training." in page
    assert "left out of all sums and averages: model.embed_tokens.weight." in page


def test_a_tensor_that_is_not_finite_did_not_move(report, base):
    _, page = report(base, base | {"model.norm.weight": base["model.norm.weight"] * math.nan})
    assert "No tensor moved." in page and "In the tensors that moved" not in page


def test_the_map_has_the_layers_there_are(tmp_path):
    """One that is numbered far beyond the others takes one row."""
    layered = {"training": [{"layer": i, "type": "q", "update_norm": 1.0} for i in (0, 1, 999_999)]}
    (picture,) = _maps(SimpleNamespace(types=lambda: ["q"]), layered, "update_norm", "")
    values, names, *_ = picture.arguments
    assert values == [[1.0]] * 3 and names == ["0", "1", "999999"]


def test_a_histogram_is_of_what_is_finite():
    picture = _histogram({"training": torch.tensor([0.0, 1.0, math.inf], dtype=torch.float64)}, "")
    middles, counts = picture.arguments[0]["training"]
    assert sum(counts) == 1 and all(map(math.isfinite, middles))


def test_training_may_begin_with_the_rounded_weights():
    """A bf16 base beside checkpoints of its own fp32 masters: there ΔW contains no rounding, which nobody can tell."""
    coarse, fine = ({"w": ((2, 2), dtype)} for dtype in (torch.bfloat16, torch.float32))
    run = SimpleNamespace(shapes=fine, path="run")
    comparison = SimpleNamespace(base=SimpleNamespace(shapes=coarse), names=["w"], checkpoints=lambda: [("t", 0, run)])
    (said,) = _roundings(comparison)
    assert said.endswith("what rounding to bfloat16 changed, unless training began with the rounded weights.")


def test_a_cast_is_not_training(report, base):
    """Of an fp32 base its own bf16 cast differs by nothing but rounding."""
    cast = {name: w.bfloat16() for name, w in base.items()}
    _, page = report(base, cast, base)
    said = r"\|float32 in the base is bfloat16 in [^ ,]*checkpoint-1: ΔW contains what rounding to bfloat16 changed\."
    assert re.search(said, page)
    assert page.count("in the base is") == 1


def test_a_top_percent_is_one_number(report, base):
    """Of 64 triplets it is one, in the card and in the curve; 0.64 of one is nothing that a matrix has."""
    read, page = report(base, moved(base, ""))
    (table,) = (r for r in read("spectra") if r["group"] == "MLP and attention")
    (curve,) = (r for r in read("energy") if r["rank_fraction"] == pytest.approx(0.01))
    assert curve["top"] == pytest.approx(table["top_fraction_norm_ratio"], rel=1e-6)
    assert f"training's top 1% of the rank holds {curve['top']:.0%} of" in page


def test_the_first_tokenizer_that_can_be_read_speaks(tmp_path):
    """Measuring is over when it is looked for: a broken one must not undo that."""
    for name, file, text in (
        ("broken", "tokenizer.json", '{"version": "9.9"'),
        ("half", "tokenizer_config.json", "{}"),
        ("foreign", "tokenizer.model", "abc"),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text(text)
    assert token_reader(sorted(tmp_path.iterdir()))(0) == ""
    (tmp_path / "whole").mkdir()
    Tokenizer(models.WordLevel({"a b": 0}, unk_token="?")).save(str(tmp_path / "whole/tokenizer.json"))
    text_of = token_reader(sorted(tmp_path.iterdir()))
    assert text_of(0) == "a␣b" and text_of(99) == ""


# ---- of interventions -----------------------------------------------------------------------------------------------


TWO = ((1, 0.5), (2, 1.0))


def scored(folder, score, metric="accuracy", **steps):
    """Rows and the page of a report on trials that `score` gives their prompts' values, by trajectory."""
    names = ["model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight", "lm_head.weight"]
    steps = {"a": TWO, "b": TWO} | steps
    trials = Plan(names, steps, {(t, i): 1.0 for t in steps for i in range(2)}).trials(list(INTERVENTIONS))
    evaluations = Evaluations(folder, {})
    for trial in pending(trials, evaluations).values():
        values = {"accuracy": None, "teacher_kl": None, metric: score(trial.edit)}
        evaluations.add(trial.edit.key(), Evaluation(**values, tokens=4, seconds=1.0), write=False)
    rows = rows_of(trials, evaluations, metric)
    intervention_report.write(folder, rows, metric, {}, "")
    return rows, html.unescape(re.sub(r"(<[^>]+>)+", "|", (folder / "report.html").read_text()))


def test_what_is_looked_at_first(undrawn, tmp_path):
    """The first checkpoint, not the last; a tenth of the rank, not a half, its norm as it falls."""

    def score(edit):
        right = 0 if edit.trajectory is None else 16
        if edit.trajectory and edit.checkpoint == 0:
            right = 12 if edit.norm_of else 4
        elif edit.part == "top":
            right = 8 if edit.fraction == 0.1 and edit.norm_of is None else 2
        return [float(i < right) for i in range(16)]

    _, page = scored(tmp_path, score)
    assert "first checkpoint at the final norm recovers: a 75%, b 75%." in page
    assert "top 10% of the rank recovers: a 50%, b 50%." in page


def test_nothing_is_a_share_of_a_loss(undrawn, tmp_path):
    right = {None: 4, "a": 2, "b": 8}  # of eight prompts: a is worse than the base
    rows, page = scored(tmp_path, lambda edit: [float(i < right[edit.trajectory]) for i in range(8)])
    assert all((row["recovered"] is None) == (row["trajectory"] != "b") for row in rows)
    assert "The final model of a scores no better than the base (accuracy: 0.25, the base's 0.5)" in page
    assert "The final model of b" not in page and re.search(r"best α recovers: b 100% \(α = 0.25\)\.", page)


def test_a_base_whose_logits_overflow_is_reported(undrawn, tmp_path):
    """Its KL is NaN, which bounds no axis."""
    rows, page = scored(tmp_path, lambda edit: [1.0 if edit.trajectory else math.nan, 0.5])
    assert math.isnan(rows[0]["accuracy"]) and "|A few layers at a time|" in page
    assert "The score of the base is not a finite number (accuracy: 0.75, the base's –)" in page


def test_a_final_model_that_diverged_has_no_shares(tmp_path):
    """Nor, drawn for real, a point in some figures; the other's edits have theirs, where they are numbers."""

    def score(edit):
        if edit.alpha == 2 or edit.part == "top" or (edit.trajectory == "a" and edit.alpha):
            return [math.nan] * 4
        return [2.0, 2.1, 2.2, 2.1] if edit.trajectory is None else [1.0, 1.1, 1.0, 1.1]

    rows, page = scored(tmp_path, score, "teacher_kl")
    assert all(row["recovered"] is None for row in rows if row["trajectory"] == "a")
    assert "The score of the final model of a is not a finite number (KL to the teacher, nats per token: –, the" in page
    assert "nan" not in page and "best α recovers: b 100% (α = 0.25)." in page
    assert "top 10% of the rank recovers: b –." in page and (tmp_path / "figures/top_0_as_it_falls.png").is_file()


def test_an_edit_that_diverged_is_not_the_best():
    rows = [{"trajectory": "a", "gain": gain} for gain in (math.nan, 1.0, 2.0, math.nan)]
    assert intervention_report.best_of_each(rows) == [rows[2]]
    assert intervention_report.best_of_each(rows[:1]) == []


def test_one_prompt_has_no_shares(undrawn, tmp_path):
    rows, page = scored(tmp_path, lambda edit: [1.0 if edit.trajectory else 2.0], "teacher_kl")
    assert all(row["recovered"] is None and math.isnan(row["teacher_kl_low"]) for row in rows)
    assert (
        "The final model of a scores better than the base (KL to the teacher, nats per token: 1, the base's 2)" in page
    )
    assert "on one prompt, which" in page and "|a|1|b|1|base|2|" in page  # no error bars
    low, high = intervention_report.View(rows, "teacher_kl").limits([])
    assert low < 1 and high > 2


def test_one_checkpoint_is_no_early_one(undrawn, tmp_path):
    """At its own norm it recovers all of its gain, which says nothing."""
    _, page = scored(tmp_path, lambda edit: [float(edit.trajectory is not None)] * 4, a=((2, 1.0),))
    assert "first checkpoint at the final norm recovers: b 100%." in page


def test_nothing_is_a_share_of_noise(undrawn, tmp_path):
    """One answer more of eight is right, which an edit that gains three would have recovered threefold."""

    def score(edit):
        right = {None: 4, "a": 5, "b": 8}[edit.trajectory] if edit.alpha != 0.5 else 7
        return [float(i < right) for i in range(8)]

    rows, page = scored(tmp_path, score)
    assert all((row["recovered"] is None) == (row["trajectory"] != "b") for row in rows)
    assert "The final model of a scores better than the base (accuracy: 0.625, the base's 0.5) by no more than" in page
    assert "0.125 [−0.12, 0.37]" in page and "a 300%" not in page and "The final model of b" not in page


def test_intervals_of_right_and_wrong_answers():
    """Wilson's, which lie in [0, 1] and say something of 0 in 24 too; other scores are as good as normal."""
    for k in (0, 1, 12, 24):
        expected = binomtest(k, 24).proportion_ci(method="wilson")
        assert bounds([1.0] * k + [0.0] * (24 - k), True) == pytest.approx((expected.low, expected.high), abs=1e-5)
    assert bounds([1.0, 2.0, 3.0], False) == pytest.approx((2 - 1.96 / math.sqrt(3), 2 + 1.96 / math.sqrt(3)))
    assert bounds([0.0] * 24, False) == (0, 0)  # a KL of exactly 0 is no proportion
    assert all(map(math.isnan, bounds([0.5], False)))  # one prompt tells nothing of others


def test_a_kl_of_exactly_nothing_is_no_proportion(undrawn, tmp_path):
    rows, _ = scored(tmp_path, lambda edit: [0.0 if edit.trajectory else 1.0] * 4, "teacher_kl")
    assert all(row["teacher_kl_low"] == row["teacher_kl"] == row["teacher_kl_high"] for row in rows)


def test_bars_of_an_untied_model_can_be_told_apart(tmp_path, monkeypatch):
    """Their labels do not overprint, and they have error bars."""
    drawn = {}

    def keep(figure, folder, name):
        drawn[name] = figure
        planted.save_blank(figure, folder, name)

    monkeypatch.setattr(figures, "save", keep)
    scored(tmp_path, lambda edit: [float(i < 2) for i in range(4)])
    figure = drawn["embeddings"]
    figure.draw_without_rendering()
    (axes,) = figure.axes
    labels = axes.get_xticklabels()
    assert [t.get_text() for t in labels] == ["nothing", "embeddings", "head", "embeddings and head", "everything"]
    assert all(t.get_rotation() == 40 for t in labels)
    assert [len(c.get_segments()) for c in axes.collections] == [5, 5]
