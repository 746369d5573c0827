"""The LightningModule: a frozen backbone, its calibration, rewards, and the strategy that improves theta."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule
from torch import Tensor, nn

from calibri_lightning.backbones import Backbone
from calibri_lightning.calibration import (
    Granularity,
    Layout,
    MemberSpec,
    WeightMode,
    attach,
    build_layout,
    find_sites,
    probe,
)
from calibri_lightning.checkpoint import keep_trainable, load_start, require_trainable
from calibri_lightning.errors import UserError
from calibri_lightning.evaluation.progress import GenerationStats
from calibri_lightning.evaluation.summary import Budget
from calibri_lightning.prompts import Prompt, PromptBatch
from calibri_lightning.report import Conditions, RunReport, Trace
from calibri_lightning.rewards import RewardSet
from calibri_lightning.sampling.evaluate import Evaluation, Evaluator, UnitResult
from calibri_lightning.sampling.noise import noise_seed
from calibri_lightning.strategies.base import Strategy
from calibri_lightning.strategies.progress import ProgressLine

_log = logging.getLogger(__name__)

Floats = np.ndarray[Any, np.dtype[np.float64]]
PROBE_ROWS = 4
"""Rows of the forward that looks for dead sites."""


@dataclass
class CalibrationConfig:
    """What is calibrated."""

    granularity: Granularity = "gate"
    """How sites share scales: block, layer or gate."""
    members: MemberSpec = "cfg"
    """single, cfg (prompt and negative prompt), or a number of ensemble members."""
    guidance_scale: float = 7.0
    """Guidance at the start, for cfg."""
    weight_mode: WeightMode = "raw"
    """What is learned about the members' weights: fixed (nothing), raw (each), guidance (strength and guidance)."""


