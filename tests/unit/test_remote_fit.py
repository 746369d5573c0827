"""Fits whose reward is on a server: the same bytes as in the process, whatever happens to the server."""

from __future__ import annotations

import json
import subprocess
import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import tiny_rewards
from faulty_server import FaultyServer
from reward_servers import process, ready, served
from run_files import checkpoint, last
from tiny_runs import CMA, Capture, TinyRuns

from calibri_lightning.rewards.finding import find_reward
from calibri_lightning.rewards.served import RewardScorer

pytestmark = pytest.mark.usefixtures("no_plots")

REDNESS = "tiny_rewards:redness"
GRPO = (
    "--model.strategy=FlowGRPO",
    "--model.strategy.train=scales",
    "--model.strategy.num_groups=2",
    "--model.strategy.group_size=2",
)
STEPS = "--trainer.max_steps=3"


def remote(*urls: str, **options: object) -> str:
    given = {REDNESS: {"reward": "remote", "options": {"urls": list(urls), **options}}}
    return f"--model.rewards={json.dumps(given)}"


def content(run: Path) -> bytes:
    return (run / "calibration.json").read_bytes()


def serve(*more: str, **environment: str) -> AbstractContextManager[subprocess.Popen[str]]:
    arguments = ("serve", "--reward", REDNESS, "--port", *(more or ("0",)))
    return process(*arguments, module=("-m", "calibri_lightning"), **environment)


@pytest.mark.parametrize("strategy", [CMA, GRPO], ids=["cma", "grpo"])
def test_a_fit_through_servers_is_that_in_the_process_to_the_last_bit(runs: TinyRuns, strategy: Sequence[str]) -> None:
    here = runs.fit("here", *strategy, STEPS)
    with (
        served(RewardScorer(find_reward(REDNESS))) as (first, _),
        served(RewardScorer(find_reward(REDNESS))) as (second, service),
    ):
        assert content(runs.fit("one", *strategy, STEPS, remote(first))) == content(here)
        assert content(runs.fit("two", *strategy, STEPS, remote(first, second, per_server=2))) == content(here)
        assert "calibri_reward_items_total" in service.metrics.render().decode()


def test_a_server_that_is_killed_costs_nothing_where_another_is_left(runs: TinyRuns, tmp_path: Path) -> None:
    here = runs.fit("here", *CMA, STEPS)
    killed = {tiny_rewards.CALLS: str(tmp_path / "calls"), tiny_rewards.KILL_AT: "3"}
    with serve(**killed) as doomed, serve() as other:
        flags = (*CMA, STEPS, remote(ready(doomed), ready(other)))
        assert content(runs.fit("two", *flags)) == content(here)
        assert doomed.wait(20) == -9


def test_a_server_that_comes_back_is_found_and_the_run_goes_on(runs: TinyRuns, tmp_path: Path) -> None:
    here = runs.fit("here", *CMA, STEPS)
    killed = {tiny_rewards.CALLS: str(tmp_path / "calls"), tiny_rewards.KILL_AT: "3"}
    over = threading.Event()
    with serve(**killed) as doomed:
        url = ready(doomed)

        def restart() -> None:
            doomed.wait(60)
            with serve(url.rpartition(":")[2]):
                over.wait(60)

        thread = threading.Thread(target=restart)
        thread.start()
        try:
            run = runs.fit("again", *CMA, STEPS, remote(url, recovery_timeout=60))
        finally:
            over.set()
            thread.join()
        assert content(run) == content(here)
        assert doomed.returncode == -9


def test_a_server_that_stays_away_ends_the_run_which_resumes_to_the_same_bytes(
    runs: TinyRuns, tmp_path: Path, capsys: Capture
) -> None:
    here = runs.fit("here", *CMA, STEPS)
    total = 3 * 6
    killed = {tiny_rewards.CALLS: str(tmp_path / "calls"), tiny_rewards.KILL_AT: str(total // 2)}
    with serve(**killed) as doomed:
        url = ready(doomed)
        assert runs("fit", "cut", *CMA, STEPS, remote(url, recovery_timeout=0)) == 2
    message = capsys.readouterr().err
    assert "No server of the reward came back" in message
    assert "To go on from the last finished generation, add --ckpt_path" in message
    cut = runs.latest("cut")
    assert 0 < checkpoint(cut)["global_step"] < 3
    with served(RewardScorer(find_reward(REDNESS))) as (second, _):
        resumed = runs.fit("cut", *CMA, STEPS, remote(second), f"--ckpt_path={last(cut)}")
    assert content(resumed) == content(here)


def test_what_a_server_says_wrongly_ends_the_run_at_its_start(runs: TinyRuns, capsys: Capture) -> None:
    with FaultyServer() as server:
        assert runs("fit", "a", *CMA, STEPS, remote(server.url)) == 2
        message = capsys.readouterr().err
        assert "it offers 'mean' and no 'tiny_rewards:redness'" in message
        assert "Traceback" not in message
        assert runs("fit", "a", *CMA, STEPS, remote(server.url, reward="mean", extra_names=["beak"])) == 2
        assert "extra_names of the reward" in capsys.readouterr().err
        assert server.scored == 0
