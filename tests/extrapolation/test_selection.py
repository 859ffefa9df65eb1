"""The default moves attention and MLP weights, and nothing else, in the spellings of the Hugging Face families."""

import re
from textwrap import dedent

import pytest
import torch

from effopd_kernels.extrapolation import EffOPDController
from effopd_kernels.extrapolation.selection import DEFAULT_EXCLUDE, DEFAULT_INCLUDE, compiled, named_tensors, select

MOVES = dedent("""
    model.layers.0.self_attn.q_proj.weight model.layers.0.self_attn.q_proj.bias model.layers.0.mlp.gate_up_proj.weight
    model.layers.3.mlp.experts.gate_up_proj model.layers.3.mlp.experts.7.down_proj.weight model.layers.3.mlp.gate.weight
    model.layers.0.block_sparse_moe.experts.0.w1.weight model.layers.0.mlp.shared_expert.up_proj.weight
    model.layers.0.self_attn.kv_a_proj_with_mqa.weight model.layers.0.linear_attn.in_proj_qkvz.weight
    model.layers.0.feed_forward.w2.weight transformer.h.0.attn.c_attn.weight transformer.h.0.mlp.c_fc.bias
    gpt_neox.layers.0.attention.query_key_value.weight gpt_neox.layers.0.mlp.dense_h_to_4h.weight
    transformer.h.1.self_attention.dense.weight model.decoder.layers.0.fc1.weight
    transformer.blocks.0.ffn.up_proj.weight transformer.blocks.0.norm_attn_norm.attn.Wqkv.weight
    model.language_model.layers.0.self_attn.o_proj.weight
    model.layers.0.mixer.in_proj.weight model.layers.0.mamba.out_proj.weight model.layers.0.conv.in_proj.weight
    model.layers.0.temporal_block.linear_x.weight model.layers.0.mlp_block.up_proj.weight
    model.layers.0.shared_mlp.input_linear.weight model.layers.0.mlps.1.up_proj.weight
    backbone.blocks.0.mlstm_layer.q.weight bert.encoder.layer.0.attention.self.query.weight
    bert.encoder.layer.0.intermediate.dense.weight bert.encoder.layer.0.output.dense.weight
    encoder.block.2.layer.0.SelfAttention.q.weight decoder.block.1.layer.2.DenseReluDense.wi_0.weight
    encoder.layers.3.ff1.up_proj.weight transformer.attentions.0.q_lin.weight
    model.decoder.layers.0.encoder_attn.q_proj.weight transformer.layer.0.rel_attn.q
    model.cross_attn_layers.0.q_proj.weight
    base_model.model.model.layers.0.self_attn.q_proj.modules_to_save.default.weight
    layers.0.linear1.weight decoder.layers.3.linear2.bias layers.0.multihead_attn.in_proj_weight
    roberta_prelayernorm.encoder.layer.0.output.dense.weight
    blocks.0.feedforward.w1.weight blocks.0.MLP.0.weight blocks.0.FeedForward.net.weight h.0.ffwd.2.weight
""").split()

STAYS = dedent("""
    model.embed_tokens.weight lm_head.weight model.norm.weight model.layers.0.input_layernorm.weight
    model.layers.0.post_attention_layernorm.weight model.layers.0.self_attn.q_norm.weight
    model.layers.0.self_attn.kv_a_layernorm.weight model.layers.0.pre_feedforward_layernorm.weight
    model.layers.0.self_attn_layer_norm.weight model.layers.0.linear_attn.norm.weight
    transformer.wte.weight transformer.wpe.weight transformer.h.0.ln_1.weight transformer.ln_f.bias
    gpt_neox.embed_in.weight embed_out.weight gpt_neox.final_layer_norm.weight
    transformer.word_embeddings_layernorm.weight model.decoder.embed_positions.weight
    transformer.blocks.0.norm_1.weight transformer.blocks.0.norm_attn_norm.norm_1.weight
    model.layers.0.self_attn.rotary_emb.inv_freq score.weight
    bert.encoder.layer.0.attention.output.LayerNorm.weight bert.encoder.layer.0.output.LayerNorm.weight
    cpmant.encoder.layers.0.ffn.layernorm_before_ffn.weight backbone.blocks.0.mlstm_layer.multihead_norm.weight
    transformer.h.0.ln_attn.weight transformer.h.0.ln_mlp.bias transformer.layer.0.rel_attn.seg_embed
    decoder.layers.0.self_attention.linear_qkv.layer_norm_weight model.layers.0.mixer.norm.weight
    cls.predictions.transform.dense.weight lm_head.dense.weight
    base_model.model.model.layers.0.self_attn.q_norm.modules_to_save.default.weight
    base_model.model.model.layers.0.self_attn.q_norm.original_module.weight
    model.layers.0.input_layernorm.mlp.fc1.weight model.layers.0.input_layernorm.norm.weight
""").split()


