"""A folder that appears whole or not at all."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from ..errors import UserError


def check_free(output_dir: str | Path, overwrite: bool = False) -> None:
    """Raises UserError when ``output_dir`` holds something and may not be overwritten, or cannot be a folder."""
    folder = Path(output_dir)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output_dir '{folder}' is a file; give a folder")
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise UserError(
            f"--output_dir '{folder}' exists and is not empty; give another folder, or --overwrite_output_dir to "
            "replace it"
        )


@contextlib.contextmanager
def whole_folder(output_dir: str | Path) -> Iterator[Path]:
    """A temporary folder beside ``output_dir``: it takes its place when the block ends well and is removed when not."""
    folder = Path(output_dir).absolute()
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    partial.mkdir(parents=True)
    try:
        yield partial
        if folder.is_dir():
            shutil.rmtree(folder)
        os.replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
