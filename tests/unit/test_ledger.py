"""The ledger: round trips, torn lines, damage, full disks, other runs' lines."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import pytest

from calibri_lightning.errors import UserError
from calibri_lightning.strategies.ledger import Ledger, digest
from calibri_lightning.strategies.search import FAILED

SHAPE = (3, 2)


def started(folder: Path, rank: int = 0) -> Ledger:
    ledger = Ledger(folder, rank)
    ledger.start()
    return ledger


def resumed(folder: Path, rank: int = 0) -> Ledger:
    ledger = Ledger(folder, rank)
    ledger.resume()
    return ledger


def test_units_of_all_ranks_are_recalled_bit_for_bit(tmp_path: Path) -> None:
    value = 0.1 + 0.2  # not a short decimal
    started(tmp_path, 0).record_unit(4, "task", [(0, 0), (1, 0)], [value, 1e-300])
    started(tmp_path, 1).record_unit(4, "task", [(2, 0)], [-3.0])
    recall = resumed(tmp_path).recall(4, "task", SHAPE)
    np.testing.assert_array_equal(recall.rewards, [[value, np.nan], [1e-300, np.nan], [-3.0, np.nan]])
    assert not recall.complete
    assert recall.progress is None


def test_lines_of_another_task_or_generation_are_not_recalled(tmp_path: Path) -> None:
    started(tmp_path).record_unit(4, "task", [(0, 0)], [1.0])
    ledger = resumed(tmp_path)
    assert np.isnan(ledger.recall(4, "other", SHAPE).rewards).all()
    assert np.isnan(ledger.recall(5, "task", SHAPE).rewards).all()


def test_failed_pictures_are_made_again_unless_the_generation_was_complete(tmp_path: Path) -> None:
    ledger = started(tmp_path)
    ledger.record_unit(0, "a", [(0, 0), (1, 0)], [np.nan, 2.0])
    assert np.isnan(resumed(tmp_path).recall(0, "a", SHAPE).rewards[0, 0])
    matrix = np.array([[FAILED, 1.0], [2.0, 3.0], [4.0, np.nan]])
    ledger.record_generation(0, "a", 0.25, matrix)
    recall = resumed(tmp_path).recall(0, "a", SHAPE)
    np.testing.assert_array_equal(recall.rewards, matrix)
    assert recall.complete
    assert recall.progress == 0.25


def test_torn_last_line_is_cut_and_the_next_line_stays_readable(tmp_path: Path) -> None:
    ledger = started(tmp_path)
    ledger.record_unit(0, "a", [(0, 0)], [1.0])
    ledger.record_unit(0, "a", [(1, 0)], [2.0])
    path = tmp_path / "units.rank0.jsonl"
    path.write_bytes(path.read_bytes()[:-7])
    again = resumed(tmp_path)
    np.testing.assert_array_equal(again.recall(0, "a", SHAPE).rewards[:, 0], [1.0, np.nan, np.nan])
    again.record_unit(0, "a", [(2, 0)], [3.0])
    np.testing.assert_array_equal(resumed(tmp_path).recall(0, "a", SHAPE).rewards[:, 0], [1.0, np.nan, 3.0])


@pytest.mark.parametrize("line", ["{nonsense", '{"generation": 0}', '{"generation": 0, "task": "a", "cells": [[1]]}'])
def test_damaged_line_is_named(tmp_path: Path, line: str) -> None:
    ledger = started(tmp_path)
    ledger.record_unit(0, "a", [(0, 0)], [1.0])
    path = tmp_path / "units.rank0.jsonl"
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(UserError, match=r"units.rank0.jsonl has an unreadable line 2"):
        resumed(tmp_path)


def test_new_run_sets_the_old_lines_aside(tmp_path: Path) -> None:
    started(tmp_path).record_unit(0, "a", [(0, 0)], [1.0])
    started(tmp_path)
    assert (tmp_path / "units.rank0.jsonl").read_bytes() == b""
    assert b'"cells"' in (tmp_path / "units.rank0.jsonl.1").read_bytes()
    assert np.isnan(resumed(tmp_path).recall(0, "a", SHAPE).rewards).all()


def test_lines_of_the_previous_folder_are_recalled(tmp_path: Path) -> None:
    started(tmp_path / "old").record_unit(0, "a", [(0, 0)], [1.0])
    ledger = Ledger(tmp_path / "new")
    ledger.resume(tmp_path / "old")
    assert ledger.recall(0, "a", SHAPE).rewards[0, 0] == 1.0


def test_full_disk_gives_the_path_and_keeps_earlier_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = started(tmp_path)
    ledger.record_unit(0, "a", [(0, 0)], [1.0])
    with monkeypatch.context() as patch:

        def full(_: int) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        patch.setattr(os, "fsync", full)
        with pytest.raises(UserError, match=r"units.rank0.jsonl cannot be written \(No space left on device\)"):
            ledger.record_unit(0, "a", [(1, 0)], [2.0])
    assert resumed(tmp_path).recall(0, "a", SHAPE).rewards[0, 0] == 1.0


def test_unwritable_folder_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file/ledger cannot be written"):
        started(tmp_path / "file" / "ledger")


def test_digest_depends_on_the_boundaries_of_its_parts() -> None:
    assert digest("ab", "c") != digest("a", "bc")
    assert digest("ab") == digest(b"ab")
