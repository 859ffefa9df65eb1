"""The embedded default, a few steps of it, through the command."""

import json
import math

from matplotlib.figure import Figure

from effopd_kernels.train.cli import main
from effopd_kernels.train.report import compare, draw_curves


def test_demo(tmp_path, capsys):
    """A YAML file goes over the demo's own defaults, as flags do."""
    (tmp_path / "demo.yaml").write_text("max_steps: 8\neval_steps: 4\ndisable_tqdm: true\n")
    argv = [
        "--demo",
        "--output_dir",
        str(tmp_path / "out"),
        "--max_steps",
        "4",
        "--config",
        str(tmp_path / "demo.yaml"),
    ]
    tmp_path /= "out"
    assert main(argv) == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    opd, effopd = summary["runs"]
    assert (opd["method"], effopd["method"]) == ("opd", "effopd") and not opd["events"]
    for run in (opd, effopd):
        assert [p["step"] for p in run["curve"]] == [0, 1, 2, 4]
        assert all(0.3 < p["score"] < 0.9 and p["seconds"] >= 0 for p in run["curve"])
        assert run["final_score"] == run["curve"][-1]["score"]
    assert opd["curve"][0]["score"] == effopd["curve"][0]["score"]  # the same student
    assert opd["curve"][-1]["val_tokens"] == 0 < effopd["curve"][-1]["val_tokens"]
    assert [e["step"] for e in effopd["events"]] == [1, 2, 4]
    assert summary["target_score"] == opd["final_score"]
    for cost in ("steps", "tokens"):
        reached = summary[f"{cost}_to_target"]
        factor = summary[f"{cost.removesuffix('s')}_acceleration"]
        assert (factor is None) == (not reached["effopd"])
        assert factor is None or math.isclose(factor, reached["opd"] / reached["effopd"])
    for name in ("world/student/tokenizer.json", "opd/model.safetensors", "effopd/metrics.jsonl", "curves.png"):
        assert (tmp_path / name).is_file(), name
    assert "To OPD's final score" in capsys.readouterr().out
    assert main(argv) == 2  # a second demo does not overwrite the first unasked
    assert f"--output_dir '{tmp_path}' exists and is not empty" in capsys.readouterr().err


def test_the_demos_folder_is_checked_as_any_runs(tmp_path, capsys):
    """Before anything is built in it."""
    (tmp_path / "summary.json").write_text("of another run")
    for flags, says in (
        (["--output_dir", tmp_path], f"--output_dir '{tmp_path}' exists and is not empty; pass --overwrite_output_dir"),
        (["--output_dir", tmp_path / "summary.json" / "demo"], f"cannot be written: '{tmp_path}/summary.json' is not"),
        (["--output_dir", tmp_path, "--resume_from_checkpoint"], "--demo runs from its beginning"),
    ):
        assert main(["--demo", *map(str, flags)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("effopd-train: error: ") and says in line
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("summary.json", "of another run")]


def test_a_score_that_equals_opds_last_has_reached_it():
    def run_of(*points):
        curve = [{"step": n, "score": score, "train_tokens": 10 * n, "val_tokens": 4 * n} for n, score in points]
        return {"curve": curve, "final_score": curve[-1]["score"]}

    summary = compare(run_of((0, 0.1), (4, 0.5)), run_of((0, 0.1), (2, 0.5), (4, 0.6)))
    assert summary["steps_to_target"] == {"opd": 4, "effopd": 2}
    assert summary["tokens_to_target"] == {"opd": 56, "effopd": 28}
    assert summary["step_acceleration"] == summary["token_acceleration"] == 2


def test_steps_that_no_power_of_ten_lies_between_are_numbered(monkeypatch, tmp_path):
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    curve = [{"step": s, "score": -1 / s, "train_tokens": s, "val_tokens": 0} for s in (20, 40, 60, 80)]
    event = {"step": 80, "alpha": 35.4338}
    about = {"method": "effopd", "learning_rate": 1e-6, "seed": 0, "eval_metric": "teacher_kl"}
    draw_curves([{**about, "curve": curve, "events": [event]}], tmp_path / "curves.png")
    axes = drawn[0].axes[0]
    low, high = axes.get_xlim()
    assert [label.get_text() for label in axes.get_xticklabels() if low <= label.get_position()[0] <= high] == [
        "20",
        "50",
    ]
    assert [text.get_text() for text in axes.texts] == ["α=35.4"]
