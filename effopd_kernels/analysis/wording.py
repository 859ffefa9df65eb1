"""Parts of the sentences that errors, notes and reports are made of."""

from collections.abc import Collection, Sequence
from pathlib import Path

LISTED = 10  # names in a sentence


def counted(names: Collection, kind: str) -> str:
    """How many there are of a kind of thing."""
    return f"{len(names)} {kind}{'s' * (len(names) != 1)}"


def listed(names: Sequence[str]) -> str:
    """The first ten, and how many more there are."""
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more


def printable(text: str | Path) -> str:
    """With bytes of a path or argument that are no text, which no table, figure or terminal takes, as \\udcff."""
    return str(text).encode("utf-8", "backslashreplace").decode()
