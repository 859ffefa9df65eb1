"""Files are read while PyTorch is imported, which takes a second without a byte from the disk."""

import threading
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

_PIECE = 8 << 20  # bytes


@contextmanager
def reading_ahead(folders: Iterable[str | Path]) -> Iterator[None]:
    """While the block runs, read the beginnings of these models, all alike far, into the system's cache: of each tensor
    the base's and every checkpoint's are wanted together. What cannot be read is said where it is wanted.
    """
    over = threading.Event()
    thread = threading.Thread(
        target=_read, args=([path for path in map(_first_file, folders) if path], over), daemon=True
    )
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _first_file(folder: str | Path) -> Path | None:
    with suppress(OSError):
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
