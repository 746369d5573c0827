"""An analytic noisy quadratic in the place of a diffusion model, for strategies in a real Trainer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from quiet_trainer import quiet_trainer
from torch.utils.data import DataLoader, IterableDataset

from calibri_lightning.arrays import Cells, Floats
from calibri_lightning.launch.pulse import Pulse
from calibri_lightning.prompts import Prompt, PromptBatch
from calibri_lightning.rewards.blend import Blend
from calibri_lightning.sampling.grid import Cell, Evaluation, UnitResult, cut_units
from calibri_lightning.sampling.noise import noise_seed
from calibri_lightning.strategies import CMAES, EvolutionStrategy, PairES

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
        self.validates = True
        self.blend = Blend(())
        self.pulse = Pulse()
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

    def noise_seeds(self, batch: PromptBatch) -> list[int]:
        return [noise_seed(self.seed, batch.step, prompt.index, 0) for prompt in batch.prompts]

    def train_dataloader(self) -> DataLoader:
        return DataLoader(Generations(self, self.strategy.prompts_per_step), batch_size=None)

    def on_train_batch_end(self, *_: Any) -> None:
        self.validate_now()  # stands for a validation after every generation

    def validate_now(self) -> None:
        candidates = self.strategy.validation_candidates(self)
        self.scored += list(candidates)
        self.strategy.on_validated(self, {name: self.score(c.theta) for name, c in candidates.items()})

    def evaluate(
        self,
        thetas: Floats,
        prompts: Sequence[Prompt],
        seeds: Sequence[int],
        *,
        cells: Cells,
        done: Callable[[UnitResult], None],
        known: Floats | None,
    ) -> Evaluation:
        """Takes what a search asks, and no more."""
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


def fit(module: FakeModule, max_steps: int, *callbacks: Callback, ckpt: Path | None = None) -> Trainer:
    trainer = quiet_trainer(module.run_dir, *callbacks, max_steps=max_steps)
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
