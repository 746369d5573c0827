"""The prompts of a run as a LightningDataModule.

Every rank sees every batch whole: strategies decide which rank draws which picture, so no loader shards,
shuffles or drops anything, and `trainer.use_distributed_sampler` has nothing to act on.
"""

from __future__ import annotations

from typing import Any

import torch
from lightning import LightningDataModule

from calibri_lightning.errors import UserError
from calibri_lightning.loaders import PromptChunks, PromptTicker
from calibri_lightning.prompts import Duplicates, Prompt, PromptBatch, check_source, place, read_prompts, some
from calibri_lightning.sampling.noise import PREDICT_STEP, TEST_STEP, VALIDATION_STEP


class PromptData(LightningDataModule):
    """Prompts to train on, to choose the best calibration on, and to report on.

    A source is a path (.txt with one prompt a line, .json, .jsonl, .csv, .parquet),
    "hf:dataset[:split[:column]]" or "shapes:train|val|test". Texts must not be shared between sources: what
    is reported would not be held out.

    Args:
        train: Source of the prompts to train on.
        val: Source of the held-out prompts on which the best calibration is chosen.
        test: Source of the held-out prompts that are reported on; nothing is chosen on them.
        predict: Source of the prompts to draw with `predict`.
        predict_prompts: The prompts to draw with `predict`, written out, instead of `predict`.
        seed: Seed of the order in which training prompts are drawn.
        eval_batch_size: Prompts a batch in validation, test and predict; no result depends on it.
        val_size: Use only the first N validation prompts; all of them if null.
        test_size: Use only the first N test prompts; all of them if null.
        duplicates: What to do with a prompt that a source holds twice: "error" refuses it, "keep" draws it
            with other noise each time, "drop" keeps the first.
        allow_overlap: Accept texts that are shared between train, val and test.

    Raises:
        UserError: When a number is below 1, the seed is negative, a file is missing or its format unknown.
    """

    def __init__(
        self,
        train: str | None = None,
        val: str | None = None,
        test: str | None = None,
        predict: str | None = None,
        predict_prompts: list[str] | None = None,
        seed: int = 0,
        eval_batch_size: int = 64,
        val_size: int | None = None,
        test_size: int | None = None,
        duplicates: Duplicates = "error",
        allow_overlap: bool = False,
    ) -> None:
        super().__init__()
        sizes = (("eval_batch_size", eval_batch_size), ("val_size", val_size), ("test_size", test_size))
        for name, value in sizes:
            if value is not None and value < 1:
                raise UserError(f"data.{name}={value}: must be at least 1.")
        if seed < 0:
            raise UserError(f"data.seed={seed}: must be at least 0.")
        if predict and predict_prompts:
            raise UserError("data.predict and data.predict_prompts are both given; give one of them.")
        if any(not text.strip() for text in predict_prompts or ()):
            raise UserError(f"data.predict_prompts={predict_prompts} holds a blank prompt; every prompt needs a text.")
        self.sources = {"train": train, "val": val, "test": test, "predict": predict}
        for source in self.sources.values():
            if source is not None:
                check_source(source)
        self.predict_prompts = predict_prompts
        self.seed = seed
        self.eval_batch_size = eval_batch_size
        self.sizes = {"val": val_size, "test": test_size}
        self.duplicates = duplicates
        self.allow_overlap = allow_overlap
        self._read: dict[str, tuple[Prompt, ...]] = {}
        self._ticker: PromptTicker | None = None

    def prepare_data(self) -> None:
        """Download datasets of the Hub, once a node."""
        for source in self.sources.values():
            if source is not None and source.startswith("hf:"):
                read_prompts(source, self.duplicates)

    def setup(self, stage: str) -> None:
        """Read and check the prompts of a stage; `fit` reads the test prompts too, to refuse bad ones early.

        Args:
            stage: "fit", "validate", "test" or "predict".

        Raises:
            UserError: When a source is missing or malformed, or sources share texts.
        """
        parts = {
            "fit": ("train", "val", "test"),
            "validate": ("val",),
            "test": ("test",),
            "predict": ("predict",),
        }
        for part in parts[stage]:
            source = self.sources[part]
            if source is not None and part not in self._read:
                self._read[part] = read_prompts(source, self.duplicates)
        self._given(parts[stage][0])
        if stage == "fit" and not self.allow_overlap:
            for first, second in (("train", "val"), ("train", "test"), ("val", "test")):
                self._refuse_overlap(first, second)

    def prompts(self, part: str) -> tuple[Prompt, ...]:
        """The prompts of a part, cut to its size; empty when none was given.

        Args:
            part: "train", "val", "test" or "predict".

        Returns:
            The prompts, after `setup` has read them.
        """
        if part == "predict" and self.predict_prompts:
            return tuple(Prompt(text, index) for index, text in enumerate(self.predict_prompts))
        return self._read.get(part, ())[: self.sizes.get(part)]

    def train_dataloader(self) -> PromptTicker:
        """The endless loader of training steps.

        Returns:
            A loader whose position Lightning saves with the run.

        Raises:
            UserError: When no training prompts were given, or there is no trainer.
        """
        if self.trainer is None:
            raise UserError(
                "PromptData.train_dataloader needs a trainer: pass the data to Trainer.fit(datamodule=...)."
            )
        module: Any = self.trainer.lightning_module  # a CalibriModule; not imported, it is the heavier half
        progress: Any = self.trainer.fit_loop.epoch_loop.batch_progress
        self._ticker = PromptTicker(
            self._given("train"),
            self.seed,
            module.strategy.prompts_per_step,
            # Lightning counts a step ready before it runs and processed before `on_train_batch_end`, where
            # checkpoints are saved; on a restart it sets both back to what was completed (2.6.6).
            in_flight=lambda: progress.current.ready > progress.current.processed,
        )
        return self._ticker

    def val_dataloader(self) -> PromptChunks | list[PromptBatch]:
        """All validation prompts; no loader when none were given, so that `fit` runs without validation.

        Returns:
            The loader.
        """
        prompts = self.prompts("val")
        # Lightning reads an empty list as "no loaders".
        return PromptChunks(prompts, VALIDATION_STEP, self.eval_batch_size) if prompts else []

    def test_dataloader(self) -> PromptChunks:
        """All test prompts.

        Returns:
            The loader.

        Raises:
            UserError: When no test prompts were given.
        """
        return PromptChunks(self._given("test"), TEST_STEP, self.eval_batch_size)

    def predict_dataloader(self) -> PromptChunks:
        """All prompts to draw.

        Returns:
            The loader.

        Raises:
            UserError: When no prompts were given.
        """
        return PromptChunks(self._given("predict"), PREDICT_STEP, self.eval_batch_size)

    def on_before_batch_transfer(self, batch: PromptBatch, dataloader_idx: int) -> PromptBatch:
        """Tell the ticker which training step begins.

        Args:
            batch: The batch that the trainer is about to run.
            dataloader_idx: Unused.

        Returns:
            The batch as it is.
        """
        if batch.step >= 0 and self._ticker is not None:
            self._ticker.begin(batch.step)
        return batch

    def transfer_batch_to_device(self, batch: PromptBatch, device: torch.device, dataloader_idx: int) -> PromptBatch:
        """Leave the batch alone: it holds no tensors, and Lightning refuses to walk a frozen dataclass.

        Args:
            batch: The batch.
            device: Unused.
            dataloader_idx: Unused.

        Returns:
            The batch as it is.
        """
        return batch

    def _given(self, part: str) -> tuple[Prompt, ...]:
        prompts = self.prompts(part)
        if not prompts:
            written = ", or some after data.predict_prompts" if part == "predict" else ""
            raise UserError(f"there are no {part} prompts: name their source with data.{part}{written}.")
        return prompts

    def _refuse_overlap(self, first: str, second: str) -> None:
        rows = {prompt.text: prompt.index for prompt in self._read.get(first, ())}
        shared = [prompt for prompt in self._read.get(second, ()) if prompt.text in rows]
        if not shared:
            return
        one, other = str(self.sources[first]), str(self.sources[second])
        named = [f"{p.text!r} ({place(one, rows[p.text])} and {place(other, p.index)})" for p in shared]
        raise UserError(
            f"data.{first}={one!r} and data.{second}={other!r} share {len(shared)} prompts: {some(named)}."
            f" They must not overlap, or {second} would not be held out: remove them from one, or set"
            " data.allow_overlap to true."
        )
