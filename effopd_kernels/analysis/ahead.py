"""Files are read while PyTorch is imported, which keeps a processor busy for a second, and the disk idle."""

import threading
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

_PIECE = 8 << 20  # bytes
_FILES = 64  # open at once; some systems allow a process 256, and imports need theirs


@contextmanager
def reading_ahead(folders: Iterable[str | Path]) -> Iterator[None]:
    """While the block runs, read the beginnings of these models into the system's cache, a piece of each in turn, for
    each tensor is wanted of all of them together. What cannot be read is passed over: it is an error where it is used.
    """
    over = threading.Event()
    paths = [path for path in map(_first_file, folders) if path]
    thread = threading.Thread(target=_read, args=(paths[:_FILES], over), daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _first_file(folder: str | Path) -> Path | None:
    with suppress(OSError, ValueError):  # the latter: a name that no file can have
        for pattern in ("model.safetensors", "model-*.safetensors"):
            if files := sorted(path for path in Path(folder).glob(pattern) if path.is_file()):
                return files[0]
    return None


def _read(paths: list[Path], over: threading.Event) -> None:
    piece = bytearray(_PIECE)
    with suppress(OSError), ExitStack() as stack:
        files = [stack.enter_context(open(path, "rb", buffering=0)) for path in paths]
        while files:
            files = [file for file in files if not over.is_set() and file.readinto(piece)]