def chosen(named, include=DEFAULT_INCLUDE, exclude=DEFAULT_EXCLUDE):
    return select(named, compiled("include", include), compiled("exclude", exclude))


def test_default_patterns():
    named = {name: torch.zeros(1) for name in MOVES + STAYS}
    assert list(chosen(named)) == MOVES


def test_real_models_split_into_blocks_and_the_rest():
    transformers = pytest.importorskip("transformers")
    sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, vocab_size=30)
    configs = [
        transformers.Qwen3Config(**sizes, num_key_value_heads=1, head_dim=8),
        transformers.Gemma2Config(**sizes, num_key_value_heads=1, head_dim=8),
        transformers.MixtralConfig(**sizes, num_key_value_heads=1, num_local_experts=2),
        transformers.GPTNeoXConfig(**sizes),
        transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=30),
        transformers.OPTConfig(
            hidden_size=16,
            ffn_dim=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            vocab_size=30,
            word_embed_proj_dim=16,
        ),
    ]
    for config in configs:
        with torch.device("meta"):
            named = named_tensors(transformers.AutoModelForCausalLM.from_config(config))
        moves = chosen(named)
        left = [name for name, t in named.items() if name not in moves]
        assert all(
            named[name].ndim == 1 or named[name].shape[0] == 30 or "embed" in name or "wpe" in name for name in left
        )
        matrices = [name for name, t in named.items() if t.ndim >= 2 and (".layers." in name or ".h." in name)]
        assert matrices and set(matrices) <= set(moves), config.model_type


def test_own_patterns():
    named = {"a.down_proj.weight": torch.zeros(1), "a.up_proj.weight": torch.zeros(1), "b": torch.zeros(1)}
    assert list(chosen(named, "proj", ())) == ["a.down_proj.weight", "a.up_proj.weight"]
    assert list(chosen(named, ["."], ["proj"])) == ["b"]
    assert list(chosen(named, re.compile("PROJ", re.IGNORECASE), [re.compile("up")])) == ["a.down_proj.weight"]


def test_nothing_left_is_an_error_that_names_patterns_and_parameters():
    with pytest.raises(ValueError, match=r"'attn'.*leave none of 1 \(the first: backbone\.w\)"):
        chosen({"backbone.w": torch.zeros(1)}, "attn", ())
    with pytest.raises(ValueError, match="none that requires a gradient"):
        EffOPDController(torch.nn.Linear(2, 2).requires_grad_(False), lambda: 0.0, include="", exclude=())


@pytest.mark.parametrize(
    "patterns, words",
    [
        ("[", r": '\[' is not a regular expression: "),
        (["mlp", "["], r": '\[' is not a regular expression: "),
        ([3], ": 3 is not a regular expression: "),
        (None, r" must be a regular expression or a sequence of them, \(\) for none"),
        (3, r" must be a regular expression or a sequence of them, \(\) for none"),
    ],
)
def test_what_is_no_regular_expression_is_named(patterns, words):
    with pytest.raises(ValueError, match=f"exclude{words}"):
        compiled("exclude", patterns)


def test_names_lose_wrappers_and_tied_or_frozen_tensors_are_left_out():
    linear = torch.nn.Linear(2, 2)
    named = named_tensors([("module._orig_mod.a.weight", linear.weight), ("b.weight", linear.weight)])
    assert list(named) == ["a.weight"]
    linear.bias.requires_grad_(False)
    assert list(named_tensors(linear)) == ["weight", "bias"]
    assert EffOPDController(linear, lambda: 0.0, include="").weights.names == ["weight"]
    assert list(named_tensors({"plain": torch.zeros(1)})) == ["plain"]
    with pytest.raises(ValueError, match=r"two different tensors are named 'a\.w'"):
        named_tensors([("a.w", torch.zeros(1)), ("module.a.w", torch.zeros(1))])
    with pytest.raises(TypeError, match="named tensors"):
        named_tensors([torch.zeros(2)])
    with pytest.raises(TypeError, match="named tensors"):
        named_tensors(torch.nn.Linear(2, 3).parameters())


def test_matrices_that_the_default_does_not_know_are_told(caplog):
    """Half a block that stays behind would be a jump along another line."""
    block = {"self_attn": torch.nn.Linear(4, 4), "mix": torch.nn.Linear(4, 4), "norm": torch.nn.LayerNorm(4)}
    net = torch.nn.ModuleDict({"layers": torch.nn.ModuleList([torch.nn.ModuleDict(block)])})
    EffOPDController(net, lambda: 0.0)
    (record,) = caplog.records
    assert "1 matrices in layers do not move (layers.0.mix.weight" in record.getMessage()
    caplog.clear()
    EffOPDController(net, lambda: 0.0, include=("self_attn",))
    EffOPDController(net, lambda: 0.0, exclude=(*DEFAULT_EXCLUDE, r"\.mix\."))
    assert not caplog.records
