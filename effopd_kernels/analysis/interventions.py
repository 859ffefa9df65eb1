"""`effopd-analyze interventions`: what edited models score.

Every edit is made in place, scored with the trainer's own validation and undone (`edits.py`); what was scored is noted
down at once (`evaluations.py`), so that an interrupted command goes on where it stopped.
"""

import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from trl import ModelConfig, TrlParser

from ..commands import leave_process_group, printed_and_done, written
from ..errors import UserError
from ..extrapolation.adapters import COMPANION
from ..train import OPDTrainer
from ..train.config import OPDConfig
from ..train.options import DataArguments, options_help, parse_options
from ..train.output_dir import LOCK_NAME, sole_run
from ..train.run import build_trainer as build_opd_trainer
from . import intervention_report
from .adapters import CONFIG
from .comparison import Comparison, compare
from .edits import Edit, EditableModel, live_tensors
from .evaluations import FILE, Evaluations, evaluate_trials, pending, rows_of
from .loaded import as_the_model_names_them
from .output import answer, check_free, not_left_empty, say, terminated_as_interrupted, whole_folder
from .plans import INTERVENTIONS, Plan, Trial
from .report import PARTS
from .roles import depth
from .scoring import Validate, estimate
from .updates import trajectories_of
from .wording import counted, listed, printable


@dataclass
class InterventionArguments:
    """What to compare and what to try."""

    base: str | None = field(default=None, metadata={"help": "The model that training started from: folder."})
    checkpoints: list[str] | None = field(
        default=None, metadata={"help": "Checkpoints of one trajectory: folders, LoRA adapters too."}
    )
    trajectory: list[str] | None = field(
        default=None,
        metadata={"help": "NAME=DIR,DIR,...; repeat it to set several side by side.", "action": "extend"},
    )
    interventions: list[str] = field(
        default_factory=lambda: list(INTERVENTIONS), metadata={"help": f"Which of {', '.join(INTERVENTIONS)}."}
    )
    alphas: list[float] = field(
        default_factory=lambda: list(Plan.alphas),
        metadata={"help": "α of `scale`, beside 0 and 1."},
    )
    rank_fractions: list[float] = field(
        default_factory=lambda: list(Plan.fractions),
        metadata={"help": "Shares of the rank that `top` keeps and `bottom` drops; factors of the largest are held."},
    )
    window: int | None = field(default=None, metadata={"help": "Layers in a window. Unset: a quarter of the depth."})
    stride: int | None = field(default=None, metadata={"help": "Layers between windows. Unset: half a window."})
    max_prompts: int | None = field(default=None, metadata={"help": "Evaluate on the first so many prompts only."})
    save_models: bool = field(default=False, metadata={"help": "Also write every edited model into output_dir/models."})
    estimate_only: bool = field(default=False, metadata={"help": "Say what the run would cost, and stop."})


def main(argv: Sequence[str]) -> None:
    """The sub-command. Raises UserError for anything wrong with what was given, before any work."""
    ours, data, args, model_args = parse(list(argv))
    with terminated_as_interrupted(), not_left_empty(args.output_dir):
        run(ours, data, args, model_args)
    leave_process_group()


def parse(argv: list[str]) -> tuple[InterventionArguments, DataArguments, OPDConfig, ModelConfig]:
    parser = TrlParser(
        (InterventionArguments, DataArguments, OPDConfig, ModelConfig), prog="effopd-analyze interventions"
    )
    if "-h" in argv or "--help" in argv:
        with printed_and_done():
            print_help(parser)
    return parse_options(parser, argv)


EVALUATION = {  # options of effopd-train that matter here, and what they mean here where that differs
    "teacher_model_name_or_path": "The teacher; without one, accuracy alone is measured.",
    "dataset_name": "Prompts to score on, with answers for accuracy: hub id or file.",
    "dataset_test_split": "Split of a hub dataset.",
    "eval_metric": "What is drawn and called the gain, accuracy or teacher_kl; both are measured where possible.",
    "eval_temperature": None,
    "max_completion_length": None,
    "per_device_eval_batch_size": "Prompts that are completed together.",
    "overlong_prompts": None,
    "dtype": "Of the models while they are scored; `auto` is the files' own.",
    "use_vllm": "Complete with vLLM.",
    "seed": "Of sampling.",
    "effopd_anchor_device": "Where the copy of the base is kept: device, host (pinned) or disk (mapped).",
    "output_dir": "A new folder, or that of the interrupted command.",
    "overwrite_output_dir": "Evaluate anew what is noted in output_dir, and remove the models saved there.",
}


