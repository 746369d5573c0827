"""What a run leaves behind: calibration.json, plots, grids, summary.json and the closing table."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from calibri_lightning.calibration import CalibrationFile, ObtainedBy, fingerprint, write_calibration
from calibri_lightning.checkpoint import CALIBRATION
from calibri_lightning.errors import UserError
from calibri_lightning.evaluation import (
    Condition,
    Convergence,
    Panel,
    plot_convergence,
    plot_scales,
    render_table,
    save_grid,
    summarise,
    verdict,
    write_summary,
)
from calibri_lightning.sampling.noise import noise_seed

if TYPE_CHECKING:
    from calibri_lightning.module import CalibriModule
    from calibri_lightning.prompts import PromptBatch

Floats = NDArray[np.float64]


@dataclass
class Trace:
    """The course of a run, for the convergence plot; part of every checkpoint."""

    images: list[float] = field(default_factory=list)
    """Training images up to the end of each generation."""
    train: list[float] = field(default_factory=list)
    """Mean reward of each generation."""
    sigma: list[float] = field(default_factory=list)
    """Step size after each generation."""
    validation_images: list[float] = field(default_factory=list)
    """Training images at each validation."""
    validation: list[float] = field(default_factory=list)
    """Validation score of the search's mean."""
    base: float = math.nan
    """Validation score of the start."""

    def state(self) -> dict[str, Any]:
        """The trace as plain lists, which `torch.load(weights_only=True)` reads.

        Returns:
            What `Trace(**state)` takes.
        """
        return {name: list(v) if isinstance(v, list) else v for name, v in vars(self).items()}


@dataclass(frozen=True)
class _Way:
    """One way to make the test pictures."""

    name: str
    role: Literal["base", "calibrated"]
    theta: Floats
    num_steps: int


class Conditions:
    """The conditions of a test and their scores so far.

    Args:
        ways: How each condition makes its pictures.
    """

    def __init__(self, ways: tuple[_Way, ...]) -> None:
        self.ways = ways
        self._rewards: list[dict[str, list[Floats]]] = [{} for _ in ways]

    @classmethod
    def of(cls, module: CalibriModule) -> Conditions:
        """Base and calibrated at the module's steps, and the base at full cost.

        Args:
            module: The module; its theta is what is tested.

        Returns:
            The conditions; base alone where theta is the untouched model.
        """
        theta = module.theta.detach().cpu().numpy().astype(np.float64)
        base, few, full = module.layout.start, module.num_steps, module.full_num_steps
        ways = [_Way(f"base @ {few} steps", "base", base, few)]
        if full and full != few:
            ways.append(_Way(f"base @ {full} steps", "base", base, full))
        if not np.array_equal(theta, base):
            ways.append(_Way(f"calibrated @ {few} steps", "calibrated", theta, few))
        return cls(tuple(ways))

    def score(self, module: CalibriModule, batch: PromptBatch) -> None:
        """Scores a batch under every condition, with the same noise.

        Args:
            module: The module.
            batch: The prompts.
        """
        seeds = [noise_seed(module.seed, batch.step, prompt.index, 0) for prompt in batch.prompts]
        for way, rewards in zip(self.ways, self._rewards, strict=True):
            answer = module.evaluate(way.theta[None], batch.prompts, seeds, num_steps=way.num_steps)
            for name, values in answer.per_reward.items():
                rewards.setdefault(name, []).append(values[0])
            if len(module.rewards.weighted) > 1:
                rewards.setdefault(module.reward_name, []).append(answer.rewards[0])

    def results(self, num_members: int) -> list[Condition]:
        """The conditions with all their rewards.

        Args:
            num_members: Forwards of a sampling step.

        Returns:
            One `Condition` each.
        """
        return [
            Condition(
                way.name,
                way.role,
                way.num_steps,
                way.num_steps * num_members,
                {name: np.concatenate(parts) for name, parts in rewards.items()},
            )
            for way, rewards in zip(self.ways, self._rewards, strict=True)
        ]


