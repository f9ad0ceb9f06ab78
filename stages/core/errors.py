"""The one exception that a user's mistake raises."""


class UserError(Exception):
    """Bad input. Each line of the message says what is wrong, where, and what would be right; no traceback is shown."""
