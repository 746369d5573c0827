"""The one exception a user's mistake raises."""

from __future__ import annotations


class UserError(ValueError):
    """A mistake in a user's input: the command line prints its message alone, without a traceback.

    The message says, in this order, what was given, what the rule is and how to fix it.
    """
