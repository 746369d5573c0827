"""The real launcher: two machines on the loopback, restarts, and a machine on which something is missing."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny_rewards
from run_files import last
from tiny_runs import TinyRuns

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.usefixtures("no_plots")]

STEPS = ("--trainer.max_steps=3", "--data.val=null")
PATIENCE = 240
"""Seconds for a launch, most of which are imports."""


class Nodes:
    """Machines of one process each, as torchrun sees them."""

    def __init__(self, runs: TinyRuns, folder: Path, max_restarts: int = 0) -> None:
        self.runs, self.folder = runs, folder
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.launcher = [
            *(sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1"),
            *("--master_addr=127.0.0.1", f"--master_port={port}", f"--max-restarts={max_restarts}"),
        ]
        self.started: list[subprocess.Popen[bytes]] = []

    def start(self, number: int, *flags: str, **environment: str) -> None:
        """Starts a machine."""
        words = self.runs.arguments("fit", "two", "--trainer.num_nodes=2", "--trainer.strategy=ddp", *STEPS, *flags)
        command = [*self.launcher, f"--node_rank={number}", "-m", "calibri_lightning", *words]
        known = {
            **os.environ,
            "PYTHONPATH": str(Path(tiny_rewards.__file__).parent),
            "OMP_NUM_THREADS": "1",
            tiny_rewards.CALLS: str(self.folder / f"calls{number}"),
        }
        with (self.folder / f"log{number}").open("wb") as log:
            process = subprocess.Popen(command, env=known | environment, stdout=log, stderr=log)
        self.started.append(process)

    def codes(self) -> list[int]:
        """Waits for all of them; their exit codes."""
        deadline = time.monotonic() + PATIENCE
        return [process.wait(timeout=max(0.1, deadline - time.monotonic())) for process in self.started]

    def log(self, number: int) -> str:
        return (self.folder / f"log{number}").read_text()

    def close(self) -> None:
        for process in self.started:
            if process.poll() is None:
                process.terminate()  # torchrun ends its workers
                process.wait(timeout=60)


@pytest.fixture
def nodes(runs: TinyRuns, tmp_path: Path):
    made: list[Nodes] = []

    def make(max_restarts: int = 0) -> Nodes:
        made.append(Nodes(runs, tmp_path, max_restarts))
        return made[-1]

    yield make
    for each in made:
        each.close()


def test_two_machines_deliver_what_one_process_delivers(runs: TinyRuns, nodes) -> None:
    whole = runs.fit("whole", *STEPS)
    two = nodes()
    for number in (0, 1):
        two.start(number)
    assert two.codes() == [0, 0], two.log(0) + two.log(1)
    assert (runs.latest("two") / "calibration.json").read_bytes() == (whole / "calibration.json").read_bytes()
    assert two.log(0).count("Calibrating") == 1
    assert "Calibrating" not in two.log(1)


def test_a_killed_rank_comes_back_by_itself(runs: TinyRuns, nodes) -> None:
    """The machine of the killed rank counts a restart, the other one does not: they must still find each other."""
    whole = runs.fit("whole", *STEPS)
    two = nodes(max_restarts=2)
    two.start(0)
    two.start(1, **{tiny_rewards.KILL_AT: "2"})
    assert two.codes() == [0, 0], two.log(0) + two.log(1)
    assert "Going on from" in two.log(0) + two.log(1)
    assert len(list((runs.folder / "two").glob("version_*"))) == 2
    assert (runs.latest("two") / "calibration.json").read_bytes() == (whole / "calibration.json").read_bytes()
    assert last(runs.latest("two")).is_file()


def test_a_machine_without_the_model_ends_the_other_one(runs: TinyRuns, nodes) -> None:
    two = nodes()
    two.start(0)
    two.start(1, f"--model.backbone.pretrained={runs.folder / 'nowhere'}")
    assert 0 not in two.codes()
    assert "nowhere" in two.log(1)
    assert "Rank 1 ended: error: " in two.log(0)
    assert "nowhere" in two.log(0)


def test_machines_that_disagree_on_their_number_are_refused(runs: TinyRuns, nodes) -> None:
    two = nodes()
    for number in (0, 1):
        two.start(number, "--trainer.num_nodes=3")
    assert 0 not in two.codes()
    assert "num_nodes=3" in two.log(0) + two.log(1)
    assert "does not match the world size (2)" in two.log(0) + two.log(1)
