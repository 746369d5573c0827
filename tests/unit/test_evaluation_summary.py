"""The summary, its JSON and its table."""

from __future__ import annotations

import json

import numpy as np
import pytest

from calibri_lightning.errors import UserError
from calibri_lightning.evaluation import (
    Budget,
    Condition,
    from_json,
    mean_interval,
    paired_interval,
    render_table,
    summarise,
    to_json,
    verdict,
    win_rate,
    write_summary,
)
from calibri_lightning.evaluation.bootstrap import Interval
from calibri_lightning.evaluation.text import format_interval

COUNT = 120


def rewards(gain: float, seed: int) -> dict[str, np.ndarray]:
    luck = np.random.default_rng(0).normal(0.5, 0.2, COUNT)
    soft = luck + gain + 0.05 * np.random.default_rng(seed).normal(size=COUNT)
    return {"strict": (soft > 0.5).astype(float), "shapes": soft}


def conditions(gain: float = 0.1) -> list[Condition]:
    return [
        Condition("base @ 8 steps", "base", 8, 16, rewards(0.0, 1)),
        Condition("base @ 28 steps", "base", 28, 56, rewards(0.3, 2)),
        Condition("calibrated @ 8 steps", "calibrated", 8, 16, rewards(gain, 3)),
    ]


def make(gain: float = 0.1, **changes):
    return summarise(
        changes.pop("conditions", conditions(gain)),
        "shapes",
        Budget(5120, 81920, 212.4),
        "runs/a/calibration.json",
        **changes,
    )


def test_calibrated_is_compared_at_equal_and_at_full_nfe():
    summary = make()
    assert [(c.calibrated, c.base, c.against, c.reward) for c in summary.comparisons] == [
        ("calibrated @ 8 steps", "base @ 8 steps", "equal NFE", "strict"),
        ("calibrated @ 8 steps", "base @ 8 steps", "equal NFE", "shapes"),
        ("calibrated @ 8 steps", "base @ 28 steps", "full NFE", "strict"),
        ("calibrated @ 8 steps", "base @ 28 steps", "full NFE", "shapes"),
    ]
    base, full, calibrated = summary.conditions
    (equal,), (best,) = summary.compared("equal NFE"), summary.compared("full NFE")
    assert equal.difference == paired_interval(calibrated.rewards["shapes"], base.rewards["shapes"])
    assert equal.wins == win_rate(calibrated.rewards["shapes"], base.rewards["shapes"])
    assert best.difference == paired_interval(calibrated.rewards["shapes"], full.rewards["shapes"])
    assert summary.means[1]["strict"] == mean_interval(full.rewards["strict"])


def test_equal_nfe_counts_forwards_not_steps():
    found = summarise(
        [
            Condition("cfg", "base", 8, 16, rewards(0, 1)),
            Condition("plain", "base", 16, 16, rewards(0, 2)),
            Condition("eight", "base", 8, 8, rewards(0, 4)),
            Condition("ours", "calibrated", 16, 16, rewards(0.1, 3)),
        ],
        "shapes",
        Budget(1, 1, 1.0),
        "c.json",
    )
    assert [(c.base, c.against) for c in found.comparisons if c.reward == "shapes"] == [
        ("cfg", "equal NFE"),
        ("plain", "equal NFE"),
    ]


def test_a_full_base_that_costs_the_same_is_compared_once():
    summary = make(conditions=[c for c in conditions() if c.num_steps == 8])
    assert [c.against for c in summary.comparisons] == ["equal NFE", "equal NFE"]


def test_what_the_scales_add_to_the_learned_weights_is_told_apart():
    alone = Condition("guidance alone @ 8 steps", "weights", 8, 16, rewards(0.06, 5))
    summary = make(conditions=[*conditions(), alone])
    (found,) = summary.compared("weights alone")
    assert (found.calibrated, found.base) == ("calibrated @ 8 steps", "guidance alone @ 8 steps")
    calibrated = summary.conditions[2]
    assert found.difference == paired_interval(calibrated.rewards["shapes"], alone.rewards["shapes"])
    assert [c.base for c in summary.compared("equal NFE")] == ["base @ 8 steps"], "the weights alone are no base"
    text = render_table(summary)
    assert "against guidance alone @ 8 steps   " in text
    assert "Cost of the run" in text
    assert "beats guidance alone @ 8 steps at equal cost" in " ".join(text.split())


def test_a_test_of_another_runs_calibration_claims_no_cost():
    summary = summarise(conditions(), "shapes", Budget(0, 0, 0.0), "runs/a/calibration.json")
    assert "Cost of the run" not in render_table(summary)


