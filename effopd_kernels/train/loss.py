"""Our loss in TRL's joint: the one file that knows where TRL computes its divergence.

`trl.DistillationTrainer._compute_loss` runs both backbones and hands hidden states and heads to the module function
`_chunked_divergence_loss`. Here that method is rebuilt with the same code and one global replaced, per trainer: nothing
of TRL is patched, its reading of bias, logit scale and soft cap from the configs stays in force, and other trainers in
the process are untouched.

    use_fused_loss(trainer)     # any trl.DistillationTrainer now computes its loss with effopd_kernels
    restore_trl_loss(trainer)   # and now no longer
"""

import types
from collections.abc import Callable
from contextlib import contextmanager

import torch
from torch.distributed.tensor import DTensor
from trl import DistillationTrainer

from ..divergence import FORWARD_KL, REVERSE_KL, Divergence, DivergenceStats, jsd, linear_divergence_loss
from ..divergence.arguments import gathered

_JOINT = "_chunked_divergence_loss"


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
        mask = completion_mask.bool()
        loss, stats = linear_divergence_loss(
            student_hidden_states,
            _gathered(student_lm_head_weight, student_hidden_states),
            teacher_hidden_states,
            _gathered(teacher_lm_head_weight, teacher_hidden_states),
            divergence_from_beta(beta) if self.divergence is None else self.divergence,
            student_bias=_gathered(student_lm_head_bias, student_hidden_states),
            teacher_bias=_gathered(teacher_lm_head_bias, teacher_hidden_states),
            student_logit_scale=student_logit_scale,
            teacher_logit_scale=teacher_logit_scale,
            student_softcap=student_final_logit_softcapping,
            teacher_softcap=teacher_final_logit_softcapping,
            mask=mask,
            temperature=temperature if self.temperature is None else self.temperature,
            num_tokens=num_items_in_batch,
            return_stats=True,
        )
        if self.observer is not None:
            self.observer(stats, mask)
        return loss, stats.student_entropy.sum(), mask.sum()


def _gathered(head: torch.Tensor | None, hidden: torch.Tensor) -> torch.Tensor | None:
    """FSDP2's mixed precision keeps a sharded head in fp32 beside hidden states of its compute dtype."""
    return gathered(head).to(hidden.dtype) if isinstance(head, DTensor) else head


def use_fused_loss(trainer: DistillationTrainer, loss: FusedLoss | None = None) -> FusedLoss:
    """Make `trainer` compute its loss with effopd_kernels; returns the loss in use. Undone by `restore_trl_loss`.

    Raises:
        TypeError: `trainer` is not a `trl.DistillationTrainer`.
        RuntimeError: the installed TRL computes its loss elsewhere.
    """
    if not isinstance(trainer, DistillationTrainer):
        raise TypeError(f"use_fused_loss needs a trl.DistillationTrainer, not a {type(trainer).__name__}")
    method = getattr(type(trainer), "_compute_loss", None)
    if method is None or _JOINT not in method.__code__.co_names or _JOINT not in method.__globals__:
        import trl

        raise RuntimeError(
            f"TRL {trl.__version__} no longer computes its loss through `{_JOINT}` in "
            "`DistillationTrainer._compute_loss`; effopd_kernels was tested with TRL 1.16"
        )
    loss = FusedLoss() if loss is None else loss
    rebuilt = types.FunctionType(
        method.__code__, {**method.__globals__, _JOINT: loss}, method.__name__, method.__defaults__, method.__closure__
    )
    trainer._compute_loss = types.MethodType(rebuilt, trainer)
    return loss


def restore_trl_loss(trainer: DistillationTrainer) -> None:
    """Give `trainer` back the loss it was born with. Does nothing if it never had ours."""
    trainer.__dict__.pop("_compute_loss", None)
