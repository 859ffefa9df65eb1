"""Models and tokenizers from folders and the hub; what is wrong with them is one sentence."""

from pathlib import Path

import transformers
from safetensors import SafetensorError
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel
from trl.trainer.utils import create_model_from_path

from ..commands import json_object
from ..errors import UserError, one_line
from ..extrapolation.adapters import COMPANION
from .config import OPDConfig


def check_no_adapter(name: str) -> None:
    """Raises UserError for a folder that holds a LoRA adapter alone, saying how to make a model of it."""
    folder = Path(name)
    file = folder / "adapter_config.json"
    if (folder / "config.json").is_file() or not file.is_file():
        return
    base = json_object(file).get("base_model_name_or_path")
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
    if not isinstance(config.architectures, list) or not isinstance(next(iter(config.architectures), None), str):
        raise UserError(
            f"no causal language model can be loaded from '{name}': its config.json has to list an architecture, such "
            f'as ["Qwen3ForCausalLM"], got {config.architectures!r}'
        )
    (made, *_) = config.architectures
    known = getattr(transformers, made, None)  # if there is none, the code is the model's own
    generates = isinstance(known, type) and issubclass(known, PreTrainedModel) and known.can_generate()
    if config.is_encoder_decoder or (known and not generates):
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


def load_student(name: str, args: OPDConfig, quantization: object | None) -> PreTrainedModel:
    given = dict(args.model_init_kwargs or {})
    if quantization is not None:
        if "quantization_config" in given:
            raise UserError("a quantization is given, and another in model_init_kwargs: give one of them")
        given["quantization_config"] = quantization
    model = _load(name, given, args)
    ends = model.generation_config.eos_token_id
    if any(type(i) is not int for i in (ends if isinstance(ends, list) else [ends])) and ends is not None:
        raise UserError(f"the eos_token_id of '{name}' has to be a token's id, or a list of such, got {ends!r}")
    return model


def load_teacher(name: str, args: OPDConfig) -> PreTrainedModel:
    given = dict(args.teacher_model_init_kwargs or {})
    if args.teacher_model_revision is not None:
        given.setdefault("revision", args.teacher_model_revision)
    return _load(name, given, args)


def _load(name: str, given: dict, args: OPDConfig) -> PreTrainedModel:
    if args.distributed_state.distributed_type in ("MULTI_GPU", "DEEPSPEED"):
        given["device_map"] = None
    return load_model(name, **{"trust_remote_code": args.trust_remote_code, **given})


def load_model(name: str, **kwargs) -> PreTrainedModel:
    """`from_pretrained` of the class that its config.json names.

    Raises:
        UserError: weights that are damaged, or of another model than their config; options that the model does not
            have; a parameter that is not in the files: transformers would draw it at random. Those that are tied, or
            that the model's class can do without, need not be there.
    """
    try:
        model, found = create_model_from_path(name, **kwargs | {"output_loading_info": True})
    except SafetensorError as e:
        raise UserError(f"the weights of '{name}' cannot be read: {e}") from e
    except RuntimeError as e:
        if "ignore_mismatched_sizes" not in str(e):
            raise
        raise UserError(f"the weights of '{name}' are of other shapes than its config.json makes a model of") from e
    except (TypeError, AttributeError, ArithmeticError, LookupError) as e:
        if "unexpected keyword argument" in str(e):
            raise UserError(f"'{name}' cannot be loaded with the model_init_kwargs given: {e}") from e
        raise UserError(f"no model can be made of what config.json and its like in '{name}' say: {_said(e)}") from e
    parameters = [n for n, _ in model.named_parameters(remove_duplicate=False)]
    if lacking := [n for n in parameters if n in found["missing_keys"]]:
        others = found["unexpected_keys"] and f", and have others, such as '{min(found['unexpected_keys'])}'"
        raise UserError(
            f"the weights of '{name}' lack {len(lacking)} of the {len(parameters)} tensors that a "
            f"{type(model).__name__} has, such as '{lacking[0]}'{others or ''}"
        )
    return model


def _said(error: Exception) -> str:
    said = one_line(error, 400)
    return said if isinstance(error, (OSError, ValueError)) else f"{type(error).__name__}: {said}"
