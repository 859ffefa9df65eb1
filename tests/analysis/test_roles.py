"""Names of the Hugging Face families, by role."""

import pytest

from effopd_kernels.analysis.roles import TYPES, Role, block_of, is_matrix, role_of, third, token_embedding

NAMES = {
    "model.embed_tokens.weight": Role("embedding"),
    "model.layers.7.self_attn.q_proj.weight": Role("q", 7),
    "model.layers.7.self_attn.q_proj.bias": Role("q", 7),
    "model.layers.7.self_attn.q_norm.weight": Role("norm", 7),
    "model.layers.17.self_attn.o_proj.weight": Role("o", 17),
    "model.layers.17.self_attn.o_gate_proj.weight": Role("attention gate", 17),
    "transformer.h.3.mlp.c_fc_0.weight": Role("gate", 3),
    "transformer.h.3.mlp.c_fc_1.weight": Role("up", 3),
    "score.weight": Role("head"),
    "rwkv.head.weight": Role("head"),
    "model.layers.61.shared_head.head.weight": Role("head", 61),
    "model.layers.7.mlp.gate_proj.weight": Role("gate", 7),
    "model.layers.7.mlp.down_proj.weight": Role("down", 7),
    "model.layers.7.post_attention_layernorm.weight": Role("norm", 7),
    "model.norm.weight": Role("norm"),
    "lm_head.weight": Role("head"),
    # GPT-2, GPT-NeoX, OPT, Falcon, MPT, DBRX, InternLM, Phi-3
    "transformer.wte.weight": Role("embedding"),
    "transformer.h.3.attn.c_attn.weight": Role("qkv", 3),
    "transformer.h.3.attn.c_proj.weight": Role("o", 3),
    "transformer.h.3.mlp.c_fc.weight": Role("up", 3),
    "transformer.h.3.mlp.c_proj.weight": Role("down", 3),
    "transformer.ln_f.weight": Role("norm"),
    "gpt_neox.layers.2.attention.query_key_value.weight": Role("qkv", 2),
    "gpt_neox.layers.2.attention.dense.weight": Role("o", 2),
    "gpt_neox.layers.2.mlp.dense_4h_to_h.bias": Role("down", 2),
    "embed_out.weight": Role("head"),
    "model.decoder.layers.0.fc1.weight": Role("up", 0),
    "model.decoder.layers.0.self_attn_layer_norm.weight": Role("norm", 0),
    "transformer.h.0.self_attention.dense.weight": Role("o", 0),
    "transformer.blocks.4.attn.Wqkv.weight": Role("qkv", 4),
    "transformer.blocks.0.norm_attn_norm.norm_1.weight": Role("norm", 0),
    "transformer.blocks.0.norm_attn_norm.attn.Wqkv.weight": Role("qkv", 0),
    "model.layers.5.attention.wo.weight": Role("o", 5),
    "model.layers.1.mlp.gate_up_proj.weight": Role("gate_up", 1),
    # mixtures of experts, one by one and stacked; shared ones; the router
    "model.layers.3.block_sparse_moe.experts.5.w2.weight": Role("expert down", 3, 5),
    "model.layers.3.mlp.experts.12.gate_proj.weight": Role("expert gate", 3, 12),
    "model.layers.3.mlp.experts.gate_up_proj": Role("expert gate_up", 3),
    "model.layers.3.mlp.experts.gate_up_proj_bias": Role("expert bias", 3),
    "model.layers.3.mlp.shared_expert.up_proj.weight": Role("expert up", 3),
    "model.layers.3.mlp.gate.weight": Role("router", 3),
    "model.layers.3.block_sparse_moe.gate.weight": Role("router", 3),
    # latent and linear attention
    "model.layers.1.self_attn.kv_a_proj_with_mqa.weight": Role("kv", 1),
    "model.layers.1.self_attn.q_b_proj.weight": Role("q", 1),
    "model.layers.1.linear_attn.in_proj_qkvz.weight": Role("qkv", 1),
    # T5, BERT
    "encoder.block.2.layer.0.SelfAttention.q.weight": Role("q", 2),
    "encoder.block.2.layer.1.DenseReluDense.wi.weight": Role("up", 2),
    "encoder.block.2.layer.1.DenseReluDense.wi_0.weight": Role("gate", 2),
    "bert.encoder.layer.9.attention.self.query.weight": Role("q", 9),
    "bert.encoder.layer.9.attention.output.dense.weight": Role("o", 9),
    "bert.encoder.layer.9.intermediate.dense.weight": Role("up", 9),
    "bert.encoder.layer.9.output.dense.weight": Role("down", 9),
    # what mixes tokens in attention's place: Mamba, Nemotron-H (which calls every block a mixer), LFM2, Griffin, RWKV
    "model.layers.1.mamba.in_proj.weight": Role("qkv", 1),
    "model.layers.1.mamba.conv1d.weight": Role("other", 1),
    "model.layers.1.mixer.out_proj.weight": Role("o", 1),
    "model.layers.1.mixer.k_proj.weight": Role("k", 1),
    "model.layers.1.mixer.experts.3.down_proj.weight": Role("expert down", 1, 3),
    "model.layers.1.mixer.up_proj.weight": Role("up", 1),
    "model.layers.1.mixer.gate.weight": Role("router", 1),
    "model.layers.1.conv.in_proj.weight": Role("qkv", 1),
    "model.layers.1.temporal_block.linear_y.weight": Role("attention gate", 1),
    "model.layers.1.mlp_block.gate_proj.weight": Role("gate", 1),
    "rwkv.blocks.1.attention.receptance.weight": Role("attention gate", 1),
    "rwkv.blocks.1.feed_forward.key.weight": Role("up", 1),
    # gates of attention are not the feed-forward's
    "model.layers.1.self_attn.gate_proj.weight": Role("attention gate", 1),
    "model.layers.1.linear_attn.in_proj_z.weight": Role("attention gate", 1),
    "model.layers.1.linear_attn.q_conv1d.weight": Role("other", 1),
    "model.layers.1.self_attn.forget_gate.f_a_proj.weight": Role("attention gate", 1),
    "model.layers.1.self_attn.output_gate.weight": Role("attention gate", 1),
    "model.gated_cross_attn_layers.1.mlp.gate_proj.weight": Role("gate", 1),
    "model.gated_cross_attn_layers.1.cross_attn.o_proj.weight": Role("o", 1),
    # Aria, JetMoe, Zaya, Inkling, CPM-Ant
    "model.layers.1.mlp.experts.fc1.weight": Role("expert gate_up", 1),
    "model.layers.1.mlp.experts.3.fc1.weight": Role("expert up", 1, 3),
    "model.layers.1.mlp.input_linear.weight": Role("expert gate_up", 1),
    "model.layers.1.self_attention.experts.input_linear.weight": Role("q", 1),
    "model.layers.1.mlp.gate.down_proj.weight": Role("router", 1),
    "model.layers.1.mlp.gate.router_mlp.out_proj.weight": Role("router", 1),
    "model.llm.layers.1.attn.wk_dv.weight": Role("k", 1),
    "model.llm.layers.1.attn.wo_ud.weight": Role("o", 1),
    "model.llm.layers.1.attn.gate_attn.weight": Role("attention gate", 1),
    "model.llm.layers.1.mlp.experts.w13_weight": Role("expert gate_up", 1),
    "model.llm.layers.1.mlp.experts.w2_weight": Role("expert down", 1),
    "cpmant.encoder.layers.1.self_att.self_attention.project_v.weight": Role("v", 1),
    "cpmant.encoder.layers.1.self_att.self_attention.attention_out.weight": Role("o", 1),
    "cpmant.encoder.layers.1.ffn.ffn.w_in.w_0.weight": Role("gate", 1),
    "cpmant.encoder.layers.1.ffn.ffn.w_in.w_1.weight": Role("up", 1),
    "cpmant.encoder.layers.1.ffn.ffn.w_out.weight": Role("down", 1),
    # Granite, LongCat, XLM, DeepSeek's own names, Blt, Llama's own names
    "model.layers.1.block_sparse_moe.input_linear.weight": Role("expert gate_up", 1),
    "model.layers.1.shared_mlp.output_linear.weight": Role("down", 1),
    "model.layers.1.mlps.0.up_proj.weight": Role("up", 1),
    "transformer.attentions.1.q_lin.weight": Role("q", 1),
    "transformer.ffns.1.lin2.weight": Role("down", 1),
    "layers.1.attn.wo_b.weight": Role("o", 1),
    "model.local_decoder.cross_attn_layers.1.q_proj.weight": Role("q", 1),
    "output.weight": Role("head"),
    # CTRL, ProphetNet, A.X K2, whose norms hold gates
    "transformer.h.1.ffn.0.weight": Role("up", 1),
    "transformer.h.1.ffn.2.bias": Role("down", 1),
    "prophetnet.decoder.layers.1.feed_forward.intermediate.weight": Role("up", 1),
    "prophetnet.decoder.layers.1.feed_forward.output.weight": Role("down", 1),
    "model.layers.1.input_layernorm.mlp.fc1.weight": Role("norm", 1),
    "roberta_prelayernorm.encoder.layer.1.attention.self.query.weight": Role("q", 1),
    # what no rule knows, and layers that are numbered anew
    "mtp.layers.0.self_attn.q_proj.weight": Role("other"),
    "model.layers.1.linear_attn.A_log": Role("other", 1),
    "model.layers.0.self_attn.rotary_emb.inv_freq": Role("other", 0),
    "visual.blocks.3.attn.qkv.weight": Role("other"),
    "model.video_tower.encoder.layers.1.mlp.fc1.weight": Role("other"),
    "model.connector.perceiver_resampler.layers.0.self_attn.q_proj.weight": Role("other"),
    "qformer.encoder.layer.0.attention.attention.query.weight": Role("other"),
    "model.protein_encoder.model.embeddings.word_embeddings.weight": Role("other"),
    "classifier.weight": Role("other"),
    # numbers that count nothing
    "model.layers.1234567.mlp.up_proj.weight": Role("other"),
    "model.layers.1.mlp.experts.1234567.up_proj.weight": Role("expert up", 1),
}


