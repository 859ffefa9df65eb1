"""Checkpoints under kill -9, truncation and alteration."""

import errno
import json
import logging
import multiprocessing
import resource
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torchrun import PYTHONPATH
from transformers import TrainerCallback

from effopd_kernels.train import OPDConfig, UserError, cli, output_dir, run
from effopd_kernels.train.checkpoint import damage, newest_intact, publish
from effopd_kernels.train.output_dir import LOCK_NAME, acquire, release
from effopd_kernels.train.settings import KEPT, check_settings, compare_noted
from train import checkpoint_run
from train import world as tiny
from train.world import make_trainer


@pytest.fixture
def start(monkeypatch):
    """Starts runs, which a process forks that has imported once what all of them need: that takes longer than a run."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", PYTHONPATH)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["effopd_kernels.train", checkpoint_run.__name__])

    def start(*args):
        process = context.Process(target=checkpoint_run.run, args=args)
        process.start()
        return process

    return start


def finish(process, out):
    process.join(200)
    assert process.exitcode == 0, (out / "said.txt").read_text()[-2000:]


def test_killed_at_any_moment_the_resumed_run_is_the_same(world, tmp_path, start):
    whole, out = start(world, tmp_path / "whole", False), tmp_path / "killed"
    for lines in (2, 5):  # killed twice: after that many records, wherever the process then is
        process = start(world, out, True)
        metrics, deadline = out / "metrics.jsonl", time.monotonic() + 100
        while time.monotonic() < deadline and process.is_alive():
            if metrics.is_file() and metrics.read_text().count("\n") >= lines:
                break
            time.sleep(0.002)
        process.kill()
        process.join()
    finish(start(world, out, True), out)
    finish(whole, tmp_path / "whole")
    expected, got = (load_file(p / "model.safetensors") for p in (tmp_path / "whole", out))
    assert expected.keys() == got.keys()
    for name in expected:
        assert torch.equal(got[name], expected[name]), name
    assert not list(out.glob(".saving-*"))


@pytest.fixture(scope="module")
def two_checkpoints(world, tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    make_trainer(world, out, config={"max_steps": 2, "save_strategy": "steps", "save_steps": 1}).train()
    return out


@pytest.fixture
def checkpoints(two_checkpoints, tmp_path):
    return shutil.copytree(two_checkpoints, tmp_path / "run")


@pytest.mark.parametrize(
    "file", ["model.safetensors", "optimizer.pt", "trainer_state.json", "effopd_state/effopd.json"]
)
@pytest.mark.parametrize("how", ["truncated", "altered", "missing"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(checkpoints, file, how, caplog):
    victim = checkpoints / "checkpoint-2" / file
    content = victim.read_bytes()
    assert damage(checkpoints / "checkpoint-2") is None
    if how == "missing":
        victim.unlink()
    else:
        middle = len(content) // 2
        flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        victim.write_bytes(content[:-1] if how == "truncated" else flipped)
    with caplog.at_level(logging.WARNING):
        assert newest_intact(checkpoints).name == "checkpoint-1"
    assert str(victim) in caplog.text


def test_none_intact(checkpoints):
    for folder in checkpoints.glob("checkpoint-*"):
        manifest = json.loads((folder / "manifest.json").read_text())
        assert {"model.safetensors", "optimizer.pt", "rng_state.pth", "ledger.json"} <= manifest.keys()
        (folder / "manifest.json").unlink()
    with pytest.raises(UserError, match="holds no intact checkpoint"):
        newest_intact(checkpoints)
    with pytest.raises(UserError, match="holds no checkpoint"):
        newest_intact(tiny.HERE)


def test_a_manifest_of_no_object_is_passed_over(checkpoints):
    for text in ("[" * 100_000, "[]", '{"a": 3}', "{oops"):
        (checkpoints / "checkpoint-2" / "manifest.json").write_text(text)
        assert "manifest.json' is unreadable: " in damage(checkpoints / "checkpoint-2")
        assert newest_intact(checkpoints).name == "checkpoint-1"


def test_settings_that_another_version_kept_are_not_asked_for_and_damaged_ones_named(two_checkpoints, tmp_path):
    checkpoint = shutil.copytree(two_checkpoints / "checkpoint-2", tmp_path / "checkpoint-2")
    args = OPDConfig(str(tmp_path), **tiny.FLAGS)
    (checkpoint / "settings.json").write_text('{"newer_setting": 1}')
    check_settings(checkpoint, args)
    for text in ("[]", "{"):
        (checkpoint / "settings.json").write_text(text)
        with pytest.raises(UserError, match=r"settings.json' is unreadable: "):
            check_settings(checkpoint, args)


def test_what_a_run_keeps_to_its_end_is_asked_for_again(two_checkpoints, tmp_path):
    """The optimizer's state brings the first group back, whatever is given; the summary says the second of all steps;
    what is used from the resumed step on may change."""
    checkpoint = two_checkpoints / "checkpoint-2"
    others = {"learning_rate": 1e-5, "weight_decay": 0.1, "adam_beta1": 0.5, "adam_beta2": 0.5, "adam_epsilon": 1e-6}
    others |= {"optim": "adafactor", "optim_args": "a=1"}
    others |= {"effopd_enabled": False, "seed": 8, "eval_metric": "accuracy", "eval_temperature": 0.5}
    assert set(others) == set(KEPT)
    for name, value in others.items():
        with pytest.raises(UserError, match=f"checkpoint-2' was made with --{name} .*, got {value}: resume with"):
            check_settings(checkpoint, OPDConfig(str(tmp_path), **{**tiny.FLAGS, name: value}))
    with pytest.raises(UserError, match=r"--eval_temperature 1.0, .*, got 0.5: resume with --eval_temp"):
        check_settings(checkpoint, OPDConfig(str(tmp_path), **{**tiny.FLAGS, "temperature": 0.5}))
    changed = {"max_steps": 9, "effopd_alphas": [2], "temperature": 0.5, "eval_temperature": 1.0}
    check_settings(checkpoint, OPDConfig(str(tmp_path), **{**tiny.FLAGS, **changed}))


def test_another_teacher_and_other_held_out_prompts_are_told_of(two_checkpoints, world, tmp_path, caplog):
    """A folder may have moved, so it is no error; the same one by another path is not mentioned."""
    checkpoint = two_checkpoints / "checkpoint-2"
    moved = shutil.copytree(world / "teacher", tmp_path / "moved")
    for name, said in ((world / "student" / ".." / "teacher", 0), (moved, 1)):
        trainer = make_trainer(world, tmp_path / "out", teacher=str(name), config={"max_steps": 2})
        trainer.train(resume_from_checkpoint=str(checkpoint))
        assert caplog.text.count("and goes on with") == said
    assert f"with teacher '{world / 'teacher'}', and goes on with '{moved}'" in caplog.text
    noted = json.loads((checkpoint / "settings.json").read_text())["noted"]
    trainer._validators["eval"].prompts[0] += "?"
    other = trainer._noted()["eval_dataset"]
    compare_noted(checkpoint, trainer._noted())
    assert f"with eval_dataset '{noted['eval_dataset']}', and goes on with '{other}'" in caplog.text
    before = caplog.text
    compare_noted(checkpoint, {"teacher": ""})  # one that was made, not loaded
    for older, notes in (tmp_path / "without", "{}"), (tmp_path / "made", '{"noted": {"teacher": ""}}'):
        older.mkdir()
        (older / "settings.json").write_text(notes)
        compare_noted(older, trainer._noted())
    assert caplog.text == before and noted["eval_dataset"] != other


def test_a_checkpoint_of_weights_alone_is_no_one_to_resume_from(world, tmp_path):
    config = {"max_steps": 1, "save_strategy": "steps", "save_only_model": True, "effopd_enabled": False}
    make_trainer(world, tmp_path, config=config).train()
    with pytest.raises(UserError, match=r"checkpoint-1' was saved with --save_only_model, without the optimizer's"):
        make_trainer(world, tmp_path, config=config | {"max_steps": 2}).train(resume_from_checkpoint=True)


def test_a_resumed_run_keeps_its_prompts_per_step_whatever_makes_them(two_checkpoints, tmp_path, monkeypatch):
    checkpoint = shutil.copytree(two_checkpoints / "checkpoint-2", tmp_path / "checkpoint-2")

    def check(per_device, steps=1, processes=1):
        sizes = {"per_device_train_batch_size": per_device, "gradient_accumulation_steps": steps}
        monkeypatch.setattr(OPDConfig, "world_size", processes)
        check_settings(checkpoint, OPDConfig(str(tmp_path), **{**tiny.FLAGS, **sizes}))

    for same in ((8,), (4, 2), (4, 1, 2), (1, 2, 4)):
        check(*same)
    other = "made with 8 prompts a step, .* got {}.*: resume with {},"
    for sizes, got, keep in (
        ((4,), 4, "--gradient_accumulation_steps 2"),
        ((2, 1, 2), 4, "--gradient_accumulation_steps 2"),
        ((8, 1, 2), 16, "factors that make 8"),
    ):
        with pytest.raises(UserError, match=other.format(got, keep)):
            check(*sizes)
    (checkpoint / "settings.json").write_text('{"seed": 7}')  # an older version's
    check(4)


class FullFrom(TrainerCallback):
    """From the end of a step's update on, no file can grow beyond `size` bytes."""

    def __init__(self, step, size):
        self.step, self.size, self.before = step, size, resource.getrlimit(resource.RLIMIT_FSIZE)

    def on_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step + 1 == self.step:
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, self.before[1]))

    def restore(self):
        resource.setrlimit(resource.RLIMIT_FSIZE, self.before)


