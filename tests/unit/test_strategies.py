"""The strategies in a real Trainer: generations, resume, kill, stop rules, the honest choice, bad input."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, IterableDataset

from calibri_lightning.errors import UserError
from calibri_lightning.prompts import Prompt, PromptBatch
from calibri_lightning.sampling.grid import Cell, Evaluation, UnitResult, cut_units
from calibri_lightning.strategies import CMAES, EvolutionStrategy, PairES
from calibri_lightning.strategies.cma_core import CMACore
from calibri_lightning.strategies.search import Cells, Floats

N = 6
TARGET = np.array([0.8, 1.2, 0.9, 1.1, 1.05, 0.7])
CELLS_PER_UNIT = 6

STRATEGIES: dict[str, Callable[..., EvolutionStrategy]] = {
    "default": lambda **kw: CMAES(popsize=8, bucket_size=8, **kw),
    "official": lambda **kw: CMAES(preset="official", bucket_size=4, **kw),
    "pairs": lambda **kw: PairES(num_pairs=4, prompts_per_pair=2, lr=0.05, **kw),
}


class Killed(RuntimeError):
    """Stands for SIGKILL: nothing handles it."""


class Generations(IterableDataset):
    """Prompts as a pure function of the step; the trainer's counter tells the first one."""

    def __init__(self, module: FakeModule, count: int) -> None:
        self.module, self.count = module, count

    def __iter__(self) -> Any:
        for step in range(self.module.trainer.global_step, 10**6):
            yield PromptBatch(step, tuple(Prompt(f"prompt {i}", i) for i in range(self.count)))


