"""Tables: a list of rows, or columns of equal length, as CSV for people and Parquet for programs."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

Rows = Sequence[Mapping[str, Any]] | Mapping[str, Sequence[Any]]


def write_table(folder: str | Path, name: str, rows: Rows) -> None:
    """``folder/name.csv`` and ``folder/name.parquet``.

    Args:
        rows: dicts, whose keys are the columns in order of first appearance (a key that a row lacks is null), or a
            mapping of columns to values. Values are numbers, strings, booleans or None; floats are written in full.
    """
    import pyarrow
    from pyarrow import csv, parquet

    if not isinstance(rows, Mapping):
        names = list(dict.fromkeys(key for row in rows for key in row))
        rows = {key: [row.get(key) for row in rows] for key in names}
    table = pyarrow.table(dict(rows))
    words = [field.name for field in table.schema if pyarrow.types.is_string(field.type)]  # which repeat; floats do not
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for suffix, write in {
        "csv": csv.write_csv,
        "parquet": partial(parquet.write_table, use_dictionary=words),
    }.items():
        with open(folder / f"{name}.{suffix}", "wb") as file:  # opened here: Arrow takes no path that is not UTF-8
            write(table, file)