@pytest.mark.parametrize("first_refused", ["metrics.jsonl", "model.safetensors", "optimizer.pt"])
def test_a_full_disk_is_one_sentence_and_leaves_the_checkpoints_before(
    world, two_checkpoints, tmp_path, capsys, monkeypatch, first_refused
):
    """The system, safetensors and torch each say so in a way of their own."""
    size = 0 if first_refused == "metrics.jsonl" else (two_checkpoints / "checkpoint-2" / first_refused).stat().st_size
    full, build = FullFrom(2, max(size - 1, 1)), run.build_trainer

    def build_trainer(*args):
        trainer = build(*args)
        trainer.add_callback(full)
        return trainer

    monkeypatch.setattr(run, "build_trainer", build_trainer)
    config = {**tiny.FLAGS, "max_steps": 2, "save_strategy": "steps", "save_steps": 1, "output_dir": tmp_path / "out"}
    config |= {"model_name_or_path": world / "student", "teacher_model_name_or_path": world / "teacher"}
    config |= {f"{kind}dataset_name": world / f"{kind[:-1] or 'train'}.jsonl" for kind in ("", "val_")}
    try:
        code = cli.main([f"--{k}={v}" for k, v in config.items()])
    finally:
        full.restore()
    said = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert code == 2 and len(said) == 1 and f"--output_dir '{tmp_path / 'out'}' could not be written: " in said[0]
    assert damage(tmp_path / "out" / "checkpoint-1") is None
    assert not list((tmp_path / "out").glob(".saving-*")) and not (tmp_path / "out" / "checkpoint-2").exists()


