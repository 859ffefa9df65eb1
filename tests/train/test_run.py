"""What a run's options become, up to the trainer that is made of them, and what it goes on from."""

import json
import math
import shutil
from itertools import chain, permutations
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from effopd_kernels.train import OPDConfig, UserError, loading, run
from effopd_kernels.train.checkpoint import newest_intact, publish
from effopd_kernels.train.options import parse
from effopd_kernels.train.tokenizing import prompt_length
from train import world as tiny
from train.test_cli import flags


def test_what_is_asked_of_extrapolation_reaches_the_controller(tmp_path):
    given = {"schedule": [2, 4], "min_delta": 0.1, "confidence": 0.9, "max_val_tokens": 9, "search": "gradient"}
    given |= {"anchor_device": "disk", "include": ["mlp"], "exclude": ["x"]}
    renamed = {"alphas": [2, 3], "acceptance": "paired", "optimizer": "reset"}
    config = OPDConfig(str(tmp_path), **{f"effopd_{name}": value for name, value in (given | renamed).items()})
    there = {"anchor_dir": str(tmp_path / "effopd_anchor")}
    expected = {**given, **there, "alphas": (2, 3), "accept": "paired", "optimizer_policy": "reset"}
    assert config.controller_args() == expected


def test_what_is_not_asked_follows_from_the_metric(tmp_path):
    for metric, asked, temperature in (
        ("accuracy", None, 0.0),
        ("teacher_kl", None, 0.7),
        ("accuracy", 0.3, 0.3),
        ("teacher_kl", 0.0, 0.0),
    ):
        options = {"eval_metric": metric, "eval_temperature": asked, "save_strategy": "best", "eval_steps": 1}
        config = OPDConfig(str(tmp_path), temperature=0.7, **options)
        assert config.validation_temperature == temperature
        assert config.greater_is_better is (metric == "accuracy")


@pytest.fixture
def build(monkeypatch):
    """`build_trainer` by flags, up to the models: what it hands to the trainer."""

    def build(argv):
        given = {}
        monkeypatch.setattr(run, "OPDTrainer", lambda *parts, **named: given.update(named, args=parts[2]))
        run.build_trainer(*parse(argv))
        return given

    return build


def test_prompts_that_are_held_out_are_not_trained_on(world, tmp_path, build):
    sizes = {"eval_dataset_name": None, "eval_size": 7, "val_dataset_name": None, "effopd_val_size": 5}
    given = build(flags(world, tmp_path, **sizes))
    parts = [given[f"{kind}_dataset"]["prompt"] for kind in ("train", "eval", "val")]
    assert [len(part) for part in parts] == [28, 7, 5]
    assert sorted(chain(*parts)) == sorted(tiny.load(world / "train.jsonl")["prompt"])


def test_every_prompt_fits_the_shorter_context_beside_its_completion(world, tmp_path, build):
    """Of two in each file, one fits exactly, the other would without the completion, or without what the chat template
    puts before it, or if only the student had to read it."""
    kwargs = {"preamble": "How many?"}
    tokenizer = tiny.tokenizer_of(world)
    tokenizer.chat_template = "{{ preamble }}" + tiny.CHAT
    for model in ("student", "teacher"):
        shutil.copytree(world / model, tmp_path / model, ignore=shutil.ignore_patterns("*.safetensors"))
        tokenizer.save_pretrained(tmp_path / model)
    prompts = [[{"role": "user", "content": text}] for text in ("Tom", "Tom has 3")]
    fits, longer = (prompt_length(prompt, tokenizer, **kwargs) for prompt in prompts)
    completion = tiny.FLAGS["max_completion_length"]
    assert fits < longer <= fits + completion and prompt_length(prompts[1], tokenizer) <= fits
    config = tmp_path / "teacher" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"max_position_embeddings": fits + completion}))
    for kind in ("train", "eval", "val"):
        tiny.write_jsonl(tmp_path / f"{kind}.jsonl", [{"prompt": prompt} for prompt in prompts])
    chat = {"chat_template_kwargs": json.dumps(kwargs), "overlong_prompts": "drop"}
    given = build(flags(tmp_path, tmp_path / "out", **chat))
    assert [given[f"{kind}_dataset"]["prompt"] for kind in ("train", "eval", "val")] == [prompts[:1]] * 3


def test_what_padding_takes_is_no_room_for_prompts(world, tmp_path, build):
    """128 tokens, 6 of a completion: both are padded to multiples of 48, so that one remains of two."""
    tokenizer, prompts = tiny.tokenizer_of(world), ["Tom", "Tom has 3" * 20]
    assert 48 < prompt_length(prompts[1], tokenizer) <= 128 - 48
    for kind in ("train", "eval", "val"):
        tiny.write_jsonl(tmp_path / f"{kind}.jsonl", [{"prompt": prompt} for prompt in prompts])
    for model in ("student", "teacher"):
        shutil.copytree(world / model, tmp_path / model)
    for multiple, fit in (None, 2), (48, 1):
        options = {"pad_to_multiple_of": multiple, "overlong_prompts": "drop"}
        assert len(build(flags(tmp_path, tmp_path / "out", **options))["train_dataset"]) == fit
    with pytest.raises(UserError, match=r"leaves no room for a prompt .* takes a multiple of --pad_to_mu"):
        build(flags(tmp_path, tmp_path / "out", pad_to_multiple_of=96))


def test_prompts_that_are_trained_on_and_called_held_out_are_said(world, tmp_path, build, caplog):
    build(flags(world, tmp_path))
    assert "is trained on what is called held out" not in caplog.text
    build(flags(world, tmp_path, eval_dataset_name=f"{world}/../{world.name}/train.jsonl"))
    assert "train.jsonl': the student is trained on what is called held out" in caplog.text


