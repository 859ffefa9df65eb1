"""Which parameters move: attention and MLP (arXiv 2605.11739), whole blocks with biases, gates, routers and experts,
and what mixes tokens where there is no attention; never embeddings, heads or norms."""

import re
from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor, nn

# Path components that are a block of their layer in the Hugging Face families. Attention is any ...attn or ...attention
# (self_attn, linear_attn, encoder_attn, SelfAttention, XLM's attentions), and what mixes tokens in its place: Mamba's
# mamba and mixer (Nemotron-H calls every block so), xLSTM's mlstm_layer, Griffin's temporal_block, LFM2's conv. The
# feed-forward block is any ...mlp, ...ffn, ffwd, ...moe, feed_forward or (T5) DenseReluDense and its experts; OPT keeps
# fc1 and fc2 in the layer itself, torch.nn.TransformerEncoderLayer linear1 and linear2, BERT intermediate.dense and
# output.dense.
DEFAULT_INCLUDE = (
    r"(?i)(^|\.)\w*att(n|entions?)?(_layers)?\.",
    r"(^|\.)(mamba|mixer|mlstm_layer|temporal_block|\d+\.conv)\.",
    r"(?i)(^|[._])(mlps?|mlp_block|ffns?|ff\d?|ffwd|feed_?forward|DenseReluDense|moe|experts?)\.",
    r"(^|\.)(fc[12]|\d+\.linear[12]|(intermediate|output)(_query)?\.dense)\.",
)
# Judged on the module that holds the tensor (its last two components): DBRX's norm_attn_norm is not a norm. But
# A.X K2's layer norms hold an MLP, which gates what they give.
DEFAULT_EXCLUDE = (
    r"(?i)norm[^.]*(\.[^.]+)?$|_layernorm\.",
    r"(^|[._])ln\d*(_[^.]+)?\.[^.]+$",
    r"(^|\.)(\w*embed\w*|wte|wpe|lm_head|embed_out|output_head)(\.|$)",
    r"rotary|relative_attention_bias",
)

_WRAPPERS = re.compile(r"(^|\.)(module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)(?=\.)")
# peft holds a module that it trains whole beside the original, and calls both otherwise.
_PEFT_COPIES = re.compile(r"(?<=\.)(modules_to_save\.[^.]+|original_module)\.")

Patterns = Sequence[re.Pattern]  # as `compiled` gives them


def named_tensors(
    params: nn.Module | Mapping[str, Tensor] | Iterable[tuple[str, Tensor]],
) -> dict[str, Tensor]:
    """Name → tensor without what DDP, FSDP, compile and checkpoint wrappers put into names; tied tensors once."""
    wanted = "params must be a module, or named tensors as model.named_parameters() gives them"
    if isinstance(params, nn.Module):
        items = params.named_parameters()
    else:
        items = params.items() if isinstance(params, Mapping) else params
    if not isinstance(items, Iterable):
        raise TypeError(f"{wanted}, got a {type(items).__name__}")
    out, seen = {}, set()
    for item in items:
        name, tensor = item if isinstance(item, (tuple, list)) and len(item) == 2 else (None, item)
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            named = "without a name" if name is None else f"named {name!r}"
            raise TypeError(f"{wanted}, got a {type(tensor).__name__} {named}")
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        if plain_name(name) in out:
            raise ValueError(f"two different tensors are named {plain_name(name)!r}: give each a name of its own")
        out[plain_name(name)] = tensor
    return out


def is_frozen(tensor: Tensor) -> bool:
    return isinstance(tensor, nn.Parameter) and not tensor.requires_grad


def plain_name(name: str) -> str:
    """name without the components that wrappers put into it."""
    return _WRAPPERS.sub("", name).lstrip(".")


def select(named: Mapping[str, Tensor], include: Patterns, exclude: Patterns) -> dict[str, Tensor]:
    """The tensors whose name some `include` pattern finds and no `exclude` one does.

    Raises ValueError, naming the patterns and a few parameters, when nothing is left: EffOPD would silently do nothing.
    """
    chosen = matching(named, include, exclude)
    if not chosen:
        some = ", ".join(list(named)[:5]) or "none that requires a gradient"
        include, exclude = ([p.pattern for p in patterns] for patterns in (include, exclude))
        raise ValueError(
            f"no parameter to extrapolate: include {include} and exclude {exclude} leave none of {len(named)} "
            f"(the first: {some})"
        )
    return chosen


def matching(named: Mapping[str, Tensor], include: Patterns, exclude: Patterns) -> dict[str, Tensor]:
    """As `select`, maybe empty."""
    return {name: tensor for name, tensor in named.items() if _found(name, include) and not _found(name, exclude)}


def left_out(named: Mapping[str, Tensor], include: Patterns, exclude: Patterns) -> list[str]:
    """Matrices in numbered layers whose names the default knows neither as what moves nor as what does not; none where
    the caller chose."""
    if [pattern.pattern for pattern in include] != [*DEFAULT_INCLUDE]:
        return []
    inside = {name: t for name, t in named.items() if t.ndim >= 2 and re.search(r"\.\d+\.", name)}
    return [name for name in inside if not _found(name, include) and not _found(name, exclude)]


def _found(name: str, patterns: Patterns) -> bool:
    """Under the name it has, or would have had without peft's `modules_to_save`."""
    return any(pattern.search(each) for each in {name, _PEFT_COPIES.sub("", name)} for pattern in patterns)


def compiled(option: str, patterns: str | Sequence[str]) -> list[re.Pattern]:
    """One regular expression, or several; ValueError names the option and the one that is none. None is refused: it
    could mean the default as well as none at all."""
    if isinstance(patterns, (str, re.Pattern)):
        patterns = [patterns]
    if not isinstance(patterns, Iterable):
        raise ValueError(f"{option} must be a regular expression or a sequence of them, () for none, got {patterns!r}")
    out = []
    for pattern in patterns:
        try:
            out.append(re.compile(pattern))
        except (re.error, TypeError) as error:
            raise ValueError(f"{option}: {pattern!r} is not a regular expression: {error}") from error
    return out
