"""The error whose message is all that a user of a command should need, and the messages of others within it."""


class UserError(ValueError):
    """Something the caller gave is wrong. The message names what, where, and what would be right."""


def one_line(error: BaseException, most: int | None = None) -> str:
    """What an error says, cut after so many characters, or its kind where it says nothing."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if most is None or len(text) <= most else text[: most - 3] + "..."
