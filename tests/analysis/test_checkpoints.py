"""What can be opened, what is refused and in which words."""

import errno
import json
import math
import os
import platform
import shlex
import shutil
import subprocess
import sys

import pytest
import torch
from analysis import planted
from analysis.planted import lora
from safetensors.torch import save_file

from effopd_kernels import tensor_files as files
from effopd_kernels.analysis import cli, measure
from effopd_kernels.analysis.comparison import compare
from effopd_kernels.analysis.matrix import Options
from effopd_kernels.analysis.output import check_free
from effopd_kernels.errors import UserError

Q, EMBEDDING = "model.layers.0.self_attn.q_proj.weight", "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return planted.write(tmp_path_factory.mktemp("base") / "base", planted.base_weights())


def factors(module, m, n, rank=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(rank, n, generator=generator), torch.randn(m, rank, generator=generator)
    return {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}, b @ a


def update(comparison, name, trajectory="run", position=-1):
    checkpoint = comparison.trajectories[trajectory][position]
    weight = comparison.base.read(name)
    a, b = checkpoint.pair(name, weight)
    return a.double() - (0 if b is None else b.double())


@pytest.mark.parametrize(
    "config, scale",
    [
        ({"init_lora_weights": "eva"}, 2.0),
        ({"use_rslora": True}, 4.0),
        ({"alpha_pattern": {"q_proj": 2}}, 0.5),
        ({"alpha_pattern": {"q": 2, "layers.0": 2}}, 2.0),  # neither is its name or the ending of it
    ],
)
def test_lora_is_its_merged_product(base, tmp_path, config, scale):
    pair, product = factors(Q.removesuffix(".weight"), 64, 64)
    comparison = compare(base, {"run": [lora(tmp_path / "adapter", pair, **config)]})
    torch.testing.assert_close(update(comparison, Q), scale * product.double(), rtol=1e-6, atol=1e-6)
    assert not update(comparison, "model.layers.1.self_attn.q_proj.weight").any()


def test_an_adapter_as_peft_saves_it(base, tmp_path):
    """The product is what peft adds to the weight, module by module, rank by rank."""
    peft = pytest.importorskip("peft")
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=20, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, tie_word_embeddings=False,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config)
    model.save_pretrained(tmp_path / "base")
    adapted = peft.get_peft_model(
        model,
        peft.LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "down_proj", "embed_tokens"],
                        rank_pattern={"q_proj": 2}, modules_to_save=["norm"]),
    )  # fmt: skip
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    before = {k: v.clone() for k, v in Qwen3ForCausalLM.from_pretrained(tmp_path / "base").state_dict().items()}
    after = adapted.merge_and_unload().state_dict()
    comparison = compare(tmp_path / "base", {"run": [tmp_path / "adapter"]})
    assert set(comparison.names) == set(before)
    for name in comparison.names:
        expected = (after[name] - before[name]).double()
        torch.testing.assert_close(update(comparison, name), expected, rtol=1e-4, atol=1e-6)
    assert update(comparison, "model.norm.weight").any() and update(comparison, EMBEDDING).any()


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.parametrize("vocabulary", [40, 16])  # 16: the head is square too
@pytest.mark.parametrize("targets", [["attn.c_proj", "lm_head"], ["c_attn", "lm_head"], ["c_attn", "c_proj", "wte"]])
def test_layers_that_lie_the_other_way_as_peft_saves_them(tmp_path, targets, vocabulary):
    """GPT-2's are Conv1D, (in, out); its head is not, and peft notes for all of them what the last one is."""
    peft = pytest.importorskip("peft")
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=vocabulary, n_embd=16, n_layer=1, n_head=2, n_positions=8, tie_word_embeddings=False)
    model = GPT2LMHeadModel(config)
    model.save_pretrained(tmp_path / "base")
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=3, target_modules=targets, init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    after = adapted.merge_and_unload().state_dict()
    comparison = compare(tmp_path / "base", {"run": [tmp_path / "adapter"]})
    for name in comparison.names:
        expected = (after[name] - comparison.base.read(name)).double()
        torch.testing.assert_close(update(comparison, name), expected, rtol=1e-4, atol=1e-6)
        assert expected.any() == any(f"{target}.weight" in name for target in targets)


def test_the_companion_of_extrapolation_adds(base, tmp_path):
    module = Q.removesuffix(".weight")
    (pair, product), (other, more) = factors(module, 64, 64), factors(module, 64, 64, rank=8, seed=1)
    folder = lora(tmp_path / "adapter", pair)
    lora(folder / "effopd", other, r=8, lora_alpha=8)
    comparison = compare(base, {"run": [folder]})
    torch.testing.assert_close(update(comparison, Q), (2 * product + more).double(), rtol=1e-5, atol=1e-5)


def test_a_merged_model_beside_its_adapter_is_a_model(tmp_path):
    folder = lora(tmp_path / "run", factors(Q.removesuffix(".weight"), 64, 64)[0])
    planted.write(folder, planted.base_weights())
    assert not update(compare(folder, {"run": [folder]}), Q).any()


