"""The one flat configuration of a run: TRL's own fields under TRL's names, and ours beside them."""

import math
import os
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from typing import Any

import torch
import trl
from transformers import GenerationConfig

from ..divergence import FORWARD_KL, REVERSE_KL, Divergence, jsd, skew_forward_kl, skew_reverse_kl
from ..divergence.arguments import COLDEST
from ..errors import UserError
from ..extrapolation.acceptance import acceptance_rule
from ..extrapolation.schedules import alphas_of, budget_of
from ..extrapolation.selection import compiled
from .loss import divergence_from_beta

EVAL_METRICS = ("accuracy", "teacher_kl")
_FAMILY = {"jsd": jsd, "skew_forward_kl": skew_forward_kl, "skew_reverse_kl": skew_reverse_kl}
_MEMBERS = {"reverse_kl": REVERSE_KL, "forward_kl": FORWARD_KL}

_CHOICES = {
    "eval_metric": EVAL_METRICS,
    "overlong_prompts": ("error", "drop"),
    "effopd_acceptance": ("mean", "paired"),
    "effopd_anchor_device": ("device", "host", "disk"),
    "effopd_optimizer": ("keep", "reset"),
    "effopd_search": ("candidates", "gradient"),
    "effopd_score": ("eval_metric", "loss"),
}
_POSITIVE = (
    "temperature", "loss_temperature", "max_completion_length", "per_device_train_batch_size",
    "gradient_accumulation_steps", "per_device_eval_batch_size", "effopd_val_size", "effopd_max_candidates",
)  # fmt: skip
_MAPPINGS = (
    "model_init_kwargs", "teacher_model_init_kwargs", "generation_kwargs", "chat_template_kwargs",
    "lr_scheduler_kwargs", "gradient_checkpointing_kwargs",
)  # fmt: skip
# What an option must be, also as an entry of generation_kwargs, where libraries refuse it late or compute nonsense.
_DOMAINS = {
    "temperature": (lambda v: v >= COLDEST, f"at least {COLDEST}"),
    "loss_temperature": (lambda v: v >= COLDEST, f"at least {COLDEST}"),
    "eval_temperature": (
        lambda v: v == 0 or COLDEST <= v < math.inf,
        f"positive, or 0 for greedy, finite and no less than {COLDEST}",
    ),
    "weight_decay": (lambda v: 0 <= v < math.inf, "0 or more, and finite"),
    "top_k": (lambda v: v >= 0, "a number of tokens, or 0 for all"),
    "top_p": (lambda v: 0 <= v <= 1, "between 0 and 1"),
    "min_p": (lambda v: 0 <= v <= 1, "between 0 and 1"),
    "repetition_penalty": (lambda v: 0 < v < math.inf, "positive and finite"),
    "dataloader_num_workers": (lambda v: v >= 0, "0 or more"),
    "num_beams": (lambda v: v >= 1, "at least 1"),
    "num_return_sequences": (lambda v: v == 1, "1, for a step has one completion of each prompt"),
    "pad_to_multiple_of": (lambda v: v >= 1, "at least 1"),
}
# What generation_kwargs may not have, even if it is None, and why.
_NOT_GIVEN = {
    "stop_strings": "TRL generates without the tokenizer that it needs",
    "eos_token_id": "TRL cuts completions where the student's generation_config.json says that they end: list it there",
    "max_new_tokens": "--max_completion_length says it, and what room prompts have",
    "max_length": "--max_completion_length says it, without the prompt",
    "return_dict_in_generate": "TRL reads what is generated as token ids",
    "disable_compile": "TRL sets it",
}
# What would do nothing, or not what it says, and why.
_NO_EFFECT = {
    "auto_find_batch_size": "a smaller batch would train on the same prompts again and again, beside a step count that "
    "begins anew; set per_device_train_batch_size and gradient_accumulation_steps",
    "data_seed": "prompts are drawn by --seed",
    "train_sampling_strategy": "prompts are shuffled, or with --shuffle_dataset false taken as they come",
    "label_smoothing_factor": "the teacher's probabilities are the labels",
    "bf16_full_eval": "what is validated is computed as in training: --bf16",
    "fp16_full_eval": "what is validated is computed as in training: --fp16",
}


def _check_domains(values: dict[str, Any], option: str) -> None:
    """`option`: how to name one of the `values`, with {} for its own name."""
    for name, (allowed, domain) in _DOMAINS.items():
        if (value := values.get(name)) is None:
            continue
        try:
            fits = allowed(value)
        except TypeError:  # text, in generation_kwargs
            fits = False
        if not fits:
            raise UserError(f"{option.format(name)} must be {domain}, got {value!r}")


