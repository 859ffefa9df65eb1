"""A run of `effopd-train`: what is checked before it, what it is made of and what it leaves behind."""

import logging
from dataclasses import fields
from pathlib import Path
from typing import NamedTuple

import trl
from accelerate import PartialState
from datasets import Dataset
from transformers.integrations import get_available_reporting_integrations

from ..commands import written
from ..errors import UserError, one_line
from .checkpoint import damage, newest_intact
from .config import OPDConfig
from .data import load_prompts, split_off
from .loading import check_no_adapter, load_config, load_tokenizer
from .options import DataArguments
from .output_dir import WriteOver, check_inputs_stay, check_output_dir, check_shared, sole_run
from .report import MetricsFile, run_summary, saved_step, write_report
from .settings import check_settings
from .tokenizing import check_tokenizers, fit_context
from .trainer import OPDTrainer

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


def check_trackers(report_to: list[str]) -> None:
    """Raises UserError for a tracker that is not installed: transformers would say so once the models are loaded."""
    installed = get_available_reporting_integrations()
    for name in report_to:
        if name not in (*installed, "azure_ml", "flyte"):  # these two it does not list, or not always
            raise UserError(f"--report_to {name}: it is not installed; there is {', '.join(['none', *installed])}")


def _same_prompts(data: DataArguments) -> bool:
    """Whether training and held-out prompts are one file, or one split on the hub."""
    train, held_out = Path(data.dataset_name), Path(data.eval_dataset_name)
    return train.resolve() == held_out.resolve() and (
        train.is_file() or data.dataset_train_split == data.dataset_test_split
    )


def build_trainer(data: DataArguments, args: OPDConfig, model_args: trl.ModelConfig, trains: bool = True) -> OPDTrainer:
    """Check everything that can be checked without a model, then load the models.

    Args:
        trains: false for a trainer that evaluates alone.

    Raises:
        UserError: see `data.py`, `tokenizing.py`, `OPDConfig` and the checks here.
    """
    _check_names(data, args, model_args)
    if trains and data.eval_dataset_name and _same_prompts(data):
        logger.warning(
            "--eval_dataset_name and --dataset_name are both '%s': the student is trained on what is called held out",
            data.dataset_name,
        )
    if not model_args.use_peft and (given := _lora_options(model_args)):
        logger.warning("--%s has no effect without --use_peft: all weights of the student are trained", given[0])
    check_trackers(args.report_to)
    held_out = _held_out(data, args)
    with PartialState().main_process_first():  # the others read what the first has downloaded
        sets = _load_sets(data, held_out)
        tokenizer, configs = _load_tokenizer_and_configs(args, model_args)
    limit, chat, dropped = _most_prompt_tokens(configs, args), args.chat_template_kwargs or {}, 0
    for kind, dataset in sets.items():
        name = data.dataset_name if kind == "train" else held_out[kind].name
        sets[kind], n = fit_context(dataset, tokenizer, limit, args.overlong_prompts, name, **chat)
        dropped += n
    for kind, wanted in held_out.items():
        if wanted.name is None:
            sets["train"], sets[kind] = split_off(sets["train"], wanted.size, args.seed, wanted.purpose)
    if dropped:
        logger.warning("dropped %d prompts longer than %d tokens", dropped, limit)

    quantization = trl.get_quantization_config(model_args)
    shared = {"attn_implementation": model_args.attn_implementation, "dtype": model_args.dtype}
    args.model_init_kwargs = {**shared, "revision": model_args.model_revision, **(args.model_init_kwargs or {})}
    args.teacher_model_init_kwargs = {**shared, **(args.teacher_model_init_kwargs or {})}
    peft_config = trl.get_peft_config(model_args)
    one = peft_config and peft_config.target_modules  # which TRL takes out of its list, and peft for a pattern
    if isinstance(one, str) and one.isidentifier():
        peft_config.target_modules = {one}
    try:
        return OPDTrainer(
            model_args.model_name_or_path,
            args.teacher_model_name_or_path,
            args,
            train_dataset=sets["train"],
            eval_dataset=sets.get("eval"),
            val_dataset=sets.get("val"),
            processing_class=tokenizer,
            callbacks=[MetricsFile()],
            quantization_config=quantization,
            peft_config=peft_config,
        )
    except (OSError, ValueError, ImportError) as e:  # TRL's and transformers' own checks of what they were given
        raise UserError(one_line(e, 400)) from e


def _check_names(data: DataArguments, args: OPDConfig, model_args: trl.ModelConfig) -> None:
    """Raises UserError for a name that is missing, or two of prompts that must differ."""
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


