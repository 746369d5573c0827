"""The exceptions that a user's mistake raises: on the rank that meets it, and on the others."""

from __future__ import annotations


class UserError(ValueError):
    """A mistake in a user's input: the command line prints its message alone, without a traceback.

    The message says, in this order, what was given, what the rule is and how to fix it.
    """


class EchoError(UserError):
    """What a rank raises because another one has failed: that one says why."""