def _check_generation(given: dict[str, Any], vllm: bool) -> None:
    _check_domains(given, "--generation_kwargs: {}")
    known = {name for name in vars(GenerationConfig()) if not name.startswith("_")}
    for name in given:
        if name in _NOT_GIVEN:
            raise UserError(f"--generation_kwargs: {name} must be left out, for {_NOT_GIVEN[name]}")
        if name not in known and not vllm:  # whose names are others
            near = "".join(f"; {n}?" for n in get_close_matches(str(name), known, n=1))
            raise UserError(f"--generation_kwargs: unknown option {name} of transformers' GenerationConfig{near}")


def parse_divergence(text: str) -> Divergence:
    """`reverse_kl`, `forward_kl`, `jsd:0.5`, `skew_reverse_kl:0.1`, `skew_forward_kl:0.1` as a member of the family."""
    name, _, parameter = str(text).partition(":")
    if name in _MEMBERS and not parameter:
        return _MEMBERS[name]
    try:
        member, number = _FAMILY[name], float(parameter)
    except (KeyError, ValueError) as e:
        raise UserError(
            f"--divergence {text!r} is not one of reverse_kl, forward_kl, jsd:BETA, skew_reverse_kl:ALPHA, "
            "skew_forward_kl:ALPHA"
        ) from e
    try:
        return member(number)
    except ValueError as e:
        raise UserError(f"--divergence {text!r}: {e}") from e


def parse_schedule(text: str | int | list[int]) -> str | int | list[int]:
    """`pow2`, `adaptive`, `N` (every N steps) or `N,N,…` (these; a list in YAML): the controller's `schedule`."""
    text = ",".join(map(str, text)) if isinstance(text, list) else str(text)
    if text in ("pow2", "adaptive"):
        return text
    try:
        steps = [int(part) for part in text.split(",")]
        if all(s > 0 for s in steps):
            return steps if "," in text else steps[0]
    except ValueError:
        pass
    raise UserError(
        f"--effopd_schedule {text!r} is not 'pow2', 'adaptive', a number of steps, or a list of steps such as 1,2,4,8"
    )


