"""Which part of a transformer a tensor is, from its name: by role, not by one family's spelling.

model.layers.7.mlp.down_proj.weight  ┐
transformer.h.7.mlp.c_proj.weight    ├  layer 7, down
gpt_neox.layers.7.mlp.dense_4h_to_h  ┘
"""

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

# Module types, in the order tables and heat maps show them. Families that fuse matrices get the fused type; Mamba's and
# other mixers are attention by another recurrence, whose in_proj holds queries, keys and values in one.
GATES = "attention gate"  # what opens, decays or forgets in attention: of its output, or of a linear attention's state
ATTENTION = ("q", "k", "v", "kv", "qkv", GATES, "o")
MLP = ("gate", "up", "gate_up", "down")
EXPERTS = tuple(f"expert {name}" for name in MLP)
BIASES = "expert bias"  # of all experts, one vector each: a stack of vectors, not a matrix
TYPES = ("embedding", *ATTENTION, *MLP, *EXPERTS, BIASES, "router", "norm", "head", "other")

# A number of more digits counts no layers.
_LAYER = re.compile(r"(?:^|\.)(?:\w*layers?|h|blocks?|attentions|ffns)\.(\d{1,6})(?=\.|$)")
_EXPERT = re.compile(r"(?:^|\.)experts?\.(\d{1,6})(?=\.|$)")
# Towers and layers that predict further tokens (MTP) number their layers anew.
_FOREIGN = re.compile(r"(?:^|\.)(?:vision|visual|video|audio|image|qformer|perceiver|protein|mtp)\w*\.")
# The innermost block decides: of Idefics' gated_cross_attn_layers each holds an mlp.
_ATTENTION_BLOCK = re.compile(r"(?:^|\.)\w*att(?:n|entions?)?(?:_layers)?\.(?!(?:.*\.)?mlp\.)")
_MIXER_BLOCK = re.compile(r"(?:^|\.)(?:mamba|mixer|mlstm_layer|temporal_block|\d+\.conv)\.")  # Nemotron-H: any block
_MLP_BLOCK = re.compile(r"(?:^|\.)(?:(?:\w+_)?(?:mlps?|mlp_block|ffns?|ff|feed_?forward|moe|experts?)|gate|router)\.")
# Granite and JetMoe have the stacks of experts in the block itself.
_EXPERT_BLOCK = re.compile(r"(?:^|\.)(?:experts?|shared_experts?)\.|\.(?:block_sparse_moe|mlp)\.(?:in|out)put_linear$")
_POSITIONS = re.compile(r"(?:^|[._])(?:wpe|pos|positions?|token_type)[._]")

# The first pattern that the whole module path (weight and bias endings removed, lower case) ends with decides.
_WHOLE = [
    ("other", r"rotary\w*(\.\w+)?|relative_attention_bias|inv_freq"),
    ("norm", r"\w*norm(_?\d+)?(\.\d+)?|\w*layernorm_\w+|norm_\w+|\w+_norm_\w+|(\w+_)?ln(_?\d+)?|ln_[a-z0-9]+"),
    ("norm", r"\w*_layernorm(\.\w+)+"),  # A.X K2's hold gates
    ("head", r"lm_head(\.decoder)?|predictions\.decoder|embed_out|output_head|output_layer|unembed|shared_head\.head"),
    ("head", r"(?<!\.)(head|output|score)|rwkv\.head"),  # at the top alone
    ("embedding", r"\w*embed\w*(\.\w+)?|wte|wpe|tok_\w+|shared"),
]
_IN_ATTENTION = [
    ("other", r"\w*conv\w*|\w+_decay"),  # a short convolution of the queries is no projection
    (GATES, r"in_proj_(z|a|b|ba)|(\w+_)?gate_proj|linear_gate|[abfg]_proj|[fg]_[ab]_proj|[fio]gate_preact"),
    (GATES, r"linear_y|receptance|output_gate|gate_attn"),  # Griffin's, RWKV's, MiniMax's, Inkling's
    ("qkv", r"\w*qkv\w*|query_key_value|c_attn|in_proj|\w*pack"),
    ("kv", r"w?kv\w*|\w*_kv"),
    ("q", r"q|wq(_\w+)?|q_\w*|query\w*|\w*q_proj|project_q|experts\.input_linear"),
    ("k", r"k|wk(_\w+)?|k_\w*|key\w*|project_k"),
    ("v", r"v|wv(_\w+)?|v_\w*|value\w*|linear_x|project_v"),
    ("o", r"o|wo(_\w+)?|o_\w*|out\w*|linear_out|c_proj|dense|output\.dense|attention_out"),
]
_IN_MLP = [
    ("up", r"densereludense\.wi"),  # T5's; ModernBERT's wi is two in one
    ("router", r"gate(\.wg|\.down_proj)?|router(_mlp)?(\.\w+)?|shared_expert_gate"),
    ("gate_up", r"gate_up\w*|wi|dense_h_to_4h_swiglu|w12|w13_weight|input_linear|experts\.fc1"),
    ("gate", r"gate_\w*|linear_gate|w1|w_in\.w_0|wi_0|c_fc_0|linear_1|proj_up_gate|receptance"),
    ("up", r"(proj_)?up\w*|w3|w_in\.w_1|v1|wi_1|c_fc(_1)?|(linear_)?fc1|fc_in|lin1|layer_1|linear_v|key"),
    ("up", r"dense_h_to_4h|intermediate(\.dense)?|(mlp|ffn?|feed_?forward)\.0"),  # the latter: of an nn.Sequential
    ("down", r"(proj_)?down\w*|w2(_weight)?|w_out|wo|c_proj|(linear_)?fc2|fc_out|lin2|layer_2|output_linear|value"),
    ("down", r"dense_4h_to_h|output\.dense|(mlp|ffn?|feed_?forward)\.([23]|output)"),
]


