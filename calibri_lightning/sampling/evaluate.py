"""Scores candidates: pictures and rewards of a grid candidate x prompt slot, the same on any number of ranks.

The cells of the grid are cut into units whose composition depends on the request alone. A unit is sampled,
decoded and scored as one batch, by one rank: floating-point results change with the batch, so a fixed
composition is what makes the rewards bit-identical however many ranks share the units
(docs/search.md). While units are scored, the next one is sampled (`overlap`); units are finished in order.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from calibri_lightning.calibration.scales import Rows
from calibri_lightning.errors import EchoError, UserError
from calibri_lightning.launch.pulse import StopRequested
from calibri_lightning.sampling.frames import middle_frame
from calibri_lightning.sampling.grid import Cell, Evaluation, Grid, UnitResult, cut_units
from calibri_lightning.sampling.lockstep import Lockstep, Turn
from calibri_lightning.sampling.overlap import Behind
from calibri_lightning.sampling.rollout import Samples
from calibri_lightning.sampling.rows import check_rows
from calibri_lightning.sampling.sharing import owner_of, share_of

if TYPE_CHECKING:
    from calibri_lightning.backbones.base import Backbone
    from calibri_lightning.calibration.attach import Attachment
    from calibri_lightning.calibration.scales import Layout
    from calibri_lightning.prompts import Prompt
    from calibri_lightning.rewards.combine import RewardSet

_log = logging.getLogger(__name__)

Gather = Callable[[NDArray[np.float64]], Sequence[NDArray[np.float64]]]
"""Gives each rank's float64 vector (all of one length) to every rank, in the order of the ranks."""


