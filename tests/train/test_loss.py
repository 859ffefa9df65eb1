"""Our loss in TRL's joint, with TRL's own as the witness."""

import copy
from types import SimpleNamespace

import pytest
import torch
import trl
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    Llama4TextConfig,
    PhiConfig,
    RecurrentGemmaConfig,
    RwkvConfig,
)

from effopd_kernels.divergence import FORWARD_KL, REVERSE_KL, jsd
from effopd_kernels.train import FusedLoss, OPDConfig, UserError, restore_trl_loss, use_fused_loss
from effopd_kernels.train.config import parse_divergence, parse_schedule
from effopd_kernels.train.model_reading import explained, within_peft
from effopd_kernels.train.validation import Validator
from train import world as tiny

COMMON = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
}
HEADS = {
    "gemma2 (soft cap)": (Gemma2Config, {"head_dim": 8, "final_logit_softcapping": 2.0, "query_pre_attn_scalar": 8}),
    "granite (divided logits)": (GraniteConfig, {"logits_scaling": 4.0}),
    "cohere (scaled logits)": (CohereConfig, {"logit_scale": 0.25}),
    "phi (bias)": (PhiConfig, {"tie_word_embeddings": False}),
}
MIXED = {"bf16": True, "use_cpu": not torch.cuda.is_available(), "beta": 1.0}
# Whose logits TRL 1.16 reads otherwise than they compute them, or not at all.
MISREAD = {
    "bert (a layer in the head)": (
        BertConfig,
        {"is_decoder": True, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    ),
    "recurrent gemma (logits_soft_cap)": (
        RecurrentGemmaConfig,
        {"logits_soft_cap": 2.0, "lru_width": 32, "num_hidden_layers": 3},
    ),
    "llama 4 (backbone by another name)": (
        Llama4TextConfig,
        {"intermediate_size_mlp": 64, "num_local_experts": 2, "head_dim": 8},
    ),
}


# To which a row is another one with padding before it, as TRL 1.16 gives it.
PADDED = {
    "gpt2": (GPT2Config, {"n_positions": 128, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}),
    "rwkv": (RwkvConfig, {}),
}


def trl_trainer(world, tmp_path, student, teacher, bf16=False, **config):
    flags = {**tiny.FLAGS, **config}
    del flags["eval_metric"]
    return trl.DistillationTrainer(
        student,
        teacher,
        trl.DistillationConfig(str(tmp_path), bf16=bf16, **flags),
        train_dataset=tiny.load(world / "train.jsonl"),
        processing_class=tiny.tokenizer_of(world),
    )


def model_of(kind: str, tokenizer, seed: int):
    torch.manual_seed(seed)
    config_class, own = {**HEADS, **MISREAD, **PADDED}[kind]
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    model = AutoModelForCausalLM.from_config(config_class(vocab_size=len(tokenizer), **{**COMMON, **own, **ids}))
    bias = model.get_output_embeddings().bias
    if bias is not None:
        torch.nn.init.normal_(bias)
    return model


def test_a_loss_is_refused_where_it_is_made():
    for given, kind, says in (
        ({"temperature": -1}, ValueError, "temperature must be positive"),
        ({"temperature": "1"}, TypeError, "temperature must be a number"),
        ({"observer": 5}, TypeError, "observer must be callable or None, got 5"),
    ):
        with pytest.raises(kind, match=says):
            FusedLoss(**given)


def test_token_ids_are_integers_where_there_are_none():
    trainer = SimpleNamespace(
        accelerator=SimpleNamespace(device="cpu"), _tokenizer=SimpleNamespace(pad_token_id=0), reverse_kl=lambda i: i
    )
    inputs = Validator.reverse_kl(SimpleNamespace(trainer=trainer), [[], []], [[1], [2, 3]])
    assert {t.dtype for t in inputs.values()} == {torch.int64}


def batch(trainer, padded: bool = True):
    prompts = ["Tom has 3 apples", "Ana has 12 books and gets", "Kim"] if padded else ["Tom has 3 apples"] * 3
    ids = [trainer._tokenizer(p)["input_ids"] for p in prompts]
    width = max(map(len, ids))
    completion = torch.randint(4, 60, (3, 5), generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1] * 5, [1] * 3 + [0] * 2, [1] + [0] * 4])
    return {
        "prompt_ids": torch.tensor([[0] * (width - len(i)) + i for i in ids]),
        "prompt_mask": torch.tensor([[0] * (width - len(i)) + [1] * len(i) for i in ids]),
        "completion_ids": completion,
        "completion_mask": mask,
        "num_items_in_batch": mask.sum(),
    }


