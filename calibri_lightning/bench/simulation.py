"""A generation of a search on many ranks, of which only the pictures are made up.

Candidates come from CMA-ES, units from `cut_units`, their owners from `sharing`, and what travels is what a run packs
and pickles (`Grid.pack`, `strategies.rounds`). A picture takes a given time, with noise; nothing is drawn.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy as np

from calibri_lightning.arrays import Cells, Floats
from calibri_lightning.launch.pulse import Pulse
from calibri_lightning.prompts import Prompt, PromptBatch
from calibri_lightning.rewards.blend import Blend
from calibri_lightning.sampling.grid import Cell, Evaluation, Grid, UnitResult, cut_units
from calibri_lightning.sampling.noise import noise_seed
from calibri_lightning.sampling.sharing import owner_of, share_of
from calibri_lightning.strategies.cma_core import CMACore
from calibri_lightning.strategies.ledger import Ledger
from calibri_lightning.strategies.rounds import Status, evaluate, on_rank_zero, pose
from calibri_lightning.strategies.search import SearchSpace

if TYPE_CHECKING:
    from calibri_lightning.strategies.base import CalibratedModule

T = TypeVar("T")

SIZE_BYTES = 8
"""torch sends the length of a pickled object before the object."""


@dataclass(frozen=True)
class Cost:
    """What takes time."""

    picture_seconds: float = 1.0
    """Sampling, decoding and scoring one picture."""
    unit_seconds: float = 0.05
    """What a unit takes besides its pictures."""
    jitter: float = 0.02
    """Standard deviation of a unit's time, relative to it."""
    slowdown: float = 1.0
    """How many times as long the last rank takes, where there are several."""
    latency: float = 50e-6
    """Seconds of one hop of a collective; it takes log2(W) of them, rounded up."""
    bandwidth: float = 1e9
    """Bytes a second that rank 0 sends or receives."""
    seed: int = 0
    """Of the jitter."""


@dataclass(frozen=True)
class Work:
    """A generation."""

    popsize: int
    """Candidates, each on all prompts."""
    bucket: int
    """Prompts."""
    pictures_per_unit: int
    """Most pictures of a unit."""
    num_parameters: int = 77
    num_rewards: int = 1

    @property
    def num_pictures(self) -> int:
        """Pictures of the generation."""
        return self.popsize * self.bucket


@dataclass(frozen=True)
class Generated:
    """A generation on some number of ranks."""

    world_size: int
    balance_over: int
    num_units: int
    loads: tuple[int, ...]
    """Pictures of each rank."""
    idle_share: float
    """Share of all ranks' time, communication excluded, in which they wait for the slowest."""
    sent_bytes: int
    """From rank 0 to the others: candidates, decisions and status for each of them, and its own grid."""
    received_bytes: int
    """From the others to rank 0: their grids."""
    num_collectives: int
    seconds: float
    """Of the slowest rank, with what travels."""

    @property
    def busiest(self) -> int:
        """Pictures of the busiest rank."""
        return max(self.loads)


@dataclass
class _Wire:
    """Counts what travels, and stands for the trainer of rank 0."""

    world_size: int
    global_rank: int = 0
    sent_bytes: int = 0
    received_bytes: int = 0
    num_collectives: int = 0
    pulse: Pulse = field(default_factory=Pulse)

    @property
    def strategy(self) -> _Wire:
        """Itself: it also broadcasts."""
        return self

    @property
    def lightning_module(self) -> _Wire:
        """Itself: of the module only the pulse is asked for."""
        return self

    def broadcast(self, value: T) -> T:
        """Counts an object that rank 0 sends, as torch pickles it."""
        if self.world_size > 1:
            self.sent_bytes += (self.world_size - 1) * (len(pickle.dumps(value)) + SIZE_BYTES)
            self.num_collectives += 1
        return value

    def gather(self, packed: Sequence[Floats]) -> None:
        """Counts the vectors of all ranks, which every rank gets."""
        if self.world_size > 1:
            self.sent_bytes += (self.world_size - 1) * packed[0].nbytes
            self.received_bytes += sum(vector.nbytes for vector in packed[1:])
            self.num_collectives += 1


