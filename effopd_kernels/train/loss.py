"""Our loss in the place of TRL's: the one file that knows where TRL computes its divergence.

`trl.DistillationTrainer._compute_loss` runs both backbones and hands hidden states and heads to the module function
`_chunked_divergence_loss`. Here that method is rebuilt with the same code and one global replaced, per trainer: nothing
of TRL is patched, its reading of bias, logit scale and soft cap from the configs stays in force, and other trainers in
the process are untouched.

    use_fused_loss(trainer)     # any trl.DistillationTrainer now computes its loss with effopd_kernels
    restore_trl_loss(trainer)   # and now no longer

The first loss looks at both models (see model_reading.py). Where logits are not what TRL reads, it and all later ones
are of the models' own logits; a model that is mended by positions gets them from then on.
"""

import inspect
import logging
import types
from collections.abc import Callable
from contextlib import contextmanager

import torch
from accelerate.utils import gather_object
from trl import DistillationTrainer

from ..divergence import (
    FORWARD_KL,
    REVERSE_KL,
    Divergence,
    DivergenceStats,
    divergence_loss,
    jsd,
    linear_divergence_loss,
)
from ..divergence.arguments import check_positive
from ..errors import UserError
from .model_reading import HIDDEN_STATES, Backbone, Padding, gathered_head, look_at, put_hidden_states, within_peft

logger = logging.getLogger(__name__)

_TRL_LOSS = "_chunked_divergence_loss"


def divergence_from_beta(beta: float) -> Divergence:
    """The member of the family that TRL's `beta` means: 1 reverse KL, 0 forward KL, else generalised JSD(beta)."""
    return {1.0: REVERSE_KL, 0.0: FORWARD_KL}.get(float(beta)) or jsd(beta)


