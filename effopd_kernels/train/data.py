"""Prompts in, from a hub id or a local file, under two column names whatever they were called: `prompt` and `answer`.

Every check here runs before a model is loaded, and names the file, the column and the row it speaks of.
"""

import codecs
import glob
import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from types import NoneType
from typing import Any

import datasets

from ..errors import UserError, one_line

PROMPT_NAMES = ("prompt", "problem", "question")
ANSWER_NAMES = ("answer", "solution")
_BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}
_BLANK = re.compile(r"\s*")
_NO_ROWS = "corresponds to no data", "BatchSize must be greater than 0"  # what readers say of a file without any
logger = logging.getLogger(__name__)


def load_prompts(
    name: str, *, config: str | None = None, split: str = "train", answers: bool = False
) -> datasets.Dataset:
    """Load prompts as a `datasets.Dataset` with columns `prompt` (str or chat messages) and, if present, `answer`.

    Args:
        name: a `.jsonl`, `.json` or `.parquet` file, or the id of a dataset on the Hugging Face hub.
        config, split: which configuration and split of a hub dataset; ignored for a file.
        answers: every row must have one, see `require_answers`.

    Columns may be called `problem` or `question` for the prompt and `solution` for the answer; verl's parquet layout
    (`prompt` as messages, `reward_model.ground_truth`) is read as it is.

    Raises:
        UserError: nothing to load there, no prompt column, an empty dataset, a prompt that is empty or neither text nor
            chat messages (row named), text and messages both, or bytes that are not UTF-8.
    """
    path = Path(name)
    if path.suffix in _BUILDERS:
        if not path.is_file():
            raise UserError(f"dataset file '{name}' does not exist")
        is_json = _BUILDERS[path.suffix] == "json"
        if is_json:
            _check_begins(path)
        try:
            dataset = datasets.load_dataset(_BUILDERS[path.suffix], data_files=glob.escape(name), split="train")
            if is_json:
                dataset = _with_dates_as_text(dataset, path)
        except Exception as e:
            _check_cache(e)
            if path.stat().st_size == 0 or any(said in innermost(e) for said in _NO_ROWS):
                raise UserError(f"dataset '{name}' is empty") from e
            # `datasets` wraps a parser's message two or three deep; the innermost says what is wrong with the file.
            raise UserError(f"dataset file '{name}' cannot be read: {innermost(e)}") from e
    elif path.exists():
        raise UserError(f"dataset '{name}' is neither a hub id nor a .jsonl, .json or .parquet file{_conversion(path)}")
    else:
        try:
            dataset = datasets.load_dataset(name, config, split=split)
        except Exception as e:
            _check_cache(e)
            raise UserError(f"dataset '{name}' (split '{split}') cannot be loaded: {innermost(e)}") from e
    try:
        return unify_columns(dataset, name, answers)
    except UnicodeDecodeError as e:
        raise UserError(f"dataset '{name}' has text that is not UTF-8: {e}") from e


def _check_cache(error: Exception) -> None:
    """Raises UserError where it is its cache that `datasets` cannot use, not the dataset."""
    file, cache = getattr(error, "filename", None), Path(datasets.config.HF_DATASETS_CACHE)
    if file and (Path(file) in cache.parents or Path(file).is_relative_to(cache)):
        raise UserError(
            f"'{cache}', where datasets are cached, cannot be used: {error.strerror}; set HF_HOME to a folder that can "
            "be written"
        ) from error


def _check_begins(path: Path) -> None:
    """Raises UserError for a file that begins with null, by which pyarrow's reader ends the process (26.0)."""
    with open(path, "rb") as file:
        if file.read(4096).removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"null"):
            raise UserError(f"dataset file '{path}' cannot be read: its first row is null, not an object")


def _with_dates_as_text(dataset: datasets.Dataset, path: Path) -> datasets.Dataset:
    """JSON has no dates, but where all texts of a column look like one, pyarrow makes timestamps of them, from which
    "2020-01-01" cannot be told from "2020-01-01 00:00:00": such a file is read again, by itself."""
    features = datasets.Features({name: _without_timestamps(f) for name, f in dataset.features.items()})
    if features == dataset.features:
        return dataset
    columns = {name: [] for name in features}
    for row in _rows(path.read_text(encoding="utf-8-sig")):
        for name, values in columns.items():
            values.append((row or {}).get(name))
    return datasets.Dataset.from_dict(columns, features=features)


def _rows(text: str) -> Iterator[dict[str, Any] | None]:
    """The objects of a list, or one after the other on lines or otherwise."""
    decoder, at = json.JSONDecoder(), 0
    while (at := _BLANK.match(text, at).end()) < len(text):
        value, at = decoder.raw_decode(text, at)
        yield from value if isinstance(value, list) else [value]


def _without_timestamps(feature: Any) -> Any:
    if isinstance(feature, dict):
        return {name: _without_timestamps(part) for name, part in feature.items()}
    if isinstance(feature, datasets.List):
        return datasets.List(_without_timestamps(feature.feature))
    is_date = isinstance(feature, datasets.Value) and feature.dtype.startswith("timestamp")
    return datasets.Value("string") if is_date else feature


def _conversion(path: Path) -> str:
    """The end of an error message: how to make a .jsonl file of what `datasets` reads in another way; else empty."""
    if path.suffix == ".csv":
        loaded = f"load_dataset('csv', data_files='{path}', split='train')"
    elif (path / "dataset_dict.json").is_file():
        loaded = f"load_from_disk('{path}')['train']"
    elif (path / "dataset_info.json").is_file():
        loaded = f"load_from_disk('{path}')"
    elif any(any(path.glob(pattern)) for pattern in ("*.parquet", "*/*.parquet", "*.jsonl", "*/*.jsonl")):  # the hub's
        loaded = f"load_dataset('{path}', split='train')"
    else:
        return ""
    return f"; datasets.{loaded}.to_json('{path}.jsonl') makes one"