class RunReport:
    """Writes and prints for one module; only rank 0 does either, but all ranks must call.

    Args:
        module: A module with a trainer.
    """

    def __init__(self, module: CalibriModule) -> None:
        self.module, self.folder = module, module.run_dir
        self.speaks = module.trainer.is_global_zero

    def write_calibration(self, theta: Floats) -> None:
        """Writes calibration.json.

        Args:
            theta: Parameters, float64 [n].
        """
        if not self.speaks:
            return
        module, best = self.module, self.module.strategy.best
        file = CalibrationFile(
            names=module.layout.names,
            values=tuple(float(value) for value in theta),
            granularity=module.layout.granularity,
            members=module.layout.members,
            weight_mode=module.layout.weight_mode,
            model=fingerprint(module.backbone.transformer, module.backbone.name),
            obtained_by=ObtainedBy(
                strategy=type(module.strategy).__name__,
                reward=module.reward_name,
                num_steps=module.num_steps,
                images=module.strategy.images,
                seed=module.seed,
                start_score=None if math.isnan(module.trace.base) else module.trace.base,
                validation_score=None if best is None else best.score,
                package_version=metadata.version("calibri-lightning"),
            ),
        )
        self._folder()
        write_calibration(self.folder / CALIBRATION, file)

    def print_scores(self, scores: Mapping[str, float]) -> None:
        """Prints validation scores.

        Args:
            scores: Mean reward by vector.
        """
        if self.speaks:
            print(f"{self.module.reward_name} on the validation prompts:")
            for name, score in scores.items():
                print(f"  {name:<6} {score:.4f}")

    def finish_training(self) -> None:
        """Draws the scales and the convergence, and says where everything is."""
        if not self.speaks:
            return
        module, trace, best = self.module, self.module.trace, self.module.strategy.best
        names = [f"{member.prompt} (member {i})" for i, member in enumerate(module.layout.members)]
        theta = module.theta.detach().cpu().numpy()
        plot_scales(self.folder / "scales.png", module.layout.names, theta.tolist(), names)
        chosen = None if best is None else (self._images_at(best.generation), best.score)
        course = Convergence(
            trace.images,
            trace.train,
            trace.sigma,
            trace.validation_images,
            trace.validation,
            None if math.isnan(trace.base) else trace.base,
            chosen,
            module.reward_name,
        )
        plot_convergence(self.folder / "convergence.png", course)
        if best is not None:
            where = "the start itself: nothing beat it" if best.origin == "start" else f"the {best.origin}"
            print(f"Chosen on the validation prompts: {where}, after {best.generation} generations.")
        reason = getattr(module.strategy, "stop_reason", None)
        if reason:
            print(f"Stopped early: {reason}.")
        print(f"Calibration: {self.folder / CALIBRATION}")
        print(f"Plots: {self.folder / 'scales.png'}, {self.folder / 'convergence.png'}")

    def _images_at(self, generation: int) -> float:
        return 0.0 if generation == 0 else self.module.trace.images[generation - 1]

    def finish_test(self, conditions: Conditions) -> None:
        """Writes summary.json and the before/after grid, and prints the table.

        Args:
            conditions: All conditions, scored.
        """
        module = self.module
        panels, captions = self._panels(conditions)
        if not self.speaks:
            return
        results = conditions.results(len(module.layout.members))
        summary = summarise(results, module.reward_name, module.budget, self.folder / CALIBRATION)
        self._folder()
        write_summary(self.folder / "summary.json", summary)
        print(render_table(summary))
        if any(way.role == "calibrated" for way in conditions.ways):
            print(verdict(summary))
        print(f"Summary: {self.folder / 'summary.json'}")
        if panels:
            save_grid(self.folder / "before_after.png", panels, captions, columns=3)
            print(f"Pictures: {self.folder / 'before_after.png'}")

    def _panels(self, conditions: Conditions) -> tuple[list[Panel], list[str]]:
        """The first test prompts, drawn under every condition."""
        from calibri_lightning.data import TEST_STEP

        module = self.module
        data: Any = getattr(module.trainer, "datamodule", None)
        prompts = data.prompts("test")[: module.num_grid_prompts] if data is not None else ()
        panels = []
        for way in conditions.ways:
            drawn = module.calibrated_images(way.theta, prompts, TEST_STEP, way.num_steps)
            whole = module.trainer.strategy.broadcast(drawn) if module.trainer.world_size == 1 else self._join(drawn)
            if prompts:
                panels.append(Panel(way.name, torch.stack([whole[i] for i in range(len(prompts))])))
        return panels, [prompt.text for prompt in prompts]

    def _join(self, mine: Mapping[int, Tensor]) -> dict[int, Tensor]:
        parts: list[Any] = [None] * self.module.trainer.world_size
        torch.distributed.all_gather_object(parts, dict(mine))
        return {position: image for part in parts for position, image in part.items()}

    def draw(self, batch: PromptBatch) -> list[str]:
        """Draws prompts with the module's theta and writes them.

        Args:
            batch: The prompts.

        Returns:
            The files that this rank wrote.

        Raises:
            UserError: If the folder cannot be written.
        """
        from PIL import Image

        theta = self.module.theta.detach().cpu().numpy().astype(np.float64)
        drawn = self.module.calibrated_images(theta, batch.prompts, batch.step, self.module.num_steps)
        folder = self._folder("images")
        files = []
        for position, image in sorted(drawn.items()):
            prompt = batch.prompts[position]
            slug = re.sub(r"[^a-z0-9]+", "-", prompt.text.lower()).strip("-")[:60]
            path = folder / f"{prompt.index:05d}-{slug}.png"
            pixels = (image.permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()
            try:
                Image.fromarray(pixels).save(path)
            except OSError as error:
                raise UserError(
                    f"Cannot write {path} ({error.strerror}). Free space, or choose another folder with "
                    "--trainer.default_root_dir."
                ) from error
            files.append(str(path))
        return files

    def _folder(self, name: str = "") -> Path:
        folder = self.folder / name
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"Cannot create the folder {folder} ({error.strerror}). Choose one that you may write to with "
                "--trainer.default_root_dir."
            ) from error
        return folder
