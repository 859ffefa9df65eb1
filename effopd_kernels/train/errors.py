"""The ways a run ends early that are nobody's bug."""

from contextlib import contextmanager

from ..errors import UserError, one_line


class NotInstalledError(ImportError, UserError):
    """A package of the extra `train` is missing."""


class NonFiniteLossError(FloatingPointError):
    """The loss, the student's score or the teacher's logits became NaN or infinite. The weights are those of the last
    completed step."""


@contextmanager
def as_user_error(what: str, *kinds: type[Exception]):
    """What libraries raise of these kinds in the block, as a UserError that says first what could not be done."""
    try:
        yield
    except kinds as e:
        raise UserError(f"{what}: {one_line(e, 300)}") from e
