"""The error whose message is all that a user of a command should need."""


class UserError(ValueError):
    """Something the caller gave is wrong. The message names what, where, and what would be right."""
