"""The LightningModule: a frozen backbone, its calibration, rewards, and the strategy that improves theta."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule
from torch import Tensor, nn

from calibri_lightning.adapters.lora import LoraOptions
from calibri_lightning.adapters.policy import LIVE, Policy
from calibri_lightning.arrays import Cells, Floats
from calibri_lightning.assembly import DEFAULT_CALIBRATION, CalibrationConfig, assemble, ready_network
from calibri_lightning.backbones import Backbone
from calibri_lightning.backbones.native import Native
from calibri_lightning.calibration import FixedWeights, fingerprint, load_start
from calibri_lightning.checkpoint import run_checkpoint
from calibri_lightning.conditions import Conditions
from calibri_lightning.engine import Engine
from calibri_lightning.errors import UserError
from calibri_lightning.evaluation.progress import GenerationStats
from calibri_lightning.evaluation.summary import Budget
from calibri_lightning.launch.agreement import checksum, require_agreement
from calibri_lightning.launch.pulse import Pulse
from calibri_lightning.preflight import check_negatives, check_precision, check_strategy
from calibri_lightning.prompts import Prompt, PromptBatch
from calibri_lightning.prompts import fingerprint as prompts_digest
from calibri_lightning.report import RunReport
from calibri_lightning.resume import restore_run, save_run
from calibri_lightning.rewards import RewardConfig, RewardSet
from calibri_lightning.rewards.blend import Blend, Normalise
from calibri_lightning.rewards.watch import Watch
from calibri_lightning.sampling.grid import Evaluation, UnitResult
from calibri_lightning.sampling.noise import noise_seed
from calibri_lightning.sharding.cut import check_can_be_cut, cut_up
from calibri_lightning.sharding.strategy import Sharded
from calibri_lightning.stacking import parse_start
from calibri_lightning.strategies.base import Candidate, Strategy
from calibri_lightning.strategies.progress import ProgressLine, TraceRecorder
from calibri_lightning.strategies.selection import START
from calibri_lightning.trace import Trace
from calibri_lightning.validation import Validation, validate, validation_metrics

PARTS = {"fit": ("train", "val", "test"), "validate": ("val",), "test": ("test",), "predict": ("predict",)}
"""The prompts that a stage needs, and fit those of the test that may follow."""
PROMPT_PARTS = ("train", "val", "test", "predict")
"""All parts of the data."""


class CalibriModule(LightningModule):
    """Exposes the scales of a frozen diffusion transformer to an interchangeable strategy.

    Args:
        backbone: The model.
        rewards: Weight of each reward, or {weight, options, reward, floor, cap, on_failure}; names are built in or
            import paths "package.module:name".
        strategy: How the scales are improved.
        calibration: What is calibrated.
        normalise: What is done to each reward before it is weighted: none, running (mean 0 and std 1 over the training
            so far), z_score or rank (among the pictures of a prompt that compete).
        held_out: Names, or names with {options}, of rewards that validation and test report and nothing is chosen by;
            where they fall while the optimised ones rise, the run says so.
        num_steps: Sampling steps in training, validation and prediction.
        full_num_steps: Sampling steps of the full-cost baseline that the test compares with; 0 for none.
        rows_per_forward: Most rows (pictures x members) of one transformer forward; part of the result's last bits.
            auto measures what the device takes; a checkpoint remembers what it found.
        balance_over: Number of processes (GPUs) among which the pictures of every request are shared evenly, as they
            then are among any divisor of it: the number of units becomes a multiple of it, and they smaller. Part of
            the result's last bits; 1 fills all forwards but the last.
        compile: Compile the transformer's blocks: a minute or more at the start, and again for each new number of rows,
            then faster forwards. Needs a C++ compiler. Part of the result's last bits.
        overlap_scoring: Score pictures in a second thread while the next ones are sampled; no result depends on it. Off
            for a reward that must run in the main thread (signals, connections that belong to a thread).
        lora: The LoRA, where the strategy trains one and init_from brings none.
        init_from: What to start from: a calibration.json, an adapter (peft's format, a folder or a Hub id), a run
            folder that holds them, or several of these.
        merge_adapter: Add the adapter of init_from to the weights: it can no longer be trained or told from the base.
        num_grid_prompts: Prompts of the before/after grid.
        num_diversity_prompts: Test prompts of which every condition draws 8 samples, to report how different they are;
            0 for none.
        seed: Seed of noise and search; follows seed_everything on the command line.

    Raises:
        UserError: If an argument is out of its range.
    """

    def __init__(
        self,
        backbone: Backbone,
        rewards: dict[str, float | RewardConfig],
        strategy: Strategy,
        calibration: CalibrationConfig = DEFAULT_CALIBRATION,
        normalise: Normalise = "none",
        held_out: dict[str, RewardConfig | None] | list[str] | None = None,
        num_steps: int = 15,
        full_num_steps: int = 28,
        rows_per_forward: int | Literal["auto"] = "auto",
        balance_over: int = 1,
        compile: bool = False,
        overlap_scoring: bool = True,
        lora: LoraOptions | None = None,
        init_from: str | list[str] | None = None,
        merge_adapter: bool = False,
        num_grid_prompts: int = 12,
        num_diversity_prompts: int = 8,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if num_steps < 1 or min(full_num_steps, num_grid_prompts, num_diversity_prompts, seed) < 0:
            raise UserError(
                f"num_steps={num_steps}, full_num_steps={full_num_steps}, num_grid_prompts={num_grid_prompts}, "
                f"num_diversity_prompts={num_diversity_prompts}, seed={seed}: num_steps must be at least 1 and the "
                "others at least 0. Correct it under model."
            )
        if balance_over < 1:
            raise UserError(
                f"balance_over is {balance_over}; it is a number of processes, at least 1. Set model.balance_over to "
                "the number that you run on, or to 1 for forwards as large as rows_per_forward allows."
            )
        # Strategies differ in what a step is: CMA-ES has no optimiser, GRPO takes several steps a batch.
        self.automatic_optimization = False
        # A checkpoint holds what is trained; `require_same` makes up for the check that this turns off.
        self.strict_loading = False
        self.backbone, self.strategy, self.rewards = backbone, strategy, RewardSet(rewards, held_out or ())
        self.blend = Blend(self.rewards.optimised, normalise)
        self.watch = Watch()
        self.num_steps, self.full_num_steps, self.seed = num_steps, full_num_steps, seed
        self.num_grid_prompts = num_grid_prompts
        self.num_diversity_prompts = num_diversity_prompts
        # Text encoders that come and go are not for Lightning to move.
        self.networks = backbone.resident_modules()
        self.budget = Budget(images=0, forwards=0, device_seconds=0.0)
        self.last_generation: GenerationStats | None = None
        self.trace = Trace()
        self.resumed_step: int | None = None
        self.pulse = Pulse()
        self.run_dir = Path()
        self.starts_from = parse_start(init_from)
        self.adapter = ready_network(backbone.transformer, self.starts_from, strategy.trains, lora, merge_adapter, seed)
        self.layout, attachment = assemble(backbone, calibration)
        calibration_file = self.starts_from.calibration
        self.start_theta: Floats = (
            self.layout.start
            if calibration_file is None
            else load_start(calibration_file, self.layout, backbone.transformer)
        )
        # A parameter, for DDP wants one and broadcasts buffers; float64, for it is the answer itself.
        self.theta = nn.Parameter(torch.from_numpy(self.start_theta.copy()))
        self.policy = Policy(
            self.theta, backbone.transformer, strategy.trains, torch.from_numpy(self.layout.start.copy())
        )
        self.answer = self.start
        self.engine = Engine(
            backbone, attachment, self.layout, self.rewards, rows_per_forward, compile, overlap_scoring, balance_over
        )

    @cached_property
    def fixed_weights(self) -> FixedWeights:
        """What tells the weights apart that the run does not train."""
        return FixedWeights.of(self.backbone.transformer, self.policy.network_names)

    @property
    def start(self) -> Candidate:
        """What the run began with."""
        return Candidate(self.start_theta, START if START in self.policy.copies else LIVE)

    def same(self, one: Candidate, other: Candidate) -> bool:
        """Whether two candidates draw the same pictures.

        Args:
            one: A candidate.
            other: Another one.

        Returns:
            True where both their scales and their network weights agree.
        """
        return np.array_equal(one.theta, other.theta) and self.policy.same(one.weights, other.weights)

    @property
    def reward_name(self) -> str:
        """What the optimised number is called where candidates are compared: in validations and tests."""
        return f"{self.rewards.title} (in stds)" if self.blend.changes_units else self.rewards.title

    @property
    def judged_by(self) -> Mapping[str, str | int]:
        """All that scores depend on besides theta, prompts and seeds; a resumed search must find it unchanged."""
        validation = self._prompts("val")
        return {
            "rewards": self.rewards.recipe,
            **({} if self.blend.is_plain else {"normalise": self.blend.normalise}),
            "num_steps": self.num_steps,
            "members": ", ".join(f"{member.prompt} {member.weight:g}" for member in self.layout.members),
            "weight_mode": self.layout.weight_mode,
            "pictures a unit (model.rows_per_forward)": self.engine.evaluator.cells_per_unit,
            **({} if self.engine.balance_over == 1 else {"model.balance_over": self.engine.balance_over}),
            **({"compiled blocks": "yes"} if self.engine.compiles else {}),
            "validation prompts": prompts_digest(validation)[:12] if validation else "none",
        }

    @property
    def validates(self) -> bool:
        """Whether there are validation prompts."""
        return bool(self._prompts("val"))

    def _prompts(self, part: str) -> tuple[Prompt, ...]:
        data: Any = getattr(self.trainer, "datamodule", None)
        return () if data is None else data.prompts(part)

    def noise_seeds(self, batch: PromptBatch) -> list[int]:
        """Seeds of a batch's pictures, one for each prompt, whichever rank draws it."""
        pairs = zip(batch.prompts, batch.occurrences, strict=True)
        return [noise_seed(self.seed, batch.step, prompt.index, occurrence) for prompt, occurrence in pairs]

    def configure_callbacks(self) -> Sequence[Callback]:
        """The strategy, whose state so joins every checkpoint; then what reads its report, in this order."""
        return [self.strategy, TraceRecorder(), ProgressLine()]

    def configure_optimizers(self) -> Any:
        """Whatever the strategy steps; None for a search without gradients."""
        return self.strategy.configure_optimizers(self)

    def setup(self, stage: str) -> None:
        """Finds the run's folder; refuses a precision that would cast theta, and prompts that cannot be served."""
        # All ranks at once: the trainer broadcasts the folder whenever it is asked for.
        self.run_dir = Path(self.trainer.log_dir or self.trainer.default_root_dir)
        check_precision(self.trainer.precision)
        check_strategy(self.trainer.strategy)
        self._require_agreement()
        for part in PARTS[stage]:
            check_negatives(self.layout.members, f"data.{part}", self._prompts(part))
            if part != "predict":
                self.rewards.check(self._prompts(part))

    def _require_agreement(self) -> None:
        """Compares what all ranks have loaded."""
        model = fingerprint(self.backbone.transformer)
        facts = {
            "the model's shapes": model.sites_hash,
            "the model's weights": self.fixed_weights.digest,
            "what the run starts from": self.start_theta.tobytes().hex(),
            "what is trained": str(checksum(self.policy.parameters().values())),
            **{f"data.{part}": prompts_digest(self._prompts(part)) for part in PROMPT_PARTS},
        }
        fix = "Copy the same files to all machines, or put them where all can read them."
        require_agreement(self.trainer, "files", facts, fix)

    def configure_model(self) -> None:
        """Cuts the transformer up where the trainer's strategy lets ranks hold it together; a second call does nothing.

        What has to be read of the whole model is read before: afterwards no rank has it.
        """
        # `load_from_checkpoint` calls this without a trainer.
        strategy = None if self._trainer is None else self._trainer.strategy
        if not isinstance(strategy, Sharded) or strategy.shard_mesh.size() == 1 or self.engine.lockstep.binds:
            return
        transformer = self.backbone.transformer
        check_can_be_cut(transformer, isinstance(self.backbone, Native), self.policy.trains, self.engine.compiles)
        self.fixed_weights  # noqa: B018 - read while there is something to read
        cut_up(transformer, strategy.shard_mesh)
        self.engine.lockstep.size = strategy.shard_mesh.size()

    def _start_stage(self) -> None:
        """Settles what a stage needs of the device; by now a checkpoint has been read."""
        prompts = [prompt for part in PROMPT_PARTS for prompt in self._prompts(part)]
        self.engine.start(prompts, self.trainer.precision_plugin.forward_context, self._smallest)

    def _smallest(self, number: int) -> int:
        return int(min(part[0] for part in self.gather(np.array([float(number)]))))

    def on_validation_start(self) -> None:
        """Settles what a stage needs of the device."""
        self._start_stage()

    def on_test_start(self) -> None:
        """Settles what a stage needs of the device."""
        self._start_stage()

    def on_predict_start(self) -> None:
        """Settles what a stage needs of the device."""
        self._start_stage()

    def on_fit_start(self) -> None:
        """Says what is about to happen; a run that was cut off after its last generation is closed here."""
        self._start_stage()
        RunReport(self).announce()
        # The trainer skips the loop of a finished run, and with it `on_train_end`.
        if self.resumed_step is not None and 0 <= self.trainer.max_steps <= self.resumed_step:
            self._finish()

    def evaluate(
        self,
        thetas: Floats,
        prompts: Sequence[Prompt],
        seeds: Sequence[int],
        cells: Cells | None = None,
        num_steps: int | None = None,
        done: Callable[[UnitResult], None] | None = None,
        known: Floats | None = None,
        weights: str = LIVE,
        held_out: bool = False,
    ) -> Evaluation:
        """Scores candidates on prompts, shared among all ranks; arguments as for `Evaluator.evaluate`.

        `weights` names the copy of the trained network weights that draws the pictures.
        """
        trainer, started = self.trainer, time.monotonic()
        ranks = (trainer.global_rank, trainer.world_size)
        with self.policy.using(weights):
            answer = self.engine.evaluator.evaluate(
                thetas,
                prompts,
                seeds,
                num_steps or self.num_steps,
                cells,
                *ranks,
                self.gather,
                done,
                known,
                held_out,
                beat=self.pulse.beat,
            )
        self.spend(answer.num_images, answer.num_forwards, time.monotonic() - started)
        return answer

    def spend(self, images: int, forwards: int, seconds: float) -> None:
        """Adds to the budget what work in a fit has cost; a test is none of it.

        Args:
            images: Pictures made and scored, over all ranks.
            forwards: Forwards of one row over all ranks; one with its backward counts twice.
            seconds: Seconds that all ranks took.
        """
        if self.trainer.state.fn == "fit":
            self.budget = self.budget.plus(images, forwards, seconds * self.trainer.world_size)

    def gather(self, values: Floats) -> Sequence[Floats]:
        """Gives each rank's vector to every rank.

        Args:
            values: float64, of one length on all ranks.

        Returns:
            The vectors in the order of the ranks.
        """
        with self.pulse.waiting():
            gathered = self.all_gather(torch.from_numpy(values).to(self.device))
        assert isinstance(gathered, Tensor)
        # Lightning drops the world dimension on one process.
        return list(gathered.reshape(self.trainer.world_size, -1).cpu().numpy())

    def on_train_start(self) -> None:
        """Catches up on a validation that a kill cut off: the trainer believes that it took place."""
        done = self.trainer.fit_loop.epoch_loop.batch_progress.total.ready
        interval = self.trainer.val_check_batch
        if done and interval and done % interval == 0:
            validate(self)

    def training_step(self, batch: PromptBatch, batch_idx: int) -> None:
        """Lets the strategy work; afterwards the budget is logged, the x-axis that all strategies share."""
        self.strategy.training_step(self, batch)
        for name in ("images", "forwards", "device_seconds"):
            self.log(f"budget/{name}", float(getattr(self.budget, name)), batch_size=1)

    def on_validation_epoch_start(self) -> None:
        """Fixes the vectors of this validation."""
        self._validation = Validation.of(self)

    def validation_step(self, batch: PromptBatch, batch_idx: int) -> None:
        """Scores the strategy's vectors on fixed prompts with fixed noise, the same for any number of ranks."""
        self._validation.score(self, batch)

    def on_validation_epoch_end(self) -> None:
        """Hands the scores to the strategy, which keeps the best validated vector."""
        scores = self._validation.close(self)
        for name, score in validation_metrics(self, scores, self._validation.means).items():
            self.log(name, score, batch_size=1)
        if self.trainer.state.fn == "fit":
            self._deliver()
        else:
            RunReport(self).print_scores(scores)

    def _deliver(self) -> None:
        """Takes the strategy's answer, and writes calibration.json and the adapter."""
        self.answer = self.strategy.answer(self)
        # A strategy that trains theta itself goes on from where theta is.
        if not self.strategy.owns_theta:
            with torch.no_grad():
                self.theta.copy_(torch.from_numpy(self.answer.theta))
        RunReport(self).write_answer()

    def on_train_end(self) -> None:
        """Validates what the last generations brought, if the interval missed it, and delivers."""
        self._finish()
        checkpoint = run_checkpoint(self.trainer)
        if checkpoint is not None:
            # So far it may not know the answer.
            checkpoint.save(self.trainer)

    def _finish(self) -> None:
        validate(self)
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
        """Draws prompts with the calibration and writes one PNG each; returns the files of this rank."""
        return RunReport(self).draw(batch)

    def on_predict_epoch_end(self) -> None:
        """Says where the pictures are."""
        RunReport(self).finish_prediction()

    def pictures(self, candidate: Candidate, batch: PromptBatch, num_steps: int) -> Mapping[int, Tensor]:
        """Draws this rank's share of the prompts; picture [3, H, W] on the CPU by the position of its prompt."""
        ranks = (self.trainer.global_rank, self.trainer.world_size)
        units = self.engine.evaluator.images(
            candidate.theta[None], batch.prompts, self.noise_seeds(batch), num_steps, None, *ranks, self.pulse.note
        )
        # Outside of its steps the trainer does not set up a mixed precision, in which the scored pictures are drawn.
        with self.trainer.precision_plugin.forward_context(), self.policy.using(candidate.weights):
            return {
                cell.slot: image for cells, images in units for cell, image in zip(cells, images.cpu(), strict=True)
            }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keeps trainable keys alone, and the run's state."""
        # Before the first validation nothing was delivered, and yet there is something to test.
        if self.trainer.state.fn == "fit":
            self.answer = self.strategy.answer(self)
        save_run(self, checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Checks that the checkpoint is of this model and these parameters, and takes the rest of its state."""
        restore_run(self, checkpoint)
