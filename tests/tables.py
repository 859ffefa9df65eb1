"""Reads what `effopd_kernels.analysis.tables.write_table` wrote."""

from pathlib import Path
from typing import Any

from pyarrow import parquet


def read_table(folder: str | Path, name: str) -> list[dict[str, Any]]:
    with open(Path(folder) / f"{name}.parquet", "rb") as file:  # Arrow takes no path that is not UTF-8
        return parquet.read_table(file).to_pylist()