class FusedLoss:
    """Stands in for TRL's `_chunked_divergence_loss`, with its signature and return value.

    Args:
        divergence: member of the family; None reads TRL's `beta`.
        temperature: softmax temperature of the loss; None uses the one TRL passes, that of sampling.
        observer: called with `(DivergenceStats, mask)` after each loss, detached tensors (B, K) on the device.
    """

    def __init__(
        self,
        divergence: Divergence | None = None,
        temperature: float | None = None,
        observer: Callable[[DivergenceStats, torch.Tensor], None] | None = None,
    ):
        if not isinstance(divergence, (Divergence, types.NoneType)):
            raise TypeError(f"divergence must be a Divergence, such as REVERSE_KL, or None, got {divergence!r}")
        if temperature is not None:
            check_positive(temperature=temperature)
        if observer is not None and not callable(observer):
            raise TypeError(f"observer must be callable or None, got {observer!r}")
        self.divergence = divergence
        self.temperature = temperature
        self.observer = observer

    @contextmanager
    def measuring(self, observer: Callable[[DivergenceStats, torch.Tensor], None]):
        """Reverse KL at temperature 1, seen by `observer`: the teacher KL of validation, whatever is trained on."""
        saved = self.divergence, self.temperature, self.observer
        self.divergence, self.temperature, self.observer = REVERSE_KL, 1.0, observer
        try:
            yield
        finally:
            self.divergence, self.temperature, self.observer = saved

    def __call__(
        self,
        student_hidden_states: torch.Tensor,  # (B, K, D_s)
        teacher_hidden_states: torch.Tensor,  # (B, K, D_t)
        student_lm_head_weight: torch.Tensor,  # (V_s, D_s)
        teacher_lm_head_weight: torch.Tensor,  # (V_t, D_t)
        completion_mask: torch.Tensor,  # (B, K)
        beta: float,
        num_items_in_batch: torch.Tensor | int | None = None,
        student_lm_head_bias: torch.Tensor | None = None,
        teacher_lm_head_bias: torch.Tensor | None = None,
        student_logit_scale: float = 1.0,
        teacher_logit_scale: float = 1.0,
        student_final_logit_softcapping: float | None = None,
        teacher_final_logit_softcapping: float | None = None,
        temperature: float = 1.0,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Returns (loss, sum of the student's entropy over valid tokens in nats, number of valid tokens)."""
        return self._of(
            linear_divergence_loss,
            student_hidden_states,
            gathered_head(student_lm_head_weight, student_hidden_states),
            teacher_hidden_states,
            gathered_head(teacher_lm_head_weight, teacher_hidden_states),
            mask=completion_mask.bool(),
            beta=beta,
            temperature=temperature,
            student_bias=gathered_head(student_lm_head_bias, student_hidden_states),
            teacher_bias=gathered_head(teacher_lm_head_bias, teacher_hidden_states),
            student_logit_scale=student_logit_scale,
            teacher_logit_scale=teacher_logit_scale,
            student_softcap=student_final_logit_softcapping,
            teacher_softcap=teacher_final_logit_softcapping,
            num_tokens=num_items_in_batch,
        )

    def of_logits(
        self,
        student_logits: torch.Tensor,  # (B, K, V_s)
        teacher_logits: torch.Tensor,  # (B, K, V_t)
        student_lm_head_weight: torch.Tensor,
        teacher_lm_head_weight: torch.Tensor,
        completion_mask: torch.Tensor,  # (B, K)
        beta: float,
        num_items_in_batch: torch.Tensor | int | None = None,
        temperature: float = 1.0,
        **_unused,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """As a call, of logits where TRL hands hidden states over; everything about the heads is in them already."""
        mask, num_tokens = completion_mask.bool(), num_items_in_batch
        return self._of(
            divergence_loss, student_logits, teacher_logits, mask=mask, beta=beta, temperature=temperature,
            num_tokens=num_tokens,
        )  # fmt: skip

    def _of(self, loss_fn, *tensors, mask, beta, temperature, **options):
        divergence = divergence_from_beta(beta) if self.divergence is None else self.divergence
        temperature = temperature if self.temperature is None else self.temperature
        loss, stats = loss_fn(*tensors, divergence, mask=mask, temperature=temperature, return_stats=True, **options)
        if self.observer is not None:
            self.observer(stats, mask)
        return loss, stats.student_entropy.sum(), mask.sum()


def use_fused_loss(trainer: DistillationTrainer, loss: FusedLoss | None = None) -> FusedLoss:
    """Make `trainer` compute its loss with effopd_kernels; returns the loss in use. Undone by `restore_trl_loss`.

    Raises:
        TypeError: `trainer` is not a `trl.DistillationTrainer`, or of a subclass that overrides `_compute_loss`.
        RuntimeError: the installed TRL computes its loss elsewhere.
    """
    if not isinstance(trainer, DistillationTrainer):
        raise TypeError(f"use_fused_loss needs a trl.DistillationTrainer, not a {type(trainer).__name__}")
    if not _replaceable(getattr(DistillationTrainer, "_compute_loss", None)):
        import trl

        raise RuntimeError(
            f"TRL {trl.__version__} no longer computes its loss through `{_TRL_LOSS}` in "
            "`DistillationTrainer._compute_loss`; effopd_kernels was tested with TRL 1.16"
        )
    method = type(trainer)._compute_loss
    if not _replaceable(method):
        raise TypeError(
            f"{type(trainer).__name__} overrides `_compute_loss`, in whose place use_fused_loss puts its own: override "
            "`compute_loss`, which calls it, instead"
        )
    if not _called_by_compute_loss(type(trainer)):
        logger.warning(  # no error: it may call it by another way than its name, as through a decorator
            "%s.compute_loss does not seem to call `_compute_loss`, in whose place use_fused_loss puts its own: "
            "the loss may stay what it was",
            type(trainer).__name__,
        )
    restore_trl_loss(trainer)
    loss = FusedLoss() if loss is None else loss
    trainer._compute_loss = _ComputeLoss(trainer, method, loss)
    return loss


def _replaceable(method: types.FunctionType | None) -> bool:
    return (
        method is not None
        and {_TRL_LOSS, HIDDEN_STATES} <= {*method.__code__.co_names}
        and _TRL_LOSS in method.__globals__
    )


def _called_by_compute_loss(cls: type) -> bool:
    """Whether `compute_loss` names `_compute_loss`, or an override of it the one that it overrides, which does."""
    for owner in cls.__mro__:
        if "compute_loss" in vars(owner):
            code = getattr(inspect.unwrap(vars(owner)["compute_loss"]), "__code__", None)
            names = code.co_names if code else ("_compute_loss",)  # a partialmethod: for all that can be seen
            if "compute_loss" not in names:
                return "_compute_loss" in names
    return False


def restore_trl_loss(trainer: DistillationTrainer) -> None:
    """Give `trainer` back the loss it had. Does nothing if it has not ours."""
    ours = trainer.__dict__.get("_compute_loss")
    if not isinstance(ours, _ComputeLoss):
        return
    del trainer._compute_loss
    if trainer.__dict__.get(HIDDEN_STATES) == ours._last_hidden_state:
        put_hidden_states(trainer, ours.override)
    if ours.replaced is not None:
        trainer._compute_loss = ours.replaced


class _ComputeLoss:
    """TRL's `_compute_loss` of a trainer, with our loss: of hidden states, or of logits where it has to be."""

    def __init__(self, trainer: DistillationTrainer, method: types.FunctionType, loss: FusedLoss):
        self.trainer, self.method, self.loss = trainer, method, loss
        self.replaced = vars(trainer).get("_compute_loss")  # which somebody else has put there
        self.hidden_states = self.override = None  # TRL's method, and what somebody else has put in its place
        self.compute: Callable | None = None
        self.full_logits = False
        self.padding = [Padding.IGNORED, Padding.IGNORED]  # for the student, for the teacher

    def __call__(self, student, inputs, num_items_in_batch):
        student = getattr(student, "_orig_mod", student)  # TRL sees no adapters within what torch.compile wraps
        # accelerate's own is in the forward that TRL goes past, and its bf16 and fp16 would be without effect
        with self.trainer.accelerator.autocast():
            if self.compute is None:
                self._look_at_models(student, inputs)
            return self.compute(student, inputs, num_items_in_batch)

    def _look_at_models(self, student, inputs: dict) -> None:
        """Each rank looks at tokens of its own, and all must go on alike."""
        self.hidden_states, self.override = getattr(self.trainer, HIDDEN_STATES), vars(self.trainer).get(HIDDEN_STATES)
        seen = gather_object([look_at(student, inputs, self.trainer, self.hidden_states, self._rebuilt_with)])
        misread = list(dict.fromkeys(name for names, _ in seen for name in names))
        self.full_logits = bool(misread)
        self.padding = [max(of_ranks) for of_ranks in zip(*(padding for _, padding in seen), strict=True)]
        if misread and self.trainer.is_world_process_zero():
            logger.warning(
                "the loss is of full logits, which takes more memory: those of %s are not what TRL reads from head and "
                "config",
                " and ".join(misread),
            )
        if Padding.READ in self.padding:
            self._check_validation()
        if self.full_logits or any(self.padding):
            put_hidden_states(self.trainer, self._last_hidden_state)
        self.compute = self._rebuilt_with(self.loss.of_logits if self.full_logits else self.loss)

    def _rebuilt_with(self, loss: Callable) -> Callable:
        """TRL's method with another function in the place of its loss."""
        was = self.method
        names = {**was.__globals__, _TRL_LOSS: loss}
        rebuilt = types.FunctionType(was.__code__, names, was.__name__, was.__defaults__, was.__closure__)
        return types.MethodType(rebuilt, self.trainer)

    def _last_hidden_state(self, model, input_ids, attention_mask, *args, **kwargs) -> torch.Tensor:
        """Hidden states (B, K, D), or logits (B, K, V), which TRL slices as it does hidden states."""
        padding = self.padding[model is self._teacher]
        if padding == Padding.READ and not attention_mask[:, 0].all():
            raise self._padding_refused()
        if self.full_logits or padding == Padding.NEEDS_POSITIONS:
            positions_by = attention_mask if padding == Padding.NEEDS_POSITIONS else None
            model = Backbone(within_peft(model), self.full_logits, positions_by)
        return self.hidden_states(model, input_ids, attention_mask, *args, **kwargs)

    def _check_validation(self) -> None:
        """Its rows may be padded where those of training are not, and be found so after a long time of it."""
        for validator in getattr(self.trainer, "_validators", {}).values():
            for rows in validator.batches:
                prompt_ids, *_ = self.trainer._tokenize_prompts([validator.prompts[row] for row in rows])
                if len({*map(len, prompt_ids)}) > 1:
                    raise self._padding_refused()

    def _padding_refused(self) -> UserError:
        models = zip(("student", "teacher"), (self.trainer.model, self._teacher), self.padding, strict=True)
        named = (f"the {side} ({m.config.model_type})" for side, m, padding in models if padding == Padding.READ)
        return UserError(
            f"padding before a prompt changes what is computed for it by {' and '.join(named)}: give prompts of one "
            "length, or set per_device_train_batch_size, gradient_accumulation_steps and per_device_eval_batch_size to "
            "1" + " and leave pad_to_multiple_of out" * (self.trainer.pad_to_multiple_of is not None)
        )

    @property
    def _teacher(self) -> torch.nn.Module:
        return self.trainer.accelerator.unwrap_model(self.trainer.teacher_model)