def _lora_options(model_args: trl.ModelConfig) -> list[str]:
    """Those of LoRA that are not as by default."""
    of_lora = (f for f in fields(model_args) if f.name.startswith("lora_") or f.name in ("use_rslora", "use_dora"))
    return [f.name for f in of_lora if getattr(model_args, f.name) != f.default]


class HeldOut(NamedTuple):
    """Prompts that are not trained on: those of a name, or else so many of the training set."""

    name: str | None
    size: int
    purpose: str
    answers: bool  # each must have one


def _held_out(data: DataArguments, args: OPDConfig) -> dict[str, HeldOut]:
    """By "eval" and "val", as far as the run needs them."""
    accuracy, sets = args.eval_metric == "accuracy", {}
    if args.do_eval or data.eval_dataset_name:
        sets["eval"] = HeldOut(data.eval_dataset_name, data.eval_size, "evaluation (--eval_size)", accuracy)
    if args.effopd_enabled:
        purpose = "EffOPD's candidates (--effopd_val_size)"
        answers = accuracy and args.effopd_score == "eval_metric"  # else completions are made, and their loss taken
        sets["val"] = HeldOut(data.val_dataset_name, args.effopd_val_size, purpose, answers)
    return sets


def _load_sets(data: DataArguments, held_out: dict[str, HeldOut]) -> dict[str, Dataset]:
    """The training set, and what is held out under a name of its own."""
    answers = any(wanted.answers for wanted in held_out.values() if wanted.name is None)
    train = load_prompts(data.dataset_name, config=data.dataset_config, split=data.dataset_train_split, answers=answers)
    others = {
        kind: load_prompts(
            wanted.name, config=data.dataset_config, split=data.dataset_test_split, answers=wanted.answers
        )
        for kind, wanted in held_out.items()
        if wanted.name is not None
    }
    return {"train": train, **others}


def _load_tokenizer_and_configs(args: OPDConfig, model_args: trl.ModelConfig):
    """The student's tokenizer, which has to be the teacher's too, and the configs of both models."""
    student, teacher = model_args.model_name_or_path, args.teacher_model_name_or_path
    of_student = {"revision": model_args.model_revision, "trust_remote_code": args.trust_remote_code}
    of_teacher = {"revision": args.teacher_model_revision, "trust_remote_code": args.trust_remote_code}
    for name in (student, teacher):
        check_no_adapter(name)
    tokenizer = load_tokenizer(student, **of_student)
    configs = [load_config(student, **of_student), load_config(teacher, **of_teacher)]
    check_tokenizers(
        tokenizer, load_tokenizer(teacher, **of_teacher), shared=min(config.vocab_size for config in configs)
    )
    return tokenizer, configs


def _most_prompt_tokens(configs: list, args: OPDConfig) -> int | None:
    """What both contexts leave beside a completion; None where neither has a limit."""
    contexts = [n for config in configs if (n := getattr(config, "max_position_embeddings", None))]
    if not contexts:
        return None
    multiple = args.pad_to_multiple_of or 1  # to which prompts and completions are padded, each
    completion = -(-args.max_completion_length // multiple) * multiple
    return (min(contexts) - completion) // multiple * multiple


def run(data: DataArguments, args: OPDConfig, model_args: trl.ModelConfig) -> OPDTrainer:
    """Train, then write the student, summary.json and curves.png into `output_dir`."""
    if PartialState().is_main_process:
        check_output_dir(
            Path(args.output_dir),
            write_over=bool(args.resume_from_checkpoint or args.overwrite_output_dir),
            go_on="--resume_from_checkpoint to go on with it, ",
        )
        check_inputs_stay(args, model_args.model_name_or_path, data)
    check_shared(Path(args.output_dir))
    resolve_checkpoint(args)
    trainer = build_trainer(data, args, model_args)
    if args.overwrite_output_dir:
        trainer.add_callback(WriteOver())
    with sole_run(Path(args.output_dir)):
        trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
        with written(args.output_dir):
            trainer.save_model(args.output_dir)  # before the last evaluation, which may take long or be interrupted
        last = trainer.state.global_step
        evaluated = any(r["step"] == last and "eval_teacher_kl" in r for r in trainer.state.log_history)
        if trainer.eval_dataset is not None and not evaluated and last == saved_step(trainer):
            trainer.evaluate()
        with written(args.output_dir):
            if trainer.is_world_process_zero():
                trainer.state.save_to_json(str(Path(args.output_dir) / "trainer_state.json"))
        if trainer.is_world_process_zero():
            write_report({"runs": [run_summary(trainer)]}, Path(args.output_dir))
    if trainer.is_world_process_zero():
        student = f"student (of step {saved_step(trainer)})"
        logger.info("%s, metrics.jsonl, summary.json and curves.png are in %s", student, args.output_dir)
    return trainer