def test_blocks_of_rows_are_the_whole(base, tmp_path, monkeypatch):
    """Of a model, and of factors: an embedding's lie the other way."""
    vocabulary, hidden = planted.SHAPES[EMBEDDING]
    head, (turned, _) = factors("lm_head", vocabulary, hidden)[0], factors("x", hidden, vocabulary)
    turned = {f"model.embed_tokens.lora_embedding_{x}": turned[f"x.lora_{x}.weight"] for x in "AB"}
    moved = planted.write(tmp_path / "run", planted.moved(planted.base_weights(), planted.noise(1)))
    comparison = compare(base, {"run": [moved], "lora": [lora(tmp_path / "adapter", {**head, **turned})]})
    found = []
    for block in (measure.BLOCK, 7 * hidden):
        monkeypatch.setattr(measure, "BLOCK", block)
        found.append([measure.measure(comparison, n, Options(), True) for n in (EMBEDDING, "lm_head.weight")])
    for whole, blocks in zip(*found, strict=True):
        numbers = ([v for row in m.rows for v in row.values() if isinstance(v, float)] for m in (blocks, whole))
        torch.testing.assert_close(*numbers, rtol=1e-6, atol=0)
        for t, columns in whole.tokens.items():
            torch.testing.assert_close(blocks.tokens[t], columns, rtol=1e-5, atol=1e-6)
    assert measure._blocks((50, hidden))[-2:] == [slice(42, 49), slice(49, 50)]


def test_sharded_mixed_and_wrapped_checkpoints(base, tmp_path):
    weights = planted.moved(planted.base_weights(), lambda name, w: torch.full_like(w, 0.5, dtype=torch.float64))
    weights = {n: (t.bfloat16() if "mlp" in n else t) for n, t in weights.items()}
    folder = planted.write_sharded(tmp_path / "sharded", {f"module.{n}": t for n, t in weights.items()})
    comparison = compare(base, {"run": [folder]})
    assert set(comparison.names) == set(planted.SHAPES)
    for name in comparison.names:
        expected = 0.5 * torch.ones(planted.SHAPES[name], dtype=torch.float64)
        torch.testing.assert_close(update(comparison, name), expected, atol=2e-2 if "mlp" in name else 1e-6, rtol=0)


def test_of_several_files_those_are_read_that_transformers_reads(base, tmp_path):
    """A shard's index that saving over a sharded folder left behind; the same weights in Mistral's own format, beside
    shards too that were downloaded without their index."""
    weights = planted.base_weights()
    stale = planted.write_sharded(tmp_path / "stale", weights)
    shards = sorted(stale.glob("model-*.safetensors"))
    shards[0].unlink()
    planted.write(stale, planted.moved(weights, planted.noise(1)))
    both = planted.write(tmp_path / "both", weights)
    save_file({"norm.weight": torch.zeros(3), Q: weights[Q] + 1}, both / "consolidated.safetensors")
    save_file(dict.fromkeys([Q], weights[Q]), planted.write_sharded(tmp_path / "more", weights) / "again.safetensors")
    shards = planted.write_sharded(tmp_path / "no_index", weights)
    (shards / "model.safetensors.index.json").unlink()
    shutil.copy(both / "consolidated.safetensors", shards)
    comparison = compare(base, {"run": [stale, both, tmp_path / "more", shards]})
    assert [bool(update(comparison, Q, position=i).any()) for i in range(4)] == [True, False, False, False]


@pytest.mark.parametrize("base_stores", [True, False])
@pytest.mark.parametrize("other_stores", [True, False])
def test_tied_heads_count_once(tmp_path, base_stores, other_stores):
    weights = planted.base_weights()
    weights["lm_head.weight"] = weights[EMBEDDING]

    def stored(folder, tensors, head):
        tensors = {n: t.clone() for n, t in tensors.items() if head or n != "lm_head.weight"}
        return planted.write(folder, tensors, {"tie_word_embeddings": True})

    comparison = compare(
        stored(tmp_path / "base", weights, base_stores), {"run": [stored(tmp_path / "other", weights, other_stores)]}
    )
    assert "lm_head.weight" not in comparison.names and EMBEDDING in comparison.names
    assert bool(comparison.notes) == (base_stores or other_stores)  # it says so where there was one to drop


def test_the_bias_of_a_tied_head_is_its_own(tmp_path):
    weights = planted.base_weights() | {"lm_head.bias": torch.zeros(planted.VOCABULARY)}
    tied = {"tie_word_embeddings": True}
    other = planted.write(tmp_path / "other", weights | {"lm_head.bias": torch.ones(planted.VOCABULARY)}, tied)
    comparison = compare(planted.write(tmp_path / "base", weights, tied), {"run": [other]})
    assert "lm_head.bias" in comparison.names and update(comparison, "lm_head.bias").all()