def print_help(parser: TrlParser) -> None:
    print("usage: effopd-analyze interventions --base DIR --checkpoints DIR [DIR ...] --dataset_name eval.jsonl \\")
    print("           --eval_metric accuracy|teacher_kl [--teacher_model_name_or_path DIR] --output_dir OUT")
    print("       torchrun --nproc_per_node 8 -m effopd_kernels.analysis.cli interventions ...\n")
    sections = {"what to try": InterventionArguments.__dataclass_fields__, "evaluation": EVALUATION}
    print(options_help(parser, sections, EVALUATION))
    print(
        "The same command goes on where it was interrupted. Options of effopd-train, and its YAML as --config, apply."
    )


def run(ours: InterventionArguments, data: DataArguments, args: OPDConfig, model_args: ModelConfig) -> None:
    """Check, estimate, evaluate, report."""
    check(ours, data, args)
    comparison = compare(ours.base, trajectories_of(ours.checkpoints, ours.trajectory or []))
    if ours.window is not None and ours.window > (layers := depth(comparison.names)):
        raise UserError(f"--window {ours.window} exceeds the model's {layers} layers")
    folder = Path(args.output_dir)
    going_on = check_output(folder, args.overwrite_output_dir, inputs_of(comparison, data, args))
    with sole_run(folder):
        evaluate(ours, data, args, model_args, comparison, over=args.overwrite_output_dir and going_on)


def check_output(folder: Path, overwrite: bool, inputs: list[str | Path]) -> bool:
    """Whether an interrupted command goes on in `folder`; raises, on every process, as `check_free`. One looks: what
    another tries there is nothing that it holds."""
    going_on = failure = None
    if PartialState().is_main_process:
        try:
            names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
            going_on = FILE in names
            check_free(folder, overwrite or going_on or names == {LOCK_NAME}, inputs)
        except (UserError, OSError) as error:
            failure = error
    going_on, failure = broadcast_object_list([going_on, failure])
    if failure is not None:
        raise failure
    return going_on


def evaluate(ours, data, args: OPDConfig, model_args: ModelConfig, comparison: Comparison, over: bool) -> None:
    """over: whether this writes over what an earlier command left."""
    folder = Path(args.output_dir)
    settings = settings_of(comparison, ours, data, args, model_args)
    evaluations = Evaluations(folder, settings, fresh=args.overwrite_output_dir)

    trainer = build_trainer(ours, data, args, model_args)
    first = trainer.is_world_process_zero()
    evaluations.done = broadcast_object_list([evaluations.done])[0]  # every process must leave out the same
    options = {"trust_remote_code": args.trust_remote_code}
    live = live_tensors(trainer.model)
    trajectories, files = as_the_model_names_them(comparison.trajectories, comparison.base, live, **options)
    model = EditableModel(
        trainer.model,
        trajectories,
        files=files,
        max_fraction=max(ours.rank_fractions),
        place=args.effopd_anchor_device,
        directory=folder,
        on_change=trainer._weights_changed,
    )
    plan = plan_of(ours, comparison, model)
    trials = plan.trials(ours.interventions)
    left = pending(trials, evaluations)
    validate = Validate(trainer, ours.max_prompts)
    cost = estimate(model, trials, left, validate)
    notes = notes_on(comparison, plan, loaded=trajectories is not comparison.trajectories)
    if first:
        say(notes)
        answer(cost)
    if ours.estimate_only:
        return
    models = folder / "models"
    if first and over:  # else what is there is not ours
        clear(models)
    if ours.save_models:
        if first:
            evaluations.begin()
        save_models(model, trainer, trials, models)
    evaluate_trials(model, left, evaluations, validate, write=first)
    if first:
        rows = rows_of(trials, evaluations, args.eval_metric)
        write_report(folder, rows, args.eval_metric, settings, comparison, notes)
        answer(f"tables, figures and report.html are in {printable(folder)}")


