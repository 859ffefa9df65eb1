"""EffOPDCallback alone, in trainers that know nothing of it: events happen, and a resumed run equals the whole one."""

import json
import shutil
from functools import partial
from itertools import count
from types import SimpleNamespace

import pytest
import torch
import transformers
import trl
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers.trainer_utils import HPSearchBackend

from effopd_kernels.extrapolation.adapters import COMPANION
from effopd_kernels.train import EffOPDCallback, UserError, use_fused_loss
from train import world as tiny

STEPS = 4
FLAGS = {
    **{k: v for k, v in tiny.FLAGS.items() if k not in ("eval_metric", "max_completion_length", "save_strategy")},
    "max_steps": STEPS,
    "save_strategy": "steps",
    "save_steps": 2,
    "use_cpu": True,
    "bf16": False,
    "dataloader_pin_memory": False,
}


def plain_trainer(world, out, lora=None, **flags):
    model = transformers.AutoModelForCausalLM.from_pretrained(world / "student")
    model = model if lora is None else get_peft_model(model, lora)
    tokenizer = tiny.tokenizer_of(world)
    ids = [tokenizer(r["prompt"])["input_ids"][:12] for r in tiny.problems()]
    data = Dataset.from_dict({"input_ids": ids, "labels": ids})
    args = transformers.TrainingArguments(str(out), **FLAGS | flags)
    return transformers.Trainer(model, args, train_dataset=data, eval_dataset=data.select(range(8)))


def lora_trainer(world, out, **flags):
    """Learns fast enough for every event to jump."""
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "up_proj"], task_type="CAUSAL_LM")
    return plain_trainer(world, out, lora, learning_rate=1e-2, **flags)


def distillation_trainer(world, out):
    trainer = trl.DistillationTrainer(
        str(world / "student"),
        str(world / "student"),
        trl.DistillationConfig(str(out), max_completion_length=6, **FLAGS),
        train_dataset=tiny.load(world / "train.jsonl"),
    )
    with torch.no_grad():  # a teacher that differs from its student
        for parameter in trainer.teacher_model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    use_fused_loss(trainer)
    return trainer


def grpo_trainer(world, out, lora=None):
    def even(completion_ids, **kwargs):
        return [float(sum(i % 2 == 0 for i in ids)) for ids in completion_ids]

    flags = {**FLAGS, "learning_rate": 1e-2, "beta": 0.1 if lora else 0.0}
    args = trl.GRPOConfig(str(out), max_completion_length=6, num_generations=2, **flags)
    train = tiny.load(world / "train.jsonl")
    model = str(world / "student")
    if lora is not None:
        model = get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(model), lora)
    return trl.GRPOTrainer(model, even, args, train_dataset=train)


def with_effopd(build, world, out):
    transformers.set_seed(0)
    trainer = build(world, out)
    tokenizer = tiny.tokenizer_of(world)
    batch = tokenizer([r["prompt"] for r in tiny.problems()[40:48]], padding=True, return_tensors="pt")

    def score():
        """How well the model knows eight prompts: dense, deterministic, per prompt."""
        with torch.no_grad():
            logp = trainer.model(**batch).logits[:, :-1].log_softmax(-1)
        taken = logp.gather(-1, batch["input_ids"][:, 1:, None])[..., 0]
        return (taken * batch["attention_mask"][:, 1:]).sum(-1)

    callback = EffOPDCallback(score, log=trainer.log)
    trainer.add_callback(callback)
    return trainer, callback


@pytest.mark.parametrize("build", [plain_trainer, lora_trainer, distillation_trainer, grpo_trainer])
def test_resumes_exactly(build, world, tmp_path):
    whole, effopd = with_effopd(build, world, tmp_path / "whole")
    whole.train()
    events = effopd.controller.events
    assert [e.step for e in events] == [1, 2, 4]
    assert [r["effopd/alpha_accepted"] for r in whole.state.log_history if "effopd/alpha_accepted" in r] == [
        e.alpha for e in events
    ]
    steps = [r for r in whole.state.log_history if "loss" in r]
    assert len(steps) == STEPS
    if build not in (
        plain_trainer,
        lora_trainer,
    ):  # TRL's averages are the step's; an event's record takes none of them
        assert all("entropy" in r for r in steps)
    else:  # what it is scored by is what it learns
        assert any(e.alpha != 1 for e in events)
    resumed, effopd = with_effopd(build, world, tmp_path / "resumed")
    (tmp_path / "resumed" / "checkpoint-2").symlink_to(tmp_path / "whole" / "checkpoint-2")
    resumed.train(resume_from_checkpoint=str(tmp_path / "resumed" / "checkpoint-2"))
    assert [(e.step, e.alpha, e.score_best) for e in effopd.controller.events] == [
        (e.step, e.alpha, e.score_best) for e in events
    ]
    for name, parameter in whole.model.named_parameters():
        assert torch.equal(resumed.model.get_parameter(name), parameter), name


