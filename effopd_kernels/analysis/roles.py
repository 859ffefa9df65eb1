"""Which part of a transformer a tensor is, from its name: by role, not by one family's spelling.

model.layers.7.mlp.down_proj.weight  ┐
transformer.h.7.mlp.c_proj.weight    ├  layer 7, down
gpt_neox.layers.7.mlp.dense_4h_to_h  ┘
"""

import re
from collections.abc import Mapping
from typing import NamedTuple

# Module types, in the order tables and heat maps show them. Families that fuse matrices get the fused type.
ATTENTION = ("q", "k", "v", "kv", "qkv", "o")
MLP = ("gate", "up", "gate_up", "down")
EXPERTS = tuple(f"expert {name}" for name in MLP)
BIASES = "expert bias"  # of all experts, one vector each: a stack of vectors, not a matrix
TYPES = ("embedding", *ATTENTION, *MLP, *EXPERTS, BIASES, "router", "norm", "head", "other")

_LAYER = re.compile(r"(?:^|\.)(?:layers?|h|blocks?)\.(\d+)(?=\.|$)")
_EXPERT = re.compile(r"(?:^|\.)experts?\.(\d+)(?=\.|$)")
_FOREIGN = re.compile(r"(?:^|\.)(?:vision|visual|audio|image)\w*\.")  # towers number their layers anew
_ATTENTION_BLOCK = re.compile(r"(?:^|[._])(?:self_|linear_|cross_)?(?:attn|attention|selfattention|encdecattention)\.")
_EXPERT_BLOCK = re.compile(r"(?:^|\.)(?:experts?|shared_experts?)\.")
_POSITIONS = re.compile(r"(?:^|[._])(?:wpe|pos|positions?|token_type)[._]")

# The first pattern that the whole module path (weight and bias endings removed, lower case) ends with decides.
_WHOLE = [
    ("other", r"rotary\w*(\.\w+)?|relative_attention_bias|inv_freq"),
    ("norm", r"\w*(norm|layernorm|ln|rmsnorm)(_?\d+)?|ln_[a-z0-9]+|norm_\w+|\w+_norm(_\w+)?|ln"),
    ("head", r"lm_head|embed_out|output_head|output_layer"),
    ("embedding", r"\w*embed\w*(\.\w+)?|wte|wpe|tok_\w+|shared"),
]
_IN_ATTENTION = [
    ("qkv", r"\w*qkv\w*|query_key_value|c_attn|in_proj|\w*pack"),
    ("kv", r"kv\w*|\w*_kv"),
    ("q", r"q|wq|q_\w*|query\w*|\w*q_proj"),
    ("k", r"k|wk|k_\w*|key\w*"),
    ("v", r"v|wv|v_\w*|value\w*"),
    ("o", r"o|wo|o_\w*|out\w*|c_proj|dense|output\.dense"),
]
_IN_MLP = [
    ("up", r"densereludense\.wi"),  # T5's; ModernBERT's wi is two in one
    ("router", r"gate|router(\.\w+)?|shared_expert_gate"),
    ("gate_up", r"gate_up\w*|wi|dense_h_to_4h_swiglu|w12"),
    ("gate", r"gate_\w*|w1|wi_0|linear_1"),
    ("up", r"up\w*|w3|wi_1|c_fc|fc1|fc_in|dense_h_to_4h|intermediate\.dense|linear_v"),
    ("down", r"down\w*|w2|wo|c_proj|fc2|fc_out|dense_4h_to_h|output\.dense"),
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
    path = re.sub(r"\.(weight|bias)$", "", name.lower())
    kind = _first(_WHOLE, path)
    if kind is None and layer is not None:
        # Feed-forward blocks go by many names, and OPT's by none: what is not in attention is in one.
        kind = _first(_IN_ATTENTION if _ATTENTION_BLOCK.search(path) else _IN_MLP, path)
        if kind in MLP and _EXPERT_BLOCK.search(path):
            kind = BIASES if path.endswith("_bias") else f"expert {kind}"
    return Role(kind or "other", layer, expert)


def is_matrix(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor is a matrix or a stack of them."""
    return len(shape) >= 2 and role_of(name).type != BIASES


def token_embedding(shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """Of named tensors the one that embeds tokens: of several that do not embed positions, that with the most rows."""
    found = [
        n for n, s in shapes.items() if len(s) == 2 and role_of(n).type == "embedding" and not _POSITIONS.search(n)
    ]
    return max(found, key=lambda n: shapes[n][0], default=None)


def _first(rules: list[tuple[str, str]], path: str) -> str | None:
    return next((kind for kind, pattern in rules if re.search(rf"(?:^|\.)(?:{pattern})$", path)), None)


def third(layer: int | None, layers: int) -> str:
    """Which third of the depth the middle of a layer is in: bottom, middle or top; "outside" for what is in no layer,
    "whole" for an only one.
    """
    if layer is None:
        return "outside"
    return "whole" if layers == 1 else ("bottom", "middle", "top")[(2 * layer + 1) * 3 // (2 * layers)]
