"""A run of `effopd-train`: what is checked before it, what it is made of and what it leaves behind."""

import json
import logging
import os
from contextlib import suppress
from pathlib import Path

import transformers
import trl
from accelerate import PartialState
from transformers import AutoConfig, AutoTokenizer, TrainerCallback
from transformers.integrations import get_available_reporting_integrations

from ..commands import written
from ..errors import one_line
from ..extrapolation.adapters import COMPANION
from .checkpoint import check_settings, check_shared, checkpoints, damage, newest_intact, remove
from .config import OPDConfig
from .data import check_tokenizers, fit_context, load_prompts, split_off
from .errors import UserError
from .lock import LOCK_NAME, acquire, release, sole_run
from .options import DataArguments
from .report import MetricsFile, run_summary, saved_step, write_report
from .trainer import OPDTrainer, loading_errors_named

logger = logging.getLogger(__name__)


def resolve_checkpoint(args: OPDConfig) -> None:
    """`--resume_from_checkpoint` without a path (or `latest`) means the newest intact one; a damaged one is named, and
    one of a run with other settings refused."""
    resume, folder = args.resume_from_checkpoint, Path(args.output_dir)
    if resume and str(resume).lower() in ("true", "latest"):
        args.resume_from_checkpoint = str(newest_intact(folder))
    elif resume and not Path(resume).is_dir():
        raise UserError(f"--resume_from_checkpoint: '{resume}' is not a folder")
    elif resume and (wrong := damage(Path(resume))):
        raise UserError(f"--resume_from_checkpoint: {wrong}")
    if args.resume_from_checkpoint:
        check_settings(Path(args.resume_from_checkpoint), args)


def check_output_dir(folder: Path, write_over: bool, go_on: str = "") -> None:
    """A folder in use is resumed or overwritten on request, never by accident; one that cannot be written is said now,
    not when there is something to write. `go_on`: how to resume a run in it, if that can be."""
    with written(folder):  # a name may be too long to ask for
        missing = [p for p in (folder, *folder.absolute().parents) if not p.exists()]
    there = next(p for p in (folder, *folder.absolute().parents) if p not in missing)
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise UserError(
            f"--output_dir '{folder}' cannot be written: '{there}' is "
            + ("read-only" if there.is_dir() else "not a folder")
        )
    with written(folder):  # some do not let one make a folder there, whatever their permissions say
        folder.mkdir(parents=True, exist_ok=True)
        for made in missing:
            with suppress(OSError):
                made.rmdir()
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if LOCK_NAME in names:
        release(acquire(folder), folder)  # another run that is writing there is told of now, not after loading models
    if not write_over and names - {LOCK_NAME}:
        raise UserError(
            f"--output_dir '{folder}' exists and is not empty; pass {go_on}--overwrite_output_dir to write over it, or "
            "another folder"
        )


def check_models_stay(args: OPDConfig, student: str | None) -> None:
    """Raises UserError where writing over an earlier run would remove a model that this one begins with."""
    for model in (student, args.teacher_model_name_or_path) if args.overwrite_output_dir else ():
        if not model:
            continue
        folder = Path(model).resolve()
        if any(p.resolve() in (folder, *folder.parents) or p.parent.resolve() == folder for p in _abandoned(args)):
            raise UserError(f"--overwrite_output_dir would remove '{model}': choose another --output_dir")


SAVED_MODEL = (
    "model.safetensors", "model.safetensors.index.json", "model-{0}-of-{0}.safetensors".format("[0-9]" * 5),
    *(f"{f}adapter_{n}" for f in ("", f"{COMPANION}/") for n in ("config.json", "model.safetensors")),
)  # fmt: skip


def _abandoned(args: OPDConfig) -> list[Path]:
    """What goes of an earlier run that is written over. Its checkpoints: their steps may lie beyond this run's, and
    resuming and `save_total_limit` would take them for the newer ones. Its saved model: an adapter beside new weights,
    or shards beside a single file, would be loaded with them or in their place."""
    if args.resume_from_checkpoint:
        return []
    folder = Path(args.output_dir)
    saved = (path for pattern in SAVED_MODEL for path in folder.glob(pattern) if path.is_file())
    return [*checkpoints(folder), *saved]


