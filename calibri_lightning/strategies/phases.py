"""Whose turn it is when strategies alternate, and what each of them sees of the module and the trainer."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from calibri_lightning.adapters.policy import LIVE
from calibri_lightning.adapters.policy_part import PolicyPart
from calibri_lightning.errors import UserError
from calibri_lightning.strategies.base import CalibratedModule, Candidate, Strategy
from calibri_lightning.strategies.checks import check_at_least
from calibri_lightning.strategies.ledger import digest
from calibri_lightning.strategies.selection import START
from calibri_lightning.strategies.turns import TurnStrategy

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

    from calibri_lightning.adapters.policy import Policy, Trains


@dataclass(frozen=True)
class Phase:
    """A strategy and how long its turns are."""

    strategy: Strategy
    """How parameters are improved in this phase."""
    steps: int
    """Training steps of each of its turns."""


@dataclass(frozen=True)
class Turn:
    """A place in the order of turns."""

    cycle: int
    """How often all phases have had their turn."""
    phase: int
    """Whose turn it is."""
    done: int
    """Steps of this turn that are done."""


@dataclass(frozen=True)
class Order:
    """Who follows whom."""

    steps: tuple[int, ...]
    """Steps of a turn of each phase."""
    cycles: int | None
    """How often all phases have their turn; None for no limit."""

    def total(self, max_steps: int) -> int | None:
        """Counts the steps of a run.

        Args:
            max_steps: `trainer.max_steps`; -1 for none.

        Returns:
            Steps, if no phase ends by a rule of its own; None where nothing limits them.
        """
        limits = [max_steps] if max_steps >= 0 else []
        limits += [self.cycles * sum(self.steps)] if self.cycles is not None else []
        return min(limits) if limits else None

    def planned(self, phase: int, total: int | None) -> int:
        """Counts the steps of one phase.

        Args:
            phase: Its number.
            total: Steps of the run.

        Returns:
            Steps in all its turns; -1 where nothing limits them.
        """
        if total is None:
            return -1
        whole, rest = divmod(total, sum(self.steps))
        return whole * self.steps[phase] + min(max(rest - sum(self.steps[:phase]), 0), self.steps[phase])

    def following(self, turn: Turn, over: Collection[int]) -> Turn | None:
        """Says to which turn the next step belongs.

        Args:
            turn: The turn of the step before.
            over: Phases that have ended.

        Returns:
            The turn; None where there is none left.
        """
        if turn.phase not in over and turn.done < self.steps[turn.phase]:
            return turn
        count = len(self.steps)
        for ahead in range(1, count + 1):
            cycle, phase = divmod(turn.cycle * count + turn.phase + ahead, count)
            if self.cycles is not None and cycle >= self.cycles:
                return None
            if phase not in over:
                return Turn(cycle, phase, 0)
        return None


def union(trains: Sequence[Trains]) -> Trains | None:
    """Puts together what strategies train.

    Args:
        trains: Of each of them.

    Returns:
        What a run with all of them trains; None where there is no such run.
    """
    kinds = set(trains)
    if len(kinds) == 1:
        return trains[0]
    return None if "full" in kinds else "both"


def check_phases(phases: Sequence[Phase]) -> None:
    """Checks that strategies can take turns.

    Args:
        phases: The phases.

    Raises:
        UserError: If there are none, one has no steps, or a strategy cannot take turns or stands in two phases.
    """
    if not phases:
        raise UserError("strategy.phases is empty; name at least one phase: {strategy: {class_path: ...}, steps: 10}.")
    for number, phase in enumerate(phases):
        check_at_least(f"phases[{number}].steps", phase.steps, 1, "it is a number of training steps")
        if not isinstance(phase.strategy, TurnStrategy):
            raise UserError(
                f"phases[{number}].strategy is {type(phase.strategy).__name__}, which cannot take turns with others. "
                "Take one that does a whole step by itself, such as FlowGRPO, CMAES or PairES; write out the phases of "
                "a nested Alternate."
            )
    if len({id(phase.strategy) for phase in phases}) < len(phases):
        raise UserError(
            "Two phases share one strategy object, whose state would be mixed up. Make one for each phase; for "
            "repeated turns of the same one, set cycles or trainer.max_steps."
        )


def overlap(one: Strategy, other: Strategy) -> bool:
    """Whether two strategies train the same variables.

    Args:
        one: A strategy.
        other: Another one.

    Returns:
        True where both train theta, or both train the network.
    """
    theta = all(strategy.trains in ("scales", "both") for strategy in (one, other))
    return theta or all(strategy.trains in ("lora", "both", "full") for strategy in (one, other))


class PhaseTrainer:
    """The trainer, but for what a phase must not decide for the others.

    Args:
        trainer: The trainer.
        max_steps: Steps that this phase is planned to have; -1 for no limit.
    """

    def __init__(self, trainer: Trainer, max_steps: int) -> None:
        self._trainer, self.max_steps, self.should_stop = trainer, max_steps, False

    def __getattr__(self, name: str) -> Any:
        """Everything else is the trainer's."""
        return getattr(self._trainer, name)