def innermost(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return one_line(error)


def unify_columns(dataset: datasets.Dataset, where: str, answers: bool = False) -> datasets.Dataset:
    """Rename aliased columns to `prompt` and `answer`, and check that there is something to train on."""
    found = dataset.column_names
    prompt = next((n for n in PROMPT_NAMES if n in found), None)
    if prompt is None:
        raise UserError(f"dataset '{where}' has no column {_either(PROMPT_NAMES)}; its columns are {_listed(found)}")
    if len(dataset) == 0:
        raise UserError(f"dataset '{where}' is empty")
    answer = next((n for n in ANSWER_NAMES if n in found), None)
    if answer is None and "reward_model" in found:
        truths = [row.get("ground_truth") if isinstance(row, dict) else None for row in dataset["reward_model"]]
        if (any if answers else all)(t is not None for t in truths):
            truths = [t if isinstance(t, (list, dict, NoneType)) else str(t) for t in truths]
            dataset, answer = dataset.add_column("answer", truths), "answer"
    if prompt != "prompt":
        dataset = dataset.rename_column(prompt, "prompt")
    if answer not in (None, "answer"):
        dataset = dataset.rename_column(answer, "answer")
    text = isinstance(dataset["prompt"][0], str)
    for row, value in enumerate(dataset["prompt"]):
        if not value:
            raise UserError(f"dataset '{where}' has an empty prompt in row {row}")
        if not (isinstance(value, str) or _is_chat(value)):
            raise UserError(
                f"dataset '{where}' has a prompt in row {row} that is neither text nor a list of chat messages, each "
                "with 'role' and 'content'"
            )
        if isinstance(value, str) is not text:
            raise UserError(
                f"dataset '{where}' has text and chat messages as prompts, in rows 0 and {row}: make them all one kind"
            )
    if answers:
        require_answers(dataset, where, found)
    elif answer is not None:
        list(dataset["answer"])  # to be found here, if it cannot be decoded
    images = [c for c in ("image", "images") if c in dataset.column_names and not _is_null(dataset, c)]
    if images and text:
        raise UserError(
            f"dataset '{where}' has a column '{images[0]}' beside prompts that are text: write the prompts as chat "
            "messages, or remove the column"
        )
    if "tools" in dataset.column_names and any(dataset["tools"]):
        logger.warning("the column 'tools' of dataset '%s' is not used: no prompt tells of its tools", where)
    return dataset.select_columns([*(c for c in ("prompt", "answer") if c in dataset.column_names), *images])


def check_prompts(dataset: Any, where: str) -> None:
    """Raises UserError for what a caller has made that is more than one dataset, or without rows or a `prompt`."""
    if isinstance(dataset, dict):
        raise UserError(f"{where} must be one dataset, got a dict of {_listed([*dataset])}: give one of them")
    if isinstance(dataset, datasets.Dataset) and len(dataset) == 0:
        raise UserError(f"{where} is empty")
    found = getattr(dataset, "column_names", None)
    if found is not None and "prompt" not in found:
        raise UserError(f"{where} has no column 'prompt'; its columns are {_listed(found)}")


def _is_null(dataset: datasets.Dataset, column: str) -> bool:
    return dataset.data.column(column).null_count == len(dataset.data)


def _is_chat(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(m, dict) and _is_message(m) for m in value)


def _is_message(message: dict[str, Any]) -> bool:
    """A call of tools may have no content; of others templates would write None as the text."""
    return message.get("role") is not None and (message.get("content") is not None or bool(message.get("tool_calls")))


def require_answers(dataset: datasets.Dataset, where: str, found: list[str]) -> None:
    """Raise UserError unless every row has an `answer`: text, a number, or a list of such of which any one is right.
    `found` are the columns to say there are."""
    if "answer" not in dataset.column_names:
        raise UserError(
            f"--eval_metric accuracy needs a column {_either((*ANSWER_NAMES, 'reward_model.ground_truth'))} in "
            f"'{where}', whose columns are {_listed(found)}; --eval_metric teacher_kl needs none"
        )
    for row, value in enumerate(dataset["answer"]):
        answers = value if isinstance(value, list) else [value]
        if not answers or any(a is None or a != a or not str(a).strip() for a in answers):  # NaN: pandas' None
            raise UserError(f"dataset '{where}' has no answer in row {row}")
        if not all(isinstance(a, (str, int, float)) for a in answers):  # a bool is an int
            raise UserError(
                f"dataset '{where}' has an answer in row {row} that is neither text, a number nor a list of such"
            )
        if any(isinstance(a, float) and a.is_integer() and abs(a) >= 2**63 for a in answers):  # of JSON, or so given
            raise UserError(
                f"dataset '{where}' has an answer in row {row} that does not fit 64 bits, of which reading keeps 16 "
                f"digits ({value}): write it as text"
            )


def split_off(dataset: datasets.Dataset, size: int, seed: int, what: str) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Take `size` seeded-random rows away from `dataset`; returns (the rest, the rows taken)."""
    if not 0 < size < len(dataset):
        raise UserError(f"cannot hold out {size} prompts for {what} from a training set of {len(dataset)}")
    parts = dataset.train_test_split(test_size=size, seed=seed)
    return parts["train"], parts["test"]


def _either(names: tuple[str, ...]) -> str:
    return " or ".join(f"'{n}'" for n in names)


def _listed(names: list[str]) -> str:
    return ", ".join(f"'{n}'" for n in names) or "(none)"
