"""Ranks that hold one model together run the same number of forwards, whatever each of them has to do.

A forward of a transformer that is cut up gathers its weights from all ranks that share it: a rank that ran one forward
less than the others would leave them waiting for ever. So ranks with fewer units run some again whose results nobody
uses; what fails after a forward is raised when all forwards are done; and a rank that fails within one leaves at once,
without the exchange in which ranks otherwise tell each other of failures: the others are not where they could answer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch

from calibri_lightning.errors import EchoError


class Turn(NamedTuple):
    """A unit that a rank runs."""

    unit: int
    """Its number."""
    counts: bool
    """Whether its results are used; otherwise only its forwards are needed."""


class Lockstep:
    """How many ranks hold one model together, and whether this one is still where the others are."""

    def __init__(self) -> None:
        """Starts with a whole model on each rank."""
        self.size = 1
        """Ranks that hold one model together; they are consecutive."""
        self.is_lost = False
        """Whether this rank failed within a forward that others take part in."""

    @property
    def binds(self) -> bool:
        """Whether forwards of this rank depend on other ranks."""
        return self.size > 1

    def turns(self, shares: Sequence[Sequence[int]], rank: int, spare: int) -> list[Turn]:
        """Lists what a rank runs.

        Args:
            shares: Units of each rank of the run, the first of which begins a model.
            rank: This one.
            spare: The unit that it runs without using its results, where it has none of its own.

        Returns:
            Its own units, and as many turns more as the busiest rank of the same model has.
        """
        own = shares[rank]
        first = rank - rank % self.size
        most = max(len(share) for share in shares[first : first + self.size])
        # Of its own units it has the texts encoded already.
        again = own[-1] if own else spare
        return [*(Turn(unit, True) for unit in own), *[Turn(again, False)] * (most - len(own))]

    @contextmanager
    def forwards(self) -> Iterator[None]:
        """Surrounds forwards: an exception from inside leaves the other ranks of the model waiting.

        Yields:
            Nothing.

        Raises:
            EchoError: If another rank has left.
        """
        try:
            yield
        except BaseException as error:
            self.is_lost = self.binds
            if self.is_lost and _is_broken_connection(error):
                raise EchoError(
                    "Another rank that holds the model together with this one has left; its own message says why. Fix "
                    "that and run again."
                ) from error
            raise

    def late(self) -> LateFailure:
        """Makes what keeps a failure between forwards until all of them are done."""
        return LateFailure(self)


def _is_broken_connection(error: BaseException) -> bool:
    # NCCL's errors have a class; gloo's are known by the file of its source that they name (torch 2.13).
    return isinstance(error, torch.distributed.DistError) or (isinstance(error, RuntimeError) and "gloo/" in str(error))


class LateFailure:
    """Keeps the first failure of work between forwards, where other ranks wait for those to come.

    Args:
        lockstep: Says whether they do; otherwise failures are raised at once.
    """

    def __init__(self, lockstep: Lockstep) -> None:
        self._lockstep = lockstep
        self._failure: Exception | None = None

    @property
    def is_there(self) -> bool:
        """Whether something failed, so that further work of the kind is in vain."""
        return self._failure is not None

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Surrounds work that runs no forward.

        Yields:
            Nothing.
        """
        try:
            yield
        except Exception as error:
            if not self._lockstep.binds:
                raise
            self._failure = self._failure or error

    def raise_it(self) -> None:
        """Raises the failure, if there is one; called when all forwards are done.

        Raises:
            Exception: The failure.
        """
        if self._failure is not None:
            raise self._failure