@dataclass
class OPDConfig(trl.DistillationConfig):
    """Everything `trl.DistillationConfig` has, and how to validate and extrapolate.

    See the `help` of each field.

    Raises:
        UserError: a value outside its domain, of the fields that are checked here.
        ValueError: of the others, where TRL or transformers check them; some they do not.
    """

    divergence: str | None = field(
        default=None,
        metadata={
            "help": "Loss per completion token: reverse_kl, forward_kl, jsd:BETA, skew_reverse_kl:ALPHA or "
            "skew_forward_kl:ALPHA. Unset: what `beta` says (1 = reverse KL)."
        },
    )
    temperature: float = field(
        default=trl.DistillationConfig.temperature,
        metadata={"help": "Sampling temperature; that of the loss is loss_temperature."},
    )
    loss_temperature: float = field(
        default=1.0, metadata={"help": "Softmax temperature of the loss; `temperature` is that of sampling."}
    )
    overlong_prompts: str = field(
        default="error",
        metadata={
            "help": "What to do with prompts that the context cannot hold: 'error' counts them, 'drop' removes them."
        },
    )
    overwrite_output_dir: bool = field(
        default=False,
        metadata={
            "help": "Write into a non-empty output_dir: its checkpoints (checkpoint-STEP/) and saved model "
            "(model*.safetensors, adapter_*) are removed, other files of a run's, README.md too, written over."
        },
    )
    eval_metric: str = field(
        default="accuracy",
        metadata={
            "help": "What is validated and EffOPD maximises: 'accuracy' (final answers, needs an answer column) or "
            "'teacher_kl' (minus the KL to the teacher on the student's own completions, needs no labels)."
        },
    )
    eval_temperature: float | None = field(
        default=None,
        metadata={
            "help": "Sampling temperature in validation; 0 is greedy. Unset: greedy for accuracy, `temperature` for "
            "teacher_kl. Prompts and seeds are the same at every validation."
        },
    )
    eval_at_powers_of_two: bool = field(default=False, metadata={"help": "Evaluate at steps 1, 2, 4 and so on."})
    effopd_enabled: bool = field(default=True, metadata={"help": "Extrapolate (EffOPD). False: plain OPD."})
    effopd_alphas: list[float] = field(
        default_factory=lambda: [3, 5, 7, 9, 11],
        metadata={"help": "Candidate step sizes alpha in W = anchor + alpha * (W_t - anchor), in order."},
    )
    effopd_max_candidates: int | None = field(default=None, metadata={"help": "Most tried at one event; unset: all."})
    effopd_schedule: None | str | list[int] = field(  # noqa: RUF036  so ordered, a flag's is text
        default="pow2",
        metadata={
            "help": "Steps with an event: pow2 (published), adaptive (more often while jumps pay), a number N (every N "
            "steps), or a list 1,2,4,8."
        },
    )
    effopd_min_delta: float = field(
        default=0.0, metadata={"help": "Accept a candidate only if it beats the best score by more than this."}
    )
    effopd_acceptance: str = field(
        default="mean",
        metadata={
            "help": "'mean': compare mean scores (published). 'paired': the per-prompt differences must be "
            "positive beyond effopd_confidence."
        },
    )
    effopd_confidence: float = field(
        default=0.84,
        metadata={"help": "One-sided confidence asked of 'paired' acceptance (0.84 is one standard error)."},
    )
    effopd_search: str = field(
        default="candidates",
        metadata={
            "help": "'candidates': try effopd_alphas until one is not strictly better (published). 'gradient': find "
            "alpha <= max(effopd_alphas) from the slope of the teacher KL on fixed completions, and score it."
        },
    )
    effopd_score: str = field(
        default="eval_metric",
        metadata={
            "help": "What an accepted alpha must improve: 'eval_metric', or, with effopd_search 'gradient', 'loss': "
            "the very loss the search descends, so that nothing is generated beside its one batch. Recommended, with "
            "effopd_alphas 3 64 and effopd_schedule adaptive, for small learning rates."
        },
    )
    effopd_include: list[str] | None = field(
        default=None, metadata={"help": "Patterns of parameter names to move. Unset: attention and MLP weights."}
    )
    effopd_exclude: list[str] | None = field(
        default=None, metadata={"help": "Patterns of parameter names never to move. Unset: embeddings, head, norms."}
    )
    effopd_anchor_device: str = field(
        default="device",
        metadata={
            "help": "Where anchor and W_t live: 'device' (beside the weights), 'host' (pinned), 'disk' (mapped)."
        },
    )
    effopd_optimizer: str = field(
        default="keep", metadata={"help": "Optimizer state after an accepted jump: 'keep' (published) or 'reset'."}
    )
    effopd_val_size: int = field(
        default=256, metadata={"help": "Prompts that score candidates; taken from the training set unless given."}
    )
    effopd_max_val_tokens: int | None = field(
        default=None, metadata={"help": "Stop extrapolating once validation has generated this many tokens."}
    )

    def __post_init__(self):
        if not torch.accelerator.is_available():
            # TRL's and transformers' defaults are a GPU's: on a CPU bf16 is refused, pinning warned about, and without
            # use_cpu each process of a torchrun would train alone.
            self.use_cpu = True
            self.bf16 = bool(self.bf16)
            self.dataloader_pin_memory = False
        if self.report_to is None:  # of YAML; transformers looks for a tracker of that name
            self.report_to = "none"
        if self.eval_steps is not None and self.eval_strategy == "no":
            self.eval_strategy = "steps"
        self.do_eval = self.do_eval or self.eval_at_powers_of_two or self.eval_on_start
        if self.output_dir == "":  # of a variable that is not set: the current folder, to libraries
            raise UserError("--output_dir is empty: give a folder")
        if self.resume_from_checkpoint == "":
            raise UserError("--resume_from_checkpoint is empty: give a checkpoint's folder or 'latest', or none at all")
        if str(self.resume_from_checkpoint).lower() in ("false", "no"):
            self.resume_from_checkpoint = None
        if self.save_strategy == "best" and self.metric_for_best_model is None:  # else transformers refuses
            self.metric_for_best_model = self.eval_metric
        best, greater = self.metric_for_best_model, self.greater_is_better
        super().__post_init__()
        if self.metric_for_best_model is not None:  # where none was given, transformers' is the loss: not measured here
            self.metric_for_best_model = metric = (best or self.eval_metric).removeprefix("eval_")
            self.greater_is_better = metric == "accuracy" if greater is None else greater
            if metric not in EVAL_METRICS:
                raise UserError(f"--metric_for_best_model {metric!r} is not one of {', '.join(EVAL_METRICS)}")
        if not isinstance(self.effopd_alphas, (list, tuple)):  # one number in a YAML file
            self.effopd_alphas = [self.effopd_alphas]
        self._check_values()
        if self.lr_scheduler_type in ("reduce_lr_on_plateau", "greedy"):  # else of losses, whatever is evaluated
            mode = {"mode": "max" if self.greater_is_better else "min"}
            self.lr_scheduler_kwargs = mode | (self.lr_scheduler_kwargs or {})
        self._check_effopd()
        self.loss_divergence  # noqa: B018  raises on a bad name now rather than at the first loss

    def _check_values(self) -> None:
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise UserError(f"--{name} {getattr(self, name)!r} is not one of {', '.join(allowed)}")
        for name in _POSITIVE:
            value = getattr(self, name)
            if value is None and name == "effopd_max_candidates":
                continue
            if value is None or not 0 < value < math.inf:
                raise UserError(f"--{name} must be positive{' and finite' * (value == math.inf)}, got {value}")
        if self.eval_steps is not None and not self.eval_steps >= 0:
            raise UserError(f"--eval_steps must not be negative, got {self.eval_steps}")
        for name in _MAPPINGS:
            if not isinstance(value := getattr(self, name), (dict, type(None))):
                raise UserError(f"--{name} must be a mapping, in JSON where it is a flag, got {value!r}")
        _check_domains(vars(self), "--{}")
        _check_generation(self.generation_kwargs or {}, self.use_vllm)
        if self.use_liger_kernel and self.use_cpu:
            raise UserError("--use_liger_kernel needs a GPU, and this run is on the CPU")
        if self.fp16 and self.use_cpu:  # where accelerate trains in fp32, and says nothing
            raise UserError("--fp16 needs a GPU, and this run is on the CPU: leave it out, or take --bf16")
        if self.save_on_each_node:
            raise UserError("--save_on_each_node cannot be: a run's checkpoints are in one folder that all nodes share")
        defaults = {f.name: f.default for f in fields(self)}
        for name, why in _NO_EFFECT.items():
            if name in defaults and getattr(self, name) != defaults[name]:  # some versions lack one or another
                raise UserError(f"--{name} cannot be: {why}")

    def _check_effopd(self) -> None:
        if self.effopd_score == "loss" and self.effopd_search != "gradient":
            raise UserError("--effopd_score loss needs --effopd_search gradient, whose loss it is")
        if self.effopd_score == "loss" and self.effopd_acceptance == "paired":
            raise UserError(
                "--effopd_acceptance paired needs a score per prompt, and --effopd_score loss is one number: use "
                "--effopd_score eval_metric, or --effopd_acceptance mean"
            )
        parse_schedule(self.effopd_schedule)
        try:  # what the controller would refuse, once the models are loaded
            alphas_of(self._alphas, self.effopd_search)
            budget_of(self.effopd_max_val_tokens)
            acceptance_rule(self.effopd_acceptance, self.effopd_min_delta, self.effopd_confidence)
        except ValueError as e:
            raise UserError(f"--effopd_{e}") from e
        for name in ("effopd_include", "effopd_exclude"):
            try:
                compiled(f"--{name}", getattr(self, name) or [])
            except ValueError as e:
                raise UserError(str(e)) from e

    @property
    def _alphas(self) -> list[float]:
        """What the controller gets. A gradient search reads a range from them, of which nothing may be cut off."""
        return self.effopd_alphas[: self.effopd_max_candidates if self.effopd_search == "candidates" else None]

    @property
    def loss_divergence(self) -> Divergence:
        """The member of the family this run minimises."""
        return divergence_from_beta(self.beta) if self.divergence is None else parse_divergence(self.divergence)

    @property
    def validation_temperature(self) -> float:
        """Sampling temperature of validation; 0 means greedy."""
        if self.eval_temperature is not None:
            return self.eval_temperature
        return 0.0 if self.eval_metric == "accuracy" else self.temperature

    def controller_args(self) -> dict[str, Any]:
        """The `effopd_*` fields as keyword arguments of `EffOPDController`."""
        args = {
            "schedule": parse_schedule(self.effopd_schedule),
            "alphas": tuple(self._alphas),
            "min_delta": self.effopd_min_delta,
            "accept": self.effopd_acceptance,
            "confidence": self.effopd_confidence,
            "max_val_tokens": self.effopd_max_val_tokens,
            "search": self.effopd_search,
            "optimizer_policy": self.effopd_optimizer,
            "anchor_device": self.effopd_anchor_device,
        }
        if self.effopd_anchor_device == "disk":
            args["anchor_dir"] = os.path.join(self.output_dir, "effopd_anchor")
        patterns = {"include": self.effopd_include, "exclude": self.effopd_exclude}
        return args | {k: v for k, v in patterns.items() if v is not None}
