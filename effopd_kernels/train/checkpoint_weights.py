"""Weights of a checkpoint that transformers' Trainer would not read, or not all of them, without a word."""

from pathlib import Path

import torch
from transformers import PreTrainedModel

from ..commands import json_object
from ..errors import UserError
from ..extrapolation.adapters import CHANGES_BASE, COMPANION
from ..tensor_files import FileCheckpoint

# Of an adapter, what says which weights it makes of its parameters.
ADAPTER = (
    "r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "target_modules", "modules_to_save",
    "init_lora_weights",
)  # fmt: skip


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


def check_adapter(checkpoint: str | Path, student: torch.nn.Module) -> None:
    """Raises UserError where the student's adapter is not the checkpoint's: peft would load the parameters into it as
    they are, whose product another scale makes another student. Nor is it as long when training ends and it takes up
    its jumps (`EffOPDController.fold_`)."""
    config, adapters = Path(checkpoint) / "adapter_config.json", getattr(student, "peft_config", None)
    if not adapters or not config.is_file():
        return
    active = student.active_adapters[0]
    saved, own = json_object(config), vars(adapters[active])
    for name in ADAPTER:
        there, here = (sorted(v) if isinstance(v, (list, set)) else v for v in (saved.get(name), own.get(name)))
        if (there or None) == (here or None) or name not in saved.keys() & own.keys():  # or of another version of peft
            continue
        if name == "target_modules" and _adapted_in(config.parent) == _adapted(student, active) != set():
            continue  # by other words, as all-linear
        if name == "init_lora_weights" and not any(str(v).startswith(CHANGES_BASE) for v in (there, here)):
            continue
        what, how = name, "resume with the checkpoint's"
        if name == "r":
            what = "rank"
            how = "if jumps made it longer when training ended, resume with model and trainer constructed anew"
        raise UserError(
            f"checkpoint '{checkpoint}' has an adapter of {what} {there}, the student's is of {here}; {how}"
        )


def _adapted_in(folder: Path) -> set[str]:
    """The layers that an adapter's file has LoRA's factors of."""
    file = folder / "adapter_model.safetensors"
    names = FileCheckpoint(file).shapes if file.is_file() else ()
    return {name.partition(".lora_")[0] for name in names if ".lora_" in name}


def _adapted(student: torch.nn.Module, adapter: str) -> set[str]:
    """Those of the student that have them."""
    factors = ("lora_A", "lora_embedding_A")
    return {n for n, m in student.named_modules() if any(adapter in getattr(m, f, ()) for f in factors)}


def load_trained_adapter(model, checkpoint: Path) -> None:
    """Beside EffOPD's adapter, which lies in a folder of its own, transformers before 5.23 passes over the trained one,
    and training would go on from a fresh one.
    """
    if COMPANION in getattr(model, "peft_config", {}) and (checkpoint / "adapter_model.safetensors").is_file():
        model.load_adapter(str(checkpoint), model.active_adapters[0], is_trainable=True)
