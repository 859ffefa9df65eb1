"""Whether a model is what TRL reads of it, found out on a few tokens at the first loss.

Not every model's logits are softcap(scale·(hidden·weightᵀ + bias)) of what TRL reads: BERT's head has a layer more,
RecurrentGemma's cap goes by another name, Aya Vision leaves its config's scale unused. The first loss therefore looks
at both models' own logits, and where they are not what was read, it and all later ones are of those logits. So they are
where the student's head has more to train than what is read of it: an adapter on it may change nothing at first.

Nor does every model read a row alike with padding before it, of which TRL tells them by the mask alone: GPT-2 counts
positions from the first column, RWKV's state runs through the padding. The first loss looks at that, too. A model that
is mended by positions gets them from then on; with one that is not, rows that are padded are an error.
"""

import inspect
import types
from collections.abc import Callable
from enum import IntEnum

import torch
from accelerate.utils import is_peft_model
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from trl import DistillationTrainer

from ..divergence.arguments import gathered
from ..errors import UserError
from ..extrapolation.randomness import modes_kept

HIDDEN_STATES = "_get_last_hidden_state"  # TRL's method of a trainer
_TOKENS = 8  # on which what TRL reads of a model is compared with its logits
_TOLERANCE = 1e-2  # of the logits' norm there: several times what rounding them to bf16 thrice makes
_ROUNDED = 0.2  # of hidden states' that bf16 rounds in every layer: rotary angles make up to 0.06, GPT-2 0.3 and more


class Padding(IntEnum):
    """What padding before a row is to a model; where ranks find different ones, the last counts."""

    IGNORED = 0
    NEEDS_POSITIONS = 1  # ignored, once positions begin at the first token
    READ = 2


def put_hidden_states(trainer: DistillationTrainer, method: Callable | None) -> None:
    """A method of this trainer's own in the place of its class's; None gives the class's back."""
    vars(trainer).pop(HIDDEN_STATES, None)
    if method is not None:
        setattr(trainer, HIDDEN_STATES, method)


@torch.no_grad()
def look_at(
    student: torch.nn.Module, given: dict, trainer: DistillationTrainer, hidden_states: Callable, rebuilt_with: Callable
) -> tuple[list[str], list[Padding]]:
    """The types of the models whose logits on a few tokens are not those that TRL's reading of them gives, or will
    not be once they are trained; and what padding before these tokens is to the student and to the teacher.

    Args:
        given: a micro-batch of the trainer's.
        hidden_states: TRL's method of the trainer that computes them.
        rebuilt_with: loss → TRL's `_compute_loss` of the trainer, with that loss.
    """
    own, misread, padding = [], [], []
    trains_more = _trains_more(within_peft(student).get_output_embeddings())
    width = given["prompt_ids"].shape[1] + given["completion_ids"].shape[1]  # which fits the context

    def both(model, ids, mask, keep):
        model, gain = within_peft(model), [1.0]

        def amplify(head, inputs, logits):  # up to 50, where a soft cap shows
            gain[0] = 50 / logits.abs().max()
            return logits * gain[0]

        with model.get_output_embeddings().register_forward_hook(amplify):
            logits = hidden_states(Backbone(model, full_logits=True), ids, mask, keep)
        own.append((model.config.model_type, logits, gain[0]))
        # transformers finds no backbone in Llama 4, and calls the model its own.
        read = logits if model.base_model is model else hidden_states(model, ids, mask, keep)
        pads = max(1, min(_TOKENS, width - ids.shape[1]))
        padding.append(_padding_is(model, ids, mask, keep, pads, trainer._tokenizer.pad_token_id, hidden_states))
        return read

    def compare(student_hidden, teacher_hidden, student_weight, teacher_weight, mask, beta, **read):
        heads = ("student", student_hidden, student_weight), ("teacher", teacher_hidden, teacher_weight)
        for (side, hidden, weight), (name, logits, gain) in zip(heads, own, strict=True):
            rest = (read[f"{side}_{what}"] for what in ("lm_head_bias", "logit_scale", "final_logit_softcapping"))
            if not explained(logits, gain, hidden, weight, *rest) or (side == "student" and trains_more):
                misread.append(name)
        return (mask.sum(),) * 3

    # What the student has just written: text, whatever the prompts show.
    ids = given["completion_ids"][:1, :_TOKENS]
    inputs = {"prompt_ids": ids[:, :1], "completion_ids": ids}
    inputs |= {f"{part}_mask": torch.ones_like(inputs[f"{part}_ids"]) for part in ("prompt", "completion")}
    override = vars(trainer).get(HIDDEN_STATES)
    put_hidden_states(trainer, both)
    try:
        with modes_kept(student):
            student.eval()
            rebuilt_with(compare)(student, inputs, None)
    finally:
        put_hidden_states(trainer, override)
        torch.clear_autocast_cache()  # of casts without a graph, which torch 2.10 hands to training too
    return misread, padding


