"""Checks of settings, each with one message for the user."""

from __future__ import annotations

import math

from calibri_lightning.errors import UserError


def check_at_least(name: str, value: float | None, least: float, why: str) -> None:
    """Refuses a setting below its least value, or one that is not finite.

    Args:
        name: Name of the setting.
        value: Its value; None passes.
        least: Least allowed value.
        why: Half a sentence on what the setting is.

    Raises:
        UserError: If the value is too small or not finite.
    """
    if value is not None and not (math.isfinite(value) and value >= least):
        raise UserError(
            f"{name} is {value}; {why}, so it must be a number of at least {least:g}. Set {name} accordingly."
        )


def check_positive(name: str, value: float | None) -> None:
    """Refuses a setting that is not a positive finite number.

    Args:
        name: Name of the setting.
        value: Its value; None passes.

    Raises:
        UserError: If the value is not positive or not finite.
    """
    if value is not None and not (math.isfinite(value) and value > 0):
        raise UserError(f"{name} is {value}; it must be a finite number above 0. Set {name} accordingly.")


def check_share(name: str, value: float | None) -> None:
    """Refuses a setting outside 0 (excluded) .. 1.

    Args:
        name: Name of the setting.
        value: Its value; None passes.

    Raises:
        UserError: If the value is outside.
    """
    if value is not None and not 0 < value <= 1:
        raise UserError(f"{name} is {value}; it must lie above 0 and at most at 1. Set {name} accordingly.")


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Refuses a setting that is not one of a few words.

    Args:
        name: Name of the setting.
        value: Its value.
        choices: The words.

    Raises:
        UserError: If the value is none of them.
    """
    if value not in choices:
        raise UserError(f"{name} is {value!r}; it must be one of {', '.join(choices)}. Set {name} accordingly.")


def check_between(name: str, value: float, least: float, most: float, why: str) -> None:
    """Refuses a setting outside a range, or one that is not finite.

    Args:
        name: Name of the setting.
        value: Its value.
        least: Least allowed value.
        most: Largest allowed value.
        why: Half a sentence on what the setting is.

    Raises:
        UserError: If the value is outside.
    """
    if not least <= value <= most:
        raise UserError(
            f"{name} is {value}; {why}, so it must lie between {least:g} and {most:g}. Set {name} accordingly."
        )
