"""Checks of what a configuration says about a wire."""

from __future__ import annotations

from typing import Any, get_args

from calibri_lightning.errors import UserError


def check_choice(wire: str, option: str, value: object, choices: Any) -> None:
    """Refuses a value that an option does not have.

    Args:
        wire: The wire's name.
        option: The option's name.
        value: What was given.
        choices: A `Literal` of what may be given.

    Raises:
        UserError: If the value is none of them.
    """
    if value not in get_args(choices):
        known = ", ".join(map(str, get_args(choices)))
        raise UserError(f"The option {option} of the wire {wire!r} is {value!r}; it must be one of {known}.")


def check_integer(wire: str, option: str, value: object, low: int, high: int) -> None:
    """Refuses what is no integer of a range.

    Args:
        wire: The wire's name.
        option: The option's name.
        value: What was given.
        low: The smallest value.
        high: The largest value.

    Raises:
        UserError: If the value is none of them.
    """
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise UserError(
            f"The option {option} of the wire {wire!r} is {value!r}; it must be an integer within {low}..{high}."
        )
