"""Our loss in TRL's joint: the one file that knows where TRL computes its divergence.

`trl.DistillationTrainer._compute_loss` runs both backbones and hands hidden states and heads to the module function
`_chunked_divergence_loss`. Here that method is rebuilt with the same code and one global replaced, per trainer: nothing
of TRL is patched, its reading of bias, logit scale and soft cap from the configs stays in force, and other trainers in
the process are untouched.

    use_fused_loss(trainer)     # any trl.DistillationTrainer now computes its loss with effopd_kernels
    restore_trl_loss(trainer)   # and now no longer

Not every model's logits are softcap(scale·(hidden·weightᵀ + bias)) of what TRL reads: BERT's head has a layer more,
RecurrentGemma's cap goes by another name, Aya Vision leaves its config's scale unused. The first loss therefore looks
at both models' own logits, and where they are not what was read, it and all later ones are of those logits. So they are
where the student's head has more to train than what is read of it: an adapter on it may change nothing at first.

Nor does every model read a row alike with padding before it, of which TRL tells them by the mask alone: GPT-2 counts
positions from the first column, RWKV's state runs through the padding. The first loss looks at that, too. A model that
is mended by positions gets them from then on; with one that is not, rows that are padded are an error.
"""

import inspect
import logging
import types
from collections.abc import Callable
from contextlib import contextmanager

import torch
from accelerate.utils import gather_object, is_peft_model
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
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
from ..divergence.arguments import check_positive, gathered
from ..errors import UserError
from ..extrapolation.randomness import modes_kept

logger = logging.getLogger(__name__)

_JOINT = "_chunked_divergence_loss"
_HIDDEN = "_get_last_hidden_state"
_TOKENS = 8  # on which what TRL reads of a model is compared with its logits
_TOLERANCE = 1e-2  # of the logits' norm there: several times what rounding them to bf16 thrice makes
_ROUNDED = 0.2  # of hidden states' that bf16 rounds in every layer: rotary angles make up to 0.06, GPT-2 0.3 and more
_ALIKE, _PLACED, _CHANGED = range(3)  # what a row is with padding before it: the same, the same by positions, another


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
            _gathered(student_lm_head_weight, student_hidden_states),
            teacher_hidden_states,
            _gathered(teacher_lm_head_weight, teacher_hidden_states),
            mask=completion_mask.bool(),
            beta=beta,
            temperature=temperature,
            student_bias=_gathered(student_lm_head_bias, student_hidden_states),
            teacher_bias=_gathered(teacher_lm_head_bias, teacher_hidden_states),
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


def _gathered(head: torch.Tensor | None, hidden: torch.Tensor) -> torch.Tensor | None:
    """FSDP2's mixed precision keeps a sharded head in fp32 beside hidden states of its compute dtype."""
    return gathered(head).to(hidden.dtype) if isinstance(head, DTensor) else head


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
            f"TRL {trl.__version__} no longer computes its loss through `{_JOINT}` in "
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
    trainer._compute_loss = _Joint(trainer, method, loss)
    return loss


def _replaceable(method: types.FunctionType | None) -> bool:
    return method is not None and {_JOINT, _HIDDEN} <= {*method.__code__.co_names} and _JOINT in method.__globals__


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
    joint = trainer.__dict__.get("_compute_loss")
    if not isinstance(joint, _Joint):
        return
    del trainer._compute_loss
    trainer.__dict__.pop(_HIDDEN, None)
    if joint.replaced is not None:
        trainer._compute_loss = joint.replaced


