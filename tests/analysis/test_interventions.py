"""`effopd-analyze interventions` on tiny real trajectories: what it plans, what it writes, stopping and going on."""

import errno
import io
import json
import math
import os
import shutil
import signal
import statistics
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from analysis import chromium
from safetensors.torch import load_file, save_file
from tables import read_table
from torchrun import torchrun
from train import world as tiny

from effopd_kernels.analysis import cli as analysis_cli
from effopd_kernels.analysis import interventions
from effopd_kernels.analysis.cli import main
from effopd_kernels.analysis.comparison import compare
from effopd_kernels.analysis.edits import Edit, EditableModel
from effopd_kernels.analysis.evaluations import FILE, Evaluation, Evaluations, pending, rows_of
from effopd_kernels.analysis.intervention_report import PRESENTATIONS
from effopd_kernels.analysis.interventions import (
    InterventionArguments,
    _identity,
    check,
    named_edits,
    notes_on,
    plan_of,
)
from effopd_kernels.analysis.plans import FINAL, INTERVENTIONS, UNMATCHED, Plan, Trial
from effopd_kernels.analysis.report import shown
from effopd_kernels.analysis.scoring import Validate
from effopd_kernels.errors import UserError
from effopd_kernels.train import OPDTrainer
from effopd_kernels.train.output_dir import LOCK_NAME, acquire, release

HERE = Path(__file__).parent
STEPS, TRAJECTORIES = (2, 4), {"opd": 1, "rl": 2}
FEW = ("--alphas", "2", "--rank_fractions", "0.1", "0.5")


# ---- what is planned ------------------------------------------------------------------------------------------------


def plan(layers=8, trajectories=("opd", "rl"), **kwargs):
    parts = ("mlp.up_proj", "mlp.down_proj", "self_attn.q_proj", "self_attn.o_proj", "input_layernorm")
    names = [f"model.layers.{i}.{part}.weight" for i in range(layers) for part in parts]
    names = ["model.embed_tokens.weight", *names, "model.norm.weight", "lm_head.weight"]
    steps = {t: [(10, 0.25), (20, 0.5), (40, 1.0)] for t in trajectories}
    return Plan(names, steps, {(t, i): 1.0 for t in steps for i in range(3)}, **kwargs)


def test_windows_cover_every_layer_with_the_blocks_they_name():
    p = plan(window=3, stride=2)
    trials = p.trials(["window"])[3:]  # after base and finals
    assert {t.about["block"] for t in trials} == {"mlp", "attention", "both"}
    for trial in trials:
        layers = range(trial.about["first_layer"], trial.about["last_layer"] + 1)
        assert len(layers) == 3
        wanted = {"mlp": ("mlp",), "attention": ("self_attn",), "both": ("mlp", "self_attn")}[trial.about["block"]]
        want = {n for n in p.names if any(f"layers.{i}.{part}." in n for i in layers for part in wanted)}
        assert set(trial.edit.names) == want
    starts = [t.about["first_layer"] for t in trials if (t.edit.trajectory, t.about["block"]) == ("opd", "mlp")]
    assert starts == [0, 2, 4, 5]  # the last one reaches the top although the stride does not divide


