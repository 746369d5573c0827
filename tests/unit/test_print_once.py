"""Ranks that fail alike say so once; one that fails alone is always heard."""

from __future__ import annotations

import threading
from datetime import timedelta

import pytest
from torch.distributed import TCPStore

from calibri_lightning import ranks
from calibri_lightning.ranks import print_once


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> TCPStore:
    """What torchrun gives its ranks."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(store.port))
    return store


def as_ranks(*messages: str) -> None:
    """Each message from a rank of its own, at the same time."""
    threads = [threading.Thread(target=print_once, args=(message,)) for message in messages]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


@pytest.mark.usefixtures("store")
def test_ranks_that_fail_alike_print_one_line_and_others_theirs(capsys: pytest.CaptureFixture[str]) -> None:
    as_ranks("no prompts", "no prompts", "no server", "no prompts")
    assert sorted(capsys.readouterr().err.splitlines()) == ["no prompts", "no server"]


@pytest.mark.usefixtures("store")
def test_a_restarted_launch_is_heard_again(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for count in ("0", "1"):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", count)
        as_ranks("no prompts", "no prompts")
    assert capsys.readouterr().err == "no prompts\nno prompts\n"


def test_a_rank_prints_what_another_one_undertook_and_did_not(
    store: TCPStore, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Claimed(TCPStore):
        """A store in which a rank that is no more was always the first."""

        def add(self, key: str, amount: int) -> int:
            return super().add(key, amount) + 1

    monkeypatch.setattr(ranks, "PATIENCE", timedelta(seconds=0.2))
    monkeypatch.setattr(ranks.distributed, "TCPStore", lambda *_, **__: Claimed("127.0.0.1", store.port))
    print_once("no prompts")
    assert capsys.readouterr().err == "no prompts\n"


@pytest.mark.parametrize("setting", ["MASTER_PORT", "TORCHELASTIC_USE_AGENT_STORE"])
def test_without_a_store_every_rank_prints(
    store: TCPStore, setting: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv(setting)
    as_ranks("no prompts", "no prompts")
    assert capsys.readouterr().err == "no prompts\nno prompts\n"