def test_samples_of_one_prompt_are_clustered():
    clusters = np.repeat(np.arange(COUNT // 4), 4)
    (clustered,) = make(clusters=clusters).compared("equal NFE")
    base, _, calibrated = conditions()
    expected = paired_interval(calibrated.rewards["shapes"], base.rewards["shapes"], clusters)
    assert clustered.difference == expected


def test_json_round_trip_is_exact():
    summary = make(clusters=list(np.repeat(np.arange(60), 2)), level=0.9)
    text = to_json(summary)
    back = from_json(text)
    assert to_json(back) == text
    assert back.comparisons == summary.comparisons
    assert back.means == summary.means
    for ours, theirs in zip(summary.conditions, back.conditions, strict=True):
        for name in ours.rewards:
            np.testing.assert_array_equal(ours.rewards[name], theirs.rewards[name])


def test_json_is_strict_and_writes_failures_as_null(tmp_path):
    made = conditions()
    values = np.array(made[0].rewards["shapes"])
    values[3] = np.nan
    made[0] = Condition("base @ 8 steps", "base", 8, 16, {**made[0].rewards, "shapes": values})
    path = tmp_path / "summary.json"
    write_summary(path, make(conditions=made))
    write_summary(path, make(conditions=made))  # an older file is replaced
    assert [p.name for p in tmp_path.iterdir()] == ["summary.json"]

    def refuse(constant: str) -> float:
        raise AssertionError(f"{constant} is not JSON")

    document = json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)
    assert document["conditions"][0]["rewards"]["shapes"][3] is None
    assert document["calibration"] == "runs/a/calibration.json"
    assert document["budget"] == {"images": 5120, "forwards": 81920, "device_seconds": 212.4}
    assert document["comparisons"][1]["difference"]["dropped"] == 1
    assert document["comparisons"][1]["difference"]["count"] == COUNT - 1
    assert from_json(path.read_text()).comparisons[1].difference.dropped == 1


def test_a_reward_that_always_failed_does_not_lose_the_summary():
    made = [
        Condition(c.name, c.role, c.num_steps, c.num_forwards_per_image, {**c.rewards, "x": [np.nan] * COUNT})
        for c in conditions()
    ]
    summary = make(conditions=made)
    assert json.loads(to_json(summary))["conditions"][0]["means"]["x"]["mean"] is None
    assert "n/a" in render_table(summary)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not a summary"),
        ("[]", "not a summary"),
        ('{"format_version": 9}', "9"),
        ("{}", "not a summary"),
    ],
)
def test_other_files_are_refused(text, message):
    with pytest.raises(UserError, match=message):
        from_json(text)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda made: made[:0], "not every condition was scored"),
        (lambda made: [made[0], made[0]], "name of its own"),
        (lambda made: [made[0], Condition("b", "calibrated", 8, 16, {"shapes": [1.0]})], "same rewards"),
        (lambda made: [made[0], Condition("b", "calibrated", 8, 16, {"jpeg": [1.0]})], "choose one of"),
    ],
)
def test_conditions_that_cannot_be_compared_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        make(conditions=change(conditions()))


def test_rewards_cannot_be_changed_afterwards():
    source = np.zeros(3)
    condition = Condition("a", "base", 8, 8, {"shapes": source})
    source[0] = 1.0
    assert condition.rewards["shapes"][0] == 0.0
    with pytest.raises(ValueError, match="read-only"):
        condition.rewards["shapes"][0] = 1.0


@pytest.mark.parametrize(
    ("gain", "words"),
    [(0.1, "beats base @ 8"), (-0.1, "is worse than base @ 8"), (0.0, "no clear difference")],
)
def test_verdict_follows_the_interval(gain, words):
    text = verdict(make(gain))
    assert words in text.split(". ")[0]
    assert "at equal cost" in text
    assert "is worse than base @ 28 steps, which costs 3.5 times as much" in text
    assert f"({COUNT} pairs, 95% interval)" in text


def test_verdict_without_a_base_says_so():
    assert "Nothing to compare" in verdict(make(conditions=conditions()[2:]))


def test_an_end_that_is_not_0_does_not_look_like_it():
    """Else the star beside it would contradict the number."""

    def written(low: float, high: float) -> str:
        return format_interval(Interval((low + high) / 2, low, high, 9, 0), signed=True)

    assert written(0.0004, 0.082) == "+0.0412 [+0.0004, +0.0820]"
    assert written(-0.3, -0.00004) == "-0.15002 [-0.30000, -0.00004]"
    assert written(-0.0004, 0.082) == "+0.041 [-0.000, +0.082]", "nothing is claimed of it"
    assert written(1e-9, 0.082) == "+0.041 [+0.000, +0.082]"


def test_table_is_aligned_and_complete():
    table = render_table(make(), width=140)
    lines = table.splitlines()
    rows = [line for line in lines if line.startswith(("base @", "calibrated @", "against base"))]
    assert len(rows) == 3 + 2
    title = next(line for line in lines if "shapes (optimised)" in line)
    column = title.index("shapes (optimised)")
    for row in rows:
        assert row[column - 1] == " "
        assert row[column] in "0123456789+-"
    assert title.index("shapes") < title.index("strict")  # the optimised reward first
    assert "5,120 images, 81,920 forwards, 212 device-seconds" in table
    assert "Calibration: runs/a/calibration.json" in table
    assert all(line == line.rstrip() for line in lines)
    equal = make().compared("equal NFE")[0].difference
    assert f"{equal.mean:+.3f} [{equal.low:+.3f}, {equal.high:+.3f}] *" in table


def test_narrow_terminal_gets_several_tables():
    table = render_table(make(), width=72)
    assert max(map(len, table.splitlines())) <= 72
    assert table.count("mean reward [95% interval]") == 2
    assert table.isascii()