def loss_and_gradients(trainer, **kwargs):
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, batch(trainer, **kwargs))
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("beta", [1.0, 0.0, 0.3])
def test_equals_trl_whatever_the_head(world, tmp_path, caplog, kind, beta):
    tokenizer = tiny.tokenizer_of(world)
    student, teacher = (model_of(kind, tokenizer, seed) for seed in (0, 1))
    trainer = trl_trainer(world, tmp_path, student, teacher, beta=beta, temperature=1.7)
    trainer.model.train()
    theirs, their_gradients = loss_and_gradients(trainer)
    use_fused_loss(trainer)
    ours, our_gradients = loss_and_gradients(trainer)
    assert not caplog.records  # hidden states were enough
    assert theirs > 1e-3  # the witness has something to say
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert our_gradients.keys() == their_gradients.keys()
    for name, gradient in our_gradients.items():
        scale = their_gradients[name].abs().max()
        torch.testing.assert_close(gradient / scale, their_gradients[name] / scale, rtol=0, atol=2e-5, msg=name)


@pytest.mark.parametrize("kind", HEADS)
def test_mixed_precision_reaches_the_training_forward(world, tmp_path, caplog, kind):
    """TRL goes past the forward that accelerate has wrapped; fp32 weights were trained in fp32, whatever bf16 said."""
    tokenizer = tiny.tokenizer_of(world)
    trainer = trl_trainer(world, tmp_path, *(model_of(kind, tokenizer, seed) for seed in (0, 1)), **MIXED)
    trainer.model.train()
    use_fused_loss(trainer)
    dtypes = set()
    for model in (trainer.model, trainer.teacher_model):
        layer = next(m for n, m in model.named_modules() if n.endswith("q_proj"))
        layer.register_forward_hook(lambda module, inputs, output: dtypes.add(output.dtype))
    loss, gradients = loss_and_gradients(trainer)
    assert dtypes == {torch.bfloat16} and {g.dtype for g in gradients.values()} == {torch.float32}
    assert gradients.keys() == {n for n, p in trainer.model.named_parameters() if p.requires_grad}
    assert not caplog.records  # bf16's rounding is not taken for another head
    torch.testing.assert_close(loss, expected(trainer).float(), rtol=0.03, atol=0)


def expected(trainer, **kwargs):
    """The mean reverse KL of all completion tokens, from the models' own logits of each row by itself, in fp64."""
    inputs, losses = batch(trainer, **kwargs), []
    for ids, mask, *completion in zip(*list(inputs.values())[:4], strict=True):
        row = torch.cat([ids[mask.bool()], completion[0][completion[1].bool()]])[None]
        student, teacher = (
            (model(input_ids=row).logits[0, -1 - completion[1].sum() : -1].double() / trainer.temperature)
            for model in (trainer.model, trainer.teacher_model)
        )
        student, teacher = student.log_softmax(-1), teacher.detach().log_softmax(-1)
        losses.append((student.exp() * (student - teacher)).sum())
    return sum(losses) / inputs["num_items_in_batch"]


