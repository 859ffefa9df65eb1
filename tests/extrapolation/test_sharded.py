"""Two ranks on gloo: the same events as one process, nothing gathered, and a failing rank takes the other down."""

import sys
import time
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
import sharded_run
from torchrun import torchrun

from effopd_kernels.extrapolation import distributed, share
from effopd_kernels.extrapolation.selection import DEFAULT_EXCLUDE, DEFAULT_INCLUDE

SCRIPT = Path(sharded_run.__file__)

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")  # its checkpoints alone


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("sharded")


@pytest.fixture(scope="module")
def one(folder):
    """A run of one process, stopped."""
    return sharded_run.run(folder / "one", stop=4)


@pytest.fixture(scope="module")
def ranks(folder, one):
    result = torchrun(SCRIPT, folder, "equal")
    assert result.returncode == 0, result.stderr[-3000:]
    return [torch.load(folder / f"equal-{rank}.pt", weights_only=False) for rank in range(2)]


def decisions(events):
    return [(e["step"], e["alpha"], e["num_candidates"], e["val_tokens"]) for e in events]


@pytest.mark.parametrize(
    "case, options", [("plain", {}), ("gradient", dict(search="gradient")), ("reset", dict(policy="reset"))]
)
def test_two_ranks_equal_one_process(ranks, tmp_path, case, options):
    alone = sharded_run.run(tmp_path, **options)
    events = alone["events"]
    assert any(e["alpha"] != 1 for e in events) and len(events) == 4
    for rank in ranks:
        for name in ("losses", "weights"):
            torch.testing.assert_close(rank[case][name], alone[name], rtol=1e-4, atol=1e-5)
        if case != "gradient":
            assert decisions(rank[case]["events"]) == decisions(events)
        for mine, theirs in zip(rank[case]["events"], events, strict=True):
            for field in ("alpha", "score_initial", "score_best", "delta_norm"):
                assert mine[field] == pytest.approx(theirs[field], rel=1e-3, abs=1e-5), field


def test_ranks_decide_alike_and_communicate_only_scores(ranks):
    for case in ("plain", "gradient", "mixed"):
        one, two = (rank[case] for rank in ranks)
        same = ("alpha", "score_initial", "score_best", "delta_norm", "val_tokens")
        assert [[e[f] for f in same] for e in one["events"]] == [[e[f] for f in same] for e in two["events"]]
        assert all(map(torch.equal, one["weights"], two["weights"]))
        # Per event: norms; W_t's scores; per candidate a count and scores; a count for the final write, if any.
        exchanges = 0
        for event in one["events"]:
            scored, last = event["num_candidates"], event["candidates"][-1:]
            exchanges += 1 + event["num_gradients"]
            exchanges += (1 + 2 * scored + (not last[0]["accepted"] if last else 0)) if event["skipped"] is None else 0
        calls, largest = one["collectives"]
        assert calls == 2 * exchanges  # all_gather_object: sizes, then objects
        assert largest < 2000


def test_a_slope_is_measured_where_accumulation_has_turned_reduction_off(ranks):
    """Nor do validation's gradients go into the next training step's."""
    for rank in ranks:
        plain, accumulating = rank["gradient"], rank["accumulating"]
        assert [e["alpha"] for e in accumulating["events"]] == [e["alpha"] for e in plain["events"]]
        assert accumulating["losses"] == plain["losses"]
        assert all(map(torch.equal, accumulating["weights"], plain["weights"]))


def test_extrapolate_on_dtensors_writes_local_shards_and_communicates_nothing(ranks):
    for rank in ranks:
        right, weight_sq, expected = rank["dtensors"]
        assert right and weight_sq == pytest.approx(expected, rel=1e-5)


def test_anchors_and_masters_placed_otherwise_than_their_parameter_are_refused(ranks):
    rows, both, columns = "(Shard(dim=0), Replicate())", "(Shard(dim=0), Shard(dim=1))", "(Shard(dim=1), Replicate())"
    for alike, master, *said in (rank["placed otherwise"] for rank in ranks):
        assert alike == master == "right"
        assert said[0] == f"anchors[0] is placed {both}, params[0] {rows}"
        assert said[2].startswith("anchors[0] has shape (4, 2)") and said[4].startswith("anchors[0] has shape (4, 4)")
        for words, placed in zip(said[1::2], [f", placed {both}", f", placed {columns}", ""], strict=True):
            assert words.startswith(f"masters: mlp.w is (4, 4) torch.bfloat16 on cpu, placed {rows}, so its master")
            assert words.endswith(f"got (4, 4) torch.float32 on cpu{placed}")


def test_a_rank_outside_of_the_group_is_told(ranks):
    said = "this rank is not in process_group: construct the controller on those that are"
    assert [rank["outside"] for rank in ranks] == [None, said]


@pytest.mark.parametrize("case", ["plain", "reset"])
def test_a_sharded_run_resumes_bit_for_bit(ranks, case):
    """Stopped after an event, and a jump at that: the moments it resets are reset by the step after."""
    for rank in ranks:
        whole, resumed = rank[case], rank[f"{case}, resumed"]
        assert whole["events"][2]["step"] == 4 and whole["events"][2]["alpha"] != 1
        assert all(map(torch.equal, resumed["weights"], whole["weights"]))
        assert resumed["losses"] == whole["losses"][4:]
        assert decisions(resumed["events"]) == decisions(whole["events"])
        assert (case == "plain") == all(map(torch.equal, whole["weights"], rank["plain"]["weights"]))