class FakeModule(LightningModule):
    """An analytic noisy quadratic in the place of a diffusion model.

    Args:
        strategy: What is tested.
        run_dir: Where the ledger goes.
        noise: Standard deviation of the noise, a function of the seed alone (common random numbers).
        val_every: Validates after so many generations.
        kill_after: Raises `Killed` after so many units, counted over all generations.
        break_cells: Turns some rewards into something else.
    """

    def __init__(
        self,
        strategy: EvolutionStrategy,
        run_dir: Path,
        noise: float = 0.05,
        kill_after: int | None = None,
        break_cells: Callable[[int, int, int, float], float] | None = None,
        start: Floats | None = None,
        score: Callable[[Floats], float] | None = None,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.scales = torch.nn.Parameter(torch.ones(N))
        self.judged_by = {"num_steps": 4}
        self.strategy, self.run_dir, self.noise = strategy, run_dir, noise
        self.kill_after, self.break_cells, self.score = kill_after, break_cells, score or self.truth
        self.seed, self.num_steps = 7, 8
        self.start_theta = np.ones(N) if start is None else start
        names = tuple(f"member0/block.{i}" for i in range(N - 1)) + ("member0/weight",)
        self.layout: Any = SimpleNamespace(
            names=names, lower=np.full(N, -1.0), upper=np.full(N, 2.0), stds=np.array([1.0] * (N - 1) + [0.2])
        )
        self.units: list[tuple[int, tuple[Cell, ...]]] = []
        self.scored: list[str] = []
        self.evaluations = 0

    @staticmethod
    def truth(theta: Floats) -> float:
        return float(-((theta - TARGET) ** 2).sum())

    def configure_callbacks(self) -> Sequence[Callback]:
        return [self.strategy]

    def configure_optimizers(self) -> Any:
        return self.strategy.configure_optimizers(self)

    def training_step(self, batch: PromptBatch, batch_idx: int) -> None:
        self.strategy.training_step(self, batch)

    def transfer_batch_to_device(self, batch: PromptBatch, device: torch.device, dataloader_idx: int) -> PromptBatch:
        return batch  # lightning 2.6.6 refuses to walk through a frozen dataclass

    def train_dataloader(self) -> DataLoader:
        return DataLoader(Generations(self, self.strategy.prompts_per_step), batch_size=None)

    def on_train_batch_end(self, *_: Any) -> None:
        self.validate_now()  # stands for a validation after every generation

    def validate_now(self) -> None:
        thetas = self.strategy.validation_thetas(self)
        self.scored += list(thetas)
        self.strategy.on_validated(self, {name: self.score(theta) for name, theta in thetas.items()})

    def evaluate(
        self,
        thetas: Floats,
        prompts: Sequence[Prompt],
        seeds: Sequence[int],
        cells: Cells | None = None,
        num_steps: int | None = None,
        done: Callable[[UnitResult], None] | None = None,
        known: Floats | None = None,
    ) -> Evaluation:
        assert cells is not None
        self.evaluations += 1
        rewards = np.full(cells.shape, np.nan) if known is None else np.where(cells, known, np.nan)
        units = cut_units(cells, CELLS_PER_UNIT)
        for number, unit in enumerate(units):
            if not any(np.isnan(rewards[cell]) for cell in unit):
                continue
            if self.kill_after is not None and len(self.units) >= self.kill_after:
                raise Killed
            values = np.array([self.reward(thetas, seeds, cell) for cell in unit])
            for cell, value in zip(unit, values, strict=True):
                rewards[cell] = value
            self.units.append((self.trainer.global_step, unit))
            if done is not None:
                done(UnitResult(number, len(units), unit, values, {}))
        return Evaluation(rewards, {}, 0, 0)

    def reward(self, thetas: Floats, seeds: Sequence[int], cell: Cell) -> float:
        draw = np.random.Generator(np.random.Philox(seeds[cell.slot]))
        shift = self.noise * draw.normal(size=N)  # the optimum of this prompt and noise
        reward = self.truth(thetas[cell.candidate] - shift) + draw.normal()
        if self.break_cells is not None:
            return self.break_cells(self.trainer.global_step, cell.candidate, cell.slot, reward)
        return reward


class StopAt(Callback):
    """Ends a run after a generation, as a user would."""

    def __init__(self, generation: int) -> None:
        self.generation = generation

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step >= self.generation:
            trainer.should_stop = True


class SaveAlways(Callback):
    """Saves after each generation: before it is told, as this callback stands before the module's own."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        trainer.save_checkpoint(self.path)


def make_trainer(tmp_path: Path, max_steps: int, *callbacks: Callback, enable_checkpointing: bool = False) -> Trainer:
    return Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=max_steps,
        max_epochs=-1,
        logger=False,
        enable_checkpointing=enable_checkpointing,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
        default_root_dir=tmp_path,
        num_sanity_val_steps=0,
    )


def fit(module: FakeModule, max_steps: int, *callbacks: Callback, ckpt: Path | None = None) -> Trainer:
    trainer = make_trainer(module.run_dir, max_steps, *callbacks)
    trainer.fit(module, ckpt_path=ckpt)  # torch's default since 2.6: weights_only=True
    return trainer


def fingerprint(module: FakeModule) -> Mapping[str, bytes]:
    strategy = module.strategy
    assert strategy.best is not None
    assert strategy._status is not None
    return {
        "mean": strategy._status.mean.tobytes(),
        "tail": strategy._status.tail.tobytes(),
        "best": strategy.best.theta.tobytes(),
        "about": repr((strategy.best.score, strategy.best.origin, strategy.best.generation)).encode(),
        "images": str(strategy.images).encode(),
    }


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
    assert float(trainer.callback_metrics["train/sigma"]) == pytest.approx(module.strategy.report.sigma)


@pytest.mark.parametrize("name", STRATEGIES)
def test_resume_equals_an_uninterrupted_run(name: str, tmp_path: Path) -> None:
    whole = FakeModule(STRATEGIES[name](), tmp_path / "whole")
    fit(whole, 6)
    first = FakeModule(STRATEGIES[name](), tmp_path / "parts")
    ckpt = tmp_path / "last.ckpt"
    trainer = fit(first, 6, StopAt(3))
    assert trainer.global_step == 3
    trainer.save_checkpoint(ckpt)
    assert torch.load(ckpt, weights_only=True)["global_step"] == 3
    second = FakeModule(STRATEGIES[name](), tmp_path / "parts")
    assert fit(second, 6, ckpt=ckpt).global_step == 6
    assert fingerprint(second) == fingerprint(whole)
    assert {step for step, _ in second.units} == {3, 4, 5}


def test_more_generations_than_planned_continue_a_search_without_annealing(tmp_path: Path) -> None:
    whole = FakeModule(STRATEGIES["official"](), tmp_path / "whole")
    fit(whole, 6)
    fit(FakeModule(STRATEGIES["official"](), tmp_path / "parts"), 3, SaveAlways(tmp_path / "c.ckpt"))
    second = FakeModule(STRATEGIES["official"](), tmp_path / "parts")
    fit(second, 6, ckpt=tmp_path / "c.ckpt")
    assert fingerprint(second) == fingerprint(whole)


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("into", [1, 4])
def test_kill_inside_a_generation_repeats_no_finished_unit(name: str, into: int, tmp_path: Path) -> None:
    whole = FakeModule(STRATEGIES[name](), tmp_path / "whole")
    fit(whole, 4)
    before = sum(step < 2 for step, _ in whole.units)
    killed = FakeModule(STRATEGIES[name](), tmp_path / "run", kill_after=before + into)
    with pytest.raises(Killed):
        fit(killed, 4, SaveAlways(tmp_path / "last.ckpt"))
    resumed = FakeModule(STRATEGIES[name](), tmp_path / "run")
    fit(resumed, 4, ckpt=tmp_path / "last.ckpt")
    assert fingerprint(resumed) == fingerprint(whole)
    # Together the two processes did exactly the units of the uninterrupted run, each of them once.
    assert killed.units + resumed.units == whole.units


def test_checkpoints_of_lightnings_own_callback_resume_exactly(tmp_path: Path) -> None:
    whole = FakeModule(STRATEGIES["default"](), tmp_path / "whole")
    fit(whole, 5)
    saver = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    first = FakeModule(STRATEGIES["default"](), tmp_path / "run")
    trainer = make_trainer(tmp_path, 5, saver, enable_checkpointing=True)
    trainer.fit(first)
    assert sorted(path.name for path in tmp_path.glob("*.ckpt")) == [f"step={n}.ckpt" for n in range(1, 6)]
    for step in (1, 4):
        resumed = FakeModule(STRATEGIES["default"](), tmp_path / f"from{step}")
        fit(resumed, 5, ckpt=tmp_path / f"step={step}.ckpt")
        assert fingerprint(resumed) == fingerprint(whole)
        assert resumed.units == []  # the ledger of the first run, in another folder, knows everything


def test_kill_between_generation_and_checkpoint_repeats_nothing(tmp_path: Path) -> None:
    whole = FakeModule(STRATEGIES["default"](), tmp_path / "whole")
    fit(whole, 5)
    fit(
        FakeModule(STRATEGIES["default"](), tmp_path / "run"),
        5,
        StopAt(2),
        SaveAlways(tmp_path / "early.ckpt"),
    )
    further = FakeModule(STRATEGIES["default"](), tmp_path / "run")
    fit(further, 5, StopAt(4), ckpt=tmp_path / "early.ckpt")  # generations 2 and 3 are in the ledger only
    resumed = FakeModule(STRATEGIES["default"](), tmp_path / "run")
    fit(resumed, 5, ckpt=tmp_path / "early.ckpt")
    assert {step for step, _ in resumed.units} == {4}
    assert fingerprint(resumed) == fingerprint(whole)


def test_new_run_in_the_same_folder_reuses_nothing(tmp_path: Path) -> None:
    fit(FakeModule(STRATEGIES["default"](), tmp_path), 2)
    again = FakeModule(STRATEGIES["default"](), tmp_path)
    fit(again, 2)
    assert {step for step, _ in again.units} == {0, 1}


def test_all_candidates_of_a_generation_see_the_same_prompts_and_noise(tmp_path: Path) -> None:
    module = FakeModule(STRATEGIES["official"](), tmp_path)
    seen = []
    evaluate = module.evaluate

    def spy(thetas: Floats, prompts: Sequence[Prompt], seeds: Sequence[int], **kw: Any) -> Evaluation:
        seen.append(tuple(seeds))
        assert len(prompts) == len(seeds) == 4
        return evaluate(thetas, prompts, seeds, **kw)

    module.evaluate = spy  # type: ignore[method-assign]
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
    assert module.strategy.validation_thetas(module) == {}  # nothing is new


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
    fresh._trainer = make_trainer(tmp_path, 1)
    thetas = fresh.strategy.validation_thetas(fresh)
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
    trainer = make_trainer(tmp_path, 4)
    trainer.callbacks.append(Watch())
    module.configure_callbacks = lambda: [strategy, Watch()]  # type: ignore[method-assign]
    trainer.fit(module)
    core = strategy._core
    assert isinstance(core, CMACore)
    assert (core.popsize, core.rounds, core.num_cells) == (32, (4, 4, 8), 256)
    assert core.es.sigma0 == 0.15  # 1,024 images are a short budget
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


@pytest.mark.parametrize(("max_steps", "sigma0"), [(39, 0.15), (40, 0.1)])
def test_sigma0_depends_on_the_budget(max_steps: int, sigma0: float) -> None:
    assert CMAES().resolve(N, max_steps * 256, {})["sigma0"] == sigma0
    assert CMAES(sigma0=0.3).resolve(N, max_steps * 256, {})["sigma0"] == 0.3
    assert CMAES().resolve(N, max_steps * 256, {"sigma0": 0.12})["sigma0"] == 0.12  # as in the checkpoint


def test_weight_std_replaces_the_step_of_raw_weights_alone(tmp_path: Path) -> None:
    module = FakeModule(CMAES(), tmp_path)
    for strategy in (CMAES(weight_std=0.05), PairES(weight_std=0.05)):
        np.testing.assert_array_equal(strategy.space(module).stds, [1, 1, 1, 1, 1, 0.05])


# --- stop rules ---


def test_max_images_is_never_exceeded_and_sets_the_horizon(tmp_path: Path) -> None:
    strategy = PairES(num_pairs=4, prompts_per_pair=2, max_images=16 * 5 + 15)
    trainer = fit(FakeModule(strategy, tmp_path), -1)
    assert trainer.global_step == 5
    assert strategy.images == 80
    assert strategy.report is not None
    assert strategy.report.total_generations == 5
    assert "max_images" in str(strategy.stop_reason)


@pytest.mark.parametrize(
    "make",
    [
        lambda: PairES(num_pairs=4, prompts_per_pair=2, max_images=32),
        lambda: PairES(num_pairs=4, prompts_per_pair=2, patience=1),
    ],
)
def test_search_that_had_ended_does_not_go_on_when_resumed(
    make: Callable[[], EvolutionStrategy], tmp_path: Path
) -> None:
    worse = FakeModule(make(), tmp_path, score=lambda x: -float(np.abs(x - 1).sum()))
    trainer = fit(worse, -1)
    trainer.save_checkpoint(tmp_path / "c.ckpt")
    assert trainer.global_step == 2
    resumed = FakeModule(make(), tmp_path)
    fit(resumed, -1, ckpt=tmp_path / "c.ckpt")
    assert resumed.evaluations == 0
    assert resumed.strategy.generation == 2


def test_max_seconds_ends_and_counts_the_earlier_parts(tmp_path: Path) -> None:
    strategy = PairES(num_pairs=4, prompts_per_pair=2, max_seconds=1e-6)
    assert fit(FakeModule(strategy, tmp_path), -1, SaveAlways(tmp_path / "c.ckpt")).global_step == 1
    assert "max_seconds" in str(strategy.stop_reason)
    state = torch.load(tmp_path / "c.ckpt", weights_only=True)["callbacks"]["PairES"]
    state["elapsed"] = 1e5
    later = PairES(num_pairs=4, prompts_per_pair=2, max_seconds=1e4)
    later.load_state_dict(state)
    module = FakeModule(later, tmp_path)
    trainer = make_trainer(tmp_path, 9)
    module._trainer = trainer
    later._prepare(module)
    assert later._budget is not None
    assert later._budget.over(0) is not None


def test_patience_ends_after_validations_without_a_better_score(tmp_path: Path) -> None:
    strategy = PairES(num_pairs=4, prompts_per_pair=2, patience=3)
    module = FakeModule(strategy, tmp_path, score=lambda x: -float(np.abs(x - 1).sum()))
    # The first validation finds the start; three more find nothing better.
    assert fit(module, 50).global_step == 4
    assert "3 validations" in str(strategy.stop_reason)


def test_sigma_plateau_ends() -> None:
    strategy = CMAES(sigma_plateau=3)
    assert strategy.plateau([0.2, 0.1]) is None
    assert strategy.plateau([0.1, 0.1, 0.11]) is None
    assert strategy.plateau([0.3, 0.1, 0.1, 0.101]) is not None


def test_search_without_an_end_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no end.*Set trainer.max_steps"):
        fit(FakeModule(PairES(), tmp_path), -1)


def test_budget_below_one_generation_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="max_images is 100, but one generation takes 256"):
        fit(FakeModule(CMAES(max_images=100), tmp_path), 5)


# --- bad rewards ---


def test_failed_candidate_does_not_stop_the_search(tmp_path: Path) -> None:
    def broken(_: int, candidate: int, slot: int, reward: float) -> float:
        return float("nan") if candidate == 3 and slot == 1 else reward

    module = FakeModule(STRATEGIES["default"](), tmp_path, break_cells=broken)
    fit(module, 10)
    assert module.strategy.report is not None
    assert module.strategy.report.generation == 10
    assert np.isfinite(module.strategy._status.mean).all()  # type: ignore[union-attr]


def test_reward_that_fails_once_is_made_again_and_changes_nothing(tmp_path: Path) -> None:
    tried: set[tuple[int, int, int]] = set()

    def hiccup(step: int, candidate: int, slot: int, reward: float) -> float:
        first = (step, candidate, slot) not in tried
        tried.add((step, candidate, slot))
        return float("inf") if first and candidate == 2 else reward

    whole = FakeModule(STRATEGIES["pairs"](), tmp_path / "whole")
    fit(whole, 4)
    module = FakeModule(STRATEGIES["pairs"](), tmp_path / "run", break_cells=hiccup)
    fit(module, 4)
    assert fingerprint(module) == fingerprint(whole)


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("value", [float("nan"), 0.5])
def test_dead_reward_is_tried_twice_then_refused_and_nothing_is_told(name: str, value: float, tmp_path: Path) -> None:
    module = FakeModule(STRATEGIES[name](), tmp_path, break_cells=lambda step, c, s, r: value if step == 2 else r)
    with pytest.raises(UserError, match=r"Generation 2 is useless, twice"):
        fit(module, 4, SaveAlways(tmp_path / "last.ckpt"))
    assert module.strategy.generation == 2
    # The checkpoint is that of generation 2: the repaired run continues as if nothing had happened.
    repaired = FakeModule(STRATEGIES[name](), tmp_path)
    if not np.isfinite(value):
        fit(repaired, 4, ckpt=tmp_path / "last.ckpt")
        whole = FakeModule(STRATEGIES[name](), tmp_path / "whole")
        fit(whole, 4)
        assert fingerprint(repaired) == fingerprint(whole)


# --- bad input ---


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"popsize": 1}, "popsize is 1.*at least 4"),
        ({"preset": "best"}, 'preset is "best"'),
        ({"sigma0": 0.0}, "sigma0 is 0.0"),
        ({"sigma0": float("nan")}, "sigma0 is nan"),
        ({"bucket_size": 0}, "bucket_size is 0"),
        ({"halving": [4, 4]}, r"halving is \[4, 4\] with bucket_size 16"),
        ({"halving": [0, 16]}, "halving"),
        ({"cmean_final": 0.0}, "cmean_final"),
        ({"weight_std": -1.0}, "weight_std"),
        ({"sigma_plateau": 1}, "sigma_plateau"),
        ({"max_images": 0}, "max_images"),
        ({"max_seconds": -1.0}, "max_seconds"),
        ({"patience": 0}, "patience"),
    ],
)
def test_bad_settings_of_cma_es_are_refused_at_once(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        CMAES(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_pairs": 0}, "num_pairs is 0"),
        ({"prompts_per_pair": 0}, "prompts_per_pair is 0"),
        ({"sigma0": -0.1}, "sigma0 is -0.1"),
        ({"lr": 0.0}, "lr is 0.0"),
        ({"betas": (0.9, 1.0)}, "betas is"),
        ({"betas": (0.9,)}, "betas is"),
        ({"final_lr_fraction": 1.5}, "final_lr_fraction is 1.5"),
    ],
)
def test_bad_settings_of_pair_es_are_refused_at_once(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        PairES(**settings)


@pytest.mark.parametrize("name", STRATEGIES)
def test_bounds_that_exclude_the_start_are_refused_before_any_picture(name: str, tmp_path: Path) -> None:
    module = FakeModule(STRATEGIES[name](), tmp_path, start=np.full(N, 5.0))
    with pytest.raises(UserError, match="starts at 5 with bounds"):
        fit(module, 3)
    assert module.evaluations == 0


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (lambda: CMAES(popsize=10, bucket_size=8), "popsize was 8 and is 10"),
        (lambda: CMAES(popsize=8, bucket_size=8, sigma0=0.3), "sigma0 was 0.15 and is 0.3"),
        (lambda: CMAES(popsize=8, bucket_size=8, halving=[8]), r"halving was 2\+2\+4 and is 8"),
    ],
)
def test_resume_with_other_settings_is_refused(
    changed: Callable[[], EvolutionStrategy], message: str, tmp_path: Path
) -> None:
    fit(FakeModule(STRATEGIES["default"](), tmp_path), 2, SaveAlways(tmp_path / "c.ckpt"))
    with pytest.raises(UserError, match=message):
        fit(FakeModule(changed(), tmp_path), 4, ckpt=tmp_path / "c.ckpt")


def test_resume_with_another_seed_is_refused(tmp_path: Path) -> None:
    fit(FakeModule(STRATEGIES["default"](), tmp_path), 2, SaveAlways(tmp_path / "c.ckpt"))
    module = FakeModule(STRATEGIES["default"](), tmp_path)
    module.seed = 8
    with pytest.raises(UserError, match="seed was 7 and is 8"):
        fit(module, 4, ckpt=tmp_path / "c.ckpt")


def test_checkpoint_whose_candidates_cannot_be_redrawn_is_refused(tmp_path: Path) -> None:
    fit(FakeModule(STRATEGIES["default"](), tmp_path), 3, SaveAlways(tmp_path / "c.ckpt"))
    ckpt = torch.load(tmp_path / "c.ckpt", weights_only=True)
    ckpt["callbacks"]["CMAES"]["history"]["candidates"][1] = "0" * 64
    torch.save(ckpt, tmp_path / "d.ckpt")
    with pytest.raises(UserError, match="Generation 1 of the checkpoint cannot be replayed.*numpy.*cma"):
        fit(FakeModule(STRATEGIES["default"](), tmp_path), 4, ckpt=tmp_path / "d.ckpt")


def test_full_disk_in_mid_run_names_the_file_and_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from calibri_lightning.strategies import ledger

    whole = FakeModule(STRATEGIES["default"](), tmp_path / "whole")
    fit(whole, 4)
    module = FakeModule(STRATEGIES["default"](), tmp_path / "run")
    real, calls = ledger.os.fsync, []

    def fsync(handle: int) -> None:
        calls.append(handle)
        if module.trainer.global_step == 2 and len(calls) % 3 == 0:
            raise OSError(28, "No space left on device")
        real(handle)

    with monkeypatch.context() as patch:
        patch.setattr(ledger.os, "fsync", fsync)
        with pytest.raises(UserError, match=r"ledger/.*jsonl cannot be written \(No space left on device\)"):
            fit(module, 4, SaveAlways(tmp_path / "last.ckpt"))
    resumed = FakeModule(STRATEGIES["default"](), tmp_path / "run")
    fit(resumed, 4, ckpt=tmp_path / "last.ckpt")
    assert fingerprint(resumed) == fingerprint(whole)


def test_unwritable_run_folder_is_refused_before_any_picture(tmp_path: Path) -> None:
    module = FakeModule(STRATEGIES["default"](), tmp_path)
    (tmp_path / "ledger").write_text("a file where the folder should be")
    with pytest.raises(UserError, match="ledger cannot be written"):
        fit(module, 2)
    assert module.evaluations == 0


def test_batch_that_does_not_fill_the_slots_is_refused(tmp_path: Path) -> None:
    module = FakeModule(STRATEGIES["default"](), tmp_path)
    module.train_dataloader = lambda: DataLoader(Generations(module, 5), batch_size=None)  # type: ignore[method-assign]
    with pytest.raises(UserError, match="has 5 prompts; this strategy takes 8"):
        fit(module, 2)
