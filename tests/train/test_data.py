import gzip
import json
import re
from datetime import datetime

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from effopd_kernels.train import UserError
from effopd_kernels.train.data import load_prompts, require_answers, split_off
from train import world as tiny


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "2+2", "answer": "4"},
        {"problem": "2+2", "solution": "4"},
        {"question": "2+2", "answer": "4", "difficulty": 1},
        {"prompt": "2+2", "reward_model": {"style": "rule", "ground_truth": "4"}, "data_source": "x"},
    ],
)
def test_columns_by_any_name(tmp_path, row):
    loaded = load_prompts(str(tiny.write_jsonl(tmp_path / "d.jsonl", [row] * 3)))
    assert loaded[:] == {"prompt": ["2+2"] * 3, "answer": ["4"] * 3}


def test_verl_parquet_with_messages(tmp_path):
    messages = [{"role": "user", "content": "2+2"}]
    row = {"prompt": messages, "reward_model": {"ground_truth": "4", "style": "rule"}, "ability": "math"}
    datasets.Dataset.from_list([row] * 2).to_parquet(tmp_path / "d.parquet")
    loaded = load_prompts(str(tmp_path / "d.parquet"))
    assert loaded["prompt"][0] == messages
    assert loaded["answer"][0] == "4"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (
            '{"text": "a", "label": 1}\n',
            "no column 'prompt' or 'problem' or 'question'; its columns are 'text', 'label'",
        ),
        ('{"prompt": "a"}\n{"prompt": ""}\n', "empty prompt in row 1"),
        ("not json\n", "cannot be read"),
        ('null\n{"prompt": "a"}\n', "cannot be read: its first row is null"),
        ('{"prompt": "2020-01-01"}\nnull\n', "empty prompt in row 1"),
        ('{"prompt": 12}\n', "row 0 that is neither text nor a list of chat messages"),
        ('{"prompt": [{"role": "user"}]}\n', "row 0 that is neither text nor a list of chat messages"),
        ('{"prompt": [{"role": "user", "content": null}]}\n', "row 0 that is neither text nor a list of chat"),
        ('{"prompt": [{"role": "user", "content": null, "tool_calls": null}]}\n', "row 0 that is neither text nor"),
        ('{"prompt": [{"role": null, "content": "a"}]}\n', "row 0 that is neither text nor a list of chat"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, content, says):
    path = tmp_path / "bad.jsonl"
    path.write_text(content)
    with pytest.raises(UserError, match=says) as error:
        load_prompts(str(path))
    assert "bad.jsonl" in str(error.value)


def test_bytes_that_are_no_text_are_named(tmp_path):
    for row in ('{"prompt": "caf\xe9", "answer": "1"}\n', '{"prompt": "a", "answer": "caf\xe9"}\n'):
        (tmp_path / "latin.jsonl").write_text('{"prompt": "a", "answer": "1"}\n' + row, encoding="latin-1")
        with pytest.raises(UserError, match=r"latin.jsonl' has text that is not UTF-8: .* byte 0xe9"):
            load_prompts(str(tmp_path / "latin.jsonl"))


@pytest.mark.parametrize("name", ["d.jsonl", "d.json", "spread.jsonl", "in a row.jsonl"])
def test_texts_that_look_like_dates_stay_what_they_are(tmp_path, name):
    chat = [{"role": "user", "content": "1999-12-31"}]
    rows = [
        {"prompt": chat, "reward_model": {"ground_truth": "2020-01-01"}, "made": "2020-01-01T10:00:00Z"},
        {"made": "2020-01-02", "reward_model": {"ground_truth": "2020-01-02 00:00:00"}, "prompt": chat},
    ]
    tiny.write_jsonl(tmp_path / name, rows)
    if name == "d.json":
        (tmp_path / name).write_text(json.dumps(rows))
    elif name != "d.jsonl":
        (tmp_path / name).write_text("".join(json.dumps(row, indent=1 if name[0] == "s" else None) for row in rows))
    loaded = load_prompts(str(tmp_path / name), answers=True)
    assert loaded[:] == {"prompt": [chat] * 2, "answer": ["2020-01-01", "2020-01-02 00:00:00"]}