class Role(NamedTuple):
    """Where a tensor sits. Both numbers are as the name gives them."""

    type: str  # one of TYPES
    layer: int | None = None
    expert: int | None = None

    @property
    def part(self) -> str:
        """attention, mlp, or the type itself."""
        if self.type in ATTENTION:
            return "attention"
        return "mlp" if self.type in MLP or self.type in EXPERTS else self.type


def role_of(name: str) -> Role:
    """The role of a tensor by its name in a checkpoint; type "other" for names that no rule knows."""
    if _FOREIGN.search(name.lower()):
        return Role("other")
    layer, expert = (int(found[1]) if (found := pattern.search(name)) else None for pattern in (_LAYER, _EXPERT))
    path = re.sub(r"(\.linear)?\.(weight|bias)$", "", name.lower())
    kind = _first(_WHOLE, path)
    if kind is None and layer is not None:
        # Feed-forward blocks go by many names, and OPT's by none: what is not in attention is in one.
        rules = _IN_ATTENTION + _IN_MLP if _MIXER_BLOCK.search(path) else _IN_MLP
        kind = _first(_IN_ATTENTION if _ATTENTION_BLOCK.search(path) else rules, path)
        if kind in MLP and _EXPERT_BLOCK.search(path):
            kind = BIASES if path.endswith("_bias") else f"expert {kind}"
    return Role(kind or "other", layer, expert)


def block_of(name: str) -> str | None:
    """attention or mlp, whose block in its layer holds the tensor: what is no projection there, as a router, sinks, a
    short convolution or what makes the decay of a state, too. None for norms and what is in neither.
    """
    role, path = role_of(name), name.lower()
    if role.part in ("attention", "mlp"):
        return role.part
    if role.layer is None or role.type not in ("router", BIASES, "other"):
        return None
    if _ATTENTION_BLOCK.search(path):
        return "attention"
    if role.type != "other" or _MLP_BLOCK.search(path):
        return "mlp"
    return "attention" if _MIXER_BLOCK.search(path) else None


def is_matrix(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor is a matrix or a stack of them; the kernels (1, k) of a short convolution are vectors."""
    return len(shape) >= 2 and min(shape[-2:]) > 1 and role_of(name).type != BIASES


def token_embedding(shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """Of named tensors the one that embeds tokens: of several that do not embed positions, that with the most rows."""
    found = [
        n for n, s in shapes.items() if len(s) == 2 and role_of(n).type == "embedding" and not _POSITIONS.search(n)
    ]
    return max(found, key=lambda n: shapes[n][0], default=None)


def _first(rules: list[tuple[str, str]], path: str) -> str | None:
    return next((kind for kind, pattern in rules if re.search(rf"(?:^|\.)(?:{pattern})$", path)), None)


def depth(names: Iterable[str]) -> int:
    """How many layers the model of these tensors has."""
    return 1 + max((layer for name in names if (layer := role_of(name).layer) is not None), default=-1)


def third(layer: int | None, layers: int) -> str:
    """Which third of the depth the middle of a layer is in: bottom, middle or top; "outside" for what is in no layer,
    "whole" for an only one.
    """
    if layer is None:
        return "outside"
    return "whole" if layers == 1 else ("bottom", "middle", "top")[(2 * layer + 1) * 3 // (2 * layers)]
