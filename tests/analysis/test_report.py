"""The report where it is read: in a real browser, on a phone, in print; and from real training."""

import csv
import time

import pytest
from analysis import chromium, planted
from tables import read_table
from torchrun import torchrun

from effopd_kernels.analysis import figures, report


@pytest.mark.skipif(chromium.BINARY is None, reason="no chromium or chrome on this machine")
def test_in_a_browser(out):
    """No request but the page itself, nothing on the console, every picture shown, nothing wider than a phone."""
    with chromium.page() as page:
        for width in (1100, 360):
            page.open((out / report.REPORT_NAME).as_uri(), width=width, mobile=width < 500)
            requests = [
                e["params"]["request"]["url"] for e in page.events if e["method"] == "Network.requestWillBeSent"
            ]
            assert [url for url in requests if not url.startswith("data:")] == [(out / report.REPORT_NAME).as_uri()]
            said = {"Log.entryAdded", "Runtime.exceptionThrown", "Runtime.consoleAPICalled"}
            assert [e for e in page.events if e["method"] in said] == []
            assert page.evaluate("document.images.length") >= 15
            assert page.evaluate("[...document.images].every(i => i.complete && i.naturalWidth > 100 && i.alt)")
            assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
        page.call("Emulation.setEmulatedMedia", media="print")
        page.open((out / report.REPORT_NAME).as_uri(), width=680)  # A4 within its margins
        assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
        assert page.pdf().startswith(b"%PDF")
        # What the console test would not see if it could not see: an image from the network is a request and an error.
        (out / "bad.html").write_text("<img src='http://localhost:9/x.png'><script>throw Error('seen')</script>")
        page.open((out / "bad.html").as_uri())
        kinds = [e["method"] for e in page.events]
        assert kinds.count("Network.requestWillBeSent") == 2 and "Runtime.exceptionThrown" in kinds


def test_two_processes_equal_one(folders, out, tmp_path):
    """Every table byte for byte."""
    result = torchrun(planted.HERE / "updates_run.py", *planted.two_trajectories(folders, tmp_path / "two"))
    assert result.returncode == 0, result.stderr[-4000:]
    tables = sorted(path.name for path in (out / "tables").glob("*.csv"))
    assert tables == sorted(path.name for path in (tmp_path / "two" / "tables").glob("*.csv")) and len(tables) >= 10
    for name in tables:
        assert (out / "tables" / name).read_bytes() == (tmp_path / "two" / "tables" / name).read_bytes(), name


def test_two_processes_refuse_with_one_sentence(folders, tmp_path):
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "x").write_text("x")
    result = torchrun(planted.HERE / "updates_run.py", *planted.two_trajectories(folders, tmp_path / "used"))
    assert result.returncode != 0
    assert result.stderr.count("effopd-analyze: error: --output_dir") == 1
    assert "RankFailed" not in result.stderr and "gloo" not in result.stderr


def test_on_a_real_run(world, tmp_path):
    """The trainer's own checkpoints, of steps 2 and 4, against the student it started from."""
    from train.world import make_trainer

    config = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "eval_strategy": "no", "effopd_enabled": False}
    make_trainer(world, tmp_path / "run", config=config).train()
    checkpoints = [tmp_path / "run" / f"checkpoint-{step}" for step in (2, 4)]
    assert planted.analyse(world / "student", *checkpoints, out=tmp_path / "out") == 0
    totals = read_table(tmp_path / "out" / "tables", "totals")
    assert [r["step"] for r in totals] == [2, 4] and totals[1]["update_norm"] > totals[0]["update_norm"] > 0
    aligned = [r for r in read_table(tmp_path / "out" / "tables", "alignment") if r["step"] == 2]
    assert aligned and all(r["chance_cosine"] < r["mean_cosine"] < 1 for r in aligned if r["k"] == 1)
    with open(tmp_path / "out" / "tables" / "embedding_top.csv", newline="") as file:
        assert any(row["text"] for row in csv.DictReader(file))  # the tokenizer beside the student speaks
    assert "other" not in {r["type"] for r in read_table(tmp_path / "out" / "tables", "tensors")}


def test_a_dozen_trajectories_look_different():
    assert len({str(figures.look(i)) for i in range(12)}) == 12


def test_a_rank_whose_others_died_before_they_met_ends_when_it_is_told_to(folders, tmp_path):
    """And not when torchrun, after half a minute, kills it."""
    script = tmp_path / "dies.py"
    script.write_text("""
import os, sys, time
from effopd_kernels.analysis import cli
if os.environ["RANK"] == "1":
    time.sleep(6)
    os._exit(1)
cli.main(sys.argv[1:])
""")
    began = time.perf_counter()
    result = torchrun(script, *planted.two_trajectories(folders, tmp_path / "dead"))
    assert result.returncode != 0 and time.perf_counter() - began < 30
    assert not (tmp_path / "dead").exists()
