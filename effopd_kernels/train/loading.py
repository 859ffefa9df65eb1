"""Models and tokenizers from folders and the hub; what is wrong with them is one sentence."""

import json
from contextlib import contextmanager
from pathlib import Path

import transformers
from safetensors import SafetensorError
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel
from trl.trainer.utils import create_model_from_path

from ..errors import one_line
from ..extrapolation.adapters import COMPANION
from .config import OPDConfig
from .errors import UserError


def check_no_adapter(name: str) -> None:
    """Raises UserError for a folder that holds a LoRA adapter alone, saying how to make a model of it."""
    folder = Path(name)
    file = folder / "adapter_config.json"
    if (folder / "config.json").is_file() or not file.is_file():
        return
    base = json.loads(file.read_text()).get("base_model_name_or_path")
    how = f"model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained('{base}'), '{name}'); "
    if (folder / COMPANION).is_dir():  # its jumps
        how += f"model.load_adapter('{folder / COMPANION}', '{COMPANION}'); "
        how += f"model.base_model.set_adapter(['default', '{COMPANION}']); "
    raise UserError(
        f"'{name}' is a LoRA adapter, not a whole model: merge it into its base first ({how}"
        "model.merge_and_unload().save_pretrained(folder)), and save the tokenizer to that folder"
    )


def load_config(name: str, **kwargs):
    try:
        config = AutoConfig.from_pretrained(name, **kwargs)
    except Exception as e:
        raise UserError(f"no model can be loaded from '{name}': {_said(e)}") from e
    (made, *_) = config.architectures or [type(config).__name__]
    known = getattr(transformers, made, None) if config.architectures else None  # else the code is the model's own
    if config.is_encoder_decoder or (known and not known.can_generate()):
        raise UserError(f"no causal language model can be loaded from '{name}': its config.json names {made}")
    return config.get_text_config()


def load_tokenizer(name: str, **kwargs):
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, padding_side="left", truncation_side="left", **kwargs)
    except Exception as e:  # of what kind it is depends on what of a tokenizer is not there
        raise UserError(f"no tokenizer can be loaded from '{name}': {_said(e)}") from e
    if tokenizer.get_vocab().keys() <= tokenizer.get_added_vocab().keys():  # what transformers makes up from a config
        raise UserError(
            f"'{name}' has no tokenizer files: save the tokenizer it was trained with there, with "
            f"tokenizer.save_pretrained('{name}')"
        )
    return tokenizer


def load_teacher(name: str, args: OPDConfig) -> PreTrainedModel:
    kwargs = dict(args.teacher_model_init_kwargs or {})
    if args.teacher_model_revision is not None:
        kwargs.setdefault("revision", args.teacher_model_revision)
    if args.distributed_state.distributed_type in ("MULTI_GPU", "DEEPSPEED"):
        kwargs["device_map"] = None
    kwargs.setdefault("trust_remote_code", args.trust_remote_code)
    with loading_errors_named(name):
        return create_model_from_path(name, **kwargs)


@contextmanager
def loading_errors_named(name: str):
    """What safetensors and transformers raise for weights that are damaged, or of another model than their config, and
    for options that the model does not have, as a UserError."""
    try:
        yield
    except SafetensorError as e:
        raise UserError(f"the weights of '{name}' cannot be read: {e}") from e
    except RuntimeError as e:
        if "ignore_mismatched_sizes" not in str(e):
            raise
        raise UserError(f"the weights of '{name}' are of other shapes than its config.json makes a model of") from e
    except TypeError as e:
        if "unexpected keyword argument" not in str(e):
            raise
        raise UserError(f"'{name}' cannot be loaded with the model_init_kwargs given: {e}") from e


def _said(error: Exception) -> str:
    said = one_line(error, 400)
    return said if isinstance(error, (OSError, ValueError)) else f"{type(error).__name__}: {said}"