def test_a_head_untied_in_training_is_held_against_the_embedding(tmp_path):
    tied = {n: t for n, t in planted.base_weights().items() if n != "lm_head.weight"}
    start = planted.write(tmp_path / "base", tied, {"tie_word_embeddings": True})
    own = planted.write(tmp_path / "own", {**tied, "lm_head.weight": tied[EMBEDDING] + 1})
    pair, product = factors("x", *planted.SHAPES[EMBEDDING][::-1])
    pair = {f"model.embed_tokens.lora_embedding_{x}": pair[f"x.lora_{x}.weight"] for x in "AB"}
    comparison = compare(start, {"run": [own], "lora": [lora(tmp_path / "adapter", pair)]})
    assert "lm_head.weight" in comparison.names
    torch.testing.assert_close(update(comparison, "lm_head.weight").float(), torch.ones(planted.SHAPES[EMBEDDING]))
    torch.testing.assert_close(update(comparison, "lm_head.weight", "lora").float(), 2 * product.mT)  # still tied


def test_a_head_that_is_not_the_embedding_is_measured_whatever_the_config_says(tmp_path):
    tied = {"tie_word_embeddings": True}
    weights, rows = planted.base_weights(), planted.VOCABULARY - 1
    same = weights | {"lm_head.weight": weights[EMBEDDING].clone()}
    own = same | {"lm_head.weight": same["lm_head.weight"].clone()}
    own["lm_head.weight"][rows, 0] += 1
    start, other = planted.write(tmp_path / "base", same, tied), planted.write(tmp_path / "own", own, tied)
    adapter = lora(tmp_path / "adapter", factors(Q.removesuffix(".weight"), *planted.SHAPES[Q])[0])
    for base, run in ((start, other), (other, start), (other, other)):
        comparison = compare(base, {"run": [run], "lora": [adapter]})
        assert "lm_head.weight" in comparison.names and not comparison.notes
        assert update(comparison, "lm_head.weight").any() == (base is not run)
    assert "lm_head.weight" not in compare(start, {"run": [start], "lora": [adapter]}).names


@pytest.mark.parametrize(
    "prefix, config",
    [("mtp.layers.0", {}), ("model.mtp.layers.0", {}),
     (f"model.layers.{planted.LAYERS}", {"num_hidden_layers": planted.LAYERS, "num_nextn_predict_layers": 1}),
     (f"model.layers.{planted.LAYERS}",
      {"text_config": {"num_hidden_layers": planted.LAYERS, "num_nextn_predict_layers": 1}})],
)  # fmt: skip
def test_layers_for_further_tokens_are_not_in_what_transformers_saves(tmp_path, prefix, config):
    weights = planted.base_weights()
    more = {f"{prefix}.self_attn.q_proj.weight": torch.ones(8, 8), f"{prefix}.eh_proj.weight": torch.ones(8, 16)}
    hub, saved = planted.write(tmp_path / "hub", weights | more, config), planted.write(tmp_path / "saved", weights)
    for base, run in ((hub, saved), (saved, hub)):
        comparison = compare(base, {"run": [run]})
        assert set(comparison.names) == set(weights)
        assert any(note.startswith("For further tokens, not loaded by transformers") for note in comparison.notes)
    assert set(compare(hub, {"run": [hub]}).names) == set(weights | more)
    with pytest.raises(UserError, match="lacks 1 tensor of"):
        less = {n: t for n, t in weights.items() if n != Q}
        compare(hub, {"run": [planted.write(tmp_path / "less", less)]})


def test_experts_that_lie_turned_are_told(tmp_path):
    name = "model.layers.0.mlp.experts.down_proj"
    hub, saved = (planted.write(tmp_path / d, {name: torch.ones(2, *s)}) for d, s in (("a", (8, 6)), ("b", (6, 8))))
    with pytest.raises(UserError, match=r"down_proj \[2, 6, 8\], the base's \[2, 8, 6\]; they lie turned"):
        compare(hub, {"run": [saved]})


def test_names_and_buffers_that_transformers_forgives(tmp_path):
    """GPT-2's on the hub have no `transformer.` and hold their masks; Llama 2's hold rotary frequencies."""
    names = ("wte.weight", "h.0.attn.c_attn.weight", "h.0.attn.c_attn.bias")
    short = {name: torch.ones(8, 8) if "weight" in name else torch.ones(8) for name in names}
    long = {f"transformer.{name}": tensor + 1 for name, tensor in short.items()}
    short |= {"h.0.attn.bias": torch.ones(1, 1, 4, 4), "h.0.attn.masked_bias": torch.tensor(-1e4)}
    short["h.0.attn.rotary_emb.inv_freq"] = torch.ones(2)
    with_masks = {f"transformer.{name}" for name in short}
    pair, product = factors("transformer.h.0.attn.c_attn", 8, 8)
    hub, saved = planted.write(tmp_path / "hub", short), planted.write(tmp_path / "saved", long)
    adapter = lora(tmp_path / "adapter", pair)
    of_hub = lora(tmp_path / "adapter of the hub's", factors("h.0.attn.c_attn", 8, 8)[0])
    with pytest.raises(UserError, match="adapter of the hub's"):  # names of two kinds: one sentence
        compare(hub, {"run": [of_hub, adapter]})
    for start, run, changed in ((hub, saved, 1.0), (saved, hub, -1.0), (hub, adapter, 2 * product), (hub, hub, 0.0)):
        comparison = compare(start, {"run": [run], "hub": [hub]})
        everywhere = saved not in (start, run)
        assert set(comparison.names) == set(short if start is run else with_masks if everywhere else long)
        assert any(note.startswith("Computed by transformers") for note in comparison.notes) != everywhere
        weight = "h.0.attn.c_attn.weight" if start is run else "transformer.h.0.attn.c_attn.weight"
        torch.testing.assert_close(update(comparison, weight), torch.as_tensor(changed).double().expand(8, 8))


