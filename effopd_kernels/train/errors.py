"""The ways a run ends early that are nobody's bug."""

from ..errors import UserError

__all__ = ["NonFiniteLossError", "NotInstalledError", "UserError"]


class NotInstalledError(ImportError, UserError):
    """A package of the extra `train` is missing."""


class NonFiniteLossError(FloatingPointError):
    """The loss, the student's score or the teacher's logits became NaN or infinite. The weights are those of the last
    completed step."""