class PhaseModule:
    """The module as one phase sees it: its own parameters, copies, ledger, random streams and number of steps.

    Args:
        module: The module.
        strategy: The phase's strategy.
        number: The phase's number.
        max_steps: Steps that it is planned to have; -1 for no limit.
    """

    def __init__(self, module: CalibratedModule, strategy: Strategy, number: int, max_steps: int) -> None:
        self._module, self._network = module, ""
        self.part = PolicyPart(module.policy, strategy.trains, copy_prefix(number), (START,))
        self.policy = cast("Policy", self.part)
        self.trainer = cast("Trainer", PhaseTrainer(module.trainer, max_steps))
        self.run_dir = module.run_dir / f"phase{number}"
        # Two searches with one stream would try the same directions.
        own = hashlib.sha256(f"calibri-phase:{module.seed}:{number}".encode()).digest()
        self.seed = int.from_bytes(own[:4], "big") if number else module.seed
        self.logged: dict[str, float] = {}

    def __getattr__(self, name: str) -> Any:
        """Everything else is the module's."""
        return getattr(self._module, name)

    @property
    def module(self) -> CalibratedModule:
        """Itself, as strategies know it."""
        return cast("CalibratedModule", self)

    @property
    def lightning(self) -> LightningModule:
        """Itself, as the trainer's hooks know it."""
        return cast("LightningModule", self)

    @property
    def judged_by(self) -> Mapping[str, str | int]:
        """All that scores depend on; within a turn of a search also the network that the turn began with."""
        network = {"network weights": self._network} if self._network else {}
        return {**self._module.judged_by, **network}

    def log(self, name: str, value: Any) -> None:
        """Collects what the phase logs; one and the same hook must log for all phases.

        Args:
            name: Its name.
            value: Its value.
        """
        self.logged[name] = float(value)

    def note_network(self) -> None:
        """Takes the digest of the network's trained weights, so that recorded rewards are used for these alone."""
        whole = self.part.whole
        tensors = [whole.tensors(LIVE)[name] for name in whole.network_names]
        self._network = digest(*(_bytes(tensor) for tensor in tensors))[:12] if tensors else ""

    def named(self, candidate: Candidate) -> Candidate:
        """A candidate of the phase, with the name by which the whole policy knows its weights.

        Args:
            candidate: The phase's.

        Returns:
            The same for the module.
        """
        return Candidate(candidate.theta, self.part.name(candidate.weights))


def copy_prefix(number: int) -> str:
    """What stands before the names of a phase's copies.

    Args:
        number: The phase's number.

    Returns:
        The prefix.
    """
    return f"phase{number}."


def _bytes(tensor: Tensor) -> bytes:
    return bytes(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
