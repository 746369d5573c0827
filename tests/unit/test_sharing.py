"""Requests are cut as evenly as can be, whatever the number of ranks; a launch is told where ranks would wait."""

from __future__ import annotations

import pytest

from calibri_lightning.sampling.sharing import (
    BALANCE,
    Request,
    advice,
    idle_share,
    loads,
    owner_of,
    share_of,
    unit_sizes,
)

COUNTS = (1, 2, 5, 16, 17, 64, 128, 272, 320, 384, 1000)


@pytest.mark.parametrize("pictures", COUNTS)
@pytest.mark.parametrize("most", [1, 3, 64, 128])
def test_without_balance_all_units_but_the_last_are_full(pictures: int, most: int) -> None:
    sizes = unit_sizes(pictures, most)
    assert sum(sizes) == pictures
    assert all(size == most for size in sizes[:-1])
    assert 1 <= sizes[-1] <= most


@pytest.mark.parametrize("pictures", COUNTS)
@pytest.mark.parametrize("most", [1, 3, 64, 128])
@pytest.mark.parametrize("over", [2, 7, 8, 24])
def test_balanced_units_are_the_fewest_of_a_multiple_and_differ_by_one(pictures: int, most: int, over: int) -> None:
    sizes = unit_sizes(pictures, most, over)
    assert sum(sizes) == pictures
    assert 1 <= min(sizes) <= max(sizes) <= most
    assert max(sizes) - min(sizes) <= 1
    assert len(sizes) == pictures or len(sizes) % over == 0
    fewer = len(sizes) // over * over - over
    assert fewer <= 0 or -(-pictures // fewer) > most, "a smaller multiple would overfill a forward"


def test_nothing_is_cut_into_nothing() -> None:
    assert unit_sizes(0, 4) == unit_sizes(0, 4, 8) == ()


@pytest.mark.parametrize("pictures", [24, 25, 64, 272, 999])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 6, 8, 12, 24])
def test_over_24_ranks_and_all_divisors_the_busiest_has_the_least_there_can_be(pictures: int, world_size: int) -> None:
    busiest = max(loads(unit_sizes(pictures, 128, 24), world_size))
    assert busiest == -(-pictures // world_size)
    idle = idle_share([Request(pictures, 128, 24)], world_size)
    assert idle == pytest.approx(1 - pictures / (world_size * busiest))


def test_published_population_on_8_gpus() -> None:
    """17 candidates x 16 prompts: three forwards of 128, or 34 pictures a GPU."""
    assert unit_sizes(272, 128) == (128, 128, 16)
    assert idle_share([Request(272, 128)], 8) == 1 - 272 / (8 * 128)
    assert set(loads(unit_sizes(272, 128, 24), 8)) == {34}
    assert idle_share([Request(272, 128, 24)], 8) == 0


@pytest.mark.parametrize("popsize", range(4, 33))
@pytest.mark.parametrize("world_size", [2, 4, 7, 8, 12])
def test_idle_share_of_any_population_is_below_five_percent(popsize: int, world_size: int) -> None:
    pictures = 16 * popsize
    idle = idle_share([Request(pictures, 64, world_size)], world_size)
    # What is left over is at most one picture for each rank but one.
    assert idle < (world_size - 1) / (pictures + world_size - 1) + 1e-12
    assert idle < 0.05 or pictures < 20 * (world_size - 1)


@pytest.mark.parametrize("world_size", [1, 2, 5, 9])
def test_a_rank_does_the_units_that_it_owns(world_size: int) -> None:
    numbers = list(range(11))
    for rank in range(world_size):
        assert list(share_of(numbers, rank, world_size)) == [n for n in numbers if owner_of(n, world_size) == rank]


def test_requests_follow_each_other_and_all_ranks_wait_for_each() -> None:
    # Two ranks: 4 + 4 pictures, then 3 + 0: 7 of the busiest, 11 of 14 used.
    assert idle_share([Request(8, 4), Request(3, 4)], 2) == pytest.approx(1 - 11 / 14)
    assert idle_share([], 4) == 0


def test_advice_names_the_flag_and_what_it_brings() -> None:
    [said] = advice([Request(272, 128)], 8)
    for words in ("73% of the time of 8 processes", "272 pictures", "3 unit(s)", f"{BALANCE}=8 it is 0%"):
        assert words in said
    assert advice([Request(272, 128, 24)], 8) == ()
    assert advice([Request(272, 128)], 1) == ()
    # 24 is no multiple of 16: 8 ranks do two units each while the others do one.
    [said] = advice([Request(272, 128, 24)], 16)
    assert f"{BALANCE}=16 it is 0%" in said


def test_advice_for_units_of_the_strategy_is_the_largest_that_shares_best() -> None:
    [said] = advice([Request(48, 9, setting="--model.strategy.pictures_per_unit")], 4)
    assert "--model.strategy.pictures_per_unit=6 it is 0%" in said


def test_advice_where_there_are_fewer_pictures_than_processes() -> None:
    [said] = advice([Request(8, 1)], 64)
    assert "use fewer processes" in said