@pytest.mark.parametrize(
    "given, says",
    [
        ({"eos_token_id": 5}, "eos_token_id must be left out, .*generation_config.json"),
        ({"eos_token_id": None}, "eos_token_id must be left out"),
        ({"max_new_tokens": 5}, "max_new_tokens must be left out, for --max_completion_length"),
        ({"max_length": 5}, "max_length must be left out, for --max_completion_length"),
        ({"return_dict_in_generate": True}, "return_dict_in_generate must be left out"),
        ({"disable_compile": True}, "disable_compile must be left out"),
        ({"top_pp": 0.1}, "unknown option top_pp of transformers' GenerationConfig; top_p\\?$"),
        ({"_from_model_config": True}, "unknown option _from_model_config"),
    ],
)
def test_what_generation_does_not_take_is_refused(tmp_path, given, says):
    with pytest.raises(UserError, match=f"^--generation_kwargs: {says}"):
        OPDConfig(str(tmp_path), generation_kwargs=given)


@pytest.mark.parametrize("given", [-0.1, math.inf, math.nan])
def test_weights_that_would_grow_are_refused(tmp_path, given):
    """torch looks at the weight_decay of an optimizer, and transformers gives each group of parameters its own."""
    with pytest.raises(UserError, match=r"^--weight_decay must be 0 or more, and finite, got"):
        OPDConfig(str(tmp_path), weight_decay=given)


@pytest.mark.parametrize(
    "given",
    [
        {"auto_find_batch_size": True},
        {"data_seed": 0},
        {"train_sampling_strategy": "group_by_length"},
        {"label_smoothing_factor": 0.1},
        {"bf16_full_eval": True},
        {"fp16_full_eval": True},
    ],
)
def test_what_would_do_nothing_is_refused(tmp_path, given):
    with pytest.raises(UserError, match=f"^--{next(iter(given))} cannot be: "):
        OPDConfig(str(tmp_path), **given)


@pytest.mark.parametrize("schedule", ["reduce_lr_on_plateau", "greedy"])
def test_a_schedule_that_looks_at_the_metric_knows_which_way_is_better(tmp_path, schedule):
    def mode(**given):
        config = OPDConfig(str(tmp_path), lr_scheduler_type=schedule, eval_steps=1, **given)
        return config.lr_scheduler_kwargs["mode"]

    assert mode(eval_metric="accuracy") == mode(metric_for_best_model="eval_accuracy") == "max"
    assert mode(eval_metric="teacher_kl") == mode(lr_scheduler_kwargs={"mode": "min"}) == "min"


def test_of_vllm_generation_has_options_of_other_names(tmp_path):
    OPDConfig(str(tmp_path), generation_kwargs={"presence_penalty": 0.1}, use_vllm=True)


def test_the_student_is_saved_before_it_is_evaluated_for_the_last_time(world, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(run.OPDTrainer, "evaluate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run.run(*parse(flags(world, tmp_path / "out", max_steps=1, eval_steps=None)))
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_every_part_is_loaded_as_it_was_asked_for(world, tmp_path, build, monkeypatch):
    """Splits, revisions, the weights' type, attention and quantization."""
    asked = set()

    def watched(load):
        def call(path, **named):
            asked.add((load.__name__, Path(path).stem, named.get("split") or named.get("revision")))
            return load(path, **named)

        return call

    for load in (run.load_prompts, run.load_config, run.load_tokenizer):
        monkeypatch.setattr(run, load.__name__, watched(load))
    monkeypatch.setattr(loading, "create_model_from_path", watched(loading.create_model_from_path))
    options = {"dataset_train_split": "a", "dataset_test_split": "b", "model_revision": "v1"}
    options |= {"teacher_model_revision": "v2", "dtype": "bfloat16", "attn_implementation": "eager"}
    given = build(flags(world, tmp_path, **options, load_in_8bit=True))
    teacher = loading.load_teacher(str(world / "teacher"), given["args"])
    expected = {("load_prompts", "train", "a"), ("load_prompts", "eval", "b"), ("load_prompts", "val", "b")}
    for model in (("student", "v1"), ("teacher", "v2")):
        expected |= {("load_config", *model), ("load_tokenizer", *model)}
    assert asked == {*expected, ("create_model_from_path", "teacher", "v2")}
    shared = {"dtype": "bfloat16", "attn_implementation": "eager"}
    assert given["args"].model_init_kwargs == {**shared, "revision": "v1"}
    assert given["args"].teacher_model_init_kwargs == shared
    assert given["quantization_config"].load_in_8bit and teacher.dtype == torch.bfloat16


def test_a_checkpoint_is_newer_than_the_one_of_its_step_that_it_replaced(tmp_path):
    """In whatever order the system lists them; and the next to replace it does so, too."""
    for staged in (tmp_path / "first", tmp_path / "second"):
        staged.mkdir()
        (staged / "model.safetensors").write_text(staged.name)
    checkpoint = tmp_path / "checkpoint-2"
    publish(tmp_path / "first", checkpoint)
    shutil.copytree(checkpoint, tmp_path / "checkpoint-2.replaced")  # by a process that was killed there
    for listed in permutations(tmp_path.glob("checkpoint-*")):
        assert newest_intact(SimpleNamespace(glob=lambda _, listed=listed: listed)) == checkpoint
    publish(tmp_path / "second", checkpoint)
    assert (checkpoint / "model.safetensors").read_text() == "second"
    assert list(tmp_path.iterdir()) == [checkpoint]