def check(ours: InterventionArguments, data: DataArguments, args: OPDConfig) -> None:
    """What can be known to be wrong from the arguments alone."""
    for name, value in {"base": ours.base, "dataset_name": data.dataset_name}.items():
        if value is None:
            raise UserError(f"--{name} is required")
    if args.output_dir == "trainer_output":  # what transformers fills in when none was given
        raise UserError("--output_dir is required")
    if args.eval_metric == "teacher_kl" and args.teacher_model_name_or_path is None:
        raise UserError("--eval_metric teacher_kl needs --teacher_model_name_or_path")
    if unknown := [name for name in ours.interventions if name not in INTERVENTIONS]:
        raise UserError(f"--interventions '{unknown[0]}' is not one of {', '.join(INTERVENTIONS)}")
    if not all(0 < f <= 1 for f in ours.rank_fractions):
        raise UserError(f"--rank_fractions must lie in (0, 1], got {ours.rank_fractions}")
    if not all(map(math.isfinite, ours.alphas)):
        raise UserError(f"--alphas must be finite, got {ours.alphas}")
    for name in ("window", "stride", "max_prompts"):
        if (value := getattr(ours, name)) is not None and value < 1:
            raise UserError(f"--{name} must be at least 1, got {value}")


SAMPLING = (
    "max_completion_length", "top_p", "top_k", "min_p", "repetition_penalty", "generation_kwargs",
    "chat_template_kwargs", "per_device_eval_batch_size", "seed", "use_vllm",
)  # fmt: skip
ARITHMETIC = "bf16", "fp16"  # autocast's


def settings_of(comparison: Comparison, ours, data, args: OPDConfig, model_args: ModelConfig) -> dict[str, Any]:
    """All that an evaluation depends on beside its edit."""
    teacher = args.teacher_model_name_or_path
    return {
        "base": _identity(comparison.base.path),
        **{
            f"trajectory {t}": ", ".join(_identity(c.path) for c in many) for t, many in comparison.trajectories.items()
        },
        "teacher": teacher and _identity(Path(teacher)),
        "dataset": f"{_identity(Path(data.dataset_name))}, {data.dataset_config}, {data.dataset_test_split}",
        "prompts": ours.max_prompts or "all",
        "eval metric": args.eval_metric,
        "temperature": args.validation_temperature,
        **{name.replace("_", " "): getattr(args, name) for name in (*SAMPLING, *ARITHMETIC)},
        "dtype": model_args.dtype,
        "attn implementation": model_args.attn_implementation,
    }


def inputs_of(comparison: Comparison, data: DataArguments, args: OPDConfig) -> list[str | Path]:
    """Everything that is read, where it is a path."""
    weights = [comparison.base.path, *(checkpoint.path for _, _, checkpoint in comparison.checkpoints())]
    return [*weights, data.dataset_name, *filter(None, [args.teacher_model_name_or_path])]


# Of an adapter's update its config has the scale; the companion's is in a folder of its own.
WEIGHTS = [f"{folder}{name}" for folder in ("", f"{COMPANION}/") for name in ("*.safetensors", CONFIG)]


def _identity(path: Path) -> str:
    """A path, however it was typed, and what changes when its content does; a hub id is itself."""
    if not path.exists():
        return str(path)
    path = path.resolve()
    files = [path] if path.is_file() else [file for pattern in WEIGHTS for file in path.glob(pattern)]
    written = datetime.fromtimestamp(max((file.stat().st_mtime for file in files), default=0), UTC)
    size = sum(file.stat().st_size for file in files)
    return f"{path} ({size:,} bytes, written {written.isoformat(' ', 'milliseconds')})"


def build_trainer(ours, data, args: OPDConfig, model_args: ModelConfig) -> OPDTrainer:
    """effopd-train's own, with the base as its student: its checks, its models, its generation."""
    model_args.model_name_or_path = ours.base
    data.eval_dataset_name, data.dataset_train_split = data.dataset_name, data.dataset_test_split
    args.do_eval, args.effopd_enabled = True, False
    without_teacher = args.teacher_model_name_or_path is None
    if without_teacher:
        args.teacher_model_name_or_path = ours.base  # it insists on one
    trainer = build_opd_trainer(data, args, model_args, trains=False)
    if without_teacher:
        trainer.teacher_model = args.teacher_model_name_or_path = None
    return trainer


