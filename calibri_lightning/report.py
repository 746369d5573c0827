"""What a run leaves behind: calibration.json, plots, grids, summary.json and the closing table."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Mapping
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from calibri_lightning.adapters.files import ADAPTER, AdapterRecord, write_adapter
from calibri_lightning.adapters.full import TRANSFORMER, write_transformer
from calibri_lightning.adapters.lora import lora_layers
from calibri_lightning.adapters.policy import BASE
from calibri_lightning.calibration import (
    CalibrationFile,
    ObtainedBy,
    WeightsRecord,
    base_digests,
    fingerprint,
    write_calibration,
)
from calibri_lightning.calibration.files import CALIBRATION, read_calibration
from calibri_lightning.conditions import Conditions, base_name
from calibri_lightning.diversity import SAMPLES, diversities
from calibri_lightning.errors import UserError
from calibri_lightning.evaluation import (
    Convergence,
    Diversity,
    Panel,
    plot_convergence,
    plot_scales,
    render_table,
    save_grid,
    summarise,
    write_summary,
)
from calibri_lightning.prompts import PromptBatch
from calibri_lightning.sampling.noise import TEST_STEP
from calibri_lightning.sampling.sharing import advice
from calibri_lightning.strategies.base import Candidate

if TYPE_CHECKING:
    from calibri_lightning.module import CalibriModule


class RunReport:
    """Writes and prints for one module; only rank 0 does either, but all ranks must call.

    Args:
        module: A module with a trainer.
    """

    def __init__(self, module: CalibriModule) -> None:
        self.module, self.folder = module, module.run_dir
        self.speaks = module.trainer.is_global_zero

    def announce(self) -> None:
        """Says what a fit is about to do, and what to set where its processes would wait for each other."""
        if not self.speaks:
            return
        module, words = self.module, self.module.strategy.words
        print(
            f"{words.doing} {module.backbone.name} with {type(module.strategy).__name__}: "
            f"{self._trained()}; {module.strategy.describe_step(module)}. Run folder: {self.folder}",
            flush=True,
        )
        for sentence in advice(module.strategy.requests(module), module.trainer.world_size):
            print(f"Warning: {sentence}", file=sys.stderr, flush=True)

    def _trained(self) -> str:
        """What is improved, and how many numbers it has."""
        layout, policy = self.module.layout, self.module.policy
        parts = []
        if policy.trains in ("scales", "both"):
            parts.append(
                f"{layout.num_parameters} parameters ({layout.granularity} scales of {len(layout.sites)} sites x "
                f"{len(layout.members)} member(s), weights {layout.weight_mode})"
            )
        if policy.network_names:
            count = sum(policy.parameters()[name].numel() for name in policy.network_names)
            parts.append(f"{count:,} weights of {'the transformer' if policy.trains == 'full' else 'a LoRA'}")
        return " and ".join(parts)

    def write_answer(self) -> None:
        """Writes calibration.json, and beside it the adapter."""
        if not self.speaks:
            return
        module, best = self.module, self.module.strategy.best
        self._folder()
        file = CalibrationFile(
            names=module.layout.names,
            values=tuple(float(value) for value in module.answer.theta),
            granularity=module.layout.granularity,
            members=module.layout.members,
            weight_mode=module.layout.weight_mode,
            site_options=module.layout.site_options,
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
            adapter=self._write_weights(),
            weights=self._weights(),
        )
        write_calibration(self.folder / CALIBRATION, file)

    def _write_weights(self) -> AdapterRecord | None:
        """Writes the network weights of the answer, where they are not those of the base; what acted as an adapter."""
        module, policy = self.module, self.module.policy
        transformer, weights = module.backbone.transformer, module.answer.weights
        if policy.trains == "full":
            write_transformer(self.folder / TRANSFORMER, transformer, policy.tensors(weights))
        if not lora_layers(transformer):
            return module.adapter
        tensors = policy.tensors(weights) if policy.network_names else None
        digest = write_adapter(self.folder / ADAPTER, transformer, tensors, module.backbone.name)
        loaded = None if policy.network_names else module.adapter
        return AdapterRecord(ADAPTER if loaded is None else loaded.source, digest)

    def _weights(self) -> WeightsRecord | None:
        """The weights under the answer, where they are not those of the published model."""
        module = self.module
        transformer, policy, start = module.backbone.transformer, module.policy, module.starts_from.transformer
        if policy.trains == "full":
            return WeightsRecord(base_digests(transformer, policy.tensors(module.answer.weights)), TRANSFORMER)
        merged = module.adapter.source if module.adapter is not None and module.adapter.merged else ""
        if start is None and not merged:
            return None
        return WeightsRecord(module.fixed_weights.base, "" if start is None else str(start), merged)

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
        self._folder()
        plots = [self.folder / "convergence.png"]
        if module.policy.trains in ("scales", "both"):
            plots.insert(0, self.folder / "scales.png")
            plot_scales(plots[0], module.layout.names, module.answer.theta.tolist(), names)
        chosen = None if best is None else (trace.images_at(best.generation), best.score)
        course = Convergence(
            trace.images,
            # Training shows rewards as they are, validation in stds where they are normalised: no common axis.
            [math.nan] * len(trace.train) if module.blend.changes_units else trace.train,
            trace.pace,
            trace.validation_images,
            trace.validation,
            None if math.isnan(trace.base) else trace.base,
            chosen,
            module.reward_name,
            trace.pace_name,
        )
        plot_convergence(self.folder / "convergence.png", course)
        if best is not None and best.origin == "start":
            print("Nothing better than the start was found. More steps may help, or more prompts a step.")
        elif best is not None:
            steps = f"{best.generation} {module.strategy.words.step}{'' if best.generation == 1 else 's'}"
            print(f"Chosen on the validation prompts: the {best.origin} after {steps}.")
        reason = getattr(module.strategy, "stop_reason", None)
        if reason:
            print(f"Stopped early: {reason}.")
        note = " (the start, unchanged)" if module.same(module.answer, module.start) else ""
        print(f"Calibration: {self.folder / CALIBRATION}{note}")
        print(f"Plots: {', '.join(map(str, plots))}")
        if (self.folder / ADAPTER).is_dir():
            print(f"LoRA: {self.folder / ADAPTER}")
        if (self.folder / TRANSFORMER).is_dir():
            print(f"Weights: {self.folder / TRANSFORMER}")

    def finish_test(self, conditions: Conditions) -> None:
        """Writes summary.json and the before/after grid, and prints the table.

        Args:
            conditions: All conditions, scored.
        """
        module = self.module
        panels, captions = self._panels(conditions)
        diversity = self._diversity(conditions)
        if not self.speaks:
            return
        calibration = self._tested() if conditions.has_calibrated else "none: the scales are those of the base model"
        results = conditions.results(module)
        if diversity:
            results = [replace(result, diversity=own) for result, own in zip(results, diversity, strict=True)]
        watched = [name for entry in module.rewards.watched for name in entry.names]
        summary = summarise(
            results,
            module.reward_name,
            module.budget,
            calibration,
            watched=watched,
            calibration_sha256=self._sha256() if calibration == self.folder / CALIBRATION else "",
        )
        self._folder()
        write_summary(self.folder / "summary.json", summary)
        print(render_table(summary))
        print(f"Summary: {self.folder / 'summary.json'}")
        if panels:
            save_grid(self.folder / "before_after.png", panels, captions, columns=3)
            print(f"Pictures: {self.folder / 'before_after.png'}")

    def _tested(self) -> Path:
        """Where the calibration under test is; one that came out of a checkpoint is written here."""
        own = self.folder / CALIBRATION
        if own.is_file():
            return own
        start = self.module.starts_from
        given = start.calibration or start.adapter or start.transformer
        if given is not None and self.module.resumed_step is None:
            return Path(given)
        self.write_answer()
        return own

    def _sha256(self) -> str:
        """Digest of what was tested, by which its summary is known to belong to it."""
        file = read_calibration(self.folder / CALIBRATION)
        # A checkpoint under test may hold other values than the run's last word.
        return replace(file, values=tuple(float(value) for value in self.module.answer.theta)).sha256

    def _panels(self, conditions: Conditions) -> tuple[list[Panel], list[str]]:
        """The first test prompts, drawn under every condition; all ranks draw, all get all pictures."""
        module = self.module
        data: Any = getattr(module.trainer, "datamodule", None)
        batch = PromptBatch(TEST_STEP, data.prompts("test")[: module.num_grid_prompts] if data is not None else ())
        if not batch.prompts:
            return [], []
        panels = []
        for way in (way for way in conditions.ways if way.role != "weights"):
            pictures = torch.zeros(len(batch.prompts), 3, *module.backbone.image_size, device=module.device)
            for position, picture in module.pictures(way.candidate, batch, way.num_steps).items():
                pictures[position] = picture.to(module.device)
            # Each picture was drawn by one rank and is 0 on the others.
            whole = module.trainer.strategy.reduce(pictures, reduce_op="sum")
            assert isinstance(whole, Tensor)
            panels.append(Panel(way.name, whole.cpu()))
        return panels, [prompt.text for prompt in batch.prompts]

    def _diversity(self, conditions: Conditions) -> tuple[Diversity, ...]:
        """How different samples of the first test prompts are, under every condition; all ranks draw."""
        module = self.module
        data: Any = getattr(module.trainer, "datamodule", None)
        prompts = () if data is None else data.prompts("test")[: module.num_diversity_prompts]
        if prompts and self.speaks:
            print(f"Diversity: {SAMPLES} samples of each of {len(prompts)} prompts under every condition", flush=True)
        return diversities(module, conditions.ways, prompts)

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

        drawn = self.module.pictures(self.module.answer, batch, self.module.num_steps)
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

    def finish_prediction(self) -> None:
        """Says where the pictures are, and which scales drew them."""
        if self.speaks:
            module = self.module
            base = module.same(module.answer, Candidate(module.layout.start, BASE))
            plain = (
                "by the base model" if base_name(module) == "base" else "with the weights of init_from, all scales 1"
            )
            by = plain if base else "with the calibration"
            print(f"Pictures, drawn {by}: {self.folder / 'images'}")

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
