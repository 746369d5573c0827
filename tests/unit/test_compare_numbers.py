"""Comparisons of runs: their numbers in closed form, what is refused, and how they are written down."""

from __future__ import annotations

import csv
import io
import json
import math
from dataclasses import replace
from pathlib import Path
from statistics import NormalDist

import numpy as np
import pytest
import torch
from comparisons import GAINS, NOISE, contenders, example, scored

from calibri_lightning.errors import UserError
from calibri_lightning.evaluation.summary import Budget
from calibri_lightning.tools.compare import (
    Setting,
    compare,
    encode,
    render_table,
    to_csv,
    to_json,
    verdict,
    write_report,
)
from calibri_lightning.tools.compare.gallery import MOST_BYTES, SIDE
from calibri_lightning.tools.compare.tables import costs
from calibri_lightning.tools.compare.verdict import winner
from calibri_lightning.tools.compare.wins import win_interval
from calibri_lightning.tools.compare.writing import check_free, new_folder

SETTING = Setting("t", "m", "c", ("a", "b"), 8, "shapes")


def test_means_and_paired_differences_are_those_of_the_closed_form() -> None:
    comparison = example()
    for name, gain in GAINS.items():
        for steps in (8, 28):
            row = comparison.row(name, steps)
            assert row.nfe == 2 * steps
            assert row.means["shapes"].mean == pytest.approx(NOISE.mean() + gain + 0.005 * steps)
    for name in list(GAINS)[1:]:
        equal = comparison.pair(name, 8, "equal NFE", "shapes")
        full = comparison.pair(name, 8, "full NFE", "shapes")
        assert equal is not None
        assert full is not None
        # The same gain on every picture: the luck of prompts cancels, and the interval has no width.
        assert equal.difference.low == pytest.approx(GAINS[name])
        assert equal.difference.high == pytest.approx(GAINS[name])
        assert (equal.wins.mean, equal.other_steps, full.other_steps) == (1.0, 8, 28)
        assert full.difference.mean == pytest.approx(GAINS[name] - 0.1)
        # At full cost the base of equal NFE is the most expensive one: no second comparison of the same two.
        assert comparison.pair(name, 28, "full NFE", "shapes") is None
    assert all(pair.contender != "base" for pair in comparison.pairs)


@pytest.mark.parametrize(("wins", "count"), [(10, 10), (0, 7), (30, 40), (1, 2)])
def test_an_interval_of_wins_holds_the_shares_that_a_score_test_does_not_reject(wins: int, count: int) -> None:
    first = np.arange(count) < wins
    found = win_interval(first.astype(float), 1.0 - first)
    assert found.mean == wins / count
    z = NormalDist().inv_cdf(0.975)
    for end in (found.low, found.high):
        if 0 < end < 1:  # the ends are where the test statistic is just z
            assert abs(wins / count - end) / math.sqrt(end * (1 - end) / count) == pytest.approx(z)
    assert found.low < found.high, "also where all pairs are won"


def test_ties_count_half_failures_not_and_samples_of_a_prompt_as_one() -> None:
    nan = math.nan
    found = win_interval(np.array([1, 1, 0, nan, 2.0]), np.array([0, 1, 1, 0, nan]))
    assert (found.mean, found.count, found.dropped) == (0.5, 3, 2)
    assert math.isnan(win_interval(np.array([nan]), np.array([1.0])).low)
    values = np.repeat([1.0, 0.0, 1.0], 4)
    few, many = (win_interval(values, np.full(12, 0.5), c) for c in (tuple(np.repeat([0, 1, 2], 4)), None))
    assert (few.low, few.high) == pytest.approx(tuple(_wilson(2, 3)))
    assert few.low < many.low


def _wilson(wins: int, count: int) -> list[float]:
    """Roots of (p - wins / count)^2 = z^2 p (1 - p) / count."""
    q = NormalDist().inv_cdf(0.975) ** 2 / count
    share = wins / count
    return sorted(np.roots([1 + q, -(2 * share + q), share**2]))


