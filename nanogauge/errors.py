"""The two ways in which a command can end badly."""


class BadInput(ValueError):
    """The user's mistake: the message is one sentence that says what to do (exit status 2)."""


class RunFailed(RuntimeError):
    """A run that began and could not be finished (exit status 1)."""
