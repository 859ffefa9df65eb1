"""The options of `effopd-train`, from flags and a YAML file."""

import argparse
import os
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from enum import Enum
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import trl
import yaml

from ..commands import printed_and_done
from ..errors import UserError, one_line
from .config import OPDConfig


@dataclass
class DataArguments:
    """Where the prompts come from. A name is a hub id or a .jsonl, .json or .parquet file."""

    dataset_name: str | None = field(default=None, metadata={"help": "Training prompts: hub id or file."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a hub dataset."})
    dataset_train_split: str = field(default="train", metadata={"help": "Split to train on."})
    dataset_test_split: str = field(
        default="test", metadata={"help": "Split of the held-out set and of candidates' prompts."}
    )
    eval_dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Held-out prompts; without eval_steps for the end only. Unset: eval_size of the training set."
        },
    )
    val_dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Prompts that score EffOPD's candidates. Unset: effopd_val_size prompts of the training set."
        },
    )
    eval_size: int = field(default=256, metadata={"help": "Held-out prompts, when they come from the training set."})
    demo: bool = field(
        default=False,
        metadata={"help": "Build a tiny world, run OPD and EffOPD in it and compare them. Other options apply."},
    )


HELP = {
    "models": ["model_name_or_path", "teacher_model_name_or_path", "dtype", "use_peft", "lora_r", "lora_alpha"],
    "data": [
        "dataset_name", "dataset_train_split", "eval_dataset_name", "dataset_test_split", "val_dataset_name",
        "eval_size", "overlong_prompts",
    ],
    "training": [
        "learning_rate", "max_steps", "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps",
        "max_completion_length", "temperature", "divergence", "loss_temperature", "use_vllm", "bf16", "seed",
    ],
    "validation": [
        "eval_metric", "eval_steps", "eval_at_powers_of_two", "eval_temperature", "per_device_eval_batch_size",
    ],
    "EffOPD": [name for name in OPDConfig.__dataclass_fields__ if name.startswith("effopd_")],
    "output": [
        "output_dir", "overwrite_output_dir", "resume_from_checkpoint", "save_steps", "logging_steps", "report_to",
    ],
}  # fmt: skip


def print_help(parser: trl.TrlParser) -> None:
    """The options a run is made of, grouped; `--help_all` lists every one of TRL's and transformers'."""
    print("usage: effopd-train [--config run.yaml] [--option value ...]      flags override the YAML file\n")
    print("  effopd-train --demo                                              a complete run in a few minutes")
    print("  effopd-train --model_name_or_path STUDENT --teacher_model_name_or_path TEACHER \\")
    print("      --dataset_name train.jsonl --eval_steps 50 --output_dir out\n")
    resume = "A checkpoint's folder to go on from; without a value, the newest intact one in output_dir."
    print(options_help(parser, HELP, {"resume_from_checkpoint": resume}))
    print("  --help_all   every option of TRL's DistillationConfig and transformers' TrainingArguments")


def options_help(parser: trl.TrlParser, sections: Mapping[str, Iterable[str]], texts: Mapping[str, str | None]) -> str:
    """The options of each section, with the text given for one in place of its own help."""
    actions = _actions(parser)
    formatter = parser._get_formatter()
    for title, names in sections.items():
        formatter.start_section(title)
        for name in names:
            actions[name].help = texts.get(name) or actions[name].help
            formatter.add_argument(actions[name])
        formatter.end_section()
    return formatter.format_help()


def _actions(parser: trl.TrlParser) -> dict[str, argparse.Action]:
    return {a.dest: a for a in reversed(parser._actions)}  # --option, not the --no_option that may follow it