class _Joint:
    """TRL's `_compute_loss` of a trainer, with our loss: of hidden states, or of logits where it has to be."""

    def __init__(self, trainer: DistillationTrainer, method: types.FunctionType, loss: FusedLoss):
        self.trainer, self.method, self.loss = trainer, method, loss
        self.replaced = vars(trainer).get("_compute_loss")  # which somebody else has put there
        self.hidden_states = getattr(trainer, _HIDDEN)
        self.compute: Callable | None = None
        self.whole = False  # the loss is of full logits
        self.padding = [_ALIKE, _ALIKE]  # for the student, for the teacher

    def __call__(self, student, *args):
        student = getattr(student, "_orig_mod", student)  # TRL sees no adapters within what torch.compile wraps
        # accelerate's own is in the forward that TRL goes past, and its bf16 and fp16 would be without effect
        with self.trainer.accelerator.autocast():
            return self._compute(student, *args)

    def _compute(self, unwrapped_student, inputs, num_items_in_batch):
        if self.compute is None:
            self._look(unwrapped_student, inputs)
        return self.compute(unwrapped_student, inputs, num_items_in_batch)

    def _look(self, student, inputs: dict) -> None:
        """Each rank looks at tokens of its own, and all must go on alike."""
        seen = gather_object([self._seen(student, inputs)])
        misread = list(dict.fromkeys(name for names, _ in seen for name in names))
        self.whole = bool(misread)
        self.padding = [max(of_ranks) for of_ranks in zip(*(padding for _, padding in seen), strict=True)]
        if misread and self.trainer.is_world_process_zero():
            logger.warning(
                "the loss is of full logits, which takes more memory: those of %s are not what TRL reads from head and "
                "config",
                " and ".join(misread),
            )
        if _CHANGED in self.padding:
            self._check_validation()
        if self.whole or any(self.padding):
            setattr(self.trainer, _HIDDEN, self._hidden)
        self.compute = self._with(self.loss.of_logits if self.whole else self.loss)

    def _with(self, loss: Callable) -> Callable:
        was = self.method
        names = {**was.__globals__, _JOINT: loss}
        rebuilt = types.FunctionType(was.__code__, names, was.__name__, was.__defaults__, was.__closure__)
        return types.MethodType(rebuilt, self.trainer)

    def _hidden(self, model, input_ids, attention_mask, *args, **kwargs) -> torch.Tensor:
        """Hidden states (B, K, D), or logits (B, K, V), which TRL slices as it does hidden states."""
        padding = self.padding[model is self._teacher]
        if padding == _CHANGED and not attention_mask[:, 0].all():
            raise self._padded()
        if self.whole or padding == _PLACED:
            model = _Backbone(_within_peft(model), self.whole, attention_mask if padding == _PLACED else None)
        return self.hidden_states(model, input_ids, attention_mask, *args, **kwargs)

    def _check_validation(self) -> None:
        """Its rows may be padded where those of training are not, and be found so after a long time of it."""
        for validator in getattr(self.trainer, "_validators", {}).values():
            for rows in validator.batches:
                prompt_ids, *_ = self.trainer._tokenize_prompts([validator.prompts[row] for row in rows])
                if len({*map(len, prompt_ids)}) > 1:
                    raise self._padded()

    def _padded(self) -> UserError:
        models = zip(("student", "teacher"), (self.trainer.model, self._teacher), self.padding, strict=True)
        named = (f"the {side} ({model.config.model_type})" for side, model, padding in models if padding == _CHANGED)
        return UserError(
            f"padding before a prompt changes what is computed for it by {' and '.join(named)}: give prompts of one "
            "length, or set per_device_train_batch_size, gradient_accumulation_steps and per_device_eval_batch_size to "
            "1" + " and leave pad_to_multiple_of out" * (self.trainer.pad_to_multiple_of is not None)
        )

    @property
    def _teacher(self) -> torch.nn.Module:
        return self.trainer.accelerator.unwrap_model(self.trainer.teacher_model)

    @torch.no_grad()
    def _seen(self, student, given: dict) -> tuple[list[str], list[int]]:
        """The types of the models whose logits on a few tokens are not those that TRL's reading of them gives, or will
        not be once they are trained; and what padding before these tokens does to the student and to the teacher."""
        own, misread, padding = [], [], []
        trains_more = _trains_more(_within_peft(student).get_output_embeddings())
        width = given["prompt_ids"].shape[1] + given["completion_ids"].shape[1]  # which fits the context

        def both(model, ids, mask, keep):
            model, gain = _within_peft(model), [1.0]

            def amplify(head, inputs, logits):  # up to 50, where a soft cap shows
                gain[0] = 50 / logits.abs().max()
                return logits * gain[0]

            with model.get_output_embeddings().register_forward_hook(amplify):
                logits = self.hidden_states(_Backbone(model, whole=True), ids, mask, keep)
            own.append((model.config.model_type, logits, gain[0]))
            # transformers finds no backbone in Llama 4, and calls the model its own.
            read = logits if model.base_model is model else self.hidden_states(model, ids, mask, keep)
            padding.append(self._padding(model, ids, mask, keep, pads=max(1, min(_TOKENS, width - ids.shape[1]))))
            return read

        def compare(student_hidden, teacher_hidden, student_weight, teacher_weight, mask, beta, **read):
            heads = ("student", student_hidden, student_weight), ("teacher", teacher_hidden, teacher_weight)
            for (side, hidden, weight), (name, logits, gain) in zip(heads, own, strict=True):
                rest = (read[f"{side}_{what}"] for what in ("lm_head_bias", "logit_scale", "final_logit_softcapping"))
                if not _explained(logits, gain, hidden, weight, *rest) or (side == "student" and trains_more):
                    misread.append(name)
            return (mask.sum(),) * 3

        # What the student has just written: text, whatever the prompts show.
        ids = given["completion_ids"][:1, :_TOKENS]
        inputs = {"prompt_ids": ids[:, :1], "completion_ids": ids}
        inputs |= {f"{part}_mask": torch.ones_like(inputs[f"{part}_ids"]) for part in ("prompt", "completion")}
        setattr(self.trainer, _HIDDEN, both)
        try:
            with modes_kept(student):
                student.eval()
                self._with(compare)(student, inputs, None)
        finally:
            delattr(self.trainer, _HIDDEN)
            torch.clear_autocast_cache()  # of casts without a graph, which torch 2.10 hands to training too
        return misread, padding

    def _padding(self, model, ids: torch.Tensor, mask: torch.Tensor, keep: int, pads: int) -> int:
        pad = mask.new_zeros(1, pads)
        padded = torch.cat([pad + self.trainer._tokenizer.pad_token_id, ids], 1), torch.cat([pad, mask], 1)
        whole = model.base_model is model
        exact = all(p.dtype in (torch.float32, torch.float64) for p in model.parameters())
        most = _TOLERANCE if exact and not torch.is_autocast_enabled(ids.device.type) else _ROUNDED
        alone = self.hidden_states(_Backbone(model, whole), ids, mask, keep).float()

        def differs(positions_of: torch.Tensor | None = None) -> bool:
            hidden = self.hidden_states(_Backbone(model, whole, positions_of), *padded, keep)
            # Of most tokens: rounding sends one or another to other experts. NaN is for others to report.
            share = (hidden.float() - alone).norm(dim=-1) / alone.norm(dim=-1)
            return bool(share.median() > most)

        takes = all("position_ids" in inspect.signature(m.forward).parameters for m in (model, model.base_model))
        mended = takes and not differs(padded[1])  # asked whatever the next finds: sharded models run on all ranks
        return _ALIKE if not differs() else _PLACED if mended else _CHANGED


