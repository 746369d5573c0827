"""Where the ranks of a torchrun launch meet: in a store of their own, fresh at every start.

torchrun lends its workers the agent's store, which lives as long as the agent. After a restart the process group finds
the addresses of the ranks before it there, and hangs or crashes (pytorch issue #135712; torch 2.13). So rank 0 opens a
store of its own and writes its address into the agent's; the others look there, and try again where that address is
still the one of an earlier rank 0.
"""

from __future__ import annotations

import os
import socket
import time
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING
from uuid import uuid4

from calibri_lightning.errors import UserError
from calibri_lightning.ranks import AGENT, LAUNCH, MEETING

if TYPE_CHECKING:
    from torch.distributed import TCPStore

PATIENCE = 600.0
"""Seconds that ranks wait for each other: machines do not import at the same speed."""
_KEY, _LAUNCH_KEY = "calibri_lightning/meeting", "calibri_lightning/launch"
_ANSWER = timedelta(seconds=10)


@dataclass(frozen=True)
class Meeting:
    """The ranks of a launch, met."""

    store: TCPStore
    """Theirs; rank 0 hosts it as long as this object is kept."""
    rank: int
    """This rank."""
    world_size: int
    """Number of ranks."""


def meet(patience: float = PATIENCE) -> Meeting | None:
    """Waits for all ranks of a torchrun launch, and lets torch and Lightning join them where they have met.

    Args:
        patience: Seconds to wait.

    Returns:
        The meeting; None for another launcher, or none.

    Raises:
        UserError: If a rank does not come.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    from torch.distributed import TCPStore

    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    agent = TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=_ANSWER)
    deadline = time.monotonic() + patience
    store = _open(agent, address, port, world_size, deadline) if rank == 0 else _find(agent, rank, deadline)
    # Whoever comes first after the launch gives it a name; the agent's store outlives all restarts.
    agent.compare_set(_LAUNCH_KEY, "", uuid4().hex)
    os.environ[LAUNCH] = agent.get(_LAUNCH_KEY).decode()
    os.environ[AGENT] = f"{address}:{port}"
    os.environ[MEETING] = f"{store.host}:{store.port}"
    # From here on torch does what it does without an agent's store.
    os.environ |= {
        "MASTER_ADDR": store.host,
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "False",
    }
    return Meeting(store, rank, world_size)


def _open(agent: TCPStore, address: str, port: int, world_size: int, deadline: float) -> TCPStore:
    """Rank 0: opens a store and waits until all others are in it."""
    from torch.distributed import TCPStore

    store = TCPStore(
        _own_address(address, port), 0, is_master=True, wait_for_workers=False, timeout=_ANSWER, multi_tenant=True
    )
    agent.set(_KEY, f"{store.host} {store.port}")
    while missing := [rank for rank in range(1, world_size) if store.add(f"came{rank}", 0) == 0]:
        if time.monotonic() > deadline:
            raise UserError(
                f"Of {world_size} ranks, {', '.join(map(str, missing[:8]))} did not come. Look at what torchrun "
                "printed on their machines; all must run the same command, but for --node_rank."
            )
        time.sleep(0.02)
    store.set("complete", "")
    return store


def _find(agent: TCPStore, rank: int, deadline: float) -> TCPStore:
    """Another rank: looks for the store of rank 0, and waits until all are in it."""
    from torch.distributed import TCPStore

    tried = ""
    while time.monotonic() < deadline:
        time.sleep(0.02)
        if not agent.check([_KEY]):
            continue
        place = agent.get(_KEY).decode()
        if place == tried:
            continue
        host, port = place.split()
        try:
            store = TCPStore(host, int(port), is_master=False, wait_for_workers=False, timeout=_ANSWER)
            # A rank of an earlier start has been there: so it is an earlier rank 0, about to be ended.
            if store.add(f"came{rank}", 1) != 1:
                tried = place
                continue
            while not store.check(["complete"]):
                if time.monotonic() > deadline:
                    break
                time.sleep(0.02)
            else:
                return store
        except RuntimeError:  # of an earlier start; it is gone, or goes while we wait
            tried = place
    raise UserError(
        f"Rank {rank} found no rank 0. Look at what torchrun printed on the machine with --node_rank 0; all machines "
        "must run the same command, but for --node_rank, and reach each other."
    )


def _own_address(address: str, port: int) -> str:
    """The address of this machine in the network in which the agent's is.

    Where the agent is on this machine the connection may be local, and its address of no use to others: they know the
    agent's.
    """
    with socket.create_connection((address, port), timeout=_ANSWER.total_seconds()) as probe:
        own: str = probe.getsockname()[0]
    return address if own.startswith("127.") or own == "::1" else own
