"""What a user can mend. The launch scripts print a `UserError` without a traceback; whatever else is raised is ours."""

from __future__ import annotations


class UserError(ValueError):
    """Something that the user can mend: the message says what was found, where, what was expected and what to do.

    Its children stand where they are raised. Anything else that stops a run is a fault of the program, and keeps its
    traceback.
    """


class ExampleError(UserError):
    """An example that cannot be used: its manifest line, its recording, its bytes, or what they say.

    It costs that example and nothing else: training goes on without it (see data/quarantine.py).
    """


class MissingLibraryError(UserError):
    """An optional library that was asked for is not installed; the message names the package."""


def writable(text: str) -> str:
    """The same text, bytes of a name that is not UTF-8 written as escapes: so that every error can be printed."""
    return text.encode("utf-8", "backslashreplace").decode()