def test_steps_order_checkpoints(base, tmp_path):
    weights = planted.base_weights()
    numbered = [planted.write(tmp_path / f"checkpoint-{step}", weights) for step in (200, 1000, 40)]
    twice = [planted.write(tmp_path / name, weights, step=5) for name in "ab"]
    zero = planted.write(tmp_path / "checkpoint-0", weights)
    unnumbered = [tmp_path / "checkpoint-200", base]
    comparison = compare(base, {"run": numbered, "unnumbered": unnumbered, "twice": twice, "zero": [zero]})
    assert [c.step for c in comparison.trajectories["run"]] == [40, 200, 1000]
    assert comparison.progress["run"] == [0.04, 0.2, 1.0]
    assert comparison.progress["unnumbered"] == comparison.progress["twice"] == [0.5, 1.0]
    assert comparison.progress["zero"] == [1.0]


@pytest.mark.parametrize(
    "name, step",
    [
        ("checkpoint-500", 500), ("global_step40", 40), ("global_step_40", 40), ("run2-step-7", 7),
        ("iter_0000300", 300), ("epoch=1-step=20", 20), ("final-v3", None), ("bf16", None), ("epoch-3", None),
        ("Qwen3-8", None), ("misstep4", None), ("checkpoint-20251130123456123456", None),
    ],
)  # fmt: skip
def test_which_names_tell_a_step(tmp_path, name, step):
    folder = planted.write(tmp_path / name, {Q: torch.ones(2, 2)})
    assert compare(folder, {"run": [folder]}).trajectories["run"][0].step == step


def test_the_folder_one_is_in_has_its_name(tmp_path, monkeypatch):
    folder = planted.write(tmp_path / "checkpoint-5", {Q: torch.ones(2, 2)})
    monkeypatch.chdir(folder)
    assert [c.label for c in compare("../checkpoint-5", {"run": ["."]}).trajectories["run"]] == ["checkpoint-5"]


@pytest.mark.parametrize("noted, step", [(math.inf, 5), (math.nan, 5), (2.5, 5), (1e30, None)])
def test_a_step_that_is_no_whole_number_leaves_the_names_and_one_that_no_table_holds_is_none(tmp_path, noted, step):
    folder = planted.write(tmp_path / "checkpoint-5", {Q: torch.ones(2, 2)}, step=noted)
    assert compare(folder, {"run": [folder]}).trajectories["run"][0].step == step


def test_without_a_step_the_order_given_stays_and_is_said(tmp_path):
    folders = [
        planted.write(tmp_path / name, {Q: torch.ones(2, 2)}) for name in ("checkpoint-100", "checkpoint-9", "final-v3")
    ]
    comparison = compare(folders[0], {"run": folders, "one": folders[2:]})
    assert [c.label for c in comparison.trajectories["run"]] == ["checkpoint-100", "checkpoint-9", "final-v3"]
    assert comparison.progress["run"] == [1 / 3, 2 / 3, 1]
    (note,) = comparison.notes
    assert "run are in the order given, final-v3 last: no step is known of final-v3." in note


def test_a_checkpoint_given_twice_is_said(base, tmp_path):
    folder = planted.write(tmp_path / "checkpoint-5", planted.base_weights())
    (tmp_path / "checkpoint-6").symlink_to(folder)
    assert compare(base, {"a": [folder], "b": [folder]}).notes == []
    (note,) = compare(base, {"a": [folder, tmp_path / "checkpoint-6"]}).notes
    assert note == f"Given more than once in a: {folder}."


def raw(folder, header):
    """A file of 8 bytes whose header says that fp32 vectors lie in these."""
    about = {
        name: {"dtype": "F32", "shape": [2], "data_offsets": place} if isinstance(place, tuple) else place
        for name, place in header.items()
    }
    text = json.dumps(about).encode()
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    return folder


