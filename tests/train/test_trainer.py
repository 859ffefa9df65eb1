import copy
import json
import math
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import trl
from datasets import DatasetDict
from peft import LoraConfig
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    FalconConfig,
    GPTNeoXConfig,
    OPTConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    Trainer,
    TrainerCallback,
)

from effopd_kernels.train import NonFiniteLossError, OPDConfig, OPDTrainer, UserError, ledger
from effopd_kernels.train.ledger import Ledger
from effopd_kernels.train.private_api import check_private_api
from effopd_kernels.train.trainer import LEDGER_NAME
from effopd_kernels.train.validation import TeacherLoss
from train import world as tiny
from train.world import make_trainer

SMALL = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def weights(trainer):
    return {n: p.detach().clone() for n, p in trainer.model.named_parameters()}


def assert_same_weights(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def history(trainer):
    """Everything logged that does not tell the time."""
    timed = ("timing_s", "seconds", "runtime", "per_second", "step_time", "overhead", "total_flos", "train_loss")
    return [
        {k: v for k, v in record.items() if not any(t in k for t in timed)}
        for record in trainer.state.log_history
        if "train_runtime" not in record
    ]


def test_a_run(world, tmp_path):
    """Loss falls, metrics are there under their names, the student loads, widths and padded vocabularies differ."""
    config = {"max_steps": 16, "eval_steps": 8, "eval_on_start": True, "effopd_enabled": False, "learning_rate": 5e-3}
    trainer = make_trainer(world, tmp_path, config=config)
    trainer.train()
    trainer.save_model()
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert records == trainer.state.log_history
    losses = [r["loss"] for r in records if "loss" in r]
    assert len(losses) == 16 and sum(losses[-4:]) < 0.8 * sum(losses[:4])
    step = next(r for r in records if "loss" in r)
    assert {
        "entropy",
        "num_tokens",
        "step_time",
        "teacher_kl",
        "completions/mean_length",
        "timing_s/rollout",
    } <= step.keys()
    assert step["teacher_kl"] == pytest.approx(step["loss"], rel=1e-4)
    evaluated = [r for r in records if "eval_teacher_kl" in r]
    assert [r["step"] for r in evaluated] == [0, 8, 16]
    assert {"eval_accuracy", "train_tokens", "val_tokens", "seconds"} <= evaluated[0].keys()
    assert 0 < evaluated[1]["train_tokens"] <= 8 * 8 * 6 and evaluated[-1]["val_tokens"] == 0
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, trainer.model.get_parameter(name).to(parameter.dtype)), name
    assert (tmp_path / "generation_config.json").is_file()
    assert len(AutoTokenizer.from_pretrained(tmp_path)) == len(trainer.processing_class)


def test_effopd_moves_attention_and_mlp_only_and_is_logged(world, tmp_path):
    trainer = make_trainer(world, tmp_path, config={"max_steps": 4, "eval_steps": 4})
    before = weights(trainer)
    stepped, left = {}, {}  # weights by step: as the optimizer made them, and as the event left them

    class Watch(TrainerCallback):
        def on_optimizer_step(self, args, state, control, **kwargs):
            stepped[state.global_step + 1] = weights(trainer)

        def on_step_end(self, args, state, control, **kwargs):  # added last, so after the event
            left[state.global_step] = weights(trainer)

    trainer.add_callback(Watch())
    trainer.train()
    events = trainer.effopd.controller.events
    assert [e.step for e in events] == [1, 2, 4]
    moved = {e.step for e in events if e.alpha != 1}
    assert moved, "no event accepted a candidate; the test world should let one"
    logged = [r for r in trainer.state.log_history if "effopd/alpha_accepted" in r]
    assert [r["effopd/alpha_accepted"] for r in logged] == [e.alpha for e in events]
    names = ["score_initial", "score_best", "alpha_accepted", "num_candidates", "delta_norm", "val_tokens"]
    names += ["overhead_s", "virtual_step"]
    assert {f"effopd/{n}" for n in names} <= logged[0].keys()
    for event, anchor in zip(events, (before, left[1], left[2]), strict=True):
        for name, current in stepped[event.step].items():
            expected = current
            if "_proj." in name:
                expected = torch.lerp(anchor[name], current, event.alpha)
            torch.testing.assert_close(left[event.step][name], expected, rtol=0, atol=1e-6, msg=name)
            if event.alpha != 1 and "_proj." in name:
                assert not torch.equal(left[event.step][name], current), name
            if "_proj." not in name:
                assert torch.equal(left[event.step][name], current), name
    assert trainer.effopd.controller.val_tokens == sum(e.val_tokens for e in events)
    final = [r for r in trainer.state.log_history if "eval_teacher_kl" in r][-1]
    assert final["val_tokens"] == trainer.effopd.controller.val_tokens > 0


def test_gradient_search(world, tmp_path):
    """α from slopes on the completions of the event's own weights: generated once, and two scores at most."""
    config = {"max_steps": 4, "effopd_search": "gradient", "effopd_schedule": "2,4", "learning_rate": 3e-4}
    trainer = make_trainer(world, tmp_path, config=config)
    trainer.train()
    events = trainer.effopd.controller.events
    assert [e.step for e in events] == [2, 4] and all(e.num_gradients >= 2 for e in events)
    assert all(e.val_tokens <= 3 * 10 * 6 for e in events)
    assert any(e.alpha > 1 for e in events) and all(e.score_best >= e.score_initial for e in events)
    assert len([r for r in trainer.state.log_history if "teacher_kl" in r]) == 4  # the model was left in training mode


