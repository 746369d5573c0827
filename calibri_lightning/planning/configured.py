"""Classes that a configuration names."""

from __future__ import annotations

from importlib import import_module
from typing import Any


def class_of(config: dict[str, Any]) -> type:
    """Finds a class.

    Args:
        config: What stands for an object of it, with a class_path.

    Returns:
        The class.
    """
    module, _, name = str(config["class_path"]).rpartition(".")
    found: type = getattr(import_module(module), name)
    return found