def test_resumes_where_transformers_loads_the_companion_alone(world, tmp_path, monkeypatch):
    """As before 5.23: what it leaves of the trained adapter is what the trainer was made with."""
    whole, effopd = with_effopd(lora_trainer, world, tmp_path)
    whole.train()
    resumed, again = with_effopd(lora_trainer, world, tmp_path)
    fresh = {n: p.detach().clone() for n, p in resumed.model.named_parameters() if p.requires_grad}
    load = transformers.Trainer._load_from_checkpoint

    def load_companion(self, *args, **kwargs):
        load(self, *args, **kwargs)
        with torch.no_grad():
            for name, made in fresh.items():
                self.model.get_parameter(name).copy_(made)

    monkeypatch.setattr(transformers.Trainer, "_load_from_checkpoint", load_companion)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert [e.alpha for e in again.controller.events] == [e.alpha for e in effopd.controller.events]
    for name, parameter in whole.model.named_parameters():
        assert torch.equal(resumed.model.get_parameter(name), parameter), name


def test_jumps_stay_active_beside_a_reference(world, tmp_path):
    """GRPO of a LoRA student scores its reference by switching adapters, there and back, in every step."""
    lora = LoraConfig(r=4, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM")
    trainer, effopd = with_effopd(partial(grpo_trainer, lora=lora), world, tmp_path)
    effopd.score_fn = count().__next__  # every jump is taken
    active = []

    class Watch(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            layers = [m for m in trainer.model.modules() if hasattr(m, "lora_A")]
            active.append({COMPANION in layer.active_adapters for layer in layers})

    trainer.add_callback(Watch())
    trainer.train()
    assert all(e.alpha > 1 for e in effopd.controller.events) and "ref" in trainer.model.peft_config
    assert active == [{False}, {True}, {True}, {True}]


def test_a_checkpoint_by_another_name_elsewhere(world, tmp_path):
    whole, effopd = with_effopd(plain_trainer, world, tmp_path / "whole")
    whole.train()
    kept = (tmp_path / "whole" / "checkpoint-2").rename(tmp_path / "kept")
    resumed, again = with_effopd(plain_trainer, world, tmp_path / "resumed")
    says = "holds no EffOPD state .*; if another folder is resumed from, set args.resume_from_checkpoint to it"
    with pytest.raises(UserError, match=says):
        resumed.train(resume_from_checkpoint=str(kept))
    resumed, again = with_effopd(plain_trainer, world, tmp_path / "resumed")
    resumed.args.resume_from_checkpoint = str(kept)
    resumed.train(resume_from_checkpoint=str(kept))
    assert [e.alpha for e in again.controller.events] == [e.alpha for e in effopd.controller.events]


def test_the_state_of_another_run_is_not_taken(world, tmp_path):
    """The folder that `train` is told of is not the callback's to know; a checkpoint of the same step may be another's.
    Checkpoints of versions that kept no history are taken as they were."""
    for name, rate in ("this", 1e-2), ("other", 1e-3):
        trainer, _ = with_effopd(partial(plain_trainer, max_steps=2, learning_rate=rate), world, tmp_path / name)
        trainer.train()
    kept = tmp_path / "this" / "checkpoint-2"
    resumed, _ = with_effopd(plain_trainer, world, tmp_path / "other")
    with pytest.raises(UserError, match=r"other/checkpoint-2/effopd_state' is of another run than the one resumed"):
        resumed.train(resume_from_checkpoint=str(kept))
    resumed, effopd = with_effopd(plain_trainer, world, tmp_path / "other")
    resumed.args.resume_from_checkpoint = str(kept)
    resumed.train(resume_from_checkpoint=str(kept))
    assert [e.step for e in effopd.controller.events] == [1, 2, 4]
    saved = json.loads((kept / "trainer_state.json").read_text())
    del saved["stateful_callbacks"]["effopd"]
    (kept / "trainer_state.json").write_text(json.dumps(saved))
    resumed, _ = with_effopd(partial(plain_trainer, max_steps=3), world, tmp_path / "this")
    resumed.train(resume_from_checkpoint=str(kept))


@pytest.mark.parametrize(
    "callbacks, says",
    [([{"include": "no_such_parameter"}], "no_such_parameter"), ([{}, {}], "the trainer has two EffOPDCallbacks")],
)
def test_nothing_to_move_or_a_second_callback_is_said_before_training(world, tmp_path, callbacks, says):
    trainer = plain_trainer(world, tmp_path)
    for options in callbacks:
        trainer.add_callback(EffOPDCallback(lambda: [0.0], **options))
    with pytest.raises(UserError, match=says):
        trainer.train()
    assert trainer.state.global_step == 0


def test_a_callback_that_comes_after_training_began_is_refused(world, tmp_path):
    trainer = plain_trainer(world, tmp_path)

    class Late(transformers.TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            trainer.add_callback(EffOPDCallback(lambda: [0.0], log=trainer.log))

    trainer.add_callback(Late())
    with pytest.raises(UserError, match=r"added to a training that had begun: add it before train\(\)"):
        trainer.train()


def test_a_trial_of_a_search_has_its_state_in_its_own_checkpoints(world, tmp_path, monkeypatch):
    trainer, effopd = with_effopd(plain_trainer, world, tmp_path)
    trainer.hp_search_backend, trainer.hp_space = HPSearchBackend.OPTUNA, lambda trial: {}
    monkeypatch.setattr(transformers.integrations, "hp_params", lambda trial: {})  # which needs optuna
    trial = SimpleNamespace(number=5, params={})
    trainer.train(trial=trial)
    checkpoint = tmp_path / "run-5" / "checkpoint-2"
    assert (checkpoint / "effopd_state").is_dir() and not (tmp_path / "checkpoint-2").exists()
    resumed, again = with_effopd(plain_trainer, world, tmp_path / "run-5")
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert [e.alpha for e in again.controller.events] == [e.alpha for e in effopd.controller.events]
    trainer.remove_callback(effopd)
    trainer.add_callback(EffOPDCallback(lambda: [0.0]))
    with pytest.raises(UserError, match=r"in a hyperparameter search EffOPDCallback needs log=trainer\.log"):
        trainer.train(trial=trial)


def test_an_option_that_the_controller_does_not_have_is_said_at_construction():
    for option in dict(alfas=(2,)), dict(optimizer=None), dict(params=None):
        with pytest.raises(TypeError, match=next(iter(option))):
            EffOPDCallback(lambda: 0.0, **option)
    with pytest.raises(TypeError, match=r"score_fn must be a function, got 1\.0"):
        EffOPDCallback(1.0)


def test_a_skipped_event_logs_why_in_place_of_scores(world, tmp_path):
    trainer = plain_trainer(world, tmp_path, max_steps=1, learning_rate=0.0)
    trainer.add_callback(EffOPDCallback(lambda: [0.0], log=trainer.log))
    trainer.train()
    (record,) = (r for r in trainer.state.log_history if "effopd/alpha_accepted" in r)
    assert "the weights have not moved" in record["effopd/skipped"] and "effopd/score_best" not in record
    assert all(isinstance(value, (int, float, str)) for value in record.values())


def test_what_a_lora_student_saves_is_what_it_was(world, tmp_path):
    """One adapter, with the jumps in it; of the last step, or of the best with that step's jumps."""
    trainer, effopd = with_effopd(lora_trainer, world, tmp_path / "last")
    trainer.train()
    assert all(e.alpha > 1 for e in effopd.controller.events)
    best = {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True, "greater_is_better": True}
    best |= {"metric_for_best_model": "loss", "save_steps": 1}  # the greatest loss is that of an early step
    stopped, effopd = with_effopd(partial(lora_trainer, **best), world, tmp_path / "best")
    stopped.train()
    assert stopped.state.best_global_step < STEPS and all(e.alpha > 1 for e in effopd.controller.events)
    for run in (trainer, stopped):
        loss = run.evaluate()["eval_loss"]
        if run is stopped:
            assert loss == pytest.approx(run.state.best_metric, rel=1e-5)
        run.save_model(tmp_path / "student")
        base = transformers.AutoModelForCausalLM.from_pretrained(world / "student")
        run.model = PeftModel.from_pretrained(base, tmp_path / "student")
        assert run.evaluate()["eval_loss"] == pytest.approx(loss, rel=1e-5)


def test_an_adapter_that_must_keep_its_rank_is_left_as_it_is(world, tmp_path, caplog):
    lora = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights="pissa", task_type="CAUSAL_LM")
    trainer, effopd = with_effopd(partial(plain_trainer, lora=lora), world, tmp_path)
    trainer.train()
    assert effopd.controller.events[-1].alpha > 1
    assert "init_lora_weights='pissa' must keep its rank" in caplog.text
    assert trainer.model.active_adapters == ["default", "effopd"]


def test_training_again_writes_whole_checkpoints_again(world, tmp_path):
    trainer, effopd = with_effopd(partial(lora_trainer, save_steps=STEPS), world, tmp_path)
    for _ in range(2):
        trainer.train()
        assert (tmp_path / f"checkpoint-{STEPS}" / "effopd_state").is_dir()
        shutil.rmtree(tmp_path / f"checkpoint-{STEPS}")
    assert effopd.controller.events[-1].delta_norm > 0


def test_what_a_step_has_to_do_is_not_forgotten_for_its_event(world, tmp_path):
    """A score_fn may evaluate with the trainer itself, which clears what is due."""
    trainer = plain_trainer(world, tmp_path, logging_steps=1, eval_strategy="steps", eval_steps=1, max_steps=3)
    trainer.add_callback(EffOPDCallback(lambda: -trainer.evaluate()["eval_loss"], log=trainer.log))
    trainer.train()
    losses = [record["step"] for record in trainer.state.log_history if "loss" in record]
    assert losses == [1, 2, 3]
    last = [record for record in trainer.state.log_history if "eval_loss" in record and record["step"] == 3]
    assert len(last) == 1  # off schedule: the due one alone


def test_scoring_uses_up_no_patience(world, tmp_path):
    """A score_fn may evaluate with a trainer that stops early; here no evaluation after the first is a gain."""
    worse = {"metric_for_best_model": "loss", "greater_is_better": True, "eval_strategy": "steps", "eval_steps": 1}
    trainer = plain_trainer(world, tmp_path, max_steps=3, **worse)
    stopping = transformers.EarlyStoppingCallback(4)
    trainer.add_callback(stopping)
    effopd = EffOPDCallback(lambda: -trainer.evaluate()["eval_loss"], log=trainer.log, schedule=1)
    trainer.add_callback(effopd)
    trainer.train()
    assert [e.num_candidates > 1 for e in effopd.controller.events] == [True] * 3
    assert (trainer.state.global_step, stopping.early_stopping_patience_counter) == (3, 2)


def test_an_interrupted_score_uses_up_no_patience(world, tmp_path):
    trainer = plain_trainer(world, tmp_path, max_steps=3, metric_for_best_model="loss", eval_strategy="epoch")
    stopping = transformers.EarlyStoppingCallback(4)
    trainer.add_callback(stopping)

    def score():
        stopping.early_stopping_patience_counter += 1
        raise KeyboardInterrupt

    trainer.add_callback(EffOPDCallback(score, log=trainer.log, schedule=1))
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert stopping.early_stopping_patience_counter == 0


def test_an_override_of_log_is_the_one_that_is_called(world, tmp_path):
    trainer, seen = plain_trainer(world, tmp_path, max_steps=1), []

    class Logging(transformers.Trainer):
        def log(self, logs, *args, **kwargs):
            seen.append(logs)
            super().log(logs, *args, **kwargs)

    trainer.__class__ = Logging
    trainer.add_callback(EffOPDCallback(lambda: 0.0, log=trainer.log))
    trainer.train()
    assert any("effopd/alpha_accepted" in logs for logs in seen)


def test_a_best_checkpoint_without_its_jumps_is_said(world, tmp_path, caplog):
    """And what was trained is still there to be saved."""
    flags = dict(load_best_model_at_end=True, eval_strategy="steps", eval_steps=2, save_steps=2)
    trainer = lora_trainer(world, tmp_path, **flags)
    scores = count()

    class Forgetful(transformers.TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            for folder in tmp_path.glob("checkpoint-*/effopd_state"):
                shutil.rmtree(folder)

    trainer.add_callback(EffOPDCallback(lambda: float(next(scores))))
    trainer.add_callback(Forgetful())
    trainer.train()
    assert "the jumps of the best checkpoint are lost" in caplog.text
    assert list(trainer.model.peft_config) == ["default"]
