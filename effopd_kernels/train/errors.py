"""The two ways a run ends early that are nobody's bug."""

from ..errors import UserError

__all__ = ["NonFiniteLossError", "UserError"]


class NonFiniteLossError(FloatingPointError):
    """The loss or the teacher's logits became NaN or infinite. Raised before the step's weights are touched."""
