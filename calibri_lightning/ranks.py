"""One line for a mistake that all ranks of a launch meet."""

from __future__ import annotations

import hashlib
import os
import sys
import time
from contextlib import suppress
from datetime import timedelta
from typing import TYPE_CHECKING

from torch import distributed

if TYPE_CHECKING:
    from torch.distributed import TCPStore

PATIENCE = timedelta(seconds=5)
"""How long a rank waits for another one to print what that one undertook to print."""
AGENT = "CALIBRI_LIGHTNING_AGENT"
"""Environment variable: address and port of torchrun's store, once the ranks have met in one of their own."""
LAUNCH = "CALIBRI_LIGHTNING_LAUNCH"
"""Environment variable: the name of this launch by torchrun, the same after each of its restarts."""
MEETING = "CALIBRI_LIGHTNING_MEETING"
"""Environment variable: where the ranks have met, which tells one start of a launch from the next."""


def print_once(message: str) -> None:
    """Prints a message on standard error, unless another rank prints the same.

    The first rank that has it to say prints. One that comes later waits until that has happened, for the launcher may
    end all ranks as soon as one exits. Ranks ask each other in torchrun's store, which outlives them all; other
    launchers have none, and there every rank prints.

    Args:
        message: The message.
    """
    store = _launchers_store()
    start = os.environ.get(MEETING, "") + os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    key = f"calibri_lightning/{start}/{hashlib.sha256(message.encode()).hexdigest()}"
    if store is not None and _another_printed(store, key):
        return
    print(message, file=sys.stderr, flush=True)
    if store is not None:
        with suppress(RuntimeError):
            store.set(f"{key}/printed", "")


def _launchers_store() -> TCPStore | None:
    lent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if not (lent or AGENT in os.environ) or not distributed.is_available():
        return None
    try:
        address, _, port = os.environ.get(AGENT, "{MASTER_ADDR}:{MASTER_PORT}".format_map(os.environ)).rpartition(":")
        return distributed.TCPStore(address, int(port), is_master=False, timeout=PATIENCE)
    except (KeyError, ValueError, RuntimeError):
        return None


def _another_printed(store: TCPStore, key: str) -> bool:
    """Undertakes to print, or waits for the rank that did so first."""
    deadline = time.monotonic() + PATIENCE.total_seconds()
    try:
        if store.add(key, 1) == 1:
            return False
        # `store.wait` would report its timeout on standard error.
        while not store.check([f"{key}/printed"]):
            if time.monotonic() > deadline:
                return False
            time.sleep(0.05)
    except RuntimeError:
        return False
    return True
