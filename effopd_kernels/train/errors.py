"""The two ways a run ends early that are nobody's bug."""


class UserError(ValueError):
    """Something the caller gave is wrong. The message names what, where, and what would be right."""


class NonFiniteLossError(FloatingPointError):
    """The loss or the teacher's logits became NaN or infinite. Raised before the step's weights are touched."""