def _explained(logits, gain, hidden, weight, bias, scale, cap) -> bool:
    if (hidden.shape[-1], logits.shape[-1]) != (weight.shape[1], weight.shape[0]):
        return False
    if (logits <= torch.finfo(logits.dtype).min / 2).any():  # tokens that the model rules out, as Chameleon does
        return False
    weight, bias = _gathered(weight, hidden), _gathered(bias, hidden)
    read = gain * scale * F.linear(hidden.to(weight.dtype), weight, bias).float()
    error = (cap * torch.tanh(read / cap) if cap else read) - logits.to(read.device)
    return not error.norm() > _TOLERANCE * logits.float().norm()  # NaN is for others to report


def _trains_more(head: torch.nn.Module) -> bool:
    """Whether a head has a trainable parameter, such as an adapter's, that is not its weight or bias and that neither
    is computed from."""
    if not hasattr(head, "bias"):
        raise UserError(
            f"the student's head is a {type(head).__name__}, of which TRL cannot read the bias: with "
            "trainable_token_indices, untie the head from the embeddings first (tie_word_embeddings=False)"
        )
    with torch.enable_grad():
        read = [t for t in (head.weight, head.bias) if t is not None]
    known, nodes = {id(t) for t in read}, [t.grad_fn for t in read]
    while nodes:
        if (node := nodes.pop()) is not None:
            known.add(id(getattr(node, "variable", None)))  # of a leaf
            nodes += [before for before, _ in node.next_functions]
    return any(p.requires_grad and id(p) not in known for p in head.parameters())


class _Backbone(torch.nn.Module):
    """Stands in for a model whose backbone TRL calls.

    Args:
        whole: its "last hidden state" is the model's logits.
        mask: (B, L), by which tokens have positions; None leaves them to the model.
    """

    def __init__(self, model: torch.nn.Module, whole: bool, mask: torch.Tensor | None = None):
        super().__init__()
        self.model, self.whole, self.mask = model, whole, mask

    def base_model(self, **inputs):
        if self.mask is not None:
            inputs["position_ids"] = (self.mask.cumsum(-1) - 1).clamp(min=0)
        if not self.whole:
            return self.model.base_model(**inputs)
        # Not the model's __call__: this runs inside the forward of what wraps it.
        return types.SimpleNamespace(last_hidden_state=self.model.forward(**inputs).logits)


def _within_peft(model: torch.nn.Module) -> torch.nn.Module:
    model = getattr(model, "_orig_mod", model)  # of a compiled teacher, whose forward has no arguments to look at
    return model.base_model.model if is_peft_model(model) else model
