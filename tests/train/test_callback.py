"""EffOPDCallback alone, in trainers that know nothing of it: events happen, and a resumed run equals the whole one."""

import pytest
import torch
import transformers
import trl
from datasets import Dataset

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


def plain_trainer(world, out):
    model = transformers.AutoModelForCausalLM.from_pretrained(world / "student")
    tokenizer = tiny.tokenizer_of(world)
    ids = [tokenizer(r["prompt"])["input_ids"][:12] for r in tiny.problems()]
    data = Dataset.from_dict({"input_ids": ids, "labels": ids})
    return transformers.Trainer(model, transformers.TrainingArguments(str(out), **FLAGS), train_dataset=data)


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


def grpo_trainer(world, out):
    def even(completion_ids, **kwargs):
        return [float(sum(i % 2 == 0 for i in ids)) for ids in completion_ids]

    args = trl.GRPOConfig(str(out), max_completion_length=6, num_generations=2, **{**FLAGS, "learning_rate": 1e-2})
    train = tiny.load(world / "train.jsonl")
    return trl.GRPOTrainer(str(world / "student"), even, args, train_dataset=train)


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


@pytest.mark.parametrize("build", [plain_trainer, distillation_trainer, grpo_trainer])
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
    if build is not plain_trainer:  # TRL's averages are the step's; an event's record takes none of them
        assert all("entropy" in r for r in steps)
    if build is plain_trainer:  # what it is scored by is what it learns
        assert any(e.alpha != 1 for e in events)
    resumed, effopd = with_effopd(build, world, tmp_path / "resumed")
    (tmp_path / "resumed" / "checkpoint-2").symlink_to(tmp_path / "whole" / "checkpoint-2")
    resumed.train(resume_from_checkpoint=str(tmp_path / "resumed" / "checkpoint-2"))
    assert [(e.step, e.alpha, e.score_best) for e in effopd.controller.events] == [
        (e.step, e.alpha, e.score_best) for e in events
    ]
    for name, parameter in whole.model.named_parameters():
        assert torch.equal(resumed.model.get_parameter(name), parameter), name


def test_a_checkpoint_by_another_name_elsewhere(world, tmp_path):
    whole, effopd = with_effopd(plain_trainer, world, tmp_path / "whole")
    whole.train()
    kept = (tmp_path / "whole" / "checkpoint-2").rename(tmp_path / "kept")
    resumed, again = with_effopd(plain_trainer, world, tmp_path / "resumed")
    with pytest.raises(UserError, match=r"if another folder is resumed from, set args.resume_from_checkpoint to it"):
        resumed.train(resume_from_checkpoint=str(kept))
    resumed, again = with_effopd(plain_trainer, world, tmp_path / "resumed")
    resumed.args.resume_from_checkpoint = str(kept)
    resumed.train(resume_from_checkpoint=str(kept))
    assert [e.alpha for e in again.controller.events] == [e.alpha for e in effopd.controller.events]


def test_nothing_to_move_is_said_before_training(world, tmp_path):
    trainer = plain_trainer(world, tmp_path)
    trainer.add_callback(EffOPDCallback(lambda: [0.0], include="no_such_parameter"))
    with pytest.raises(UserError, match="no_such_parameter"):
        trainer.train()
    assert trainer.state.global_step == 0
