"""The two kinds of error that end a command with a message instead of a traceback."""


class BadInput(ValueError):
    """A mistake of the user; the message is one sentence that says what to do (exit status 2).

    Any function that reads flags, files or names from the user may raise it.
    """


class RunFailed(RuntimeError):
    """A failure of a run after it has started (exit status 1)."""