def _padding_is(
    model, ids: torch.Tensor, mask: torch.Tensor, keep: int, pads: int, pad_token_id: int, hidden_states: Callable
) -> Padding:
    """What so many tokens of padding before a row are to the model."""
    pad = mask.new_zeros(1, pads)
    padded = torch.cat([pad + pad_token_id, ids], 1), torch.cat([pad, mask], 1)
    full_logits = model.base_model is model  # Llama 4 again
    exact = all(p.dtype in (torch.float32, torch.float64) for p in model.parameters())
    most = _TOLERANCE if exact and not torch.is_autocast_enabled(ids.device.type) else _ROUNDED
    alone = hidden_states(Backbone(model, full_logits), ids, mask, keep).float()

    def differs(positions_of: torch.Tensor | None = None) -> bool:
        hidden = hidden_states(Backbone(model, full_logits, positions_of), *padded, keep)
        # Of most tokens: rounding sends one or another to other experts. NaN is for others to report.
        share = (hidden.float() - alone).norm(dim=-1) / alone.norm(dim=-1)
        return bool(share.median() > most)

    takes = all("position_ids" in inspect.signature(m.forward).parameters for m in (model, model.base_model))
    mended = takes and not differs(padded[1])  # asked whatever the next finds: sharded models run on all ranks
    if not differs():
        return Padding.IGNORED
    return Padding.NEEDS_POSITIONS if mended else Padding.READ


def explained(logits, gain, hidden, weight, bias, scale, cap) -> bool:
    """Whether `gain` times what is read of hidden states, head and config are the logits."""
    if (hidden.shape[-1], logits.shape[-1]) != (weight.shape[1], weight.shape[0]):
        return False
    if (logits <= torch.finfo(logits.dtype).min / 2).any():  # tokens that the model rules out, as Chameleon does
        return False
    weight, bias = gathered_head(weight, hidden), gathered_head(bias, hidden)
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


class Backbone(torch.nn.Module):
    """Stands in for a model whose backbone TRL calls.

    Args:
        full_logits: its "last hidden state" is the model's logits.
        mask: (B, L), by which tokens have positions; None leaves them to the model.
    """

    def __init__(self, model: torch.nn.Module, full_logits: bool, mask: torch.Tensor | None = None):
        super().__init__()
        self.model, self.full_logits, self.mask = model, full_logits, mask

    def base_model(self, **inputs):
        if self.mask is not None:
            inputs["position_ids"] = (self.mask.cumsum(-1) - 1).clamp(min=0)
        if not self.full_logits:
            return self.model.base_model(**inputs)
        # Not the model's __call__: this runs inside the forward of what wraps it.
        return types.SimpleNamespace(last_hidden_state=self.model.forward(**inputs).logits)


def within_peft(model: torch.nn.Module) -> torch.nn.Module:
    model = getattr(model, "_orig_mod", model)  # of a compiled teacher, whose forward has no arguments to look at
    return model.base_model.model if is_peft_model(model) else model


def gathered_head(head: torch.Tensor | None, hidden: torch.Tensor) -> torch.Tensor | None:
    """FSDP2's mixed precision keeps a sharded head in fp32 beside hidden states of its compute dtype."""
    return gathered(head).to(hidden.dtype) if isinstance(head, DTensor) else head
