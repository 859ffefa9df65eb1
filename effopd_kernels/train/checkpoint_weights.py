"""Weights of a checkpoint that transformers' Trainer would not read, or not all of them, without a word."""

from pathlib import Path

import torch
from transformers import PreTrainedModel

from ..commands import json_object
from ..errors import UserError
from ..extrapolation.adapters import COMPANION
from ..tensor_files import FileCheckpoint


def load_renamed(model: PreTrainedModel, folder: str | Path) -> bool:
    """Load a checkpoint whose tensors have other names than the model's, as those of mixtures of experts, GPT-NeoX and
    Nemotron-H have; False, and nothing done, where all names are alike.

    transformers' Trainer reads by name alone (5.23), and leaves tensors of other names as they were: the base's.
    """
    try:
        saved = FileCheckpoint(folder).shapes.keys()
    except FileNotFoundError:
        return False
    own = model.state_dict()
    read = {t.data_ptr() for name, t in own.items() if name in saved}  # under one of their names, where they are tied
    if all(t.data_ptr() in read for t in own.values()):
        return False
    wide = torch.promote_types(model.dtype, torch.float32)  # rounds nothing, should dtypes be mixed
    model.load_state_dict(type(model).from_pretrained(folder, dtype=wide).state_dict())
    return True


def check_rank(checkpoint: str | Path, student: torch.nn.Module) -> None:
    """Raises UserError where the student's adapter is not as long as the checkpoint's: when training ends, it takes up
    its jumps (`EffOPDController.fold_`), and what was saved before does not fit any more."""
    config, adapters = Path(checkpoint) / "adapter_config.json", getattr(student, "peft_config", None)
    if not adapters or not config.is_file():
        return
    there, here = json_object(config).get("r"), getattr(adapters[student.active_adapters[0]], "r", None)
    if there != here:
        raise UserError(
            f"checkpoint '{checkpoint}' has an adapter of rank {there}, the student's is of rank {here}; if jumps made "
            "it longer when training ended, resume with model and trainer constructed anew"
        )


def load_trained_adapter(model, checkpoint: Path) -> None:
    """Beside EffOPD's adapter, which lies in a folder of its own, transformers before 5.23 passes over the trained one,
    and training would go on from a fresh one.
    """
    if COMPANION in getattr(model, "peft_config", {}) and (checkpoint / "adapter_model.safetensors").is_file():
        model.load_adapter(str(checkpoint), model.active_adapters[0], is_trainable=True)
