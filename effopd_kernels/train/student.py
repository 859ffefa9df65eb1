"""What the trainer does to a student's modules, for the whole run or while it generates."""

import re
from contextlib import contextmanager

import torch
from transformers import PreTrainedConfig

_DROPOUT = re.compile(r"(drop|dropout|pdrop)(_path)?(_p|_prob|_rate|_ratio)?$")  # names of probabilities


def disable_dropout(model: torch.nn.Module) -> list[tuple[PreTrainedConfig, str, float]]:
    """Also that of functions, with a probability that a module or its config holds, as OPT's; TRL's is of modules.
    Returns what the configs said, for the model that is saved is to say it again.
    """
    said = []
    for module in model.modules():
        for owner in (module, getattr(module, "config", None)):
            for name, value in vars(owner).items() if isinstance(owner, (torch.nn.Module, PreTrainedConfig)) else ():
                if _DROPOUT.search(name) and isinstance(value, float) and 0 < value <= 1:
                    setattr(owner, name, 0.0)
                    if isinstance(owner, PreTrainedConfig):
                        said.append((owner, name, value))
    return said


@contextmanager
def dropout_told(said: list[tuple[PreTrainedConfig, str, float]]):
    """For the duration the configs say again what `disable_dropout` found in them."""
    for config, name, value in said:
        setattr(config, name, value)
    try:
        yield
    finally:
        for config, name, _ in said:
            setattr(config, name, 0.0)


@contextmanager
def finite_logits(student: torch.nn.Module):
    """While generating, NaN and infinite logits are finite ones: sampling from them raises, and on a GPU ends CUDA. A
    student that has any is told by the loss of what it sampled, where it is an error, or a candidate not to accept."""
    head = student.get_output_embeddings()
    if head is None:
        yield
        return

    def bounded(head, args, logits):
        most = min(torch.finfo(logits.dtype).max, 1e30)  # finite when divided by a temperature, too
        return logits.nan_to_num(nan=0.0).clamp(-most, most)

    hook = head.register_forward_hook(bounded)
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def input_hooks_kept(student: torch.nn.Module):
    """TRL turns gradient checkpointing off to generate and on again, and transformers then hooks the input embeddings
    anew and forgets the hook that was there: one more at each batch, unless the old one is removed."""
    before = getattr(student, "_require_grads_hooks", None)
    try:
        yield
    finally:
        if before is not None and student._require_grads_hooks is not before:
            for hook in before:
                hook.remove()