class CalibriModule(LightningModule):
    """Exposes the scales of a frozen diffusion transformer to an interchangeable strategy.

    Args:
        backbone: The model.
        rewards: Weight of each reward; names are built in or import paths "package.module:name".
        strategy: How the scales are improved.
        calibration: What is calibrated.
        num_steps: Sampling steps in training, validation and prediction.
        full_num_steps: Sampling steps of the full-cost baseline that the test compares with; 0 for none.
        rows_per_forward: Most rows (pictures x members) of one transformer forward; part of the result's last bits.
        init_from: A calibration.json, or a run folder that holds one, to start from.
        num_grid_prompts: Prompts of the before/after grid.
        seed: Seed of noise and search; follows seed_everything on the command line.

    Raises:
        UserError: If an argument is out of its range.
    """

    def __init__(
        self,
        backbone: Backbone,
        rewards: dict[str, float],
        strategy: Strategy,
        calibration: CalibrationConfig = CalibrationConfig(),  # noqa: B008 - read, never changed; jsonargparse wants it
        num_steps: int = 15,
        full_num_steps: int = 28,
        rows_per_forward: int = 128,
        init_from: str | None = None,
        num_grid_prompts: int = 12,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if num_steps < 1 or full_num_steps < 0 or num_grid_prompts < 0 or seed < 0:
            raise UserError(
                f"num_steps={num_steps}, full_num_steps={full_num_steps}, num_grid_prompts={num_grid_prompts}, "
                f"seed={seed}: num_steps must be at least 1 and the others at least 0. Correct it under model."
            )
        # Strategies differ in what a step is: CMA-ES has no optimiser, GRPO takes several steps a batch.
        self.automatic_optimization = False
        # A checkpoint holds what is trained; `require_trainable` makes up for the check that this turns off.
        self.strict_loading = False
        self.backbone, self.strategy, self.calibration = backbone, strategy, calibration
        self.rewards = RewardSet(rewards)
        self.num_steps, self.full_num_steps, self.seed = num_steps, full_num_steps, seed
        self.rows_per_forward, self.init_from, self.num_grid_prompts = rows_per_forward, init_from, num_grid_prompts
        self.networks = backbone.modules()
        self.budget = Budget(images=0, forwards=0, device_seconds=0.0)
        self.last_generation: GenerationStats | None = None
        self.trace = Trace()
        self._pace: tuple[int, float] = (0, 0.0)
        self._scores: dict[str, list[Floats]] = {}
        self._build()

    def _build(self) -> None:
        sites = find_sites(self.backbone.transformer)
        attachment = attach(self.backbone.transformer, sites)
        dead = probe(attachment, self._probe_forward)
        if dead:
            _log.warning("No effect on the output, left out: %s.", ", ".join(site.name for site in dead))
            attachment.detach()
            sites = tuple(site for site in sites if site not in dead)
            attachment = attach(self.backbone.transformer, sites)
        config = self.calibration
        self.layout: Layout = build_layout(
            sites, config.granularity, config.members, config.guidance_scale, config.weight_mode
        )
        self.start_theta: Floats = (
            load_start(self.init_from, self.layout, self.backbone.transformer) if self.init_from else self.layout.start
        )
        # A parameter, for DDP wants one and broadcasts buffers; float64, for it is the answer itself.
        self.theta = nn.Parameter(torch.from_numpy(self.start_theta.copy()))
        self._evaluator = Evaluator(self.backbone, attachment, self.layout, self.rewards, self.rows_per_forward)

    def _probe_forward(self) -> Tensor:
        backbone = self.backbone
        noise = backbone.noise(range(PROBE_ROWS))
        sigma = backbone.schedule(2)[1].to(noise).expand(PROBE_ROWS)
        return backbone.velocity(noise, sigma, backbone.encode([""] * PROBE_ROWS))

    @property
    def run_dir(self) -> Path:
        """The run's folder: the first logger's, the same on all ranks."""
        return Path(self.trainer.log_dir or self.trainer.default_root_dir)

    def configure_callbacks(self) -> Sequence[Callback]:
        """The strategy, whose state so joins every checkpoint, then the progress line, which reads its report."""
        return [self.strategy, ProgressLine()]

    def configure_optimizers(self) -> Any:
        """Whatever the strategy steps; None for a search without gradients."""
        return self.strategy.configure_optimizers(self)

    def setup(self, stage: str) -> None:
        """Checks what the trainer could have broken.

        Raises:
            UserError: If the precision plugin has cast theta.
        """
        if self.theta.dtype != torch.float64:
            raise UserError(
                f"theta is {self.theta.dtype}: trainer.precision casts every parameter, and half precision resolves "
                "scales near 1 no finer than 0.008. Use trainer.precision 32-true or bf16-mixed, and set the backbone's "
                "dtype to bfloat16 instead."
            )

    def on_fit_start(self) -> None:
        """Says what is about to happen."""
        if self.trainer.is_global_zero:
            layout, steps = self.layout, self.num_steps
            print(
                f"Calibrating {self.backbone.name} with {type(self.strategy).__name__}: {layout.num_parameters} parameters "
                f"({layout.granularity} scales of {len(layout.sites)} sites x {len(layout.members)} member(s), "
                f"weights {layout.weight_mode}), {steps} steps = {steps * len(layout.members)} forwards an image, "
                f"{self.strategy.prompts_per_step} prompts a generation. Run folder: {self.run_dir}",
                flush=True,
            )

    def evaluate(
        self,
        thetas: Floats,
        prompts: Sequence[Prompt],
        seeds: Sequence[int],
        cells: np.ndarray[Any, np.dtype[np.bool_]] | None = None,
        num_steps: int | None = None,
        done: Callable[[UnitResult], None] | None = None,
        known: Floats | None = None,
    ) -> Evaluation:
        """Scores candidates on prompts, shared among all ranks; see `Evaluator.evaluate`.

        Args:
            thetas: Candidates, float64 [K, n].
            prompts: Prompt of each of the S slots.
            seeds: Noise seed of each slot.
            cells: Which cells to score, bool [K, S]; all by default.
            num_steps: Sampling steps; the module's own by default.
            done: Called on this rank after each of its units.
            known: Rewards known beforehand, [K, S] with NaN elsewhere.

        Returns:
            Rewards and costs, the same on all ranks.
        """
        started = time.monotonic()
        answer = self._evaluator.evaluate(
            thetas,
            prompts,
            seeds,
            num_steps or self.num_steps,
            cells,
            self.trainer.global_rank,
            self.trainer.world_size,
            self._gather,
            done,
            known,
        )
        self.budget = Budget(
            self.budget.images + answer.num_images,
            self.budget.forwards + answer.num_forwards,
            self.budget.device_seconds + (time.monotonic() - started) * self.trainer.world_size,
        )
        return answer

    def _gather(self, values: Floats) -> Sequence[Floats]:
        gathered = self.all_gather(torch.from_numpy(values).to(self.device))
        assert isinstance(gathered, Tensor)
        # Lightning drops the world dimension on one process.
        return list(gathered.reshape(self.trainer.world_size, -1).cpu().numpy())

    def training_step(self, batch: PromptBatch, batch_idx: int) -> None:
        """Lets the strategy work; afterwards the budget is logged, the x-axis that all strategies share."""
        started, images = time.monotonic(), self.budget.images
        self.strategy.training_step(self, batch)
        self._pace = (self.budget.images - images, time.monotonic() - started)
        for name in ("images", "forwards", "device_seconds"):
            self.log(f"budget/{name}", float(getattr(self.budget, name)))

    def on_train_batch_end(self, outputs: Any, batch: PromptBatch, batch_idx: int) -> None:
        """Publishes the generation for the progress line and the plot."""
        report = getattr(self.strategy, "report", None)
        if report is not None:
            self.trace.images.append(float(report.images))
            self.trace.train.append(report.reward_mean)
            self.trace.sigma.append(report.sigma)
            images, seconds = self._pace
            left = None if report.total_generations is None else report.total_generations - report.generation
            self.last_generation = GenerationStats(
                report.generation,
                report.total_generations,
                report.reward_mean,
                report.reward_best,
                report.sigma,
                report.images,
                images / max(seconds, 1e-9),
                None if left is None else left * seconds,
                self.reward_name,
            )

    @property
    def reward_name(self) -> str:
        """What the optimised number is called: the reward's name, or a sum of them."""
        return " + ".join(reward.name for reward, weight in self.rewards.weighted if weight)

    def on_validation_epoch_start(self) -> None:
        """Fixes the vectors of this validation."""
        self._validated = dict(self.strategy.validation_thetas(self))
        self._scores = {name: [] for name in self._validated}

    def validation_step(self, batch: PromptBatch, batch_idx: int) -> None:
        """Scores the strategy's vectors on fixed prompts with fixed noise, the same for any number of ranks."""
        if not self._validated:
            return
        seeds = [noise_seed(self.seed, batch.step, prompt.index, 0) for prompt in batch.prompts]
        answer = self.evaluate(np.stack(list(self._validated.values())), batch.prompts, seeds)
        for row, name in enumerate(self._validated):
            self._scores[name].append(answer.rewards[row])

    def on_validation_epoch_end(self) -> None:
        """Hands the scores to the strategy, which keeps the best validated vector."""
        scores = self._close_validation()
        for name, score in scores.items():
            self.log(f"val/{name}", score)
        if self.trainer.state.fn == "fit":
            self._deliver()
        else:
            RunReport(self).print_scores(scores)

    def _close_validation(self) -> dict[str, float]:
        scores = {name: float(np.mean(np.concatenate(parts))) for name, parts in self._scores.items()}
        if not scores:
            return scores
        self.strategy.on_validated(self, scores)
        self.trace.base = scores.get("start", self.trace.base)
        if "mean" in scores:
            self.trace.validation_images.append(self.trace.images[-1] if self.trace.images else 0.0)
            self.trace.validation.append(scores["mean"])
        self._validated, self._scores = {}, {}
        return scores

    def _deliver(self) -> None:
        """Puts the strategy's answer into theta and calibration.json."""
        theta = self.strategy.answer(self)
        with torch.no_grad():
            self.theta.copy_(torch.from_numpy(theta))
        RunReport(self).write_calibration(theta)

    def on_train_end(self) -> None:
        """Validates what the last generations brought, if the validation interval missed it, and delivers."""
        data: Any = getattr(self.trainer, "datamodule", None)
        self.on_validation_epoch_start()
        for index, batch in enumerate(data.val_dataloader() if data is not None else []):
            self.validation_step(batch, index)
        if any(self._scores.values()):
            self._close_validation()
        self._deliver()
        RunReport(self).finish_training()

    def on_test_epoch_start(self) -> None:
        """Decides what is compared: base at equal and at full cost, and the calibration."""
        self._conditions = Conditions.of(self)

    def test_step(self, batch: PromptBatch, batch_idx: int) -> None:
        """Scores every condition on the same prompts and noise."""
        self._conditions.score(self, batch)

    def on_test_epoch_end(self) -> None:
        """Writes the table, summary.json and the grid."""
        RunReport(self).finish_test(self._conditions)

    def predict_step(self, batch: PromptBatch, batch_idx: int) -> list[str]:
        """Draws prompts with the calibration and writes one PNG each.

        Args:
            batch: The prompts.
            batch_idx: Unused.

        Returns:
            The files this rank wrote.
        """
        return RunReport(self).draw(batch)

    def calibrated_images(
        self, theta: Floats, prompts: Sequence[Prompt], step: int, num_steps: int
    ) -> Mapping[int, Tensor]:
        """Draws prompts without scoring them; each rank draws its share.

        Args:
            theta: Parameters, float64 [n].
            prompts: The prompts.
            step: Keys the noise, see `noise_seed`.
            num_steps: Sampling steps.

        Returns:
            Picture [3, H, W] by the position of its prompt.
        """
        seeds = [noise_seed(self.seed, step, prompt.index, 0) for prompt in prompts]
        units = self._evaluator.images(
            theta[None], prompts, seeds, num_steps, None, self.trainer.global_rank, self.trainer.world_size
        )
        return {cell.slot: image for cells, images in units for cell, image in zip(cells, images.cpu(), strict=True)}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keeps trainable keys alone: the frozen base is not ours to copy."""
        checkpoint["state_dict"] = keep_trainable(self, checkpoint["state_dict"])
        checkpoint["calibri_trace"] = self.trace.state()
        checkpoint["calibri_budget"] = [self.budget.images, self.budget.forwards, self.budget.device_seconds]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Checks that nothing trainable is missing, which non-strict loading would hide."""
        require_trainable(self, checkpoint["state_dict"])
        self.budget = Budget(*checkpoint["calibri_budget"])
        self.trace = Trace(**checkpoint["calibri_trace"])