def test_a_whole_budget_is_the_sum_or_said_to_be_less() -> None:
    run = replace(contenders()[1], stacked_on="Flow-GRPO", inherited=Budget(1, 2, 3.5))
    assert run.budget is not None
    whole = run.whole_budget
    assert whole == Budget(run.budget.images + 1, run.budget.forwards + 2, run.budget.device_seconds + 3.5)
    assert costs(run)[0] == f"{run.budget.images + 1:,}"
    unknown = replace(run, inherited=None)
    assert costs(unknown)[0] == f">= {run.budget.images:,}"
    cells = [scored("base", 8), scored("CMA-ES", 8)]
    for stacked, own, all_of_it in ((run, "20000", "20001"), (unknown, "20000", "")):
        comparison = compare(SETTING, (contenders()[0], stacked), cells)
        line = list(csv.DictReader(io.StringIO(to_csv(comparison))))[-1]
        assert (line["stacked_on"], line["own_images"], line["whole_images"]) == ("Flow-GRPO", own, all_of_it)


def test_each_pair_of_runs_is_compared_once_at_each_number_of_steps() -> None:
    pairs = [(p.contender, p.other, p.num_steps) for p in example().pairs if p.against == "each other"]
    names = list(GAINS)[1:]
    wanted = {(b, a, s) for i, b in enumerate(names) for a in names[:i] for s in (8, 28)}
    assert set(pairs) == wanted
    assert len(pairs) == 2 * len(wanted)  # two rewards


def test_equal_nfe_goes_by_forwards_and_not_by_steps() -> None:
    base, run, *_ = contenders()
    single = replace(run, label="CMA-ES", num_members=1)
    cells = [scored(name, steps) for name in ("base", "CMA-ES") for steps in (8, 16)]
    comparison = compare(SETTING, (base, single), cells)
    assert comparison.pair("CMA-ES", 8, "equal NFE", "shapes") is None
    pair = comparison.pair("CMA-ES", 16, "equal NFE", "shapes")
    assert pair is not None
    assert pair.other_steps == 8


def test_the_verdict_names_the_winner_first_and_what_it_lost() -> None:
    sentences = verdict(example())
    assert sentences[0].startswith("stacked has the highest shapes at 8 steps")
    assert "stacked at 8 steps beats base at 8 steps at equal cost: shapes +0.200" in sentences[1]
    assert "costs 3.5 times as much" in sentences[2]
    lost = next(s for s in sentences if s.startswith("stacked lost on the way"))
    assert "pickscore -0.100" in lost
    assert "diversity" in lost


def test_where_no_run_is_better_the_base_wins() -> None:
    worse = [replace(c, rewards={"shapes": c.rewards["shapes"] - 2 * GAINS[c.contender]}) for c in _cells()]
    comparison = compare(SETTING, contenders(), worse)
    assert winner(comparison).is_base
    assert verdict(comparison)[0].startswith("No run beats the base at 8 steps")
    same = [replace(c, rewards={"shapes": NOISE}) for c in _cells()]
    assert winner(compare(SETTING, contenders(), same)).is_base


def _cells() -> list:
    return [scored(name, 8) for name in GAINS]


