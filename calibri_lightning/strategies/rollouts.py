"""Makes and scores the pictures of a training step; every rank makes its share and keeps what it needs to train on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from calibri_lightning.arrays import Floats
from calibri_lightning.errors import EchoError, UserError
from calibri_lightning.evaluation.diversity import pixel_distance, thumbnails
from calibri_lightning.launch.pulse import StopRequested
from calibri_lightning.sampling.frames import middle_frame
from calibri_lightning.sampling.grid import Cell, Grid, UnitResult
from calibri_lightning.sampling.overlap import Behind
from calibri_lightning.sampling.sharing import owner_of, share_of

if TYPE_CHECKING:
    from calibri_lightning.strategies.base import CalibratedModule
    from calibri_lightning.strategies.groups import Slots

T = TypeVar("T")
_DIVERSITY = "distance within groups"


@dataclass(frozen=True)
class Drawn(Generic[T]):
    """A unit's pictures as latents, and what training on them needs."""

    kept: T
    """What is kept for training."""
    latents: Tensor
    """Latents at sigma 0, float32 [B, ...]."""
    num_forwards: int
    """Forwards of one row each."""


@dataclass(frozen=True)
class Rollout(Generic[T]):
    """The pictures of a step."""

    units: tuple[range, ...]
    """Slots of every unit, this rank's or not."""
    kept: Mapping[int, T]
    """What this rank keeps, by number of the unit: of its own ones, or of another, where it has none and others wait
    for its forwards (`sampling.lockstep`)."""
    shares: tuple[Sequence[int], ...]
    """Numbers of each rank's units."""
    total: Floats
    """Weighted sum of the rewards of each slot, float64 [S]; NaN where one failed."""
    each: Mapping[str, Floats]
    """The same for every single reward and extra metric."""
    diversity: float
    """Distance between pictures of one prompt and one unit, as of `evaluation.diversity.pixel_distance`; the mean."""
    num_images: int
    """Pictures over all ranks."""
    num_forwards: int
    """Forwards of one row each, over all ranks."""


def roll_out_units(
    module: CalibratedModule, slots: Slots, unit_size: int, draw: Callable[[range], Drawn[T]]
) -> Rollout[T]:
    """Makes and scores the pictures of a step, shared among all ranks; the rewards are the same on all of them.

    While units are scored, the next one is sampled.

    Args:
        module: The module that is trained.
        slots: The pictures.
        unit_size: Pictures of a unit.
        draw: Makes the pictures of a unit, under `no_grad`.

    Returns:
        The rollout.

    Raises:
        UserError: If a reward fails, here or on another rank, or a unit does not fit into memory.
        StopRequested: If a rank was asked to stop; on all of them.
    """
    trainer, evaluator = module.trainer, module.engine.evaluator
    units, shape = slots.units(unit_size), (1, len(slots.prompts))
    grid = Grid.empty((*evaluator.rewards.names, _DIVERSITY), shape)
    kept: dict[int, T] = {}
    lockstep = module.engine.lockstep
    shares = tuple(share_of(range(len(units)), rank, trainer.world_size) for rank in range(trainer.world_size))
    late = lockstep.late()
    failure: Exception | None = None

    def score(index: int, images: Tensor) -> UnitResult:
        total, each = evaluator.score(images, [slots.prompts[slot] for slot in units[index]])
        cells = tuple(Cell(0, slot) for slot in units[index])
        each[_DIVERSITY] = _spread(images, [slot // slots.group_size for slot in units[index]])
        return UnitResult(index, len(units), cells, total, each)

    def finish(num_forwards: int, result: UnitResult) -> None:
        grid.put(result, num_forwards)

    try:
        with Behind(evaluator.backbone.device, evaluator.num_scoring) as behind, torch.no_grad():
            for index, counts in lockstep.turns(shares, trainer.global_rank, 0):
                with late.kept():
                    module.pulse.beat(f"drawing unit {index + 1} of {len(units)}")
                with lockstep.forwards():
                    drawn = draw(units[index])
                    images = evaluator.backbone.decode(drawn.latents)
                kept.setdefault(index, drawn.kept)
                if counts and not late.is_there:
                    with late.kept():
                        behind.submit(partial(score, index, images), partial(finish, drawn.num_forwards))
                del images, drawn
            late.raise_it()
    except torch.OutOfMemoryError as error:
        failure = UserError(
            f"{unit_size} pictures of a unit do not fit into the memory of {evaluator.backbone.device}. A unit is made "
            "and trained on whole, so it is not cut smaller by itself: lower strategy.pictures_per_unit."
        )
        failure.__cause__ = error
    except StopRequested as stop:
        grid.stop = stop.number
    except Exception as error:
        failure = error
    if failure is not None and lockstep.is_lost:
        raise failure
    # The other ranks wait in `gather`: they are told before this one stops.
    grid.failed = failure is not None
    owners = {Cell(0, slot): owner_of(i, trainer.world_size) for i, unit in enumerate(units) for slot in unit}
    grid = Grid.merge([Grid.unpack(part, grid.names, shape) for part in module.gather(grid.pack())], owners)
    if failure is not None:
        raise failure
    if grid.failed:
        raise EchoError("Another rank could not make its pictures; its own message says why. Fix that and run again.")
    if grid.stop:
        raise StopRequested(grid.stop)
    each = dict(zip(grid.names, grid.values[1:, 0], strict=True))
    spread = each.pop(_DIVERSITY)
    diversity = float(spread[np.isfinite(spread)].mean()) if np.isfinite(spread).any() else np.nan
    return Rollout(units, kept, shares, grid.values[0, 0], each, diversity, grid.num_images, grid.num_forwards)


def cleaned(latents: Tensor) -> Tensor:
    """Takes what is not finite out of latents that are trained on.

    A picture that went wrong is masked by its reward, but 0 times the gradient of NaN would still be NaN.

    Args:
        latents: Of any shape.

    Returns:
        The same, with 0 in place of NaN and infinity; finite ones keep their bits.
    """
    return latents.nan_to_num(0.0, 0.0, 0.0)


def _spread(images: Tensor, groups: Sequence[int]) -> Floats:
    """Distance between the pictures of each group, for each picture; NaN where a group has one picture here."""
    values = np.full(len(groups), np.nan)
    for group in dict.fromkeys(groups):
        members = [place for place, other in enumerate(groups) if other == group]
        if len(members) > 1:
            values[members] = float(pixel_distance(thumbnails(middle_frame(images[members]))))
    return values