def broken(base, tmp):
    """Arguments that are wrong in one way each → what the one sentence must say."""
    weights = planted.base_weights()

    def stored(name, tensors, **config):
        return planted.write(tmp / name, tensors, config)

    without = {n: t for n, t in weights.items() if "layers.5" not in n}
    headless = {n: t for n, t in weights.items() if n != "lm_head.weight"}
    wide = {n: torch.zeros(*t.shape[:-1], t.shape[-1] + 1) for n, t in weights.items()}
    grown = {n: torch.cat([t, t[:4]]) if t.shape[0] == planted.VOCABULARY else t for n, t in weights.items()}
    shard = planted.write_sharded(tmp / "shard", weights)
    (shard / "model-00002-of-00003.safetensors").unlink()
    unlisted = planted.write_sharded(tmp / "unlisted", weights)
    for file in ("model-00003-of-00003.safetensors", "model.safetensors.index.json"):
        (unlisted / file).unlink()
    index = planted.write_sharded(tmp / "index", weights) / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"a": 3}}')
    outside = planted.write_sharded(tmp / "outside", weights) / index.name
    outside.write_text(json.dumps({"weight_map": {"a": "../base/model.safetensors"}}))
    deep = planted.write_sharded(tmp / "deep", weights) / index.name
    deep.write_text("[" * 100_000)
    array = stored("array", weights)
    (array / "config.json").write_text("[1, 2]")
    nested = stored("nested", weights)
    (nested / "config.json").write_text("[" * 100_000)
    shared, noted = (raw(tmp / name, about) for name, about in (
        ("shared", {"a": (0, 8), "b": (0, 8)}), ("noted", {"__metadata__": [1], "a": (0, 8)}),
    ))  # fmt: skip
    fp4 = raw(tmp / "fp4", {"a": {"dtype": "F4", "shape": [16], "data_offsets": [0, 8]}})
    pointer = stored("pointer", weights)
    (pointer / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    whole_numbers = stored("whole_numbers", {"steps": torch.ones(2, dtype=torch.int64)})
    twofold = stored("twofold", weights | {f"module.{Q}": weights[Q] + 1})
    cut = stored("cut", weights)
    os.truncate(cut / "model.safetensors", (cut / "model.safetensors").stat().st_size - 100)
    garbage = stored("garbage", weights)
    (garbage / "model.safetensors").write_bytes(b"not safetensors at all")
    (garbage / "pytorch_model.bin").touch()  # no reason to convert: there are safetensors
    (tmp / "empty").mkdir()
    cache = tmp / "models--someone--model"
    stored("models--someone--model/snapshots/a1b2", weights)
    (tmp / "used").mkdir()
    (tmp / "used" / "thesis.txt").write_text("x")
    (tmp / "nowhere").symlink_to(tmp / "gone")
    (tmp / "loop").symlink_to(tmp / "loop")
    (tmp / "notes").mkdir()
    shutil.copy(base / "model.safetensors", tmp / "notes" / "model.safetensors")
    (tmp / "notes" / "config.json").write_text("{")
    pair, _ = factors("model.layers.9.self_attn.q_proj", 64, 64)
    whole = {"model.layers.9.self_attn.q_proj.base_layer.weight": torch.ones(64, 64)}  # said once
    adapter = lora(tmp / "adapter", pair | whole)
    own, _ = factors(Q.removesuffix(".weight"), 64, 64)
    dora, kasa = lora(tmp / "dora", own, use_dora=True), lora(tmp / "kasa", own, kasa_config={"beta": 1e-4})
    module, more = Q.removesuffix(".weight"), {}
    for key, value, held in (
        ("lora_bias", True, {f"{module}.lora_B.bias": torch.ones(64)}),
        (
            "trainable_token_indices",
            [3, 5],
            {"model.embed_tokens.token_adapter.trainable_tokens_delta": torch.ones(2, 64)},
        ),
        ("target_parameters", ["mlp.experts.down_proj"], factors("model.layers.0.mlp.experts", 64, 64)[0]),
    ):
        more[key] = lora(tmp / key, own | held, **{key: value})
    pissa = [lora(tmp / start, own, init_lora_weights=start) for start in ("pissa_niter_4", "olora")]
    thin = lora(tmp / "thin", factors(Q.removesuffix(".weight"), 32, 64)[0])
    rows = torch.cat([weights[EMBEDDING], torch.ones(2, weights[EMBEDDING].shape[1])])
    more_tokens = lora(tmp / "more_tokens", {EMBEDDING: rows})  # modules_to_save, after tokens were added
    conv = lora(tmp / "conv", {n: t[..., None] for n, t in own.items()})
    empty = lora(tmp / "no_rank", {n: t[:0] if "lora_A" in n else t[:, :0] for n, t in own.items()})
    null, patterns = lora(tmp / "null", own, lora_alpha=None), lora(tmp / "patterns", own, alpha_pattern={"*": 3})
    fp8, int8, packed = (
        stored(name, {**weights, Q: torch.ones(64, 64).to(dtype), **({f"{Q}{scale}": torch.ones(64)} if scale else {})})
        for name, dtype, scale in (
            ("fp8", torch.float8_e4m3fn, "_scale_inv"), ("int8", torch.int8, ""), ("packed", torch.uint32, ".absmax"),
        )
    )  # fmt: skip

    def case(*checkpoints, start=base, **flags):
        arguments = ["--base", start, "--checkpoints", *checkpoints]
        values = {"output_dir": tmp / "out", **flags}
        return [*arguments, *(part for k, v in values.items() for part in (f"--{k}", v))]

    return {
        "no such base": (case(base, start=tmp / "nobody"), "nobody: no such file or folder; give a local folder, hub"),
        "no such checkpoint": (case(tmp / "nobody"), "nobody: no such file or folder"),
        "nothing in it": (case(tmp / "empty"), "empty: no *.safetensors in this folder\n"),
        "the cache": (case(cache), f"no *.safetensors in this folder; there are in {cache / 'snapshots' / 'a1b2'}\n"),
        "garbage": (case(garbage), "garbage/model.safetensors: damaged or truncated"),
        "missing shard": (case(shard), "names shards that are not there: model-00002-of-00003.safetensors"),
        "no index": (case(unlisted, start=unlisted), "lacks shards that the others' names count: model-00003-of-00003"),
        "bad index": (case(index.parent), "not a safetensors index (its weight_map maps to what is no file's name)"),
        "index leads out": (case(outside.parent), "leads out of the folder, to '../base/model.safetensors'"),
        "deep index": (case(deep.parent), "not a safetensors index (maximum recursion depth"),
        "one place for two": (case(shared), "tensor 'b' begins at byte"),
        "metadata a list": (case(noted), "its __metadata__ is no object"),
        "fp4": (case(fp4), "fp4/model.safetensors: tensor 'a' is quantised (F4); dequantise the"),
        "Git LFS": (case(pointer), "pointer/model.safetensors: a Git LFS pointer, not the file it stands for; run `"),
        "config an array": (case(array), "array/config.json' is unreadable: it holds no JSON object"),
        "deep config": (case(nested), "nested/config.json' is unreadable: maximum recursion depth"),
        "no floats": (case(whole_numbers, start=whole_numbers), "has no floating tensor with entries"),
        "one name twice": (case(twofold), f"twofold holds both {Q} and module.{Q}, which name one tensor"),
        "truncated": (case(cut), "cut/model.safetensors: damaged or truncated"),
        "missing tensors": (case(stored("less", without)), f"less lacks 9 tensors of {base}"),
        "missing tensors named": (case(tmp / "less"), "model.layers.5.input_layernorm.weight"),
        "no head": (case(stored("headless", headless)), "headless lacks 1 tensor of"),  # which says that it is not tied
        "more tensors": (case(base, start=tmp / "less"), f"{tmp / 'less'} lacks 9 tensors of"),
        "other shapes": (case(stored("wide", wide)), "of another shape than the base's"),
        "resized": (case(stored("resized", grown)), "[50, 64]; resize the base's vocabulary first, with resize_token_"),
        "first ten": (case(tmp / "wide"), f"and {len(weights) - 10} more"),
        "other architecture": (case(stored("llama", without, model_type="llama")), "is a llama, the base a qwen3"),
        "fp8": (case(fp8), f"{Q} of {fp8} is quantised (torch.float8_e4m3fn)"),
        "int8": (case(int8), f"{Q} of {int8} is quantised (torch.int8)"),
        "base in int8": (case(base, start=int8), f"{Q} of {int8} is quantised (torch.int8)"),
        "all in int8": (case(int8, start=int8), f"{Q} of {int8} is quantised (torch.int8)"),
        "packed": (case(packed), f"{Q} of {packed} is quantised (torch.uint32)"),
        "bad config": (case(tmp / "notes"), "notes/config.json' is unreadable: Expecting property name"),
        "base an adapter": (case(base, start=adapter), "is a LoRA adapter; give the model that it was trained from"),
        "adapter of another model": (case(adapter), "does not have: model.layers.9.self_attn.q_proj.weight; give the"),
        "adapter of another shape": (case(thin), f"{Q} [32, 64], the base's [64, 64]"),
        "adapter with more tokens": (case(more_tokens), f"{EMBEDDING} {[*rows.shape]}, the base's"),
        "adapter of a convolution": (case(conv), "a matrix has (r, in) and (out, r)"),
        "adapter of no rank": (case(empty), "a matrix has (r, in) and (out, r)"),
        "no alpha": (case(null), "is None, not a number"),
        "no pattern": (case(patterns), "alpha_pattern in"),
        **{key: (case(path), f"{key} was trained with {key}, which is not") for key, path in more.items()},
        "DoRA": (case(dora), "is a DoRA adapter"),
        "KaSA": (case(kasa), "is a KaSA adapter"),
        "PiSSA": (case(pissa[0]), "began with init_lora_weights=pissa_niter_4, which changed the base"),
        "OLoRA": (case(pissa[1]), "began with init_lora_weights=olora, which changed the base"),
        "output in use": (case(base, output_dir=tmp / "used"), "exists and is not empty"),
        "output under a file": (case(base, output_dir=base / "config.json" / "sub"), "config.json is a file"),
        "output a file": (case(base, output_dir=base / "config.json"), "is a file"),
        "output a link to nothing": (case(base, output_dir=tmp / "nowhere"), "nowhere is a link that leads nowhere"),
        "output a loop": (case(base, output_dir=tmp / "loop"), "loop is a link that leads nowhere"),
        "output under a loop": (case(base, output_dir=tmp / "loop" / "out"), "loop is a link that leads nowhere"),
        "output of a long name": (case(base, output_dir=tmp / ("x" * 250)), f"File name too long in {tmp}; give"),
        "no output": (case(base, output_dir=""), "--output_dir is empty; give a folder"),
        "no checkpoints": (["--base", base, "--output_dir", tmp / "out"], "give either --checkpoints"),
        "both": (["--trajectory", "a=b", *case(base)], "give either --checkpoints"),
        "trajectory": (["--base", base, "--trajectory", "opd", "--output_dir", tmp / "out"], "must be NAME=DIR,DIR"),
        "formula": (["--base", base, "--trajectory", "$a=x", "--output_dir", tmp / "out"], "has no $"),
        "nested": (["--base", base, "--trajectory", "a/b=x", "--output_dir", tmp / "out"], "and no /"),
        "hidden": (["--base", base, "--trajectory", "_a=x", "--output_dir", tmp / "out"], "has no $"),
        "base": (["--trajectory=base=x", "--base", base, "--output_dir", tmp / "o"], "name it otherwise"),
        "twice": (["--trajectory=a=x", "--trajectory=a=y", "--base", base, "--output_dir", tmp / "o"], "given twice"),
        "no base": (["--checkpoints", base, "--output_dir", tmp / "out"], "required: --base"),
        "unknown flag": (case(base, no_such_flag="1"), "unrecognized arguments: --no_such_flag"),
        "rank": (case(base, rank="0"), "must be positive"),
        "ks": (case(base, ks="0"), "--ks must be positive"),
        "no device": (case(base, device="meta"), "--device meta is not available here"),
        "device": (case(base, device="cuda:99" if torch.cuda.is_available() else "cuda"), "is not available here"),
    }  # fmt: skip


def test_a_config_tells_quantised_weights_of_any_name(base, tmp_path):
    """As HQQ, quanto and torchao call them: beside a model with weights they are not missing tensors, and of two such
    models the scales alone are no comparison."""
    weights = planted.base_weights()
    del weights[Q]
    module, codes = Q.removesuffix("weight"), torch.ones(64, 32, dtype=torch.uint8)
    for packed in ("W_q", "weight._data", "_weight_qdata"):
        own = weights | {f"{module}{packed}": codes, f"{module}scale": torch.ones(64, 1), "steps": torch.ones(2).long()}
        quantised = planted.write(tmp_path / packed, own, {"quantization_config": {}})
        for start, run in ((base, quantised), (quantised, base), (quantised, quantised)):
            with pytest.raises(UserError, match=rf"{packed} of {quantised} is quantised \(torch.uint8\); dequantise"):
                compare(start, {"run": [run]})


@pytest.mark.parametrize(
    "file, command",
    [
        (
            "pytorch_model-00001-of-00002.bin",
            'M.from_pretrained(sys.argv[1]).save_pretrained(sys.argv[2])" {folder} {folder}-safetensors',
        ),
        ("adapter_model.bin", '" {folder}/adapter_model.bin {folder}/adapter_model.safetensors'),
        ("zero_to_fp32.py", "python {folder}/zero_to_fp32.py {folder} {folder}-safetensors --safe_serialization"),
        ("pytorch_model_fsdp_0", "accelerate merge-weights {folder}/pytorch_model_fsdp_0 {folder}-safetensors"),
        ("rng_state_0.pth", None),
    ],
)
def test_other_formats_are_told_their_conversion(base, tmp_path, file, command):
    (tmp_path / file).touch()
    (tmp_path / "rng_state.pth").touch()
    (tmp_path / "optimizer.pt").touch()
    with pytest.raises(UserError) as error:
        compare(base, {"run": [tmp_path]})
    said = "no *.safetensors in this folder" if command is None else command.format(folder=tmp_path)
    assert said in str(error.value)


def test_the_conversion_of_a_state_dict_converts_it(base, tmp_path):
    """Of an adapter, and of a model whose head is its embedding."""
    module = Q.removesuffix(".weight")
    pair, _ = factors(module, 64, 64)
    whole = lora(tmp_path / "whole", pair)
    tied = {**planted.base_weights(), "lm_head.weight": planted.base_weights()[EMBEDDING]}
    (tmp_path := tmp_path / "it's here").mkdir()
    (tmp_path / "adapter").mkdir()
    shutil.copy(whole / "adapter_config.json", tmp_path / "adapter")
    torch.save({f"base_model.model.{n}": t for n, t in pair.items()}, tmp_path / "adapter/adapter_model.bin")
    torch.save(tied | {EMBEDDING: tied["lm_head.weight"]}, tmp_path / "model.pt")
    for path in (tmp_path / "adapter", tmp_path / "model.pt"):
        with pytest.raises(UserError) as error:
            compare(base, {"run": [path]})
        _, *command = shlex.split(str(error.value).split("convert it first: ")[1])
        subprocess.run([sys.executable, *command], check=True)
    comparison = compare(base, {"run": [whole, tmp_path / "adapter", tmp_path / "model.safetensors"]})
    assert (
        torch.equal(*(update(comparison, Q, position=i) for i in range(2))) and update(comparison, Q, position=0).any()
    )
    assert not update(comparison, Q, position=2).any()


def test_bad_input_is_one_sentence_before_any_work(base, tmp_path, capsys):
    for label, (arguments, sentence) in broken(base, tmp_path).items():
        before = sorted(tmp_path.rglob("*"))
        assert cli.main(["updates", *map(str, arguments)]) == 2, label
        said = capsys.readouterr().err
        assert sentence in said and said.startswith("effopd-analyze: error: ") and said.count("\n") == 1, (label, said)
        assert "Traceback" not in said and sorted(tmp_path.rglob("*")) == before, label


def test_a_file_that_may_not_be_read_is_named(base, tmp_path, monkeypatch, capsys):
    def refused(path, *_, **__):  # root may read anything
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(files, "open", refused, raising=False)
    assert planted.analyse(base, base, out=tmp_path / "out") == 2
    assert capsys.readouterr().err == f"effopd-analyze: error: {base}/model.safetensors: Permission denied\n"


def test_an_output_that_cannot_be_written_is_found_before_any_work(tmp_path, monkeypatch):
    asked = []

    def refused(path, *_):  # root may write anywhere
        asked.append(path.parent)
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "mkdir", refused)
    with pytest.raises(UserError, match=f"cannot be written: Permission denied in {tmp_path}"):
        check_free(tmp_path / "new" / "out")
    assert asked == [tmp_path]