@pytest.mark.parametrize("killed_after", [0, 1, 2])
def test_replacing_a_checkpoint_there_is_a_whole_one_at_any_moment(checkpoints, monkeypatch, killed_after):
    """Killed before, between and after the two renames; then replaced again, which leaves nothing over."""
    shutil.rmtree(checkpoints / "checkpoint-1")
    rename, renames = Path.rename, []

    def killed(path, target):
        if len(renames) == killed_after:
            raise SystemExit
        renames.append(target)
        return rename(path, target)

    for again in (False, True):
        staged = checkpoints / ".saving-2" / "checkpoint-2"
        shutil.rmtree(staged.parent, ignore_errors=True)
        shutil.copytree(newest_intact(checkpoints), staged)
        with monkeypatch.context() as patch:
            if not again:
                patch.setattr(Path, "rename", killed)
            if not again and killed_after < 2:
                with pytest.raises(SystemExit):
                    publish(staged, checkpoints / "checkpoint-2")
            else:
                publish(staged, checkpoints / "checkpoint-2")
        assert damage(newest_intact(checkpoints)) is None
    assert [p.name for p in checkpoints.glob("checkpoint-*")] == ["checkpoint-2"]


def test_a_folder_that_another_run_writes_to_is_refused(world, tmp_path, capsys):
    """Before models are loaded, and again when training begins; what a killed run left is no other run."""
    trainer = make_trainer(world, tmp_path / "out", config={"max_steps": 1, "effopd_enabled": False})
    held = acquire(tmp_path / "out")
    with pytest.raises(UserError, match=f"another run is writing to --output_dir '{tmp_path / 'out'}'"):
        trainer.train()
    (tmp_path / "out" / "metrics.jsonl").touch()
    with pytest.raises(UserError, match="another run is writing to"):
        output_dir.check_output_dir(tmp_path / "out", write_over=True)
    release(held, tmp_path / "out")
    trainer.train()
    assert not (tmp_path / "out" / LOCK_NAME).exists()
    (tmp_path / "killed").mkdir()
    (tmp_path / "killed" / LOCK_NAME).touch()
    output_dir.check_output_dir(tmp_path / "killed", write_over=False)