def parse(argv: list[str], **defaults: Any) -> tuple[DataArguments, OPDConfig, trl.ModelConfig]:
    """`defaults` hold where neither flags nor a `--config` file say otherwise."""
    parser = trl.TrlParser((DataArguments, OPDConfig, trl.ModelConfig), prog="effopd-train")
    if "-h" in argv or "--help" in argv:
        with printed_and_done():
            print_help(parser)
    if "--help_all" in argv:
        with printed_and_done():
            parser.print_help()
    flag = "--resume_from_checkpoint"
    if flag in argv and (argv[-1] == flag or argv[argv.index(flag) + 1].startswith("--")):
        argv = [*argv[: argv.index(flag) + 1], "true", *argv[argv.index(flag) + 1 :]]
    parser.set_defaults(**{name: str(value) for name, value in defaults.items()})
    return parse_options(parser, argv)


def parse_options(parser: trl.TrlParser, argv: list[str]) -> tuple:
    """The parser's dataclasses from flags and `--config`.

    Raises UserError, one sentence, where argparse prints all its options and TRL gives advice for programmers.
    """
    # TRL and peft use names that transformers has renamed; nothing a user of a command could do about.
    warnings.filterwarnings("ignore", "`(is_)?gradient_checkpointing", FutureWarning)
    try:
        return _parsed(parser, argv)
    except UserError:
        raise
    except (ValueError, OSError, ImportError) as e:  # HfArgumentParser, TrainingArguments
        raise UserError(one_line(e, 400)) from e


def _parsed(parser: trl.TrlParser, argv: list[str]) -> tuple:
    def refuse(message: str):
        option, _, value = message.removeprefix("argument --").partition("/")
        if "," in value and (action := _actions(parser).get(option)) is not None and action.nargs == "+":
            message += "; separate by spaces"
        raise UserError(message)

    config = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    config.add_argument("--config")
    config.error = parser.error = refuse
    given, argv = config.parse_known_args(argv)
    in_file = [] if given.config is None else parser.set_defaults_with_config(**_read(given.config, parser))
    *values, in_flags = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)
    for unknown, where in ((in_file, "in the --config file"), (in_flags, "")):
        if unknown:
            name = unknown[0].partition("=")[0]
            near = get_close_matches(name, parser._option_string_actions, n=1)
            raise UserError(" ".join(["unknown option", name, where]).strip() + "".join(f"; {n}?" for n in near))
    return tuple(values)


def _read(file: str, parser: trl.TrlParser) -> dict[str, Any]:
    """The options in a YAML file, of the types that flags of the same text would have. Its `env` goes into the
    environment, as TRL has it."""
    try:
        config = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as e:
        raise UserError(f"--config '{file}' cannot be read: {getattr(e, 'strerror', None) or one_line(e, 400)}") from e
    env = config.pop("env", {}) if isinstance(config, dict) else None
    if not isinstance(env, dict):
        raise UserError(f"--config '{file}' is not a mapping of options to values (and `env` of variables)")
    os.environ.update({str(name): str(value) for name, value in env.items()})
    config = {str(name).replace("-", "_"): value for name, value in config.items()}
    hints = {name: hint for cls in parser.dataclass_types for name, hint in get_type_hints(cls).items()}
    actions = _actions(parser)
    for name in [name for name in config if name in hints]:
        value, action = config[name], actions[name]
        kinds = _kinds(hints[name]) | {type(action.const)} - {NoneType}  # as what a flag without a value means
        if value is False and any(issubclass(kind, Enum) and "no" in {m.value for m in kind} for kind in kinds):
            value = config[name] = "no"  # as it was written, of eval_strategy and its like
        if type(value) in _NO_TEXT and type(value) not in kinds:
            raise UserError(f"--{name} in '{file}' takes no {_NO_TEXT[type(value)]}, got {value!r}")
        try:
            if isinstance(value, list):
                config[name] = [parser._get_value(action, str(part)) for part in value]
            elif type(value) not in kinds:
                config[name] = parser._get_value(action, str(value))
        except argparse.ArgumentError as e:
            raise UserError(f"{e} in '{file}'") from e
    return config


_NO_TEXT = {list: "list", dict: "mapping", NoneType: "empty value"}


def _kinds(hint: Any) -> set[type]:
    """The types of the values that a field may have: `list`, whatever is in it."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return set().union(*map(_kinds, parts))
    return set(map(type, parts)) if origin is Literal else {origin or hint}
