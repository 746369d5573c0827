"""Ranks meet in a store of their own, whatever earlier starts have left in the launcher's."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import pytest

from calibri_lightning.errors import UserError
from calibri_lightning.launch.rendezvous import _KEY, meet

pytestmark = pytest.mark.distributed

AGENT = """
import sys
from torch.distributed import TCPStore
store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
print(store.port, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def agent(monkeypatch: pytest.MonkeyPatch):
    """A launcher's store, in a process of its own as torchrun's is."""
    process = subprocess.Popen([sys.executable, "-c", AGENT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    port = process.stdout.readline().strip()
    for name, value in (
        ("TORCHELASTIC_USE_AGENT_STORE", "True"),
        ("MASTER_ADDR", "127.0.0.1"),
        ("MASTER_PORT", port),
        ("WORLD_SIZE", "3"),
    ):
        monkeypatch.setenv(name, value)
    yield int(port)
    process.stdin.close()  # type: ignore[union-attr]
    process.wait(timeout=30)


def _rank(rank: int, folder: Path, mode: str) -> None:
    os.environ["RANK"] = str(rank)
    if mode == "late" and rank == 0:
        # An address of an earlier start is still there when the others look.
        import time

        time.sleep(1.0)
    met = meet(30)
    assert met is not None
    met.store.set(f"told{rank}", str(rank))
    answer = [met.store.get(f"told{other}").decode() for other in range(3)]
    (folder / f"rank{rank}").write_text(f"{answer} {os.environ['MASTER_PORT']}")
    met.store.add("done", 1)
    while rank == 0 and met.store.add("done", 0) < 3:
        pass


def start(folder: Path, mode: str = "") -> list[str]:
    folder.mkdir()
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=_rank, args=(rank, folder, mode)) for rank in range(3)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(timeout=60)
    assert [process.exitcode for process in ranks] == [0, 0, 0]
    return [(folder / f"rank{rank}").read_text() for rank in range(3)]


def test_every_start_has_a_place_of_its_own(agent: int, tmp_path: Path) -> None:
    places = []
    for number, mode in enumerate(("", "late", "")):
        told = start(tmp_path / str(number), mode)
        assert len(set(told)) == 1
        assert told[0].startswith("['0', '1', '2'] ")
        places.append(told[0].split()[-1])
    assert len(set(places)) == 3
    assert str(agent) not in places


def test_an_earlier_rank_0_that_still_lives_is_left_alone(agent: int, tmp_path: Path) -> None:
    """It is about to be ended by the launcher, and its ranks have been there already."""
    earlier = subprocess.Popen([sys.executable, "-c", AGENT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert earlier.stdout is not None
    port = earlier.stdout.readline().strip()
    fill = (
        "from torch.distributed import TCPStore\n"
        f"agent = TCPStore('127.0.0.1', {agent}, is_master=False, wait_for_workers=False)\n"
        f"agent.set({_KEY!r}, '127.0.0.1 {port}')\n"
        f"earlier = TCPStore('127.0.0.1', {port}, is_master=False, wait_for_workers=False)\n"
        "[earlier.add(f'came{rank}', 1) for rank in (1, 2)]\n"
        "earlier.set('complete', '')\n"
    )
    subprocess.run([sys.executable, "-c", fill], check=True)
    told = start(tmp_path / "next", "late")
    assert told[0].startswith("['0', '1', '2'] ")
    assert told[0].split()[-1] != port
    earlier.stdin.close()  # type: ignore[union-attr]
    earlier.wait(timeout=30)


def _alone(rank: str, folder: Path) -> None:
    os.environ["RANK"] = rank
    try:
        meet(0.5)
    except UserError as error:
        (folder / "said").write_text(str(error))


@pytest.mark.parametrize(("rank", "said"), [("0", "Of 3 ranks, 1, 2 did not come"), ("2", "Rank 2 found no rank 0")])
def test_who_does_not_come_is_named(agent: int, tmp_path: Path, rank: str, said: str) -> None:
    # In a process of its own: one that hosts a store must not be forked later.
    process = multiprocessing.get_context("fork").Process(target=_alone, args=(rank, tmp_path))
    process.start()
    process.join(timeout=60)
    assert said in (tmp_path / "said").read_text()


def test_other_launchers_need_no_meeting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    assert meet() is None