def test_a_lock_that_went_while_it_was_waited_for_is_looked_for_again(tmp_path, monkeypatch):
    """And where the file system knows none, there is none."""
    flock = output_dir.fcntl.flock

    def removed_at_first(file, how):
        (tmp_path / LOCK_NAME).unlink()
        monkeypatch.setattr(output_dir.fcntl, "flock", flock)
        flock(file, how)

    monkeypatch.setattr(output_dir.fcntl, "flock", removed_at_first)
    held = acquire(tmp_path)
    with pytest.raises(UserError, match="another run"):
        acquire(tmp_path)
    release(held, tmp_path)

    def none(file, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(output_dir.fcntl, "flock", none)
    for held in [acquire(tmp_path), acquire(tmp_path)]:
        release(held, tmp_path)


def test_another_run_is_every_ranks_error(monkeypatch, tmp_path):
    sent, held = [], acquire(tmp_path)
    monkeypatch.setattr(output_dir, "broadcast_object_list", lambda mine: sent.append(mine) or sent[0])
    for main in (True, False):
        monkeypatch.setattr(output_dir, "PartialState", lambda main=main: SimpleNamespace(is_main_process=main))
        with pytest.raises(UserError, match="another run"), output_dir.sole_run(tmp_path):
            pytest.fail("let in")
    assert len(sent) == 2
    release(held, tmp_path)


def test_a_folder_that_rank_0_cannot_write_to_is_every_ranks_error(monkeypatch, tmp_path):
    def full(path):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "touch", full)
    sent = []
    monkeypatch.setattr(output_dir, "broadcast_object_list", lambda mine: sent.append(mine) or sent[0])
    for main in (True, False):
        state = SimpleNamespace(num_processes=2, is_main_process=main)
        monkeypatch.setattr(output_dir, "PartialState", lambda state=state: state)
        with pytest.raises(UserError, match="No space left"):
            output_dir.check_shared(tmp_path / "out")
    assert len(sent) == 2  # rank 0 told the other before it went