def test_the_loss_as_score_generates_once_an_event(world, tmp_path):
    config = {"max_steps": 4, "effopd_search": "gradient", "effopd_score": "loss", "effopd_schedule": "2,4"}
    trainer = make_trainer(world, tmp_path, config={**config, "learning_rate": 3e-4, "effopd_alphas": [3, 64]})
    trainer.train()
    events = trainer.effopd.controller.events
    assert [e.step for e in events] == [2, 4] and any(e.alpha > 1 for e in events)
    for event in events:
        assert event.val_tokens <= 10 * 6 and event.score_best >= event.score_initial


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_teacher_loss_is_one_mean_whatever_the_ranks(world, tmp_path, monkeypatch, world_size):
    """Ten prompts in batches of four: batches count by their prompts, stand-ins for missing ones nothing. Completed
    once, however often it is asked."""
    trainer = make_trainer(world, tmp_path, config={"effopd_search": "gradient", "per_device_eval_batch_size": 4})
    validator = trainer._validators["val"]
    assert [len(batch) for batch in validator.batches] == [4, 4, 2]
    completed, kl_of_batch = [], torch.tensor([1.0, 10.0, 100.0])
    monkeypatch.setattr(validator, "complete", lambda index: completed.append(index) or (min(index, 2), [[5, 6]]))
    monkeypatch.setattr(validator, "reverse_kl", lambda index, _: (kl_of_batch[index], None, None))
    means = []
    for rank in range(world_size):
        accelerator = SimpleNamespace(num_processes=world_size, process_index=rank)
        monkeypatch.setattr(trainer, "accelerator", accelerator)
        loss, batches = TeacherLoss(validator), len(validator.indices())
        completed.clear()
        for tokens in 2 * batches, 0:
            losses = loss()
            assert losses.tokens == tokens and len(completed) == batches
            values = list(losses.values)
        means.append(sum(values) / len(values))
    assert sum(means) / world_size == pytest.approx(0.4 * 1 + 0.4 * 10 + 0.2 * 100)


def test_resuming_is_exact(world, tmp_path):
    """Stopped after step 3 (between events) or 4 (after one), in the second epoch of the data: same as not stopping."""
    config = {
        "max_steps": 8,
        "save_strategy": "steps",
        "save_steps": 1,
        "eval_steps": 2,
        "per_device_train_batch_size": 16,
    }
    whole = make_trainer(world, tmp_path / "whole", config=config)
    whole.train()
    for stop in (3, 4):
        resumed = make_trainer(world, tmp_path / f"from {stop}", config=config)
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{stop}"))
        assert_same_weights(weights(resumed), weights(whole))
        assert history(resumed) == history(whole)
        assert "train_loss" in whole.state.log_history[-1] and "train_loss" not in resumed.state.log_history[-1]
        assert [e.alpha for e in resumed.effopd.controller.events] == [e.alpha for e in whole.effopd.controller.events]
        lines = (tmp_path / f"from {stop}" / "metrics.jsonl").read_text().splitlines()
        assert len(lines) == len(whole.state.log_history)


class SignalAt(TrainerCallback):
    """Ctrl-C from inside step `step`, at a named point of it."""

    def __init__(self, trainer, point: str, step: int):
        self.step = step
        self.fired = self.now = False
        if point == "rollout":
            self._after(trainer, "_generate_single_turn")
        elif point == "validation":
            self._after(trainer._validators["val"], "_grade_batch")
        elif point == "loss":
            self._after(trainer, "_compute_loss")
        elif point == "evaluation":
            self._after(trainer._validators["eval"], "_grade_batch")
        self.point = point

    def _after(self, owner, name):
        original = getattr(owner, name)

        def wrapped(*args, **kwargs):
            result = original(*args, **kwargs)
            if self.now and not self.fired:
                self._fire()
            return result

        setattr(owner, name, wrapped)

    def _fire(self):
        self.fired = True
        signal.raise_signal(signal.SIGINT)

    def on_step_begin(self, args, state, control, **kwargs):
        self.now = state.global_step + 1 == self.step

    def on_substep_end(self, args, state, control, **kwargs):
        if self.point == "micro-batch" and self.now and not self.fired:
            self._fire()

    def on_optimizer_step(self, args, state, control, **kwargs):
        if self.point == "update" and state.global_step + 1 == self.step:
            self._fire()


def interrupted(trainer, point, step, immediate=True, **resume):
    """Trains until a Ctrl-C; `immediate` or, as with several processes, acted upon at the end of its step."""
    trainer.interrupts.immediate = immediate
    trainer.add_callback(SignalAt(trainer, point, step))
    with pytest.raises(KeyboardInterrupt):
        trainer.train(**resume)
    return trainer


SIX_STEPS = {"max_steps": 6, "eval_steps": 2}


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory):
    """A trainer that nobody stopped."""
    trainer = make_trainer(world, tmp_path_factory.mktemp("whole"), config=SIX_STEPS)
    trainer.train()
    return trainer