@dataclass
class _Ranks:
    """The module of a run, for all ranks at once; `CalibratedModule` as far as a generation needs it."""

    work: Work
    cost: Cost
    balance_over: int
    trainer: _Wire
    num_units: int = 0
    loads: list[int] = field(default_factory=list)
    busy: list[float] = field(default_factory=list)
    waited: float = 0.0
    blend: Blend = field(default_factory=lambda: Blend(()))
    judged_by: Mapping[str, str | int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.loads, self.busy = [0] * self.trainer.world_size, [0.0] * self.trainer.world_size
        self._noise = np.random.Generator(np.random.Philox(self.cost.seed))

    def noise_seeds(self, batch: PromptBatch) -> list[int]:
        """Seeds as a run has them."""
        return [noise_seed(0, batch.step, prompt.index, 0) for prompt in batch.prompts]

    def evaluate(
        self,
        thetas: Floats,
        prompts: Sequence[Prompt],
        seeds: Sequence[int],
        cells: Cells,
        done: Callable[[UnitResult], None],
        known: Floats | None = None,
    ) -> Evaluation:
        """Does the part of every rank, joins their grids and counts what that takes."""
        units = cut_units(cells, self.work.pictures_per_unit, self.balance_over)
        world_size, names = self.trainer.world_size, [f"reward{i}" for i in range(self.work.num_rewards)]
        factors = np.maximum(0.0, 1 + self.cost.jitter * self._noise.standard_normal(len(units)))
        parts, busy = [], []
        for rank in range(world_size):
            part, seconds = Grid.empty(names, cells.shape), 0.0
            for number in share_of(range(len(units)), rank, world_size):
                rewards = np.array([_reward(thetas[cell.candidate], cell) for cell in units[number]])
                each = dict.fromkeys(names, rewards)
                part.put(UnitResult(number, len(units), units[number], rewards, each), num_forwards=0)
                seconds += factors[number] * (self.cost.unit_seconds + len(units[number]) * self.cost.picture_seconds)
            if 0 < rank == world_size - 1:
                seconds *= self.cost.slowdown
            parts.append(part)
            busy.append(float(seconds))
            self.loads[rank] += part.num_images
            self.busy[rank] += busy[-1]
        self.waited += max(busy)
        self.num_units += len(units)
        packed = [part.pack() for part in parts]
        self.trainer.gather(packed)
        owners = {cell: owner_of(i, world_size) for i, unit in enumerate(units) for cell in unit}
        whole = Grid.merge([Grid.unpack(vector, names, parts[0].values.shape[1:]) for vector in packed], owners)
        each = dict(zip(names, whole.values[1:], strict=True))
        return Evaluation(whole.values[0], each, whole.num_images, whole.num_forwards)


def _reward(theta: Floats, cell: Cell) -> float:
    """Any finite number that differs among candidates: what is told to the search decides nothing here."""
    return float(-np.square(theta - 1.1).sum() + 0.01 * cell.slot)


def simulate(work: Work, cost: Cost, world_size: int, balance_over: int) -> Generated:
    """Runs the first generation of the published search, candidates and messages included.

    Args:
        work: The generation.
        cost: What takes time.
        world_size: Ranks.
        balance_over: As `model.balance_over`.

    Returns:
        What every rank did, and what travelled.
    """
    wire = _Wire(world_size)
    ranks = _Ranks(work, cost, balance_over, wire)
    size = work.num_parameters
    space = SearchSpace(np.ones(size), np.full(size, -1.0), np.full(size, 3.0), np.ones(size))
    core = CMACore(space, 0, 0.25, work.popsize, (work.bucket,))
    batch = PromptBatch(0, tuple(Prompt(f"prompt {number}", number) for number in range(work.bucket)))
    module, trainer = cast("CalibratedModule", ranks), cast("Any", wire)
    # It is asked what a killed run had finished, which is nothing, and never written to: units are not recorded here.
    ledger = Ledger(Path())
    generation = on_rank_zero(trainer, lambda: pose(core, ledger, module, batch, 0, 0.0))
    judged = evaluate(core, ledger, module, batch, generation)
    core.tell(judged.rewards)
    on_rank_zero(
        trainer,
        lambda: Status(core.mean, core.tail_mean(), core.diagnostics(), core.fitness(judged.rewards)),
    )
    travel = wire.num_collectives * cost.latency * math.ceil(math.log2(world_size))
    travel += (wire.sent_bytes + wire.received_bytes) / cost.bandwidth
    return Generated(
        world_size=world_size,
        balance_over=balance_over,
        num_units=ranks.num_units,
        loads=tuple(ranks.loads),
        idle_share=1 - sum(ranks.busy) / (world_size * ranks.waited),
        sent_bytes=wire.sent_bytes,
        received_bytes=wire.received_bytes,
        num_collectives=wire.num_collectives,
        seconds=ranks.waited + travel,
    )
