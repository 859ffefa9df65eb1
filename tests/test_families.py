"""Blocks and roles of really different families, of the models that transformers builds: what moves by default is their
attention and MLP, and the analysis calls it so."""

import pytest
import torch

from effopd_kernels.analysis.roles import role_of
from effopd_kernels.extrapolation.selection import DEFAULT_EXCLUDE, DEFAULT_INCLUDE, compiled, named_tensors, select

transformers = pytest.importorskip("transformers")

SIZES = dict(
    vocab_size=30, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=2, head_dim=8,
)  # fmt: skip
MOE = dict(num_experts=2, n_routed_experts=2, num_local_experts=2, num_experts_per_tok=1, moe_intermediate_size=8)
MLA = dict(q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=4)
MAMBA = dict(mamba_n_heads=4, mamba_d_head=8, mamba_d_state=4, mamba_n_groups=1)
BOTH = {"attention", "mlp"}
# Model type: its own options, and the parts that each layer has, BERT's head apart.
FAMILIES = {
    "bert": ({"is_decoder": True}, [BOTH] * 2),
    "deepseek_v3": ({**MOE, **MLA, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1}, [BOTH] * 2),
    "falcon_h1": ({**MAMBA, "mamba_d_ssm": 32}, [BOTH] * 2),
    "granitemoehybrid": (
        {**MOE, **MAMBA, "shared_intermediate_size": 24, "layer_types": ["mamba", "attention"]},
        [BOTH] * 2,
    ),
    "gpt_oss": (MOE, [BOTH] * 2),
    "lfm2": ({"layer_types": ["conv", "full_attention"]}, [BOTH] * 2),
    "mamba": ({}, [{"attention"}] * 2),
    "nemotron_h": (
        {**MOE, "num_hidden_layers": 3, "layers_block_type": ["mamba", "attention", "moe"], "mamba_num_heads": 4,
         "mamba_head_dim": 8, "ssm_state_size": 4, "n_groups": 1},
        [{"attention"}, {"attention"}, {"mlp"}],
    ),
    "qwen3_next": ({**MOE, "layer_types": ["linear_attention", "full_attention"]}, [BOTH] * 2),
    "recurrent_gemma": ({"num_hidden_layers": 3, "lru_width": 16}, [BOTH] * 3),
    "rwkv": ({}, [BOTH] * 2),
    "xlstm": ({"num_heads": 2}, [BOTH] * 2),
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_move_and_have_roles(family):
    own, parts = FAMILIES[family]
    config = transformers.AutoConfig.for_model(family, **SIZES | own)
    with torch.device("meta"):
        named = named_tensors(transformers.AutoModelForCausalLM.from_config(config))
    moves = select(named, compiled("include", DEFAULT_INCLUDE), compiled("exclude", DEFAULT_EXCLUDE))
    roles = {name: role_of(name) for name in named}
    found = [{r.part for r in roles.values() if r.layer == i and r.part in BOTH} for i in range(len(parts))]
    assert found == parts
    for name, role in roles.items():
        in_layer = role.layer is not None and role.type != "norm"
        assert (name in moves) == in_layer, name
        assert in_layer or role.type in ("norm", "embedding", "head", "other"), name
        # The matrices that are nothing of the kind: short convolutions, and what makes the decay of a state.
        if role.type == "other" and named[name].ndim == 2:
            assert any(part in name for part in ("A_log", "x_proj", "dt_proj", "rg_lru", "cls.")), name
