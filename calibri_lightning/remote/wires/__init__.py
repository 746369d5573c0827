"""The kinds of servers, by name."""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Mapping
from typing import Any

from calibri_lightning.errors import UserError
from calibri_lightning.remote.wire import Wire

WIRES: Mapping[str, str] = {
    "calibri-lightning": "calibri_lightning.remote.native:NativeWire",
    "calibri": "calibri_lightning.remote.wires.calibri:CalibriWire",
    "flow-grpo": "calibri_lightning.remote.wires.flow_grpo:FlowGrpoWire",
    "flow-factory": "calibri_lightning.remote.wires.flow_factory:FlowFactoryWire",
    "unirl": "calibri_lightning.remote.wires.unirl:UniRLWire",
    "openai": "calibri_lightning.remote.wires.judge:JudgeWire",
}
"""Wires that go by a short name, and their import paths."""


def make_wire(name: str, reward: str, options: Mapping[str, Any]) -> Wire:
    """Makes a wire.

    Args:
        name: A name in `WIRES`, or an import path "package.module:name" of a class.
        reward: Name of the reward on the server; for a class that has the argument `reward`.
        options: Its other arguments.

    Returns:
        The wire.

    Raises:
        UserError: If there is none of that name, or it does not take these options.
    """
    found = _class_of(name)
    known = [key for key in inspect.signature(found).parameters if key != "reward"]
    for key in options:
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise UserError(
                f"The reward {reward!r} has no option {key!r}; beside those of all remote rewards, the wire {name!r} "
                f"has {', '.join(known) or 'none'}.{hint}"
            )
    needs_name = "reward" in inspect.signature(found).parameters
    missing = [
        key
        for key, parameter in inspect.signature(found).parameters.items()
        if parameter.default is parameter.empty and key not in options and key != "reward"
    ]
    if missing:
        raise UserError(f"The wire {name!r} of the reward {reward!r} needs the option {missing[0]!r}. Give it.")
    return found(**({"reward": reward} if needs_name else {}), **options)


def _class_of(name: str) -> type[Wire]:
    module, _, attribute = WIRES.get(name, name).partition(":")
    rule = f"built in are {', '.join(WIRES)}, and others go as 'package.module:name' of a class derived from Wire"
    if not attribute:
        close = difflib.get_close_matches(name, WIRES, n=1)
        raise UserError(
            f"There is no wire {name!r}; {rule}. " + (f"Did you mean {close[0]!r}?" if close else "Check the spelling.")
        )
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"The wire {name!r} cannot be imported ({error}); {rule}. Check the name.") from error
    if not isinstance(found, type) or not issubclass(found, Wire):
        raise UserError(f"The wire {name!r} is a {type(found).__name__}; {rule}.")
    return found
