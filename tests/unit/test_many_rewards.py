"""Runs with several rewards: normalised, limited, held out, forgiven; and cut off, they go on bit for bit."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import numpy as np
import pytest
import tiny_rewards
import torch
from run_files import checkpoint, last
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_runs import CMA, OFFICIAL, PAIRS, Capture, TinyRuns, forked, refused

pytestmark = pytest.mark.usefixtures("no_plots")

TWO = '--model.rewards={"tiny_rewards:redness": 1.0, "jpeg_compressibility": {"weight": 0.2, "cap": -0.5}}'
GRPO = (
    "--model.strategy=FlowGRPO",
    "--model.strategy.train=scales",
    "--model.strategy.num_groups=2",
    "--model.strategy.group_size=2",
)
STEPS = "--trainer.max_steps=3"


def metrics(run: Path) -> dict[str, list[float]]:
    events = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()
    return {tag: [event.value for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


@pytest.mark.parametrize(
    ("strategy", "normalise"),
    [(PAIRS, "running"), (PAIRS, "rank"), (CMA, "running"), (CMA, "z_score"), (OFFICIAL, "rank")],
    ids=["pairs-running", "pairs-rank", "cma-running", "cma-z_score", "official-rank"],
)
def test_a_killed_search_with_normalised_rewards_delivers_the_same_bytes(
    runs: TinyRuns, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, strategy: tuple[str, ...], normalise: str
) -> None:
    monkeypatch.setenv(tiny_rewards.CALLS, str(tmp_path / "calls"))
    flags = (*strategy, STEPS, TWO, f"--model.normalise={normalise}")
    whole = runs.fit("whole", *flags)
    total = len((tmp_path / "calls").read_text().splitlines())
    (tmp_path / "calls").unlink()
    [code] = forked([runs.arguments("fit", "cut", *flags)], [{tiny_rewards.KILL_AT: str(total // 2)}], tmp_path / "log")
    assert code == -signal.SIGKILL
    cut = runs.latest("cut")
    resumed = runs.fit("cut", *flags, f"--ckpt_path={last(cut)}")
    assert (resumed / "calibration.json").read_bytes() == (whole / "calibration.json").read_bytes()
    state, expected = (checkpoint(run)["calibri_lightning"] for run in (resumed, whole))
    assert state["blend"] == expected["blend"]
    assert state["watch"] == expected["watch"]
    assert state["trace"] == expected["trace"]


def test_a_policy_with_normalised_rewards_resumes_with_their_moments(runs: TinyRuns) -> None:
    flags = (*GRPO, TWO, "--model.normalise=running")
    whole = runs.fit("whole", *flags, "--trainer.max_steps=2")
    half = runs.fit("half", *flags, "--trainer.max_steps=1")
    resumed = runs.fit("half", *flags, "--trainer.max_steps=2", f"--ckpt_path={last(half)}")
    assert (resumed / "calibration.json").read_bytes() == (whole / "calibration.json").read_bytes()
    state = checkpoint(resumed)["calibri_lightning"]
    assert state["blend"] == checkpoint(whole)["calibri_lightning"]["blend"]
    assert state["blend"]["moments"][0] == [8.0, 8.0]


def test_normalising_twice_and_resuming_with_another_way_are_refused(runs: TinyRuns, capsys: Capture) -> None:
    message = refused(
        runs, capsys, *GRPO, TWO, "--model.normalise=rank", "--model.strategy.advantage.combine=gdpo", worked=True
    )
    assert "rewards would be normalised twice" in message
    run = runs.fit("a", *CMA, TWO, "--trainer.max_steps=1")
    message = refused(runs, capsys, *CMA, TWO, "--model.normalise=rank", f"--ckpt_path={last(run)}", STEPS, worked=True)
    assert "normalise" in message


@pytest.mark.parametrize("normalise", ["none", "rank"])
def test_curves_of_a_search_show_every_reward_as_it_is(runs: TinyRuns, normalise: str) -> None:
    run = runs.fit("a", *CMA, STEPS, TWO, f"--model.normalise={normalise}", "--data.val=null")
    logged = metrics(run)
    one, other = (np.array(logged[f"train/reward/{name}"]) for name in ("tiny_rewards:redness", "jpeg_compressibility"))
    assert (other <= -0.5).all(), "within its limits"
    # Halving: later rounds have fewer candidates, so means over pictures and over candidates differ a little.
    np.testing.assert_allclose(logged["train/reward_mean"], one + 0.2 * other, atol=0.02)


def test_what_is_held_out_is_reported_and_changes_nothing(
    runs: TinyRuns, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = runs.fit("plain", STEPS)
    monkeypatch.setenv(tiny_rewards.CALLS, str(tmp_path / "calls"))
    run = runs.fit(
        "held",
        STEPS,
        '--model.rewards={"my_redness": {"reward": "tiny_rewards:redness_uncounted"}}',
        '--model.held_out=["tiny_rewards:redness", "jpeg_compressibility"]',
        "--test_after_fit=true",
    )
    one, other = (json.loads((path / "calibration.json").read_text())["values"] for path in (plain, run))
    assert one == other
    logged = metrics(run)
    assert not [tag for tag in logged if tag.startswith("train/reward/") and "my_redness" not in tag]
    assert len(logged["val/mean/jpeg_compressibility"]) == 3
    assert len(logged["val/alarms"]) == 3
    np.testing.assert_allclose(logged["val/mean/tiny_rewards:redness"], logged["val/mean"], rtol=1e-6)
    summary = json.loads((run / "summary.json").read_text())
    assert summary["watched"] == ["tiny_rewards:redness", "jpeg_compressibility"]
    assert set(summary["conditions"][0]["rewards"]) == {"my_redness", "tiny_rewards:redness", "jpeg_compressibility"}


def test_a_hiccup_that_is_forgiven_costs_no_candidate_its_rank(
    runs: TinyRuns, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(tiny_rewards.CALLS, str(tmp_path / "calls"))
    monkeypatch.setenv(tiny_rewards.RAISE_AT, "2")
    flags = (*CMA, STEPS, "--data.val=null")
    run = runs.fit("hiccup", *flags, '--model.rewards={"r": {"reward": "tiny_rewards:raises_at", "on_failure": "nan"}}')
    calls = len((tmp_path / "calls").read_text().splitlines())
    (tmp_path / "calls").unlink()
    whole = runs.fit("whole", *flags)
    values = [json.loads((path / "calibration.json").read_text())["values"] for path in (run, whole)]
    assert values[0] == values[1]
    assert calls == len((tmp_path / "calls").read_text().splitlines()) + 1


def test_too_many_failures_end_the_run(runs: TinyRuns, capsys: Capture) -> None:
    reward = '--model.rewards={"tiny_rewards:raises": {"on_failure": "nan"}}'
    message = refused(runs, capsys, *CMA, reward, "--data.val=null", "--trainer.max_steps=30", worked=True)
    assert "is useless, twice" in message
    message = refused(runs, capsys, *CMA, '--model.rewards={"tiny_rewards:raises": 1.0}', worked=True)
    assert "on_failure: nan" in message


def test_what_is_held_out_may_change_when_a_run_goes_on(runs: TinyRuns) -> None:
    one, other = "--model.held_out=[jpeg_compressibility]", '--model.held_out=["tiny_rewards:redness_uncounted"]'
    whole = runs.fit("whole", *CMA, STEPS)
    half = runs.fit("half", *CMA, one, "--trainer.max_steps=1")
    resumed = runs.fit("half", *CMA, other, STEPS, f"--ckpt_path={last(half)}")
    # Not to the byte: the start is scored once more, in units with the candidates of that validation.
    values = [json.loads((path / "calibration.json").read_text())["values"] for path in (resumed, whole)]
    assert values[0] == values[1]
    watch = checkpoint(resumed)["calibri_lightning"]["watch"]
    assert set(watch["start_each"]) == {"jpeg_compressibility", "tiny_rewards:redness_uncounted"}
    logged = metrics(resumed)
    assert "val/start" not in logged, "the start is asked for the watch alone"
    assert len(logged["val/alarms"]) == 2


def test_a_checkpoint_is_validated_on_other_prompts(runs: TinyRuns, capsys: Capture) -> None:
    flags = (*CMA, TWO, "--model.normalise=rank", '--model.held_out=["tiny_rewards:redness_uncounted"]')
    run = runs.fit("a", *flags, "--trainer.max_steps=1")
    capsys.readouterr()
    assert runs("validate", "b", *flags, f"--ckpt_path={last(run)}", "--data.val_size=2") == 0
    assert "(in stds) on the validation prompts" in capsys.readouterr().out


def test_a_checkpoint_of_an_older_version_goes_on(runs: TinyRuns) -> None:
    half = runs.fit("half", *CMA, "--trainer.max_steps=1")
    whole = checkpoint(half)
    for key in ("blend", "watch"):
        del whole["calibri_lightning"][key]
    torch.save(whole, last(half))
    runs.fit("half", *CMA, "--trainer.max_steps=2", f"--ckpt_path={last(half)}")


def test_a_test_with_normalised_rewards_is_in_stds_of_the_base(runs: TinyRuns) -> None:
    run = runs.fit("a", *CMA, TWO, "--model.normalise=rank", "--trainer.max_steps=1", "--test_after_fit=true")
    summary = json.loads((run / "summary.json").read_text())
    assert summary["reward"] == "tiny_rewards:redness + 0.2 jpeg_compressibility (in stds)"
    base, *others = [condition["rewards"] for condition in summary["conditions"]]
    for rewards in (base, *others):
        one, other = np.array(rewards["tiny_rewards:redness"]), np.minimum(rewards["jpeg_compressibility"], -0.5)
        units = np.array(base["tiny_rewards:redness"]), np.minimum(base["jpeg_compressibility"], -0.5)
        judged = (one - units[0].mean()) / units[0].std() + 0.2 * (other - units[1].mean()) / (units[1].std() or 1)
        np.testing.assert_allclose(rewards[summary["reward"]], judged, atol=1e-5)
    assert others


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--model.held_out=shapes", "it is a list of names"),
        ('--model.held_out={"jpeg_compressibility": {"cap": 3.0}}', "is held out and has a cap"),
        ('--model.rewards={"jpeg_compressibility": {"wieght": 1.0}}', "keys weight, options, reward, floor, cap"),
        ('--model.rewards={"jpeg_compressibility": {"weight": .nan}}', "The weight of the reward"),
        ('--model.rewards={"jpeg_compressibility": {"cap": 1.0, "floor": 2.0}}', "the floor must be below the cap"),
        ('--model.rewards={"jpeg_compressibility": {"cap": .inf}}', "The cap of the reward"),
        ('--model.held_out=["pickscroe"]', "Did you mean 'pickscore'"),
        ('--model.held_out={"jpeg_compressibility": {"weight": 2.0}}', "never optimised"),
        ('--model.held_out=["tiny_rewards:redness"]', "reported by two rewards"),
    ],
)
def test_bad_settings_are_refused(runs: TinyRuns, capsys: Capture, flag: str, message: str) -> None:
    assert message in refused(runs, capsys, flag)