def test_window_defaults_to_a_quarter_of_the_depth_and_half_overlaps():
    starts = [t.about["first_layer"] for t in plan(16).trials(["window"])[3:] if t.about["block"] == "mlp"]
    assert starts[: len(starts) // 2] == [0, 2, 4, 6, 8, 10, 12]


def test_embeddings_and_an_untied_head_are_left_out_one_by_one():
    trials = plan().trials(["embeddings"])[3:7]
    gone = {t.about["of_the_base"]: set(plan().names) - set(t.edit.names) for t in trials}
    embedding, head = {"model.embed_tokens.weight"}, {"lm_head.weight"}
    assert gone == {"nothing": set(), "embeddings": embedding, "head": head, "embeddings and head": embedding | head}


def test_the_mlp_of_a_window_has_its_experts_biases():
    bias = "model.layers.0.mlp.experts.down_proj_bias"
    p = plan(2, ("opd",), window=1)
    p.names.append(bias)
    p = Plan(p.names, p.steps, p.update_norms, window=1)
    blocks = {t.about["block"] for t in p.trials(["window"])[2:] if bias in t.edit.names}
    assert blocks == {"mlp", "both"}


def test_a_window_of_attention_is_whole_blocks():
    """Half a mixer of the final model in the base's other half would be a model that neither ever was."""
    mixer = [f"model.layers.0.mixer.{part}" for part in ("in_proj.weight", "x_proj.weight", "conv1d.weight", "A_log")]
    p = Plan([*mixer, "model.layers.0.norm.weight"], {"opd": [(1, 1.0)]}, {("opd", 0): 1.0}, window=1)
    edits = {t.about["block"]: t.edit.names for t in p.trials(["window"])[2:]}
    assert edits == {"mlp": (), "attention": tuple(mixer), "both": tuple(mixer)}


def test_truncation_is_matched_to_every_trajectory():
    for part in ("top", "bottom"):
        trials = [t for t in plan(fractions=(0.1, 0.5)).trials([part])[3:] if t.edit.trajectory == "opd"]
        assert [(t.edit.norm_of, t.edit.fraction) for t in trials] == [
            (norm, f) for norm in (None, "opd", "rl") for f in (0.1, 0.5)
        ]
        assert all(t.about["rank_kept" if part == "top" else "rank_dropped"] == t.edit.fraction for t in trials)


def test_saved_models_have_names_of_their_own():
    close = (0.5, -0.5, 1.0000001, 1.0000002)
    trials = plan(2, ("opd", "opd-"), alphas=close).trials(["scale", "norm"])
    named = named_edits(trials)
    assert {edit.key() for edit in named.values()} == {trial.edit.key() for trial in trials}
    assert {"base", "final-opd", "norm-opd-20", "scale-opd-1.0000001"} <= set(named)


def test_a_checkpoint_without_a_step_makes_all_of_its_trajectory_count_by_position(tmp_path):
    for name in ("checkpoint-50", "checkpoint-100", "final"):
        (tmp_path / name).mkdir()
        save_file({"model.norm.weight": torch.ones(2)}, tmp_path / name / "model.safetensors")
    folders = [tmp_path / name for name in ("checkpoint-50", "checkpoint-100", "final")]
    comparison = compare(folders[0], {"opd": folders, "rl": folders[:2]})
    model = SimpleNamespace(live={}, norms=lambda *_: {"model.norm.weight": 1.0})
    steps = plan_of(InterventionArguments(), comparison, model).steps
    assert steps == {"opd": [(1, 1 / 3), (2, 2 / 3), (3, 1.0)], "rl": [(50, 0.5), (100, 1.0)]}


@pytest.mark.parametrize(
    "name, value",
    [("rank_fractions", [0.0]), ("alphas", [math.nan]), ("alphas", [math.inf]), ("window", 0), ("stride", 0),
     ("max_prompts", 0)],
)  # fmt: skip
def test_numbers_that_plan_nothing_are_refused(name, value):
    args = SimpleNamespace(output_dir="out", eval_metric="accuracy", teacher_model_name_or_path=None)
    with pytest.raises(UserError, match=f"^--{name} must "):
        check(InterventionArguments(base="base", **{name: value}), SimpleNamespace(dataset_name="set"), args)


# ---- what is reported -----------------------------------------------------------------------------------------------


def test_rows_compare_the_same_prompts(tmp_path):
    final, half = Edit("opd", 1, ("a",)), Edit("opd", 1, ("a",), alpha=0.5)
    trials = [Trial("base", Edit(), {}), Trial("final", final, {}), Trial("scale", half, {"alpha": 0.5})]
    evaluations = Evaluations(tmp_path, {})
    scores = {"base": [0.0, 0.0, 0.0, 1.0], final.key(): [1.0, 1.0, 1.0, 1.0], half.key(): [1.0, 1.0, 0.0, 1.0]}
    for key, values in scores.items():
        evaluations.add(key, Evaluation(values, None, 4, 1.0), write=False)
    base, whole, row = rows_of(trials, evaluations, "accuracy")
    assert (base["gain"], base["accuracy"], whole["recovered"], whole["recovered_se"]) == (0, 0.25, 1, 0)
    assert row["alpha"] == 0.5 and row["gain"] == 0.5 and row["recovered"] == 2 / 3
    assert row["gain_se"] == pytest.approx(statistics.stdev([1, 1, 0, 0]) / 2)
    # ratio of means, to first order: the spread of g − r·G over |mean G|
    assert row["recovered_se"] == pytest.approx(statistics.stdev([1 / 3, 1 / 3, -2 / 3, 0]) / 2 / 0.75)


def test_a_gain_of_nothing_has_no_share(tmp_path):
    trials = [Trial("base", Edit(), {}), Trial("final", Edit("opd", 0, ("a",)), {})]
    evaluations = Evaluations(tmp_path, {})
    for trial in trials:
        evaluations.add(trial.edit.key(), Evaluation(None, [1.0, 2.0], 4, 1.0), write=False)
    row = rows_of(trials, evaluations, "teacher_kl")[1]
    assert row["gain"] == 0 and row["recovered"] is None and row["recovered_se"] is None and row["teacher_kl"] == 1.5


def test_evaluations_survive_a_line_cut_short(tmp_path):
    trials = [Trial("scale", Edit("opd", 0, ("a",), alpha=a), {}) for a in (1.0, 2.0, 3.0)]
    first = Evaluations(tmp_path, {"seed": 0})
    for trial in trials[:2]:
        first.add(trial.edit.key(), Evaluation([1.0], [0.25], 3, 0.5), write=True)
    path = tmp_path / "evaluations.jsonl"
    path.write_bytes(path.read_bytes()[:-5])
    again = Evaluations(tmp_path, {"seed": 0})
    assert again.done == {trials[0].edit.key(): Evaluation([1.0], [0.25], 3, 0.5)}
    assert list(pending(trials, again).values()) == trials[1:]
    for trial in trials[1:]:
        again.add(trial.edit.key(), Evaluation([0.0], None, 3, 0.5), write=True)
    assert Evaluations(tmp_path, {"seed": 0}).done == again.done and len(again.done) == 3
    with pytest.raises(UserError, match=r"seed was 0, is now 1"):
        Evaluations(tmp_path, {"seed": 1})
    assert not Evaluations(tmp_path, {"seed": 1}, fresh=True).done


def test_a_full_disk_loses_no_evaluation_that_was_noted(tmp_path, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    one, two = Evaluation([1.0], [0.25], 3, 0.5), Evaluation([0.0], None, 3, 0.5)
    evaluations = Evaluations(tmp_path / "out", {"seed": 0})
    evaluations.add("one", one, write=True)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(UserError, match=r"out' could not be written: No space left on device"):
            evaluations.add("two", two, write=True)
    again = Evaluations(tmp_path / "out", {"seed": 0})
    again.add("two", two, write=True)
    assert Evaluations(tmp_path / "out", {"seed": 0}).done == {"one": one, "two": two}


@pytest.mark.parametrize(
    "lines",
    [
        ["garbage"], ["[1, 2]"], ["[" * 100_000], ['{"seed": 0}', "7"], ['{"seed": 0}', '["key", 1]'],
        ['{"seed": 0}', '["a", [1, 0], null, 3, 1]', '["b", [1], null, 3, 1]'],
        ['{"seed": 0}', '["a", [], null, 3, 1]'], ['{"seed": 0}', '["a", 1, null, 3, 1]'],
        ['{"seed": 0}', '["a", [1, null], null, 3, 1]'], ['{"seed": 0}', '["a", null, ["0.5"], 3, 1]'],
        ['{"seed": 0}', '["a", [1], null, "x", 1]'],
        ['{"seed": 0, "eval metric": "accuracy"}', '["a", null, [0.5], 3, 1]'],
    ],
)  # fmt: skip
def test_a_damaged_record_is_named(tmp_path, lines):
    (tmp_path / "evaluations.jsonl").write_text("\n".join(lines) + "\n")
    with pytest.raises(UserError, match="is damaged"):
        Evaluations(tmp_path, {"seed": 0})


def test_a_kl_of_nan_is_no_damage(tmp_path):
    """That of a model whose logits overflow, which was scored as the others were."""
    Evaluations(tmp_path, {"seed": 0}).add("one", Evaluation(None, [math.nan, 1.0], 3, 0.5), write=True)
    assert math.isnan(Evaluations(tmp_path, {"seed": 0}).done["one"].teacher_kl[0])


# ---- the command ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A world, and two short trajectories from its student."""
    folder = tiny.build(tmp_path_factory.mktemp("world"))
    for name, seed in TRAJECTORIES.items():
        config = {"max_steps": STEPS[-1], "save_strategy": "steps", "save_steps": STEPS[0], "save_only_model": True}
        config |= {"effopd_enabled": False, "seed": seed, "learning_rate": 3e-3, "eval_strategy": "no"}
        tiny.make_trainer(folder, folder / name, config=config).train()
    return folder


def arguments(trained, out, *more):
    trajectories = [
        f"{name}={','.join(str(trained / name / f'checkpoint-{s}') for s in STEPS)}" for name in TRAJECTORIES
    ]
    return [
        "interventions", "--base", str(trained / "student"), *(f"--trajectory={t}" for t in trajectories),
        "--teacher_model_name_or_path", str(trained / "teacher"), "--dataset_name", str(trained / "eval.jsonl"),
        "--eval_metric", "teacher_kl", "--max_completion_length", "4", "--per_device_eval_batch_size", "4",
        "--output_dir", str(out), *FEW, *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def finished(trained, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    assert main(arguments(trained, out)) == 0
    return out


def measured(out):
    """All tables, without the clock."""
    return {
        name: [{k: v for k, v in row.items() if k != "seconds"} for row in read_table(out / "tables", name)]
        for name in (*INTERVENTIONS, "models")
    }


def test_nobody_is_told_that_the_prompts_are_trained_on(trained, tmp_path, caplog):
    assert main(arguments(trained, tmp_path / "out", "--estimate_only")) == 0
    assert "trained on" not in caplog.text


def test_fused_experts_are_not_said_to_stay(tmp_path):
    experts = "model.layers.0.mlp.experts."
    save_file({f"{experts}0.up_proj.weight": torch.ones(2, 2)}, tmp_path / "model.safetensors")
    comparison, plan = compare(tmp_path, {"opd": [tmp_path]}), Plan([f"{experts}up_proj"], {}, {("opd", 0): 1.0})
    (note,) = notes_on(comparison, plan, loaded=True)
    assert note.startswith("Renamed or fused") and note.endswith(f": {experts}0.up_proj.weight.")
    (note,) = notes_on(comparison, plan, loaded=False)
    assert "not edited by this name" in note


def test_tables_figures_and_report(finished, trained):
    tables = measured(finished)
    assert [len(tables[n]) for n in INTERVENTIONS] == [6, 4, 4, 12, 12, 12, 8]
    base, *finals = tables["models"]
    assert base["update_norm"] == 0 and [row["trajectory"] for row in finals] == list(TRAJECTORIES)
    for row in finals:  # the same weights, whichever intervention asks for them
        for name, about in (
            ("scale", {"alpha": 1.0}),
            ("norm", {"step": 4}),
            ("embeddings", {"of_the_base": "nothing"}),
            ("rescale", {"step": 4, "norm": FINAL}),
        ):
            (same,) = (r for r in tables[name] if (about | {"trajectory": row["trajectory"]}).items() <= r.items())
            assert same["teacher_kl"] == row["teacher_kl"] and same["recovered"] == 1
        student, trained_weights = (
            load_file(folder / "model.safetensors")
            for folder in (trained / "student", trained / row["trajectory"] / "checkpoint-4")
        )
        norm = math.hypot(*(float((w.double() - student[n].double()).norm()) for n, w in trained_weights.items()))
        assert row["update_norm"] == pytest.approx(norm, rel=1e-6)
        assert row["teacher_kl"] < base["teacher_kl"]
    halves = {r["norm"]: r for r in tables["top"] if r["trajectory"] == "opd" and r["rank_kept"] == 0.5}
    assert set(halves) == {UNMATCHED, "that of opd", "that of rl"}
    report = (finished / "report.html").read_text()
    images = sorted(p.stem for p in (finished / "figures").glob("*.svg"))
    assert report.count("<img ") == len(images) == 14
    for name in INTERVENTIONS:  # every number of the tables is in its section of the report
        section = report.split(f"<h2>{PRESENTATIONS[name].title}</h2>")[1].split("</section>")[0]
        assert all(f">{shown(row['teacher_kl'])}<" in section for row in tables[name]), name
    assert {p.name for p in finished.iterdir()} == {"evaluations.jsonl", "figures", "report.html", "tables"}


@pytest.mark.skipif(chromium.BINARY is None, reason="no chromium or chrome on this machine")
def test_in_a_browser(finished):
    url = (finished / "report.html").as_uri()
    with chromium.page() as page:
        page.open(url, width=360, mobile=True)
        methods = [event["method"] for event in page.events]
        assert not {"Log.entryAdded", "Runtime.exceptionThrown", "Runtime.consoleAPICalled"} & set(methods)
        requests = [e["params"]["request"]["url"] for e in page.events if e["method"] == "Network.requestWillBeSent"]
        assert [u for u in requests if not u.startswith("data:")] == [url]
        assert page.evaluate("[...document.images].filter(i => i.complete && i.naturalWidth > 100).length") == 14
        assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")


def test_scores_are_the_trainers_own(finished, trained, tmp_path):
    """Of the final model, evaluated as effopd-train would evaluate it."""
    row = measured(finished)["models"][1]
    trainer = tiny.make_trainer(
        trained,
        tmp_path,
        student=str(trained / "opd/checkpoint-4"),
        config={"max_completion_length": 4, "per_device_eval_batch_size": 4, "effopd_enabled": False, "seed": 42},
    )
    metrics = trainer.evaluate()
    assert row["teacher_kl"] == metrics["eval_teacher_kl"] and row["accuracy"] == metrics["eval_accuracy"]


def test_the_same_command_again_evaluates_nothing(finished, trained, capfd):
    lines = (finished / "evaluations.jsonl").read_bytes()
    assert main(arguments(trained, finished, "--estimate_only", "true")) == 0
    assert (finished / "evaluations.jsonl").read_bytes() == lines
    said = capfd.readouterr().out
    total = len(lines.splitlines()) - 1
    assert f"{total} models to score on 10 prompts each, {total} of them done already" in said


def test_interrupted_and_gone_on_with(finished, trained, tmp_path, monkeypatch, capfd):
    """Ctrl-C in the middle of the seventh evaluation."""
    out, models, scored = tmp_path / "out", [], []
    keep, score = EditableModel.__init__, Validate.__call__

    def keeping(self, *args, **kwargs):
        models.append(self)
        keep(self, *args, **kwargs)

    def interrupted(self):
        scored.append(score(self))
        if len(scored) == 7:
            os.kill(os.getpid(), signal.SIGINT)
        return scored[-1]

    with monkeypatch.context() as patch:
        patch.setattr(EditableModel, "__init__", keeping)
        patch.setattr(Validate, "__call__", interrupted)
        assert main(arguments(trained, out)) == 130
    assert "error" not in capfd.readouterr().err and len(scored) == 7
    student = load_file(trained / "student/model.safetensors")
    assert all(torch.equal(tensor, student[name]) for name, tensor in models[0].live.items())
    assert {p.name for p in out.iterdir()} == {"evaluations.jsonl"}
    half = (out / "evaluations.jsonl").read_bytes()
    assert half.count(b"\n") == 1 + 6
    assert main(arguments(trained, out)) == 0
    assert (out / "evaluations.jsonl").read_bytes().startswith(half)
    assert measured(out) == measured(finished)


def test_two_processes_equal_one(finished, trained, tmp_path):
    some = ["--interventions", "scale", "top"]
    result = torchrun(
        HERE / "interventions_run.py", *arguments(trained, tmp_path, *some), "--overwrite_output_dir", "true"
    )
    assert result.returncode == 0, result.stderr[-3000:]
    for name in ("models", "scale", "top"):
        for row, alone in zip(read_table(tmp_path / "tables", name), measured(finished)[name], strict=True):
            for key, value in alone.items():
                assert row[key] == (pytest.approx(value, rel=1e-5, abs=1e-7) if isinstance(value, float) else value)


def test_of_two_commands_in_one_folder_the_second_is_refused(finished, trained, tmp_path, capfd):
    """Each would cut off what the other has noted down."""
    shutil.copy(finished / FILE, tmp_path)
    before, lock = (tmp_path / FILE).read_bytes(), acquire(tmp_path)
    try:
        assert main(arguments(trained, tmp_path)) == 2 and "another run is writing to" in capfd.readouterr().err
        assert (tmp_path / FILE).read_bytes() == before
    finally:
        release(lock, tmp_path)
    (tmp_path / FILE).unlink()
    (tmp_path / LOCK_NAME).touch()  # of a command that was killed before it had anything to note
    few = ("--interventions", "embeddings", "--max_prompts", "2")
    assert main(arguments(trained, tmp_path, *few)) == 0 and not (tmp_path / LOCK_NAME).exists()


def test_one_process_looks_at_the_folder_for_all(tmp_path, monkeypatch):
    """The others would take what it tries there for something in the way."""
    (tmp_path / "tried by the first").mkdir()
    main_process = SimpleNamespace(is_main_process=False)
    monkeypatch.setattr(interventions, "PartialState", lambda: main_process)
    monkeypatch.setattr(interventions, "check_free", lambda *_: pytest.fail("looked"))
    monkeypatch.setattr(interventions, "broadcast_object_list", lambda _: [True, None])
    assert interventions.check_output(tmp_path, False, [])
    monkeypatch.setattr(interventions, "broadcast_object_list", lambda _: [False, UserError("not empty")])
    with pytest.raises(UserError, match="not empty"):
        interventions.check_output(tmp_path, False, [])


def test_edited_models_are_written_when_asked(trained, tmp_path):
    few = ["--interventions", "embeddings", "--save_models", "true", "--max_prompts", "2"]
    (mine := tmp_path / "models" / "mine").mkdir(parents=True)
    assert main(arguments(trained, tmp_path, *few, "--overwrite_output_dir", "true")) == 0
    mine.rmdir()  # it is still there: nothing says that an earlier run made it
    saved = load_file(tmp_path / "models/embeddings-opd-embeddings/model.safetensors")
    base, final = (load_file(trained / f / "model.safetensors") for f in ("student", "opd/checkpoint-4"))
    for name, weight in saved.items():
        assert torch.equal(weight, (base if "embed" in name else final)[name]), name
    assert sum(not torch.equal(base[n], final[n]) for n in base) > 10
    shutil.rmtree(tmp_path / "models/embeddings-opd-embeddings")
    kept = {p: p.stat().st_mtime_ns for p in (tmp_path / "models").iterdir()}
    assert main(arguments(trained, tmp_path, *few)) == 0  # all are scored; what is missing is written
    again = load_file(tmp_path / "models/embeddings-opd-embeddings/model.safetensors")
    assert all(torch.equal(saved[n], again[n]) for n in saved)
    assert kept.items() <= {p: p.stat().st_mtime_ns for p in (tmp_path / "models").iterdir()}.items()
    assert main(arguments(trained, tmp_path, *few, "--overwrite_output_dir", "true")) == 0
    assert kept.items().isdisjoint({p: p.stat().st_mtime_ns for p in (tmp_path / "models").iterdir()}.items())
    few.remove("--save_models")
    few.remove("true")
    assert main(arguments(trained, tmp_path, *few, "--overwrite_output_dir", "true", "--seed", "3")) == 0
    assert not any((tmp_path / "models").iterdir())  # or they would pass for those of the new settings


def test_saving_models_is_interrupted_and_gone_on_with(trained, tmp_path, monkeypatch, capfd):
    argv = arguments(trained, tmp_path / "out", "--interventions", "embeddings", "--save_models", "true")
    argv += ["--max_prompts", "2"]
    models, save, saved = tmp_path / "out/models", OPDTrainer.save_model, []

    def interrupted(self, folder):
        saved.append(save(self, folder))
        if len(saved) == 2:  # written, but not yet by its name
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(OPDTrainer, "save_model", interrupted)
        assert main(argv) == 130
    assert [p.name for p in models.iterdir()] == ["base"]
    before = (models / "base").stat().st_mtime_ns
    assert main([*argv, "--seed", "3"]) == 2 and "seed was 42, is now 3" in capfd.readouterr().err
    assert main(argv) == 0
    assert len(list(models.iterdir())) > 2 and (models / "base").stat().st_mtime_ns == before


def test_without_a_teacher_accuracy_alone_is_measured(trained, tmp_path):
    argv = arguments(trained, tmp_path, "--interventions", "scale", "--eval_metric", "accuracy")
    del argv[(i := argv.index("--teacher_model_name_or_path")) : i + 2]
    assert main(argv) == 0
    rows = read_table(tmp_path / "tables", "scale")
    assert len(rows) == 6 and all(0 <= row["accuracy"] <= 1 and "teacher_kl" not in row for row in rows)


def broken(trained, tmp):
    """Argument lists that are wrong in one way each → what the one sentence must say."""
    poisoned = load_file(trained / "opd/checkpoint-4/model.safetensors")
    poisoned["model.layers.1.mlp.up_proj.weight"][0, 0] = math.nan
    shutil.copytree(trained / "opd/checkpoint-4", tmp / "nan")
    save_file(poisoned, tmp / "nan/model.safetensors", {"format": "pt"})
    shutil.copytree(trained / "student", tmp / "nan_base")
    save_file(poisoned, tmp / "nan_base/model.safetensors", {"format": "pt"})
    (tmp / "empty.jsonl").write_text("")
    (tmp / "used").mkdir()
    (tmp / "used/thesis.txt").write_text("x")
    tiny.write_jsonl(tmp / "unlabelled.jsonl", [{"prompt": "1 + 1"}])

    def case(*more, out="fresh"):
        return arguments(trained, tmp / out, *map(str, more))

    return {
        "no base": (case()[:1] + case()[3:], "--base is required"),
        "no checkpoints": ([a for a in case() if not a.startswith("--trajectory")], "--checkpoints DIR"),
        "bad trajectory": (case("--trajectory=opd"), "--trajectory 'opd' must be NAME=DIR"),
        "no such intervention": (case("--interventions", "prune"), "'prune' is not one of scale, norm"),
        "bad fraction": (case("--rank_fractions", 10), "--rank_fractions must lie in (0, 1]"),
        "deep window": (case("--window", 3), "--window 3 exceeds the model's 2 layers"),
        "empty set": (case("--dataset_name", tmp / "empty.jsonl"), "is empty"),
        "no answers": (case("--dataset_name", tmp / "unlabelled.jsonl", "--eval_metric", "accuracy"), "'answer'"),
        "no teacher": ([a for a in case() if "teacher" not in a or a == "teacher_kl"], "teacher_kl needs --teacher"),
        "NaN": (case(f"--trajectory=bad={tmp / 'nan'}"), "not finite, in model.layers.1.mlp.up_proj.weight"),
        "NaN in the base": (case("--base", tmp / "nan_base"), f"the base {tmp / 'nan_base'} has weights that are not"),
        "in use": (case(out="used"), "exists and is not empty"),
        "no output": ([*case(), "--output_dir", ""], "--output_dir is empty"),
        "over its input": (arguments(trained, trained, "--overwrite_output_dir", "true"), "which is read"),
        "unknown flag": (case("--sampel", 3), "unknown option --sampel"),
    }


def test_bad_input_is_one_sentence_and_exit_code_2(trained, tmp_path, capfd):
    for name, (argv, says) in broken(trained, tmp_path).items():
        assert main(argv) == 2, name
        error = [line for line in capfd.readouterr().err.splitlines() if "error:" in line]
        assert len(error) == 1 and says in error[0], (name, error)
    assert [p.name for p in (tmp_path / "used").iterdir()] == ["thesis.txt"]
    assert not (tmp_path / "fresh").exists()


def test_without_trl_it_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(analysis_cli, "find_spec", lambda name: None if name == "trl" else find_spec(name))
    assert main(["interventions"]) == 2
    assert "trl must be installed: pip install effopd-kernels[analysis,train]" in capsys.readouterr().err


def test_help_in_ascii(monkeypatch):
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", out)
    with pytest.raises(SystemExit) as stopped:
        main(["interventions", "--help"])
    out.flush()
    assert stopped.value.code == 0 and "? of `scale`" in out.buffer.getvalue().decode("ascii")


@pytest.mark.parametrize(
    "option, value, said",
    [("seed", "3", "seed was 42, is now 3"), ("bf16", "true", "bf16 was False, is now True"),
     ("attn_implementation", "eager", "attn implementation was None, is now 'eager'")],
)  # fmt: skip
def test_other_settings_do_not_mix(finished, trained, capfd, option, value, said):
    assert main(arguments(trained, finished, f"--{option}", value)) == 2
    assert f"holds evaluations with other settings ({said})" in capfd.readouterr().err


def test_a_folder_is_itself_however_it_is_typed(trained, monkeypatch):
    monkeypatch.chdir(trained / "opd")
    typed = ("../student", trained / "student", trained / "opd/../student")
    assert len({_identity(Path(path)) for path in typed}) == 1


def test_a_final_checkpoint_equal_to_the_base_is_said(trained, tmp_path, capfd):
    some = ["--max_prompts", "4", "--interventions", "scale", "top", "rescale"]
    argv = [a for a in arguments(trained, tmp_path, *some) if not a.startswith("--trajectory")]
    assert main([*argv, "--checkpoints", str(trained / "student")]) == 0
    said = capfd.readouterr().err
    assert "equals the base" in said and "equals the base" in (tmp_path / "report.html").read_text()
    for name in some[3:]:
        for row in read_table(tmp_path / "tables", name):
            assert row["gain"] == 0 and row["recovered"] is None
            assert all(math.isfinite(v) for v in row.values() if isinstance(v, float))


def test_a_base_without_the_models_first_component(trained, tmp_path, capfd):
    """As some are on the hub; transformers forgives it."""
    weights = load_file(trained / "student/model.safetensors")
    shutil.copytree(trained / "student", tmp_path / "short")
    short = {name.removeprefix("model."): tensor for name, tensor in weights.items()}
    short["layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(2)
    save_file(short, tmp_path / "short/model.safetensors", {"format": "pt"})
    argv = arguments(trained, tmp_path / "out", "--base", str(tmp_path / "short"), "--estimate_only", "true")
    assert main(argv) == 0
    captured = capfd.readouterr()
    assert "models to score on 10 prompts" in captured.out
    notes = [line for line in captured.err.splitlines() if line.startswith("effopd-analyze: ")]
    assert len(notes) == 1 and "left out: model.layers.0.self_attn.rotary_emb.inv_freq." in notes[0]


def test_estimate_only(trained, tmp_path, capfd):
    assert main(arguments(trained, tmp_path / "new/out", "--estimate_only", "true")) == 0
    assert "models to score on 10 prompts each: about" in capfd.readouterr().out
    assert not (tmp_path / "new").exists()


def test_a_line_of_the_record_is_json(finished):
    settings, *lines = map(json.loads, (finished / "evaluations.jsonl").read_text().splitlines())
    assert settings["seed"] == 42 and all(len(Evaluation(*line[1:]).teacher_kl) == 10 for line in lines)
