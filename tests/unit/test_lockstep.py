"""Ranks of one model take equally many turns, do each unit once for its results, and keep failures until the end."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from calibri_lightning.errors import UserError
from calibri_lightning.sampling.lockstep import Lockstep


def bound(size: int) -> Lockstep:
    lockstep = Lockstep()
    lockstep.size = size
    return lockstep


@given(units=st.integers(0, 30), replicas=st.integers(1, 4), size=st.integers(1, 4))
def test_all_ranks_of_a_model_take_as_many_turns_and_each_unit_counts_once(
    units: int, replicas: int, size: int
) -> None:
    world = replicas * size
    shares = [range(rank, units, world) for rank in range(world)]
    turns = [bound(size).turns(shares, rank, 0) for rank in range(world)]
    counted = [turn.unit for own in turns for turn in own if turn.counts]
    assert sorted(counted) == list(range(units))
    for first in range(0, world, size):
        assert len({len(own) for own in turns[first : first + size]}) == 1
        assert len(turns[first]) == len(shares[first]), "no model runs more than its busiest rank needs"
    for own, share in zip(turns, shares, strict=True):
        assert all(turn.counts or turn.unit == (share[-1] if share else 0) for turn in own)


def test_a_failure_between_forwards_waits_for_them_where_others_do() -> None:
    alone, together = bound(1).late(), bound(2).late()
    with pytest.raises(ValueError, match="first"), alone.kept():
        raise ValueError("first")
    for text in ("first", "second"):
        with together.kept():
            raise ValueError(text)
    assert together.is_there
    with pytest.raises(ValueError, match="first"):
        together.raise_it()
    bound(2).late().raise_it()


@pytest.mark.parametrize("size", [1, 2])
def test_a_failure_within_a_forward_is_known_to_leave_others_waiting(size: int) -> None:
    lockstep = bound(size)
    with pytest.raises(torch.OutOfMemoryError), lockstep.forwards():
        raise torch.OutOfMemoryError("memory")
    assert lockstep.is_lost == (size > 1)


@pytest.mark.parametrize(
    "error",
    [torch.distributed.DistBackendError("NCCL error"), RuntimeError("[gloo/transport/tcp/pair.cc:537] Read error")],
)
def test_a_broken_connection_is_another_ranks_fault(error: RuntimeError) -> None:
    with pytest.raises(UserError, match="has left"), bound(2).forwards():
        raise error
    with pytest.raises(type(error)), bound(1).forwards():
        raise error