def test_a_run_resumes_on_another_number_of_ranks(ranks, one, folder):
    """One rank has the anchor that two saved, and two the one's, bit for bit; its next event is theirs."""

    def of_both(case):
        return [torch.cat(parts) for parts in zip(*(rank[case]["anchor"] for rank in ranks), strict=True)]

    alone = sharded_run.run(folder, resume=folder / "two")
    assert len(one["anchor"]) == 8
    assert all(map(torch.equal, alone["anchor"], of_both("stopped")))
    assert all(map(torch.equal, of_both("one's"), one["anchor"]))
    whole = ranks[0]["plain"]
    assert whole["events"][3]["step"] == 8
    for resumed in alone, ranks[0]["one's"], ranks[1]["one's"]:
        assert decisions(resumed["events"]) == decisions(whole["events"])
        assert resumed["events"][3]["delta_norm"] == pytest.approx(whole["events"][3]["delta_norm"], rel=1e-4)
        torch.testing.assert_close(resumed["losses"], whole["losses"][4:], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(resumed["weights"], whole["weights"], rtol=1e-4, atol=1e-5)


def test_a_rank_that_cannot_save_does_not_leave_the_others_waiting(ranks):
    assert ranks[1]["full disk"] == "OSError: no space left"
    assert ranks[0]["full disk"] == "RankFailed: rank 1: OSError: no space left"


def test_a_gradient_of_partial_sums_is_summed_for_the_slope(ranks):
    assert sum(rank["partial sums"] for rank in ranks) == pytest.approx(4.0)


def test_stages_of_a_pipeline(ranks):
    """Each counts once, and every rank hears what cannot be saved or loaded on one."""
    for norm, said in (rank["stages"] for rank in ranks):
        assert norm == pytest.approx(8**0.5)
        assert said[0].startswith("not every rank has layers.0.mlp.w")
        assert said[1:] == ["anchor of other weights: missing ['layers.1.mlp.w'], unexpected ['layers.0.mlp.w']"]


def test_plain_tensors_that_differ_between_ranks_are_not_saved_as_one(ranks):
    for rank in ranks:
        assert rank["plain shards"].startswith("mlp.w is a plain tensor that differs between ranks")


def test_settings_that_differ_between_ranks_are_named_on_all_of_them(ranks):
    assert ranks[0]["settings"] == ranks[1]["settings"]
    for said, differs in zip(
        ranks[0]["settings"],
        [
            "alphas is (3.0, 5.0, 7.0, 9.0, 11.0) on rank 0 and (2.0, 4.0) on rank 1",
            "schedule is 'pow2' on rank 0 and [1, 8] on rank 1",
            "min_delta is 0.0 on rank 0 and 0.5 on rank 1",
            "max_val_tokens is None on rank 0 and 100 on rank 1",
            f"exclude is {list(DEFAULT_EXCLUDE)} on rank 0 and [] on rank 1",
            f"include is {list(DEFAULT_INCLUDE)} on rank 0 and ['mlp'] on rank 1",
            "search is 'candidates' on rank 0 and 'gradient' on rank 1",
            "max_gradients is 6 on rank 0 and 3 on rank 1",
            "accept is 'mean' on rank 0 and 'paired' on rank 1",
            "confidence is 0.84 on rank 0 and 0.9 on rank 1",
            "optimizer_policy is 'keep' on rank 0 and 'reset' on rank 1",
        ],
        strict=True,
    ):
        assert said == f"all ranks must have the same settings, but {differs}"


def test_mixed_precision_moves_the_fp32_shards(ranks):
    assert all(w.dtype == torch.float32 for w in ranks[0]["mixed"]["weights"])
    assert any(e["alpha"] != 1 for e in ranks[0]["mixed"]["events"])


@pytest.mark.parametrize("case", ["alone", "in a collective"])
def test_a_rank_that_fails_in_scoring_brings_all_down_with_weights_restored(tmp_path, case):
    start = time.perf_counter()
    result = torchrun(SCRIPT, tmp_path, case)
    assert result.returncode != 0 and time.perf_counter() - start < 60
    said = [(tmp_path / f"{case}-{rank}.txt").read_text() for rank in range(2)]
    assert said[1] == f"True RuntimeError: scoring server lost ({case})"
    assert said[0].startswith("True ")
    if case == "alone":
        assert said[0] == f"True RankFailed: rank 1: RuntimeError: scoring server lost ({case})"


def test_share_is_contiguous_and_complete():
    items = list(range(11))
    for size in (1, 2, 3, 16):
        parts = [share(items, rank, size) for rank in range(size)]
        assert [x for part in parts for x in part] == items
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert share(items) == items


@pytest.mark.parametrize(
    "arguments, error, words",
    [
        ((10,), TypeError, "items must be a sequence, as a list of prompts, got a int"),
        (({"prompt": ["a"]},), TypeError, "items must be a sequence, .* got a dict"),
        (([1], 0, 0), ValueError, "rank must be at least 0 and below size, got rank 0 and size 0"),
        (([1], 5, 3), ValueError, "got rank 5 and size 3"),
        (([1], None, 2), ValueError, "give both rank and size or neither, got rank None and size 2"),
    ],
    ids=str,
)
def test_what_has_no_share(arguments, error, words):
    with pytest.raises(error, match=words):
        share(*arguments)


def test_alone_nothing_is_exchanged():
    ranks = distributed.Ranks()
    assert ranks.gather("x") == ["x"] and ranks.sum([1.0, 2.0]) == [1.0, 2.0]
    assert ranks.report(RuntimeError())