def test_a_compressed_file_of_dates_is_refused(tmp_path):
    (tmp_path / "d.jsonl").write_bytes(gzip.compress(b'{"prompt": "2020-01-01"}'))
    with pytest.raises(UserError, match=r"d.jsonl' cannot be read: 'utf-8' codec can't decode"):
        load_prompts(str(tmp_path / "d.jsonl"))


def test_of_several_ground_truths_any_is_right_and_one_that_is_missing_is_named(tmp_path):
    def written(*truths):
        rows = [{"prompt": "a", "reward_model": {"ground_truth": truth}} for truth in truths]
        return str(tiny.write_jsonl(tmp_path / "d.jsonl", rows))

    assert load_prompts(written(["5", "6"], ["7"]), answers=True)["answer"][:] == [["5", "6"], ["7"]]
    for truths, says in ((["5", None], "no answer in row 1"), ([{"value": 5}], "an answer in row 0 that is neither")):
        with pytest.raises(UserError, match=says):
            load_prompts(written(*truths), answers=True)
    assert load_prompts(written("5", None)).column_names == ["prompt"]


def test_an_answer_that_reading_rounds_is_refused(tmp_path):
    for i, answers in enumerate(([2**63 - 1, -(2**63)], [2**64 - 1, 1], [10**30 + 1, 1])):
        path = tiny.write_jsonl(tmp_path / f"{i}.jsonl", [{"prompt": "a", "answer": a} for a in answers])
        if i == 0:
            assert load_prompts(str(path), answers=True)["answer"][:] == answers
            continue
        with pytest.raises(UserError, match=r"an answer in row 0 that does not fit 64 bits, .*: write it as text"):
            load_prompts(str(path), answers=True)


def test_images_need_chat_messages_to_be_in(tmp_path):
    path = str(tiny.write_jsonl(tmp_path / "d.jsonl", [{"prompt": "a", "image": None}]))
    assert load_prompts(path).column_names == ["prompt"]
    path = str(tiny.write_jsonl(tmp_path / "d.jsonl", [{"prompt": "a", "image": "a.png"}]))
    with pytest.raises(UserError, match=r"d.jsonl' has a column 'image' beside prompts that are text"):
        load_prompts(path)


def test_a_files_name_is_no_pattern(tmp_path):
    for name in ("train1.jsonl", "train[1].jsonl", "trai*.jsonl"):
        tiny.write_jsonl(tmp_path / name, [{"prompt": name}])
    for name in ("train[1].jsonl", "trai*.jsonl"):
        assert load_prompts(str(tmp_path / name))["prompt"][:] == [name]


def test_the_columns_that_are_named_are_the_files(tmp_path):
    path = tiny.write_jsonl(tmp_path / "d.jsonl", [{"question": "2+2", "label": 4, "reward_model": "rule"}])
    assert load_prompts(str(path)).column_names == ["prompt"]
    with pytest.raises(UserError, match="whose columns are 'question', 'label', 'reward_model'; "):
        load_prompts(str(path), answers=True)


def test_a_cache_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "home").write_text("a file")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "home" / "datasets")
    path = tiny.write_jsonl(tmp_path / "d.jsonl", [{"prompt": "a"}])
    with pytest.raises(
        UserError, match=r"home/datasets', where datasets are cached, cannot .*; set HF_HOME to a folder"
    ):
        load_prompts(str(path))