@pytest.mark.parametrize("name", NAMES)
def test_role_by_name(name):
    assert role_of(name) == NAMES[name] and role_of(name).type in TYPES


def test_parts():
    parts = {
        "q": "attention",
        "qkv": "attention",
        "o": "attention",
        "gate": "mlp",
        "expert down": "mlp",
        "norm": "norm",
    }
    assert {kind: Role(kind).part for kind in parts} == parts


@pytest.mark.parametrize(
    "block, names",
    {
        "attention": "mixer.x_proj.weight mixer.A_log mixer.conv1d.weight self_attn.sinks linear_attn.dt_bias "
        "self_attn.forget_gate.A_log conv.conv.weight temporal_block.rg_lru.input_gate_weight mixer.in_proj.weight",
        "mlp": "mlp.gate.weight mlp.gate.e_score_correction_bias mixer.gate.e_score_correction_bias mlp.expert_bias "
        "feed_forward.time_mix_key mlp.experts.down_proj_bias mlp.experts.3.up_proj.weight",
        None: "self_attn.q_norm.weight per_layer_input_gate.weight",
    }.items(),
    ids=str,
)  # fmt: skip
def test_a_block_is_more_than_its_projections(block, names):
    for name in names.split():
        assert block_of(f"model.layers.3.{name}") == block, name