class _WriteOver(TrainerCallback):
    """Removes what an earlier run left: when training begins, after all that can be refused has been."""

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            for path in _abandoned(args):
                remove(path)


def check_trackers(report_to: list[str]) -> None:
    """Raises UserError for a tracker that is not installed: transformers would say so once the models are loaded."""
    installed = get_available_reporting_integrations()
    for name in report_to:
        if name not in (*installed, "azure_ml", "flyte"):  # these two it does not list, or not always
            raise UserError(f"--report_to {name}: it is not installed; there is {', '.join(['none', *installed])}")


def _load_tokenizer(name: str, **kwargs):
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, padding_side="left", truncation_side="left", **kwargs)
    except Exception as e:  # of what kind it is depends on what of a tokenizer is not there
        raise UserError(f"no tokenizer can be loaded from '{name}': {_said(e)}") from e
    if tokenizer.get_vocab().keys() <= tokenizer.get_added_vocab().keys():  # what transformers makes up from a config
        raise UserError(
            f"'{name}' has no tokenizer files: save the tokenizer it was trained with there, with "
            f"tokenizer.save_pretrained('{name}')"
        )
    return tokenizer


def _check_no_adapter(name: str) -> None:
    """Raises UserError for a folder that holds a LoRA adapter alone, saying how to make a model of it."""
    folder = Path(name)
    file = folder / "adapter_config.json"
    if (folder / "config.json").is_file() or not file.is_file():
        return
    base = json.loads(file.read_text()).get("base_model_name_or_path")
    how = f"model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained('{base}'), '{name}'); "
    if (folder / COMPANION).is_dir():  # its jumps
        how += f"model.load_adapter('{folder / COMPANION}', '{COMPANION}'); "
        how += f"model.base_model.set_adapter(['default', '{COMPANION}']); "
    raise UserError(
        f"'{name}' is a LoRA adapter, not a whole model: merge it into its base first ({how}"
        "model.merge_and_unload().save_pretrained(folder)), and save the tokenizer to that folder"
    )


def _load_config(name: str, **kwargs):
    try:
        config = AutoConfig.from_pretrained(name, **kwargs)
    except Exception as e:
        raise UserError(f"no model can be loaded from '{name}': {_said(e)}") from e
    (made, *_) = config.architectures or [type(config).__name__]
    known = getattr(transformers, made, None) if config.architectures else None  # else the code is the model's own
    if config.is_encoder_decoder or (known and not known.can_generate()):
        raise UserError(f"no causal language model can be loaded from '{name}': its config.json names {made}")
    return config.get_text_config()


def _said(error: Exception) -> str:
    said = one_line(error, 400)
    return said if isinstance(error, (OSError, ValueError)) else f"{type(error).__name__}: {said}"