def test_what_a_killed_run_left_is_no_content(tmp_path):
    """Where the folder is to be and in one that is there; not that of a process at work, another folder or machine."""
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    out = tmp_path / "out"
    here = f".out.{platform.node()}"
    left = [place / f"{here}.{pid}.partial" for place in (tmp_path, out) for pid in (gone.pid, os.getpid())]
    others = f"{here}.{os.getppid()}", f".other.{platform.node()}.{gone.pid}", f".out.another-machine.{gone.pid}"
    for folder in (*left, *(tmp_path / f"{name}.partial" for name in others)):
        folder.mkdir(parents=True)
    check_free(out)
    assert not any(folder.exists() for folder in left) and len(list(tmp_path.iterdir())) == 4
    (out / f"{here}.{os.getppid()}.partial").mkdir()
    with pytest.raises(UserError, match="is not empty"):
        check_free(out)


def test_what_is_read_is_not_written_over(base, tmp_path, capsys):
    """The base, a folder of checkpoints, one behind a link, a companion; a folder inside a checkpoint is nobody's."""
    shutil.copytree(base, tmp_path / "run/checkpoint-1")
    adapter = lora(tmp_path / "adapter", factors(Q.removesuffix(".weight"), 64, 64)[0])
    lora(adapter / "effopd", factors(Q.removesuffix(".weight"), 64, 64)[0])
    (tmp_path / "link").symlink_to(tmp_path / "run")
    before = sorted(tmp_path.rglob("*"))
    for start, checkpoint, out in (
        (tmp_path / "run/checkpoint-1", base, tmp_path / "run/checkpoint-1"),
        (base, tmp_path / "run/checkpoint-1", tmp_path / "run"),
        (base, tmp_path / "run/checkpoint-1/model.safetensors", tmp_path / "link"),
        (base, adapter, adapter / "effopd"),
    ):
        assert planted.analyse(start, checkpoint, "--overwrite_output_dir", out=out) == 2, out
        assert f"--output_dir '{out}' is or holds '" in capsys.readouterr().err
        assert sorted(tmp_path.rglob("*")) == before, out
    check_free(base / "analysis", inputs=[base, "Qwen/Qwen3-0.6B"])


