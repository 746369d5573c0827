"""Evaluation: the same bits on any number of ranks, common noise, and no score for what failed."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from calibri_lightning.backbones.sd3 import SD3
from calibri_lightning.calibration.attach import attach
from calibri_lightning.calibration.scales import Layout, build_layout
from calibri_lightning.calibration.sites import find_sites
from calibri_lightning.errors import UserError
from calibri_lightning.prompts import Prompt
from calibri_lightning.rewards import FunctionReward, RewardError, RewardSet
from calibri_lightning.rewards.jpeg import JpegIncompressibility
from calibri_lightning.sampling.evaluate import Evaluator
from calibri_lightning.sampling.grid import Cell, Evaluation, Grid, UnitResult, cut_units
from calibri_lightning.sampling.noise import noise_seed
from calibri_lightning.sampling.sharing import loads
from calibri_lightning.shapes.pipeline import TINY, build_pipeline

K, STEPS = 4, 2
TEXTS = ("a red circle", "two green squares", "a blue triangle", "a red circle", "four pink circles")
PROMPTS = tuple(Prompt(text, index, negative="" if index % 2 else "black") for index, text in enumerate(TEXTS))
SEEDS = tuple(noise_seed(0, 7, prompt.index, 0) for prompt in PROMPTS)
S = len(PROMPTS)


def fingerprint(images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    """Changes with any bit of a picture, and with its prompt."""
    weights = torch.linspace(0.1, 1, images[0].numel())
    return images.flatten(1) @ weights + torch.tensor([100.0 * prompt.index for prompt in prompts])


REWARDS = ((FunctionReward("fingerprint", fingerprint), 1.0), (JpegIncompressibility(), 0.5))


@pytest.fixture(scope="module")
def backbone() -> SD3:
    return SD3.of(build_pipeline(TINY))


@pytest.fixture
def make(backbone: SD3) -> Iterator[Callable[..., Evaluator]]:
    attachment = attach(backbone.transformer, find_sites(backbone.transformer))

    def build(
        *rewards: tuple[FunctionReward, float], rows: int = 6, members: str = "cfg", balance_over: int = 1
    ) -> Evaluator:
        layout = build_layout(attachment.sites, "gate", members, 3.0)
        chosen = RewardSet.of(*(rewards or REWARDS))
        return Evaluator(backbone, attachment, layout, chosen, rows, balance_over=balance_over)

    yield build
    attachment.detach()


def thetas(layout: Layout, count: int = K) -> NDArray[np.float64]:
    rng = np.random.default_rng(0)
    return layout.start + 0.2 * layout.stds * rng.standard_normal((count, layout.num_parameters))


def run_ranks(
    world_size: int, call: Callable[[int, Callable[[NDArray[np.float64]], list[NDArray[np.float64]]]], object]
) -> list[object]:
    """Runs `call(rank, gather)` for all ranks: a thread each, taking turns so that hooks are not shared."""
    slots: list[NDArray[np.float64] | None] = [None] * world_size
    results: list[object] = [None] * world_size
    barrier, turn = threading.Barrier(world_size, timeout=60), threading.Lock()

    def body(rank: int) -> None:
        turn.acquire()

        def gather(packed: NDArray[np.float64]) -> list[NDArray[np.float64]]:
            slots[rank] = packed.copy()
            turn.release()
            barrier.wait()
            turn.acquire()
            return [slot for slot in slots if slot is not None]

        try:
            results[rank] = call(rank, gather)
        except Exception as error:
            results[rank] = error
        finally:
            turn.release()

    threads = [threading.Thread(target=body, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def same_bits(one: Evaluation, other: Evaluation) -> bool:
    matrices = [
        (one.rewards, other.rewards),
        *((one.per_reward[n], other.per_reward[n]) for n in one.per_reward),
    ]
    return all(a.tobytes() == b.tobytes() for a, b in matrices)


@pytest.mark.parametrize("masked", [False, True])
def test_rewards_are_the_same_bits_on_any_number_of_ranks(make: Callable[..., Evaluator], masked: bool) -> None:
    evaluator = make()
    points = thetas(evaluator.layout)
    cells = np.random.default_rng(3).random((K, S)) < 0.6 if masked else None
    alone = evaluator.evaluate(points, PROMPTS, SEEDS, STEPS, cells=cells)
    wanted = K * S if cells is None else int(cells.sum())
    assert np.isfinite(alone.rewards).sum() == wanted == alone.num_images
    assert alone.num_forwards == wanted * 2 * STEPS
    for world_size in (2, 3, 7, 30):
        results = run_ranks(
            world_size,
            lambda rank, gather, w=world_size: evaluator.evaluate(
                points, PROMPTS, SEEDS, STEPS, cells=cells, rank=rank, world_size=w, gather=gather
            ),
        )
        for result in results:
            assert isinstance(result, Evaluation), result
            assert same_bits(result, alone)
            assert (result.num_images, result.num_forwards) == (alone.num_images, alone.num_forwards)


def test_balanced_units_are_shared_evenly_and_give_the_same_bits_on_any_number_of_ranks(
    make: Callable[..., Evaluator],
) -> None:
    evaluator = make(balance_over=6)
    points = thetas(evaluator.layout)
    ledger: list[UnitResult] = []
    alone = evaluator.evaluate(points, PROMPTS, SEEDS, STEPS, done=ledger.append)
    sizes = [len(unit.cells) for unit in ledger]
    assert sizes == [2] * 8 + [1] * 4, "20 pictures, at most 3 a unit: the least multiple of 6 is 12"
    for world_size in (2, 3, 4, 6):
        done: list[list[UnitResult]] = [[] for _ in range(world_size)]
        results = run_ranks(
            world_size,
            lambda rank, gather, w=world_size, done=done: evaluator.evaluate(
                points, PROMPTS, SEEDS, STEPS, rank=rank, world_size=w, gather=gather, done=done[rank].append
            ),
        )
        assert all(isinstance(result, Evaluation) and same_bits(result, alone) for result in results)
        made = [sum(len(unit.cells) for unit in units) for units in done]
        assert tuple(made) == loads(sizes, world_size)
        if 6 % world_size == 0:
            assert max(made) == -(-K * S // world_size)


def test_pictures_that_are_drawn_are_cut_as_those_that_are_scored(make: Callable[..., Evaluator]) -> None:
    evaluator = make(balance_over=7)
    points, ledger = thetas(evaluator.layout), list[UnitResult]()
    evaluator.evaluate(points, PROMPTS, SEEDS, STEPS, done=ledger.append)
    drawn = [unit for unit, _ in evaluator.images(points, PROMPTS, SEEDS, STEPS)]
    assert drawn == [unit.cells for unit in ledger]


def test_a_grid_equals_its_cells_one_by_one(make: Callable[..., Evaluator]) -> None:
    evaluator, single = make(), make(rows=2)
    points = thetas(evaluator.layout)
    grid = evaluator.evaluate(points, PROMPTS, SEEDS, STEPS)
    for k in range(K):
        for s in range(S):
            cell = single.evaluate(points[k : k + 1], PROMPTS[s : s + 1], SEEDS[s : s + 1], STEPS)
            np.testing.assert_allclose(
                grid.per_reward["fingerprint"][k, s], cell.per_reward["fingerprint"][0, 0], rtol=0, atol=2e-3
            )
    combined = grid.per_reward["fingerprint"] + 0.5 * grid.per_reward["jpeg_incompressibility"]
    np.testing.assert_allclose(grid.rewards, combined, rtol=1e-6)
    # The candidates do differ, far beyond the tolerance above.
    assert np.abs(np.diff(grid.per_reward["fingerprint"], axis=0)).min() > 5e-3


def test_candidates_share_the_noise_of_a_slot(make: Callable[..., Evaluator]) -> None:
    evaluator = make(members="single")
    same = np.repeat(evaluator.layout.start[None], K, axis=0)
    rewards = evaluator.evaluate(same, PROMPTS, SEEDS, STEPS).per_reward["fingerprint"]
    assert np.ptp(rewards, axis=0).max() < 1e-2
    assert abs(rewards[0, 0] + 300 - rewards[0, 3]) > 1  # one text, two seeds


def test_units_are_cut_slot_by_slot_whatever_the_mask() -> None:
    cells = np.ones((3, 2), dtype=bool)
    cells[1, 0] = False
    units = cut_units(cells, 2)
    assert units == (((0, 0), (2, 0)), ((0, 1), (1, 1)), ((2, 1),))
    assert cut_units(np.zeros((3, 2), dtype=bool), 2) == ()


def test_only_requested_cells_are_made(make: Callable[..., Evaluator]) -> None:
    evaluator = make()
    cells = np.zeros((K, S), dtype=bool)
    cells[1, 2] = cells[3, 4] = True
    result = evaluator.evaluate(thetas(evaluator.layout), PROMPTS, SEEDS, STEPS, cells=cells)
    assert (np.isfinite(result.rewards) == cells).all()
    assert (np.isfinite(result.per_reward["jpeg_incompressibility"]) == cells).all()
    assert result.num_images == 2
    nothing = evaluator.evaluate(thetas(evaluator.layout), PROMPTS, SEEDS, STEPS, cells=np.zeros_like(cells))
    assert np.isnan(nothing.rewards).all()
    assert nothing.num_images == nothing.num_forwards == 0


def test_an_interrupted_request_is_completed_with_the_same_bits(make: Callable[..., Evaluator]) -> None:
    evaluator = make()
    points = thetas(evaluator.layout)
    ledger: list[UnitResult] = []
    whole = evaluator.evaluate(points, PROMPTS, SEEDS, STEPS, done=ledger.append)
    assert [unit.index for unit in ledger] == list(range(ledger[0].num_units))
    known = np.full((K, S), np.nan)
    for unit in ledger[1:4]:
        for cell, reward in zip(unit.cells, unit.rewards, strict=True):
            known[cell] = reward
    # A unit of which a part was recorded is computed again, whole: a smaller batch could change its bits.
    known[ledger[4].cells[0]] = ledger[4].rewards[0]
    redone: list[UnitResult] = []
    rest = evaluator.evaluate(points, PROMPTS, SEEDS, STEPS, known=known, done=redone.append)
    assert [unit.index for unit in redone] == [0, *range(4, len(ledger))]
    assert rest.rewards.tobytes() == whole.rewards.tobytes()
    assert rest.num_images == sum(len(unit.cells) for unit in redone)
    resumed = run_ranks(
        3,
        lambda rank, gather: evaluator.evaluate(
            points, PROMPTS, SEEDS, STEPS, known=known, rank=rank, world_size=3, gather=gather
        ),
    )
    assert all(result.rewards.tobytes() == whole.rewards.tobytes() for result in resumed)


def test_a_nan_reward_stays_nan_in_its_cell(make: Callable[..., Evaluator]) -> None:
    def picky(images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        return torch.tensor([torch.nan if prompt.index == 1 else 1.0 for prompt in prompts])

    evaluator = make((FunctionReward("picky", picky), 1.0))
    rewards = evaluator.evaluate(thetas(evaluator.layout), PROMPTS, SEEDS, STEPS).rewards
    assert np.isnan(rewards[:, 1]).all()
    assert (np.delete(rewards, 1, axis=1) == 1).all()


def test_a_candidate_whose_pictures_are_not_finite_has_no_reward(make: Callable[..., Evaluator]) -> None:
    """Even where the reward function would call a broken picture a good one."""
    seen: list[bool] = []

    def blind(images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        seen.append(bool(images.isfinite().all()))
        return torch.ones(len(images))

    evaluator = make((FunctionReward("blind", blind), 1.0))
    points = thetas(evaluator.layout)
    points[2, :] = 1e30
    rewards = evaluator.evaluate(points, PROMPTS, SEEDS, STEPS).rewards
    assert np.isnan(rewards[2]).all()
    assert (np.delete(rewards, 2, axis=0) == 1).all()
    assert all(seen)


def test_a_reward_that_raises_stops_every_rank(make: Callable[..., Evaluator]) -> None:
    def late(images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        if any(prompt.index == S - 1 for prompt in prompts):
            raise RuntimeError("no more")
        return torch.ones(len(images))

    evaluator = make((FunctionReward("late", late), 1.0), rows=2)
    points = thetas(evaluator.layout, 1)
    with pytest.raises(RewardError, match="'late' raised RuntimeError: no more"):
        evaluator.evaluate(points, PROMPTS, SEEDS, STEPS)
    results = run_ranks(
        3,
        lambda rank, gather: evaluator.evaluate(points, PROMPTS, SEEDS, STEPS, rank=rank, world_size=3, gather=gather),
    )
    assert isinstance(results[1], RewardError)
    for rank in (0, 2):
        assert isinstance(results[rank], UserError)
        assert "another rank" in str(results[rank])


def test_a_reward_of_the_wrong_length_is_named(make: Callable[..., Evaluator]) -> None:
    evaluator = make((FunctionReward("short", lambda images, prompts: torch.zeros(len(images) - 1)), 1.0))
    with pytest.raises(UserError, match="'short' returned"):
        evaluator.evaluate(thetas(evaluator.layout), PROMPTS, SEEDS, STEPS)


def test_each_text_is_encoded_once_in_all_evaluations(make: Callable[..., Evaluator], backbone: SD3) -> None:
    backbone._embeddings.known.clear()
    calls: list[int] = []
    handle = backbone.pipeline.text_encoder_2.register_forward_hook(lambda *_: calls.append(1))
    evaluator = make()
    for _ in range(2):
        evaluator.evaluate(thetas(evaluator.layout), PROMPTS, SEEDS, STEPS)
    handle.remove()
    assert len(calls) == len({*TEXTS, "", "black"})


def test_pictures_are_those_that_are_scored(make: Callable[..., Evaluator]) -> None:
    evaluator = make()
    points = thetas(evaluator.layout)
    scored = evaluator.evaluate(points, PROMPTS, SEEDS, STEPS).per_reward["fingerprint"]
    drawn: dict[Cell, float] = {}
    for rank in range(2):
        for cells, images in evaluator.images(points, PROMPTS, SEEDS, STEPS, rank=rank, world_size=2):
            assert images.shape == (len(cells), 3, 16, 16)
            assert images.dtype == torch.float32
            prints = fingerprint(images, [PROMPTS[cell.slot] for cell in cells])
            drawn.update(zip(cells, prints.tolist(), strict=True))
    assert drawn == {Cell(k, s): float(scored[k, s]) for k in range(K) for s in range(S)}


def test_out_of_memory_halves_what_is_sampled_at_once(
    make: Callable[..., Evaluator], backbone: SD3, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluator = make(rows=12)
    points = thetas(evaluator.layout)
    expected = evaluator.evaluate(points, PROMPTS, SEEDS, STEPS)
    original, sizes, limit = backbone.velocity, [], 4

    def velocity(x: Tensor, *arguments: object) -> Tensor:
        if len(x) > limit:
            raise torch.OutOfMemoryError("too many rows")
        sizes.append(len(x))
        return original(x, *arguments)

    monkeypatch.setattr(backbone, "velocity", velocity)
    units: list[UnitResult] = []
    result = evaluator.evaluate(points, PROMPTS, SEEDS, STEPS, done=units.append)
    np.testing.assert_allclose(result.per_reward["fingerprint"], expected.per_reward["fingerprint"], rtol=0, atol=2e-3)
    assert max(sizes) <= limit
    assert [len(unit.cells) for unit in units] == [6, 6, 6, 2]  # the units stay what they were
    limit = 1
    with pytest.raises(UserError, match="One picture of .* does not fit into the memory"):
        evaluator.evaluate(points, PROMPTS, SEEDS, STEPS)


def test_a_grid_travels_and_ranks_join_theirs() -> None:
    names, shape = ("a", "b"), (2, 3)
    parts = [Grid.empty(names, shape) for _ in range(3)]
    for rank, part in enumerate(parts):
        cell = Cell(rank % 2, rank)
        part.put(UnitResult(rank, 3, (cell,), np.array([rank]), {name: np.array([10 + rank]) for name in names}), 4)
        part.at_once, part.stop = 6 - rank, 15 * (rank == 1)
    packed = [part.pack() for part in parts]
    assert {vector.shape for vector in packed} == {(5 + 3 * 6,)}, "five numbers and the values"
    read = [Grid.unpack(vector, names, shape) for vector in packed]
    for part, copy in zip(parts, read, strict=True):
        np.testing.assert_array_equal(part.values, copy.values)
        kept = ("names", "num_images", "num_forwards", "failed", "at_once", "stop")
        assert all(getattr(part, name) == getattr(copy, name) for name in kept)
    whole = Grid.merge(read, {Cell(rank % 2, rank): rank for rank in range(3)})
    assert [whole.values[0, rank % 2, rank] for rank in range(3)] == [0, 1, 2]
    assert (whole.num_images, whole.num_forwards, whole.failed, whole.at_once) == (3, 12, False, 4)
    assert whole.stop == 15
    # Where nothing bounds a rank, it has no say.
    parts[2].at_once = 0
    assert Grid.merge(parts, {}).at_once == 5
    assert Grid.merge([Grid.empty(names, shape)], {}).at_once == 0


def test_memory_that_runs_out_on_one_rank_is_everyones(
    make: Callable[..., Evaluator], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    ranks = [make(rows=12) for _ in range(2)]
    sizes: list[list[int]] = [[], []]

    def limited(rank: int) -> Callable[..., object]:
        sample = ranks[rank]._sample

        def run(unit: Sequence[Cell], *rest: object) -> object:
            if rank == 1 and len(unit) > 3:
                raise torch.OutOfMemoryError("the smaller device")
            sizes[rank].append(len(unit))
            return sample(unit, *rest)

        return run

    for rank in range(2):
        monkeypatch.setattr(ranks[rank], "_sample", limited(rank))
    points = thetas(ranks[0].layout)

    def ask() -> list[object]:
        return run_ranks(
            2,
            lambda rank, gather: ranks[rank].evaluate(
                points, PROMPTS, SEEDS, STEPS, rank=rank, world_size=2, gather=gather
            ),
        )

    assert all(isinstance(result, Evaluation) for result in ask())
    assert sizes == [[6, 6], [3, 3, 2]], "units of 6, 6, 6 and 2"
    assert [evaluator.at_once for evaluator in ranks] == [3, 3]
    [said] = [record.getMessage() for record in caplog.records if "memory" in record.getMessage()]
    assert said == "Out of memory on rank 1: all ranks sample 3 pictures at once from now on."
    ask()
    assert sizes == [[6, 6, 3, 3, 3, 3], [3, 3, 2, 3, 3, 2]]
    assert len([record for record in caplog.records if "memory" in record.getMessage()]) == 1
    ranks[0].sample_at_most(5)
    assert ranks[0].at_once == 3, "what is more changes nothing"


def test_too_few_rows_for_one_picture_are_refused(make: Callable[..., Evaluator]) -> None:
    with pytest.raises(UserError, match="rows_per_forward is 1; .*2 member"):
        make(rows=1)
