"""Slots and units of a training step: groups by place, seeds of their own, units that cover each slot once."""

from __future__ import annotations

import pytest

from calibri_lightning.prompts import Prompt, PromptBatch
from calibri_lightning.strategies.groups import Slots, parts


def slots(*indices: int, group_size: int = 3, step: int = 5, seed: int = 0) -> Slots:
    return Slots.of(PromptBatch(step, tuple(Prompt(f"p{i}", i) for i in indices)), group_size, seed)


def test_slots_are_prompt_major() -> None:
    made = slots(4, 7)
    assert [prompt.index for prompt in made.prompts] == [4, 4, 4, 7, 7, 7]
    assert made.num_groups == 2


def test_every_picture_has_noise_of_its_own_even_where_a_prompt_is_drawn_twice() -> None:
    made = slots(4, 7, 4)
    assert len(set(made.seeds)) == 9
    assert made.num_groups == 3, "groups are known by their place: the same prompt twice makes two"


def test_seeds_follow_from_seed_step_prompt_and_sample_alone() -> None:
    assert slots(4, 7).seeds == slots(4, 7).seeds
    assert slots(4, 7).seeds[:3] == slots(4).seeds, "whatever else is in the batch"
    assert set(slots(4).seeds).isdisjoint(slots(4, step=6).seeds)
    assert set(slots(4).seeds).isdisjoint(slots(4, seed=1).seeds)


def test_case_variants_of_a_prompt_are_groups_of_their_own() -> None:
    batch = PromptBatch(0, (Prompt("A red circle", 0), Prompt("a red circle", 1)))
    assert Slots.of(batch, 2, 0).num_groups == 2


@pytest.mark.parametrize("size", [1, 2, 3, 4, 6, 100])
def test_units_hold_each_slot_once_and_in_order(size: int) -> None:
    units = slots(0, 1).units(size)
    assert [slot for unit in units for slot in unit] == list(range(6))
    assert all(len(unit) == size for unit in units[:-1])


@pytest.mark.parametrize("num_units", [1, 2, 5, 8])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_optimiser_steps_share_the_units(num_units: int, count: int) -> None:
    shares = parts([range(0)] * num_units, count)
    assert [unit for share in shares for unit in share] == list(range(num_units))
    assert len(shares) == count
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
