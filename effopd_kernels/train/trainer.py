"""The thin trainer: `trl.DistillationTrainer` with our loss, validation that EffOPD can act on, and safe stops.

Rollouts, chat templates, LoRA, accumulation, mixed precision, sharding, checkpoints and trackers are TRL's,
transformers' and accelerate's; nothing of them is written again here. What this leans on beyond their documented
interfaces is in private_api.py.
"""

import json
import logging
import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import trl
from accelerate.utils import is_peft_model
from datasets import Dataset
from transformers import AutoProcessor, PreTrainedModel, Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import rotate_checkpoints
from trl.models import prepare_deepspeed
from trl.trainer.utils import RepeatSampler

from ..commands import written
from ..divergence import REVERSE_KL, DivergenceStats
from ..errors import UserError
from ..extrapolation import Scores
from .callback import EffOPDCallback
from .checkpoint import STAGING, checkpoint_name, newest_intact, publish, remove, saved_steps, unpublished
from .checkpoint_weights import check_adapter, load_renamed, load_trained_adapter
from .config import OPDConfig
from .data import check_prompts, require_answers
from .errors import NonFiniteLossError, as_user_error
from .ledger import Ledger
from .loading import load_student, load_teacher
from .loss import FusedLoss, use_fused_loss
from .output_dir import check_shared, sole_run
from .private_api import check_private_api
from .settings import check_settings, compare_noted, note, write_settings
from .stopping import EvaluationDue, Interrupts, StepGuard
from .student import disable_dropout, dropout_told, finite_logits, input_hooks_kept
from .tokenizing import check_open
from .validation import TeacherLoss, Validator, evaluating

logger = logging.getLogger(__name__)
LEDGER_NAME = "ledger.json"  # inside each checkpoint folder
_OF_OPTIONS = ValueError, TypeError, ImportError  # what an optimizer's and a schedule's options make libraries raise


class EpochSampler(RepeatSampler):
    """TRL's sampler with the order of an epoch a function of (seed, epoch), so that resuming in epoch 2 is exact."""

    def __init__(self, sampler: RepeatSampler, epoch: Callable[[], int]):
        vars(self).update(vars(sampler), epoch=epoch)

    def __iter__(self):
        if self.shuffle:
            self.generator.manual_seed(self.seed + self.epoch())
        yield from super().__iter__()