@pytest.mark.parametrize(
    ("point", "last_completed"), [("rollout", 3), ("loss", 3), ("update", 4), ("validation", 4), ("evaluation", 4)]
)
def test_ctrl_c_leaves_a_checkpoint_of_the_last_completed_step(whole, world, tmp_path, point, last_completed):
    stopped = interrupted(make_trainer(world, tmp_path / "stopped", config=SIX_STEPS), point, step=4)
    checkpoints = sorted(p.name for p in (tmp_path / "stopped").iterdir() if p.is_dir())
    assert checkpoints == [f"checkpoint-{last_completed}"]
    folder = tmp_path / "stopped" / checkpoints[0]
    saved = AutoModelForCausalLM.from_pretrained(folder)
    for name, parameter in saved.named_parameters():
        assert torch.equal(parameter, stopped.model.get_parameter(name)), name
    assert json.loads((folder / LEDGER_NAME).read_text())["train_tokens"] > 0
    resumed = make_trainer(world, tmp_path / "stopped", config=SIX_STEPS)
    resumed.train(resume_from_checkpoint=True)
    assert_same_weights(weights(resumed), weights(whole))
    assert [e.alpha for e in resumed.effopd.controller.events] == [e.alpha for e in whole.effopd.controller.events]
    curves = [[r for r in history(t) if "eval_teacher_kl" in r] for t in (resumed, whole)]
    assert curves[0] == curves[1] and [r["step"] for r in curves[0]] == [2, 4, 6]  # what it cost included
    counts = [{r["step"]: r["num_tokens"] for r in history(t) if "num_tokens" in r} for t in (resumed, whole)]
    assert all(counts[1][step] == count for step, count in counts[0].items()) and {5, 6} <= counts[0].keys()