def assert_expected(trainer, loss, gradients, **kwargs):
    trainer.model.zero_grad()
    theirs = expected(trainer, **kwargs)
    theirs.backward()
    torch.testing.assert_close(loss, theirs.float(), rtol=1e-5, atol=1e-6)
    their_gradients = {n: p.grad for n, p in trainer.model.named_parameters() if p.grad is not None}
    scale = max(g.abs().max() for g in their_gradients.values())
    for name, gradient in their_gradients.items():
        torch.testing.assert_close(gradients[name] / scale, gradient / scale, rtol=0, atol=2e-5, msg=name)


@pytest.mark.parametrize("student, lora", [*((kind, False) for kind in MISREAD), ("bert (a layer in the head)", True)])
def test_logits_that_trl_misreads_are_used_themselves(world, tmp_path, caplog, student, lora):
    tokenizer = tiny.tokenizer_of(world)
    teacher = model_of("phi (bias)" if lora else student, tokenizer, 1)
    student = model_of(student, tokenizer, 0)
    named = f"those of {student.config.model_type} are not what"
    if lora:
        student = get_peft_model(student, LoraConfig(target_modules=["query"], init_lora_weights=False))
    trainer = trl_trainer(world, tmp_path, student, teacher, beta=1.0, temperature=1.7)
    trainer.model.train()
    modes = [m.training for m in trainer.model.modules()]
    use_fused_loss(trainer)
    padded = student.config.model_type != "recurrent_gemma"  # which would be refused
    ours, our_gradients = loss_and_gradients(trainer, padded=padded)
    assert named in caplog.text and modes == [m.training for m in trainer.model.modules()]
    assert_expected(trainer, ours, our_gradients, padded=padded)


def adapted_gpt2(student):
    lora = LoraConfig(target_modules=["c_attn"], init_lora_weights=False, fan_in_fan_out=True)
    return get_peft_model(student, lora)


@pytest.mark.parametrize(
    "kinds, wrap, compiled",
    [
        (("gpt2", "gpt2"), lambda student: student, False),
        (("phi (bias)", "gpt2"), lambda student: student, False),
        (("gpt2", "phi (bias)"), adapted_gpt2, True),
        (("gpt2", "bert (a layer in the head)"), lambda student: student, False),
    ],
)
def test_positions_begin_at_the_prompt(world, tmp_path, caplog, kinds, wrap, compiled):
    """For a model that would count from the first column, padding or not, and for no other; also where the loss is of
    full logits."""
    tokenizer = tiny.tokenizer_of(world)
    student, teacher = (model_of(kind, tokenizer, seed) for seed, kind in enumerate(kinds))
    options = {"torch_compile_backend": "eager"} if compiled else {}
    trainer = trl_trainer(world, tmp_path, wrap(student), teacher, beta=1.0, **options)
    use_fused_loss(trainer)
    trainer.model.train()
    trainer.compute_loss(trainer.model, batch(trainer))  # looks at the models
    given = []
    for model in (student, teacher):
        model.base_model.register_forward_pre_hook(lambda *a: given.append("position_ids" in a[2]), with_kwargs=True)
    model = torch.compile(trainer.model, backend="eager") if compiled else trainer.model
    loss = trainer.compute_loss(model, batch(trainer))
    assert given == [kind != "phi (bias)" for kind in kinds]
    assert ("the loss is of full logits" in caplog.text) == any("bert" in kind for kind in kinds)
    loss.backward()
    gradients = {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}
    assert_expected(trainer, loss, gradients)


@pytest.mark.parametrize("mixed", [{}, MIXED])
def test_ranks_read_padding_alike(world, tmp_path, monkeypatch, mixed):
    """Whichever of them has tokens that show what it does; in bf16 rotary angles that are rounded show nothing."""
    tokenizer = tiny.tokenizer_of(world)
    for others, all_ranks in ([0, 0], [1, 0]), ([1, 1], [1, 1]), ([2, 0], [2, 0]):
        trainer = trl_trainer(world, tmp_path, *(model_of(k, tokenizer, 0) for k in ("gpt2", "phi (bias)")), **mixed)
        monkeypatch.setattr("effopd_kernels.train.loss.gather_object", lambda mine, o=others: [*mine, ([], o)])
        use_fused_loss(trainer)
        loss_and_gradients(trainer, padded=False)
        assert trainer._compute_loss.padding == all_ranks