class Evaluator:
    """Makes and scores the pictures of candidates."""

    def __init__(
        self,
        backbone: Backbone,
        attachment: Attachment,
        layout: Layout,
        rewards: RewardSet,
        rows_per_forward: int,
        overlap_scoring: bool = True,
        balance_over: int = 1,
        lockstep: Lockstep | None = None,
    ) -> None:
        """Joins a model, its scales and its rewards.

        Args:
            backbone: The model.
            attachment: Hooks on exactly the layout's sites.
            layout: The meaning of theta.
            rewards: What scores the pictures.
            rows_per_forward: Most rows (pictures x members) of one forward. It fixes the units, hence the
                last bits of the rewards; where memory runs out, units are sampled in parts.
            overlap_scoring: Whether units are scored in other threads while the next is sampled, as many at a time as
                the rewards can serve; no result depends on it.
            balance_over: Number of ranks among which every request is shared evenly; it fixes the units, too.
            lockstep: Says which ranks hold the model together; by default each has one of its own.

        Raises:
            UserError: If rows_per_forward is below the number of members.
        """
        num_members = len(layout.members)
        check_rows(rows_per_forward, num_members)
        self.backbone, self.attachment, self.layout, self.rewards = backbone, attachment, layout, rewards
        self.overlap_scoring, self.lockstep = overlap_scoring, lockstep or Lockstep()
        self.cells_per_unit, self.balance_over = rows_per_forward // num_members, balance_over
        self._most_cells = self._agreed = self.cells_per_unit

    def evaluate(
        self,
        thetas: NDArray[np.float64],
        prompts: Sequence[Prompt],
        seeds: Sequence[int],
        num_steps: int,
        cells: NDArray[np.bool_] | None = None,
        rank: int = 0,
        world_size: int = 1,
        gather: Gather | None = None,
        done: Callable[[UnitResult], None] | None = None,
        known: NDArray[np.float64] | None = None,
        held_out: bool = False,
        seen: Callable[[tuple[Cell, ...], Tensor], None] | None = None,
        beat: Callable[[str], None] | None = None,
    ) -> Evaluation:
        """Scores candidates on prompts; they share each slot's prompt and noise (common random numbers).

        Args:
            thetas: Candidates, float64 [K, n].
            prompts: Prompt of each of the S slots.
            seeds: Noise seed of each slot.
            num_steps: Sampling steps.
            cells: Which cells to score, bool [K, S]; all by default.
            rank: This process, 0 .. world_size - 1; `sharing.share_of` says what it does.
            world_size: Number of processes, all of which call this with the same request.
            gather: Exchanges results; needed when world_size exceeds 1.
            done: Called on this rank after each of its units, before the next one is scored; in the scoring thread.
            known: Rewards of requested cells that a killed run had finished, [K, S] with NaN elsewhere. They
                do not change the composition of the units; a unit of which all cells are known is not
                computed again.
            held_out: Whether the rewards that are held out are asked, too; their values are NaN otherwise.
            seen: Called on this rank with the cells and the pictures of each of its units, in order, before they are
                scored; in the thread that draws.
            beat: Told before each of this rank's units what comes next; may raise `StopRequested`.

        Returns:
            Rewards and costs, the same on all ranks.

        Raises:
            UserError: If a reward fails, here or on another rank.
            StopRequested: On all ranks, once all have stopped, if `beat` raised it on one.
        """
        shape = (len(thetas), len(prompts))
        wanted = np.ones(shape, dtype=bool) if cells is None else cells
        units = cut_units(wanted, self.cells_per_unit, self.balance_over)
        rewards = np.full(shape, np.nan) if known is None else np.where(wanted, known, np.nan)
        todo = [i for i, unit in enumerate(units) if any(np.isnan(rewards[cell]) for cell in unit)]
        grid = Grid.empty(self.rewards.names, shape)
        failure: Exception | None = None
        turns = self._turns(todo, rank, world_size)
        try:
            self._score(thetas, prompts, seeds, num_steps, units, turns, grid, done, held_out, seen, beat)
        except StopRequested as stop:
            grid.stop = stop.number
        except Exception as error:
            if self.lockstep.is_lost:
                raise
            # The other ranks wait in `gather`: they are told before this one stops.
            failure = error
            grid.failed = True
        grid.at_once, all_at_once = self._most_cells, [self._most_cells]
        if world_size > 1:
            assert gather is not None, "more than one rank needs a gather"
            owners = {cell: owner_of(i, world_size) for i, index in enumerate(todo) for cell in units[index]}
            parts = [Grid.unpack(part, self.rewards.names, shape) for part in gather(grid.pack())]
            grid, all_at_once = Grid.merge(parts, owners), [part.at_once for part in parts]
        if failure is not None:
            raise failure
        self._agree(all_at_once, rank)
        if grid.failed:
            raise EchoError("Scoring failed on another rank, whose own message says why. Fix that and run again.")
        if grid.stop:
            raise StopRequested(grid.stop)
        fresh = [cell for index in todo for cell in units[index]]
        for cell in fresh:
            rewards[cell] = grid.values[0][cell]
        each = dict(zip(self.rewards.names, grid.values[1:], strict=True))
        return Evaluation(rewards, each, grid.num_images, grid.num_forwards)

    def _agree(self, at_once: Sequence[int], rank: int) -> None:
        """Samples as few pictures at once as the rank that can take the fewest: ranks wait for each other anyway."""
        short = [number for number, count in enumerate(at_once) if count < self._agreed]
        if short:
            self.sample_at_most(min(at_once))
            if rank == 0:
                ranks = ", ".join(map(str, short))
                _log.warning(
                    "Out of memory on rank %s: all ranks sample %d pictures at once from now on.", ranks, self._agreed
                )

    @property
    def at_once(self) -> int:
        """Pictures that are sampled at once: those of a unit, or fewer where memory has run out."""
        return self._agreed

    def sample_at_most(self, pictures: int) -> None:
        """Samples units in parts from now on.

        Args:
            pictures: Most pictures of a part, at least 1; more than are sampled at once now changes nothing.
        """
        self._most_cells = self._agreed = min(pictures, self._agreed)

    def images(
        self,
        thetas: NDArray[np.float64],
        prompts: Sequence[Prompt],
        seeds: Sequence[int],
        num_steps: int,
        cells: NDArray[np.bool_] | None = None,
        rank: int = 0,
        world_size: int = 1,
        beat: Callable[[str], None] | None = None,
    ) -> Iterator[tuple[tuple[Cell, ...], Tensor]]:
        """Makes pictures without scoring them.

        Args:
            thetas: Candidates, float64 [K, n].
            prompts: Prompt of each of the S slots.
            seeds: Noise seed of each slot.
            num_steps: Sampling steps.
            cells: Which cells to draw, bool [K, S]; all by default.
            rank: This process; it does every world_size-th unit.
            world_size: Number of processes.
            beat: Told before each of this rank's units what comes next.

        Yields:
            The cells of a unit and its pictures, float32 [B, 3, H, W] in 0..1; the middle frames of videos. Where ranks
            hold the model together, go on to the end: others wait for the forwards.
        """
        wanted = np.ones((len(thetas), len(prompts)), dtype=bool) if cells is None else cells
        rows = self._rows(thetas)
        units = cut_units(wanted, self.cells_per_unit, self.balance_over)
        for turn in self._turns(range(len(units)), rank, world_size):
            unit = units[turn.unit]
            if beat is not None:
                beat(f"drawing unit {turn.unit + 1} of {len(units)}")
            images = middle_frame(self._draw(unit, rows, prompts, seeds, num_steps)[0])
            if turn.counts:
                yield unit, images

    def _turns(self, todo: Sequence[int], rank: int, world_size: int) -> list[Turn]:
        """What a rank draws: every world_size-th unit, and what the ranks that share its model need of it."""
        return self.lockstep.turns(
            [share_of(todo, r, world_size) for r in range(world_size)], rank, next(iter(todo), 0)
        )

    def _score(
        self,
        thetas: NDArray[np.float64],
        prompts: Sequence[Prompt],
        seeds: Sequence[int],
        num_steps: int,
        units: Sequence[tuple[Cell, ...]],
        turns: Sequence[Turn],
        grid: Grid,
        done: Callable[[UnitResult], None] | None,
        held_out: bool,
        seen: Callable[[tuple[Cell, ...], Tensor], None] | None,
        beat: Callable[[str], None] | None,
    ) -> None:
        """Makes and scores this rank's units, in order, into the grid."""
        rows = self._rows(thetas)

        def score(index: int, images: Tensor) -> UnitResult:
            total, each = self.score(images, [prompts[cell.slot] for cell in units[index]], held_out)
            return UnitResult(index, len(units), units[index], total, each)

        def finish(num_forwards: int, result: UnitResult) -> None:
            grid.put(result, num_forwards)
            if done is not None:
                done(result)

        late = self.lockstep.late()
        with Behind(self.backbone.device, self.num_scoring) as behind:
            for index, counts in turns:
                if beat is not None:
                    with late.kept():
                        beat(f"drawing unit {index + 1} of {len(units)}")
                images, num_forwards = self._draw(units[index], rows, prompts, seeds, num_steps, behind.wait)
                if not counts or late.is_there:
                    continue
                with late.kept():
                    if seen is not None:
                        seen(units[index], images)
                    behind.submit(partial(score, index, images), partial(finish, num_forwards))
                # The scoring thread alone holds the pictures, and frees them when it is done.
                del images
            late.raise_it()

    def _rows(self, thetas: NDArray[np.float64]) -> Rows:
        rows = self.layout.rows(torch.tensor(np.asarray(thetas, dtype=np.float64)))
        return Rows(rows.scales.to(self.backbone.device), rows.weights.to(self.backbone.device))

    @property
    def num_scoring(self) -> int:
        """Batches that are scored at the same time while the next is sampled; 0 to score in between."""
        return self.rewards.concurrency if self.overlap_scoring else 0

    def score(
        self, images: Tensor, prompts: Sequence[Prompt], held_out: bool = False
    ) -> tuple[NDArray[np.float64], dict[str, NDArray[np.float64]]]:
        """Scores pictures.

        Args:
            images: float32 [B, 3, H, W] in 0..1, or videos [B, F, 3, H, W].
            prompts: The prompt of each picture.
            held_out: Whether the rewards that are held out are asked, too.

        Returns:
            The weighted sum, float64 [B], and every single reward and extra metric; NaN for a picture with pixels that
            are not finite.
        """
        # A broken picture has no reward, whatever a reward function makes of NaN pixels.
        broken = ~images.flatten(1).isfinite().all(dim=1)
        scores = self.rewards.score(images.nan_to_num(0.0), prompts, held_out)
        matrix = torch.stack([scores.total, *scores.each.values()]).to(torch.float64)
        values = matrix.masked_fill(broken.to(matrix.device), float("nan")).cpu().numpy()
        return values[0], dict(zip(scores.each, values[1:], strict=True))

    @torch.no_grad()
    def _draw(
        self,
        unit: Sequence[Cell],
        rows: Rows,
        prompts: Sequence[Prompt],
        seeds: Sequence[int],
        num_steps: int,
        settle: Callable[[], bool] = lambda: False,
    ) -> tuple[Tensor, int]:
        """Pictures of a unit and the forwards they took; sampled in parts once memory has run out.

        `settle` waits for work that takes up memory at the same time, and says whether there was any.
        """
        while True:
            parts = [unit[i : i + self._most_cells] for i in range(0, len(unit), self._most_cells)]
            try:
                # Validation may run in inference mode, whose tensors no later training step could use: those that the
                # backbone keeps (embeddings, positions) are made here.
                with torch.inference_mode(False), self.lockstep.forwards():
                    done = [self._sample(part, rows, prompts, seeds, num_steps) for part in parts]
                    images = torch.cat([self.backbone.decode(part.latents) for part in done])
                return images, sum(part.num_forwards for part in done)
            except torch.OutOfMemoryError as error:
                cause = error.with_traceback(None)
            if self.lockstep.binds:
                raise UserError(
                    f"A unit of {len(unit)} pictures does not fit into the memory of {self.backbone.device}, and while "
                    "ranks hold the model together none of them can cut its units by itself. Lower "
                    "model.rows_per_forward."
                ) from cause
            # Outside of the handler, whose traceback would keep the failed batch alive.
            settled = settle()
            torch.cuda.empty_cache()
            if settled:
                continue  # what was scored meanwhile may have taken the memory
            if self._most_cells == 1:
                raise UserError(
                    f"One picture of {self.backbone.image_size} pixels does not fit into the memory of "
                    f"{self.backbone.device}. "
                    "Choose a smaller picture, dtype bfloat16, or a larger device."
                ) from cause
            self._most_cells = (min(self._most_cells, len(unit)) + 1) // 2

    def _sample(
        self,
        unit: Sequence[Cell],
        rows: Rows,
        prompts: Sequence[Prompt],
        seeds: Sequence[int],
        num_steps: int,
    ) -> Samples:
        device = self.backbone.device
        slots = list(dict.fromkeys(cell.slot for cell in unit))
        place = [slots.index(cell.slot) for cell in unit]
        candidates = torch.tensor([cell.candidate for cell in unit]).to(device)
        guided = any(member.prompt == "negative" for member in self.layout.members)
        texts, negatives = [prompts[s].text for s in slots], [prompts[s].negative for s in slots]
        return self.backbone.sample(
            self.attachment,
            Rows(rows.scales[candidates], rows.weights[candidates]),
            self.layout.members,
            self.backbone.encode(texts).take(place),
            self.backbone.encode(negatives, negative=True).take(place) if guided else None,
            self.backbone.noise([seeds[s] for s in slots])[place],
            num_steps,
        )
