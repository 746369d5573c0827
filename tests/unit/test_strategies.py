"""The strategies in a real Trainer: generations, the honest choice, annealing and presets."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fake_module import (
    STRATEGIES,
    FakeModule,
    N,
    SaveAlways,
    fit,
)
from lightning.pytorch import Callback
from quiet_trainer import quiet_trainer

from calibri_lightning.arrays import Floats
from calibri_lightning.errors import UserError
from calibri_lightning.prompts import Prompt
from calibri_lightning.sampling.grid import Evaluation
from calibri_lightning.strategies import CMAES, EvolutionStrategy, PairES
from calibri_lightning.strategies.cma_core import CMACore


@pytest.mark.parametrize("name", STRATEGIES)
def test_search_finds_the_optimum_and_global_step_counts_generations(name: str, tmp_path: Path) -> None:
    module = FakeModule(STRATEGIES[name](), tmp_path)
    trainer = fit(module, 60)
    assert trainer.global_step == 60
    assert module.strategy.generation == 60
    assert module.strategy.best is not None
    assert module.strategy.best.score > 0.2 * module.truth(np.ones(N))  # four fifths of the loss are gone
    assert module.strategy.images == 60 * module.strategy.num_cells(N)
    assert module.strategy.report is not None
    assert module.strategy.report.images == module.strategy.images
    assert float(trainer.callback_metrics["train/images"]) == module.strategy.images
    assert float(trainer.callback_metrics["train/sigma"]) == pytest.approx(module.strategy.report.pace)


def test_all_candidates_of_a_generation_see_the_same_prompts_and_noise(tmp_path: Path) -> None:
    module = FakeModule(STRATEGIES["official"](), tmp_path)
    seen = []
    evaluate = module.evaluate

    def spy(thetas: Floats, prompts: Sequence[Prompt], seeds: Sequence[int], **kw: Any) -> Evaluation:
        seen.append(tuple(seeds))
        assert len(prompts) == len(seeds) == 4
        return evaluate(thetas, prompts, seeds, **kw)

    module.evaluate = spy
    fit(module, 3)
    assert len(set(seen)) == 3
    assert len({seed for seeds in seen for seed in seeds}) == 12  # no noise comes twice


def test_best_is_the_best_validated_vector_never_a_lucky_candidate(tmp_path: Path) -> None:
    # Training rewards lead away from the start, validation prefers it: the start must win.
    module = FakeModule(STRATEGIES["default"](), tmp_path, score=lambda x: -float(np.abs(x - 1).sum()))
    fit(module, 8)
    best = module.strategy.best
    assert best is not None
    assert (best.origin, best.generation, best.score) == ("start", 0, 0.0)
    np.testing.assert_array_equal(best.theta, module.start_theta)


def test_start_is_scored_once_and_the_mean_after_every_generation(tmp_path: Path) -> None:
    module = FakeModule(STRATEGIES["default"](), tmp_path)
    fit(module, 10)
    assert module.scored.count("start") == 1
    assert module.scored.count("mean") == 10
    assert module.scored.count("tail") == 6  # up to four generations, the tail is the mean itself
    assert module.strategy.validation_candidates(module) == {}  # nothing is new


def test_best_score_is_that_of_its_vector_and_the_highest(tmp_path: Path) -> None:
    seen: list[tuple[float, bytes]] = []

    def score(theta: Floats) -> float:
        value = FakeModule.truth(theta) + 0.01 * np.sin(1e3 * theta.sum())
        seen.append((float(value), theta.tobytes()))
        return float(value)

    module = FakeModule(STRATEGIES["pairs"](), tmp_path, score=score)
    fit(module, 10)
    assert module.strategy.best is not None
    assert (module.strategy.best.score, module.strategy.best.theta.tobytes()) == max(seen)


def test_score_that_is_not_finite_never_wins(tmp_path: Path) -> None:
    module = FakeModule(STRATEGIES["default"](), tmp_path, score=lambda x: float("nan") if (x != 1).any() else -1.0)
    fit(module, 3)
    assert module.strategy.best is not None
    assert module.strategy.best.origin == "start"


def test_validation_of_a_checkpoint_offers_start_and_best(tmp_path: Path) -> None:
    module = FakeModule(STRATEGIES["default"](), tmp_path)
    fit(module, 4, SaveAlways(tmp_path / "c.ckpt"))
    assert module.strategy.best is not None
    fresh = FakeModule(STRATEGIES["default"](), tmp_path)
    fresh.strategy.load_state_dict(next(iter(torch.load(tmp_path / "c.ckpt", weights_only=True)["callbacks"].values())))
    fresh._trainer = quiet_trainer(tmp_path, max_steps=1)
    thetas = fresh.strategy.validation_candidates(fresh)
    assert list(thetas) == ["start", "best"]


# --- annealing and presets ---


def test_default_preset_is_r2_and_its_annealing_follows_the_generations(tmp_path: Path) -> None:
    strategy = CMAES()
    rates: list[float] = []

    class Watch(Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            assert isinstance(strategy._core, CMACore)
            rates.append(strategy._core.es.sp.cmean)

    module = FakeModule(strategy, tmp_path)
    trainer = quiet_trainer(tmp_path, max_steps=4)
    trainer.callbacks.append(Watch())
    module.configure_callbacks = lambda: [strategy, Watch()]
    trainer.fit(module)
    core = strategy._core
    assert isinstance(core, CMACore)
    assert (core.popsize, core.rounds, core.num_cells) == (32, (4, 4, 8), 256)
    assert core.es.sigma0 == 0.2  # 1,024 images are a short budget
    np.testing.assert_array_equal(core.es.opts["CMA_stds"], [1, 1, 1, 1, 1, 0.2])
    assert rates[-4:] == pytest.approx([1 - 0.7 * g / 4 for g in range(4)])


def test_official_preset_has_the_published_settings(tmp_path: Path) -> None:
    strategy = CMAES(preset="official")
    fit(FakeModule(strategy, tmp_path), 1)
    core = strategy._core
    assert isinstance(core, CMACore)
    assert (core.popsize, core.rounds, core.es.sigma0) == (9, (16,), 0.25)
    assert core.popsize == 4 + int(3 * np.log(N))
    np.testing.assert_array_equal(core.es.opts["CMA_stds"], np.ones(N))
    core.ask(1, 1.0)
    assert core.es.sp.cmean == 1


@pytest.mark.parametrize(("max_steps", "sigma0"), [(39, 0.2), (40, 0.1)])
def test_sigma0_depends_on_the_budget(max_steps: int, sigma0: float) -> None:
    assert CMAES().resolve(N, max_steps * 256, {})["sigma0"] == sigma0
    assert CMAES(sigma0=0.3).resolve(N, max_steps * 256, {})["sigma0"] == 0.3
    assert CMAES().resolve(N, max_steps * 256, {"sigma0": 0.12})["sigma0"] == 0.12  # as in the checkpoint


def test_weight_std_replaces_the_step_of_raw_weights_alone(tmp_path: Path) -> None:
    module = FakeModule(CMAES(), tmp_path)
    for strategy in (CMAES(weight_std=0.05), PairES(weight_std=0.05)):
        np.testing.assert_array_equal(strategy.space(module).stds, [1, 1, 1, 1, 1, 0.05])


@pytest.mark.parametrize("strategy", [CMAES(weight_std=0.05), PairES(weight_std=0.05)])
def test_weight_std_is_refused_where_no_weight_is_learned(strategy: EvolutionStrategy, tmp_path: Path) -> None:
    module = FakeModule(strategy, tmp_path)
    module.layout.names = tuple(f"member0/block.{i}" for i in range(N))
    with pytest.raises(UserError, match="weight_std is 0.05.*weight_mode to raw"):
        strategy.space(module)
