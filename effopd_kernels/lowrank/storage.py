"""Factors on disk: one safetensors file, tensors named "<matrix>/<field>"."""

import json
import os
from collections.abc import Mapping
from pathlib import Path

from .types import RSVD

_FORMAT = "effopd_kernels.lowrank.RSVD/1"


def save(svds: Mapping[str, RSVD], path: str | Path) -> None:
    """Write factors and certificates of named matrices (never the matrices). The file appears whole or not at all.

    Raises TypeError for other than a mapping of names to `RSVD`, FileNotFoundError where the file's folder is not
    there, ValueError for a folder.
    """
    from safetensors.torch import save_file

    if not isinstance(svds, Mapping) or not all(isinstance(svd, RSVD) for svd in svds.values()):
        raise TypeError(f"svds must be a mapping of names to RSVDs, got {type(svds).__name__}")
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder: give the name of a file")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path}: there is no folder {path.parent}")
    tensors = {
        f"{name}/{field}": getattr(svd, field).detach().contiguous().clone()
        for name, svd in svds.items()
        for field in svd._fields
    }
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        save_file(tensors, partial, metadata={"format": _FORMAT, "names": json.dumps([f"{name}" for name in svds])})
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def load(path: str | Path) -> dict[str, RSVD]:
    """What :func:`save` wrote, in its order, on the CPU. Raises ValueError for any other file, FileNotFoundError for
    none.
    """
    from safetensors import SafetensorError, safe_open

    if Path(path).is_dir():
        raise ValueError(f"{path} is a folder: give the file that effopd_kernels.lowrank.save wrote")
    try:
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
            if about.get("format") != _FORMAT:
                raise ValueError(f"{path}: not written by effopd_kernels.lowrank.save")
            fields: dict[str, dict] = {}
            for key in file.keys():  # noqa: SIM118  (not a dict)
                name, _, field = key.rpartition("/")
                fields.setdefault(name, {})[field] = file.get_tensor(key)
        names = json.loads(about.get("names", "[]"))  # safetensors sorts them
        return {name: RSVD(**fields[name]) for name in dict.fromkeys([*names, *fields])}
    except (SafetensorError, TypeError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: damaged or truncated: {error}") from error
