"""Wires for servers that exist already, by name."""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Mapping
from typing import Any

from calibri_lightning.errors import UserError
from calibri_lightning.remote.wire import Wire

WIRES: Mapping[str, str] = {
    "calibri": "calibri_lightning.remote.wires.calibri:CalibriWire",
    "flow-grpo": "calibri_lightning.remote.wires.flow_grpo:FlowGrpoWire",
    "flow-factory": "calibri_lightning.remote.wires.flow_factory:FlowFactoryWire",
    "unirl": "calibri_lightning.remote.wires.unirl:UniRLWire",
    "openai": "calibri_lightning.remote.wires.judge:JudgeWire",
}
"""Wires that go by a short name, and their import paths."""


def make_wire(name: str, reward: str, options: Mapping[str, Any] | None = None) -> Wire:
    """Finds a wire, and makes it.

    Args:
        name: A name in `WIRES`, or an import path "package.module:Class".
        reward: The reward's name in configurations and logs, the first argument of every wire.
        options: Further arguments of the wire's class.

    Returns:
        The wire.

    Raises:
        UserError: If there is none of that name, or it does not take these options.
    """
    found = _find(name)
    given = options or {}
    parameters = list(inspect.signature(found).parameters.values())[1:]
    known = [parameter.name for parameter in parameters]
    for key in given:
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise UserError(f"The wire {name!r} has no option {key!r}; it has {', '.join(known) or 'none'}.{hint}")
    missing = [p.name for p in parameters if p.default is p.empty and p.name not in given]
    if missing:
        raise UserError(f"The wire {name!r} needs the option {missing[0]!r}. Give it among the wire's options.")
    return found(reward, **given)


def _find(name: str) -> Any:
    module, _, attribute = WIRES.get(name, name).partition(":")
    if not attribute:
        close = difflib.get_close_matches(name, WIRES, n=1)
        hint = f"Did you mean {close[0]!r}?" if close else "Check the spelling."
        raise UserError(
            f"There is no wire {name!r}; there are {', '.join(WIRES)}, and others go as 'package.module:Class'. {hint}"
        )
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(
            f"The wire {name!r} cannot be imported ({error}). The module must be importable from where you run: check "
            "the name, or put its folder on PYTHONPATH."
        ) from error
    if not (isinstance(found, type) and issubclass(found, Wire)):
        raise UserError(f"The wire {name!r} is no class derived from calibri_lightning.remote.wire.Wire. Correct it.")
    return found
