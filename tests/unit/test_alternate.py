"""Strategies in turn: the order of turns, what is handed on, and searches that alternate in a real Trainer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fake_module import STRATEGIES, FakeModule, Killed, N, SaveAlways, StopAt, fit
from torch import nn

from calibri_lightning.adapters.policy import Policy
from calibri_lightning.errors import UserError
from calibri_lightning.prompts import PromptBatch
from calibri_lightning.strategies import CMAES, Alternate, FlowGRPO, PairES, Phase, Strategy
from calibri_lightning.strategies.cma_core import CMACore
from calibri_lightning.strategies.evolution import EvolutionStrategy
from calibri_lightning.strategies.history import History, digest_candidates
from calibri_lightning.strategies.pair_core import PairCore
from calibri_lightning.strategies.phases import Order, Turn, union
from calibri_lightning.strategies.search import SearchCore, SearchSpace

SPACE = SearchSpace(np.ones(N), np.full(N, -1.0), np.full(N, 2.0), np.ones(N))
ELSEWHERE = np.linspace(0.5, 1.5, N)
CORES: dict[str, Callable[[], SearchCore]] = {
    "cma": lambda: CMACore(SPACE, 7, 0.2, 8, (4,)),
    "pairs": lambda: PairCore(SPACE, 7, 0.1, 2, 2, 0.05, (0.9, 0.99), 0.1),
}


class Module(FakeModule):
    """With theta, and a policy of it."""

    def __init__(self, strategy: Strategy, run_dir: Path, kill_after: int | None = None) -> None:
        super().__init__(strategy, run_dir, kill_after=kill_after)
        self.theta = nn.Parameter(torch.from_numpy(self.start_theta.copy()))
        self.policy = Policy(self.theta, nn.Linear(1, 1), strategy.trains, torch.ones(N, dtype=torch.float64))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["policy"] = self.policy.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.policy.load_state_dict(checkpoint["policy"])


def searches(first: int = 2, second: int = 1, **options: int) -> Alternate:
    return Alternate([Phase(STRATEGIES["default"](**options), first), Phase(STRATEGIES["pairs"](), second)])


def state_of(module: FakeModule) -> list[bytes]:
    parts = [part for part in module.strategy.parts if isinstance(part, EvolutionStrategy)]
    best = module.strategy.best
    about = repr(
        (best.score, best.origin, best.generation, best.weights, module.strategy.images, module.strategy.steps)
    )
    means = [vector.tobytes() for part in parts for vector in (part._status.mean, part._status.tail)]
    return [*means, best.theta.tobytes(), module.theta.detach().numpy().tobytes(), about.encode()]


def test_turns_follow_each_other_and_planned_steps_are_those_that_follow() -> None:
    order = Order((3, 1, 2), None)
    turn, seen = Turn(0, 0, 0), []
    for _ in range(15):
        following = order.following(turn, ())
        assert following is not None
        seen.append(following.phase)
        turn = Turn(following.cycle, following.phase, following.done + 1)
    assert seen == [0, 0, 0, 1, 2, 2, 0, 0, 0, 1, 2, 2, 0, 0, 0]
    for total in range(16):
        assert [order.planned(phase, total) for phase in range(3)] == [seen[:total].count(phase) for phase in range(3)]
    assert order.following(Turn(1, 0, 1), {0}) == Turn(1, 1, 0)
    assert order.following(Turn(1, 2, 2), {0}) == Turn(2, 1, 0)
    assert order.following(Turn(1, 2, 1), {0, 1, 2}) is None
    assert Order((3, 1, 2), 2).following(Turn(1, 2, 2), ()) is None
    assert (order.total(-1), order.total(5), Order((3, 1), 2).total(-1), Order((3, 1), 2).total(5)) == (None, 5, 8, 5)


def test_what_a_run_trains_is_what_its_phases_train() -> None:
    assert union(["scales", "scales"]) == "scales"
    assert union(["lora", "scales"]) == union(["both", "lora"]) == "both"
    assert union(["full", "full"]) == "full"
    assert union(["full", "scales"]) is None


def rewards_of(core: SearchCore, thetas: np.ndarray) -> np.ndarray:
    wanted = core.next_cells(np.full((core.popsize, core.num_slots), np.nan))
    noise = np.random.default_rng(0).normal(size=wanted.shape)
    return np.where(wanted, -((thetas - 0.8) ** 2).sum(axis=1)[:, None] + 0.01 * noise, np.nan)


@pytest.mark.parametrize("name", CORES)
def test_a_moved_search_keeps_what_it_learned_and_its_history_replays_the_move(name: str) -> None:
    core, history = CORES[name](), History({"numerics": "x"})

    def generation(number: int) -> np.ndarray:
        nonlocal history
        thetas = core.ask(number, 0.0)
        history = history.extended(digest_candidates(thetas), 0.0, rewards_of(core, thetas))
        core.tell(history.rewards[-1])
        return thetas

    for number in range(4):
        generation(number)
    sigma = core.sigma
    core.move(ELSEWHERE)
    history = history.moved(ELSEWHERE)
    np.testing.assert_allclose(core.mean, ELSEWHERE, atol=1e-12)
    np.testing.assert_array_equal(core.tail_mean(), core.mean)
    assert core.sigma == sigma
    thetas = generation(4)
    spread = sigma * np.abs(np.linalg.norm(thetas - ELSEWHERE, axis=1)).max()
    assert np.abs(thetas.mean(axis=0) - ELSEWHERE).max() < spread + 3 * sigma
    again = CORES[name]()
    stored = History.load(history.state_dict())
    stored.replay(again)
    np.testing.assert_array_equal(again.mean, core.mean)
    np.testing.assert_array_equal(again.tail_mean(), core.tail_mean())
    stored.moves.clear()
    with pytest.raises(UserError, match="Generation 4 of the checkpoint cannot be replayed"):
        stored.replay(CORES[name]())


def test_cma_moves_to_a_bound() -> None:
    core = CMACore(SPACE, 7, 0.2, 8, (4,))
    core.move(SPACE.upper)
    np.testing.assert_allclose(core.mean, SPACE.upper, atol=1e-12)


@pytest.mark.parametrize("name", STRATEGIES)
def test_one_phase_alone_is_the_strategy_itself_bit_for_bit(name: str, tmp_path: Path) -> None:
    alone = FakeModule(STRATEGIES[name](), tmp_path / "alone")
    fit(alone, 5)
    part = STRATEGIES[name]()
    module = Module(Alternate([Phase(part, 2)]), tmp_path / "turns")
    trainer = fit(module, 5)
    assert module.units == alone.units
    assert part._status.mean.tobytes() == alone.strategy._status.mean.tobytes()
    assert part._status.tail.tobytes() == alone.strategy._status.tail.tobytes()
    ours, theirs = module.strategy.best, alone.strategy.best
    assert ours.theta.tobytes() == theirs.theta.tobytes()
    assert (ours.score, ours.origin, ours.generation) == (theirs.score, theirs.origin, theirs.generation)
    assert (module.strategy.images, trainer.global_step) == (alone.strategy.images, 5)
    np.testing.assert_array_equal(module.theta.detach().numpy(), part._status.mean)
    assert part._history.moves == {}


def test_a_search_goes_on_from_the_mean_that_the_other_left(tmp_path: Path) -> None:
    strategy = searches()
    module = Module(strategy, tmp_path)
    means: list[np.ndarray] = []
    strategy_end = strategy.on_train_batch_end

    def spy(*arguments: object) -> None:
        strategy_end(*arguments)
        means.append(module.theta.detach().numpy().copy())

    strategy.on_train_batch_end = spy
    fit(module, 6)  # default, default, pairs, default, default, pairs
    first, second = strategy.parts
    np.testing.assert_array_equal(second._history.moves[0], means[1])
    np.testing.assert_array_equal(first._history.moves[2], means[2])
    np.testing.assert_array_equal(second._history.moves[1], means[4])
    assert (len(first._history), len(second._history), strategy.steps) == (4, 2, 6)
    assert strategy.report.generation == 6
    assert strategy.report.images == first.images + second.images
    # Both plan with the steps of their own turns.
    assert (first._budget.total_generations, second._budget.total_generations) == (4, 2)
    assert first._history.settings["seed"] != second._history.settings["seed"]
    assert sorted(path.parent.parent.name for path in tmp_path.rglob("generations.jsonl")) == ["phase0", "phase1"]


@pytest.mark.parametrize("stop", range(1, 6))
def test_resumed_in_any_phase_equals_uninterrupted(stop: int, tmp_path: Path) -> None:
    whole = Module(searches(), tmp_path / "whole")
    fit(whole, 6)
    first = Module(searches(), tmp_path / "parts")
    fit(first, 6, StopAt(stop), SaveAlways(tmp_path / "last.ckpt"))  # written before the generation is told
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == stop
    second = Module(searches(), tmp_path / "parts")
    fit(second, 6, ckpt=tmp_path / "last.ckpt")
    assert state_of(second) == state_of(whole)
    assert first.units + second.units == whole.units


@pytest.mark.parametrize("during", [1, 2, 3])
def test_a_kill_inside_of_a_turn_repeats_no_finished_unit(during: int, tmp_path: Path) -> None:
    whole = Module(searches(), tmp_path / "whole")
    fit(whole, 5)
    before = sum(step < during for step, _ in whole.units)
    killed = Module(searches(), tmp_path / "run", kill_after=before + 1)
    with pytest.raises(Killed):
        fit(killed, 5, SaveAlways(tmp_path / "last.ckpt"))
    resumed = Module(searches(), tmp_path / "run")
    fit(resumed, 5, ckpt=tmp_path / "last.ckpt")
    assert state_of(resumed) == state_of(whole)
    assert killed.units + resumed.units == whole.units


def test_a_phase_that_its_own_rule_ends_has_no_more_turns(tmp_path: Path) -> None:
    cells = STRATEGIES["default"]().num_cells(N)
    strategy = searches(max_images=3 * cells)
    module = Module(strategy, tmp_path)
    assert fit(module, 8).global_step == 8
    assert [len(part._history) for part in strategy.parts] == [3, 5]
    assert strategy.stop_reason is None
    pairs = STRATEGIES["pairs"]().num_cells(N)
    both = Alternate(
        [
            Phase(STRATEGIES["default"](max_images=2 * cells), 1),
            Phase(STRATEGIES["pairs"](max_images=pairs), 1),
        ]
    )
    assert fit(Module(both, tmp_path / "both"), 8).global_step == 3
    assert both.stop_reason is not None
    assert "CMAES: another generation" in both.stop_reason
    assert "PairES: another generation" in both.stop_reason


def test_cycles_end_the_run_without_max_steps(tmp_path: Path) -> None:
    strategy = Alternate([Phase(STRATEGIES["default"](), 1), Phase(STRATEGIES["pairs"](), 2)], cycles=2)
    assert fit(Module(strategy, tmp_path), -1).global_step == 6
    assert strategy.stop_reason is None
    with pytest.raises(UserError, match="no end"):
        fit(Module(searches(), tmp_path / "endless"), -1)


def test_prompts_depend_on_the_step_alone_and_a_phase_takes_the_first_ones(tmp_path: Path) -> None:
    seen: list[tuple[int, tuple[int, ...]]] = []

    class Spy(Module):
        def noise_seeds(self, batch: PromptBatch) -> list[int]:
            seen.append((batch.step, tuple(prompt.index for prompt in batch.prompts)))
            return super().noise_seeds(batch)

    phases = [Phase(CMAES(popsize=8, bucket_size=4), 1), Phase(PairES(num_pairs=3, prompts_per_pair=2, lr=0.05), 1)]
    strategy = Alternate(phases)
    assert strategy.prompts_per_step == 6
    fit(Spy(strategy, tmp_path), 4)
    assert seen == [(0, (0, 1, 2, 3)), (1, tuple(range(6))), (2, (0, 1, 2, 3)), (3, tuple(range(6)))]


def test_start_is_scored_once_and_the_best_of_all_phases_wins(tmp_path: Path) -> None:
    module = Module(searches(), tmp_path)
    scores: list[tuple[float, int]] = []
    module.score = lambda theta: scores.append((module.truth(theta), module.strategy.steps)) or scores[-1][0]
    fit(module, 9)
    assert module.scored.count("start") == 1
    best = module.strategy.best
    highest = max(score for score, _ in scores)
    assert best.score == highest == module.truth(best.theta)
    assert best.generation == next(step for score, step in scores if score == highest)


@pytest.mark.parametrize(
    ("phases", "message"),
    [
        (lambda: [], "phases is empty"),
        (lambda: [Phase(CMAES(), 0)], r"phases\[0\].steps"),
        (lambda: [Phase(Alternate([Phase(CMAES(), 1)]), 1)], "cannot take turns"),
        (lambda: [Phase(CMAES(), 1), Phase(FlowGRPO(train="full"), 1)], "train: full"),
        (lambda: [Phase(strategy := CMAES(), 1), Phase(strategy, 1)], "share one strategy"),
    ],
)
def test_unusable_phases_are_refused(phases: Callable[[], list[Phase]], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Alternate(phases())


def test_other_phases_are_not_resumed(tmp_path: Path) -> None:
    fit(Module(searches(), tmp_path), 2, SaveAlways(tmp_path / "last.ckpt"))
    with pytest.raises(UserError, match="phases was CMAES x 2, PairES x 1 and is CMAES x 3, PairES x 1"):
        fit(Module(searches(first=3), tmp_path), 4, ckpt=tmp_path / "last.ckpt")