class OPDTrainer(trl.DistillationTrainer):
    """On-policy distillation with the fused loss and EffOPD.

    Args:
        model, teacher_model: model, folder or hub id. Width, depth, dtype and padded vocabulary length may differ; the
            divergence is taken over the shared prefix of the vocabularies.
        args: `OPDConfig`.
        train_dataset: column `prompt` (str or messages).
        eval_dataset: held-out prompts, evaluated at `eval_steps`; logged as `eval_accuracy` and `eval_teacher_kl`. Of a
            dict of datasets each is, as `eval_NAME_accuracy` and so on.
        val_dataset: prompts that score EffOPD's candidates, needed unless `effopd_enabled` is False; must differ from
            `eval_dataset` for its curve to be honest.
        others: as `trl.DistillationTrainer`.

    Raises:
        UserError: see `OPDConfig` and `EffOPDCallback`; datasets that are empty or lack a column; weights
            that lack tensors of their model, which transformers would draw at random; an output folder that not all
            ranks share; when training begins, one that another run is writing to, options that no optimizer or schedule
            can be made with, or a generation_config.json that cannot be saved again; a checkpoint to resume from that
            is another model's, or of a run with another seed, learning rate or other setting that a run keeps to its
            end.
        NonFiniteLossError: during training; weights are those of the last completed step.
    """

    _tag_names = ("trl", "distillation", "effopd")

    def __init__(
        self,
        model: "str | PreTrainedModel",
        teacher_model: "str | PreTrainedModel",
        args: OPDConfig,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        val_dataset: Dataset | None = None,
        **kwargs,
    ):
        if not isinstance(args, OPDConfig):
            raise UserError(f"OPDTrainer needs args, an OPDConfig, got {args if args is None else type(args).__name__}")
        if teacher_model is None:
            raise UserError("OPDTrainer needs teacher_model: a model, a folder or a hub id")
        prompts = _checked(train_dataset, eval_dataset, val_dataset, args)
        check_shared(Path(args.output_dir))
        if isinstance(teacher_model, str):
            teacher_model = load_teacher(teacher_model, args)
        given = args.model_init_kwargs
        if isinstance(model, str):  # TRL would load it without a look at what its files lack
            if kwargs.get("processing_class") is None:
                sides = {"truncation_side": "left", "padding_side": "left"}
                sides |= {"revision": (given or {}).get("revision"), "trust_remote_code": args.trust_remote_code}
                kwargs["processing_class"] = AutoProcessor.from_pretrained(model, **sides)
            model = load_student(model, args, kwargs.pop("quantization_config", None))
            args.model_init_kwargs = None  # or it warns that they are ignored
        try:
            # It insists on equal vocab_size if it is handed a teacher; the loss does not, so the teacher is set after.
            super().__init__(model, None, args, train_dataset=train_dataset, eval_dataset=eval_dataset, **kwargs)
        finally:
            args.model_init_kwargs = given
        check_private_api(self)
        for where, dataset in prompts.items():
            check_open(dataset, self._tokenizer, where)
        self._dropout = disable_dropout(self.model) if args.disable_dropout else []
        self._restrict_sampling(teacher_model)
        if self.is_deepspeed_enabled:
            self.teacher_model = prepare_deepspeed(teacher_model, self.accelerator)
        else:
            self.teacher_model = self.accelerator.prepare_model(teacher_model, evaluation_mode=True)

        self._observed: list[torch.Tensor] = []
        self._step_sums = [0.0, 0]  # the divergence and the tokens of the micro-batches of this step
        self.fused_loss = use_fused_loss(
            self, FusedLoss(args.loss_divergence, args.loss_temperature, observer=self._observe)
        )
        self.ledger = Ledger()
        self._last_inputs: dict | None = None  # of the last micro-batch
        self._scored: int | None = None  # the step of the last event that was scored
        self.interrupts = Interrupts(immediate=self.accelerator.num_processes == 1)
        self.guard = StepGuard(self)
        self.add_callback(self.guard)
        self._staging: Path | None = None
        self.effopd: EffOPDCallback | None = None
        self._validators: dict[str, Validator] = {}
        self._add_validation(eval_dataset, val_dataset)
        self.add_callback(EvaluationDue(self))  # after the event of its step

    def _restrict_sampling(self, teacher_model: PreTrainedModel) -> None:
        """To what training reads: one sequence of a prompt, in ids that the teacher knows."""
        # Of what training does not set, transformers takes the student's own, whose completions TRL does not know.
        self.generation_kwargs.setdefault("num_beams", 1)
        self.generation_config.num_beams = self.generation_kwargs["num_beams"]
        # Ids beyond the teacher's embeddings are outside the prefix that the loss compares, and the teacher could not
        # read them: they are never sampled.
        if beyond := range(_vocab_size(teacher_model), _vocab_size(self.model)):
            suppressed = [*(self.generation_kwargs.get("suppress_tokens") or ()), *beyond]
            self.generation_kwargs["suppress_tokens"] = self.generation_config.suppress_tokens = suppressed

    def _add_validation(self, eval_dataset: Dataset | dict[str, Dataset] | None, val_dataset: Dataset | None) -> None:
        """A validator of each set, and EffOPD with that of its candidates."""
        args = self.args
        for where, dataset in _named(eval_dataset).items():
            self._validators[where.removesuffix("_dataset")] = self._evaluator(dataset)
        if args.effopd_enabled:
            scored = args.effopd_score == "eval_metric"
            if scored and args.eval_metric == "accuracy":
                require_answers(val_dataset, "val_dataset", val_dataset.column_names)
            self._validators["val"] = Validator(self, val_dataset, (args.eval_metric,) * scored)
            self.effopd = EffOPDCallback(
                self._score if scored else None,
                log=self.log,
                on_weights_changed=self._weights_changed,
                loss_fn=TeacherLoss(self._validators["val"]) if args.effopd_search == "gradient" else None,
                **args.controller_args(),
            )
            self.add_callback(self.effopd)

    # ---- the loss -----------------------------------------------------------------------------------------------

    def _observe(self, stats, mask) -> None:
        sums = [stats.divergence.sum(), stats.teacher_entropy.sum(), mask.sum()]
        self._observed = [torch.stack([s.float() for s in sums])]

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        self._last_inputs = inputs
        output = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        # One small gather beside TRL's own for the entropy; every rank sees the same numbers and stops together.
        divergence, teacher_entropy, tokens = self.accelerator.gather(self._observed.pop()[None]).sum(0).tolist()
        step = self.state.global_step + 1
        if not math.isfinite(teacher_entropy):
            raise NonFiniteLossError(f"the teacher's logits are not finite at step {step}; nothing was updated in it")
        if not math.isfinite(divergence):
            why = self._why_diverged(step)
            raise NonFiniteLossError(f"the loss is not finite at step {step}; nothing was updated in it{why}")
        self._step_sums = [self._step_sums[0] + divergence, self._step_sums[1] + tokens]
        if self.accelerator.sync_gradients:  # a step's mean is over its tokens, like its loss, not over micro-batches
            divergence, tokens = self._step_sums
            self._step_sums = [0.0, 0]
            if tokens:
                is_kl = self.args.loss_divergence == REVERSE_KL and self.args.loss_temperature == 1
                self._metrics["train"]["teacher_kl" if is_kl else "divergence"].append(divergence / tokens)
        return output

    def reverse_kl(self, inputs: dict) -> tuple[torch.Tensor, DivergenceStats, torch.Tensor]:
        """KL(student ‖ teacher) of a micro-batch: its mean over the completion tokens, differentiable unless gradients
        are off, and what `FusedLoss` tells an observer."""
        student, seen = self.accelerator.unwrap_model(self.model_wrapped), []
        with self.fused_loss.measuring(lambda *told: seen.append(told)), self.compute_loss_context_manager():
            loss, *_ = self._forward_redirection(self.model_wrapped, student, self._compute_loss, student, inputs, None)
        ((stats, mask),) = seen
        return loss, stats, mask

    def _check_last_update(self) -> None:
        """The next step's loss shows whether an update left finite weights. The last update has no next step, so its
        micro-batch is evaluated once more before the student is saved."""
        inputs, self._last_inputs = self._last_inputs, None
        if inputs is None:
            return
        with self.ledger.off_the_clock(), torch.no_grad(), evaluating(self.model):
            _, stats, _ = self.reverse_kl(inputs)
        if not self.accelerator.gather(stats.divergence.sum().float()).sum().isfinite():
            step = self.state.global_step
            raise NonFiniteLossError(f"the loss is not finite after step {step}{self._why_diverged(step + 1)}")

    def _why_diverged(self, step: int) -> str:
        """What to add where a student is found that does not compute finite numbers, at the beginning of a step: the
        loss of the step before was finite, so that step's update is the last that can have broken it."""
        if step == 1:
            return ""
        before = [s for s in saved_steps(Path(self.args.output_dir)) if s <= step - 2]
        return "; the updates before it drove the student's logits out of range: try a lower learning_rate" + (
            f" ('{checkpoint_name(before[-1])}' is the newest whose loss was finite)" if before else ""
        )

    # ---- rollouts and data --------------------------------------------------------------------------------------

    def _get_train_sampler(self, dataset=None):
        sampler = super()._get_train_sampler(dataset)
        if sampler.num_samples < sampler.batch_size:  # transformers would train no step, and call it done
            raise UserError(
                f"a step takes {sampler.batch_size} prompts (per_device_train_batch_size × gradient_accumulation_steps "
                f"× processes), the training set has {sampler.num_samples}"
            )
        return EpochSampler(sampler, epoch=lambda: int(self.state.epoch or 0))

    def _generate_single_turn(self, *args, **kwargs):
        student = self.accelerator.unwrap_model(self.model_wrapped)
        with finite_logits(student), input_hooks_kept(student):
            return super()._generate_single_turn(*args, **kwargs)

    def _generate(self, prompts: list):
        start = time.perf_counter()
        output = super()._generate(prompts)
        completion_ids = output[1]
        local = torch.tensor(sum(map(len, completion_ids)), device=self.accelerator.device)
        self.ledger.train_tokens += int(self.accelerator.reduce(local, "sum"))
        self._metrics["train"]["timing_s/rollout"].append(time.perf_counter() - start)
        return output

    # ---- validation ---------------------------------------------------------------------------------------------

    def _evaluator(self, dataset: Dataset) -> Validator:
        """Of accuracy where there are answers, all of them where it is what is asked for."""
        answers = "answer" in dataset.column_names
        if answers and self.args.eval_metric == "accuracy":
            require_answers(dataset, "eval_dataset", dataset.column_names)
        answers = answers and None not in dataset["answer"]
        return Validator(self, dataset, ("accuracy",) * answers + ("teacher_kl",))

    def _score(self) -> Scores:
        """The current weights' score on this rank's share of the prompts; the controller merges the ranks'."""
        start = time.perf_counter()
        graded = self._validators["val"].share()  # may be empty on a rank
        values = [correct if self.args.eval_metric == "accuracy" else -kl for _, _, correct, kl in graded]
        step, first = self.state.global_step, self._scored != self.state.global_step
        self._scored = step
        if first and not all(map(math.isfinite, values)):  # an event's first are W_t's; a candidate is only refused
            why = self._why_diverged(step + 1)
            raise NonFiniteLossError(f"the student's score is not finite after step {step}{why}")
        return Scores(values, sum(tokens for _, tokens, _, _ in graded), time.perf_counter() - start)

    def _costs(self) -> dict[str, float]:
        val_tokens = self.effopd.controller.val_tokens if self.effopd and self.effopd.controller else 0
        return {"train_tokens": self.ledger.train_tokens, "val_tokens": val_tokens, "seconds": self.ledger.seconds}

    def _weights_changed(self) -> None:
        """vLLM holds a copy of the weights and syncs it when the step changes: make it look again."""
        self._last_loaded_step = -1

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Held-out accuracy and teacher KL on the student's own completions, logged with what the run has cost so far.

        Returns:
            `{prefix}_accuracy` (when there are answers), `{prefix}_teacher_kl` (nats per token), `train_tokens`,
            `val_tokens`, `seconds`, `timing_s/evaluation`. Of a dict of datasets, all of them by `{prefix}_NAME`.

        Raises:
            UserError: no prompts, here or at construction.
            NonFiniteLossError: the student or the teacher does not compute finite numbers.
        """
        given = self.eval_dataset if eval_dataset is None else eval_dataset
        if given is None:
            raise UserError("nothing to evaluate on: pass eval_dataset to evaluate() or to OPDTrainer")
        if isinstance(given, str) and isinstance(self.eval_dataset, dict) and given in self.eval_dataset:
            given = self.eval_dataset[given]
        if isinstance(given, dict):
            each = (self.evaluate(d, ignore_keys, f"{metric_key_prefix}_{name}") for name, d in given.items())
            return {metric: value for metrics in each for metric, value in metrics.items()}
        validator = self._validators.get("eval")
        if validator is None or given is not self.eval_dataset:
            check_prompts(given, "eval_dataset")
            validator = self._evaluator(given)
        with self.ledger.off_the_clock():
            result = validator()
        step = self.state.global_step
        if not math.isfinite(result.mean("teacher_kl")):
            why = self._why_diverged(step + 1)
            raise NonFiniteLossError(f"the KL to the teacher on held-out prompts is not finite after step {step}{why}")
        metrics = {f"{metric_key_prefix}_{name}": result.mean(name) for name in validator.metrics}
        metrics |= self._costs() | {"timing_s/evaluation": result.seconds}
        Trainer.log(self, dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    # ---- stopping and resuming ----------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs):
        """`transformers.Trainer.train`. On Ctrl-C (SIGINT, SIGTERM) a checkpoint of the last completed step is written
        and KeyboardInterrupt raised; with several processes, at the end of the step in which any of them was told."""
        with sole_run(Path(self.args.output_dir)):
            return self._train(resume_from_checkpoint, **kwargs)

    def _train(self, resume_from_checkpoint: str | bool | None, **kwargs):
        if resume_from_checkpoint is True:
            resume_from_checkpoint = str(newest_intact(Path(self.args.output_dir)))
        if resume_from_checkpoint:
            check_settings(Path(resume_from_checkpoint), self.args)
            if self.is_world_process_zero():
                compare_noted(Path(resume_from_checkpoint), self._noted())
        if self.is_world_process_zero():
            for abandoned in unpublished(Path(self.args.output_dir)):
                remove(abandoned)
        self._forget_unfinished_step()
        self.args.resume_from_checkpoint = resume_from_checkpoint or None  # where callbacks find their state
        if resume_from_checkpoint and (ledger := Path(resume_from_checkpoint) / LEDGER_NAME).is_file():
            self.ledger.load_state_dict(json.loads(ledger.read_text()))
        on_start = self.args.eval_on_start
        self.args.eval_on_start = on_start and not resume_from_checkpoint  # a resumed run's start is behind it
        with self.interrupts.installed():
            self.ledger.start()
            try:
                output = super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
            except KeyboardInterrupt:
                self._save_last_step()
                raise
            finally:
                self.args.eval_on_start = on_start
            if self.guard.anyone_told():
                raise KeyboardInterrupt
            self._check_last_update()
            return output

    def _noted(self) -> dict[str, str]:
        held_out = {where: v for where, v in self._validators.items() if where != "val"}  # those of a dict by argument
        prompts = {"eval_dataset" if where == "eval" else where: v.prompts for where, v in held_out.items()}
        return note(self.accelerator.unwrap_model(self.teacher_model), prompts)

    def _forget_unfinished_step(self) -> None:
        """An earlier `train` may have been interrupted between two micro-batches; TRL would go on with its rollouts."""
        self._step_sums, self._scored, self._last_inputs = [0.0, 0], None, None
        self._step, self._buffered_inputs, self._current_train_step_time = 0, None, 0.0
        self._metrics["train"].clear()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.args.resume_from_checkpoint:  # transformers' mean over the steps since then, not over the run
            logs = {name: value for name, value in logs.items() if name != "train_loss"}
        super().log(logs, start_time)

    def create_optimizer(self, *args, **kwargs):
        self._check_generation_config()  # nothing is trained yet, and transformers has made its tokens the tokenizer's
        if any(p.dtype == torch.float16 for p in self.model.parameters() if p.requires_grad):
            logger.warning(
                "the student's weights are float16, in which small gradients, their squares and Adam's epsilon are 0: "
                "load it as float32 or bfloat16 (--dtype)"
            )
        with as_user_error("the optimizer cannot be made with the options given", *_OF_OPTIONS):
            return super().create_optimizer(*args, **kwargs)

    def _check_generation_config(self) -> None:
        """Saving checks one that is no longer as it was loaded more strictly than loading did, in the middle of a run.
        An adapter is saved without."""
        if not is_peft_model(self.model):
            what = "the student could not be saved with its generation_config.json; mend that first"
            with TemporaryDirectory() as folder, as_user_error(what, ValueError):
                self.model.generation_config.save_pretrained(folder)

    def create_scheduler(self, *args, **kwargs):
        with as_user_error("the learning rate schedule cannot be made with the options given", *_OF_OPTIONS):
            return super().create_scheduler(*args, **kwargs)

    def _run_epoch(self, *args, **kwargs):
        """Resumed at its end, a run is over: transformers would train one step more before it looks. Several processes
        that are told to stop in the last step's event or an epoch's evaluation have no other step to stop at."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)
        if self.guard.anyone_told():
            self.control.should_training_stop = True
            if self.guard.saved != self.state.global_step:  # with save_strategy="best" an evaluation decides
                self._save_checkpoint(self.model_wrapped, kwargs.get("trial"))
                self.control = self.callback_handler.on_save(self.args, self.state, self.control)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        student = self.model if model is None else model
        check_adapter(resume_from_checkpoint, student)
        with _fitting(resume_from_checkpoint):
            if self._load_renamed(student, resume_from_checkpoint):
                return
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            load_trained_adapter(student, Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        if not self._load_renamed(self.model, self.state.best_model_checkpoint):
            super()._load_best_model()

    def _load_renamed(self, model: torch.nn.Module, folder: str) -> bool:
        whole = isinstance(model, PreTrainedModel) and not (self.is_fsdp_enabled or self.is_deepspeed_enabled)
        return whole and load_renamed(model, folder)

    def _load_optimizer_and_scheduler(self, checkpoint):
        with _fitting(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _save_last_step(self) -> None:
        """A checkpoint as it would have been at the end of the last completed step, random state included."""
        if self.optimizer is None or self.guard.random_state is None:
            return  # interrupted before training began: nothing has been learnt
        if self.args.resume_from_checkpoint and self.guard.step == self.guard.first:
            return  # nor since it was resumed, and transformers may not have read the checkpoint's random state yet
        self.guard.restore()
        self.state.global_step = self.guard.step
        self._save_checkpoint(self.model_wrapped, trial=None)
        self.control = self.callback_handler.on_save(self.args, self.state, self.control)

    def _get_output_dir(self, trial) -> str:
        return str(self._staging) if self._staging is not None else super()._get_output_dir(trial)

    def save_model(self, *args, **kwargs) -> None:
        """As transformers' Trainer; config.json has the dropout that the student came with."""
        with dropout_told(self._dropout):
            super().save_model(*args, **kwargs)

    def _save_checkpoint(self, model, trial) -> None:
        """As transformers writes it, with EffOPD's state and the ledger, published when complete. One that the disk
        has no room for leaves it what it had taken, and the checkpoints before it as they are."""
        if self.state.global_step >= self.state.max_steps:
            self._check_last_update()
        run_dir = Path(super()._get_output_dir(trial))
        staging = run_dir / f"{STAGING}{self.state.global_step}"
        try:
            with written(run_dir), self.ledger.off_the_clock():
                self._write_checkpoint(model, trial, run_dir, staging)
        except UserError:
            shutil.rmtree(staging, ignore_errors=True)
            raise

    def _write_checkpoint(self, model, trial, run_dir: Path, staging: Path) -> None:
        name = checkpoint_name(self.state.global_step)
        self._staging = staging
        staged = staging / name
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._staging = None
        if self.effopd is not None:
            self.effopd.save(staged, self.state.global_step)
        best = checkpoint_name(self.state.best_global_step)
        if best == name or (run_dir / best).is_dir():  # super() looked for it in the staging folder
            self.state.best_model_checkpoint = str(run_dir / best)
        if self.args.should_save:
            (staged / LEDGER_NAME).write_text(json.dumps(self.ledger.state_dict()))
            write_settings(staged, self.args, self._noted())
            self.state.save_to_json(str(staged / TRAINER_STATE_NAME))
        self.accelerator.wait_for_everyone()
        if self.is_world_process_zero():
            publish(staged, run_dir / name)
            shutil.rmtree(staged.parent)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            rotate_checkpoints(
                output_dir=str(run_dir),
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=False,
            )


def _checked(train_dataset, eval_dataset, val_dataset, args: OPDConfig) -> dict[str, Dataset]:
    """The sets that there are, by the name of the argument."""
    given = {"train_dataset": train_dataset, "val_dataset": val_dataset}
    given = {where: dataset for where, dataset in given.items() if dataset is not None} | _named(eval_dataset)
    for where, dataset in given.items():
        check_prompts(dataset, where)
    if isinstance(eval_dataset, dict) and args.metric_for_best_model is not None:
        raise UserError("metric_for_best_model (and load_best_model_at_end) needs one eval_dataset, got a dict of them")
    if args.effopd_enabled and val_dataset is None:
        raise UserError("effopd_enabled needs val_dataset, the prompts that score candidates; False is plain OPD")
    return given


def _named(eval_dataset: Dataset | dict[str, Dataset] | None) -> dict[str, Dataset]:
    if isinstance(eval_dataset, dict):
        return {f"eval_dataset['{name}']": dataset for name, dataset in eval_dataset.items()}
    return {} if eval_dataset is None else {"eval_dataset": eval_dataset}


def _fitting(checkpoint: str | None):
    what = f"checkpoint '{checkpoint}' was made with another model or other settings"
    return as_user_error(what, RuntimeError, ValueError)


def _vocab_size(model: PreTrainedModel) -> int:
    return model.config.get_text_config().vocab_size