def test_a_state_that_runs_through_padding_is_refused(world, tmp_path):
    """Where there is padding, be it in validation alone, which comes later."""
    tokenizer = tiny.tokenizer_of(world)
    for kinds, says in (
        (("rwkv", "phi (bias)"), r"for it by the student \(rwkv\): give prompts of one length, or set per_device"),
        (("phi (bias)", "rwkv"), r"for it by the teacher \(rwkv\): give"),
        (("rwkv", "rwkv"), r"for it by the student \(rwkv\) and the teacher \(rwkv\): give"),
    ):
        trainer = trl_trainer(
            world, tmp_path, *(model_of(kind, tokenizer, n) for n, kind in enumerate(kinds)), beta=1.0
        )
        use_fused_loss(trainer)
        loss, _ = loss_and_gradients(trainer, padded=False)
        torch.testing.assert_close(loss, expected(trainer, padded=False).float(), rtol=1e-5, atol=1e-6)
        with pytest.raises(UserError, match=says):
            loss_and_gradients(trainer)
        trainer._validators = {
            "eval": SimpleNamespace(prompts=["Tom", "Tom has 3 apples"], batches=[range(1), range(1, 2)])
        }
        use_fused_loss(trainer)
        loss_and_gradients(trainer, padded=False)
        trainer._validators["eval"].batches = [range(2)]
        use_fused_loss(trainer)
        with pytest.raises(UserError, match=says):
            loss_and_gradients(trainer, padded=False)


@pytest.mark.parametrize("ruled_out", [-torch.inf, torch.finfo(torch.float32).min])
def test_tokens_that_a_model_rules_out_are_seen(ruled_out):
    hidden, weight = torch.randn(8, 4), torch.randn(10, 4)
    logits = hidden @ weight.T
    assert explained(logits, 1.0, hidden, weight, None, 1.0, None)
    logits[:, 3] = ruled_out
    assert not explained(logits, 1.0, hidden, weight, None, 1.0, None)


def test_another_trainer_keeps_its_loss_and_restoring_undoes(world, tmp_path):
    tokenizer = tiny.tokenizer_of(world)
    models = [model_of("phi (bias)", tokenizer, seed) for seed in (0, 1)]
    one, other = (trl_trainer(world, tmp_path, copy.deepcopy(models[0]), models[1]) for _ in range(2))
    calls = []
    loss = use_fused_loss(one, FusedLoss(observer=lambda stats, mask: calls.append(mask)))
    assert isinstance(loss, FusedLoss)
    other.compute_loss(other.model, batch(other))
    assert not calls
    one.compute_loss(one.model, batch(one))
    assert len(calls) == 1
    restore_trl_loss(one)
    one.compute_loss(one.model, batch(one))
    assert len(calls) == 1
    restore_trl_loss(one)  # harmless twice
    one._compute_loss = mine = lambda *_: None
    use_fused_loss(one)
    restore_trl_loss(one)
    assert one._compute_loss is mine


@pytest.mark.parametrize("kind", ["phi (bias)", "gpt2"])
@pytest.mark.parametrize("first", ["override", "loss"])
def test_an_override_of_what_makes_hidden_states_stays(world, tmp_path, kind, first):
    """Of one trainer, as TRL's methods are of all: the look at the models at the first loss took it away."""
    tokenizer = tiny.tokenizer_of(world)
    trainer = trl_trainer(world, tmp_path, *(model_of(kind, tokenizer, seed) for seed in (0, 1)))
    calls, theirs = [], trainer._get_last_hidden_state

    def own(*args, **kwargs):
        calls.append(args)
        return theirs(*args, **kwargs)

    for each in ("loss", "override") if first == "loss" else ("override", "loss"):
        if each == "loss":
            use_fused_loss(trainer)
        else:
            trainer._get_last_hidden_state = own
    for _ in range(2):
        calls.clear()
        trainer.compute_loss(trainer.model, batch(trainer))
        assert calls
    restore_trl_loss(trainer)
    assert trainer._get_last_hidden_state is own
    use_fused_loss(trainer)
    trainer.compute_loss(trainer.model, batch(trainer))
    trainer._get_last_hidden_state = theirs  # in the place of what is there now
    restore_trl_loss(trainer)
    assert trainer._get_last_hidden_state is theirs


