"""What a strategy is: a Lightning callback to which the module delegates its training step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from lightning.pytorch.callbacks import Callback

from calibri_lightning.adapters.policy import LIVE, Trains
from calibri_lightning.arrays import Cells, Floats

if TYPE_CHECKING:
    from lightning.pytorch import Trainer
    from torch import nn

    from calibri_lightning.adapters.policy import Policy
    from calibri_lightning.calibration.scales import Layout
    from calibri_lightning.engine import Engine
    from calibri_lightning.launch.pulse import Pulse
    from calibri_lightning.prompts import Prompt, PromptBatch
    from calibri_lightning.rewards import RewardSet
    from calibri_lightning.rewards.blend import Blend
    from calibri_lightning.rewards.watch import Watch
    from calibri_lightning.sampling.grid import Evaluation, UnitResult
    from calibri_lightning.sampling.sharing import Request


@dataclass(frozen=True)
class Words:
    """What people are told that a strategy does."""

    doing: str = "Calibrating"
    """Of the model, at the start."""
    done: str = "calibrated"
    """Of the result, in tables."""
    step: str = "generation"
    """A training step."""


@dataclass(frozen=True)
class Candidate:
    """A setting of everything that a run may change, worth a score."""

    theta: Floats
    """Scales and member weights, float64 [n]."""
    weights: str = LIVE
    """Which copy of the trained network weights (LoRA) goes with them; see `adapters.policy.Policy`."""


class CalibratedModule(Protocol):
    """What a strategy needs of the LightningModule that it trains."""

    layout: Layout
    start_theta: Floats
    seed: int
    num_steps: int
    run_dir: Path
    trainer: Trainer
    engine: Engine
    policy: Policy
    rewards: RewardSet
    blend: Blend
    watch: Watch
    theta: nn.Parameter
    answer: Candidate
    pulse: Pulse

    @property
    def start(self) -> Candidate:
        """What the run began with."""

    @property
    def judged_by(self) -> Mapping[str, str | int]:
        """All that scores depend on besides theta, prompts and seeds; a resumed search must find it unchanged."""

    @property
    def validates(self) -> bool:
        """Whether there are validation prompts."""

    def noise_seeds(self, batch: PromptBatch) -> Sequence[int]:
        """Gives the seeds of a batch's pictures, the same on all ranks.

        Args:
            batch: The prompts.

        Returns:
            One seed a prompt.
        """

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
        """Scores candidates on prompts; called with the same request on all ranks, answers the same on all.

        Args:
            thetas: Candidates, float64 [K, n].
            prompts: Prompt of each of the S slots.
            seeds: Noise seed of each slot.
            cells: Which cells to score, bool [K, S].
            num_steps: Sampling steps; the module's own by default.
            done: Called on this rank after each of its units.
            known: Rewards of requested cells that are known already, NaN elsewhere.
            weights: Which copy of the trained network weights draws the pictures.
            held_out: Whether the rewards that are held out are asked, too.

        Returns:
            Rewards and costs.
        """

    def same(self, one: Candidate, other: Candidate) -> bool:
        """Whether two candidates draw the same pictures.

        Args:
            one: A candidate.
            other: Another one.

        Returns:
            True where both their scales and their network weights agree.
        """

    def gather(self, values: Floats) -> Sequence[Floats]:
        """Gives each rank's vector to every rank.

        Args:
            values: float64, of one length on all ranks.

        Returns:
            The vectors in the order of the ranks.
        """

    def spend(self, images: int, forwards: int, seconds: float) -> None:
        """Adds to the budget what work in a fit has cost.

        Args:
            images: Pictures made and scored, over all ranks.
            forwards: Forwards of one row over all ranks; one with its backward counts twice.
            seconds: Seconds that all ranks took.
        """

    def optimizers(self) -> Any:
        """Gives the optimizer, a stand-in of Lightning's where there is none."""

    def log(self, name: str, value: Any) -> None:
        """Logs a number.

        Args:
            name: Its name.
            value: Its value.
        """


@dataclass(frozen=True, kw_only=True)
class BestVector(Candidate):
    """The candidate with the best score on the fixed validation set."""

    score: float
    """Validation score."""
    origin: str
    """Its name among the candidates: "start", "mean", "tail" (average of the last means), "policy" or "ema"."""
    generation: int
    """Training steps done when it was validated."""


def outside_of_a_fit(module: CalibratedModule) -> Mapping[str, Candidate]:
    """What is worth a score where nothing is trained: the answer of a checkpoint, wherever it came from.

    Args:
        module: The module.

    Returns:
        The start, and the answer where it is another one.
    """
    answer = {} if module.same(module.answer, module.start) else {"best": module.answer}
    return {"start": module.start} | answer


class Strategy(Callback, ABC):
    """How parameters are improved.

    `CalibriModule` returns its strategy from `configure_callbacks`, so that the strategy's state is in every
    checkpoint.
    """

    words: ClassVar[Words] = Words()
    """What people are told that it does."""
    owns_theta: ClassVar[bool] = False
    """Whether theta, the parameter, is trained in place; otherwise it holds the answer."""
    trains: Trains = "scales"
    """What it changes: scales, a LoRA, both, or all weights of the transformer."""

    @property
    @abstractmethod
    def best(self) -> BestVector | None:
        """The best validated candidate so far."""

    @property
    @abstractmethod
    def images(self) -> int:
        """Training images judged so far, the same after any kill and resume."""

    @abstractmethod
    def answer(self, module: CalibratedModule) -> Candidate:
        """Gives the candidate to deliver.

        Args:
            module: The module that is trained.

        Returns:
            The best validated candidate; without validation the current estimate.
        """

    @property
    @abstractmethod
    def prompts_per_step(self) -> int:
        """Prompts that one training step takes."""

    def describe_step(self, module: CalibratedModule) -> str:
        """Says what a training step takes.

        Args:
            module: The module that is trained.

        Returns:
            Part of a sentence.
        """
        steps, forwards = module.num_steps, module.num_steps * len(module.layout.members)
        return (
            f"{steps} steps = {forwards} forwards an image, {self.prompts_per_step} prompts a {self.words.step}, "
            f"{module.engine.rows_per_forward} rows a forward"
        )

    def requests(self, module: CalibratedModule) -> Sequence[Request]:
        """Says what a training step asks of all ranks, by which they are told at the start whether some would wait.

        Args:
            module: The module that is trained.

        Returns:
            Requests, one after another; none where it is not known.
        """
        return ()

    @abstractmethod
    def training_step(self, module: CalibratedModule, batch: PromptBatch) -> None:
        """Does the work of one step.

        Args:
            module: The module that is trained.
            batch: Its prompts.
        """

    @abstractmethod
    def validation_candidates(self, module: CalibratedModule) -> Mapping[str, Candidate]:
        """Candidates worth a score on the validation set.

        Args:
            module: The module that is trained.

        Returns:
            Candidates by name; empty when nothing is new.
        """

    @abstractmethod
    def on_validated(self, module: CalibratedModule, scores: Mapping[str, float]) -> None:
        """Takes the scores of `validation_candidates`.

        Args:
            module: The module that is trained.
            scores: Mean reward on the complete validation set by name; the same on all ranks.
        """

    def configure_optimizers(self, module: CalibratedModule) -> Any:
        """Gives the optimizers of the module.

        Args:
            module: The module that is trained.

        Returns:
            None: a search without gradients has none.
        """
        return None