def build_trainer(data: DataArguments, args: OPDConfig, model_args: trl.ModelConfig) -> OPDTrainer:
    """Check everything that can be checked without a model, then load the models.

    Raises:
        UserError: see `data.py`, `OPDConfig` and the checks here.
    """
    for name, value in {
        "model_name_or_path": model_args.model_name_or_path,
        "teacher_model_name_or_path": args.teacher_model_name_or_path,
        "dataset_name": data.dataset_name,
    }.items():
        if value is None:
            raise UserError(f"--{name} is required (or --demo, which needs nothing)")
    given = [name for name in (data.eval_dataset_name, data.val_dataset_name) if name and args.effopd_enabled]
    if len(given) == 2 and len({Path(name).resolve() for name in given}) == 1:
        raise UserError(
            f"--eval_dataset_name and --val_dataset_name are both '{given[0]}': prompts that score EffOPD's candidates "
            "are not held out"
        )
    check_trackers(args.report_to)
    student, teacher = model_args.model_name_or_path, args.teacher_model_name_or_path
    with PartialState().main_process_first():  # the others read what the first has downloaded
        held_out = {}
        if args.do_eval or data.eval_dataset_name:
            held_out["eval"] = (data.eval_dataset_name, data.eval_size, "evaluation (--eval_size)")
        if args.effopd_enabled:
            held_out["val"] = (data.val_dataset_name, args.effopd_val_size, "EffOPD's candidates (--effopd_val_size)")
        answers = {kind: args.eval_metric == "accuracy" for kind in held_out}
        if args.effopd_score != "eval_metric":
            answers["val"] = False  # its prompts are completed, and the completions' loss taken
        train = load_prompts(
            data.dataset_name,
            config=data.dataset_config,
            split=data.dataset_train_split,
            answers=any(answers[kind] for kind, (name, *_) in held_out.items() if name is None),
        )
        sets = {
            kind: load_prompts(name, config=data.dataset_config, split=data.dataset_test_split, answers=answers[kind])
            for kind, (name, *_) in held_out.items()
            if name is not None
        }
        trust = {"trust_remote_code": args.trust_remote_code}
        for model in (student, teacher):
            _check_no_adapter(model)
        tokenizer = _load_tokenizer(student, revision=model_args.model_revision, **trust)
        configs = [_load_config(student, revision=model_args.model_revision, **trust)]
        configs.append(_load_config(teacher, revision=args.teacher_model_revision, **trust))
        check_tokenizers(
            tokenizer,
            _load_tokenizer(teacher, revision=args.teacher_model_revision, **trust),
            shared=min(c.vocab_size for c in configs),
        )
    for kind, (name, size, what) in held_out.items():
        if name is None:
            train, sets[kind] = split_off(train, size, args.seed, what)

    contexts = [n for c in configs if (n := getattr(c, "max_position_embeddings", None))]
    limit = min(contexts) - args.max_completion_length if contexts else None
    chat = args.chat_template_kwargs or {}
    train, dropped = fit_context(train, tokenizer, limit, args.overlong_prompts, data.dataset_name, **chat)
    for kind, dataset in sets.items():
        name = getattr(data, f"{kind}_dataset_name") or data.dataset_name
        sets[kind], n = fit_context(dataset, tokenizer, limit, args.overlong_prompts, name, **chat)
        dropped += n
    if dropped:
        logger.warning("dropped %d prompts longer than %d tokens", dropped, limit)

    quantization = trl.get_quantization_config(model_args)
    shared = {"attn_implementation": model_args.attn_implementation, "dtype": model_args.dtype}
    args.model_init_kwargs = {**shared, "revision": model_args.model_revision, **(args.model_init_kwargs or {})}
    args.teacher_model_init_kwargs = {**shared, **(args.teacher_model_init_kwargs or {})}
    try:
        with loading_errors_named(student):  # the teacher's are named before
            return OPDTrainer(
                student,
                teacher,
                args,
                train_dataset=train,
                eval_dataset=sets.get("eval"),
                val_dataset=sets.get("val"),
                processing_class=tokenizer,
                callbacks=[MetricsFile()],
                quantization_config=quantization,
                peft_config=trl.get_peft_config(model_args),
            )
    except (OSError, ValueError, ImportError) as e:  # TRL's and transformers' own checks of what they were given
        raise UserError(one_line(e, 400)) from e


def run(data: DataArguments, args: OPDConfig, model_args: trl.ModelConfig) -> OPDTrainer:
    """Train, then write the student, summary.json and curves.png into `output_dir`."""
    if PartialState().is_main_process:
        check_output_dir(
            Path(args.output_dir),
            write_over=bool(args.resume_from_checkpoint or args.overwrite_output_dir),
            go_on="--resume_from_checkpoint to go on with it, ",
        )
        check_models_stay(args, model_args.model_name_or_path)
    check_shared(Path(args.output_dir))
    resolve_checkpoint(args)
    trainer = build_trainer(data, args, model_args)
    if args.overwrite_output_dir:
        trainer.add_callback(_WriteOver())
    with sole_run(Path(args.output_dir)):
        trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
        last = trainer.state.global_step
        evaluated = any(r["step"] == last and "eval_teacher_kl" in r for r in trainer.state.log_history)
        if trainer.eval_dataset is not None and not evaluated and last == saved_step(trainer):
            trainer.evaluate()
        with written(args.output_dir):
            trainer.save_model(args.output_dir)
            if trainer.is_world_process_zero():
                trainer.state.save_to_json(str(Path(args.output_dir) / "trainer_state.json"))
        if trainer.is_world_process_zero():
            write_report({"runs": [run_summary(trainer)]}, Path(args.output_dir))
    if trainer.is_world_process_zero():
        student = f"student (of step {saved_step(trainer)})"
        logger.info("%s, metrics.jsonl, summary.json and curves.png are in %s", student, args.output_dir)
    return trainer