class ScaledHead(torch.nn.Linear):
    """Starts as a plain head."""

    def __init__(self, head: torch.nn.Linear):
        super().__init__(head.in_features, head.out_features, bias=False)
        self.weight, self.log_scale = head.weight, torch.nn.Parameter(torch.zeros(()))

    def forward(self, hidden):
        return super().forward(hidden) * self.log_scale.exp()


def scaled(student):
    student.lm_head = ScaledHead(student.lm_head)
    return student


def adapted(student):
    student.add_adapter(LoraConfig(target_modules=["lm_head"]))
    return student


def parametrized(student):
    torch.nn.utils.parametrizations.weight_norm(student.lm_head)
    return student


def saved_whole(student):
    return get_peft_model(student, LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))


@pytest.mark.parametrize("change", [adapted, scaled, parametrized, saved_whole])
def test_all_that_a_head_trains_is_trained(world, tmp_path, caplog, change):
    """Also what changes no logits at first, as adapters do not; what makes the weight that TRL reads, by TRL's way."""
    tokenizer = tiny.tokenizer_of(world)
    student, teacher = (tiny.tiny_qwen(tokenizer, 32, 1, len(tokenizer), s, tie_word_embeddings=False) for s in (0, 1))
    trainer = trl_trainer(world, tmp_path, change(student), teacher, beta=1.0)
    trainer.model.train()
    use_fused_loss(trainer)
    _, ours = loss_and_gradients(trainer)
    assert bool(caplog.records) == (change in (adapted, scaled))
    trainer.model.zero_grad()
    expected(trainer).backward()
    of_head = {n: p.grad for n, p in trainer.model.named_parameters() if "lm_head" in n and p.grad is not None}
    assert len(of_head) == (1 if change is saved_whole else 2)
    for name, gradient in of_head.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-3, atol=1e-6, msg=name)