def test_a_trainer_that_was_interrupted_goes_on_without_the_rollouts_of_the_step_it_was_in(world, tmp_path):
    config = {"max_steps": 3, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    whole = make_trainer(world, tmp_path / "whole", config=config | {"effopd_enabled": False})
    whole.train()
    stopped = make_trainer(world, tmp_path / "stopped", config=config | {"effopd_enabled": False})
    interrupted(stopped, "micro-batch", step=2)
    stopped.train(resume_from_checkpoint=True)
    assert_same_weights(weights(stopped), weights(whole))
    assert history(stopped) == history(whole)


def test_told_to_stop_once_a_trainer_stops_once(world, tmp_path):
    trainer = make_trainer(world, tmp_path, config={"max_steps": 3, "effopd_enabled": False})
    interrupted(trainer, "loss", step=1, immediate=False)
    assert trainer.state.global_step == 1
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 3


@pytest.mark.parametrize("point", ["update", "validation", "evaluation", "epoch's evaluation"])
def test_told_to_stop_in_the_last_step_several_processes_leave_a_checkpoint(whole, world, tmp_path, point):
    when, point = {"eval_strategy": "epoch"} if "epoch" in point else {"eval_steps": 2}, point.split()[-1]
    trainer = make_trainer(world, tmp_path, config={"max_steps": 2, "eval_steps": None, **when})
    interrupted(trainer, point, step=2, immediate=False)
    resumed = make_trainer(world, tmp_path, config=SIX_STEPS)
    resumed.train(resume_from_checkpoint=True)
    assert_same_weights(weights(resumed), weights(whole))


@pytest.mark.parametrize("when", ["steps", "epoch"])
def test_told_to_stop_at_an_evaluation_without_gain_several_processes_leave_a_checkpoint(world, tmp_path, when):
    """With save_strategy="best" transformers takes back that one is due."""
    best = {"save_strategy": "best", "metric_for_best_model": "eval_teacher_kl", "greater_is_better": True}
    best |= {"eval_strategy": when, "eval_steps": 3, "eval_at_powers_of_two": True}
    trainer = make_trainer(world, tmp_path, config=best | {"max_steps": 3, "effopd_enabled": False})
    interrupted(trainer, "loss", step=2, immediate=False)
    assert (tmp_path / "checkpoint-2").is_dir()


def test_ctrl_c_in_the_first_step_after_resuming_leaves_the_checkpoint_as_it_was(world, tmp_path):
    """Its random state is read after training has begun: what a second checkpoint of the step would hold is another."""
    config = {"max_steps": 3, "save_strategy": "steps", "save_steps": 2, "effopd_enabled": False}
    whole = make_trainer(world, tmp_path, config=config)
    whole.train()
    shutil.rmtree(tmp_path / "checkpoint-3")
    interrupted(make_trainer(world, tmp_path, config=config), "rollout", step=3, resume_from_checkpoint=True)
    resumed = make_trainer(world, tmp_path, config=config)
    resumed.train(resume_from_checkpoint=True)
    assert_same_weights(weights(resumed), weights(whole))


def test_a_checkpoint_that_does_not_fit_is_refused(world, tmp_path):
    config = {"max_steps": 2, "save_strategy": "steps", "save_steps": 2}
    make_trainer(world, tmp_path / "opd", config={**config, "effopd_enabled": False}).train()
    make_trainer(world, tmp_path / "effopd", config=config).train()
    lora = {"peft_config": LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")}
    for run, options, changed, says in (
        ("opd", {}, {}, "made with --effopd_enabled False, which a resumed run keeps, got True"),
        ("effopd", {}, {"effopd_enabled": False}, "made with --effopd_enabled True, which a resumed run keeps, got F"),
        ("effopd", {}, {"learning_rate": 2e-3}, "made with --learning_rate 0.001, .* got 0.002: resume with --learni"),
        ("effopd", {}, {"effopd_include": ["mlp"]}, "cannot be resumed from: anchor of other weights"),
        ("opd", {"student": str(world / "teacher")}, {"effopd_enabled": False}, "another model .* Missing key"),
        ("opd", lora, {"effopd_enabled": False}, "another model or other settings"),
    ):
        trainer = make_trainer(world, tmp_path / run, config={**config, "max_steps": 3, **changed}, **options)
        with pytest.raises(UserError, match=says):
            trainer.train(resume_from_checkpoint=True)


@pytest.mark.parametrize(("broken", "says"), [("teacher", "the teacher's logits are not finite at step 1"),
                                              ("student", "the loss is not finite at step 1")])  # fmt: skip
def test_non_finite_stops_before_the_update(world, tmp_path, broken, says):
    trainer = make_trainer(world, tmp_path)
    model = trainer.teacher_model if broken == "teacher" else trainer.model
    with torch.no_grad():
        model.model.norm.weight[0] = math.nan
    before = weights(trainer)
    with pytest.raises(NonFiniteLossError, match=says):
        trainer.train()
    for name, value in weights(trainer).items():
        assert torch.equal(value, before[name]) or value.isnan().any(), name


@pytest.mark.parametrize("factor", [math.nan, math.inf, 3e38])
def test_a_student_that_diverges_is_said_at_the_next_loss(world, tmp_path, factor):
    """Generation comes before it, and may not stumble over the logits that the loss is to tell of."""
    config = {"temperature": 0.7, "save_strategy": "steps", "save_steps": 1, "effopd_enabled": False}
    trainer = make_trainer(world, tmp_path, config=config)

    class Diverge(TrainerCallback):
        def on_optimizer_step(self, args, state, control, **kwargs):
            with torch.no_grad():
                trainer.model.model.norm.weight.mul_(factor if state.global_step + 1 == 3 else 1)

    trainer.add_callback(Diverge())
    says = (
        r"the loss is not finite at step 4; .* try a lower learning_rate \('checkpoint-2' is the newest whose loss was"
    )
    with pytest.raises(NonFiniteLossError, match=says):
        trainer.train()
    assert not trainer.model.lm_head._forward_hooks


def test_a_candidate_of_no_finite_score_is_not_accepted_and_a_student_of_none_has_diverged(world, tmp_path):
    trainer = make_trainer(world, tmp_path / "candidate", config={"max_steps": 1, "effopd_alphas": [1e30]})
    trainer.train()
    (event,) = trainer.effopd.controller.events
    assert (event.alpha, event.num_candidates) == (1, 1) and not math.isfinite(event.candidates[0].score)
    trainer = make_trainer(world, tmp_path / "student", config={"learning_rate": 1e10, "optim": "sgd"})
    with pytest.raises(NonFiniteLossError, match=r"the student's score is not finite after step 1; .* try a lower"):
        trainer.train()


def test_accumulated_micro_batches_of_unequal_length_count_by_their_tokens(world, tmp_path):
    config = {"max_steps": 2, "effopd_enabled": False, "per_device_train_batch_size": 2}
    trainer = make_trainer(world, tmp_path, config={**config, "gradient_accumulation_steps": 4})
    trainer._generate_single_turn = lambda prompts, *_: [[5, 6, 7, 8, 9, 10][: 1 + sum(p) % 6] for p in prompts]
    trainer.train()
    steps = [r for r in trainer.state.log_history if "loss" in r]
    assert len(steps) == 2
    for step in steps:
        assert step["teacher_kl"] == pytest.approx(step["loss"], rel=1e-5)


@pytest.mark.parametrize(
    ("options", "name"),
    [({}, "teacher_kl"), ({"divergence": "jsd:0.5"}, "divergence"), ({"loss_temperature": 2.0}, "divergence")],
)
def test_a_loss_that_is_no_kl_to_the_teacher_is_not_called_one(world, tmp_path, options, name):
    trainer = make_trainer(world, tmp_path, config=options)
    trainer.model.train()
    trainer.compute_loss(trainer.model, trainer._generate_and_score_completions([{"prompt": "Tom has"}]))
    assert {"teacher_kl", "divergence"} & trainer._metrics["train"].keys() == {name}


def test_an_epoch_has_an_order_of_its_own_and_the_same_when_resumed(world, tmp_path):
    trainer = make_trainer(world, tmp_path)

    def order(epoch):
        trainer.state.epoch = epoch
        return list(trainer._get_train_sampler())

    first, second = order(0.0), order(1.0)
    assert first != second and sorted(first) == sorted(second) and second == order(1.5)


def test_what_is_not_training_is_off_the_clock(world, tmp_path, monkeypatch):
    """Held-out evaluation, the check of the last update and writing a checkpoint, by a clock that only they move."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(ledger, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    trainer = make_trainer(world, tmp_path)

    def hours_of(owner, name, result=None):
        def work(*args):
            clock.now += 3600
            return result

        monkeypatch.setattr(owner, name, work)

    hours_of(trainer._validators["eval"], "share", [(0, 5, 1.0, 0.1)])
    hours_of(trainer, "reverse_kl", (None, SimpleNamespace(divergence=torch.zeros(1)), None))
    hours_of(trainer, "_write_checkpoint")
    trainer._last_inputs, trainer.ledger.train_tokens = {}, 12
    trainer.ledger.start()
    clock.now += 3
    assert trainer.evaluate()["seconds"] == 3
    clock.now += 4
    trainer._save_checkpoint(None, None)
    assert (trainer.ledger.seconds, clock.now) == (7, 3 * 3600 + 7)
    clock.now += 2
    resumed = Ledger()
    resumed.load_state_dict(trainer.ledger.state_dict())
    assert (resumed.train_tokens, resumed.seconds) == (12, 9)


def test_a_resumed_run_leaves_out_the_evaluation_at_the_start_and_the_next_has_it(world, tmp_path, monkeypatch):
    trainer, asked = make_trainer(world, tmp_path, config={"eval_on_start": True}), []
    monkeypatch.setattr(Trainer, "train", lambda self, **_: asked.append(self.args.eval_on_start))
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / "checkpoint-1" / "rng_state.pth").touch()
    for resumed in (str(tmp_path / "checkpoint-1"), None):
        trainer.train(resume_from_checkpoint=resumed)
    assert asked == [False, True]


def test_the_best_checkpoint_is_not_one_too_many(world, tmp_path, monkeypatch):
    def write(trainer, *_):
        Path(trainer._get_output_dir(None), f"checkpoint-{trainer.state.global_step}").mkdir(parents=True)

    monkeypatch.setattr(trl.DistillationTrainer, "_save_checkpoint", write)
    trainer = make_trainer(world, tmp_path, config={"save_total_limit": 2, "effopd_enabled": False})
    trainer.state.best_global_step = 1
    for step in (1, 2, 3):
        trainer.state.global_step = step
        trainer._save_checkpoint(None, None)
    assert {p.name for p in tmp_path.glob("checkpoint-*")} == {"checkpoint-1", "checkpoint-3"}


def test_pad_that_is_eos_does_not_hide_the_real_eos(world, tmp_path):
    """The loss covers the completion up to and including its first EOS, also when padding looks the same."""
    tokenizer = tiny.tokenizer_of(world)
    tokenizer.pad_token = tokenizer.eos_token
    trainer = make_trainer(world, tmp_path, processing_class=tokenizer)
    eos = tokenizer.eos_token_id
    completions = [[5, 6, eos], [7, 8, 9, 10, eos], [11, eos]]
    trainer._generate_single_turn = lambda prompt_ids, *_: completions[: len(prompt_ids)]
    seen = []
    trainer.fused_loss.observer = lambda stats, mask: seen.append((stats, mask)) or trainer._observe(stats, mask)
    trainer.model.train()
    inputs = trainer._generate_and_score_completions([{"prompt": p} for p in ("Tom", "Ana has", "Kim")])
    trainer.compute_loss(trainer.model, inputs)
    ((stats, mask),) = seen
    assert mask.sum(-1).tolist() == [3, 5, 2]
    assert (stats.divergence[mask] > 0).all() and (stats.divergence[~mask] == 0).all()


def test_validation_repeats_itself_and_leaves_no_trace(world, tmp_path):
    trainer = make_trainer(world, tmp_path)
    trainer.model.train()
    validator = trainer._validators["eval"]
    state = torch.get_rng_state()
    first, second = validator(), validator()
    assert torch.equal(torch.get_rng_state(), state) and trainer.model.training
    assert first.teacher_kl == second.teacher_kl and len(first.teacher_kl) == len(first.accuracy) == 10
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.mul_(1.1)
    assert validator().teacher_kl != first.teacher_kl


def test_greedy_validation_keeps_nothing_of_how_training_samples(world, tmp_path):
    config = {"top_p": 0.9, "top_k": 5, "min_p": 0.1, "repetition_penalty": 1.5, "generation_kwargs": {"num_beams": 2}}
    for temperature, expected in (0, (False, None, None, None, None, 1, 1)), (0.5, (True, 0.5, 0.9, 5, 0.1, 1.5, 2)):
        trainer = make_trainer(world, tmp_path, config=config | {"eval_temperature": temperature})
        used = trainer._validators["eval"].generation_config
        sampling = used.do_sample, used.temperature, used.top_p, used.top_k, used.min_p
        assert (*sampling, used.repetition_penalty, used.num_beams) == expected


def test_the_students_own_beams_are_not_rollouts(world, tmp_path):
    student = AutoModelForCausalLM.from_pretrained(world / "student")
    student.generation_config.num_beams = 3
    trainer = make_trainer(world, tmp_path, student=student, processing_class=tiny.tokenizer_of(world))
    used, prepare = [], student._prepare_generation_config
    student._prepare_generation_config = lambda *a, **k: used.append(prepare(*a, **k)) or used[-1]
    trainer._generate(["Tom has 3"])
    trainer.evaluate()
    assert {config.num_beams for config, _ in used} == {1} and student.generation_config.num_beams == 3


@pytest.mark.parametrize("family", [OPTConfig, FalconConfig])  # which keep it in modules, or read it from their config
def test_dropout_of_functions_is_disabled_too(world, tmp_path, family):
    tokenizer = tiny.tokenizer_of(world)
    own = (
        {"ffn_dim": 32, "word_embed_proj_dim": 32, "layerdrop": 0.5} if family is OPTConfig else {"hidden_dropout": 0.5}
    )
    config = family(**SMALL | {"vocab_size": len(tokenizer), "eos_token_id": 1}, attention_dropout=0.5, **own)
    for disabled in (False, True):
        student = AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation="eager").train()
        options = {"disable_dropout": disabled, "effopd_enabled": False}
        trainer = make_trainer(world, tmp_path, student=student, processing_class=tokenizer, config=options)
        ids = torch.arange(4, 44)[None]
        first, second = (student(input_ids=ids).logits for _ in range(2))
        assert torch.equal(first, second) == disabled
        trainer.save_model(tmp_path / f"saved-{disabled}")
        assert AutoConfig.from_pretrained(tmp_path / f"saved-{disabled}").attention_dropout == 0.5
        assert torch.equal(*(student(input_ids=ids).logits for _ in range(2))) == disabled


def test_each_batch_of_validation_has_a_seed_of_its_own(world, tmp_path):
    validator = make_trainer(world, tmp_path)._validators["eval"]
    validator.batches = [range(4), range(4)]
    (_, first), (_, again), (_, second) = map(validator.complete, (0, 0, 1))
    assert first == again and first != second


def test_vllm_validates_at_its_own_temperature_with_the_weights_of_now(world, tmp_path):
    trainer = make_trainer(world, tmp_path, config={"temperature": 0.7, "eval_temperature": 0.5})
    trainer.vllm_generation = vllm = SimpleNamespace(temperature=0.7, repetition_penalty=1.5)
    seen = []
    trainer._generate_single_turn = lambda prompt_ids, *_: seen.append(copy.copy(vllm)) or prompt_ids
    trainer._validators["eval"].complete(0)
    assert [(v.temperature, v.repetition_penalty) for v in (*seen, vllm)] == [(0.5, 1.0), (0.7, 1.5)]
    trainer._last_loaded_step = trainer.state.global_step
    trainer.effopd.controller_args["on_weights_changed"]()
    assert trainer._last_loaded_step != trainer.state.global_step  # so that TRL sends them before it generates


def test_teacher_kl_is_the_mean_over_the_students_completion(world, tmp_path):
    """Against log-softmaxes of full logits in fp64, on the completion that validation generates."""
    trainer = make_trainer(world, tmp_path)
    validator = trainer._validators["eval"]
    prompt_ids = [trainer._tokenizer(p)["input_ids"] for p in ("Tom has 3", "Ana has 12 books")]
    completion_ids = [[5, 6, 7], [9, 1]]
    kl = validator._teacher_kl(prompt_ids, completion_ids)
    shared = min(trainer.model.config.vocab_size, trainer.teacher_model.config.vocab_size)
    for i, (prompt, completion) in enumerate(zip(prompt_ids, completion_ids, strict=True)):
        ids = torch.tensor([prompt + completion])
        lq, lp = (
            model(ids).logits[0, len(prompt) - 1 : -1, :shared].double().log_softmax(-1)
            for model in (trainer.model, trainer.teacher_model)
        )
        assert kl[i] == pytest.approx((lq.exp() * (lq - lp)).sum(-1).mean().item(), rel=1e-4)


def test_a_lora_student(world, tmp_path):
    """Only adapters move; a resumed run equals the whole one; the folder written holds the jumps in one adapter."""
    config = {"max_steps": 3, "learning_rate": 1e-2, "save_strategy": "steps", "save_steps": 2}

    def lora_trainer(out):
        lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "up_proj"], task_type="CAUSAL_LM")
        return make_trainer(world, out, config=config, peft_config=lora)

    whole = lora_trainer(tmp_path / "whole")
    before = weights(whole)
    whole.train()
    after = weights(whole)
    changed = {n for n, value in before.items() if not torch.equal(value, after[n])}
    assert changed and all("lora" in n for n in changed)
    assert [e.step for e in whole.effopd.controller.events] == [1, 2]
    assert any(e.alpha != 1 for e in whole.effopd.controller.events)

    resumed = lora_trainer(tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert_same_weights(weights(resumed), after)

    ids = torch.tensor([whole._tokenizer("Tom has 3 apples")["input_ids"]])
    whole.model.eval()
    with torch.no_grad():
        trained = whole.model(ids).logits
        whole.save_model(str(tmp_path / "student"))
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "student").eval()
        torch.testing.assert_close(loaded(ids).logits, trained, rtol=1e-4, atol=1e-4)

    with pytest.raises(UserError, match=r"checkpoint-3' has an adapter of rank 4, .* trainer constructed anew"):
        whole.train(resume_from_checkpoint=True)
    assert_same_weights(weights(whole), after)


def test_an_adapter_that_makes_other_weights_of_its_parameters_is_not_resumed(world, tmp_path):
    config = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1}
    given = {"r": 4, "task_type": "CAUSAL_LM", "target_modules": ["v_proj", "q_proj"]}

    def trainer(**changed):
        return make_trainer(world, tmp_path, config=config, peft_config=LoraConfig(**given | changed))

    trainer().train()
    for changed, says in (
        ({"lora_alpha": 64}, "lora_alpha 8, the student's is of 64; resume with the checkpoint's"),
        ({"use_rslora": True}, "use_rslora False, the student's is of True"),
        ({"modules_to_save": ["up_proj"]}, r"modules_to_save None, the student's is of \['up_proj'\]"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights True, the student's is of pissa"),
        ({"target_modules": ["q_proj"]}, r"target_modules \['q_proj', 'v_proj'\], the student's is of \['q_proj'\]"),
    ):
        with pytest.raises(UserError, match=f"checkpoint-1' has an adapter of {says}"):
            trainer(**changed).train(resume_from_checkpoint=True)
    trainer().train(resume_from_checkpoint=True)
    same = {"target_modules": r".*\.[qv]_proj", "modules_to_save": [], "init_lora_weights": "gaussian"}
    trainer(**same).train(resume_from_checkpoint=True)  # by other words


def test_generating_adds_no_hooks_to_the_embeddings(world, tmp_path):
    trainer = make_trainer(world, tmp_path, config={"gradient_checkpointing": True})
    student = trainer.model
    name = "activation" if hasattr(student, "is_activation_checkpointing") else "gradient"  # the older one
    getattr(student, f"{name}_checkpointing_enable")()
    hooks = trainer.model.get_input_embeddings()._forward_hooks
    (there,) = hooks
    for _ in range(2):
        trainer._validators["val"]()
    assert len(hooks) == 1 and there not in hooks and getattr(student, f"is_{name}_checkpointing")


def test_messages_go_through_the_chat_template(world, tmp_path):
    rows = [{"prompt": [{"role": "user", "content": r["prompt"]}], "answer": r["answer"]} for r in tiny.problems()]
    for name, part in {"train": rows[:40], "val": rows[40:50], "eval": rows[50:]}.items():
        tiny.write_jsonl(tmp_path / f"{name}.jsonl", part)
    for model in ("student", "teacher"):
        (tmp_path / model).symlink_to(world / model)
    trainer = make_trainer(tmp_path, tmp_path / "out", config={"max_steps": 1})
    trainer.train()
    ids = trainer._tokenize_prompts([rows[0]["prompt"]])[0][0]
    assert trainer._tokenizer.decode(ids).startswith("<user>Tom has") and ids[-1] == 3


def test_a_student_of_more_padded_ids_than_the_teachers(world, tmp_path):
    """The teacher has no embedding for the student's last eight ids, so none of them may be sampled, nor what the user
    rules out."""
    config = {"max_steps": 3, "generation_kwargs": {"suppress_tokens": [5]}}
    trainer = make_trainer(
        world, tmp_path, student=str(world / "teacher"), teacher=str(world / "student"), config=config
    )
    trainer.train()
    assert trainer.generation_kwargs["suppress_tokens"] == [5, *range(324, 332)]
    assert trainer.state.global_step == 3 and trainer.evaluate()["eval_teacher_kl"] > 0


def test_prompts_that_were_not_given_are_asked_for(world, tmp_path):
    prompts = tiny.load(world / "eval.jsonl")
    parts = str(world / "student"), str(world / "teacher")
    with pytest.raises(UserError, match="effopd_enabled needs val_dataset"):
        OPDTrainer(*parts, OPDConfig(str(tmp_path), **tiny.FLAGS), train_dataset=prompts)
    config = OPDConfig(str(tmp_path), effopd_enabled=False, **tiny.FLAGS)
    trainer = OPDTrainer(*parts, config, train_dataset=prompts)
    with pytest.raises(UserError, match="nothing to evaluate on"):
        trainer.evaluate()
    assert {"eval_accuracy", "eval_teacher_kl"} <= trainer.evaluate(prompts).keys()
    assert "eval_accuracy" not in trainer.evaluate(prompts.remove_columns("answer"))
    with pytest.raises(UserError, match="neither calls tools nor shows images"):
        trainer.evaluate(prompts.add_column("image", [None] * len(prompts)))


def test_what_is_wrong_with_what_python_gives_is_said_before_any_training(world, tmp_path):
    rows, tokenizer = tiny.load(world / "eval.jsonl"), tiny.tokenizer_of(world)
    without = rows.remove_columns("answer")
    unanswered = without.add_column("answer", [None, *rows["answer"][1:]])
    answers = {"eval_metric": "accuracy"}
    ending = tiny.tokenizer_of(world)
    ending._tokenizer.post_processor = TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 1)])
    for config, given, says in (
        ({}, {"train_dataset": DatasetDict(train=rows)}, "train_dataset must be one dataset, got a dict of 'train'"),
        ({}, {"val_dataset": DatasetDict(a=rows, b=rows)}, "val_dataset must be one dataset, got a dict of 'a', 'b'"),
        ({}, {"train_dataset": rows.rename_column("prompt", "text")}, "train_dataset has no column 'prompt'; its col"),
        ({}, {"eval_dataset": rows.select([])}, "^eval_dataset is empty"),
        ({}, {"eval_dataset": {"a": rows, "b": rows.select([])}}, r"^eval_dataset\['b'\] is empty"),
        ({}, {"val_dataset": rows.select([])}, "^val_dataset is empty"),
        (answers, {"val_dataset": without}, "accuracy needs a column 'answer' .* in 'val_dataset', whose columns are"),
        (answers, {"val_dataset": unanswered}, "dataset 'val_dataset' has no answer in row 0"),
        (answers, {"eval_dataset": unanswered}, "dataset 'eval_dataset' has no answer in row 0"),
        ({}, {"teacher_model": None}, "needs teacher_model: a model, a folder or a hub id"),
        ({}, {"args": None}, "needs args, an OPDConfig, got None"),
        ({}, {"args": trl.DistillationConfig(str(tmp_path), bf16=False, use_cpu=True)}, "got DistillationConfig"),
        (
            {},
            {"processing_class": ending},
            "ends the prompts in train_dataset with '<eos>', beyond which nothing is to",
        ),
        (
            {"metric_for_best_model": "teacher_kl"},
            {"eval_dataset": {"a": rows}},
            r"metric_for_best_model .*needs one eval_dataset, got a dict of them",
        ),
    ):
        parts = {
            "model": str(world / "student"),
            "teacher_model": str(world / "teacher"),
            "processing_class": tokenizer,
        }
        parts |= {f"{kind}_dataset": rows for kind in ("train", "eval", "val")}
        with pytest.raises(UserError, match=says):
            OPDTrainer(**{**parts, "args": OPDConfig(str(tmp_path), **tiny.FLAGS | config), **given})


def test_several_held_out_datasets(world, tmp_path):
    """As transformers names them; accuracy where each prompt has an answer."""
    rows = tiny.load(world / "eval.jsonl")
    first = rows.select(range(3))
    unanswered = rows.remove_columns("answer").add_column("answer", [None, *rows["answer"][1:]])
    config = OPDConfig(str(tmp_path), **tiny.FLAGS | {"max_steps": 1, "eval_steps": 1, "effopd_enabled": False})
    parts = str(world / "student"), str(world / "teacher"), config
    trainer = OPDTrainer(*parts, train_dataset=rows, eval_dataset=DatasetDict(a=first, b=unanswered))
    trainer.train()
    assert trainer._noted().keys() == {"teacher", "eval_dataset['a']", "eval_dataset['b']"}
    logged = {name for record in trainer.state.log_history for name in record}
    assert {"eval_a_accuracy", "eval_a_teacher_kl", "eval_b_teacher_kl"} <= logged and "eval_b_accuracy" not in logged
    metrics = trainer.evaluate(metric_key_prefix="test")
    assert metrics["test_a_teacher_kl"] == trainer.evaluate(first)["eval_teacher_kl"] != metrics["test_b_teacher_kl"]


def test_a_folder_that_ranks_do_not_share_is_refused_before_a_model_is_loaded(tmp_path, monkeypatch):
    def refuse(folder):
        assert folder == tmp_path / "out"
        raise UserError("not one folder")

    monkeypatch.setattr("effopd_kernels.train.trainer.check_shared", refuse)
    with pytest.raises(UserError, match="not one folder"):
        OPDTrainer("nobody", "nobody", OPDConfig(str(tmp_path / "out"), effopd_enabled=False))


def test_a_private_interface_that_is_gone_is_named(world, tmp_path, monkeypatch):
    """An override that transformers no longer calls, and what only a trainer with vLLM has."""
    trainer = make_trainer(world, tmp_path)
    check_private_api(trainer)
    trainer.use_vllm = True
    with pytest.raises(RuntimeError, match="has no `_last_loaded_step`, which is the step whose weights vLLM holds"):
        check_private_api(trainer)
    monkeypatch.delattr(Trainer, "_run_epoch")
    with pytest.raises(RuntimeError, match=r"^TRL 1.* has no `_run_epoch`, which trains an epoch; .* tested with TRL"):
        make_trainer(world, tmp_path)


@pytest.mark.parametrize(
    "config",
    [
        Qwen3MoeConfig(**SMALL, head_dim=8, moe_intermediate_size=16, num_experts=4, tie_word_embeddings=True),
        GPTNeoXConfig(**SMALL, intermediate_size=64),
        Qwen3Config(**SMALL, head_dim=8, intermediate_size=64, tie_word_embeddings=True),
    ],
    ids=lambda config: config.model_type,
)
@pytest.mark.parametrize("shard", ["50GB", "20KB"], ids=["whole", "sharded"])
def test_weights_saved_under_other_names_are_read_back(world, tmp_path, config, shard):
    """Mixtures of experts and GPT-NeoX: transformers reads by name alone, and left those as they were."""
    saved, here = (AutoModelForCausalLM.from_config(config) for _ in range(2))
    saved.save_pretrained(tmp_path / "checkpoint", max_shard_size=shard)
    trainer = tiny.make_trainer(world, tmp_path / "out")
    for load in (
        lambda: trainer._load_from_checkpoint(str(tmp_path / "checkpoint")),
        trainer._load_best_model,
    ):
        trainer.model = copy.deepcopy(here)
        trainer.state.best_model_checkpoint = str(tmp_path / "checkpoint")
        load()
        expected = saved.state_dict()
        assert all(torch.equal(value, expected[name]) for name, value in trainer.model.state_dict().items())


def test_weights_in_half_precision_are_warned_of(world, tmp_path, caplog):
    adapter = LoraConfig(task_type="CAUSAL_LM")  # whose own weights peft makes float32
    for dtype, trained, said in ("bfloat16", None, 0), ("float16", adapter, 0), ("float16", None, 1):
        config = {"model_init_kwargs": {"dtype": dtype}, "effopd_enabled": False, "max_steps": 1}
        make_trainer(world, tmp_path, config=config, peft_config=trained).train()
        assert caplog.text.count("weights are float16, in which") == said