def test_what_is_in_no_layer_is_in_no_block():
    assert {block_of(n) for n in ("lm_head.weight", "visual.blocks.3.attn.qkv.weight", "mtp.layers.0.mlp.x")} == {None}


def test_thirds_of_the_depth():
    assert [third(i, 6) for i in range(6)] == ["bottom"] * 2 + ["middle"] * 2 + ["top"] * 2
    assert [third(i, 4) for i in range(4)] == ["bottom", "middle", "middle", "top"]
    assert [third(i, 2) for i in range(2)] == ["bottom", "top"] and third(None, 6) == "outside"
    assert third(0, 1) == "whole" and third(None, 1) == "outside"


def test_a_stack_of_biases_is_no_matrix():
    experts = "model.layers.3.mlp.experts."
    assert is_matrix(f"{experts}down_proj", (4, 8, 6)) and not is_matrix(f"{experts}down_proj_bias", (4, 8))
    assert not is_matrix("model.layers.3.linear_attn.conv1d.weight", (8, 1, 4))
    assert is_matrix("lm_head.weight", (9, 8)) and not is_matrix("model.norm.weight", (8,))
    assert Role("expert bias").part not in ("mlp", "attention")  # whose matrices have a spectrum


@pytest.mark.parametrize(
    "tokens, positions",
    [("wte.weight", "wpe.weight"), ("model.decoder.embed_tokens.weight", "model.decoder.embed_positions.weight"),
     ("bert.embeddings.word_embeddings.weight", "bert.embeddings.position_embeddings.weight")],
)  # fmt: skip
def test_positions_are_no_tokens_however_many(tokens, positions):
    shapes = {tokens: (17, 8), positions: (32, 8), "model.norm.weight": (8,), "extra_embedding": (3, 8)}
    assert token_embedding(shapes) == tokens
    assert token_embedding({"model.norm.weight": (8,)}) is None