def test_commands(capsys):
    assert cli.main(["--help"]) == 0 and "interventions" in capsys.readouterr().out
    assert cli.main([]) == 2
    assert cli.main(["downdates"]) == 2 and "the commands are updates and interventions" in capsys.readouterr().err
    with pytest.raises(SystemExit) as done:
        cli.main(["updates", "--help"])
    assert done.value.code == 0


def test_unknown_names_are_listed(base, tmp_path):
    weights = {**planted.base_weights(), "adaptor.gizmo": torch.ones(3), "steps": torch.tensor([1])}
    folder = planted.write(tmp_path / "odd", weights)
    comparison = compare(folder, {"run": [folder]})
    assert any('grouped as "other": adaptor.gizmo' in note for note in comparison.notes)
    assert any("Not floating, so left out: steps" in note for note in comparison.notes)
    assert "steps" not in comparison.names and "adaptor.gizmo" in comparison.names


def test_a_tensor_without_entries_may_lie_where_another_begins(tmp_path):
    """Whichever of the two the header names first."""
    nothing = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    assert list(files.FileCheckpoint(raw(tmp_path / "x", {"a": (0, 8), "empty": nothing})).shapes) == ["empty", "a"]


def test_a_tensor_without_entries_is_left_out(tmp_path):
    weights = {Q: torch.ones(2, 2), "model.extra": torch.zeros(0), "model.more": torch.zeros(3, 0)}
    folder = planted.write(tmp_path / "base", weights)
    assert compare(folder, {"run": [folder]}).names == [Q]


def test_an_adapters_update_is_not_rounded_to_the_bases_dtype(tmp_path):
    start = planted.write(tmp_path / "base", {n: t.bfloat16() for n, t in planted.base_weights().items()})
    pair, product = factors(Q.removesuffix(".weight"), 64, 64)
    comparison = compare(start, {"run": [lora(tmp_path / "adapter", pair)]})
    assert math.isclose(float(update(comparison, Q).norm()), float((2 * product).norm()), rel_tol=1e-6)