def test_empty_and_missing(tmp_path):
    datasets.Dataset.from_dict({"prompt": []}).to_parquet(tmp_path / "d.parquet")
    pq.write_table(pa.table({"prompt": pa.array([], pa.string())}), tmp_path / "of arrow.parquet")
    (tmp_path / "d.jsonl").write_text("")
    for name in ("d.parquet", "of arrow.parquet", "d.jsonl"):
        with pytest.raises(UserError, match="is empty"):
            load_prompts(str(tmp_path / name))
    with pytest.raises(UserError, match="does not exist"):
        load_prompts(str(tmp_path / "none.jsonl"))
    with pytest.raises(UserError, match="neither a hub id nor"):
        load_prompts(str(tmp_path))


@pytest.mark.parametrize("kind", ["csv", "disk", "splits", "hub"])
def test_what_datasets_can_read_otherwise_is_refused_with_how_to_make_a_file_of_it(tmp_path, kind):
    dataset = datasets.Dataset.from_dict({"prompt": ["2+2", "3+3"], "answer": ["4", "6"]})
    given = tmp_path / {"csv": "d.csv"}.get(kind, "d")
    if kind == "csv":
        dataset.to_csv(given)
    elif kind == "hub":
        for shard in range(2):
            dataset.select([shard]).to_parquet(given / "data" / f"train-{shard:05}-of-00002.parquet")
        dataset.select([0]).to_parquet(given / "data" / "test-00000-of-00001.parquet")
    else:
        (dataset if kind == "disk" else datasets.DatasetDict(train=dataset)).save_to_disk(given)
    with pytest.raises(UserError, match=r"neither a hub id nor .*; datasets\..* makes one") as error:
        load_prompts(str(given))
    exec(re.search("; (.*) makes one", str(error.value))[1])
    assert load_prompts(f"{given}.jsonl")["prompt"][:] == ["2+2", "3+3"]


def test_answers_are_required_for_accuracy():
    with pytest.raises(UserError, match=r"needs a column 'answer'.*columns are 'prompt'.*teacher_kl needs none"):
        require_answers(datasets.Dataset.from_dict({"prompt": ["a"]}), "d", ["prompt"])
    require_answers(datasets.Dataset.from_dict({"prompt": ["a"], "answer": [["1", "one"]]}), "d", [])
    for answers, says in (
        (["1", None], "no answer in row 1"),
        ([[]], "no answer in row 0"),
        ([" "], "no answer in row 0"),
        ([1.0, float("nan")], "no answer in row 1"),  # of json.dumps, where pandas had none
        ([datetime(2020, 1, 1)], "an answer in row 0 that is neither text, a number nor a list of such"),
        ([{"value": "1"}], "an answer in row 0 that is neither text, a number nor a list of such"),
    ):
        with pytest.raises(UserError, match=says):
            require_answers(datasets.Dataset.from_dict({"answer": answers}), "d", [])


def test_a_call_of_tools_needs_no_content(tmp_path):
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "add"}]}
    rows = [{"prompt": [{"role": "user", "content": "2+2", "tool_calls": None}, call]}]
    assert load_prompts(str(tiny.write_jsonl(tmp_path / "d.jsonl", rows)))["prompt"][0][1] == call


def test_tools_that_no_prompt_tells_of_are_said(tmp_path, caplog):
    for tools, said in ([None], 0), ([[]], 0), ([["add"]], 1):
        given = tiny.write_jsonl(tmp_path / f"{said}.jsonl", [{"prompt": "a", "tools": t} for t in tools])
        assert load_prompts(str(given)).column_names == ["prompt"]
        assert caplog.text.count("the column 'tools' of dataset") == said


def test_held_out_prompts_leave_the_training_set():
    dataset = datasets.Dataset.from_list(tiny.problems())
    train, held = split_off(dataset.add_column("row", range(len(dataset))), 10, seed=0, what="evaluation")
    assert len(held) == 10 and sorted([*train["row"], *held["row"]]) == list(range(60))
    with pytest.raises(UserError, match="cannot hold out 60 prompts for evaluation from a training set of 60"):
        split_off(dataset, 60, seed=0, what="evaluation")
