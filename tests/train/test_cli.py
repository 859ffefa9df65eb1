"""The command as a user meets it, in processes of its own."""

import importlib.util
import io
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torchrun import PYTHONPATH
from transformers import AutoModelForCausalLM, BertConfig, BertForMaskedLM, T5Config, T5ForConditionalGeneration

from effopd_kernels.analysis.checkpoints import Checkpoint
from effopd_kernels.analysis.loaded import Loader
from effopd_kernels.extrapolation.adapters import COMPANION
from effopd_kernels.train import OPDConfig, UserError, cli
from effopd_kernels.train.checkpoint import damage
from effopd_kernels.train.loading import load_model, load_student
from effopd_kernels.train.options import parse
from effopd_kernels.train.report import MetricsFile
from train import world as tiny

HERE = Path(__file__).parent
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": PYTHONPATH}


def flags(world, out, **overrides):
    values = {
        "model_name_or_path": world / "student",
        "teacher_model_name_or_path": world / "teacher",
        "dataset_name": world / "train.jsonl",
        "val_dataset_name": world / "val.jsonl",
        "eval_dataset_name": world / "eval.jsonl",
        "output_dir": out,
        "eval_steps": 4,
        **tiny.FLAGS,
        **overrides,
    }
    return [f"--{k}={v}" for k, v in values.items() if v is not None]


def rename_tensors(folder, rename):
    """Those that are renamed to None go."""
    file = folder / "model.safetensors"
    tensors = {new: tensor for name, tensor in load_file(file).items() if (new := rename(name)) is not None}
    save_file(tensors, file, metadata={"format": "pt"})