def test_adapters_within_what_torch_compiles(world, tmp_path):
    tokenizer = tiny.tokenizer_of(world)
    student, teacher = (model_of("phi (bias)", tokenizer, seed) for seed in (0, 1))
    student = get_peft_model(student, LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    trainer = trl_trainer(world, tmp_path, student, teacher, beta=1.0, torch_compile_backend="eager")
    use_fused_loss(trainer)
    loss = trainer.compute_loss(torch.compile(trainer.model, backend="eager"), batch(trainer))
    torch.testing.assert_close(loss, expected(trainer).float(), rtol=1e-5, atol=1e-6)


def test_a_head_that_trl_cannot_read_is_named(world, tmp_path):
    tokenizer = tiny.tokenizer_of(world)
    student, teacher = (tiny.tiny_qwen(tokenizer, 32, 1, len(tokenizer), seed) for seed in (0, 1))
    student = get_peft_model(student, LoraConfig(target_modules=["q_proj"], trainable_token_indices=[5, 6]))
    trainer = trl_trainer(world, tmp_path, student, teacher, beta=1.0)
    use_fused_loss(trainer)
    with pytest.raises(UserError, match="head is a TrainableTokensWrapper, of which TRL cannot read the bias: with"):
        loss_and_gradients(trainer)


def test_what_computes_its_loss_elsewhere_is_named(monkeypatch, caplog):
    class Own(trl.DistillationTrainer):
        def _compute_loss(self, unwrapped_student, inputs, num_items_in_batch):
            return super()._compute_loss(unwrapped_student, inputs, num_items_in_batch)

    class Elsewhere(trl.DistillationTrainer):  # as TRL's ServerDistillationTrainer
        def compute_loss(self, model, inputs, *_):
            return model(**inputs).loss

    class Around(trl.DistillationTrainer):
        def compute_loss(self, *args, **kwargs):
            return super().compute_loss(*args, **kwargs)

    for cls, says in {
        torch.nn.Linear: r"needs a trl\.DistillationTrainer, not a Linear",
        Own: "Own overrides `_compute_loss`, in whose place use_fused_loss puts its own: override `compute_loss`",
    }.items():
        with pytest.raises(TypeError, match=says):
            use_fused_loss(object.__new__(cls))
    assert not caplog.messages
    use_fused_loss(object.__new__(Around))
    assert not caplog.messages
    use_fused_loss(object.__new__(Elsewhere))
    assert "Elsewhere.compute_loss does not seem to call `_compute_loss`" in caplog.text
    monkeypatch.setattr(trl.DistillationTrainer, "_compute_loss", lambda self, *_: None)
    with pytest.raises(
        RuntimeError, match=r"TRL \d+\.\d+.*no longer computes its loss through `_chunked_divergence_loss`"
    ):
        use_fused_loss(object.__new__(Around))


def test_divergence_and_temperature_of_the_loss(world, tmp_path):
    """OPDTrainer's own options against TRL's: same member and temperature, given in the two ways."""
    tokenizer = tiny.tokenizer_of(world)
    student, teacher = (model_of("phi (bias)", tokenizer, seed) for seed in (0, 1))
    trainer = trl_trainer(world, tmp_path, student, teacher, beta=0.3, temperature=1.7)
    theirs, _ = loss_and_gradients(trainer)
    trainer.beta, trainer.temperature = 1.0, 1.0
    use_fused_loss(trainer, FusedLoss(jsd(0.3), temperature=1.7))
    ours, _ = loss_and_gradients(trainer)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_divergence_names():
    assert parse_divergence("reverse_kl") == REVERSE_KL and parse_divergence("forward_kl") == FORWARD_KL
    assert parse_divergence("jsd:0.25") == jsd(0.25)
    for bad in ("kl", "jsd", "jsd:x", "reverse_kl:1"):
        with pytest.raises(UserError, match="is not one of reverse_kl"):
            parse_divergence(bad)
    with pytest.raises(UserError, match=r"--divergence 'jsd:1': jsd needs 0 < beta < 1, got 1\.0; its limits are"):
        parse_divergence("jsd:1")
    with pytest.raises(
        TypeError, match="divergence must be a Divergence, such as REVERSE_KL, or None, got 'reverse_kl"
    ):
        FusedLoss("reverse_kl")


def test_options_as_yaml_types_them():
    assert parse_schedule("adaptive") == "adaptive"
    assert parse_schedule(4) == 4 and parse_schedule([1, 2, 4]) == [1, 2, 4]
    assert OPDConfig(effopd_alphas=3).controller_args()["alphas"] == (3,)
    best = OPDConfig(save_strategy="best", eval_steps=1, eval_metric="teacher_kl")
    assert (best.metric_for_best_model, best.greater_is_better) == ("teacher_kl", False)
    many = {"effopd_alphas": [2, 3, 4, 5, 6, 7]}
    for limit, search, tried in (None, "candidates", 6), (2, "candidates", 2), (2, "gradient", 6):
        config = OPDConfig(effopd_max_candidates=limit, effopd_search=search, **many)
        assert config.controller_args()["alphas"] == (2, 3, 4, 5, 6, 7)[:tried]
    with pytest.raises(UserError, match="--divergence 3 is not one of"):
        OPDConfig(divergence=3)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what torch.compile imports
def test_a_compiled_model_is_looked_at_within():
    """Its own forward names no arguments, such as positions."""
    model = torch.nn.Linear(2, 2)
    assert within_peft(torch.compile(model)) is model
