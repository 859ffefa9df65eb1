"""The examples, at a size that takes seconds."""

import json
import random
import runpy
import shutil
from pathlib import Path

import pytest
import torch
from tables import read_table
from torchrun import torchrun

from effopd_kernels.train import demo

EXAMPLES = Path(__file__).parent.parent / "examples"


def untrained_world(folder):
    """The demo's world with models that have learnt nothing; the marker says that it need not be built."""
    tokenizer = demo.build_tokenizer()
    for name, seed in (("student", 0), ("teacher", 1)):
        torch.manual_seed(seed)
        for part in (demo.build_model(tokenizer), tokenizer):
            part.save_pretrained(folder / name)
    pairs = [(a, b) for a in range(20) for b in range(20)]
    random.Random(0).shuffle(pairs)
    for name, part in (("train", pairs[:300]), ("val", pairs[300:320]), ("eval", pairs[320:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(demo.problem(*p)) + "\n" for p in part))
    (folder / "world.json").write_text(json.dumps({"seed": 0}))


def test_opd_vs_rl(tmp_path, capsys):
    untrained_world(tmp_path / "world")
    argv = ["--output_dir", str(tmp_path), "--opd_steps", "2", "--rl_steps", "4", "--checkpoints", "2"]
    few = ["--interventions", "scale", "norm", "--alphas", "0.5", "--max_prompts", "16"]
    assert runpy.run_path(str(EXAMPLES / "opd_vs_rl.py"))["main"]([*argv, *few]) == 0
    said = capsys.readouterr().out
    assert [len(line.split()) for line in said.splitlines() if line[:4] in ("stud", "opd ", "rl  ", "teac")] == [
        2,
        3,
        3,
        2,
    ]
    for command in ("updates", "interventions"):
        assert (tmp_path / command / "report.html").is_file()
    assert [(row["trajectory"], row["step"]) for row in read_table(tmp_path / "interventions/tables", "norm")] == [
        ("opd", 1), ("opd", 2), ("rl", 2), ("rl", 4),
    ]  # fmt: skip


def own_loop(folder, ranks, capsys):
    """(The student's bytes, what was printed) after four steps, with a checkpoint after two."""
    flags = ["--output_dir", str(folder), "--max_steps", "4", "--save_steps", "2", "--batch_size", "16"]
    if ranks == 1:
        runpy.run_path(str(EXAMPLES / "own_loop.py"))["main"](flags)
        said = capsys.readouterr().out
    else:
        done = torchrun(EXAMPLES / "own_loop.py", *flags)
        assert done.returncode == 0, done.stderr[-2000:]
        said = done.stdout
    return (folder / "student/model.safetensors").read_bytes(), said


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
@pytest.mark.parametrize("ranks", [1, 2])
def test_own_loop_goes_on_where_it_stopped(tmp_path, ranks, capsys):
    untrained_world(tmp_path / "world")
    whole, said = own_loop(tmp_path, ranks, capsys)
    assert b"lm_head" not in whole  # tied
    assert "step 2: loss" in said and "step 4: loss" in said
    shutil.rmtree(tmp_path / "checkpoint-4")
    resumed, said = own_loop(tmp_path, ranks, capsys)
    assert "step 2: loss" not in said and "step 4: loss" in said and resumed == whole
