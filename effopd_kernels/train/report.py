"""What a run leaves behind: metrics.jsonl while it runs, summary.json and curves.png after it."""

import json
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from ..commands import written

SUMMARY_NAME, CURVES_NAME, METRICS_NAME = "summary.json", "curves.png", "metrics.jsonl"
EVENT = ("step", "alpha", "score_initial", "score_best", "num_candidates", "skipped")  # what is kept of one


def _json(data: Any, **options: Any) -> str:
    """`data` with null in place of NaN and infinities, which JSON does not have."""
    return json.dumps(json.loads(json.dumps(data), parse_constant=lambda name: None), **options) + "\n"


class MetricsFile(TrainerCallback):
    """Every logged record as one JSON line. On resume the file is rewritten from the checkpoint's history, so that what
    an abandoned stretch of training had written is gone."""

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            path = Path(args.output_dir) / METRICS_NAME
            with written(args.output_dir):
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text("".join(map(_json, state.log_history)))

    def on_log(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            with written(args.output_dir), open(Path(args.output_dir) / METRICS_NAME, "a") as file:
                file.write(_json(state.log_history[-1]))


def saved_step(trainer) -> int:
    """The step whose weights the model has when training is over: not the last one's under `load_best_model_at_end`."""
    best = trainer.state.best_model_checkpoint if trainer.args.load_best_model_at_end else None
    return trainer.state.global_step if best is None else int(Path(best).name.rpartition("-")[2])


def run_summary(trainer) -> dict[str, Any]:
    """One run as data. `score` is the held-out `eval_metric`, higher is better (minus the KL for teacher_kl);
    `final_score` is the last step's, `saved_score` that of the model in the folder (None where it was not scored)."""
    args, sign = trainer.args, 1 if trainer.args.eval_metric == "accuracy" else -1
    key = f"eval_{args.eval_metric}"
    points = {r["step"]: r for r in trainer.state.log_history if key in r}  # one per step, the last one written
    curve = [
        {"step": step, "score": sign * r[key], **{cost: r[cost] for cost in ("train_tokens", "val_tokens", "seconds")}}
        for step, r in sorted(points.items())
    ]
    events = trainer.effopd.controller.events if trainer.effopd is not None else []
    return {
        "method": "effopd" if trainer.effopd is not None else "opd",
        "seed": args.seed,
        "learning_rate": args.learning_rate,
        "eval_metric": args.eval_metric,
        "final_score": curve[-1]["score"] if curve else None,
        "saved_step": (saved := saved_step(trainer)),
        "saved_score": next((p["score"] for p in curve if p["step"] == saved), None),
        "curve": curve,
        "events": [{name: getattr(event, name) for name in EVENT} for event in events],
    }


def compare(opd: dict[str, Any], effopd: dict[str, Any]) -> dict[str, Any]:
    """Steps and generated tokens (candidate validation included) each run needed to reach OPD's final score.

    An acceleration is OPD's cost over EffOPD's, None where EffOPD never got there.
    """
    target = opd["final_score"]
    first = {
        m: next((p for p in run["curve"] if p["score"] >= target), None)
        for m, run in {"opd": opd, "effopd": effopd}.items()
    }
    steps = {m: p and p["step"] for m, p in first.items()}
    tokens = {m: p and p["train_tokens"] + p["val_tokens"] for m, p in first.items()}

    def ratio(cost: dict[str, Any]) -> float | None:
        return cost["opd"] / cost["effopd"] if cost["effopd"] else None

    return {
        "runs": [opd, effopd],
        "target_score": target,
        "steps_to_target": steps,
        "tokens_to_target": tokens,
        "step_acceleration": ratio(steps),
        "token_acceleration": ratio(tokens),
    }


def write_report(summary: dict[str, Any], folder: Path) -> None:
    """summary.json and curves.png into `folder`."""
    with written(folder):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / SUMMARY_NAME).write_text(_json(summary, indent=2))
        draw_curves(summary["runs"], folder / CURVES_NAME)


def draw_curves(runs: list[dict[str, Any]], path: Path) -> None:
    """Score against steps, and against generated tokens including validation; accepted jumps are marked."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, SymmetricalLogLocator

    figure = Figure(figsize=(10, 4), layout="constrained")
    by_step, by_token = figure.subplots(1, 2, sharey=True)
    for i, run in enumerate(runs):
        label = f"{run['method']} (lr {run['learning_rate']:g}, seed {run['seed']})"
        score_at = {p["step"]: p["score"] for p in run["curve"]}
        tokens = [p["train_tokens"] + p["val_tokens"] for p in run["curve"]]
        for axes, x in ((by_step, list(score_at)), (by_token, tokens)):
            axes.plot(x, list(score_at.values()), marker=".", color=f"C{i}", label=label)
        for event in run["events"]:
            if event["alpha"] != 1 and event["step"] in score_at:
                by_step.annotate(
                    f"α={event['alpha']:.3g}",
                    (event["step"], score_at[event["step"]]),
                    textcoords="offset points",
                    xytext=(0, -11),
                    horizontalalignment="right" if event["step"] == max(score_at) else "left",
                    fontsize=8,
                    color=f"C{i}",
                )
    steps = [p["step"] for run in runs for p in run["curve"]] or [1]
    subs = (1, 2, 5) if max(steps) <= 500 * max(1, min(steps)) else (1,)  # else numbers run into each other
    by_step.set_xscale("symlog", linthresh=1)
    by_step.xaxis.set_major_locator(SymmetricalLogLocator(base=10, linthresh=1, subs=subs))
    by_step.xaxis.set_major_formatter("{x:g}")
    by_step.set_xlabel("optimizer step")
    by_step.set_ylabel("held-out " + ("accuracy" if runs[0]["eval_metric"] == "accuracy" else "−KL to teacher"))
    by_token.set_xlabel("completion tokens generated, candidate validation included")
    for axes in (by_step, by_token):
        axes.grid(alpha=0.3)
    by_token.xaxis.set_major_formatter(EngFormatter(sep=""))  # 160k, where 160000 would run into its neighbour
    by_step.legend(loc="upper left")
    figure.savefig(path, dpi=120)