def write_broken_worlds(world, tmp):
    """What the cases below are of."""
    rows = [json.loads(line) for line in (world / "train.jsonl").read_text().splitlines()]
    foreign = tiny.tokenizer_for([r["prompt"] + r["answer"] for r in tiny.problems()], eos_token="<end>")
    tiny.save(tmp / "foreign", AutoModelForCausalLM.from_pretrained(world / "teacher"), foreign)
    tokenizer = tiny.tokenizer_of(world)
    narrow = tiny.tiny_qwen(tokenizer, hidden=32, layers=1, vocab=len(tokenizer) - 1, seed=0)
    tiny.save(tmp / "narrow", narrow, tokenizer)
    nan = AutoModelForCausalLM.from_pretrained(world / "teacher")
    with torch.no_grad():
        nan.model.norm.weight[0] = math.nan
    tiny.save(tmp / "nan", nan, tokenizer)
    tiny.write_jsonl(tmp / "texts.jsonl", [{"text": "a", "label": 1}])
    (tmp / "empty.jsonl").write_text("")
    tiny.write_jsonl(tmp / "unlabelled.jsonl", [{"prompt": r["prompt"]} for r in rows])
    tiny.write_jsonl(tmp / "chat.jsonl", [{"prompt": [{"role": "user", "content": r["prompt"]}]} for r in rows])
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    tiny.save(tmp / "terse", AutoModelForCausalLM.from_pretrained(world / "student"), tokenizer)
    contents = [row["prompt"] if i != 20 else "" for i, row in enumerate(rows)]
    tiny.write_jsonl(tmp / "blank.jsonl", [{"prompt": [{"role": "user", "content": c}]} for c in contents])
    tokenizer.chat_template = None
    tiny.save(tmp / "mute", AutoModelForCausalLM.from_pretrained(world / "student"), tokenizer)
    shutil.copytree(world / "teacher", tmp / "cut")
    shutil.copytree(world / "teacher", tmp / "wordless", ignore=shutil.ignore_patterns("*token*", "*template*"))
    os.truncate(tmp / "cut" / "model.safetensors", 10_000)
    other = shutil.copytree(world / "teacher", tmp / "other shapes") / "config.json"
    other.write_text(json.dumps(json.loads(other.read_text()) | {"intermediate_size": 128}))
    (shutil.copytree(world / "teacher", tmp / "no such tokenizer") / "tokenizer.json").write_text("{}")

    def altered(model, folder, change, file="config.json"):
        copied = shutil.copytree(world / model, tmp / folder) / file
        copied.write_text(json.dumps(change(json.loads(copied.read_text()))))

    altered("student", "no architecture", lambda config: config | {"architectures": [3]})
    altered("student", "no class", lambda config: config | {"architectures": ["AutoTokenizer"]})
    altered("teacher", "no heads", lambda config: config | {"num_attention_heads": 0})
    altered("teacher", "a list", lambda config: [config], "generation_config.json")
    altered("student", "no end", lambda config: config | {"eos_token_id": "x"}, "generation_config.json")
    unsaveable = {"temperature": 0.6, "pad_token_id": 5}  # without do_sample, as Llama 2; TRL pads with another token
    altered("student", "unsaveable", lambda config: config | unsaveable, "generation_config.json")
    for model, folder, rename in (
        ("student", "compiled", lambda name: f"_orig_mod.{name}"),
        ("teacher", "no MLP", lambda name: None if ".mlp." in name else name),
    ):
        rename_tensors(shutil.copytree(world / model, tmp / folder), rename)
    (tmp / "adapter").mkdir()
    (tmp / "adapter" / "adapter_config.json").write_text("[]")
    (tmp / "written over").mkdir()
    shutil.copy(world / "train.jsonl", tmp / "written over" / "metrics.jsonl")
    small = {"vocab_size": len(tokenizer), "num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 2}
    tiny.save(tmp / "bert", BertForMaskedLM(BertConfig(**small, intermediate_size=32)), tokenizer)
    t5 = T5Config(vocab_size=len(tokenizer), d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    tiny.save(tmp / "t5", T5ForConditionalGeneration(t5), tokenizer)
    tokenizer.eos_token = None
    tiny.save(tmp / "endless", AutoModelForCausalLM.from_pretrained(world / "student"), tokenizer)
    (tmp / "latin.jsonl").write_text('{"prompt": "a"}\n{"prompt": "caf\xe9"}\n', encoding="latin-1")
    tiny.write_jsonl(tmp / "verl.jsonl", [{"prompt": "a", "reward_model": "rule"}])
    for i, text in enumerate(("[]", '{"a": 3}')):
        (tmp / f"run{i}" / "checkpoint-1").mkdir(parents=True)
        (tmp / f"run{i}" / "checkpoint-1" / "manifest.json").write_text(text)
    (tmp / "broken.yaml").write_text("max_steps: [\n")
    (tmp / "typo.yaml").write_text("learning_rat: 1e-5\n")
    chat = [{"prompt": [{"role": "user", "content": r["prompt"]}]} for r in rows]
    tiny.write_jsonl(tmp / "mixed.jsonl", [*rows[:2], *chat])
    tiny.write_jsonl(tmp / "long.jsonl", [*rows, {"prompt": "and " * 200, "answer": "1"}])
    (tmp / "used").mkdir()
    (tmp / "used" / "thesis.txt").write_text("x")


def broken_worlds(world, tmp):
    """Argument lists that are wrong in one way each → what the one sentence must say."""
    fresh = (tmp / f"out{i}" for i in itertools.count())

    def case(**overrides):
        return flags(world, overrides.pop("output_dir", None) or next(fresh), **overrides)

    return {
        "no student": (case(model_name_or_path=None), "--model_name_or_path is required"),
        "no such student": (case(model_name_or_path=tmp / "nobody"), "nobody"),
        "tokenizers differ": (
            case(teacher_model_name_or_path=tmp / "foreign"),
            "the tokenizers differ: id 320 is None",
        ),
        "no tokenizer": (
            case(teacher_model_name_or_path=tmp / "wordless"),
            f"'{tmp / 'wordless'}' has no tokenizer files",
        ),
        "vocabulary in use": (case(teacher_model_name_or_path=tmp / "narrow"), "lies beyond the 319 ids"),
        "missing column": (case(dataset_name=tmp / "texts.jsonl"), "its columns are 'text', 'label'"),
        "empty dataset": (case(dataset_name=tmp / "empty.jsonl"), "is empty"),
        "missing file": (case(dataset_name="missing.jsonl"), "'missing.jsonl' does not exist"),
        "long prompt": (case(dataset_name=tmp / "long.jsonl"), "1 of 41 prompts"),
        "output in use": (case(output_dir=tmp / "used"), "exists and is not empty"),
        "output is a file": (case(output_dir=tmp / "used" / "thesis.txt"), "thesis.txt' is not a folder"),
        "nothing to resume": (case(resume_from_checkpoint="true"), "holds no checkpoint"),
        "nothing to extrapolate": (case(effopd_include="no_such_parameter"), "no_such_parameter"),
        "no answers": (
            case(eval_metric="accuracy", val_dataset_name=tmp / "unlabelled.jsonl"),
            "needs a column 'answer'",
        ),
        "NaN teacher": (case(teacher_model_name_or_path=tmp / "nan"), "the teacher's logits are not finite at step 1"),
        "bad schedule": (case(effopd_schedule="sometimes"), "--effopd_schedule 'sometimes' is not"),
        "score of no search": (case(effopd_score="loss"), "--effopd_score loss needs --effopd_search gradient"),
        "no step": (
            case(effopd_alphas=1),
            "--effopd_alphas must be finite and neither 0 nor 1, at least one, got [1.0]",
        ),
        "worse is accepted": (case(effopd_min_delta=-0.1), "--effopd_min_delta must be >= 0, got -0.1"),
        "paired losses": (
            case(effopd_score="loss", effopd_search="gradient", effopd_acceptance="paired"),
            "--effopd_acceptance paired needs a score per prompt",
        ),
        "a folder per node": (case(save_on_each_node=True), "--save_on_each_node cannot be"),
        "no budget": (case(effopd_max_val_tokens=0), "--effopd_max_val_tokens must be a positive int"),
        "no jump": (
            case(effopd_search="gradient", effopd_alphas=0.5),
            "--effopd_alphas must reach above 1 for a gradient search",
        ),
        "too sure": (case(effopd_confidence=84), "--effopd_confidence must be in [0.5, 1), got 84.0"),
        "best by no metric": (
            case(metric_for_best_model="loss"),
            "--metric_for_best_model 'loss' is not one of accuracy, teacher_kl",
        ),
        "bad divergence": (case(divergence="tv"), "--divergence 'tv' is not one of"),
        "unknown flag": ([*case(), "--learning_rates=1"], "unknown option --learning_rates; --learning_rate?"),
        "unknown key": (["--config", tmp / "typo.yaml"], "--learning_rat in the --config file; --learning_rate?"),
        "bad value": (
            case(learning_rate="fast"),
            "argument --learning_rate/--learning-rate: invalid float value: 'fast'",
        ),
        "commas": (case(effopd_alphas="3,5,7"), "invalid float value: '3,5,7'; separate by spaces"),
        "bad pattern": (case(effopd_include="["), "--effopd_include: '[' is not a regular expression"),
        "text and chat": (
            case(dataset_name=tmp / "mixed.jsonl"),
            "has text and chat messages as prompts, in rows 0 and 2",
        ),
        "no checkpoint": (case(resume_from_checkpoint=world / "student"), "is not a checkpoint of effopd-train"),
        "bad config file": (["--config", str(tmp / "none.yaml")], "none.yaml"),
        "broken config file": (["--config", str(tmp / "broken.yaml")], "broken.yaml"),
        "truncated weights": (case(teacher_model_name_or_path=tmp / "cut"), f"the weights of '{tmp / 'cut'}'"),
        "no chat template": (
            case(model_name_or_path=tmp / "mute", dataset_name=tmp / "chat.jsonl"),
            "the chat template cannot be applied to row 0",
        ),
        "fewer prompts than a step": (case(per_device_train_batch_size=64), "a step takes 64 prompts"),
        "nothing held out": (
            case(eval_dataset_name=None, eval_size=0),
            "cannot hold out 0 prompts for evaluation (--eval_size)",
        ),
        "too many held out": (case(val_dataset_name=None), "for EffOPD's candidates (--effopd_val_size)"),
        "scored and held out": (
            case(eval_dataset_name=f"{world}/../{world.name}/val.jsonl", eval_steps=None),
            "val.jsonl': prompts that score EffOPD's candidates are not held out",
        ),
        "no such held-out prompts": (
            case(eval_dataset_name="typo.jsonl", eval_steps=None),
            "dataset file 'typo.jsonl' does not exist",
        ),
        "other columns": (
            case(eval_metric="accuracy", val_dataset_name=tmp / "verl.jsonl"),
            "whose columns are 'prompt', 'reward_model'",
        ),
        "not UTF-8": (case(dataset_name=tmp / "latin.jsonl"), "latin.jsonl' has text that is not UTF-8"),
        "an encoder": (case(model_name_or_path=tmp / "bert"), "bert': its config.json names BertForMaskedLM"),
        "an encoder-decoder": (case(teacher_model_name_or_path=tmp / "t5"), "names T5ForConditionalGeneration"),
        "no EOS": (case(model_name_or_path=tmp / "endless"), "the student's tokenizer has no EOS token"),
        "another JSON": (
            case(teacher_model_name_or_path=tmp / "no such tokenizer"),
            "such tokenizer': KeyError: 'added_tokens'",
        ),
        "a student of other shapes": (case(model_name_or_path=tmp / "other shapes"), "are of other shapes than its"),
        "a teacher of other shapes": (
            case(teacher_model_name_or_path=tmp / "other shapes"),
            f"the weights of '{tmp / 'other shapes'}' are of other shapes than its config.json",
        ),
        "a long name": (case(output_dir=tmp / ("x" * 300)), "xxx' could not be written: File name too long"),
        "no folder there": (case(output_dir="/proc/out"), "--output_dir '/proc/out' could not be written: "),
        "a list for a manifest": (
            case(output_dir=tmp / "run0", resume_from_checkpoint=tmp / "run0" / "checkpoint-1"),
            "manifest.json' is unreadable",
        ),
        "another manifest": (
            case(output_dir=tmp / "run1", resume_from_checkpoint=tmp / "run1" / "checkpoint-1"),
            "manifest.json' is unreadable",
        ),
        "an empty checkpoint": (case(resume_from_checkpoint=""), "--resume_from_checkpoint is empty: give"),
        "no accumulation": (case(gradient_accumulation_steps=0), "--gradient_accumulation_steps must be positive"),
        "no loss": (case(loss_temperature="inf"), "--loss_temperature must be positive and finite, got inf"),
        "backwards": (case(eval_steps=-1), "--eval_steps must not be negative, got -1.0"),
        "no mapping": (case(model_init_kwargs="foo"), "--model_init_kwargs must be a mapping, in JSON"),
        "no config file": ([*case(), "--config"], "argument --config: expected one argument"),
        "greedy rollouts": (case(temperature=0), "--temperature must be positive, got 0.0"),
        "colder than greedy": (case(eval_temperature=-1), "--eval_temperature must be positive, or 0"),
        "too hot": (case(eval_temperature="inf"), "--eval_temperature must be positive, or 0 for greedy, fini"),
        "a frozen loss": (case(loss_temperature=1e-30), "--loss_temperature must be at least 1e-06, got 1e-30"),
        "vLLM's off": (case(top_k=-1), "--top_k must be a number of tokens, or 0 for all, got -1"),
        "too likely": (case(min_p=2), "--min_p must be between 0 and 1, got 2.0"),
        "no repetition": (case(repetition_penalty=0), "--repetition_penalty must be positive and finite, got 0.0"),
        "less than no workers": (case(dataloader_num_workers=-1), "--dataloader_num_workers must be 0 or more, got -1"),
        "no beam": (case(generation_kwargs='{"num_beams": 0}'), "--generation_kwargs: num_beams must be at least 1"),
        "more completions": (
            case(generation_kwargs='{"num_return_sequences": 2}'),
            "--generation_kwargs: num_return_sequences must be 1, for a step has one completion of each prompt, got 2",
        ),
        "stop strings": (case(generation_kwargs='{"stop_strings": ["a"]}'), "stop_strings must be left out"),
        "a word for a number": (case(generation_kwargs='{"top_p": "all"}'), "top_p must be between 0 and 1, got 'all'"),
        "half precision": (case(fp16=True, use_cpu=True, bf16=False), "--fp16 needs a GPU"),
        "kernels of a GPU": (case(use_liger_kernel=True, use_cpu=True, bf16=False), "--use_liger_kernel needs a GPU"),
        "unknown to the student": (
            case(model_init_kwargs='{"foo": 1}'),
            "student' cannot be loaded with the model_init_kwargs given: Qwen3ForCausalLM.__init__() got an unexpected",
        ),
        "unknown to the teacher": (
            case(teacher_model_init_kwargs='{"foo": 1}'),
            "teacher' cannot be loaded with the model_init_kwargs given: ",
        ),
        "endless completions": (case(max_completion_length="None"), "--max_completion_length must be positive"),
        "a prompt of no tokens": (
            case(
                model_name_or_path=tmp / "terse",
                dataset_name=tmp / "blank.jsonl",
                eval_dataset_name=None,
                eval_size=4,
            ),
            f"the prompt in row 20 of '{tmp / 'blank.jsonl'}' has no tokens to begin a completion with",
        ),
        "names of a compiled model": (
            case(model_name_or_path=tmp / "compiled"),
            f"the weights of '{tmp / 'compiled'}' lack 25 of the 25 tensors that a Qwen3ForCausalLM has, such as "
            "'model.embed_tokens.weight', and have others, such as '_orig_mod.model.embed_tokens.weight'",
        ),
        "no MLP": (case(teacher_model_name_or_path=tmp / "no MLP"), "no MLP' lack 9 of the 36 tensors that a Qwen3For"),
        "no architecture": (
            case(model_name_or_path=tmp / "no architecture"),
            "[3]",  # older versions of transformers look at it themselves, in other words
        ),
        "no class": (case(model_name_or_path=tmp / "no class"), "no class': its config.json names AutoTokenizer"),
        "no heads": (
            case(teacher_model_name_or_path=tmp / "no heads"),
            f"no model can be made of what config.json and its like in '{tmp / 'no heads'}' say: ZeroDivisionError",
        ),
        "a list for a generation config": (
            case(teacher_model_name_or_path=tmp / "a list"),
            f"no model can be made of what config.json and its like in '{tmp / 'a list'}' say: TypeError",
        ),
        "no end": (
            case(model_name_or_path=tmp / "no end"),
            "no end' has to be a token's id, or a list of such, got 'x'",
        ),
        "unsaveable": (
            case(model_name_or_path=tmp / "unsaveable"),
            "the student could not be saved with its generation_config.json; mend that first: ",
        ),
        "no adapter": (
            case(model_name_or_path=tmp / "adapter"),
            "adapter_config.json' is unreadable: it holds no JSON object",
        ),
        "no folder": (flags(world, ""), "--output_dir is empty: give a folder"),
        "prompts written over": (
            case(
                output_dir=tmp / "written over",
                dataset_name=tmp / "written over" / "metrics.jsonl",
                overwrite_output_dir=True,
            ),
            f"--overwrite_output_dir would write over '{tmp / 'written over' / 'metrics.jsonl'}': choose another",
        ),
        "no deepspeed": (case(deepspeed="none.json"), "deepspeed"),
    }


@pytest.fixture(scope="module")
def driven(world, tmp_path_factory):
    """(The folder, the cases, and what the command did for each of them and then for two calls for help.)"""
    tmp = tmp_path_factory.mktemp("broken")
    write_broken_worlds(world, tmp)
    cases = broken_worlds(world, tmp)
    calls = [*([str(a) for a in argv] for argv, _ in cases.values()), ["--help"], ["--help_all"]]
    run = subprocess.run(
        [sys.executable, HERE / "cli_driver.py"],
        input=json.dumps(calls),
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        timeout=240,
    )
    results = [json.loads(line) for line in run.stdout.splitlines() if line.startswith('{"code"')]
    assert len(results) == len(calls), run.stderr[-2000:]
    return tmp, cases, results


@pytest.fixture(scope="module")
def refused(driven):
    _, cases, results = driven
    return {name: (result, says) for (name, (_, says)), result in zip(cases.items(), results[:-2], strict=True)}


@pytest.mark.parametrize("case", broken_worlds(Path(), Path()))
def test_bad_input_is_one_sentence_and_exit_code_2(refused, case):
    result, says = refused[case]
    assert result["code"] == 2, result
    lines = [line for line in result["stderr"].splitlines() if "error:" in line]
    assert len(lines) == 1 and says in lines[0], result["stderr"]
    assert "Traceback" not in result["stderr"] and "usage:" not in result["stderr"]


def test_a_model_may_lack_what_is_tied_and_have_what_it_does_not_use(world, tmp_path):
    """By the one name or the other, in whatever dtype; what it does lack is found where an analysis loads it, too."""
    student = AutoModelForCausalLM.from_pretrained(world / "student").state_dict()
    for rename in (
        lambda name: name,
        lambda name: name.replace("model.embed_tokens", "lm_head"),
        lambda name: name.removeprefix("model."),
    ):
        folder = shutil.copytree(world / "student", tmp_path / "model", dirs_exist_ok=True)
        rename_tensors(folder, rename)
        rest = {**load_file(folder / "model.safetensors"), "v_head.weight": torch.ones(3)}
        save_file({name: t.bfloat16() for name, t in rest.items()}, folder / "model.safetensors")
        loaded = load_model(str(folder)).state_dict()
        assert all(torch.equal(loaded[name], tensor.bfloat16()) for name, tensor in student.items())
        shutil.rmtree(folder)
    folder = shutil.copytree(world / "student", tmp_path / "model")
    rename_tensors(folder, lambda name: None if "embed" in name else name)
    with pytest.raises(UserError, match=r"lack 2 of the 25 tensors that .*, such as 'model.embed_tokens.weight'$"):
        Loader().tensors(Checkpoint(folder))


def test_options_of_a_model_are_used_kept_and_given_once(world, tmp_path):
    given = {"dtype": "bfloat16"}
    config = {"model_init_kwargs": given, "effopd_enabled": False}
    trainer = tiny.make_trainer(world, tmp_path, config=config)
    assert trainer.model.dtype == torch.bfloat16 and trainer.teacher_model.dtype == torch.float32
    assert trainer.args.model_init_kwargs == given
    twice = OPDConfig(str(tmp_path), model_init_kwargs={"quantization_config": {}})
    with pytest.raises(UserError, match="another in model_init_kwargs: give one of them"):
        load_student(str(world / "student"), twice, object())


@pytest.mark.parametrize(
    "text, says",
    [
        ("max_steps: 2.5", "argument --max_steps/--max-steps: invalid int value: '2.5' in '{file}'"),
        ("per_device_train_batch_size: [8]", "--per_device_train_batch_size in '{file}' takes no list, got [8]"),
        ("effopd_val_size: 5.5", "invalid int value: '5.5' in '{file}'"),
        ("effopd_alphas: [3, a]", "invalid float value: 'a' in '{file}'"),
        ("effopd_enabled: [true]", "--effopd_enabled in '{file}' takes no list, got [True]"),
        ("dataset_name: [a]", "--dataset_name in '{file}' takes no list, got ['a']"),
        ("output_dir: {a: 1}", "--output_dir in '{file}' takes no mapping, got {{'a': 1}}"),
        ("seed:", "--seed in '{file}' takes no empty value, got None"),
        ("generation_kwargs: [1]", "--generation_kwargs in '{file}' takes no list, got [1]"),
        ("chat_template_kwargs: foo", "--chat_template_kwargs must be a mapping"),
        ("learning-rates: 1", "unknown option --learning_rates in the --config file; --learning_rate?"),
        ("5: 6", "unknown option --5 in the --config file"),
        ("- 1", "--config '{file}' is not a mapping of options to values"),
        ("# caf\xe9", "--config '{file}' cannot be read: 'utf-8' codec"),
    ],
)
def test_what_yaml_makes_of_a_value_is_refused_where_a_flag_would_be(tmp_path, capsys, text, says):
    file = tmp_path / "run.yaml"
    file.write_text(text, encoding="latin-1")
    assert cli.main(["--config", str(file)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("effopd-train: error: ") and says.format(file=file) in line


def test_a_yaml_file_says_what_flags_would(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "environ", {**os.environ})
    (tmp_path / "run.yaml").write_text(
        "dataset_name: 5\nlearning-rate: 1e-5\neffopd_schedule: [1, 2]\neffopd_alphas: [3, 1e1]\nbf16: 0\n"
        "lora_target_modules: all-linear\nresume_from_checkpoint: no\nmodel_init_kwargs: {revision: '1'}\n"
        "eval_steps:\nreport_to: [none]\nmax_steps: 3\nenv: {SAID_BY: 5}\nsave_strategy: no\neval_strategy: off\n"
    )
    data, args, model_args = parse([f"--config={tmp_path / 'run.yaml'}", "--max_steps=4"], seed=5, max_steps=2)
    assert (data.dataset_name, args.learning_rate, args.effopd_alphas, args.bf16) == ("5", 1e-5, [3, 10], False)
    assert args.controller_args()["schedule"] == [1, 2] and model_args.lora_target_modules == "all-linear"
    assert (args.resume_from_checkpoint, args.model_init_kwargs) == (None, {"revision": "1"})
    assert (args.eval_steps, args.report_to, args.max_steps, args.seed) == (None, [], 4, 5)
    assert args.save_strategy == args.eval_strategy == "no"
    assert os.environ["SAID_BY"] == "5"
    (tmp_path / "run.yaml").write_text("report_to:\n")
    assert parse([f"--config={tmp_path / 'run.yaml'}"])[1].report_to == []


def test_refusing_loses_nothing(driven):
    tmp, *_ = driven
    assert [p.name for p in (tmp / "used").iterdir()] == ["thesis.txt"]
    assert not list(tmp.glob("out*/*.safetensors"))


def test_a_run_a_yaml_file_and_its_output(world, tmp_path):
    """The console script: YAML with a flag over it, everything written, then loaded as anybody would."""
    config = {"max_steps": 2, "learning_rate": 5e-3, "overlong_prompts": "drop"}
    (tmp_path / "run.yaml").write_text("".join(f"{k}: {v}\n" for k, v in config.items()))
    argv = [a for a in flags(world, tmp_path / "out") if not a.startswith(("--max_steps", "--learning_rate"))]
    script = shutil.which("effopd-train", path=str(Path(sys.executable).parent))
    run = subprocess.run(
        [script, "--config", tmp_path / "run.yaml", *argv, "--max_steps=4"],
        capture_output=True, text=True, env=ENVIRONMENT, timeout=240,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-2000:]
    out = tmp_path / "out"
    summary = json.loads((out / "summary.json").read_text())
    (only,) = summary["runs"]
    assert only["method"] == "effopd" and only["learning_rate"] == 5e-3 and only["seed"] == 7
    assert [e["step"] for e in only["events"]] == [1, 2, 4]
    assert [p["step"] for p in only["curve"]] == [4] and only["final_score"] == only["curve"][-1]["score"]
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG") and (out / "curves.png").stat().st_size > 10_000
    assert len((out / "metrics.jsonl").read_text().splitlines()) >= 4 + 3 + 1
    student = AutoModelForCausalLM.from_pretrained(out)
    assert student.config.hidden_size == 32
    for name in ("tokenizer.json", "generation_config.json", "model.safetensors"):
        assert (out / name).is_file(), name


def test_overwriting_drops_the_earlier_runs_checkpoints(world, tmp_path, capsys):
    """Else a bare --resume_from_checkpoint of the second run would go on from the first's last step. Of a link, only
    the link goes; what only sounds like a checkpoint stays."""
    out = tmp_path / "out"
    cli.main(flags(world, out, max_steps=3, save_strategy="steps", save_steps=3, effopd_enabled=False))
    shutil.copytree(out / "checkpoint-3", tmp_path / "elsewhere")
    (out / "checkpoint-4").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    for name in ("checkpoint-thesis", "checkpoint-5", "checkpoint-7.replaced", ".saving-face", ".saving-1"):
        (out / name).mkdir()
    (out / "checkpoint-notes.txt").write_text("x")
    again = {"max_steps": 2, "save_strategy": "steps", "save_steps": 2, "effopd_enabled": False}
    again |= {"overwrite_output_dir": True}
    assert cli.main(flags(world, out, **again, model_name_or_path=out / "checkpoint-3")) == 2
    assert f"--overwrite_output_dir would remove '{out / 'checkpoint-3'}'" in capsys.readouterr().err
    assert cli.main(flags(world, out, **again, dataset_name="missing.jsonl")) == 2
    assert (out / "checkpoint-3").is_dir()
    assert cli.main(flags(world, out, **again)) == 0
    left = {"checkpoint-2", "checkpoint-thesis", "checkpoint-5", "checkpoint-7.replaced", "checkpoint-notes.txt"}
    assert {p.name for p in out.glob("checkpoint-*")} == left
    assert [p.name for p in out.glob(".saving-*")] == [".saving-face"] and damage(tmp_path / "elsewhere") is None


@pytest.mark.parametrize("evaluated", [False, True])
def test_a_student_that_the_last_update_ruins_is_not_saved(world, tmp_path, capsys, evaluated):
    """Its learning rate is 0 at step 1. The only checkpoint that is kept is of then."""
    run = {"max_steps": 2, "learning_rate": 1e38, "lr_scheduler_type": "constant_with_warmup", "warmup_steps": 1}
    run |= {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 1, "effopd_enabled": False}
    if not evaluated:
        run |= {"eval_steps": None, "eval_dataset_name": None}
    assert cli.main(flags(world, tmp_path / "out", **run)) == 2
    (line,) = (line for line in capsys.readouterr().err.splitlines() if "error:" in line)
    assert "is not finite after step 2; " in line and "('checkpoint-1' is the newest whose loss was finite)" in line
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"README.md", "metrics.jsonl", "checkpoint-1"}


def test_numbers_that_json_has_not_are_null(tmp_path):
    state = SimpleNamespace(is_world_process_zero=True, log_history=[{"grad_norm": math.inf, "loss": 0.1, "step": 1}])
    MetricsFile().on_train_begin(SimpleNamespace(output_dir=tmp_path), state, None)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"grad_norm": null, "loss": 0.1, "step": 1}\n'


def evaluated_steps(out):
    records = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [r["step"] for r in records if "eval_teacher_kl" in r]


def test_a_finished_run_that_is_resumed_evaluates_nothing_again(world, tmp_path):
    run = {"max_steps": 2, "eval_steps": 2, "eval_on_start": True, "save_strategy": "steps", "effopd_enabled": False}
    for again in (None, "true"):
        assert cli.main(flags(world, tmp_path / "out", **run, resume_from_checkpoint=again)) == 0
        assert evaluated_steps(tmp_path / "out") == [0, 2]


@pytest.mark.parametrize(("asked", "steps"), [({"eval_at_powers_of_two": True}, [1, 2, 3]), ({}, [3])])
def test_held_out_prompts_are_evaluated_without_eval_steps(world, tmp_path, asked, steps):
    run = {"max_steps": 3, "eval_steps": None, "effopd_enabled": False, **asked}
    assert cli.main(flags(world, tmp_path / "out", **run)) == 0
    assert evaluated_steps(tmp_path / "out") == steps


@pytest.mark.parametrize(("eval_steps", "saved"), [(2, 2), (1, 4)])
def test_the_summary_says_which_steps_model_was_saved_and_its_score(world, tmp_path, eval_steps, saved):
    """The KL falls, so the step of the greatest is the first that was evaluated: step 1 has no checkpoint to load."""
    best = {"load_best_model_at_end": True, "greater_is_better": True, "save_strategy": "steps", "save_steps": 2}
    best |= {"eval_steps": eval_steps, "max_steps": 4, "learning_rate": 5e-3, "effopd_enabled": False}
    for again in (None, "true"):  # then nothing is left to train, and the model that is loaded is not the last step's
        assert cli.main(flags(world, tmp_path / "out", **best, resume_from_checkpoint=again)) == 0
        (run,) = json.loads((tmp_path / "out" / "summary.json").read_text())["runs"]
        scores = {p["step"]: p["score"] for p in run["curve"]}
        assert list(scores) == list(range(eval_steps, 5, eval_steps)) and sorted(scores.values()) == [*scores.values()]
        assert (run["final_score"], run["saved_step"], run["saved_score"]) == (scores[4], saved, scores[saved])
    folders = tmp_path / "out", tmp_path / "out" / f"checkpoint-{saved}"
    student, checkpoint = (AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in folders)
    assert all(torch.equal(student[name], checkpoint[name]) for name in student)


def test_interrupted_before_training_nothing_is_said_of_resuming(world, tmp_path, monkeypatch, capsys):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("effopd_kernels.train.run.build_trainer", interrupted)
    assert cli.main(flags(world, tmp_path / "out")) == 130
    assert capsys.readouterr().err == "effopd-train: interrupted\n"


def test_without_the_extra_the_command_says_what_to_install():
    """A package whose entry in `sys.modules` is None is not found, as if it were not installed."""
    (script,) = re.findall(r'(?m)^effopd-train = "(.*):main"$', (HERE.parents[1] / "pyproject.toml").read_text())
    code = f"import sys; sys.modules.update(trl=None, rich=None); from {script} import main; sys.exit(main())"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    said = "effopd-train: error: effopd_kernels.train needs trl, rich: pip install effopd-kernels[train]\n"
    assert (run.returncode, run.stderr) == (2, said)


def test_help_is_readable(driven):
    short, full = driven[2][-2:]
    assert short["code"] == full["code"] == 0
    assert len(short["stdout"].splitlines()) < 200 < len(full["stdout"].splitlines())
    for text in short["stdout"], full["stdout"]:
        assert "Sampling temperature; that of the loss is loss_temperature." in " ".join(text.split())
    for name in ("--model_name_or_path", "--effopd_alphas", "--eval_metric", "--resume_from_checkpoint", "--help_all"):
        assert name in short["stdout"], name


def test_help_in_ascii(monkeypatch):
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", out)
    for option in ("--help", "--help_all"):
        with pytest.raises(SystemExit) as stopped:
            cli.main([option])
        assert stopped.value.code == 0
    out.flush()
    short, _, full = out.buffer.getvalue().decode("ascii").partition("--help_all")
    assert "--effopd_enabled [EFFOPD_ENABLED]" in short and "--no_effopd_enabled" not in short
    assert "?" not in short and "lora_alpha/?r" in full


def test_ctrl_c_exits_130_with_a_checkpoint_to_resume_from(world, tmp_path):
    argv = flags(world, tmp_path / "out", max_steps=10_000, eval_steps=None, effopd_enabled=False)
    run = subprocess.Popen(
        [sys.executable, "-m", "effopd_kernels.train.cli", *argv], env=ENVIRONMENT, stderr=subprocess.PIPE, text=True,
        stdout=subprocess.DEVNULL,
    )  # fmt: skip
    metrics = tmp_path / "out" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (metrics.is_file() and metrics.read_text().count("\n") >= 3):
        time.sleep(0.1)
    run.send_signal(signal.SIGINT)
    stderr = run.communicate(timeout=60)[1]
    assert run.returncode == 130, stderr[-2000:]
    assert "interrupted" in stderr and "Traceback" not in stderr
    (checkpoint,) = (tmp_path / "out").glob("checkpoint-*")
    assert AutoModelForCausalLM.from_pretrained(checkpoint)
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    assert state["global_step"] == int(checkpoint.name.split("-")[1]) >= 3


def test_overwriting_drops_the_earlier_runs_saved_model_and_nothing_else(world, tmp_path, capsys):
    """Its adapter would be put on the weights of a full run, its shards loaded in place of one file."""
    run = {"max_steps": 1, "eval_steps": None, "effopd_enabled": False, "overwrite_output_dir": True}
    lora = ["--use_peft=true", "--lora_r=2", "--lora_target_modules", "q_proj", "v_proj"]
    out = tmp_path / "out"
    assert cli.main(flags(world, out, **run) + lora) == 0
    assert (out / "adapter_config.json").is_file()
    shutil.copytree(out, out / "effopd", ignore=lambda _, names: [n for n in names if not n.startswith("adapter_")])
    shards = ["model-00001-of-00002.safetensors", "model.safetensors.index.json"]
    others = ["thesis.txt", "probe.safetensors", "effopd/notes.txt", "pytorch_model.bin", "model-1-of-2.safetensors"]
    for name in shards + others:
        (out / name).write_text("x")
    before = set(out.rglob("*"))
    for name, value in {"learning_rate": -1, "optim": "adamw_bnb_8bit", "effopd_enabled": True}.items():
        refused = {**run, name: value, "effopd_include": "no_such_parameter"}
        if name != "optim" or importlib.util.find_spec("bitsandbytes") is None:
            assert cli.main(flags(world, out, **refused)) == 2
    assert before <= set(out.rglob("*"))
    assert cli.main(flags(world, out, **run)) == 0
    assert not list(out.rglob("adapter_*")) and not any((out / name).exists() for name in shards)
    assert all((out / name).is_file() for name in others)
    assert cli.main(flags(world, out, **run, model_name_or_path=out)) == 2
    assert f"--overwrite_output_dir would remove '{out}'" in capsys.readouterr().err
    assert cli.main(flags(world, out, **run) + lora) == 0
    assert not (out / "model.safetensors").exists() and (out / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("given, adapted", [("q_proj", ["q_proj"]), (".*q_proj", ".*q_proj")])
def test_one_module_may_be_adapted(world, tmp_path, caplog, given, adapted):
    """Its name is no pattern of whole names, as which TRL hands peft a single one."""
    run = {"max_steps": 1, "eval_steps": None, "effopd_enabled": False}
    assert cli.main([*flags(world, tmp_path, **run), "--use_peft=true", "--lora_target_modules", given]) == 0
    assert json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"] == adapted
    assert "has no effect without --use_peft" not in caplog.text


def test_options_of_lora_alone_make_no_adapter(world, tmp_path, caplog):
    run = {"max_steps": 1, "eval_steps": None, "effopd_enabled": False}
    said = "has no effect without --use_peft: all weights of the student are trained"
    for given, count in ([], 0), (["--lora_r=4"], 1):
        assert cli.main([*flags(world, tmp_path / f"{count}", **run), *given]) == 0
        assert caplog.text.count(f"--lora_r {said}") == caplog.text.count(said) == count


def test_an_adapter_is_refused_with_how_to_make_a_model_of_it(world, tmp_path, capsys):
    """Of a checkpoint with its jumps beside it, it makes the student that the run wrote at its end."""
    run = {"max_steps": 2, "save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-2, "eval_steps": None}
    lora = ["--use_peft=true", "--lora_r=2", "--lora_target_modules", "q_proj", "up_proj"]
    assert cli.main(flags(world, tmp_path / "out", **run) + lora) == 0
    checkpoint = tmp_path / "out" / "checkpoint-2"
    assert (checkpoint / COMPANION).is_dir()
    folders = {tmp_path / "out": tmp_path / "merged", checkpoint: tmp_path / "merged with jumps"}
    for adapter, folder in folders.items():
        assert cli.main(flags(world, tmp_path / "again", model_name_or_path=adapter)) == 2
        said = capsys.readouterr().err.splitlines()[-1]
        assert f"'{adapter}' is a LoRA adapter, not a whole model" in said
        how = re.search(r"\((model = .*)\), and save the tokenizer", said)[1]
        exec(how, {"PeftModel": PeftModel, "AutoModelForCausalLM": AutoModelForCausalLM, "folder": folder})
    whole, with_jumps = (AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in folders.values())
    base = AutoModelForCausalLM.from_pretrained(world / "student").state_dict()
    assert any(not torch.equal(whole[name], base[name]) for name in base)
    for name in base:
        torch.testing.assert_close(with_jumps[name], whole[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "option, value, says",
    [
        ("learning_rate", -1, "the optimizer cannot be made with the options given: Invalid learning rate: -1.0"),
        ("adam_beta1", 2, "the optimizer cannot be made with the options given: Invalid beta parameter at index 0: 2"),
        ("lr_scheduler_type", "cosine_with_min_lr", "the learning rate schedule cannot be made with the options given"),
        ("optim", "adamw_bnb_8bit", "`bitsandbytes`"),
        ("report_to", "wandb", "--report_to wandb: it is not installed; there is none"),
        ("report_to", "wand", "--report_to wand: it is not installed; there is none"),
    ],
)
def test_what_torch_and_transformers_refuse_is_one_sentence(world, tmp_path, capsys, option, value, says):
    if importlib.util.find_spec({"adamw_bnb_8bit": "bitsandbytes"}.get(value, str(value))):
        pytest.skip("installed")
    assert cli.main(flags(world, tmp_path / "out", **{option: value})) == 2
    (line,) = (line for line in capsys.readouterr().err.splitlines() if "error:" in line)
    assert says in line


def test_candidates_scored_by_their_loss_need_no_answers(world, tmp_path):
    rows = [json.loads(line) for line in (world / "val.jsonl").read_text().splitlines()]
    unlabelled = tiny.write_jsonl(tmp_path / "unlabelled.jsonl", [{"prompt": r["prompt"]} for r in rows])
    by_loss = {"effopd_search": "gradient", "effopd_score": "loss", "eval_metric": "accuracy", "max_steps": 2}
    assert cli.main(flags(world, tmp_path / "out", **by_loss, val_dataset_name=unlabelled)) == 0
    (run,) = json.loads((tmp_path / "out" / "summary.json").read_text())["runs"]
    assert run["eval_metric"] == "accuracy" and run["curve"] and [e["step"] for e in run["events"]] == [1, 2]
