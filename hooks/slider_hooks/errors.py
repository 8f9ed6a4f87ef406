"""The one error that a plugin raises for what the user has to mend."""


class UserError(Exception):
    """Something the user gave is wrong. The message says what, where and what to do next; the command ends with code 2."""
