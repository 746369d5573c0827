"""Lets no rank wait for ever for another one: joins the watch with a run, and ends all ranks where one ends."""

from __future__ import annotations

import os
import sys
import time
from contextlib import suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Callback

from calibri_lightning.errors import EchoError
from calibri_lightning.launch.watch import EXIT_CODE, GRACE, PATIENCE, Failure, RankWatch, failed_rank, tell_failure

if TYPE_CHECKING:
    from torch.distributed import Store, TCPStore

    from calibri_lightning.launch.rendezvous import Meeting

_ANSWER = timedelta(seconds=20)
"""How long the store may take for an answer."""


class RankGuard(Callback):
    """Watches over the ranks of a run, from the moment in which they know each other.

    Under torchrun that is before anything is loaded (`rendezvous.meet`), so that a rank without the model ends the
    others, too; elsewhere it is when the trainer has joined them.

    Args:
        meeting: Where the ranks of a launch have met; None where they have not.
    """

    def __init__(self, meeting: Meeting | None = None) -> None:
        self.patience = PATIENCE
        self._host: TCPStore | None = None
        self._watch: RankWatch | None = None
        self._store: Store | None = None
        self._rank, self._world_size = 0, 1
        if meeting is not None:
            self._rank, self._world_size, self._host = meeting.rank, meeting.world_size, meeting.store
            self._begin(meeting.store.host, meeting.store.port)

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Begins to watch, unless that has begun, and reads the module's pulse from now on.

        Args:
            trainer: The trainer.
            pl_module: The module.
            stage: Unused.
        """
        if trainer.world_size == 1:
            return
        if self._watch is None:
            self._rank, self._world_size = trainer.global_rank, trainer.world_size
            self._host_or_join(trainer)
        assert self._watch is not None
        self._watch.pulse, self._watch.patience = pl_module.pulse, self.patience

    def _host_or_join(self, trainer: Any) -> None:
        """Rank 0 opens a store; the others are told where."""
        from torch.distributed import TCPStore

        address = os.environ.get("MASTER_ADDR", "127.0.0.1")
        if self._rank == 0:
            self._host = TCPStore(address, 0, is_master=True, wait_for_workers=False, timeout=_ANSWER)
        address, port = trainer.strategy.broadcast((address, self._host.port if self._host is not None else 0))
        self._begin(address, port)

    def _begin(self, address: str, port: int) -> None:
        from torch.distributed import TCPStore

        # A connection for each thread: a store answers one question at a time.
        mine, theirs = (
            TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=_ANSWER) for _ in range(2)
        )
        self._store = mine
        self._watch = RankWatch(theirs, self._rank, self._world_size, self.patience)
        self._watch.start()

    @property
    def is_active(self) -> bool:
        """Whether there are other ranks."""
        return self._watch is not None

    def follows(self, error: BaseException) -> tuple[int, str] | None:
        """Tells whether an error here is but the echo of another rank's.

        Args:
            error: What was raised here.

        Returns:
            Exit code, and what became of that rank; None where no other rank has failed.
        """
        if self._store is None or not (isinstance(error, EchoError) or _is_lost_connection(error)):
            return None
        deadline = time.monotonic() + GRACE / 2
        while time.monotonic() < deadline:
            try:
                failure = failed_rank(self._store)
            except Exception:  # rank 0 is gone, and with it the store
                return EXIT_CODE, "Rank 0 is gone, without a word."
            if failure is not None:
                mine = failure.rank == self._rank
                return None if mine else (failure.code, f"Rank {failure.rank} ended: {failure.message}")
            time.sleep(0.1)
        return EXIT_CODE, f"Another rank is gone, without a word ({error})."

    def leave(self, code: int, message: str) -> None:
        """Ends the watch; where the run failed here, the others are told first.

        Args:
            code: Exit code of this rank.
            message: Why it is not 0.
        """
        if self._watch is None or self._store is None:
            return
        self._watch.stop()
        with suppress(Exception):  # rank 0 may be gone
            if code not in (0, EXIT_CODE):
                tell_failure(self._store, Failure(self._rank, code, message))
            self._store.add("left", 1)
            # Who has the store stays until the others have read it.
            deadline = time.monotonic() + 2 * GRACE
            while code and self._host is not None and self._rank == 0 and time.monotonic() < deadline:
                if self._store.add("left", 0) >= self._world_size:
                    break
                time.sleep(0.05)
        sys.stderr.flush()


def _is_lost_connection(error: BaseException) -> bool:
    """Whether a collective broke off; gloo has no class of exception of its own."""
    from torch.distributed import DistError

    return isinstance(error, DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))