def plan_of(ours: InterventionArguments, comparison: Comparison, model: EditableModel) -> Plan:
    """What to try. Reads every checkpoint once, for the norms.

    Raises:
        UserError: weights that are not finite.
    """
    steps, norms = {}, {}
    for name, checkpoints in comparison.trajectories.items():
        taken = [c.step for c in checkpoints]
        taken = range(1, len(taken) + 1) if None in taken else taken
        steps[name] = list(zip(taken, comparison.progress[name], strict=True))
    for name, i, checkpoint in comparison.checkpoints():
        each = model.norms(name, i)
        if broken := [tensor for tensor, norm in each.items() if not math.isfinite(norm)]:
            own = [tensor for tensor in broken if not model.base_of(tensor).isfinite().all()]
            if own:
                raise UserError(f"the base {comparison.base.path} has weights that are not finite, in {listed(own)}")
            raise UserError(f"{checkpoint.path} has weights that are not finite, in {listed(broken)}; leave it out")
        norms[name, i] = math.hypot(*each.values())
    return Plan(
        list(model.live), steps, norms, ours.alphas, ours.rank_fractions, window=ours.window, stride=ours.stride
    )


def notes_on(comparison: Comparison, plan: Plan, loaded: bool) -> list[str]:
    """What a reader must know."""
    notes = list(comparison.notes)
    if other := [name for name in comparison.names if name not in plan.names]:
        why = "Renamed or fused by transformers, or tied, so edited under the names that the model has"
        why = why if loaded else "In files only, or tied in the model, so not edited by this name"
        notes.append(f"{why}: {listed(other)}.")
    places = [(c.path, plan.update_norms[name, i]) for name, i, c in comparison.checkpoints()]
    return list(dict.fromkeys([*notes, *(f"{path} equals the base." for path, norm in places if norm == 0)]))


def clear(models: Path) -> None:
    """Remove the models that a run with other settings may have saved."""
    for model in models.glob("*"):
        if model.is_dir() and not model.is_symlink():
            shutil.rmtree(model)


def save_models(model: EditableModel, trainer: OPDTrainer, trials: list[Trial], folder: Path) -> None:
    """Every edited model in a folder of its own, once; one that is there stays. It appears whole."""
    missing = {name: edit for name, edit in named_edits(trials).items() if not (folder / name).exists()}
    first, partial = trainer.is_world_process_zero(), folder / ".partial"
    missing = broadcast_object_list([missing])[0]  # every process must save the same
    try:
        for name, edit in missing.items():
            if first:
                shutil.rmtree(partial, ignore_errors=True)
            with model.edited(edit), written(folder):
                trainer.save_model(str(partial))
            if first:
                partial.replace(folder / name)
    finally:
        if first:
            shutil.rmtree(partial, ignore_errors=True)


def named_edits(trials: list[Trial]) -> dict[str, Edit]:
    """Every edit once, by a name of its own: α = −0.5 of opd and α = 0.5 of opd- would share one."""
    distinct: dict[str, Trial] = {}
    for trial in trials:
        distinct.setdefault(trial.edit.key(), trial)
    named: dict[str, Edit] = {}
    for key, trial in distinct.items():
        name = model_name(trial)
        named[f"{name}-{key[:8]}" if name in named else name] = trial.edit
    return named


def model_name(trial: Trial) -> str:
    """What was asked for; numbers that were measured may have other last digits another time."""
    asked = [value for key, value in trial.about.items() if key not in ("progress", "update_norm")]
    parts = [trial.intervention, trial.edit.trajectory, *asked]
    return "-".join(str(part) for part in parts if part is not None).replace(" ", "_")


def write_report(folder: Path, rows: list[dict], metric: str, settings: dict, comparison: Comparison, notes) -> None:
    compared = ", ".join(f"{t} ({counted(c, 'checkpoint')})" for t, c in comparison.trajectories.items())
    lead = f"{compared}, from {comparison.base.label}: each edited in place, scored on the same prompts, and restored."
    with whole_folder(folder, PARTS) as staging:
        intervention_report.write(staging, rows, metric, settings, lead, notes)