def test_failed_rewards_are_left_out_and_never_count_as_zero() -> None:
    cells = _cells()
    broken = NOISE + 0.2
    broken[::2] = math.nan
    cells[-1] = replace(cells[-1], rewards={"shapes": broken, "pickscore": np.full(len(NOISE), math.nan)})
    comparison = compare(SETTING, contenders(), cells)
    means = comparison.row("stacked", 8).means
    assert means["shapes"].mean == pytest.approx(NOISE[1::2].mean() + 0.2)
    assert (means["shapes"].count, means["shapes"].dropped) == (20, 20)
    document = json.loads(to_json(comparison))
    row = next(r for r in document["rows"] if r["contender"] == "stacked")
    assert row["means"]["pickscore"]["mean"] is None
    line = next(
        r
        for r in csv.DictReader(io.StringIO(to_csv(comparison)))
        if (r["contender"], r["reward"]) == ("stacked", "pickscore")
    )
    assert line["mean"] == ""
    assert "n/a" in render_table(comparison)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c, s: (c, s[1:]), "every one of"),
        (lambda c, s: (c, [*s, s[0]]), "every one of"),
        (lambda c, s: (c[1:], s[1:]), "the base and one or more runs"),
        (lambda c, s: ((c[0], c[1], c[1]), s), "needs a name of its own"),
        (lambda c, s: (c, [*s[:-1], replace(s[-1], rewards={"shapes": NOISE[1:]})]), "the same rewards"),
    ],
)
def test_a_comparison_that_is_not_whole_is_refused(change, message: str) -> None:
    with pytest.raises(UserError, match=message):
        compare(SETTING, *change(contenders(), _cells()))


def test_csv_and_json_hold_the_same_numbers() -> None:
    comparison = example()
    lines = list(csv.DictReader(io.StringIO(to_csv(comparison))))
    assert len(lines) == len(comparison.rows) * len(comparison.rewards)
    document = json.loads(to_json(comparison))
    assert document["verdict"] == list(verdict(comparison))
    assert "gallery" not in document
    for line in lines:
        row = next(
            r for r in document["rows"] if (r["contender"], r["num_steps"]) == (line["contender"], int(line["steps"]))
        )
        assert float(line["mean_low"]) == row["means"][line["reward"]]["low"]


def test_the_table_has_a_line_for_each_contender() -> None:
    text = render_table(example())
    for name in GAINS:
        assert sum(line.startswith(f"{name} ") for line in text.splitlines()) >= 4


def test_pictures_of_any_size_become_small() -> None:
    noise = torch.rand(3, 900, 1600, generator=torch.Generator().manual_seed(0))
    picture = encode(noise, "a", 0.1)
    assert (picture.width, picture.height) == (SIDE, 216)
    assert len(picture.webp) <= MOST_BYTES
    small = encode(torch.zeros(3, 32, 64), "a", 0.1)
    assert (small.width, small.height) == (192, 96)


def test_a_report_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = write_report(tmp_path / "deep" / "report", example())
    assert all(path.is_file() for path in files)
    assert [path.name for path in tmp_path.iterdir()] == ["deep"]
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["report"]
    with pytest.raises(UserError, match="not empty"):
        write_report(tmp_path / "deep" / "report", example())

    def full(*_: object) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("calibri_lightning.tools.compare.writing.to_json", full)
    with pytest.raises(UserError, match="No space left"):
        write_report(tmp_path / "other", example())
    assert [path.name for path in tmp_path.iterdir()] == ["deep"]


@pytest.mark.parametrize("place", ["folder", "link", "."])
def test_an_empty_folder_is_filled_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    """It may be a mount or where the user stands, which nothing can take the place of."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    monkeypatch.chdir(tmp_path / "folder")
    out = Path(place) if place == "." else tmp_path / place
    before = (tmp_path / "folder").stat().st_ino
    check_free(out)
    assert not list((tmp_path / "folder").iterdir())
    files = write_report(out, example())
    assert sorted(path.name for path in (tmp_path / "folder").iterdir()) == sorted(path.name for path in files)
    assert (tmp_path / "folder").stat().st_ino == before


def test_a_place_that_cannot_be_written_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        check_free(tmp_path / "file" / "report")
    with pytest.raises(UserError, match="not empty"):
        check_free(tmp_path / "file")
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    with pytest.raises(UserError, match="a link to nothing"):
        check_free(tmp_path / "link")
    (tmp_path / "link").unlink()
    check_free(tmp_path / "new" / "deep" / "report")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]

    def stop_half_way() -> None:
        with new_folder(tmp_path / "new") as temporary:
            (temporary / "half").write_text("")
            raise KeyError

    with pytest.raises(KeyError):
        stop_half_way()
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
